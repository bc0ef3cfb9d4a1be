"""The built documentation site in a browser: axe-core's rules, widths, pictures, the search: `nox -s accessibility`."""

import functools
import http.server
import threading
from pathlib import Path

import pytest
from chromium import chromium

axe = pytest.importorskip("axe_playwright_python.base", reason="axe is not installed: see nox -s accessibility")
SITE = Path(__file__).parents[2] / "site"
if not (SITE / "index.html").exists():
    pytest.skip("site/ is not built: see nox -s accessibility", allow_module_level=True)

PAGES = sorted(path.relative_to(SITE).as_posix().removesuffix("index.html") for path in SITE.rglob("*.html"))
WIDTHS, SCHEMES = (1360, 390), ("light", "dark")

#: By how many pixels the page is too wide, code and tables that need scrolling, and pictures without file or text.
MEASURES = """() => {
  const wide = (element) => element.scrollWidth > element.clientWidth + 1;
  const code = document.querySelectorAll("[class*='language-']:not(.language-text) pre > code");
  return {
    overflow: Math.max(0, document.documentElement.scrollWidth - innerWidth),
    wide: [...code, ...document.querySelectorAll(".md-typeset__scrollwrap")].filter(wide)
      .map((element) => element.innerText.slice(0, 80)),
    missing: [...document.images].filter((image) => image.complete && !image.naturalWidth).map((image) => image.src),
    untitled: [...document.images].filter((image) => !image.alt).map((image) => image.src),
  };
}"""
VIOLATIONS = """async () => (await axe.run({ resultTypes: ["violations"] })).violations.map((rule) =>
  `${rule.id}: ${rule.help}: ${rule.nodes.slice(0, 3).map((node) => node.html.slice(0, 160)).join(" | ")}`)"""

#: What a reader looks for, and the page that must be among the first three answers.
SEARCHES = {
    "keras": "coming-from-keras/",
    "jupyter": "jupyter/",
    "freeze": "transfer-learning/",
    "overfit": "notebooks/overfitting/",
    "gpu": "gpu/",
    "live plot": "jupyter/",
    "learning rate": "learning-rates/",
    "dropout": "reference/layers/",
    "csv": "data/",
    "saliency": "what-a-network-sees/",
}


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    """Where the site is served."""
    handler = functools.partial(Handler, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module", params=SCHEMES)
def page(request, browser):
    """A page in light or dark colors. Errors on it and files that cannot be loaded are in `page.faults`."""
    with browser.new_context(color_scheme=request.param, reduced_motion="reduce") as context:
        page = context.new_page()
        page.faults = []
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("response", lambda answer: page.faults.append(answer.url) if answer.status >= 400 else None)
        yield page


@pytest.mark.slow
@pytest.mark.parametrize("path", PAGES)
def test_a_page_keeps_the_rules_of_axe_and_its_width(page, address, path):
    page.faults.clear()
    found = []
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        page.goto(address + path)
        measures = page.evaluate(MEASURES)
        if width == max(WIDTHS):
            assert measures["wide"] == []
        assert (measures["overflow"], measures["missing"], measures["untitled"]) == (0, [], []), width
        page.evaluate(axe.AXE_SCRIPT + "\n;0")
        found += [f"{width} pixels: {fault}" for fault in page.evaluate(VIOLATIONS)]
    assert found == []
    assert page.faults == []


def test_a_fault_is_found(page, address):
    """The checks above are not blind: a pale text and a picture without a description count."""
    page.set_viewport_size({"width": 390, "height": 900})
    page.goto(address)
    page.evaluate("""() => document.querySelector("article").insertAdjacentHTML("afterbegin",
        "<p style='color: #888; background: #999'>pale</p><img src='none.png'><div style='width: 500px'>wide</div>")""")
    page.evaluate(axe.AXE_SCRIPT + "\n;0")
    rules = {fault.split(":")[0] for fault in page.evaluate(VIOLATIONS)}
    assert {"color-contrast", "image-alt"} <= rules
    assert page.evaluate(MEASURES)["overflow"] > 0


@pytest.mark.parametrize("query", SEARCHES)
def test_the_search_finds_the_page_among_its_first_answers(browser, address, query):
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(address)
        ready = page.locator(".md-search-result__meta", has_text="Type to start searching")
        ready.wait_for(state="attached")  # before, the theme would miss what is typed
        page.locator(".md-search__input").press_sequentially(query)  # the theme waits for keys
        answers = page.locator(".md-search-result__item > a")
        answers.first.wait_for(state="attached")
        links = [answers.nth(i).get_attribute("href") for i in range(min(3, answers.count()))]
        assert SEARCHES[query] in [link.removeprefix(address).split("?")[0].split("#")[0] for link in links]

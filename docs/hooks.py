"""Hooks of MkDocs: the reference, made from public names; executed notebooks; links to files."""

import copy
import importlib
import inspect
import re
from operator import attrgetter
from pathlib import Path

import jupytext
import nbformat
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

import xpnet
import xpnet.training.backpropagation  # for its classes in MORE

MODULES = ("layers", "augment", "losses", "optimizers", "schedules", "metrics", "callbacks",
           "initializers", "datasets", "attribution", "plots", "estimators", "onnx", "distributed",
           "errors")  # fmt: skip
#: On the page of xpnet, after the names in its `__all__`.
MORE = ["model.LoadedState", "parameters.Parameter", "training.backpropagation.Explanation",
        "training.backpropagation.LayerExplanation",
        "training.backpropagation.ParameterExplanation", "export_onnx", "import_onnx"]  # fmt: skip
ROOT = Path(__file__).parents[1]
#: The names at the top of their page, in this order; other names follow in alphabetical order.
FIRST = ("Sequential", "Model", "Input", "load", "History", "check_gradients", "explain",
         "explain_step", "generate", "get_backend")  # fmt: skip
#: The names at its end, in this order: what is there to derive from, and what few need.
LAST = ("Backend", *MORE, "Callback", "Run", "Distortion", "Initializer", "Layer", "Loss",
        "Metric", "Optimizer", "PrincipalComponents", "Schedule", "XpnetError", "get", "fans",
        "format_logs")  # fmt: skip
#: Public for the other modules of xpnet, not for users.
INTERNAL = ("OptimizerState", "module_attributes", "shape_text", "shown", "suggestion",
            "unknown_name", "inference_outputs", "drop_workspaces", "shared_copy")  # fmt: skip
DOCS = ROOT / "docs"
EXERCISES = DOCS / "notebooks" / "exercises.py"  # which notebooks import
IMPORT = "from exercises import grade\n"


def notebooks():
    """The sources of the notebooks, in the percent format of jupytext."""
    paths = sorted(EXERCISES.parent.glob("*.py"))
    return [path for path in paths if path.read_text(encoding="utf-8").startswith("# %%")]


def on_files(files, config):
    """Add a page of the reference for each module, and a page for each notebook."""
    _add_reference(files, config)
    for path in notebooks():
        _add_notebook(files, config, path)
    return files


def _add_notebook(files, config, path):
    """Execute a notebook. Add a page with its outputs, pictures, and a notebook without outputs."""
    name = path.stem
    notebook = jupytext.read(path)
    notebook.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    alone = copy.deepcopy(notebook)
    for cell in alone.cells:
        cell.source = cell.source.replace(IMPORT, "")
    alone.cells.insert(1, nbformat.v4.new_code_cell(EXERCISES.read_text(encoding="utf-8").rstrip()))
    folder = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=120, resources=folder, coalesce_streams=True).execute()
    body, resources = MarkdownExporter().from_notebook_node(
        notebook, {"output_files_dir": f"{name}_pictures"}
    )
    body = re.sub(
        r"!\[png\](?=\(\S+_(\d+)_\d+\.png\))", lambda link: _described(notebook, link), body
    )
    title, _, rest = body.lstrip().partition("\n")
    about = (
        f"A notebook with its outputs. [Download it]({name}.ipynb), or open "
        f"`{path.relative_to(ROOT).as_posix()}` as a notebook in a clone of the repository, "
        "with VS Code or the Jupytext extension of Jupyter."
    )
    for file, content in {
        f"{name}.md": "\n\n".join([title, about, rest]),
        f"{name}.ipynb": nbformat.writes(alone),
        **resources["outputs"],
    }.items():
        files.append(File.generated(config, f"notebooks/{file}", content=content))


def _described(notebook, link):
    """The beginning of a link to a picture, with the `alt` of its cell, as in # %% alt="A line"."""
    cell = notebook.cells[int(link[1])]
    if "alt" not in cell.metadata:
        hint = 'Begin the cell with # %% alt="…"'
        raise PluginError(f"a picture has no description. {hint}:\n{cell.source}")
    return f"![{cell.metadata['alt']}]"


def _add_reference(files, config):
    """A page for each module, with the classes and functions in its `__all__`."""
    for name in ("xpnet", *MODULES):
        path = "xpnet" if name == "xpnet" else f"xpnet.{name}"
        module = importlib.import_module(path)
        lines = [f"# {path}", "", inspect.getdoc(module) or "", ""]
        more = MORE if name == "xpnet" else []
        for public in sorted(
            {*module.__all__, *more} - {*INTERNAL}, key=lambda public: _rank(name, public)
        ):
            value = attrgetter(public)(module)
            if inspect.isclass(value) or inspect.isfunction(value):
                lines += [f"::: {value.__module__}.{value.__qualname__}", *_options(value), ""]
        files.append(File.generated(config, f"reference/{name}.md", content="\n".join(lines)))


def _rank(page, public):
    """The place of a name on a page of the reference, to sort by."""
    if page == "xpnet" and public in FIRST:
        return 0, FIRST.index(public), ""
    return (2, LAST.index(public), "") if public in LAST else (1, 0, public.lower())


def _options(value):
    """Options of a name in the reference.

    Sequential shows the methods of all models, which are in their base class.
    """
    if value is not xpnet.Sequential:
        return []
    base = next(cls for cls in value.__mro__ if "fit" in vars(cls))
    described = {
        name: member
        for name, member in vars(base).items()
        if inspect.isfunction(member) and member.__doc__
    }
    methods = [name for name in described if not name.startswith("_") and name not in INTERNAL]
    return ["    options:", f"      inherited_members: {methods}"]


def on_page_markdown(markdown, page, **_):
    """Replace links to files without a page by their names, and links to notebooks by their pages.

    Raises PluginError if a file does not exist.
    """
    folder = (DOCS / page.file.src_path).parent

    def resolved(link):
        target = (folder / link[2]).resolve()
        if target in notebooks():
            return f"[{link[1]}]({link[2].removesuffix('.py')}.md)"
        if target.is_relative_to(DOCS) and target.suffix != ".py":
            return link[0]
        if not target.exists():
            raise PluginError(f"{page.file.src_path}: there is no {link[2]}")
        path = f"`{target.relative_to(ROOT).as_posix()}`"
        return path if link[1].strip("`").endswith(target.name) else f"{link[1]} ({path})"

    return re.sub(r"\[([^\]]+)\]\((?!\w+:)([^)#\s]+)[^)]*\)", resolved, markdown)


def on_post_page(output, **_):
    """Give accessible names to the search and to the parts of the table of contents."""
    output = output.replace('role="dialog"', 'role="dialog" aria-label="Search"', 1)
    unnamed = '<nav class="md-nav" aria-label="'
    return output.replace(unnamed, f"{unnamed}Parts of ")


on_post_template = on_post_page  # for 404.html, which comes from the theme

"""Hooks of MkDocs: pages of the reference, made from the public names, and links to files of the project."""

import importlib
import inspect
import re
from operator import attrgetter
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

import xpnet

MODULES = ("layers", "augment", "losses", "optimizers", "schedules", "metrics", "callbacks", "initializers", "datasets",
           "plots", "estimators", "onnx", "distributed", "errors")  # fmt: skip
ROOT = Path(__file__).parents[1]
#: The names at the top of their page, in this order; other names follow in alphabetical order.
FIRST = ("Sequential", "Model", "Input", "load", "History", "check_gradients", "explain_step", "generate",
         "get_backend")  # fmt: skip
#: The names at its end, in this order: what is there to derive from, and what few need.
LAST = ("Backend", "model.LoadedState", "parameters.Parameter", "export_onnx", "import_onnx",
        "Callback", "Run", "Distortion", "Initializer", "Layer", "Loss", "Metric", "Optimizer", "Schedule",
        "XpnetError", "get", "fans", "format_logs")  # fmt: skip
#: Public for the other modules of xpnet, not for users.
INTERNAL = ("OptimizerState", "module_attributes", "shape_text", "suggestion", "unknown_name",
            "inference_outputs", "drop_workspaces", "shared_copy")  # fmt: skip


def on_files(files, config):
    """Add a page of the reference for each module, with the classes and functions in its `__all__`."""
    for name in ("xpnet", *MODULES):
        path = "xpnet" if name == "xpnet" else f"xpnet.{name}"
        module = importlib.import_module(path)
        lines = [f"# {path}", "", inspect.getdoc(module) or "", ""]
        more = ["model.LoadedState", "parameters.Parameter", "export_onnx", "import_onnx"] if name == "xpnet" else []
        for public in sorted({*module.__all__, *more} - {*INTERNAL}, key=lambda public: _rank(name, public)):
            value = attrgetter(public)(module)
            if inspect.isclass(value) or inspect.isfunction(value):
                lines += [f"::: {value.__module__}.{value.__qualname__}", *_options(value), ""]
        files.append(File.generated(config, f"reference/{name}.md", content="\n".join(lines)))
    return files


def _rank(page, public):
    """The place of a name on a page of the reference, to sort by."""
    if page == "xpnet" and public in FIRST:
        return 0, FIRST.index(public), ""
    return (2, LAST.index(public), "") if public in LAST else (1, 0, public.lower())


def _options(value):
    """Options of a name in the reference. Sequential shows the methods of all models, which are in their base class."""
    if value is not xpnet.Sequential:
        return []
    base = next(cls for cls in value.__mro__ if "fit" in vars(cls))
    described = {name: member for name, member in vars(base).items() if inspect.isfunction(member) and member.__doc__}
    methods = [name for name in described if not name.startswith("_") and name not in INTERNAL]
    return ["    options:", f"      inherited_members: {methods}"]


def on_page_markdown(markdown, page, **_):
    """Replace links to files outside docs/ by the names of the files. Raises PluginError if a file does not exist."""

    def as_name(link):
        if not (ROOT / link[2]).exists():
            raise PluginError(f"{page.file.src_path}: there is no {link[2]}")
        return f"{link[1]} (`{link[2]}`)"

    return re.sub(r"\[([^\]]+)\]\(\.\./([^)#]+)[^)]*\)", as_name, markdown)

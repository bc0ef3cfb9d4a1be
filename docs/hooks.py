"""What the site needs beside its pages: the reference, made from the public names, and links that stay inside it."""

import importlib
import inspect
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

MODULES = ("layers", "augment", "losses", "optimizers", "schedules", "metrics", "callbacks", "initializers", "datasets",
           "plots", "estimators", "onnx", "distributed", "errors")  # fmt: skip
ROOT = Path(__file__).parents[1]


def public_names(module):
    """The names in `__all__`, or else the public classes and functions that the module itself defines."""
    listed = getattr(module, "__all__", None)
    if listed is None:
        kinds = inspect.isclass, inspect.isfunction
        listed = [
            name for name, value in vars(module).items()
            if not name.startswith("_") and any(kind(value) for kind in kinds) and value.__module__ == module.__name__
        ]  # fmt: skip
    return [name for name in listed if not name.startswith("_") and not inspect.ismodule(getattr(module, name))]


def on_files(files, config):
    """A page of the reference for each module."""
    for name in ("xpnet", *MODULES):
        path = "xpnet" if name == "xpnet" else f"xpnet.{name}"
        module = importlib.import_module(path)
        names = public_names(module) + (["export_onnx", "import_onnx"] if name == "xpnet" else [])
        lines = [f"# {path}", "", inspect.getdoc(module) or "", ""]
        for public in names:
            value = getattr(module, public)
            if inspect.isclass(value) or inspect.isfunction(value):
                lines += [f"::: {value.__module__}.{value.__qualname__}", ""]
        files.append(File.generated(config, f"reference/{name}.md", content="\n".join(lines)))
    return files


def on_page_markdown(markdown, page, **_):
    """A link to a file of the project that is no page becomes the file's name; one to nothing is an error."""

    def as_name(link):
        if not (ROOT / link[2]).exists():
            raise PluginError(f"{page.file.src_path}: there is no {link[2]}")
        return f"{link[1]} (`{link[2]}`)"

    return re.sub(r"\[([^\]]+)\]\(\.\./([^)#]+)[^)]*\)", as_name, markdown)

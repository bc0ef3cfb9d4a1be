"""The commit and the versions of all packages that are measured; imports none of them."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("numpy", "numba", "cupy", "cupy-cuda12x", "cupy-cuda13x", "torch", "jax", "scikit-learn")


def commit() -> str:
    """The environment variable XPNET_COMMIT, for copies without a git repository; else the output of git describe."""
    return os.environ.get("XPNET_COMMIT", "").strip() or commit_of(ROOT)


def commit_of(tree: Path) -> str:
    """The output of git describe for a source tree; "unknown" if it is not the top of a git repository."""
    try:
        if Path(_git(tree, "rev-parse", "--show-toplevel")).resolve() == tree:  # not the repository of a parent folder
            return _git(tree, "describe", "--always", "--dirty")
    except (OSError, subprocess.SubprocessError):
        pass
    return "unknown"


def _git(tree: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, cwd=tree, timeout=10)
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """The version of each package that is installed."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found

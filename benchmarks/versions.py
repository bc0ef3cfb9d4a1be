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
    if name := os.environ.get("XPNET_COMMIT", "").strip():
        return name
    try:
        if Path(_git("rev-parse", "--show-toplevel")).resolve() == ROOT:  # not the repository of a parent folder
            return _git("describe", "--always", "--dirty")
    except (OSError, subprocess.SubprocessError):
        pass
    return "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, cwd=ROOT, timeout=10)
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

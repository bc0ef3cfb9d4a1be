"""Examples as programs: started as users start them, but without internet access."""

import os
import subprocess
import sys
from pathlib import Path

import xpnet


def run_program(path, folder, *arguments, data=None, first_on_path=None):
    """Run the program at `path` on the CPU, in `folder`, with warnings as errors. Returns the finished process.

    data: the folder with MNIST, for XPNET_DATA_DIR.  first_on_path: a folder with modules that hide others.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("XPNET_") and "proxy" not in k.lower()}
    closed = "http://127.0.0.1:9"  # a closed port, so that downloads fail at once
    environment |= {"http_proxy": closed, "https_proxy": closed, "PYTHONIOENCODING": "utf-8"}
    environment |= {"XDG_CACHE_HOME": str(folder / "cache"), "HOME": str(folder)}  # for pooch's cache
    environment["MPLCONFIGDIR"] = str(folder.parent / "matplotlib")  # shared, because the font cache takes seconds
    paths = [first_on_path, Path(xpnet.__file__).parents[1]]
    environment["PYTHONPATH"] = os.pathsep.join(str(path) for path in paths if path)
    if data:
        environment["XPNET_DATA_DIR"] = data
    command = [sys.executable, "-W", "error", str(path), "--backend", "cpu", *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, encoding="utf-8", timeout=300)

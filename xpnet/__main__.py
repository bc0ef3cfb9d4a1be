"""The command `python -m xpnet info`: versions, devices, and how to fix what cannot be used."""

import argparse
import importlib.metadata
import platform

import numpy

import xpnet
from xpnet.backends.cpu.operators import describe_loops

_MINIMUM_VERSIONS = {"numpy": "2.0", "cupy": "14.1"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m xpnet", description=xpnet.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print versions, the BLAS that NumPy uses, and whether a GPU can be used")
    parser.parse_args()
    print("\n".join(info()))


def info() -> list[str]:
    """The lines that `python -m xpnet info` prints."""
    lines = [
        f"xpnet   {xpnet.__version__}",
        f"Python  {platform.python_version()} on {platform.platform()}",
        f"NumPy   {numpy.__version__} (needs {_MINIMUM_VERSIONS['numpy']} or later)",
        f"CuPy    {_cupy_version()} (needs {_MINIMUM_VERSIONS['cupy']} or later, for the GPU only)",
        "",
    ]
    for name, reason in xpnet.available_backends().items():
        if reason is not None:
            lines.append(f"{name}: cannot be used: {reason}")
            continue
        lines.append(f"{name}: ready")
        described = xpnet.get_backend(name).describe()
        if name == "cpu":
            described = [*described, ("loops", describe_loops())]
        lines += [f"  {label:<7} {text}" for label, text in described]
    return lines


def _cupy_version() -> str:
    found = [d for d in importlib.metadata.distributions() if (d.metadata["Name"] or "").lower().startswith("cupy")]
    return ", ".join(sorted(f"{d.version} ({d.metadata['Name']})" for d in found)) or "not installed"


if __name__ == "__main__":
    main()

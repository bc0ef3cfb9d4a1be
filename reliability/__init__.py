"""Attacks on xpnet: `python -m reliability` runs them, and docs/reliability.md has the result."""

import sys
from pathlib import Path

_SUPPORT = str(Path(__file__).parents[1] / "tests" / "support")
if _SUPPORT not in sys.path:  # generators and small models that tests use too
    sys.path.append(_SUPPORT)

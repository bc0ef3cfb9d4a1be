"""The attacks are imported from the source tree. The source distribution has none, so that it has no tests of them."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # after the installed package
collect_ignore_glob = [] if (ROOT / "reliability").exists() else ["test_*.py"]

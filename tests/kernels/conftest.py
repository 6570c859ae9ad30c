"""Makes `reference.py`, and the kernels of this checkout where they are not installed, importable."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
for path in (HERE, HERE.parents[1] / "kernels"):
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))

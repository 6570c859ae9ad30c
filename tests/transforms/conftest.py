"""The tiny models are those of the integration tests."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "integration_tests"))

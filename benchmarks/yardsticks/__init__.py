"""Yardsticks: models that no package quantized, and texts that were never used to choose anything.

Defaults are **chosen** on one half of them, and accuracy is **reported** on the other; `CHOOSE` and `REPORT` name the
halves. Nobody looks at the reporting half to choose between methods, types or options.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "examples"))

#: names of models (`makers.MAKERS`) and texts (`texts.TEXTS`) that defaults are chosen on
CHOOSE = {"models": ("smollm2", "minilm", "digits"), "texts": ("eval", "calibration")}
#: and those that the tables of docs/accuracy.md report
REPORT = {"models": ("gemma", "causal", "reactions", "vision", "convolutional"), "texts": ("numpy", "aptitude")}

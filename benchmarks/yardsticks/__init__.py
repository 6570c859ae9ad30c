"""Yardsticks: models that no package quantized, and texts that were never used to choose anything.

Defaults are **chosen** on one half of them, and accuracy is **reported** on the other; `CHOOSE` and `REPORT` name the
halves. Nobody looks at the reporting half to choose between methods, types or options.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[2] / "examples"

#: names of models (`makers.MAKERS`) and texts (`texts.TEXTS`) that defaults are chosen on
CHOOSE = {"models": ("smollm2", "minilm", "digits"), "texts": ("eval", "calibration")}
#: and those that the tables of docs/accuracy.md report
REPORT = {"models": ("gemma", "causal", "reactions", "vision", "convolutional"), "texts": ("numpy", "aptitude")}


def example(path: str) -> ModuleType:
    """A script of examples/ as a module, by its path: their names are not unique among those that tests import."""
    name = "examples_" + path.removesuffix(".py").replace("/", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / path)
        if spec is None or spec.loader is None:
            raise FileNotFoundError(f"there is no script {path} in {EXAMPLES}")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]

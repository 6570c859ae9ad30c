"""No default is worse than plain `minmax` by more than 2 %, on the yardsticks that are quick: MiniLM and the digits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

yardstick = pytest.importorskip("yardsticks.measure")

DIGITS = [
    {"weights": "int4"},
    {"weights": "int4", "group_size": 16, "scale_bits": 4},
    {"weights": "int3"},
    {"weights": "int2"},
]


@pytest.mark.parametrize("options", DIGITS, ids=str)
def test_drawn_digits(options: dict[str, Any]) -> None:
    plain = yardstick.measure("digits", yardstick.ours(**options, method="minmax", column_scale=False))
    found = yardstick.measure("digits", yardstick.ours(**options))
    assert found["psnr_db"] >= 0.98 * plain["psnr_db"]


def test_sentence_embeddings(minilm_dir: Path) -> None:
    plain = yardstick.measure("minilm", yardstick.ours(weights="int4", method="minmax", column_scale=False))
    found = yardstick.measure("minilm", yardstick.ours(weights="int4"))
    assert found["one_minus_cosine"] <= 1.02 * plain["one_minus_cosine"]

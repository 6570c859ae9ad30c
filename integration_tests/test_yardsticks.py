"""The default int4 is at most 2 % worse than plain `minmax`, on the yardsticks that are quick: MiniLM and the digits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

yardstick = pytest.importorskip("yardsticks.measure")


def test_drawn_digits() -> None:
    plain = yardstick.measure("digits", yardstick.ours(weights="int4", method="minmax", column_scale=False))
    found = yardstick.measure("digits", yardstick.ours(weights="int4"))
    assert found["psnr_db"] >= 0.98 * plain["psnr_db"]


def test_sentence_embeddings(minilm_dir: Path) -> None:
    plain = yardstick.measure("minilm", yardstick.ours(weights="int4", method="minmax", column_scale=False))
    found = yardstick.measure("minilm", yardstick.ours(weights="int4"))
    assert found["one_minus_cosine"] <= 1.02 * plain["one_minus_cosine"]

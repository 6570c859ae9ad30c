"""The digits example: accuracy after quantization, and recovered by training under it."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def accuracies():
    pytest.importorskip("sklearn")
    path = Path(__file__).parent.parent / "examples" / "qat_digits.py"
    spec = importlib.util.spec_from_file_location("qat_digits", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example.run([("int8", "int8"), ("int4", None), ("int2", None)])


def test_the_float_network_has_learned(accuracies):
    assert accuracies["float"] > 97


@pytest.mark.parametrize(("case", "points"), [("int8/int8", 0.5), ("int4/None", 1.0)])
def test_quantized_after_training(accuracies, case, points):
    assert accuracies[case][0] >= accuracies["float"] - points - 1e-6


def test_two_bits_are_recovered_by_training_under_quantization(accuracies):
    after, trained = accuracies["int2/None"]
    assert trained >= accuracies["float"] - 3
    assert trained >= after

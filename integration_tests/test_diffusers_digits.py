"""Real images: a diffusion transformer trained on handwritten digits draws them in every dtype from the same noise."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "digits_diffusion"))

#: dtype -> smallest PSNR to the float images in dB, largest loss of the classifier's accuracy
GOALS = {"int8": (35.0, 0.01), "float8": (35.0, 0.01), "int4": (25.0, 0.03)}


@pytest.fixture(scope="module")
def measured() -> dict:
    """200 digits a dtype."""
    import sample

    return sample.measure(200, tuple(GOALS))[0]


def test_the_float_model_draws_digits(measured: dict) -> None:
    assert measured["float"]["accuracy"] > 0.95


@pytest.mark.parametrize("dtype", GOALS)
def test_images_stay_what_they_are(measured: dict, dtype: str) -> None:
    psnr, loss = GOALS[dtype]
    assert measured[dtype]["psnr_db"] >= psnr
    assert abs(measured[dtype]["accuracy"] - measured["float"]["accuracy"]) <= loss
    assert measured[dtype]["bytes"] < 0.45 * measured["float"]["bytes"]


def test_the_weights_are_small_enough_to_live_in_the_repository() -> None:
    files = list((ROOT / "examples" / "digits_diffusion" / "model").rglob("*.safetensors"))
    assert files
    assert sum(f.stat().st_size for f in files) < 3_000_000

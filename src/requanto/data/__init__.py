"""The texts that ship with the package; README.md in this folder says where they come from."""

from importlib.resources import files

__all__ = ["calibration_text", "eval_text"]


def eval_text() -> str:
    """Technical prose with code, for measuring: about 50,000 tokens."""
    return files(__name__).joinpath("eval_text.txt").read_text(encoding="utf-8")


def calibration_text() -> str:
    """Fiction, for methods that look at activations: about 55,000 tokens that share nothing with `eval_text`."""
    return files(__name__).joinpath("calibration_text.txt").read_text(encoding="utf-8")

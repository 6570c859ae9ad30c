"""The texts that ship with the package; see README.md in this folder for their sources."""

from importlib.resources import files

__all__ = ["calibration_text", "eval_text"]


def eval_text() -> str:
    """Returns technical prose with code, for evaluation: about 50,000 tokens."""
    return files(__name__).joinpath("eval_text.txt").read_text(encoding="utf-8")


def calibration_text() -> str:
    """Returns fiction, for calibration: about 55,000 tokens, disjoint from `eval_text`."""
    return files(__name__).joinpath("calibration_text.txt").read_text(encoding="utf-8")

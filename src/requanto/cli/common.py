"""Helpers of all commands: consoles, argument types, one-line errors, sizes as text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console

console = Console()
errors = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="Model directory written by save_pretrained, or a name on the hub.")]
Json = Annotated[bool, typer.Option("--json", help="Print only JSON on standard output.")]


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Reports errors that users can cause as one line on standard error, with exit code 1."""
    try:
        yield
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, NotImplementedError) as error:
        errors.print(f"[bold red]error:[/] {type(error).__name__}: ", end="")
        errors.print(str(error) + _advice(error), markup=False, highlight=False)
        raise typer.Exit(1) from error


#: package -> the extra of Requanto that installs it
_EXTRAS = {
    "transformers": "transformers",
    "diffusers": "diffusers",
    "accelerate": "transformers",
    "triton": "triton",
    "matplotlib": "plot",
    "PIL": "diffusers",
}


def _advice(error: Exception) -> str:
    """How to install what an import lacks; "" for any other error."""
    name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return f'. To install it: pip install "requanto[{_EXTRAS[name]}]"' if name in _EXTRAS else ""


def size_text(count: int) -> str:
    """Formats a number of bytes, e.g. ``1.5 MB``."""
    value = float(count)
    for unit in ("B", "KB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"

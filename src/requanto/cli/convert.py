"""``requanto convert SOURCE OUT``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from requanto.cli.common import Json, console, reported, size_text

Source = Annotated[
    str,
    typer.Argument(
        help="Directory of a model or a pipeline that another library quantized (GPTQ, AWQ, compressed-tensors, FP8, "
        "bitsandbytes, MLX ...: docs/formats.md), a .gguf file, or a name on the hub."
    ),
]


def convert(
    source: Source,
    out: Annotated[
        Path,
        typer.Argument(
            help="Output directory. What an earlier run saved there is replaced when the new files are complete."
        ),
    ],
    as_json: Json = False,
) -> None:
    """Write SOURCE, which another library quantized, in Requanto's format. Weights are not rounded anew."""
    from requanto.report.convert_foreign import convert_checkpoint

    with reported():
        result = convert_checkpoint(source, out, progress=not as_json)
        if as_json:
            print(json.dumps(result.to_dict()))
            return
        for part in result.parts:
            where = f"{part.name}: " if part.name else ""
            console.print(f"{where}{part.format}", markup=False, highlight=False, soft_wrap=True)
            console.print(
                f"  {part.quantized} weights stay quantized, {part.dequantized} were turned into floats.",
                markup=False,
                highlight=False,
            )
        console.print(
            f"Saved {out}: {size_text(result.bytes_after)}; the original has {size_text(result.bytes_before)}. "
            f"{result.seconds:.1f} s.",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

"""``requanto compare A B``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from requanto.cli.common import Json, console, reported

Compared = Annotated[str, typer.Argument(help="A model's or a pipeline's directory, or a name on the hub.")]


def compare(
    a: Compared,
    b: Compared,
    text: Annotated[Path | None, typer.Option(help="Text file to read; default: the one that ships here.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="What a pipeline draws. Repeatable.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, ... that pipelines and --run are called with.")] = 4,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; default: the pipeline's.")] = None,
    run: Annotated[
        str | None, typer.Option(help="FILE.py:FUNCTION, called with (model, seed), returns images: for other models.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    max_tokens: Annotated[int, typer.Option(help="Tokens to read at most.")] = 4096,
    weights_only: Annotated[bool, typer.Option("--weights-only", help="Compare weights, run nothing.")] = False,
    out: Annotated[Path | None, typer.Option(help="Directory for compare.png and compare.json.")] = None,
    layers: Annotated[int, typer.Option(help="Layers in the table, the worst first; 0: all.")] = 12,
    dtype: Annotated[str, typer.Option(help="Float dtype: auto, bfloat16, float16, float32.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Where to run, e.g. cuda; default: the CPU.")] = None,
    as_json: Json = False,
) -> None:
    """Compare B with A: error of each layer, and of what the whole model answers or draws."""
    from requanto.report import compare as compare_models

    with reported():
        result = compare_models(
            a,
            b,
            text=None if text is None else text.read_text(encoding="utf-8"),
            run=None if run is None else imported(run),
            prompts=prompt or (),
            seeds=seeds,
            steps=steps,
            window=window,
            max_tokens=max_tokens,
            weights_only=weights_only,
            dtype=dtype,
            device=device,
            progress=not as_json,
        )
        if out is not None:
            result.plot(out / "compare.png")
            (out / "compare.json").write_text(result.to_json() + "\n", encoding="utf-8")
        if as_json:
            print(result.to_json())
        else:
            show(result, layers)


def imported(place: str) -> Callable[[Any, int], Any]:
    """The function that ``FILE.py:FUNCTION`` names.

    Raises:
        ValueError: not of that form, or no such function.
        FileNotFoundError: no such file.
    """
    file, colon, name = place.rpartition(":")
    if not colon or not name.isidentifier():
        raise ValueError(f"--run takes FILE.py:FUNCTION, found {place!r}")
    if not Path(file).is_file():
        raise FileNotFoundError(f"--run: {file} is no file")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"--run: {file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise ValueError(f"--run: {file} has no function {name}")
    return getattr(module, name)


def show(result: Any, count: int) -> None:
    """Prints the worst layers and the figures of the whole model."""
    from requanto.report.compare_plot import summary_lines

    ranked = sorted(result.layers, key=lambda x: (x.weight_error, x.output_error or 0.0), reverse=True)
    table = Table(title=f"A: {result.a}   B: {result.b}")
    for column in ("weight", "A", "B", "weight error", "output error"):
        table.add_column(column, justify="right" if "error" in column else "left", overflow="fold")
    for layer in ranked[:count] if count else result.layers:
        output = "" if layer.output_error is None else f"{layer.output_error:.3%}"
        table.add_row(layer.name, layer.type_a, layer.type_b, f"{layer.weight_error:.3%}", output)
    console.print(table)
    if count and len(ranked) > count:
        console.print(f"The {count} weights with the largest errors of {len(ranked)}; --layers 0 shows all.")
    for name, value in summary_lines(result):
        console.print(f"{name}: {value}", highlight=False)

"""``requanto compare A B``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from requanto.checkpoint.directory import check_target, replace_file
from requanto.cli.common import Json, console, errors, reported

Compared = Annotated[str, typer.Argument(help="Directory of a model or a pipeline, or a name on the hub.")]


def compare(
    a: Compared,
    b: Compared,
    text: Annotated[Path | None, typer.Option(help="Text file; default: a text that ships with requanto.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Prompt for a pipeline. Repeatable.")] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds (0, 1, ...) for pipelines and --run.")] = 4,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; default: the pipeline's.")] = None,
    run: Annotated[
        str | None,
        typer.Option(
            help="For other models: FILE.py:FUNCTION, a function that takes (model, seed) and returns output or images."
        ),
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    max_tokens: Annotated[int, typer.Option(help="Maximum number of tokens to read.")] = 4096,
    questions: Annotated[
        int,
        typer.Option(help="Multiple-choice questions made of the text; for encoders: passages to rank. 0: none."),
    ] = 200,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Compare only weights; do not run the models.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Directory for compare.json, and compare.png with matplotlib installed.")
    ] = None,
    layers: Annotated[int, typer.Option(help="Layers in the table, largest error first; 0: all.")] = 12,
    dtype: Annotated[str, typer.Option(help="dtype to load in: auto, bfloat16, float16, float32.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Device to run on, e.g. cuda; default: CPU.")] = None,
    as_json: Json = False,
) -> None:
    """Compare model B with model A: error of each layer and of the output (text, embeddings or images)."""
    from requanto.report import compare as compare_models

    with reported():
        plots = out is not None and prepared(out)
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
            questions=questions,
            weights_only=weights_only,
            dtype=dtype,
            device=device,
            progress=not as_json,
        )
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            content = result.to_json() + "\n"
            replace_file(out / "compare.json", lambda part: part.write_text(content, encoding="utf-8"))
            if plots:
                result.plot(out / "compare.png")
        if as_json:
            print(result.to_json())
        else:
            show(result, layers)


def prepared(out: Path) -> bool:
    """Checks, before a long run, that its results can be written to a directory; returns whether a plot can be, too.

    Raises:
        OSError: the directory is a file, or may not be written to.
    """
    from requanto.report.compare_plot import missing

    check_target(out)
    lacking = missing()
    if lacking is not None:
        errors.print(
            f"Only {out / 'compare.json'} will be written, without compare.png: {lacking}",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )
    return lacking is None


def imported(place: str) -> Callable[[Any, int], Any]:
    """Imports the function that ``FILE.py:FUNCTION`` names.

    Raises:
        ValueError: the argument has another form, or the file has no such function.
        FileNotFoundError: no such file.
    """
    file, colon, name = place.rpartition(":")
    if not colon or not name.isidentifier():
        raise ValueError(f"--run takes FILE.py:FUNCTION, found {place!r}")
    if not Path(file).is_file():
        raise FileNotFoundError(f"--run: file {file} does not exist")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"--run: {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise ValueError(f"--run: {file} has no function {name}")
    return getattr(module, name)


def show(result: Any, count: int) -> None:
    """Prints the layers with the largest errors and the results of the whole model."""
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
        console.print(f"Shown: the {count} of {len(ranked)} weights with the largest errors; --layers 0 shows all.")
    for name, value in summary_lines(result):
        console.print(f"{name}: {value}", highlight=False)

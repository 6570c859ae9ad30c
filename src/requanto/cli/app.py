"""The command line: ``requanto quantize``, ``inspect``, ``eval``, ``compare``, ``tune``, ``kernels`` ...

Exit codes: 0 success, 1 failure (the reason is on standard error), 2 wrong arguments.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from requanto.checkpoint.directory import check_target
from requanto.cli.common import Json, Model, console, reported, size_text
from requanto.cli.compare import compare
from requanto.cli.convert import convert

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Quantize, inspect and evaluate models.")
app.command()(compare)
app.command()(convert)


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens to each layer.")] = False,
) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s")


_METHOD_HELP = (
    "How to quantize. Without samples: minmax, mse, weighted, aligned, hqq (default: the best for the type). With samples: "
    "gptq, awq, smoothquant, signround."
)


@app.command()
def quantize(
    model: Model,
    out: Annotated[
        Path,
        typer.Argument(
            help="Output directory. What an earlier run saved there is replaced when the new files are complete."
        ),
    ],
    weights: Annotated[
        str,
        typer.Option(
            help="Type of the weights: int8, int4, nf4, nvfp4, float8 ... (see docs/types.md); auto: a type per layer "
            "within --bits or --max-memory."
        ),
    ] = "int8",
    bits: Annotated[
        float | None, typer.Option(help="With --weights auto: mean bits per weight including scales, e.g. 4.5.")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="With --weights auto: size of the whole model, e.g. 80MB.")
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(help="Type of the activations: int8, float8, nvfp4 or an MX type; default: not quantized."),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Number of weights that share a scale; -1: one scale per row.")
    ] = None,
    scale_bits: Annotated[
        int | None, typer.Option(help="Bits of each group's scale and shift, 4 to 8; default: float.")
    ] = None,
    zero_point: Annotated[
        str | None, typer.Option(help="integer: store zero points as whole numbers, in as few bits as a weight.")
    ] = None,
    rotation: Annotated[
        str | None,
        typer.Option(
            help="Rotate rows with Hadamard blocks of up to this size, e.g. 1024; fold: rotate the float model instead, at "
            "no cost at run time."
        ),
    ] = None,
    fold: Annotated[
        bool,
        typer.Option(
            "--fold", help="Put column scales into the norms and layers before, where exact: no cost at run time."
        ),
    ] = False,
    low_rank: Annotated[
        int | None, typer.Option(help="Rank of a low-rank correction stored with the codes; default: none.")
    ] = None,
    column_scale: Annotated[
        str | None,
        typer.Option(
            help="Divide columns by a scale before rounding: mean, std, root, true (the type's best) or false (none); "
            "default: what is best for the type."
        ),
    ] = None,
    modules_to_not_convert: Annotated[
        list[str] | None,
        typer.Option(
            help="Module to leave float: its full name, a parent's name, the last part of its name, or a glob. Repeatable."
        ),
    ] = None,
    module: Annotated[
        list[str] | None,
        typer.Option(help="Type for matching modules as PATTERN=TYPE, e.g. '*.mlp.*=int4'. Repeatable."),
    ] = None,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Also quantize embedding tables.")] = False,
    lm_head: Annotated[bool, typer.Option("--lm-head", help="Also quantize the output embeddings.")] = False,
    convolutions: Annotated[bool, typer.Option("--convolutions", help="Also quantize convolutions.")] = False,
    dtype: Annotated[
        str, typer.Option(help="dtype of everything that is not quantized: auto, bfloat16, float16, float32.")
    ] = "auto",
    device: Annotated[str | None, typer.Option(help="Device to quantize on, e.g. cuda; default: CPU.")] = None,
    method: Annotated[str | None, typer.Option(help=_METHOD_HELP)] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Text file to take samples from; default: a text that ships with requanto."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Number of samples for --method.")] = 128,
    sequence_length: Annotated[int, typer.Option(help="Tokens per sample.")] = 512,
    option: Annotated[
        list[str] | None, typer.Option(help="Option of the method as NAME=VALUE, e.g. iterations=100. Repeatable.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Directory that stores finished blocks; an interrupted run continues from them.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Quantize MODEL and save it to OUT together with its tokenizer."""
    from requanto.config.config import QuantoConfig
    from requanto.report.convert import quantize_directory
    from requanto.report.inspect import inspect_directory
    from requanto.scales import CALIBRATED

    with reported():
        config = QuantoConfig(
            weights=weights,
            activations=activations,
            group_size=group_size,
            scale_bits=scale_bits,
            zero_point=zero_point,
            rotation=int(rotation) if rotation is not None and rotation.isdigit() else rotation,
            fold=fold or None,
            low_rank=low_rank,
            column_scale={"true": True, "false": False}.get(column_scale or "", column_scale),
            modules_to_not_convert=modules_to_not_convert or None,
            modules=_pairs(module or []),
            embeddings=embeddings,
            lm_head=lm_head,
            convolutions=convolutions,
            method=method if method not in CALIBRATED else None,
            bits=bits,
            max_memory=max_memory,
        )
        if method not in CALIBRATED:
            if calibration or option or resume:
                raise ValueError(
                    f"--calibration, --option and --resume belong to a --method that uses samples: {', '.join(CALIBRATED)}"
                )
            quantize_directory(model, out, config, dtype=dtype, device=device)
        else:
            from requanto.report.calibrated import calibrate_directory

            calibrate_directory(
                model,
                out,
                config,
                method,
                text=calibration,
                samples=samples,
                length=sequence_length,
                method_options=_values(option or []),
                resume=resume,
                dtype=dtype,
                device=device,
                progress=not as_json,
            )
        report = inspect_directory(out)
        if as_json:
            print(json.dumps({"out": str(out), "total_bytes": report.total_bytes, "config": config.to_dict()}))
        else:
            console.print(f"Saved {out}: {size_text(report.total_bytes)}, {size_text(report.float_bytes)} of it float.")


def _pairs(items: list[str]) -> dict[str, str | None]:
    pairs: dict[str, str | None] = {}
    for item in items:
        pattern, equals, kind = item.rpartition("=")
        if not equals or not pattern:
            raise ValueError(f"--module takes PATTERN=TYPE, found {item!r}; example: --module '*.mlp.*=int4'")
        pairs[pattern] = None if kind in ("float", "none") else kind
    return pairs


def _values(items: list[str]) -> dict[str, Any]:
    """Parses NAME=VALUE pairs; values are JSON (numbers, true, false ...), anything else is a string."""
    found: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise ValueError(f"--option takes NAME=VALUE, found {item!r}; example: --option damping=0.05")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


@app.command()
def inspect(
    directory: Annotated[
        Path,
        typer.Argument(
            help="Directory of a quantized or float model, as written by save_pretrained, a .gguf file, or a single "
            ".safetensors file such as ComfyUI's."
        ),
    ],
    all_layers: Annotated[bool, typer.Option("--all", help="List every weight, also norms and biases.")] = False,
    parallel: Annotated[
        str | None,
        typer.Option(
            help="Show instead what each rank of a distributed run stores and sends, e.g. tp=8 or tp=8,fsdp=2. "
            "The model may also be 8B, 70B or 405B (Llama shapes)."
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Write a PNG with error and size of each layer; for models quantized with --weights auto."),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Instead read every quantized weight and compare it with its digest in config.json."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show type, shape and size of each weight; for a float model, its size in each type. --verify: is it what was saved?"""
    from requanto.report.inspect import inspect_directory

    if verify:
        with reported():
            intact = _verify(directory, all_layers, as_json)
        if not intact:
            raise typer.Exit(1)
        return
    with reported():
        if parallel is not None:
            _inspect_parallel(str(directory), parallel, as_json)
            return
        if plot is not None:
            from requanto.report.budget_plot import plot_budget
            from requanto.report.compare_plot import pyplot

            pyplot()  # raises before anything is read
            check_target(plot.parent)
        report = inspect_directory(directory)
        if plot is not None:
            plot_budget(report, plot)
        if as_json:
            print(report.to_json())
            return
        if report.format:
            console.print(f"{directory}: {report.format}", markup=False, highlight=False, soft_wrap=True)
        table = Table(title=str(directory))
        why = ("error",) if report.budget else ()
        for column in ("weight", "type", "shape", "group", "bits", "size", *why):
            table.add_column(column, justify="left" if column in ("weight", "type") else "right", overflow="fold")
        for weight in report.weights:
            if all_layers or len(weight.shape) > 1:
                group = str(weight.group_size or "row") if weight.bits < 16 else ""
                shape = " x ".join(map(str, weight.shape))
                error = () if not why else ("" if weight.error is None else f"{weight.error:.2%}",)
                table.add_row(
                    weight.name, weight.dtype, shape, group, f"{weight.bits:.2f}", size_text(weight.bytes), *error
                )
        console.print(table)
        if report.budget:
            console.print(report.why(), highlight=False)
        console.print(
            f"Total {size_text(report.total_bytes)}: {size_text(report.quantized_bytes)} quantized, "
            f"{size_text(report.float_bytes)} float."
        )
        for kind, size in report.would_take.items():
            console.print(f"  in {kind:<7} it would take {size_text(size)} ({size / report.total_bytes:.0%})")


def _verify(directory: Path, all_layers: bool, as_json: bool) -> bool:
    from requanto.report.verify import DAMAGED, HOLDS, MISSING, UNKNOWN, verify_directory

    found = verify_directory(directory)
    if as_json:
        print(found.to_json())
    else:
        table = Table("file", HOLDS, UNKNOWN, DAMAGED, MISSING, title=str(directory))
        for file, counts in found.by_file().items():
            table.add_row(file, *(str(counts[state] or "") for state in (HOLDS, UNKNOWN, DAMAGED, MISSING)))
        console.print(table)
        for weight in found.weights:
            if all_layers or weight.state in (DAMAGED, MISSING):
                files = f" ({', '.join(weight.files)})" if weight.files else ""
                reason = f": {weight.reason}" if weight.reason else ""
                console.print(
                    f"{weight.state}: {weight.name}{files}{reason}", markup=False, highlight=False, soft_wrap=True
                )
        if any(weight.state == UNKNOWN for weight in found.weights):
            console.print("Weights without a digest were saved by an earlier version or without digests.")
    return found.intact


def _inspect_parallel(model: str, parallel: str, as_json: bool) -> None:
    from requanto.config.config import QuantoConfig
    from requanto.report.convert import meta_model
    from requanto.report.inspect import COMPARED
    from requanto.report.parallel import parallel_report, parse_parallel

    split = parse_parallel(parallel)
    built, stored = meta_model(model)
    configs = {"float": None} | {kind: QuantoConfig(weights=kind) for kind in COMPARED}
    if stored is not None:
        configs = {stored.weights: stored}
    reports = {kind: parallel_report(built, config, **split) for kind, config in configs.items()}
    if as_json:
        print(json.dumps({kind: {**asdict(report), "total": report.total} for kind, report in reports.items()}))
        return
    table = Table(title=f"{model}, {parallel}: per rank")
    for column in ("type", "weights", "float weights", "gathered", "KV cache / token", "sent / token", "sent / step"):
        table.add_column(column, justify="left" if column == "type" else "right")
    for kind, r in reports.items():
        sizes = (r.total, r.floats, r.gathered, r.cache_per_token, r.sent_per_token, r.sent_per_step)
        table.add_row(kind, *map(size_text, sizes))
    console.print(table)


@app.command(name="eval")
def evaluate(
    directory: Model,
    text: Annotated[
        Path | None, typer.Option(help="Text file to measure on; default: a text that ships with requanto.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 1024,
    max_tokens: Annotated[
        int | None, typer.Option(help="Stop after this many tokens; default: the whole text.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="dtype to load in: auto, bfloat16, float16, float32.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Device to run on, e.g. cuda; default: CPU.")] = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity on a text and tokens per second of a causal language model."""
    from requanto.report import perplexity
    from requanto.report.convert import load_causal_lm
    from requanto.report.inspect import inspect_model

    with reported():
        content = (text or Path(__file__).parents[1] / "data" / "eval_text.txt").read_text(encoding="utf-8")
        model, tokenizer = load_causal_lm(directory, dtype=dtype, device=device)
        result = perplexity(model, tokenizer, content, window=window, max_tokens=max_tokens, progress=not as_json)
        size = inspect_model(model).total_bytes
        values: dict[str, Any] = {**asdict(result), "bytes": size}
        values["tokens_per_second"] = result.tokens / result.seconds
        if as_json:
            print(json.dumps(values))
        else:
            console.print(
                f"perplexity {result.perplexity:.3f} on {result.tokens} tokens, {values['tokens_per_second']:.0f} tokens/s, "
                f"{size_text(size)} in memory"
            )


@app.command()
def tune(
    model: Annotated[
        str | None, typer.Argument(help="Quantized model: a directory, or a name on the hub.", show_default=False)
    ] = None,
    rows: Annotated[
        list[int] | None, typer.Option(help="Number of tokens (rows of a GEMM) to tune for. Repeatable.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="dtype of the activations: bfloat16, float16, float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="GPU to tune on, e.g. cuda (also for ROCm).")] = "cuda",
    repeats: Annotated[int, typer.Option(help="Timed launches per tile.")] = 20,
    humming: Annotated[
        bool, typer.Option("--humming", help="Also time humming's kernels, and let layers choose by the times.")
    ] = False,
    export: Annotated[
        Path | None, typer.Option(help="Write all tuned tiles to this file (after tuning, if a MODEL is given).")
    ] = None,
    import_: Annotated[
        Path | None, typer.Option("--import", help="Add the tiles of a file that --export wrote, first.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find the fastest kernel tiles for MODEL's quantized layers on this GPU and store them on disk."""
    import torch

    from requanto.cli.tune import ROWS, export_tiles, import_tiles, tune_model

    with reported():
        chosen = getattr(torch, dtype, None)
        if chosen not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"--dtype must be bfloat16, float16 or float32, found {dtype!r}")
        if model is None and export is None and import_ is None:
            raise ValueError("requanto tune needs a MODEL, --export FILE or --import FILE")
        result: dict = {}
        if import_ is not None:
            result["imported"] = import_tiles(import_)
        if model is not None:
            result |= asdict(
                tune_model(
                    model, rows=rows or ROWS, dtype=chosen, device=device, repeats=repeats, progress=not as_json,
                    humming=humming,
                )
            )  # fmt: skip
        if export is not None:
            result["exported"] = export_tiles(export)
        if as_json:
            print(json.dumps(result, default=str))
        else:
            console.print(
                "\n".join(f"{name}: {value}" for name, value in result.items()), markup=False, highlight=False
            )


@app.command()
def kernels(as_json: Json = False) -> None:
    """Build the CPU kernels now (e.g. in an image build), for all kinds of processors, and print where they are."""
    import requanto_cpu

    with reported():
        start = time.monotonic()
        requanto_cpu.build_all()
        seconds = time.monotonic() - start
        found = {
            "library": str(requanto_cpu.path()),
            "level": requanto_cpu.level(),
            "levels of this processor": ", ".join(requanto_cpu.levels()),
            "seconds": round(seconds, 1),
        }
        if as_json:
            print(json.dumps(found))
        else:
            console.print(
                "\n".join(f"{name}: {value}" for name, value in found.items()),
                markup=False,
                highlight=False,
                soft_wrap=True,
            )


@app.command()
def register_optimum_cli(
    remove: Annotated[bool, typer.Option("--remove", help="Delete the file again.")] = False,
) -> None:
    """Make `optimum-cli quanto quantize` use Requanto: writes one file into the installed optimum."""
    from requanto.integrations.optimum_quanto import register

    with reported():
        if remove:
            file = register.unregister()
            text = f"deleted {file}" if file is not None else "nothing to remove: it was not registered"
        else:
            text = f"wrote {register.register()}; try: optimum-cli quanto quantize --help"
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point of the ``requanto`` command."""
    app()


if __name__ == "__main__":
    sys.exit(main())

"""The command line: ``requanto quantize``, ``inspect``, ``eval``, ``compare``, ``tune``, ``kernels`` ...

Exit codes: 0 done, 1 it could not be done (the reason is on standard error), 2 wrong use.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from requanto.cli.common import Json, Model, console, reported, size_text
from requanto.cli.compare import compare

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Quantize models, look into them, measure them.")
app.command()(compare)


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is done to each layer.")] = False,
) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s")


_METHOD_HELP = (
    "minmax, mse, weighted, aligned, hqq (default: the type's best); with samples: gptq, awq, smoothquant, signround."
)


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Directory to write; replaced as a whole when the save is complete.")],
    weights: Annotated[
        str, typer.Option(help="int8, int4, nf4, float8 ...: docs/types.md; auto: within a budget.")
    ] = "int8",
    bits: Annotated[float | None, typer.Option(help="With auto: bits a weight, scales counted, e.g. 4.5.")] = None,
    max_memory: Annotated[str | None, typer.Option(help="With auto: size of the whole model, e.g. 80MB.")] = None,
    activations: Annotated[str | None, typer.Option(help="int8 or float8; default: not quantized.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Weights that share a scale; -1: one scale a row.")] = None,
    scale_bits: Annotated[
        int | None, typer.Option(help="Bits of a group's scale and shift: 4 to 8; default: floats.")
    ] = None,
    rotation: Annotated[
        int | None, typer.Option(help="Rotate rows in Hadamard blocks of up to this size, e.g. 1024.")
    ] = None,
    low_rank: Annotated[int | None, typer.Option(help="Rank of a correction beside the codes.")] = None,
    modules_to_not_convert: Annotated[
        list[str] | None, typer.Option(help="Leave float: a name, a parent, a leaf or a glob. Repeatable.")
    ] = None,
    module: Annotated[
        list[str] | None, typer.Option(help="PATTERN=TYPE for single modules, e.g. '*.mlp.*=int4'. Repeatable.")
    ] = None,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Quantize embedding tables too.")] = False,
    lm_head: Annotated[bool, typer.Option("--lm-head", help="Quantize the output embeddings too.")] = False,
    convolutions: Annotated[bool, typer.Option("--convolutions", help="Quantize convolutions too.")] = False,
    dtype: Annotated[str, typer.Option(help="Float dtype of the rest: auto, bfloat16, float16, float32.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Where to quantize, e.g. cuda; default: the CPU.")] = None,
    method: Annotated[str | None, typer.Option(help=_METHOD_HELP)] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Text file that samples are cut from; default: fiction that ships with requanto."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Samples for --method.")] = 128,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a sample.")] = 512,
    option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for the method, e.g. iterations=100. Repeatable.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Directory that keeps finished blocks, to go on after an interruption.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Quantize MODEL and save it to OUT, with its tokenizer."""
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
            rotation=rotation,
            low_rank=low_rank,
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
                raise ValueError("--calibration, --option and --resume belong to a --method that looks at samples")
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
            console.print(
                f"Saved {out}: {size_text(report.total_bytes)}, of which {size_text(report.float_bytes)} float."
            )


def _pairs(items: list[str]) -> dict[str, str | None]:
    pairs: dict[str, str | None] = {}
    for item in items:
        pattern, equals, kind = item.rpartition("=")
        if not equals or not pattern:
            raise ValueError(f"--module takes PATTERN=TYPE, found {item!r}; example: --module '*.mlp.*=int4'")
        pairs[pattern] = None if kind in ("float", "none") else kind
    return pairs


def _values(items: list[str]) -> dict[str, Any]:
    """NAME=VALUE pairs; values are numbers, true, false, or text."""
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
    directory: Annotated[Path, typer.Argument(help="A directory that save_pretrained wrote, quantized or float.")],
    all_layers: Annotated[bool, typer.Option("--all", help="A line for every weight, norms and biases too.")] = False,
    parallel: Annotated[
        str | None,
        typer.Option(help="What a rank holds and sends instead, e.g. tp=8 or tp=8,fsdp=2. Also for 8B, 70B, 405B."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="PNG to draw: error and size of each layer, of a model made within a budget.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show type, shape and bytes of each weight; for a float model, what each type would save. Reads headers only."""
    from requanto.report.inspect import inspect_directory

    with reported():
        if parallel is not None:
            _inspect_parallel(str(directory), parallel, as_json)
            return
        report = inspect_directory(directory)
        if plot is not None:
            from requanto.report.budget_plot import plot_budget

            plot_budget(report, plot)
        if as_json:
            print(report.to_json())
            return
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
            f"Total {size_text(report.total_bytes)}: quantized {size_text(report.quantized_bytes)}, float "
            f"{size_text(report.float_bytes)}."
        )
        for kind, size in report.would_take.items():
            console.print(f"  in {kind:<7} it would take {size_text(size)} ({size / report.total_bytes:.0%})")


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
    table = Table(title=f"{model}, {parallel}: one rank")
    for column in ("type", "weights", "of which float", "gathered", "cache / token", "sends / token", "sends / step"):
        table.add_column(column, justify="left" if column == "type" else "right")
    for kind, r in reports.items():
        sizes = (r.total, r.floats, r.gathered, r.cache_per_token, r.sent_per_token, r.sent_per_step)
        table.add_row(kind, *map(size_text, sizes))
    console.print(table)


@app.command(name="eval")
def evaluate(
    directory: Model,
    text: Annotated[
        Path | None, typer.Option(help="Text file to measure on; default: the one that ships here.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens a window.")] = 1024,
    max_tokens: Annotated[int | None, typer.Option(help="Stop after so many tokens.")] = None,
    dtype: Annotated[str, typer.Option(help="Float dtype: auto, bfloat16, float16, float32.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Where to run, e.g. cuda; default: the CPU.")] = None,
    as_json: Json = False,
) -> None:
    """Perplexity on a text, and tokens a second, of a causal language model."""
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
    model: Model,
    rows: Annotated[list[int] | None, typer.Option(help="Tokens in one product to tune for. Repeatable.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the activations: bfloat16, float16, float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="The GPU, e.g. cuda or xpu.")] = "cuda",
    repeats: Annotated[int, typer.Option(help="Launches timed for each tile.")] = 20,
    as_json: Json = False,
) -> None:
    """Time the kernels' tiles for MODEL's quantized layers on the present GPU and keep the best on disk."""
    import torch

    from requanto.cli.tune import ROWS, tune_model

    with reported():
        chosen = getattr(torch, dtype, None)
        if chosen not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"dtype {dtype!r} is none of bfloat16, float16, float32")
        tuned = tune_model(model, rows=rows or ROWS, dtype=chosen, device=device, repeats=repeats, progress=not as_json)
        if as_json:
            print(json.dumps(asdict(tuned), default=str))
        else:
            console.print(str(tuned), markup=False, highlight=False)


@app.command()
def kernels(as_json: Json = False) -> None:
    """Compile this machine's CPU kernels now, as an image is built, and not at the first product that needs one."""
    from requanto.linear.cpu.aot import cache, calls, trust

    with reported():
        wanted = calls.useful()
        paths = {name: cache.path_of(name, source) for name, source in wanted.items()}
        kept = {name for name, path in paths.items() if trust.intact(path)}
        cache.load(wanted)
        if as_json:
            print(json.dumps({name: str(path) for name, path in paths.items()}))
            return
        table = Table("kernel", "", "file")
        for name, path in paths.items():
            table.add_row(name, "was kept" if name in kept else "made", path.name)
        console.print(f"in {cache.directory()}", markup=False, highlight=False, soft_wrap=True)
        console.print(table)
        if left := ", ".join(name for name in calls.SOURCES if name not in wanted):
            console.print(f"of no use on this processor: {left}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def register_optimum_cli(
    remove: Annotated[bool, typer.Option("--remove", help="Take it away again.")] = False,
) -> None:
    """Make `optimum-cli quanto quantize` run on Requanto: writes one file into the installed optimum."""
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

"""Plot of a comparison: errors by layer above the images or the summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from requanto.report.compare import Comparison

#: One colour per type, in the order of their first appearance.
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#7f7f7f")

#: Smaller errors are drawn at this value: a logarithmic axis has no zero.
FLOOR = 1e-6


def missing() -> str | None:
    """Returns why nothing can be plotted and what to do, or None. Call it before a computation whose result is plotted."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        return f'plots need matplotlib, which cannot be imported ({error}): pip install "requanto[plot]"'
    return None


def pyplot() -> Any:
    """Returns matplotlib.pyplot with a backend that writes files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    lacking = missing()
    if lacking is not None:
        raise ImportError(lacking)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot(comparison: Comparison, path: Path) -> Path:
    """Writes the plot to a PNG file; creates its folder if needed."""
    plt = pyplot()
    pairs = comparison.images
    columns = min(8, len(pairs))
    figure = plt.figure(figsize=(11, 7.2 if pairs else 6.2), constrained_layout=True)
    upper, lower = figure.subfigures(2, 1, height_ratios=(3, 2) if pairs else (5, 1))
    _draw_layers(upper.subplots(), comparison)
    summary = "   ".join(f"{name} {value}" for name, value in summary_lines(comparison))
    if pairs:
        axes = lower.subplots(3, columns, squeeze=False)
        for column, (a, b) in enumerate(pairs[:columns]):
            for row, image in enumerate((a, b, abs(a - b))):
                _draw_image(axes[row][column], image)
        for row, label in enumerate(("A", "B", "|A - B|")):
            axes[row][0].set_ylabel(label, rotation=0, ha="right", va="center")
        lower.suptitle(summary, fontsize=9)
    else:
        axis = lower.subplots()
        axis.axis("off")
        axis.text(0.5, 0.5, summary.replace("   ", "\n", 2), ha="center", va="center", fontsize=10, wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _draw_layers(axis: Any, comparison: Comparison) -> None:
    layers = [layer for layer in comparison.layers if layer.type_a != layer.type_b or layer.weight_error]
    layers = layers or comparison.layers
    kinds = list(dict.fromkeys(layer.type_b for layer in layers))
    colours = {kind: COLOURS[index % len(COLOURS)] for index, kind in enumerate(kinds)}
    for kind in kinds:
        chosen = [(i, layer) for i, layer in enumerate(layers) if layer.type_b == kind]
        heights = [max(FLOOR, layer.weight_error) for _, layer in chosen]
        axis.plot([i for i, _ in chosen], heights, "o", ms=4, color=colours[kind], label=f"weights, B in {kind}")
    outputs = [(i, max(FLOOR, e)) for i, e in ((i, x.output_error) for i, x in enumerate(layers)) if e is not None]
    if outputs:
        axis.plot(*zip(*outputs), "-", lw=1, color="0.4", label="layer outputs")
    axis.set_yscale("log")
    for side in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        side(lambda value, _: f"{value:.2g}" if value < 0.01 else f"{value:.0%}")
    axis.tick_params(axis="y", which="both", labelsize=7)
    axis.set_ylabel("relative error")
    axis.set_title(f"A: {comparison.a}    B: {comparison.b}", fontsize=10)
    step = max(1, len(layers) // 24)
    axis.set_xticks(range(0, len(layers), step))
    axis.set_xticklabels([layers[i].name.removesuffix(".weight") for i in range(0, len(layers), step)], fontsize=6)
    axis.tick_params(axis="x", rotation=60)
    for label in axis.get_xticklabels():
        label.set_ha("right")
    axis.grid(True, which="major", alpha=0.3)
    axis.legend(fontsize=8)


def _draw_image(axis: Any, image: Any) -> None:
    grey = image.shape[-1] not in (3, 4)
    axis.imshow(image[..., 0] if grey else image, cmap="gray" if grey else None, vmin=0, vmax=1)
    axis.set_xticks([])
    axis.set_yticks([])


def summary_lines(comparison: Comparison) -> list[tuple[str, str]]:
    """Returns (name, value) of the results for the whole model, as text."""
    s = comparison.summary
    lines = [
        ("size", f"{s['bytes_a'] / 1e6:.1f} MB -> {s['bytes_b'] / 1e6:.1f} MB ({s['bytes_b'] / s['bytes_a']:.0%})")
    ]
    if "perplexity_a" in s:
        rise = f"{s['perplexity_ratio']:.1%}{_plus_minus(s['perplexity_ratio_error'])}"
        lines.append(("perplexity", f"{s['perplexity_a']:.3f} -> {s['perplexity_b']:.3f} ({rise})"))
    if "kl" in s:
        lines.append(("KL of the logits", f"{s['kl']:.4f} +- {s['kl_error']:.4f} nats per token"))
        agreement = f"{s['top1_agreement']:.1%}{_plus_minus(s['top1_error'])} of {s['tokens']} tokens"
        lines.append(("top-1 agreement", agreement))
    if "choice_a" in s:
        shares = " -> ".join(f"{s[f'choice_{x}']:.1%}{_plus_minus(s[f'choice_error_{x}'])}" for x in "ab")
        points = f"{100 * s['choice_difference']:+.1f} +- {100 * s['choice_difference_error']:.1f} points"
        lines.append((f"multiple choice, {s['questions']} questions", f"{shares}, difference {points}"))
    if "cosine_mean" in s:
        lines.append(("cosine of embeddings", f"{s['cosine_mean']:.5f} (minimum {s['cosine_min']:.5f})"))
        lines.append(("cosine of last hidden states", f"{s['token_cosine']:.5f} over {s['tokens']} tokens"))
    if "rank_correlation" in s:
        lines.append(("rank correlation of similarities", f"{s['rank_correlation']:.5f} over {s['pairs']} pairs"))
    if "psnr_mean" in s:
        lines.append(("PSNR", f"{s['psnr_mean']:.1f} dB (minimum {s['psnr_min']:.1f}) over {s['images']} outputs"))
        if "top1_agreement" in s:
            agreement = f"{s['top1_agreement']:.1%}{_plus_minus(s['top1_error'])} of {s['images']} outputs"
            lines.append(("top-1 agreement", agreement))
    return lines


def _plus_minus(error: float) -> str:
    return f" +- {error:.1%}"

"""Requanto end to end on a real model, without a GPU or a model hub.

For bfloat16, int8, float8 and int4: load SmolLM2-135M-Instruct, measure size, perplexity and speed, answer a question,
save; then load each saved model in a new process and generate the same tokens again.

    python examples/quickstart.py            # or: make quickstart

Writes the quantized checkpoints and the figures (quickstart.json) to quickstart-out/.
Exit status: 0, or 1 if a reloaded model answers differently.
"""

import argparse
import gc
import json
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from real_models import ModelNotAvailable, minilm_dir, smollm2_dir
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import requanto
from requanto import QuantoConfig
from requanto.data import eval_text
from requanto.report import generation_speed, perplexity

DTYPES = ("int8", "float8", "int4")
QUESTION = "What is the water cycle? Answer in one short sentence."
ANSWER_TOKENS = 32  # at most
NOTE = (
    "These weights come from a 4-bit file (Q4_1, affine, groups of 32), so they are close to a 4-bit grid already: results "
    "of affine 4-bit types on this model look better than they are, most of all with groups of 32. The second table shows a "
    "model whose weights were never quantized before."
)

console = Console()


@dataclass(frozen=True)
class Row:
    """The results of one dtype."""

    dtype: str
    disk_bytes: int
    memory_bytes: int
    perplexity: float
    tokens: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    answer: str
    answer_tokens: list[int]


def main() -> int:
    options = parse_options()
    if options.reload:
        print(json.dumps({str(path): answer(*load(path))[1] for path in options.reload}))
        return 0
    start = time.perf_counter()
    try:
        source = smollm2_dir()
        minilm_dir()  # downloaded now, so that a missing network is reported before the work
    except ModelNotAvailable as error:
        sys.exit(str(error))
    rows = [quantize_and_measure(source, dtype, options) for dtype in (None, *DTYPES)]
    similarities = {dtype: embedding_similarity(dtype) for dtype in tqdm(DTYPES, desc="embeddings", unit="dtype")}
    console.print(results_table(rows), f"{NOTE}\n", similarity_table(similarities), answers_table(rows))
    same = check_in_new_process({row.dtype: row for row in rows if row.dtype in DTYPES}, options.out)
    seconds = time.perf_counter() - start
    write_results(options.out / "quickstart.json", rows, similarities, same, seconds)
    console.print(f"Finished in {seconds:.0f} s. Checkpoints and quickstart.json are in {options.out}/")
    return 0 if all(same.values()) else 1


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("quickstart-out"), help="output directory (%(default)s)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of text for the perplexity (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=12, help="tokens for timing the decoding (%(default)s)")
    parser.add_argument("--reload", type=Path, nargs="+", help=argparse.SUPPRESS)  # for the new process
    return parser.parse_args()


def load(path: Path, config: QuantoConfig | None = None) -> tuple[Any, Any]:
    """The model and its tokenizer; a saved quantized model needs no config."""
    # Left out, not None: with an explicit None, Transformers ignores the checkpoint's own config.
    chosen = {} if config is None else {"quantization_config": config}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **chosen)
    return model.eval(), AutoTokenizer.from_pretrained(path)


class TokenBar:
    """A streamer for `generate` that shows its progress."""

    def __init__(self) -> None:
        self.bar = tqdm(total=ANSWER_TOKENS + 1, desc="answer", unit="tok")

    def put(self, value: torch.Tensor) -> None:
        self.bar.update()

    def end(self) -> None:
        self.bar.close()


def answer(model: Any, tokenizer: Any) -> tuple[str, list[int]]:
    """The answer to QUESTION, as text and as tokens. Greedy, so that equal models give equal tokens."""
    chat = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs = inputs.to(model.device)
    output = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False, streamer=TokenBar())
    tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
    return tokenizer.decode(tokens, skip_special_tokens=True), tokens


def quantize_and_measure(source: Path, dtype: str | None, options: argparse.Namespace) -> Row:
    """Loads `source` with weights of `dtype` (None: float), measures it, asks the question, saves it."""
    name = dtype or "bf16"
    console.rule(name)
    model, tokenizer = load(source, None if dtype is None else QuantoConfig(weights=dtype))
    quality = perplexity(model, tokenizer, eval_text(), max_tokens=options.tokens)
    speed = generation_speed(model, tokenizer, new_tokens=options.new_tokens, max_seconds=20)
    text, tokens = answer(model, tokenizer)
    saved = source
    if dtype is not None:
        saved = options.out / dtype
        model.save_pretrained(saved)
        tokenizer.save_pretrained(saved)
    row = Row(
        dtype=name,
        disk_bytes=sum(file.stat().st_size for file in saved.glob("*.safetensors")),
        memory_bytes=model.get_memory_footprint(),
        perplexity=quality.perplexity,
        tokens=quality.tokens,
        prefill_tokens_per_s=speed.prefill_tokens_per_s,
        decode_tokens_per_s=speed.decode_tokens_per_s,
        answer=text,
        answer_tokens=tokens,
    )
    del model
    gc.collect()
    return row


def embedding_similarity(dtype: str) -> float:
    """all-MiniLM-L6-v2, whose weights were never quantized: mean cosine between quantized and float embeddings."""
    sentences = [line for line in eval_text().splitlines() if 60 < len(line) < 300][:32]
    tokenizer = AutoTokenizer.from_pretrained(minilm_dir())
    inputs = tokenizer(sentences, padding=True, return_tensors="pt")
    mask = inputs["attention_mask"].unsqueeze(-1)

    def embeddings(**chosen: QuantoConfig) -> torch.Tensor:
        model = AutoModel.from_pretrained(minilm_dir(), dtype=torch.float32, **chosen)
        with torch.inference_mode():
            return (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)

    quantized = embeddings(quantization_config=QuantoConfig(weights=dtype))
    return torch.cosine_similarity(quantized, embeddings()).mean().item()


def check_in_new_process(rows: dict[str, Row], out: Path) -> dict[str, bool]:
    """Loads every saved checkpoint in another process; True for those that answer with the same tokens."""
    console.rule("reload in a new process")
    folders = {dtype: str(out / dtype) for dtype in rows}
    command = [sys.executable, __file__, "--reload", *folders.values()]
    # Its progress bars go to stderr and to the terminal; its answers are read from stdout.
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if child.returncode != 0:
        console.print(f"[red]The new process ended with status {child.returncode}: {' '.join(command)}[/red]")
        return dict.fromkeys(rows, False)
    answers = json.loads(child.stdout.splitlines()[-1])
    same = {dtype: answers[folders[dtype]] == row.answer_tokens for dtype, row in rows.items()}
    for dtype, equal in same.items():
        found = f"the same {len(rows[dtype].answer_tokens)} tokens" if equal else "[red]other tokens[/red]"
        console.print(f"{dtype}: saved, loaded in a new process, generated {found}")
    return same


def results_table(rows: list[Row]) -> Table:
    float_row = rows[0]
    table = Table(title=f"SmolLM2-135M-Instruct, perplexity over {float_row.tokens} tokens of the shipped text")
    table.add_column("weights")
    for name in ("on disk", "in memory", "perplexity", "prefill tok/s", "decode tok/s"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.dtype,
            f"{row.disk_bytes / 1e6:.1f} MB",
            f"{row.memory_bytes / 1e6:.1f} MB",
            f"{row.perplexity:.2f} {row.perplexity / float_row.perplexity - 1:+.1%}",
            _with_ratio(row.prefill_tokens_per_s, float_row.prefill_tokens_per_s),
            _with_ratio(row.decode_tokens_per_s, float_row.decode_tokens_per_s),
        )
    return table


def _with_ratio(speed: float, float_speed: float) -> str:
    return f"{speed:.3g} {speed / float_speed:.2f}x" if speed < 1000 else f"{speed:.0f} {speed / float_speed:.2f}x"


def similarity_table(similarities: dict[str, float]) -> Table:
    table = Table(title="all-MiniLM-L6-v2 (float32 weights): cosine to the float model's embeddings")
    table.add_column("weights")
    table.add_column("mean cosine", justify="right")
    for dtype, similarity in similarities.items():
        table.add_row(dtype, f"{similarity:.5f}")
    return table


def answers_table(rows: list[Row]) -> Table:
    table = Table(title=QUESTION, show_lines=True)
    table.add_column("weights")
    table.add_column(f"answer (greedy, {ANSWER_TOKENS} tokens at most)")
    for row in rows:
        table.add_row(row.dtype, row.answer)
    return table


def write_results(
    path: Path, rows: list[Row], similarities: dict[str, float], same: dict[str, bool], seconds: float
) -> None:
    results = {
        "model": "SmolLM2-135M-Instruct",
        "note": NOTE,
        "requanto": requanto.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "seconds": round(seconds, 1),
        "rows": [asdict(row) for row in rows],
        "minilm_mean_cosine": similarities,
        "same_tokens_after_reload": same,
    }
    path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())

"""Accuracy at given bits, compared with other libraries: the same layers, tokens and sentences for all.

    python benchmarks/accuracy.py --peer-python hqq=/envs/hqq/bin/python torchao=/envs/torchao/bin/python ...
    python benchmarks/accuracy.py --only requanto/int4 hqq --texts eval heldout --resume
    python benchmarks/accuracy.py --table --plot docs/images/accuracy.png             # of the stored results

Each row runs in its own process, in the Python that ``--peer-python`` names for its library (default: this one), which needs
torch, transformers, safetensors and the library. If a library is missing or fails, its row contains the reason. The
dequantized weights are measured in the float model, not the library's kernels:

- SmolLM2-135M-Instruct in bfloat16: perplexity on 10,240 tokens of `requanto.data.eval_text()` in windows of 1,024;
  with ``--texts heldout`` also on 8,192 tokens of NumPy's docstrings, which was not used to choose anything in this
  package. Its weights come from a Q4_1 file (affine, groups of 32), which flatters affine 4-bit results, most of all
  with groups of 32.
- all-MiniLM-L6-v2, never quantized before: mean cosine of the embeddings of 128 sentences to the float32 model's.

Rows with samples (``--samples``) use pieces of fiction from `requanto.data.calibration_text()`; they are slow and run
only on request. Every finished row is stored in benchmarks/results/accuracy.json. One thread.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accuracy_rows import ROWS, Row
from common import RESULTS, command, machine
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).parents[1] / "examples"))

from real_models import minilm_dir, smollm2_dir

OUT = RESULTS / "accuracy.json"
CHILD = Path(__file__).with_name("accuracy_child.py")
WINDOW, TOKENS = 1024, {"eval": 10_240, "heldout": 8_192}
SENTENCES, BATCH = 128, 32


def heldout_text() -> str:
    """Docstrings of NumPy's functions up to their examples: every eighth, by name. English technical prose."""
    import numpy

    found: dict[str, str] = {}
    for name in sorted(numpy.__all__):
        text = (inspect.getdoc(getattr(numpy, name)) or "").split("\nExamples\n---")[0].strip()
        if len(text) > 600 and text not in found.values():
            found[name] = text
    return "\n\n".join(found[name] for name in list(found)[::8])


def prepare(path: Path, samples: int, length: int) -> dict[str, Any]:
    """Writes the tokens that all libraries get; returns a description of them."""
    import numpy
    from accuracy_child import embeddings
    from transformers import AutoModel, AutoTokenizer

    from requanto.data import calibration_text, eval_text
    from requanto.methods import text_samples

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir())
    tensors, description = {}, {}
    for name, text in (("eval", eval_text()), ("heldout", heldout_text())):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: TOKENS[name]]
        if len(ids) < TOKENS[name]:
            raise ValueError(f"the text {name!r} holds {len(ids)} tokens, {TOKENS[name]} are wanted")
        tensors[name] = torch.tensor(ids).reshape(-1, WINDOW)
        digest = hashlib.sha256(tensors[name].numpy().tobytes()).hexdigest()[:16]
        description[name] = {"tokens": len(ids), "window": WINDOW, "sha256_of_ids": digest}
    description["heldout"]["text"] = f"docstrings of numpy {numpy.__version__}"
    tensors["samples"] = torch.cat(text_samples(tokenizer, calibration_text(), samples, length))
    lines = [line.strip() for line in eval_text().split("\n")]
    lines = [line for line in lines if 60 < len(line) < 400][:SENTENCES]
    tokenizer = AutoTokenizer.from_pretrained(minilm_dir())
    inputs = tokenizer(lines, return_tensors="pt", padding=True, truncation=True, max_length=128)
    tensors["minilm_ids"] = inputs["input_ids"].reshape(-1, BATCH, inputs["input_ids"].shape[1])
    tensors["minilm_mask"] = inputs["attention_mask"].reshape(tensors["minilm_ids"].shape)
    bert = AutoModel.from_pretrained(minilm_dir(), dtype=torch.float32).eval()
    tensors["minilm_float"] = embeddings(bert, tensors["minilm_ids"], tensors["minilm_mask"])
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    return description | {"sentences": SENTENCES}


def measure(row: Row, job: dict[str, Any], python: str, minutes: float) -> dict[str, Any]:
    """Runs a row in its own process; returns its figures, or the reason why it failed."""
    job = job | {"library": row.library, "setting": row.setting}
    with tempfile.TemporaryDirectory() as folder:
        job_file, row_file = Path(folder) / "job.json", Path(folder) / "row.json"
        job_file.write_text(json.dumps(job), encoding="utf-8")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment["PATH"] = os.pathsep.join([str(Path(python).parent), os.environ.get("PATH", "")])
        # Absolute, since the process starts in another directory; another library's Python must not see Requanto's sources.
        paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        environment["PYTHONPATH"] = os.pathsep.join(paths if python == sys.executable else [])
        start = time.perf_counter()
        try:
            ended = subprocess.run(
                [python, str(CHILD), str(job_file), str(row_file)],
                env=environment,
                cwd=folder,
                timeout=60 * minutes,
                capture_output=True,
                text=True,
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {minutes:g} minutes on one thread"}
        except OSError as error:
            return {"failed": f"no such Python: {error.strerror}"}
        if not row_file.exists():
            lines = ended.stderr.strip().splitlines() or ["no message"]
            return {"failed": f"ended with {ended.returncode}: {lines[-1][:300]}"}
        return json.loads(row_file.read_text(encoding="utf-8")) | {
            "row_seconds": round(time.perf_counter() - start, 1),
            "machine": machine(),
        }


def stored() -> dict[str, Any]:
    """The results of earlier runs."""
    return json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {"texts": {}, "rows": {}}


def keep(row: Row, found: dict[str, Any], texts: dict[str, Any]) -> dict[str, Any]:
    """Adds a row to the results, which are read again, and keeps its older figures of other texts."""
    everything = stored()
    old = everything["rows"].get(row.name, {})
    if "failed" in found and "bits" in old:
        print(f"  {row.name} failed now, its older figures stay", file=sys.stderr)
        found = {}
    new = {k: v for k, v in old.items() if k != "failed" or not found} | found
    everything["texts"] = texts
    everything["rows"][row.name] = {"library": row.library, "label": row.label, "setting": row.setting, **new}
    order = [one.name for one in ROWS if one.name in everything["rows"]]
    everything["rows"] = {name: everything["rows"][name] for name in order}  # drops rows that are no longer in ROWS
    base = everything["rows"].get("float/bfloat16", {})
    for one in everything["rows"].values():
        for text in TOKENS:
            if text in one and text in base:
                one[f"{text}_percent"] = round(100 * one[text] / base[text], 1)
    part = OUT.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    part.replace(OUT)
    return everything["rows"][row.name]


def wanted_texts(row: Row, texts: list[str]) -> list[str]:
    """The texts to measure for this row: the held-out text only for the main rows."""
    return [text for text in texts if text != "heldout" or row.heldout]


def main() -> None:
    """Runs the selected rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", nargs="*", default=[], metavar="LIBRARY=PYTHON")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="prefixes of names")
    parser.add_argument("--texts", nargs="*", default=["eval"], choices=list(TOKENS), help="empty: only MiniLM")
    parser.add_argument("--no-minilm", action="store_true")
    parser.add_argument("--resume", action="store_true", help="skip rows that have all figures, or failed")
    parser.add_argument("--samples", type=int, default=0, help="run the rows with samples, on this many samples")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--minutes", type=float, default=20, help="time limit for one row")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--table", action="store_true", help="print the stored results and stop")
    parser.add_argument("--plot", type=Path, help="draw the stored results and stop")
    options = parser.parse_args()
    if options.table or options.plot:
        import accuracy_report

        if options.table:
            print(accuracy_report.table(stored()))
        if options.plot:
            accuracy_report.draw(stored(), options.plot)
        return
    pythons = dict(pair.split("=", 1) for pair in options.peer_python)
    rows = [row for row in ROWS if any(row.name.startswith(beginning) for beginning in options.only)]
    rows = [row for row in rows if row.samples == bool(options.samples)]
    unknown = set(pythons) - {row.library for row in ROWS}
    if options.list or not rows or unknown:
        print("\n".join(row.name for row in ROWS))
        raise SystemExit(
            f"no library is called {', '.join(sorted(unknown))}" if unknown else not rows and "no such row"
        )
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        material = Path(folder) / "material.safetensors"
        texts = prepare(material, options.samples or 1, options.length)
        for number, row in enumerate(rows, 1):
            known = stored()["rows"].get(row.name, {})
            needed = [
                *wanted_texts(row, options.texts),
                *([] if options.no_minilm or row.samples else ["minilm_cosine"]),
            ]
            if options.resume and ("failed" in known or all(figure in known for figure in needed)):
                continue
            job = {
                "material": str(material),
                "threads": 1,
                "smollm2": str(smollm2_dir()),
                "minilm": str(minilm_dir()) if "minilm_cosine" in needed else None,
                "texts": wanted_texts(row, options.texts),
            }
            print(f"[{number}/{len(rows)}] {row.name}", file=sys.stderr, flush=True)
            found = measure(row, job, pythons.get(row.library, sys.executable), options.minutes)
            found["command"] = re.sub(r"=/\S+", "=PYTHON", command())
            if row.samples:
                found |= {"samples": options.samples, "length": options.length}
            stored_row = keep(row, found, texts)
            shown = ("bits", "eval_percent", "heldout_percent", "minilm_cosine", "failed", "row_seconds")
            print("  " + json.dumps({key: stored_row[key] for key in shown if key in stored_row}), flush=True)


if __name__ == "__main__":
    main()

"""llama.cpp as a peer of benchmarks/cpu_models.py: the same shape of model as GGUF, run by a child one step at a time."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cpu_runners import undisturbed


def write_gguf(config: Any, kind: str, path: Path) -> None:
    """Writes a Llama of random weights in one of GGUF's types (``Q8_0``, ``Q4_0``); equal shapes have equal values.

    Embedding and output layer have the same type; norms are float32.
    """
    import gguf

    quantization = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "llama")
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    writer.add_context_length(2048)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    _add_vocabulary(writer, config.vocab_size)
    hidden, wide = config.hidden_size, config.intermediate_size
    pairs = config.num_key_value_heads * hidden // heads
    random, made = np.random.default_rng(0), {}

    def add(name: str, rows: int, columns: int) -> None:
        if (rows, columns) not in made:
            numbers = random.standard_normal((rows, columns), dtype=np.float32) * 0.02
            made[rows, columns] = gguf.quants.quantize(numbers, quantization)
        writer.add_tensor(f"{name}.weight", made[rows, columns], raw_dtype=quantization)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(hidden, dtype=np.float32))

    add("token_embd", config.vocab_size, hidden)
    for layer in range(layers):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm")
        for name, rows in (("attn_q", hidden), ("attn_k", pairs), ("attn_v", pairs), ("attn_output", hidden)):
            add(f"{block}.{name}", rows, hidden)
        norm(f"{block}.ffn_norm")
        add(f"{block}.ffn_gate", wide, hidden)
        add(f"{block}.ffn_up", wide, hidden)
        add(f"{block}.ffn_down", hidden, wide)
    norm("output_norm")
    if not config.tie_word_embeddings:
        add("output", config.vocab_size, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: Any, size: int) -> None:
    # The loader needs a vocabulary; its words are never used.
    writer.add_tokenizer_model("llama")
    words = [b"<unk>", b"<s>", b"</s>"] + [f"word{number}".encode() for number in range(size - 3)]
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([2, 3, 3] + [1] * (size - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


class LlamaRunner:
    """The interface of `cpu_models.Runner`; seconds are measured by the child."""

    def __init__(self, python: str, path: Path, threads: int) -> None:
        self.times: dict[str, list[float]] = {}
        self.state: Any = None
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (lives as long as the child)
        child = Path(__file__).with_name("llama_child.py")
        self._child = subprocess.Popen(
            [python, str(child), str(path), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.version = self._answer()["version"]

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"llama.cpp's process ended: {self._errors.read().strip()[-300:]}")
        return json.loads(line)

    def _step(self, name: str, keep: bool, tokens: list[int], fresh: bool) -> None:
        assert self._child.stdin is not None
        with undisturbed(self._child.pid):
            self._child.stdin.write(json.dumps({"tokens": tokens, "fresh": fresh}) + "\n")
            self._child.stdin.flush()
            seconds = self._answer()["seconds"]
        if keep:
            self.times.setdefault(name, []).append(seconds)

    def start(self) -> None:
        """Nothing: the child has loaded its model."""

    def prefill(self, ids: torch.Tensor, keep: bool) -> None:
        self._step(str(ids.shape[1]), keep, ids[0].tolist(), fresh=True)

    def decode(self, keep: bool) -> None:
        self._step("decode", keep, [5], fresh=False)

    def about(self, plain_bytes: int) -> dict[str, str]:
        """The version of llama-cpp-python."""
        return {"version": self.version}

    def close(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()
        self._errors.close()

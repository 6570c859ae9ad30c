"""GGUF: two files that others made, files by gguf's own quantization, and k-quants by auto-round's.

Transformers' float load dequantizes, which also puts rows in the order of its own layers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from formats_writers.common import Made, companions, float_tensors

#: name in a gguf file -> name in Llama
LLAMA = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
FILE = "model.gguf"


def real(out: Path, base: Path, file: str) -> Made:
    """A file as it was published."""
    companions(base, out / "model")
    shutil.copy(base.parent / "formats" / "ggufs" / file, out / "model" / FILE)
    return _made(out, base, f"as its package has it ({file})")


def requantized(out: Path, base: Path, kind: str) -> Made:
    """SmolLM2's file with its quantized tensors in another type, by gguf's own quantization."""
    import gguf

    companions(base, out / "model")
    source = gguf.GGUFReader(base.parent / "formats" / "ggufs" / "smollm2-Q4_1.gguf")
    writer = gguf.GGUFWriter(out / "model" / FILE, "llama")
    for name, one in source.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value, sort = one.contents(), one.types[0]
        writer.add_key_value(name, value, sort, one.types[-1] if sort == gguf.GGUFValueType.ARRAY else None)
    wanted = gguf.GGMLQuantizationType[kind]
    for tensor in source.tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(tensor.name, tensor.data)
            continue
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, wanted), raw_dtype=wanted)
    _close(writer)
    return _made(out, base, "gguf.quants.quantize on SmolLM2's own file")


def k_quants(out: Path, base: Path, kind: str) -> Made:
    """A tiny Llama, quantized by auto-round's k-quants."""
    import auto_round.export.export_to_gguf.packing as packing
    import gguf

    companions(base, out / "model")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(out / "model" / FILE, "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    # llama.cpp does not open a file without a vocabulary.
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(config["vocab_size"])])
    writer.add_token_scores([0.0] * config["vocab_size"])
    writer.add_token_types(
        [gguf.TokenType.CONTROL if i < 3 else gguf.TokenType.NORMAL for i in range(config["vocab_size"])]
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    stored = float_tensors(base)
    writer.add_tensor("token_embd.weight", stored["model.embed_tokens.weight"].float().numpy())
    writer.add_tensor("output_norm.weight", stored["model.norm.weight"].float().numpy())
    writer.add_tensor("output.weight", stored["lm_head.weight"].float().numpy())
    wanted = gguf.GGMLQuantizationType[kind]
    for layer in range(config["num_hidden_layers"]):
        for own, theirs in LLAMA.items():
            value = stored[f"model.layers.{layer}.{theirs}.weight"].float()
            if own in heads:  # llama.cpp rotates neighbours, Transformers halves
                value = value.unflatten(0, (heads[own], 2, -1)).transpose(1, 2).flatten(0, 2)
            name = f"blk.{layer}.{own}.weight"
            if value.dim() == 1:
                writer.add_tensor(name, value.numpy())
                continue
            codes = packing.ggml_quant(value, kind.lower(), device="cpu")
            writer.add_tensor(name, np.ascontiguousarray(codes).view(np.uint8), raw_dtype=wanted)
    _close(writer)
    return _made(out, base, "auto-round's k-quants")


def _close(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _made(out: Path, base: Path, how: str) -> Made:
    import gguf
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        out / "model", gguf_file=FILE, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    floats = {gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16")}
    tensors = [t for t in gguf.GGUFReader(out / "model" / FILE).tensors if t.tensor_type not in floats]
    parameters = dict(model.named_parameters())
    reference: dict[str, Tensor] = {}
    for tensor in tensors:
        name = _name(tensor.name)
        reference[name] = parameters[name].detach()
        # gguf's own values; rows of queries and keys are in another order there.
        own = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if not torch.equal(own.sort(0).values, reference[name].sort(0).values):
            raise RuntimeError(f"{tensor.name}: Transformers and gguf dequantize it to different values")
    kinds = sorted({t.tensor_type.name for t in tensors})
    return Made(
        reference,
        "gguf",
        f"{how}; Transformers' float load, whose values are gguf's ({', '.join(kinds)})",
        quantized=sum(int(t.n_bytes) for t in tensors),
        options={"gguf_file": FILE},
    )


def _name(name: str) -> str:
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output.weight":
        return "lm_head.weight"
    _, layer, own, _ = name.split(".")
    return f"model.layers.{layer}.{LLAMA[own]}.weight"

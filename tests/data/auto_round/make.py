"""Makes the files of this folder with auto-round itself (0.16.1 on a CPU; it is not installed for the tests).

    python make.py OUT      in an environment with auto-round, torch and transformers

A Llama of one layer, hidden size 64, is quantized by rounding to nearest and saved in each format. Of each file two layers
are kept: CASE.safetensors. cases.json has the config of each case and a SHA-256 over the weights as auto-round's own layers
dequantize them: their bytes in ``dtype``, ``[out, in]``.
"""

import glob
import hashlib
import json
import os
import random
import sys
import tempfile
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"
import torch
from auto_round import AutoRound
from auto_round.experimental.qmodules.fp8_static import WeightFP8ActFP8StaticQuantLinear
from auto_round.experimental.qmodules.mx import MXFP4QuantLinear, MXFP8QuantLinear
from auto_round.experimental.qmodules.nvfp4 import NVFP4QuantLinear
from auto_round.export.export_to_awq.utils import dequantize_gemm
from auto_round.schemes import QuantizationScheme
from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

KEPT = ("q_proj", "k_proj")
CALIBRATED = {"seqlen": 16, "nsamples": 4, "batch_size": 1}
K_PROJ = "model.layers.0.self_attn.k_proj"
CASES = {  # name -> format, options
    "sym4": ("auto_round", {"bits": 4, "group_size": 32, "sym": True}),
    "sym8_row": ("auto_round", {"bits": 8, "group_size": -1, "sym": True}),
    "asym2": ("auto_round", {"bits": 2, "group_size": 32, "sym": False}),
    "asym5": ("auto_round", {"bits": 5, "group_size": 32, "sym": False}),
    "asym4_awq": ("auto_round", {"bits": 4, "group_size": 32, "sym": False}),
    "asym4_gptqmodel": ("auto_round:gptqmodel", {"bits": 4, "group_size": 32, "sym": False}),
    "mixed": (
        "auto_round",
        {"bits": 4, "group_size": 32, "sym": True, "layer_config": {K_PROJ: {"bits": 8, "group_size": 64}}},
    ),
    "gptq3": ("auto_gptq", {"bits": 3, "group_size": 32, "sym": False}),
    "awq_sym": ("auto_awq", {"bits": 4, "group_size": 32, "sym": True}),
    "mxfp4": ("auto_round", {"scheme": "MXFP4"}),
    "mxfp8": ("auto_round", {"scheme": "MXFP8"}),
    "nvfp4": ("auto_round", {"scheme": "NVFP4", **CALIBRATED}),
    "fp8": ("auto_round", {"scheme": "FPW8A16"}),
    "fp8_static": ("auto_round", {"scheme": "FP8_STATIC", **CALIBRATED}),
    "mxint4": ("auto_round", {"scheme": "MXINT4"}),
}


def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False)
    made = LlamaForCausalLM(config).half().eval()
    for parameter in made.parameters():
        if parameter.dim() == 2:
            parameter.data.copy_(torch.randn(parameter.shape) * 0.1)
    return made


def tokenizer():
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w0", pad_token="w1", eos_token="w2", bos_token="w3"
    )


def texts(folder: Path) -> str:
    draw = random.Random(0)
    rows = [{"text": " ".join(f"w{draw.randrange(4, 64)}" for _ in range(64))} for _ in range(8)]
    (folder / "texts.json").write_text(json.dumps(rows))
    return str(folder / "texts.json")


def dequantized(tensors, config, bits, group):
    """A layer's weight [out, in], by auto-round's own code."""
    kind = config.get("data_type", "int")
    if kind == "mx_int":
        return None
    if kind != "int":
        scheme = QuantizationScheme(group_size=16, act_group_size=16)
        if "weight_global_scale" in tensors:
            layer = NVFP4QuantLinear(64, 64, scheme)
        elif "weight_packed" in tensors:
            layer = MXFP4QuantLinear(64, 64, QuantizationScheme())
        elif tensors["weight_scale"].dtype == torch.uint8:
            layer = MXFP8QuantLinear(64, 64, QuantizationScheme())
        else:
            layer = WeightFP8ActFP8StaticQuantLinear(64, 64)
        for name, value in tensors.items():
            setattr(layer, name, torch.nn.Parameter(value, requires_grad=False) if name == "weight" else value)
        return layer.dequant_weight_online().to(torch.bfloat16)
    packing = config.get("packing_format", config["quant_method"])
    if "awq" in packing:
        return dequantize_gemm(tensors["qweight"], tensors["qzeros"], tensors["scales"], bits, group).t()
    module = qlinear_torch if packing in ("auto_round", "auto_round:gptqmodel") else qlinear_torch_zp
    layer = module.QuantLinear(bits, group, 64, 64, False)
    for name, value in tensors.items():
        if name != "g_idx":
            setattr(layer, name, value)
    return layer(torch.eye(64)).half().t()


def main(out: Path) -> None:
    cases = {}
    for name, (form, options) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            if "nsamples" in options:
                options = options | {"dataset": texts(folder)}
            rounding = AutoRound(model(), tokenizer(), iters=0, disable_opt_rtn=True, device_map="cpu", **options)
            rounding.quantize_and_save(str(folder / "saved"), format=form)
            (file,) = glob.glob(f"{folder}/saved/**/config.json", recursive=True)
            config = json.loads(Path(file).read_text())["quantization_config"]
            kept = {}
            for shard in Path(file).parent.glob("*.safetensors"):
                kept |= {key: value for key, value in load_file(shard).items() if any(part in key for part in KEPT)}
        save_file(kept, out / f"{name}.safetensors")
        digests = {}
        for layer in KEPT:
            prefix = f"model.layers.0.self_attn.{layer}."
            tensors = {key.removeprefix(prefix): value for key, value in kept.items() if key.startswith(prefix)}
            own = config.get("extra_config", {}).get(prefix[:-1], {})
            size = own.get("group_size", config["group_size"])
            weight = dequantized(tensors, config, own.get("bits", config["bits"]), 64 if size == -1 else size)
            if weight is not None:
                dtype = str(weight.dtype).removeprefix("torch.")
                content = (weight + 0).contiguous().view(torch.int16).numpy().tobytes()  # + 0: -0 becomes 0
                digests[f"{prefix}weight"] = {"dtype": dtype, "sha256": hashlib.sha256(content).hexdigest()}
        cases[name] = {"config": config, "weights": digests}
    (out / "cases.json").write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

# ruff: noqa: E402  (what is imported when is what is tested)
"""Run in a process of its own: what `install_as_optimum_quanto` promises. Prints one line a promise kept."""

import contextlib
import importlib
import sys
import tempfile

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import import_utils

import_utils.is_optimum_quanto_available()  # what Transformers found out before must be forgotten

from requanto.integrations.optimum_quanto.install import install_as_optimum_quanto

install_as_optimum_quanto()
install_as_optimum_quanto()

import optimum.quanto as quanto
from optimum.quanto.tensor.packed import PackedTensor

assert quanto.__version__ == "0.2.7"
assert PackedTensor.__module__.startswith("requanto.")
NAMES = """
qtype qint2 qint4 qint8 qfloat8 qfloat8_e4m3fn qfloat8_e4m3fnuz qfloat8_e5m2 qtypes quantize freeze requantize
quantization_map Calibration absmax_scale Optimizer SymmetricOptimizer AffineOptimizer AbsmaxOptimizer MaxOptimizer
HqqOptimizer quantize_weight quantize_activation QTensor QBytesTensor QBitsTensor WeightQBytesTensor
WeightQBitsTensor ActivationQBytesTensor QModuleMixin register_qmodule quantize_module QLinear QConv2d QLayerNorm
QuantizedTransformersModel QuantizedModelForCausalLM QuantizedDiffusersModel QuantizedPixArtTransformer2DModel
group ungroup grouped_shape axis_to_dim dtype_info qfallback is_transformers_available is_diffusers_available
get_extension is_extension_available
"""
missing = [name for name in NAMES.split() if not hasattr(quanto, name)]
assert not missing, missing
for name in ("nn", "nn.qlinear", "tensor.weights.qbits", "calibrate", "quantize", "models", "library"):
    importlib.import_module(f"optimum.quanto.{name}")
from optimum.quanto.quantize import quantize as from_module

assert from_module is quanto.quantize
for name in ("quantize_symmetric", "quantize_affine", "unpack", "qbytes_mm"):
    assert hasattr(torch.ops.quanto, name)
print("names")

import diffusers

assert import_utils.is_optimum_quanto_available()
assert import_utils.is_quanto_greater("0.2.5", accept_dev=True)
assert diffusers.utils.is_optimum_quanto_available()
assert diffusers.utils.is_optimum_quanto_version(">=", "0.2.6")
print("available")


def llama(heads, size, tied=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=heads * size, intermediate_size=160, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=tied, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # larger than initialized: a wrong cache must show
        if parameter.dim() == 2:
            parameter.data.mul_(4)
    return model


for size in (16, 20, 80):
    model, ids = llama(2, size), torch.arange(7)[None] + 3
    plain = model.generate(ids, max_new_tokens=10, do_sample=False)
    for bits in (2, 4):
        for axis in (0, -1):
            cache = {"backend": "quanto", "nbits": bits, "axis_key": axis, "axis_value": axis}
            arguments = {"max_new_tokens": 10, "do_sample": False, "cache_implementation": "quantized"}
            out = model.generate(ids, **arguments, cache_config={**cache, "residual_length": 4})
            assert out.shape == plain.shape
            assert torch.equal(out[:, : ids.shape[1] + 1], plain[:, : ids.shape[1] + 1])
            if bits == 4:
                steps = transformers.cache_utils.QuantizedCache(config=model.config, **cache, residual_length=1)
                full = model(plain).logits[:, -1]
                model(plain[:, :-1], past_key_values=steps)
                last = model(plain[:, -1:], past_key_values=steps).logits[:, -1]
                assert (last - full).norm() < 0.25 * full.norm(), (size, axis, (last - full).norm() / full.norm())
# Transformers' own layer, which its QuantizedCache used before, finds what it needs too.
layer, keys = transformers.cache_utils.QuantoQuantizedLayer(nbits=4, residual_length=1), torch.randn(1, 2, 32, 64)
layer.update(keys, keys)
found, _ = layer.update(keys[:, :, :1], keys[:, :, :1])
assert (found[:, :, :32] - keys).norm() < 0.15 * keys.norm()
print("cache")

from optimum.quanto import QuantizedDiffusersModel, QuantizedModelForCausalLM, QuantizedTransformersModel

import requanto.integrations.optimum_quanto.models as native

for api in (sys.modules["optimum.quanto"], native):
    for weights in ("qint8", "qint4", "qint2", "qfloat8"):
        for tied in (False, True):
            with tempfile.TemporaryDirectory() as directory:
                wrapped = api.QuantizedModelForCausalLM.quantize(llama(2, 32, tied), weights=weights)
                wanted = wrapped(ids).logits
                wrapped.save_pretrained(directory, max_shard_size="20KB")
                loaded = api.QuantizedModelForCausalLM.from_pretrained(directory)
                assert torch.equal(loaded(ids).logits, wanted)
                assert loaded.config.vocab_size == 96
                other = native if api is not native else quanto
                across = other.QuantizedModelForCausalLM.from_pretrained(directory)
                assert (across(ids).logits - wanted).norm() < 1e-4 * wanted.norm()
    with contextlib.suppress(ValueError):
        api.QuantizedModelForCausalLM(llama(2, 32))
        raise SystemExit("a float model was wrapped")
    with contextlib.suppress(ValueError):
        api.QuantizedTransformersModel.from_pretrained(".")
        raise SystemExit("loaded without auto_class")
assert issubclass(QuantizedModelForCausalLM, QuantizedTransformersModel)
print("transformers wrapper")

from diffusers import UNet2DModel


class QuantizedUNet(QuantizedDiffusersModel):
    base_class = UNet2DModel


unet = UNet2DModel(
    sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32,), layers_per_block=1, norm_num_groups=8,
    down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",), attention_head_dim=8,
)  # fmt: skip
wrapped = QuantizedUNet.quantize(unet, weights="qint8")
noise = torch.randn(1, 1, 8, 8)
wanted = wrapped(noise, 1).sample
with tempfile.TemporaryDirectory() as directory:
    wrapped.save_pretrained(directory)
    assert torch.equal(QuantizedUNet.from_pretrained(directory)(noise, 1).sample, wanted)
    with contextlib.suppress(ValueError):
        quanto.QuantizedPixArtTransformer2DModel.from_pretrained(directory)
        raise SystemExit("a UNet was loaded as a PixArt transformer")
print("diffusers wrapper")

"""compressed-tensors: the library calibrates (range of the weights), compresses, and decompresses again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from formats_writers.common import Made, companions, float_model, layers

TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}
MX = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
NV = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": "torch.float8_e4m3fn",
}
INT4 = {"num_bits": 4, "strategy": "group", "group_size": 64}
#: scheme -> weights, activations
SCHEMES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "int4": (INT4, None),
    "int4_asymmetric": ({**INT4, "symmetric": False}, None),
    "w8a8": ({"num_bits": 8, "strategy": "channel"}, TOKEN),
    "fp8": ({"num_bits": 8, "type": "float", "strategy": "channel"}, {**TOKEN, "type": "float"}),
    "nvfp4": (NV, None),
    "mxfp4": (MX, None),
}


def write(out: Path, base: Path, scheme: str) -> Made:
    """One scheme for all Linear layers but the output layer."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.compressors.base import decompress_module
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    weights, inputs = SCHEMES[scheme]
    model = float_model(base)
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    config = QuantizationConfig.model_validate({"config_groups": {"group_0": group}, "ignore": ["lm_head"]})
    apply_quantization_config(model, config, show_progress=False)
    for module in layers(model).values():
        _calibrate(module)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    target = out / "model"
    companions(base, target)
    model.config.save_pretrained(target)
    state = {name: value.contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, target / "model.safetensors", {"format": "pt"})
    compressor.update_config(target)
    reference: dict[str, Tensor] = {}
    for name, module in layers(model).items():
        decompress_module(module)
        reference[f"{name}.weight"] = module.weight.detach()
    rounds = None
    if inputs is not None:
        quantizer = next(iter(layers(model).values())).quantization_scheme.input_activations

        def rounds(name: str, value: Tensor) -> Tensor:
            scale, zero = compute_dynamic_scales_and_zp(value, quantizer, model)
            return fake_quantize(value, scale, zero, quantizer)

    return Made(reference, "compressed-tensors", "ModelCompressor, decompress_module", inputs=rounds)


def _calibrate(module: Any) -> None:
    """Fills the scales and zero points of a layer from the range of its weight."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args, weight = module.quantization_scheme.weights, module.weight.detach().float()
    groups = weight.unsqueeze(1) if args.strategy == "channel" else weight.unflatten(1, (-1, args.group_size))
    factor = None
    if hasattr(module, "weight_global_scale"):
        factor = generate_gparam(weight.min(), weight.max())
        module.weight_global_scale.data.copy_(factor)
    scale, zero = calculate_qparams(groups.amin(2), groups.amax(2), args, factor)
    module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
    if not args.symmetric:
        module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))

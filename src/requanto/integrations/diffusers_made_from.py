"""Diffusers' calls that build a module from the weights of a quantized one.

``fuse_qkv_projections`` joins the projections of attention: the joined layers are quantized too, with the same codes.
``UNetMotionModel.from_unet2d`` takes a UNet over for inference: its weights stay quantized. ``ControlNetModel.from_unet``,
``from_transformer`` and so on make a model that is to be trained: it is float, with the dequantized values.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from requanto.integrations.conversion import has_quantized
from requanto.nn.mixin import QModuleMixin
from requanto.tensor.float_targets import dequantize_copies, record_copies
from requanto.tensor.qtensor import QTensor

logger = logging.getLogger(__name__)

#: names of the layers that fuse_projections makes, and of those that it joins
_FUSED = ("to_qkv", "to_kv", "to_added_qkv", "to_added_kv")
_SOURCES = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
_DEQUANTIZED = ("from_unet", "from_transformer")
_KEPT = ("from_unet2d",)


def _patch_class_and_subclasses(base: Any, patch: Callable[[Any], None]) -> None:
    """Calls ``patch`` for a class, its subclasses, and all that will be defined."""
    waiting = [base]
    while waiting:
        found = waiting.pop()
        patch(found)
        waiting += found.__subclasses__()

    def __init_subclass__(cls: Any, **kwargs: Any) -> None:
        super(base, cls).__init_subclass__(**kwargs)
        patch(cls)

    base.__init_subclass__ = classmethod(__init_subclass__)


# ---------------------------------------------------------------------- fused projections


def register_attention() -> None:
    """Patches ``fuse_projections`` of `AttentionModuleMixin` and of the classes that define their own."""
    from diffusers.models.attention import AttentionModuleMixin

    if not hasattr(AttentionModuleMixin.fuse_projections, "_requanto"):
        _patch_class_and_subclasses(AttentionModuleMixin, _patch_fusion)


def register_attention_processor() -> None:
    """Patches ``fuse_projections`` and ``set_processor`` of `Attention`, the class of UNets."""
    from diffusers.models.attention_processor import Attention

    _patch_fusion(Attention)
    _patch_processor(Attention)


def _patch_fusion(cls: Any) -> None:
    original = cls.__dict__.get("fuse_projections")
    if original is None or hasattr(original, "_requanto"):
        return

    @functools.wraps(original)
    def fuse_projections(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        if any(isinstance(_weight(self, name), QTensor) for name in _SOURCES):
            _fuse(self, functools.partial(original, self, *args, **kwargs))
        else:
            original(self, *args, **kwargs)

    fuse_projections._requanto = True
    cls.fuse_projections = fuse_projections


def _patch_processor(cls: Any) -> None:
    """After ``fuse_projections`` models give all attentions a processor that reads the joined layers: those that stayed
    unfused keep their own."""
    original = cls.set_processor
    if hasattr(original, "_requanto"):
        return

    @functools.wraps(original)
    def set_processor(self: nn.Module, processor: Any, *args: Any, **kwargs: Any) -> None:
        if getattr(self, "_requanto_unfused", False) and "Fused" in type(processor).__name__:
            return
        original(self, processor, *args, **kwargs)

    set_processor._requanto = True  # type: ignore[attr-defined]
    cls.set_processor = set_processor


def _weight(attention: nn.Module, name: str) -> Any:
    return getattr(getattr(attention, name, None), "weight", None)


def _fuse(attention: nn.Module, original: Callable[[], None]) -> None:
    sources = [layer for name in _SOURCES if (layer := getattr(attention, name, None)) is not None]
    adapted = [layer for layer in sources if hasattr(layer, "lora_A") and not getattr(layer, "merged", False)]
    if adapted:
        raise ValueError(
            f"fuse_qkv_projections of a quantized model with an adapter on the projections of "
            f"{type(attention).__name__}: the joined layers would leave it out. Call fuse_lora() first, or "
            f"unload_lora_weights()."
        )
    if any(isinstance(layer, QModuleMixin) and layer.activation_qtype is not None for layer in sources):
        attention._requanto_unfused = True  # type: ignore[assignment]
        logger.warning("%s stays unfused: its projections quantize their inputs", type(attention).__name__)
        return
    before = {name: getattr(attention, name) for name in _FUSED if hasattr(attention, name)}
    flag = getattr(attention, "fused_projections", False)
    with record_copies() as copies:
        original()
    copies.assign(attention, clone=False)
    made = [name for name in _FUSED if hasattr(attention, name) and getattr(attention, name) is not before.get(name)]
    attention._requanto_unfused = not all(isinstance(_weight(attention, name), QTensor) for name in made)  # type: ignore[assignment]
    if not attention._requanto_unfused:
        for name in made:
            getattr(attention, name)._requanto_fused = True
        return
    for name in made:
        delattr(attention, name)
    attention.fused_projections = flag  # type: ignore[assignment]
    logger.warning(
        "%s stays unfused: its projections have weights of different types, which cannot be joined without rounding",
        type(attention).__name__,
    )


def without_fused_layers(save_pretrained: Callable) -> Callable:
    """Makes ``save_pretrained`` leave out fused projections: they are copies of layers that the model also has."""

    @functools.wraps(save_pretrained)
    def save(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found = [
            (module, name, layer)
            for module in self.modules()
            for name, layer in module._modules.items()
            if getattr(layer, "_requanto_fused", False)
        ]
        if found:
            logger.info("%d fused projections are not saved: the model holds their parts too", len(found))
        for module, name, _ in found:
            del module._modules[name]
        try:
            return save_pretrained(self, *args, **kwargs)
        finally:
            for module, name, layer in found:
                module._modules[name] = layer  # type: ignore[assignment]

    return save


# ---------------------------------------------------------------------- models made from a model


def register_models() -> None:
    """Patches the methods that make one model from another, of all models of Diffusers."""
    from diffusers.models.modeling_utils import ModelMixin

    if "_requanto_made_from" not in ModelMixin.__dict__:
        ModelMixin._requanto_made_from = True
        _patch_class_and_subclasses(ModelMixin, _patch_made_from)


def _patch_made_from(cls: Any) -> None:
    for name in (*_DEQUANTIZED, *_KEPT):
        method = cls.__dict__.get(name)
        if isinstance(method, classmethod) and not hasattr(method.__func__, "_requanto"):
            setattr(cls, name, classmethod(_wrap_made_from(method.__func__, keep=name in _KEPT)))


def _wrap_made_from(original: Callable, keep: bool) -> Callable:
    @functools.wraps(original)
    def make(cls: Any, *args: Any, **kwargs: Any) -> Any:
        sources = [value for value in (*args, *kwargs.values()) if isinstance(value, nn.Module)]
        if not any(has_quantized(source) for source in sources):
            return original(cls, *args, **kwargs)
        with record_copies() if keep else dequantize_copies() as copies:
            model = original(cls, *args, **kwargs)
        count = len(copies.found)
        if keep and copies.assign(model, clone=True) < count:
            raise RuntimeError(
                f"{cls.__name__}.{original.__name__}: some of {count} quantized weights have no place in it"
            )
        if not has_quantized(model):
            _drop_quantization_config(model)
        logger.info(
            "%s.%s: %d weights of the quantized model were %s",
            cls.__name__,
            original.__name__,
            count,
            "copied"
            if keep
            else "dequantized, since the new model is to be trained; quantize it with requanto.quantize",
        )
        return model

    make._requanto = True  # type: ignore[attr-defined]
    return make


def _drop_quantization_config(model: Any) -> None:
    """The config of the quantized model may have been taken over as a whole."""
    from diffusers.configuration_utils import FrozenDict

    if "quantization_config" in getattr(model, "_internal_dict", {}):
        model._internal_dict = FrozenDict({k: v for k, v in model._internal_dict.items() if k != "quantization_config"})


# ---------------------------------------------------------------------- EMAModel


def register_training() -> None:
    """Patches ``EMAModel.save_pretrained``, which copies the averages into a new float model."""
    from diffusers.training_utils import EMAModel

    original = EMAModel.save_pretrained
    if hasattr(original, "_requanto"):
        return

    @functools.wraps(original)
    def save_pretrained(self: Any, path: Any) -> None:
        quantized = any(isinstance(parameter, QTensor) for parameter in self.shadow_params)
        if not quantized or self.model_cls is None or self.model_config is None:
            return original(self, path)
        model = self.model_cls.from_config(self.model_config)
        _drop_quantization_config(model)
        model.register_to_config(**{k: v for k, v in self.state_dict().items() if k != "shadow_params"})
        names = [name for name, _ in model.named_parameters()]
        model.load_state_dict(dict(zip(names, self.shadow_params, strict=True)), strict=False, assign=True)
        return model.save_pretrained(path)

    save_pretrained._requanto = True
    EMAModel.save_pretrained = save_pretrained

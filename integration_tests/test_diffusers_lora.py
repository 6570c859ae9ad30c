"""LoRA on quantized pipelines: what the adapter changes is what it changes on the float model."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny_diffusers import TINY, relative_error, run_pipeline, tiny_pipeline

import requanto

DTYPES = ("int8", "float8", "int4", "int2", "nf4")
TARGETS = ["to_q", "to_k", "to_v", "proj_mlp", "x_embedder"]  # quantized layers, and one that stays float


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float transformer and two adapters for it, ``one`` and ``two``, of different ranks."""
    path = tmp_path_factory.mktemp("lora")
    model = TINY["flux"].make()
    model.save_pretrained(path / "float")
    for seed, (name, rank) in enumerate({"one": 4, "two": 2}.items()):
        torch.manual_seed(seed)
        model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=False, target_modules=TARGETS), name)
        state = get_peft_model_state_dict(model, adapter_name=name)
        state = {k: v * 4 for k, v in state.items()}  # strong enough to be told from rounding
        type(tiny_pipeline(transformer=model)).save_lora_weights(path / name, transformer_lora_layers=state)
        model.delete_adapters(name)
    return path


def _pipe(folder: Path, weights: str | None) -> Any:
    config = None if weights is None else requanto.QuantoConfig(weights=weights)
    model = TINY["flux"].cls.from_pretrained(folder / "float", quantization_config=config)
    return tiny_pipeline(transformer=model)


def _base(folder: Path, weights: str) -> Any:
    """The pipeline whose float weights are those that the quantized one stands for: what is exact must agree with it."""
    pipe = _pipe(folder, weights)
    pipe.transformer.dequantize()
    return pipe


def _close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert relative_error(found, expected) < 1e-3


@pytest.mark.parametrize("weights", DTYPES)
def test_load_set_fuse_unfuse_unload(folder: Path, weights: str) -> None:
    pipe, same = _pipe(folder, weights), _base(folder, weights)
    plain = run_pipeline(pipe)
    for p in (pipe, same):
        p.load_lora_weights(folder / "one", adapter_name="one")
        p.load_lora_weights(folder / "two", adapter_name="two")
    outputs = []
    for names, scales in ((["one"], [1.0]), (["two"], [0.5]), (["one", "two"], [0.7, 0.4])):
        for p in (pipe, same):
            p.set_adapters(names, scales)
        outputs.append(run_pipeline(pipe))
        assert relative_error(outputs[-1], plain) > 0.02, "the adapter changes nothing: the test tests nothing"
        _close(outputs[-1], run_pipeline(same))
    assert pipe.get_active_adapters() == ["one", "two"]

    for scale in (1.0, 0.5):
        for p in (pipe, same):
            p.fuse_lora(components=["transformer"], lora_scale=scale)
        assert pipe.num_fused_loras == 2
        fused = run_pipeline(pipe)
        _close(fused, run_pipeline(same))
        if scale == 1.0:
            _close(fused, outputs[-1])
        for p in (pipe, same):
            p.unfuse_lora(components=["transformer"])
        _close(run_pipeline(pipe), run_pipeline(same))
        if scale == 1.0:
            _close(run_pipeline(pipe), outputs[-1])

    pipe.disable_lora()
    _close(run_pipeline(pipe), plain)
    pipe.enable_lora()
    pipe.delete_adapters("two")
    pipe.unload_lora_weights()
    _close(run_pipeline(pipe), plain)
    kinds = {p.qtype.name for p in pipe.transformer.parameters() if isinstance(p, requanto.QTensor)}
    assert len(kinds) == 1


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_the_change_is_the_float_models_change(folder: Path, weights: str) -> None:
    """Against the float model itself: the quantized one moves the same way by the same amount."""
    moves = []
    for kind in (None, weights):
        pipe = _pipe(folder, kind)
        before = run_pipeline(pipe)
        pipe.load_lora_weights(folder / "one", adapter_name="one")
        pipe.fuse_lora(components=["transformer"])
        moves.append(run_pipeline(pipe) - before)
    assert relative_error(moves[1], moves[0]) < {"int8": 0.1, "int4": 0.3}[weights]


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_fused_model_saves_and_reloads(folder: Path, weights: str, tmp_path: Path) -> None:
    pipe = _pipe(folder, weights)
    pipe.load_lora_weights(folder / "one", adapter_name="one")
    with pytest.raises(ValueError, match="unload_lora_weights"):
        pipe.transformer.save_pretrained(tmp_path / "early")
    pipe.fuse_lora(components=["transformer"])
    fused = run_pipeline(pipe)
    pipe.unload_lora_weights()
    _close(run_pipeline(pipe), fused)
    pipe.transformer.save_pretrained(tmp_path / "fused")
    again = tiny_pipeline(transformer=TINY["flux"].cls.from_pretrained(tmp_path / "fused"))
    _close(run_pipeline(again), fused)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_hotswap(folder: Path, weights: str) -> None:
    pipe, same = _pipe(folder, weights), _base(folder, weights)
    for p in (pipe, same):
        p.enable_lora_hotswap(target_rank=4)
        p.load_lora_weights(folder / "one", adapter_name="default_0")
    first = run_pipeline(pipe)
    _close(first, run_pipeline(same))
    for p in (pipe, same):
        p.load_lora_weights(folder / "two", hotswap=True, adapter_name="default_0")
    assert relative_error(run_pipeline(pipe), first) > 0.02
    _close(run_pipeline(pipe), run_pipeline(same))


def test_training_an_adapter(folder: Path) -> None:
    """Gradients reach the adapter through quantized layers, and a step lowers the loss."""
    tiny = TINY["flux"]
    config = requanto.QuantoConfig(weights="int4")
    model = tiny.cls.from_pretrained(folder / "float", quantization_config=config)
    model.enable_gradient_checkpointing()
    model.add_adapter(LoraConfig(r=4, init_lora_weights="gaussian", target_modules=TARGETS))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    target = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(1))
    losses = []
    model.train()
    for _ in range(8):
        loss = (model(**tiny.inputs(torch.float32), return_dict=False)[0] - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
    assert losses[-1] < losses[0]


def test_an_adapter_of_a_wider_input_rebuilds_a_quantized_layer(folder: Path) -> None:
    """Control LoRAs widen x_embedder: the library asks for the layer's float weight."""
    from diffusers.loaders.lora_pipeline import _maybe_dequantize_weight_for_expanded_lora

    config = requanto.QuantoConfig(weights="int8", default_skips=False)
    model = TINY["flux"].cls.from_pretrained(folder / "float", quantization_config=config)
    weight = _maybe_dequantize_weight_for_expanded_lora(model, model.x_embedder)
    assert not isinstance(weight, requanto.QTensor)
    assert torch.equal(weight, model.x_embedder.weight.dequantize())


@pytest.mark.parametrize("call", ["model", "pipeline"])
def test_fusing_is_all_or_nothing(folder: Path, call: str) -> None:
    """One broken layer among many: nothing is fused, no scale is changed, and afterwards fusing works."""
    pipe = _pipe(folder, "int4")
    pipe.load_lora_weights(folder / "one", adapter_name="one")
    layers = [module for module in pipe.transformer.modules() if hasattr(module, "lora_B")]
    weight = layers[-1].lora_B["one"].weight
    good = weight.detach().clone()
    before, scales = run_pipeline(pipe), [dict(layer.scaling) for layer in layers]
    weight.data[0, 0] = float("nan")
    bits = copy.deepcopy(pipe.transformer.state_dict())
    fuse = pipe.transformer.fuse_lora if call == "model" else partial(pipe.fuse_lora, components=["transformer"])
    with pytest.raises(ValueError, match="NaN"):
        fuse(lora_scale=0.5)
    assert not any(layer.merged_adapters for layer in layers)
    assert [dict(layer.scaling) for layer in layers] == scales
    for name, value in pipe.transformer.state_dict().items():
        same = [t.dequantize() if isinstance(t, requanto.QTensor) else t for t in (value, bits[name])]
        assert torch.equal(same[0].nan_to_num(), same[1].nan_to_num()), name
    weight.data.copy_(good)
    _close(run_pipeline(pipe), before)
    pipe.fuse_lora(components=["transformer"])
    _close(run_pipeline(pipe), before)

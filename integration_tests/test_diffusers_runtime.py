"""What users do with a loaded model: offload, cast layers, copy, move, compile. On a machine without an accelerator the
offloads go between CPU, meta and disk, through the same code."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from tiny_diffusers import TINY, relative_error, run_pipeline, tiny_pipeline

import requanto
from requanto.model.quantize import freeze, quantize

DTYPES = ("int8", "float8", "int4", "int2", "codebook4")
TINY_FLUX = TINY["flux"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model."""
    path = tmp_path_factory.mktemp("runtime")
    TINY_FLUX.make().save_pretrained(path)
    return path


def _load(folder: Path, weights: str, **kwargs: Any) -> Any:
    config = requanto.QuantoConfig(weights=weights)
    return TINY_FLUX.cls.from_pretrained(folder, quantization_config=config, **kwargs)


def _count(model: torch.nn.Module) -> int:
    return sum(isinstance(p, requanto.QTensor) for p in model.parameters())


@pytest.mark.parametrize("weights", DTYPES)
def test_deepcopy(folder: Path, weights: str) -> None:
    model = _load(folder, weights)
    twin = copy.deepcopy(model)
    assert _count(twin) == _count(model) > 0
    torch.testing.assert_close(TINY_FLUX.run(twin), TINY_FLUX.run(model), rtol=1e-4, atol=1e-4)
    quantized = dict(model.named_parameters())
    for name, parameter in twin.named_parameters():
        if isinstance(parameter, requanto.QTensor):
            assert parameter.qdata.data_ptr() != quantized[name].qdata.data_ptr()
    twin.dequantize()
    assert _count(model) > 0


@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload(folder: Path, weights: str, kind: str, where: str, tmp_path: Path) -> None:
    model = _load(folder, weights)
    expected, held = TINY_FLUX.run(model), model.get_memory_footprint()
    options: dict[str, Any] = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    if where == "disk":
        options["offload_to_disk_path"] = str(tmp_path)
    model.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type=kind, **options
    )
    for _ in range(2):
        torch.testing.assert_close(TINY_FLUX.run(model), expected, rtol=1e-4, atol=1e-4)
    if where == "disk":
        files = list(tmp_path.rglob("*.safetensors"))
        assert files
        # what lies on disk are codes, not float weights
        assert sum(f.stat().st_size for f in files) < held + 4000 * len(files)


@pytest.mark.parametrize("weights", DTYPES)
def test_sequential_offload(folder: Path, weights: str, tmp_path: Path) -> None:
    """What enable_sequential_cpu_offload does to each model: weights on meta between the layers' calls."""
    expected = TINY_FLUX.run(_load(folder, weights))
    model = _load(folder, weights)
    cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    for _ in range(2):
        torch.testing.assert_close(TINY_FLUX.run(model), expected, rtol=1e-4, atol=1e-4)
    remove_hook_from_module(model, recurse=True)
    torch.testing.assert_close(TINY_FLUX.run(model), expected, rtol=1e-4, atol=1e-4)


def test_offload_by_accelerate_to_disk(folder: Path, tmp_path: Path) -> None:
    model = _load(folder, "int4")
    expected = TINY_FLUX.run(model)
    disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    torch.testing.assert_close(TINY_FLUX.run(model), expected, rtol=1e-4, atol=1e-4)


def test_model_offload_moves_whole_models(folder: Path) -> None:
    """What enable_model_cpu_offload does: the model goes to the device when it is called."""
    model = _load(folder, "int4")
    expected = TINY_FLUX.run(model)
    add_hook_to_module(model, AlignDevicesHook(execution_device="cpu", io_same_device=True, place_submodules=True))
    torch.testing.assert_close(TINY_FLUX.run(model), expected, rtol=1e-4, atol=1e-4)
    remove_hook_from_module(model, recurse=True)
    empty = copy.deepcopy(model).to("meta")
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert _count(empty) == _count(model)
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    torch.testing.assert_close(TINY_FLUX.run(empty), expected, rtol=1e-4, atol=1e-4)


def test_model_cpu_offload_of_a_pipeline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the library told that there is an accelerator, and the CPU given as the device to run on."""
    pipe = tiny_pipeline(transformer=_load(folder, "int4"))
    expected = run_pipeline(pipe)
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.get_device", lambda: "xpu")
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        torch.testing.assert_close(run_pipeline(pipe), expected, rtol=1e-4, atol=1e-4)


def test_a_group_offloaded_pipeline(folder: Path) -> None:
    pipe = tiny_pipeline(transformer=_load(folder, "int4"))
    expected = run_pipeline(pipe)
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    torch.testing.assert_close(run_pipeline(pipe), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weights", DTYPES)
def test_layerwise_casting_casts_the_rest(folder: Path, weights: str) -> None:
    model = _load(folder, weights, torch_dtype=torch.bfloat16)
    expected = TINY_FLUX.run(model, torch.bfloat16)
    count = _count(model)
    model.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16, skip_modules_pattern=("norm",)
    )
    assert model.x_embedder.weight.dtype == torch.float8_e4m3fn
    assert _count(model) == count
    found = TINY_FLUX.run(model, torch.bfloat16)
    assert relative_error(found, expected) < 0.1


@pytest.mark.parametrize("weights", DTYPES)
def test_compile_repeated_blocks_without_graph_breaks(folder: Path, weights: str) -> None:
    model = _load(folder, weights)
    expected = TINY_FLUX.run(model)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(TINY_FLUX.run(model), expected, rtol=1e-4, atol=1e-4)


def test_compile_a_block_by_inductor(folder: Path) -> None:
    """The default backend, which writes and compiles C++ here."""
    model = _load(folder, "int4")
    expected = TINY_FLUX.run(model)
    torch._dynamo.reset()
    model.single_transformer_blocks[0].compile(fullgraph=True)
    torch.testing.assert_close(TINY_FLUX.run(model), expected, rtol=1e-3, atol=1e-3)


def test_compile_after_quantize(folder: Path) -> None:
    model = TINY_FLUX.cls.from_pretrained(folder)
    quantize(model, weights="int4")
    freeze(model)
    expected = TINY_FLUX.run(model)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(TINY_FLUX.run(model), expected, rtol=1e-4, atol=1e-4)


def test_inference_mode_and_autocast(folder: Path) -> None:
    for weights in DTYPES:
        model = _load(folder, weights)
        expected = TINY_FLUX.run(model)
        with torch.inference_mode():
            torch.testing.assert_close(TINY_FLUX.run(model), expected, rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_error(TINY_FLUX.run(model), expected) < 0.05

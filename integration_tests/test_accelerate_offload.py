"""accelerate's offloading and device maps, on the fly and from a quantized checkpoint: same numbers, true sizes."""

import accelerate
import pytest
import torch
from tiny_models import TINY, output, save_tiny

from requanto import QTensor, QuantoConfig
from requanto.tensor.lowrank import append

DEVICE_MAP = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


@pytest.fixture(scope="module", params=["llama-int4", "llama-int8", "llama-float8", "llama-tied-int4"])
def case(request, tmp_path_factory):
    """A model's loader, its quantized checkpoint and its logits."""
    name, _, weights = request.param.rpartition("-")
    directory = save_tiny(name, tmp_path_factory.mktemp("float"))
    config = {"weights": weights, "embeddings": name == "llama-tied", "lm_head": name == "llama-tied"}

    def load(**options):
        return TINY[name].auto.from_pretrained(directory, quantization_config=QuantoConfig(**config), **options).eval()

    model = load()
    saved = tmp_path_factory.mktemp("saved")
    model.save_pretrained(saved)
    return name, load, saved, output(model, TINY[name].inputs())


def check(model, case, on_meta: int | None = None) -> None:
    name, _, _, expected = case
    for _ in range(2):  # hooks put everything back
        # A weight that is brought back for each call stays plain: x is not rounded then.
        assert (output(model, TINY[name].inputs()) - expected).norm() < 2e-2 * expected.norm()
    if on_meta is not None:
        assert sum(p.device.type == "meta" for p in model.parameters()) >= on_meta


def test_cpu_offload(case):
    check(accelerate.cpu_offload(case[1](), execution_device="cpu"), case, on_meta=14)


def test_cpu_offload_with_hook(case):
    check(accelerate.cpu_offload_with_hook(case[1](), execution_device="cpu")[0], case)


def test_disk_offload(case, tmp_path):
    check(accelerate.disk_offload(case[1](), tmp_path, execution_device="cpu"), case, on_meta=14)


def test_dispatch(case, tmp_path):
    model = case[1]()
    check(accelerate.dispatch_model(model, DEVICE_MAP, main_device="cpu", offload_dir=tmp_path), case, on_meta=7)


def test_tied_weights_are_recognized_after_packing(tmp_path):
    """Accelerate remembers tied weights by `data_ptr`; no weight that is loaded later may be taken for one of them."""
    directory = save_tiny("llama-tied", tmp_path / "float")
    config = QuantoConfig("int4", embeddings=True, lm_head=True)
    model = TINY["llama-tied"].auto.from_pretrained(directory, quantization_config=config).eval()
    model = accelerate.dispatch_model(model, DEVICE_MAP, main_device="cpu", offload_dir=tmp_path / "off")
    known = model.model.layers[1].self_attn.q_proj._hf_hook.tied_params_map
    (key,) = known
    for _ in range(2):
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr() == key
        output(model, TINY["llama-tied"].inputs())
    assert model.lm_head.weight.is_packed


@pytest.mark.parametrize("quantized", [False, True], ids=["on the fly", "from a checkpoint"])
@pytest.mark.parametrize("device_map", [DEVICE_MAP, {"": "disk"}, "auto"], ids=["parts", "all", "auto"])
def test_device_maps(case, tmp_path, quantized, device_map):
    name, load, saved, _ = case
    options = {"device_map": device_map, "offload_folder": tmp_path / "off"}
    if device_map == "auto":
        options["max_memory"] = {"cpu": "40KB"}
    model = TINY[name].auto.from_pretrained(saved, **options) if quantized else load(**options)
    check(model, case, on_meta=7)
    # An offloaded model saves what it is.
    model.save_pretrained(tmp_path / "again")
    again = TINY[name].auto.from_pretrained(tmp_path / "again")
    check(again, case)
    assert sum(isinstance(p, QTensor) for p in again.parameters()) >= 14


def test_a_weight_on_disk_needs_a_folder(case):
    with pytest.raises(ValueError, match="offload_folder"):
        case[1](device_map=DEVICE_MAP)


def test_merged_adapters_go_along(case, tmp_path):
    name, load, _, _ = case
    model = load()
    for parameter in model.parameters():
        if isinstance(parameter, QTensor):
            append(parameter, torch.ones(parameter.shape[0], 2), 0.01 * torch.ones(2, parameter.shape[1]))
    expected = output(model, TINY[name].inputs())
    model.save_pretrained(tmp_path / "merged")
    options = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "off"}
    loaded = TINY[name].auto.from_pretrained(tmp_path / "merged", **options)
    assert torch.equal(output(loaded, TINY[name].inputs()), expected)


def test_sizes_are_true(case):
    model = case[1]()
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert accelerate.utils.compute_module_sizes(model)[""] == held
    assert accelerate.utils.compute_module_sizes(model, dtype=torch.float16)["model.layers.0.mlp.up_proj"] == (
        model.model.layers[0].mlp.up_proj.weight.nbytes
    )
    layer = accelerate.utils.compute_module_sizes(model)["model.layers.0"]
    assert layer == sum(p.nbytes for p in model.model.layers[0].parameters())
    # Room for all but one layer: with float sizes none would fit.
    found = accelerate.infer_auto_device_map(
        model, max_memory={"cpu": held - layer // 2, "disk": 10**9}, no_split_module_classes=["LlamaDecoderLayer"]
    )
    assert "cpu" in set(found.values())
    assert case[0] == "llama-tied" or found["model.layers.0"] == "cpu"


def test_tied_weights_stay_apart_from_others(case):
    """accelerate tells weights apart by address; a wrapper's own is 0 for all."""
    model = case[1]()
    pointers = {p.data_ptr() for p in model.parameters()}
    assert len(pointers) == len(list(model.parameters()))
    assert 0 not in pointers
    if case[0] == "llama-tied":
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_accelerator_prepares_and_unwraps(case):
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(case[1]())
    check(accelerator.unwrap_model(model), case)
    state = accelerator.get_state_dict(model)
    assert sum(isinstance(value, QTensor) for value in state.values()) >= 14

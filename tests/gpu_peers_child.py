"""Calls one peer of `benchmarks/gpu_check/peers.py` without a GPU; prints what became of each operation as JSON.

    python tests/gpu_peers_child.py PEER

What the peer asks of the GPU before it launches a kernel is answered as an H200 answers.
"""

import contextlib
import json
import sys
import tempfile
import traceback
import types
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from gpu_check import peers

N, K = 256, 1024
PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=141 << 30, L2_cache_size=60 << 20,
    warp_size=32, max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536,
    shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472, gcnArchName="",
)  # fmt: skip


class Launch(Exception):
    """A call came as far as the launch of a kernel."""


def launch(*arguments: object, **options: object) -> None:
    raise Launch


class Driver:
    """A driver of Triton that knows its target, and launches nothing."""

    utils = types.SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": 232448})

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_benchmarker(self) -> object:
        return launch

    def __getattr__(self, name: str) -> object:
        return launch


@contextlib.contextmanager
def an_h200(name: str):
    with contextlib.ExitStack() as stack:
        for what, value in (
            ("get_device_properties", PROPERTIES), ("get_device_capability", (9, 0)), ("get_device_name", "NVIDIA H200"),
            ("current_device", 0), ("empty_cache", None), ("device_count", 0), ("is_available", name != "gemlite"),
        ):  # fmt: skip
            if name not in ("bitsandbytes", "sdnq", "hqq"):  # they run on a CPU
                stack.enter_context(mock.patch.object(torch.cuda, what, return_value=value))
                stack.enter_context(mock.patch.object(torch.version, "cuda", "13.0"))
        if name == "gemlite":
            import triton

            triton.runtime.driver.set_active(Driver())
        if name == "humming":
            for patch in humming():
                stack.enter_context(patch)
        yield


def humming():
    """What humming's layer needs of a GPU: quantizing and packing give the right shapes, the product ends the call."""
    from humming_aot import pretended

    yield pretended(folder=tempfile.mkdtemp())
    # The layer asks for a buffer on the current device, and its quantizer for the weight on the GPU.
    yield mock.patch.object(torch.cuda, "current_device", return_value="cpu")
    yield mock.patch.object(torch.Tensor, "cuda", lambda self: self)
    import humming.forward
    from humming import ops
    from humming.config import LayerConfig
    from humming.tune import get_heuristics_config

    def quantized(inputs, *, target_dtype_str, group_size, has_zero_point, **options):
        experts, n, k = inputs.shape
        groups = torch.ones(experts, n, k // (group_size or k))
        return torch.zeros(inputs.shape, dtype=torch.int32), groups, groups if has_zero_point else torch.empty(0)

    def packed(inputs, num_bits):
        return torch.zeros(*inputs.shape[:-1], inputs.shape[-1] * num_bits // 32, dtype=torch.int32)

    def converted(inputs, *types, check_only=False, **options):
        return torch.tensor(True) if check_only else inputs

    def product(*, layer_config, inputs, weight, weight_scale, **options):
        tiles = [tile for _, _, tile in get_heuristics_config(json.loads(layer_config), device=0)]
        assert json.loads(options["tuning_config"]) in json.loads(json.dumps(tiles))
        assert inputs.shape[-1] == K
        launch()

    def input_codes(inputs, *, quant_dtype, **options):
        codes = torch.zeros(inputs.shape, dtype={"int8": torch.int8}.get(quant_dtype, torch.float8_e4m3fn))
        return codes, None, torch.ones(inputs.shape[0], 1)

    yield mock.patch.object(ops, "quant_weight", quantized)
    yield mock.patch.object(ops, "pack_weight", packed)
    yield mock.patch.object(ops, "convert_weight", converted)
    yield mock.patch.object(ops, "repack_weight", lambda inputs, **options: inputs)
    yield mock.patch.object(ops, "process_input", input_codes)
    yield mock.patch.object(ops, "humming_gemm", product)
    yield mock.patch.object(LayerConfig, "check_device", return_value=None)
    yield mock.patch.object(humming.forward, "_resolve_use_pdl", return_value=False)


def outcome(call, x: torch.Tensor, expected: torch.Tensor) -> list:
    """["error", relative error] of a product, or [name of the exception, message, functions that it passed]."""
    try:
        found = call(x)
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        return [type(error).__name__, str(error)[:300], [f"{frame.name}:{frame.lineno}" for frame in frames[-6:]]]
    assert (found.shape, found.dtype) == ((x.shape[0], N), torch.bfloat16)
    return ["error", float((found.float() - expected).norm() / expected.norm())]


def main() -> None:
    name = sys.argv[1]
    torch.manual_seed(0)
    weight, x = torch.randn(N, K, dtype=torch.bfloat16) * 0.02, torch.randn(64, K, dtype=torch.bfloat16)
    before, expected = weight.clone(), x.float() @ weight.float().t()
    with an_h200(name):
        assert not peers.missing(name), peers.missing(name)
        layers = peers.ops(name, N, K, "cpu", weight)
        found = {op: outcome(layers[op], x, expected) for op in peers.OPS[name]}
    assert torch.equal(weight, before)
    print(json.dumps({"version": peers.version(name), "ops": found}))


if __name__ == "__main__":
    main()

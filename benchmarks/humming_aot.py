"""Compiles humming's kernels for a GPU that is not there, and counts the instructions of their main loops.

    pip install --target DIR --no-deps humming-kernels cuda-bindings cuda-pathfinder jinja2 markupsafe tabulate
    PYTHONPATH=DIR python benchmarks/humming_aot.py            # writes benchmarks/results/humming_aot.json

Needs nvcc (CUDA 13), no GPU. What humming asks of the device is answered from `GPUS`, so its own heuristics choose the tiles
that they choose on that GPU. The count is of instructions for each weight that a thread multiplies, as in `kernel_aot.py`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

import torch

RESULT = Path(__file__).parent / "results" / "humming_aot.json"
#: name: (compute capability, multiprocessors, MB of L2, KB of shared memory of a program, GB/s, TFLOP/s in 16 bits)
GPUS = {
    "NVIDIA H200": (90, 132, 60, 227, 4800, 989),
    "NVIDIA A100": (80, 108, 40, 163, 2039, 312),
    "NVIDIA L40S": (89, 142, 96, 99, 864, 362),
}
#: case: what humming's schema calls the weight
WEIGHTS = {
    "int4 row": {"b_dtype": "uint4"},
    "int4 g128 symmetric": {"b_dtype": "uint4", "weight_scale_group_size": 128},
    "int4 g64 float shift": {
        "b_dtype": "uint4", "weight_scale_group_size": 64, "has_zero_point": True, "is_fp_zero_point": True,
    },
    "int8 row": {"b_dtype": "uint8"},
    "float8 row": {"b_dtype": "float8e4m3"},
}  # fmt: skip
ROWS = (1, 16, 64, 4096)


@contextlib.contextmanager
def pretended(gpu: str = "NVIDIA H200", folder: str | None = None):
    """Lets humming be imported, choose tiles and compile as on that GPU, on a machine without one."""
    capability, count, l2, shared, bandwidth, rate = GPUS[gpu]
    info = {
        "index": 0, "name": gpu, "is_ppu": False, "sm_count": count, "max_threads_per_block": 1024,
        "max_threads_per_sm": 2048, "max_registers_per_sm": 65536, "sm_major": capability // 10,
        "sm_minor": capability % 10, "sm_version": capability,
        "l2_cache_size": l2 << 20, "l2_cache_size_mb": float(l2), "l1_cache_size": 256 << 10, "l1_cache_size_kb": 256.0,
        "default_smem_size": 48 << 10, "max_smem_size": shared << 10, "max_smem_size_kb": float(shared),
        "memory_clock_khz": 3201000, "memory_bus_width": 6144, "sm_clock_khz": 1980000,
        "memory_bandwidth_gbps": float(bandwidth), "tensorcore_tops": {"float16": rate, "bfloat16": rate},
    }  # fmt: skip
    folder = folder or os.path.join(tempfile.gettempdir(), "requanto-humming")
    os.makedirs(os.path.join(folder, "tmp"), exist_ok=True)
    own = {
        "HUMMING_DISABLE_PARALLEL_BUILD": "1", "HUMMING_CACHE_DIR": os.path.join(folder, "cache"),
        "HUMMING_TMP_DIR": os.path.join(folder, "tmp"), "HUMMING_COMPILER": "nvcc",
    }  # fmt: skip
    native = types.SimpleNamespace(_DeviceInfo=lambda index: types.SimpleNamespace(**info))
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, own))
        stack.enter_context(mock.patch.object(torch.version, "cuda", "13.0"))
        stack.enter_context(mock.patch.object(torch.cuda, "current_device", return_value=0))
        stack.enter_context(mock.patch.object(torch.cuda, "device", side_effect=lambda index: contextlib.nullcontext()))
        import humming.device
        import humming.utils.device
        from humming.kernel.humming import HummingKernel

        for module in (humming.device, humming.utils.device):
            stack.enter_context(mock.patch.object(module, "_get_device_info_extension", return_value=native))
        stack.enter_context(mock.patch.object(humming.device.DeviceInfo, "_instances", {}))
        # Loading a compiled kernel needs a driver.
        stack.enter_context(mock.patch.object(HummingKernel, "register_kernel", return_value=None))
        yield


def config_of(n: int, k: int, schema: dict):
    """humming's LayerConfig of a weight for bfloat16 activations."""
    from humming.schema import HummingWeightSchema
    from humming.transform import prepare_layer_config

    return prepare_layer_config(n, k, HummingWeightSchema(**schema), torch_dtype=torch.bfloat16, device=0)


def compiled(config, rows: int) -> tuple[str, dict]:
    """(path of the cubin, humming's tile) for a number of rows."""
    from humming.kernel.humming import HummingKernel
    from humming.tune import get_heuristics_config

    tile = next(tile for low, high, tile in get_heuristics_config(config, device=0) if low < rows <= high)
    kernel = HummingKernel(
        **{key: value for key, value in (json.loads(config.to_str()) | tile).items() if key != "num_sms"}
    )
    return kernel.kernel_filename, tile


def main_loop(cubin: str) -> dict:
    """The instructions of the shortest loop with the most matrix instructions for its length, registers and spills."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    lines = subprocess.run([tools / "cuobjdump", "-sass", cubin], check=True, capture_output=True, text=True).stdout
    found = [
        (int(match[1], 16), match[2])
        for line in lines.splitlines()
        if (match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line))
    ]
    place = {address: i for i, (address, _) in enumerate(found)}
    loops = []
    for i, (address, text) in enumerate(found):
        match = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if match and int(match[1], 16) < address and int(match[1], 16) in place:
            body = [
                re.sub(r"^@!?U?P\w+\s+", "", line).split()[0] for _, line in found[place[int(match[1], 16)] : i + 1]
            ]
            matrix = sum("MMA." in word for word in body)
            if matrix:
                loops.append((matrix / len(body), body, matrix))
    _, body, matrix = max(loops, key=lambda loop: loop[0])
    kinds = collections.Counter(word.split(".")[0] for word in body)
    usage = subprocess.run([tools / "cuobjdump", "-res-usage", cubin], check=True, capture_output=True, text=True)
    registers = re.search(r"REG:(\d+)", usage.stdout + usage.stderr)
    local = sum(re.sub(r"^@!?U?P\w+\s+", "", text).startswith(("STL", "LDL")) for _, text in found)
    return {
        "loop": len(body), "matrix": matrix, "registers": int(registers[1]) if registers else None, "local": local,
        "most": dict(kinds.most_common(8)),
    }  # fmt: skip


def weights_a_thread(tile: dict, matrix: int) -> float:
    """Weights that a thread multiplies in that many matrix instructions: of 16 x 16 a warp, or 64 x 16 four warps."""
    return matrix * (
        64 * 16 / 128 if tile["mma_type"] == "wgmma" else 16 * (16 if tile["warp_shape"][0] % 16 == 8 else 8) / 32
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=GPUS, default="NVIDIA H200")
    parser.add_argument("--shape", default="28672x8192", help="NxK")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    n, k = map(int, args.shape.split("x"))
    rows = []
    with pretended(args.gpu):
        for name, schema in WEIGHTS.items():
            config = config_of(n, k, schema)
            for m in args.rows:
                cubin, tile = compiled(config, m)
                row = {"weight": name, "m": m, **main_loop(cubin)}
                row["tile"] = {key: value for key, value in tile.items() if value}
                row["per_weight"] = round(row["loop"] / weights_a_thread(tile, row["matrix"]), 2)
                rows.append(row)
                shape, instruction = tile["block_shape"], tile["mma_type"]
                print(
                    f"{name:22} M={m:<5} {row['loop']:5} instructions, {row['per_weight']:5.2f} a weight, "
                    f"{row['registers']} registers, {shape} {instruction}",
                    flush=True,
                )
    result = {
        "command": " ".join(["python benchmarks/humming_aot.py", *sys.argv[1:]]),
        "gpu": f"{args.gpu}, not present: counts, no times",
        "humming": importlib.metadata.version("humming-kernels"), "shape": [n, k], "rows": rows,
    }  # fmt: skip
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Every call of another library in `make gpu-check` is spelled right: run as far as a CPU goes, if it is installed.

python benchmarks/gpu_check/wheels.py DIR && pip install --no-deps --target SITE DIR/*.whl
PYTHONPATH=SITE pytest tests/test_gpu_peers.py
"""

import importlib
import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
ERRORS = {"int4": 0.12, "nf4": 0.1, "int8": 0.02, "float8": 0.05}
#: Where a call ends on a CPU: the launch of a Triton or CUDA kernel, or an operator that only GPUs have.
ENDS = {
    ("humming", None): "Launch",
    ("gemlite", None): "Launch",
    ("torchao", "int4 g128"): "Could not run 'aten::_convert_weight_to_int4pack'",
}


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.mark.parametrize("name", ["humming", "gemlite", "torchao", "bitsandbytes", "sdnq", "hqq"])
def test_calls(gpu_check, name):
    peers = gpu_check("gpu_check.peers")
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    command = [sys.executable, str(ROOT / "tests" / "gpu_peers_child.py"), name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(name, found["version"])
    assert tuple(found["ops"]) == peers.OPS[name]
    for op, outcome in found["ops"].items():
        end = ENDS.get((name, op)) or ENDS.get((name, None))
        if end is None:
            assert outcome[0] == "error", (op, outcome)
            assert outcome[1] < ERRORS[op.split()[0]], (op, outcome)
        else:
            assert end in (outcome[0], *outcome[1:2]) or end in outcome[1], (op, outcome)


def test_every_operation_has_a_kind_to_compare_with(gpu_check):
    peers = gpu_check("gpu_check.peers")
    known = {
        "int4 g128", "int4 g64 affine", "int8", "float8", "float8 x float8", "int8 x int8", "nf4", "int4 x int8",
    }  # fmt: skip
    assert {op for ops in peers.OPS.values() for op in ops} <= known


def test_what_fails_costs_its_own_operation(gpu_check, monkeypatch):
    peers = gpu_check("gpu_check.peers")

    def broken(weight, device):
        raise RuntimeError("no kernel")

    monkeypatch.setitem(
        peers._MAKE, "hqq", {"int4 g64 affine": broken, "other": lambda weight, device: lambda x: x @ weight.t()}
    )
    made = peers.ops("hqq", 8, 16, "cpu")
    with pytest.raises(RuntimeError, match="no kernel"):
        made["int4 g64 affine"](torch.ones(1, 16))
    assert made["other"](torch.ones(2, 16, dtype=torch.bfloat16)).shape == (2, 8)
    with pytest.raises(ValueError, match="expected one of humming"):
        peers.ops("marlin", 8, 16, "cpu")
    assert "not a peer" in peers.missing("marlin")
    monkeypatch.setitem(sys.modules, "hqq", None)
    assert "hqq" in peers.missing("hqq")


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups(gpu_check, symmetric):
    peers = gpu_check("gpu_check.peers")
    weight = torch.randn(8, 256, dtype=torch.bfloat16)
    codes, scale, zero = peers._in_groups(weight, 64, symmetric)
    assert (codes.dtype, codes.shape, scale.shape, zero.shape) == (torch.uint8, (8, 256), (8, 4), (8, 4))
    values = (codes.float().view(8, 4, 64) - zero.float().unsqueeze(2)) * scale.float().unsqueeze(2)
    assert (values.view(8, 256) - weight.float()).norm() / weight.float().norm() < 0.12


def test_wheels_keep_one_of_bitsandbytes_libraries(gpu_check, tmp_path):
    wheels = gpu_check("gpu_check.wheels")
    path = tmp_path / "bitsandbytes-1-py3-none-any.whl"
    names = [
        f"bitsandbytes/libbitsandbytes_{device}.so" for device in ("cpu", "cuda118", "cuda130", "rocm70", "xpu2025")
    ]
    with zipfile.ZipFile(path, "w") as file:
        for name in (*names, "bitsandbytes/__init__.py"):
            file.writestr(name, "x")
        file.writestr("bitsandbytes-1.dist-info/RECORD", "".join(f"{name},,\n" for name in names))
    wheels.slim(path, "130")
    with zipfile.ZipFile(path) as file:
        left = [name for name in file.namelist() if name.endswith(".so")]
        assert left == [names[0], names[2]]
        assert file.read("bitsandbytes-1.dist-info/RECORD").decode() == "".join(f"{name},,\n" for name in left)

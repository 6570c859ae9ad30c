"""What the process is set to has no say in a weight's numbers: default dtype and device, autocast, grad modes, threads.

The states are those of a process, and so are the caches that must not keep what was made under them: a second process
forks one child for each state, which has never quantized anything.
"""

import json
import os
import subprocess
import sys
import traceback

import pytest
import torch
from ambient import default_device, default_dtype, threads

PARTS = ("qdata", "scale", "shift", "row_scale", "codebook", "up", "down")

STATES = {
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default float16": lambda: default_dtype(torch.float16),
    "default float64": lambda: default_dtype(torch.float64),
    "default device": lambda: default_device("meta"),
    "device context": lambda: torch.device("meta"),
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "threads": lambda: threads(2),
}


def cases():
    """name -> (kind, dtype, shape, options)."""
    from requanto.dtypes.qtypes import qtypes
    from requanto.scales.search import valid_methods

    found = {}

    def add(kind, dtype=torch.float32, shape=(6, 128), **options):
        found[f"{kind} {dtype} {shape} {options}"] = (kind, dtype, shape, options)

    for kind in qtypes.values():
        add(kind.name)
        add(kind.name, torch.bfloat16, rotation=True)
    for name in ("qint2", "qint4", "quint3", "qint8", "qfloat8_e4m3fn", "qnf4", "qfp6_e2m3", "qcodebook4"):
        for search in valid_methods(qtypes[name]):
            add(name, search=search)
            add(name, torch.float16, group_size=16, search=search)
        add(name, group_size=32, scale_bits=6, rotation=32)
        add(name, low_rank=3)
        add(name, shape=(6, 128), rotation=True, low_rank=2, group_size=None)
        add(name, shape=(2, 5, 64))
    for name in ("qint4", "qint3"):
        add(name, symmetric=True)
    # Rows so long that torch shares one's sums out among threads.
    for name in ("qint4", "qint8"):
        for search in ("mse", "weighted", "aligned", "hqq"):
            add(name, shape=(1, 40000), group_size=None, search=search)
    return found


def run(kind, dtype, shape, options):
    from requanto import QTensor

    generator = torch.Generator("cpu").manual_seed(5)
    weight = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
    made = QTensor.quantize(weight, kind, **options)
    parts = {name: getattr(made, name) for name in PARTS if getattr(made, name) is not None}
    return {**parts, "values": made.dequantize(), "wide": made.dequantize(torch.float32)}


def others():
    """What else is computed for a scale, or kept."""
    from requanto.dtypes.qtypes import qfloat8, qint8, qtypes
    from requanto.scales import correction
    from requanto.scales.codebook import nearest_codes, values_of
    from requanto.scales.observers import MseObserver, PercentileObserver, absmax_scale
    from requanto.scales.rotation import rotate

    generator = torch.Generator("cpu").manual_seed(6)
    x = torch.randn(40, 64, generator=generator, dtype=torch.float32, device="cpu")
    full, correction.FULL = correction.FULL, 16
    try:
        up, down = correction.low_rank_factors(x, 4, torch.float32)
    finally:
        correction.FULL = full
    found = {"up": up, "down": down, "rotated": rotate(x, 16), "rotated bfloat16": rotate(x.to(torch.bfloat16), 64)}
    found["codes"] = nearest_codes(x, qtypes["qfp7_e4m2"])
    found["table"] = values_of(qtypes["qnf3"], x)
    for kind in (qint8, qfloat8):
        for observer in (MseObserver(), PercentileObserver(), absmax_scale):
            found[f"{observer} {kind}".split(" at ")[0] + kind.name] = observer(x, kind)
    return found


def everything(exact=True):
    """exact: with what LAPACK computes, whose sums are shared out among threads."""
    found = {name: run(*case) for name, case in cases().items() if exact or "low_rank" not in case[3]}
    beside = others()
    return {**found, "others": beside if exact else {n: t for n, t in beside.items() if n not in ("up", "down")}}


def differences(got, want):
    wrong = [name for name in want if name not in got]
    for name, parts in want.items():
        for part, tensor in parts.items():
            other = got.get(name, {}).get(part)
            alike = other is not None and other.dtype == tensor.dtype and other.shape == tensor.shape
            same = alike and other.device == tensor.device
            if not same or not torch.equal(bits(other), bits(tensor)):
                wrong.append(f"{name}: {part}")
    return wrong


def bits(tensor):
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def fake_then_real():
    """Weights without numbers, and what is kept on their behalf."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    wrong = []
    with FakeTensorMode():
        for name, case in cases().items():
            try:
                for part, tensor in run_fake(*case).items():
                    if not isinstance(tensor, FakeTensor):
                        wrong.append(f"{name}: {part} is no fake tensor")
            except Exception as error:
                wrong.append(f"{name}: {type(error).__name__}: {error}"[:300])
    return wrong


def run_fake(kind, dtype, shape, options):
    from requanto import QTensor

    made = QTensor.quantize(torch.empty(shape, dtype=dtype, device="cpu"), kind, **options)
    values = made.dequantize()
    assert values.shape == shape
    assert values.dtype == dtype
    parts = {name: getattr(made, name) for name in PARTS if getattr(made, name) is not None}
    return {**parts, "values": values}


def child(name):
    """The state first, then none; or none, then all of them."""
    torch.set_num_threads(1)
    if name == "neutral first":
        want = everything()
        wrong = []
        for state, enter in STATES.items():
            with enter():
                got = everything(state != "threads")
            compared = want if state != "threads" else everything(exact=False)
            wrong += [f"{state}: {found}" for found in differences(got, compared)]
        return wrong
    if name == "fake tensors":
        wrong = fake_then_real()
        got, again = everything(), everything()
        return wrong + differences(got, again) + [n for n, p in got.items() if any(not real(t) for t in p.values())]
    with STATES[name]():
        first = everything(name != "threads")
    return differences(first, everything(name != "threads"))


def real(tensor):
    return type(tensor) is torch.Tensor and tensor.device.type == "cpu"


NAMES = [*STATES, "neutral first", "fake tensors"]


def main():
    import requanto  # noqa: F401  (imported once, before the children)

    for name in NAMES:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                answer = child(name)
            except BaseException:
                answer = [traceback.format_exc()[-1500:]]
            with os.fdopen(write, "w") as out:
                json.dump(answer, out)
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as answer:
            print(json.dumps([name, json.loads(answer.read() or '["the process ended"]')]))
        os.waitpid(pid, 0)


@pytest.fixture(scope="module")
def answers():
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith('["'))


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_those_of_a_neutral_process(name, answers):
    assert not answers[name], f"{len(answers[name])} differ: " + "\n".join(answers[name][:8])


if __name__ == "__main__":
    main()

"""humming's order of codes, and the choice between its kernels and the Triton ones. No GPU: humming's product is simulated.

With the wheel on the path, its own packing function runs on the CPU and is compared, and so are its scales and its configs.
"""

import importlib.util
import json
import logging
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import requanto
from requanto import QTensor, settings
from requanto.linear import prepack, registry
from requanto.linear.gpu import conditions as rules
from requanto.linear.gpu import humming, humming_times
from requanto.linear.gpu import layout as gpu_layout
from requanto.linear.gpu.humming_layout import LAYOUTS, ordered, zero_points
from requanto.linear.registry import choose, problem_of

HERE = Path(__file__).parent
WHEEL = importlib.util.find_spec("humming")
WEIGHTS = [
    ("int4", (192, 256), {"group_size": 64}),
    ("int4", (128, 256), {"group_size": 128, "symmetric": True}),
    ("int4", (64, 128), {"group_size": None, "symmetric": True}),
    ("int4", (64, 128), {"group_size": 64, "zero_point": "integer"}),
    ("int4", (64, 256), {"group_size": 64, "scale_bits": 6}),
    ("int8", (64, 96), {}),
    ("float8", (128, 64), {}),
    ("float8_e5m2", (64, 64), {}),
    ("int2", (64, 128), {"group_size": 32}),
    ("uint8", (64, 128), {}),
    ("uint1", (64, 128), {"group_size": 32}),
]


def repacked(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """What `weight_repack_nk` writes for unsigned codes ``[N, K]`` and 16-bit activations, one word after the other."""
    n, k = codes.shape
    count, words = 32 // bits, []
    rows = codes.tolist()
    for tile in range(k // 16):
        for block in range(n // 64):
            for thread in range(32):
                held = [
                    rows[64 * block + 16 * i3 + 8 * i4 + thread // 4][16 * tile + 8 * i5 + thread % 4 * 2 + i6]
                    for i3 in range(4)
                    for i4 in range(2)
                    for i5 in range(2)
                    for i6 in range(2)
                ]
                for first in range(0, 32, count):
                    places = [held[first + i % (count // 2) * 2 + i // (count // 2)] for i in range(count)]
                    words.append(sum(code << (bits * i) for i, code in enumerate(places)))
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)


@pytest.mark.parametrize("dtype", LAYOUTS)
@pytest.mark.parametrize(("kind", "shape", "how"), WEIGHTS)
def test_the_order_is_hummings_and_reversible(kind, shape, how, dtype):
    weight = QTensor.quantize(torch.randn(shape).to(dtype), kind, **how)
    values, plain, codes = weight.dequantize(), weight.qdata.clone(), weight.codes()
    stored, size = {name: part.clone() for name, part in weight._storage.parts.items()}, weight.qdata.nbytes
    layout = LAYOUTS[dtype]
    weight.pack(layout)
    parts = weight._storage.parts
    layout.check(weight._spec, parts)
    assert (weight.layout_name, parts["qdata"].nbytes) == (layout.name, size)
    assert torch.equal(weight.dequantize(), values)
    assert torch.equal(weight.codes().view(torch.uint8), codes.view(torch.uint8))
    index = torch.tensor([5, 3, shape[0] - 1])
    assert torch.equal(layout.gather(weight._spec, parts, index).view(torch.uint8), codes[index].view(torch.uint8))
    unsigned = codes.view(torch.uint8).int()
    if kind == "int8":  # from -128 on; for bfloat16 sign and magnitude
        unsigned = torch.where(unsigned < 128, unsigned, 383 - unsigned) if dtype == torch.bfloat16 else unsigned ^ 128
    assert torch.equal(parts["qdata"].view(torch.int32).flatten(), repacked(unsigned, weight.qtype.bits))
    saved = nn.ParameterDict({"w": nn.Parameter(weight, requires_grad=False)}).state_dict()["w"]
    assert torch.equal(saved.qdata.view(torch.uint8), plain.view(torch.uint8))
    weight.unpack()
    assert {name: torch.equal(part, stored[name]) for name, part in weight._storage.parts.items()} == dict.fromkeys(
        stored, True
    )


@pytest.mark.skipif(WHEEL is None or not shutil.which("g++"), reason="needs humming's wheel and a C++ compiler")
@pytest.mark.parametrize(("kind", "bits", "dtype"), [("int2", 2, 0), ("int4", 4, 0), ("int8", 8, 0), ("int8", 8, 1)])
def test_hummings_own_function_gives_the_same_order(tmp_path, kind, bits, dtype):
    source = Path(WHEEL.submodule_search_locations[0]) / "include" / "humming" / "kernel" / "process.cuh"
    lines = [line for line in source.read_text().splitlines() if not line.startswith("#include <humming")]
    (tmp_path / "process.h").write_text("\n".join(lines))
    dtype = (torch.float16, torch.bfloat16)[dtype]
    own = [
        f"-DBITS={bits}",
        f"-DPREPROCESS={int(kind == 'int8' and dtype == torch.bfloat16)}",
        '-DHEADER="process.h"',
    ]
    program = tmp_path / "repack"
    command = ["g++", "-std=c++20", "-O1", "-w", *own, f"-I{tmp_path}", str(HERE / "repack.cpp"), "-o", str(program)]
    subprocess.run([*command, "-pthread"], check=True)
    weight = QTensor.quantize(torch.randn(192, 256).to(dtype), kind)
    plain = weight.qdata.view(torch.uint8) ^ (128 if kind == "int8" else 0)  # humming counts from the smallest code
    done = subprocess.run([program, "192", "256"], input=plain.numpy().tobytes(), stdout=subprocess.PIPE, check=True)
    weight.pack(LAYOUTS[dtype])
    assert done.stdout == weight._storage.parts["qdata"].numpy().tobytes()


@pytest.mark.skipif(WHEEL is None, reason="needs humming's wheel")
def test_hummings_own_scales_and_configs(tmp_path):
    code = (
        "import sys, torch\n"
        f"sys.path.insert(0, {str(HERE.parents[1] / 'benchmarks')!r})\n"
        "from humming_aot import pretended\n"
        f"with pretended(folder={str(tmp_path)!r}):\n"
        "    from humming.transform import transform_humming_weight_scale as theirs\n"
        "    from requanto.dtypes.qtypes import qtypes\n"
        "    from requanto.linear.gpu import humming\n"
        "    from requanto.linear.gpu.humming_layout import KINDS, ordered\n"
        "    for groups in (1, 3):\n"
        "        scale = torch.randn(192, groups).bfloat16()\n"
        "        for per_row in (False, True):\n"
        "            assert torch.equal(theirs(scale, per_row), ordered(scale, per_row=per_row))\n"
        "    for kind in KINDS:\n"
        "        for dtype in (torch.float16, torch.bfloat16):\n"
        "            for group in (0, 64):\n"
        "                for n, k in ((128, 128), (640, 1664), (4096, 14336)):\n"
        "                    found = humming.config_of(kind, group, kind.is_unsigned, dtype, n, k, 0)\n"
        "                    assert found.should_apply_bs_on_c == (group == 0)\n"
        "                    form = kind, group, kind.is_unsigned, dtype, n, k, 0\n"
        "                    assert all('block_shape' in humming._tile(form, m) for m in (1, 8, 9, 100, 10**6))\n"
        "print('same')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr[-3000:]


# ---------------------------------------------------------------------- the backend, with a simulated humming


def product(config, *, inputs, weight, weight_scale, zero_point, locks, tuning_config):
    """humming's product as its kernel computes it: ``scale * (code - zero)`` in x's dtype, summed in float32."""
    kind, group, affine, dtype, rows, length, _ = config
    assert (inputs.dtype, tuning_config) == (dtype, f"a tile for {len(inputs)}")
    assert (inputs.is_contiguous(), locks.dtype, tuple(locks.shape)) == (True, torch.int32, (2048,))
    assert (weight.dtype, tuple(weight.shape)) == (torch.int32, (length // 16, rows * kind.bits // 2))
    places = torch.empty(rows * length, dtype=torch.int64)
    numbers = torch.arange(rows * length).view(rows, length)
    for part in range(4):  # where each code is, from the packing of its number, a byte at a time
        one = repacked(numbers >> (8 * part) & 255, 8).view(torch.uint8)
        order = torch.tensor([0, 2, 1, 3])
        places = (places if part else 0) + (one.view(-1, 4)[:, order].flatten().long() << (8 * part))
    count = 32 // kind.bits
    words = weight.flatten().long() & 0xFFFFFFFF
    codes = torch.stack([(words >> (kind.bits * i)) & (2**kind.bits - 1) for i in range(count)], 1)
    half = torch.arange(count) // (count // 2) + torch.arange(count) % (count // 2) * 2
    straight = torch.empty_like(codes)
    straight[:, half] = codes
    plain = torch.empty(rows * length, dtype=torch.int64)
    plain[places] = straight.flatten()
    plain = plain.view(rows, length)
    if kind.is_floating_point:
        values = plain.to(torch.uint8).view(kind.dtype).to(dtype)
    elif kind.bits == 8 and not affine and dtype == torch.bfloat16:
        values = torch.where(plain < 128, plain, 127 - plain).to(dtype)
    else:
        values = (plain - (0 if affine else 2 ** (kind.bits - 1))).to(dtype)
    index = torch.arange(rows)

    def straightened(given, per_row):
        back = torch.empty_like(given)
        place = ordered(index.unsqueeze(1).float(), per_row=per_row)[0].long()
        back[:, place] = given
        return back.t().repeat_interleave(group or length, 1)

    if affine:
        values = values - straightened(zero_point, False)
    scales = straightened(weight_scale, not group)
    if group:
        return (inputs.float() @ (values * scales).float().t()).to(dtype)
    return ((inputs.float() @ values.float().t()) * scales[:, 0].float()).to(dtype)


@pytest.fixture
def simulated(monkeypatch, tmp_path):
    """Pretends that this machine has an NVIDIA GPU and humming, whose kernel forms it collects."""
    monkeypatch.setenv("REQUANTO_CACHE", str(tmp_path))
    forms = []
    monkeypatch.setattr(humming, "_on_nvidia", lambda device: True)
    monkeypatch.setattr(humming, "_index", lambda device: 0)
    monkeypatch.setattr(humming, "available", lambda: True)
    monkeypatch.setattr(humming, "_compile", forms.append)
    monkeypatch.setattr(humming, "_tile", lambda form, rows: f"a tile for {rows}")
    monkeypatch.setattr(humming, "config_of", lambda *form: form)
    monkeypatch.setattr(humming, "_failed", set())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A GPU")
    own = next(one for one in registry.implementations() if one.name == "humming")
    monkeypatch.setattr(
        registry, "_REGISTRY", [own, *registry.implementations()]
    )  # those for CPUs come first otherwise
    monkeypatch.setattr(rules, "capability", lambda kind: 90)
    monkeypatch.setitem(sys.modules, "humming", types.ModuleType("humming"))
    monkeypatch.setitem(sys.modules, "humming.forward", types.SimpleNamespace(humming_forward=product))
    yield forms
    settings.humming = None


def layer(kind="int4", rows=128, length=256, dtype=torch.float16, **how):
    torch.manual_seed(0)
    module = nn.Linear(length, rows, dtype=dtype)
    module.weight = nn.Parameter(QTensor.quantize(module.weight, kind, **how), requires_grad=False)
    return module


@pytest.mark.parametrize("dtype", LAYOUTS)
@pytest.mark.parametrize(
    ("kind", "how"),
    [("int4", {"group_size": 64}), ("int4", {"group_size": 128, "symmetric": True}), ("int8", {}), ("float8", {}),
     ("int2", {"group_size": 32, "zero_point": "integer"}), ("int4", {"group_size": None, "symmetric": True})],
)  # fmt: skip
def test_products(simulated, kind, how, dtype):
    settings.humming = True
    module = layer(kind, dtype=dtype, **how)
    exact = module.weight.dequantize().double()
    requanto.prepare(module, smallest=0)
    assert module.weight.layout_name == LAYOUTS[dtype].name
    assert len(simulated) == 1
    chosen = [choice.implementation for choice in requanto.explain(module, (1, 4096))]
    assert chosen == ["humming", "humming"]
    x = torch.randn(3, 5, 256).to(dtype)
    for _ in range(2):
        with torch.no_grad():
            found = module(x)
        expected = x.double() @ exact.t() + module.bias.double()
        error = (found.double() - expected).norm() / expected.norm()
        assert error < (8e-3 if dtype == torch.bfloat16 else 1e-3)
    with torch.no_grad():
        assert module(torch.randn(0, 256, dtype=dtype)).shape == (0, 128)
        module.weight._storage.parts["scale"].mul_(2)  # in place: what was made of it is made again
        if kind == "int8":
            twice = module(x).double() - module.bias.double()
            assert torch.allclose(twice, 2 * (found.double() - module.bias.double()), rtol=2e-2, atol=2e-2)


def test_other_products_of_a_packed_weight(simulated):
    settings.humming = True
    module = layer(group_size=64)
    exact = module.weight.dequantize().float()
    requanto.prepare(module, smallest=0)
    x = torch.randn(4, 256)
    assert (
        choose(replace(problem_of(module.weight, torch.float32, 4), device="cuda")).implementation.name == "reference"
    )
    assert torch.allclose(nn.functional.linear(x, module.weight), x @ exact.t(), atol=1e-3)
    x = torch.randn(4, 256, dtype=torch.float16, requires_grad=True)
    module(x).sum().backward()
    assert torch.allclose(x.grad, exact.half().sum(0).expand(4, -1), rtol=1e-2, atol=1e-2)
    saved = module.state_dict()["weight"].qdata
    requanto.unpack(module)
    assert torch.equal(saved, module.weight.qdata)


def test_nothing_is_asked_without_a_measurement(simulated, monkeypatch):
    weight = layer(group_size=64).weight
    monkeypatch.setattr(humming, "available", lambda: pytest.fail("imported"))
    assert settings.humming is None
    assert prepack.layout_for(weight, torch.float16) is not LAYOUTS[torch.float16]
    settings.humming = False
    assert humming.layout_for(weight, torch.float16, None) is None


def entry(*ratios):
    return {"rows": {str(4**i): [10.0, 10.0 * ratio] for i, ratio in enumerate(ratios)}}


def test_a_measurement_decides(simulated):
    weight = layer(group_size=64).weight
    own = humming_times.key("A GPU", weight.qtype, 64, True, torch.float16, 128, 256)
    assert own == "A GPU/qint4/64/affine/float16/128x256"
    for ratios, faster in (((0.8, 1.0), True), ((0.8, 1.2), False), ((0.95, 1.0), False), ((), False)):
        path = humming_times.store({own: entry(*ratios)})
        assert (humming.layout_for(weight, torch.float16, None) is not None) is faster
    assert humming.layout_for(weight, torch.bfloat16, None) is None  # another entry
    humming_times.store({own: entry(0.5), "another": entry(1.0)})
    assert set(json.loads(path.read_text())["entries"]) == {own, "another"}
    settings.humming = False
    assert humming.layout_for(weight, torch.float16, None) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"entries": {"a": {"rows": {"1": [0, 1]}}}}', '{"entries": {"a": 3}}'])
def test_a_damaged_table_is_named_once(simulated, tmp_path, caplog, text):
    (tmp_path / "humming.json").write_text(text)
    humming_times._measured.cache_clear()
    weight = layer(group_size=64).weight
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert humming.layout_for(weight, torch.float16, None) is None
    assert [str(tmp_path / "humming.json") in record.message for record in caplog.records] == [True]
    humming_times._measured.cache_clear()


def test_what_it_cannot_run_is_logged_and_run_by_others(simulated, monkeypatch, caplog):
    settings.humming = True
    monkeypatch.setattr(gpu_layout, "fits", lambda weight, activation=None: True)
    weight = nn.Parameter(
        QTensor.quantize((torch.rand(128, 256) + 50).half(), "int4", group_size=64), requires_grad=False
    )
    with caplog.at_level(logging.WARNING):
        requanto.prepare(nn.ParameterDict({"w": weight}), smallest=0)
    assert (weight.layout_name, simulated) == ("exec", [])
    assert "zero points would be rounded" in caplog.text

    def broken(form):
        raise RuntimeError("No CUDA 12 nvcc found\nand more")

    monkeypatch.setattr(humming, "_compile", broken)
    caplog.clear()
    first, second = layer(group_size=64), layer(group_size=64)
    with caplog.at_level(logging.WARNING):
        requanto.prepare(nn.ModuleList([first, second]), smallest=0)
    assert {first.weight.layout_name, second.weight.layout_name} == {"exec"}
    assert [record.message.count("No CUDA 12 nvcc found") for record in caplog.records] == [1]


def test_what_it_serves(simulated):
    def served(*arguments, dtype=torch.float16, **how):
        return humming.serves(QTensor.quantize(torch.randn(128, 256).half(), *arguments, **how), dtype)

    assert served("int4", group_size=64)
    assert served("int4", group_size=64, dtype=torch.bfloat16)
    assert not served("int4", group_size=64, dtype=torch.float32)
    assert not served("nf4")
    assert not served("int3")
    assert not served("int4", group_size=16)
    assert not humming.serves(QTensor.quantize(torch.randn(96, 256).half(), "int4"), torch.float16)
    assert not humming.serves(QTensor.quantize(torch.randn(128, 192).half(), "int4", group_size=64), torch.float16)


def test_zero_points():
    scale, shift = torch.tensor([2.0, 0.0, 0.0]), torch.tensor([3.0, 0.0, 1.0])
    assert zero_points(scale, shift).tolist() == [1.5, 0.0, float("inf")]

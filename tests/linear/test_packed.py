"""The packed layout: in place of the stored one, and gone without a trace as soon as that is asked for."""

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F

from requanto import QTensor, qint8
from requanto.linear.cpu import library
from requanto.linear.prepack import SMALLEST_ON_CPU, expected_layout, prepare
from requanto.runtime import buffers
from requanto.runtime.settings import settings

KINDS = ["int8", "int4", "int2", "int3", "uint7", "nf4", "float8", "nvfp4"]
pytestmark = pytest.mark.skipif(library.find() is None, reason="the CPU kernels are not available here")


@pytest.fixture(params=KINDS)
def packed(request, layer):
    """A packed layer, and its stored codes."""
    module = layer(request.param)
    stored = module.weight.qdata.clone()
    prepare(module, smallest=0)
    assert module.weight.layout_name == "strips"
    return module, stored


def same(codes, others):
    """Bit for bit; torch compares no float8."""
    return torch.equal(codes.view(torch.uint8), others.view(torch.uint8))


def test_the_packed_codes_replace_the_stored_ones(packed):
    module, stored = packed
    parts = module.weight._storage.parts
    assert parts["qdata"].nbytes == stored.nbytes  # whole strips and units
    assert module.weight.nbytes == sum(part.nbytes for part in parts.values())
    assert all(type(part) is torch.Tensor and part.layout is torch.strided for part in parts.values())


@pytest.mark.parametrize("kind", [*KINDS, "uint1", "int5", "int6", "fp6_e3m2", "codebook3", "mxfp8"])
@pytest.mark.parametrize("how", [{}, {"group_size": 16}, {"group_size": 32, "scale_bits": 6}])
def test_memory_after_a_run_is_that_of_the_stored_form(layer, kind, how):
    """With all that kernels made of the weight: 2 % more at most, and what a thread's buffers hold."""
    if how and kind in ("nvfp4", "mxfp8"):
        how = {}  # they have scales of their own
    module = layer(kind, 512, 768, **how)
    stored, codes = module.weight.nbytes, module.weight.qdata.clone()
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for rows in (1, 1, 5, 70):
            for activation in (None, qint8):
                module.weight.activation = activation
                with torch.no_grad():
                    module(torch.randn(rows, 768, dtype=dtype))
    storage = module.weight._storage
    assert module.weight.is_packed
    kept = [one for one in storage.derived.values() if hasattr(one, "nbytes")]
    assert sum(part.nbytes for part in storage.parts.values()) + sum(one.nbytes for one in kept) <= 1.02 * stored
    assert buffers.held_bytes() <= settings.workspace_bytes
    assert same(module.weight.qdata, codes)
    assert module.weight.nbytes == stored


@pytest.mark.parametrize(
    "read",
    [
        lambda m: m.weight.qdata,
        lambda m: m.weight.clone().qdata,
        lambda m: m.weight.detach().qdata,
        lambda m: copy.deepcopy(m).weight.qdata,
        lambda m: pickle.loads(pickle.dumps(m.weight)).qdata,
        lambda m: m.state_dict()["weight"].qdata,
        lambda m: m.weight.to(torch.float32).qdata,
        lambda m: m.to("cpu").weight.inner_tensors()["qdata"],
        lambda m: torch.cat([m.weight[:64].qdata, m.weight[64:].qdata]),
    ],
    ids=["qdata", "clone", "detach", "deepcopy", "pickle", "state_dict", "to", "inner_tensors", "slices"],
)
def test_the_stored_form_comes_back(packed, read):
    module, stored = packed
    assert same(read(module), stored)


def test_saving_and_loading(packed):
    module, stored = packed
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    assert same(torch.load(file)["weight"].qdata, stored)
    other = copy.deepcopy(module)
    other.weight.copy_(QTensor.quantize(torch.randn(128, 192).bfloat16(), module.weight.qtype))
    assert not same(other.weight.qdata, stored)
    other.load_state_dict(module.state_dict())
    assert same(other.weight.qdata, stored)


def test_dequantizing_is_that_of_the_stored_form(packed):
    module, _stored = packed
    plain = module.weight.clone()
    plain.unpack()
    assert torch.equal(module.weight.dequantize(), plain.dequantize())


def test_an_alias_shares_the_layout(packed):
    module, stored = packed
    alias = module.weight.detach()
    assert alias.layout_name == module.weight.layout_name != "plain"
    module.weight.unpack()
    assert alias.layout_name == module.weight.layout_name == "plain"
    assert same(alias.qdata, stored)


def test_layers_are_packed_at_first_use(layer, monkeypatch):
    module = layer("int8", 1024, 1024)
    x = torch.randn(2, 1024, dtype=torch.bfloat16)
    monkeypatch.setattr(settings, "pack_on_first_use", False)
    with torch.no_grad():
        module(x)
        assert not module.weight.is_packed
        monkeypatch.setattr(settings, "pack_on_first_use", True)
        module(x)
    assert module.weight.is_packed


@pytest.mark.parametrize(("kind", "activation"), [("int8", None), ("int8", qint8), ("int4", None), ("float8", None)])
def test_small_layers_stay_plain(layer, kind, activation):
    """What `explain` says comes true."""
    side = 32  # of an eighth of padding or less
    assert side**2 >= SMALLEST_ON_CPU
    for size in (2 * side, side, side // 2):
        module = layer(kind, size, size)
        module.weight.activation = activation
        said = expected_layout(module.weight, torch.bfloat16)
        with torch.no_grad():
            module(torch.randn(2, size, dtype=torch.bfloat16))
        assert module.weight.is_packed == (size >= side)
        assert expected_layout(module.weight, torch.bfloat16) == said


@pytest.mark.parametrize("kind", ["int8", "int4", "int3", "int2", "uint1", "nf4"])
@pytest.mark.parametrize(
    ("rows", "length", "packs"), [(16, 256, True), (17, 480, False), (65, 520, False), (143, 520, True)]
)
def test_no_more_than_an_eighth_is_padding(layer, kind, rows, length, packs):
    module = layer(kind, rows, length)
    stored = module.weight.qdata.clone()
    prepare(module, smallest=0)
    assert module.weight.is_packed == packs
    assert module.weight._storage.parts["qdata"].nbytes <= 1.13 * stored.nbytes
    assert same(module.weight.qdata, stored)


def test_a_weight_read_again_and_again_stays_packed(layer):
    module = layer("int8", 1024, 1024)
    x = torch.randn(2, 1024, dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(8):
            module(x)
            _ = module.weight.qdata
            assert module.weight.is_packed


def test_the_weight_of_an_embedding_is_packed_at_its_first_gemm(layer):
    """A table that is multiplied too; a CPU looks up rows of packed weights as fast."""
    module = layer("int8", 1024, 1024)
    rows = torch.tensor([3, 1, 3])
    want = module.weight.dequantize()[rows]
    assert torch.equal(F.embedding(rows, module.weight), want)
    assert not module.weight.is_packed
    with torch.no_grad():
        module(torch.randn(2, 1024, dtype=torch.bfloat16))
    assert module.weight.is_packed
    assert torch.equal(F.embedding(rows, module.weight), want)
    assert module.weight.is_packed


@pytest.mark.parametrize("kind", ["int8", "int4", "int3", "float8"])
def test_rows_of_a_packed_weight(kind, layer):
    module = layer(kind, 200, 192)
    want = module.weight.dequantize()
    prepare(module, smallest=0)
    before = module.weight.layout_name
    rows = torch.tensor([[3, 199], [63, 64]])
    assert torch.equal(F.embedding(rows, module.weight), want[rows])
    for index in (-1, 200):
        with pytest.raises(IndexError):
            F.embedding(torch.tensor([index]), module.weight)
    assert module.weight.layout_name == before


@pytest.mark.parametrize("kind", ["int8", "int4", "int2", "float8"])
@pytest.mark.parametrize("rows", [1, 40])
def test_threads_agree_with_one_thread(layer, kind, rows):
    reference = layer(kind, 1024, 1024)
    module = layer(kind, 1024, 1024)
    inputs = [torch.randn(rows, 1024, dtype=torch.bfloat16) for _ in range(8)]
    with torch.no_grad():
        want = [reference(x) for x in inputs]
        got: dict[tuple[int, int], torch.Tensor] = {}

        def work(thread: int) -> None:
            with torch.no_grad():
                for index, x in enumerate(inputs):
                    got[thread, index] = module(x)
                    if thread == 0 and index == 4:
                        _ = module.weight.qdata  # the stored form, asked for in between

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(got) == 32
    for (_, index), out in got.items():
        torch.testing.assert_close(out.float(), want[index].float(), rtol=2e-2, atol=2e-2)


def test_equal_and_copy(packed):
    module, _stored = packed
    other = QTensor.quantize(torch.randn(128, 192).bfloat16(), module.weight.qtype)
    assert torch.equal(module.weight, module.weight.clone())
    module.weight.copy_(other)
    assert same(module.weight.qdata, other.qdata)

"""torch.compile(fullgraph=True): no graph break, one graph for all layers of a shape, default and dynamic shapes."""

import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter

from requanto import QTensor

pytestmark = pytest.mark.usefixtures("exact")

KINDS = ["int2", "int4", "int8", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"]
KINDS += ["int3", "uint8", "nf4", "codebook4", "nvfp4", "mxfp8"]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """A layer as models have it: used many times, with other weights each time."""

    def __init__(self, kind: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)
        for layer in (self.up, self.down):
            layer.weight = nn.Parameter(QTensor.quantize(layer.weight, kind), requires_grad=False)

    def forward(self, x):
        return x + self.down(F.silu(self.up(x)))


def blocks(kind: str, count: int = 4) -> list[Block]:
    return [Block(kind, seed).requires_grad_(False).eval() for seed in range(count)]


@pytest.mark.parametrize("dynamic", [None, True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_all_layers_of_a_shape_share_one_graph(kind, dynamic):
    counter = CompileCounter()
    layers, x = blocks(kind), torch.randn(3, 64)
    compiled = [torch.compile(layer, backend=counter, fullgraph=True, dynamic=dynamic) for layer in layers]
    with torch.no_grad():
        for one, other in zip(compiled, layers, strict=True):
            torch.testing.assert_close(one(x), other(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", KINDS)
def test_rows_may_change_without_compiling_again(kind):
    counter = CompileCounter()
    layer = blocks(kind, 1)[0]
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (2, 3, 17, 64, 301):
            x = torch.randn(rows, 64)
            torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", KINDS)
def test_default_shapes_turn_dynamic_once(kind):
    counter = CompileCounter()
    layer = blocks(kind, 1)[0]
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    with torch.no_grad():
        for rows in (4, 5, 6, 7, 50):
            x = torch.randn(rows, 64)
            torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count == 2  # the first shape, then one graph for all


@pytest.mark.parametrize("kind", KINDS)
def test_through_aot_autograd(kind):
    """Tracing down to aten, where a tensor subclass that is not understood would break."""
    layer, x = blocks(kind, 1)[0], torch.randn(3, 64)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(mine).square().sum().backward()
    layer(theirs).square().sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int4", "int8", "float8_e4m3fn"])
def test_with_inductor(kind):
    layer = blocks(kind, 1)[0]
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (3, 9):
            x = torch.randn(rows, 64)
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_of_layers_and_experts_in_one_graph(kind):
    experts = QTensor.quantize(torch.randn(3, 8, 64), kind)
    table = QTensor.quantize(torch.randn(9, 64), kind)
    layers = nn.Sequential(*blocks(kind, 3))

    def forward(ids, ends):
        x = layers(F.embedding(ids, table))
        return F.grouped_mm(x, experts.transpose(1, 2), offs=ends)

    counter = CompileCounter()
    compiled = torch.compile(forward, backend=counter, fullgraph=True)
    arguments = torch.tensor([1, 8, 8, 0]), torch.tensor([1, 1, 4], dtype=torch.int32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments), forward(*arguments))
    assert counter.frame_count == 1


def test_compiling_warns_of_nothing(caplog):
    """torch warns of a subclass without _stable_hash_for_caching: its graphs would not be cached between processes."""
    layer = blocks("int4", 1)[0]
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.WARNING), torch.no_grad():
        warnings.simplefilter("always")
        torch.compile(layer, backend="aot_eager", fullgraph=True)(torch.randn(3, 64))
        torch.compile(layer, backend="inductor", fullgraph=True)(torch.randn(3, 64))
    ours = [str(w.message) for w in caught] + [record.getMessage() for record in caplog.records]
    assert not [text for text in ours if "QTensor" in text or "_stable_hash_for_caching" in text]


def test_the_hash_for_caching_tells_what_a_graph_depends_on():
    def made(kind="int4", shape=(8, 64), seed=0, **options):
        return QTensor.quantize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), kind, **options)

    same = made()._stable_hash_for_caching()
    assert same == made(seed=1)._stable_hash_for_caching()  # weights are inputs of the graph
    assert isinstance(same, str)
    others = [
        made("int2"),
        made(shape=(8, 128)),
        made(group_size=32),
        made(symmetric=True),
        made().bfloat16(),
        made().t(),
    ]
    found = [other._stable_hash_for_caching() for other in others]
    assert len({same, *found}) == len(others) + 1

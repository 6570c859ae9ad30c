"""bfloat16 weights written in oneDNN's own order, and the buffers that a thread keeps for them."""

import threading

import pytest
import torch

from requanto.linear.cpu import onednn_bf16
from requanto.runtime import buffers
from requanto.runtime.settings import settings

known = pytest.mark.skipif(not onednn_bf16.works(), reason="oneDNN's order of bfloat16 weights is another one here")


def written(rows: int, length: int) -> tuple[onednn_bf16.BlockedWeight, torch.Tensor]:
    weight = torch.randn(rows, length).bfloat16()
    buffer = onednn_bf16.blocked(rows, length)
    pairs = weight.view(rows // 64, 64, length // 2, 2).transpose(1, 2).contiguous()
    buffer.words.copy_(pairs.view(torch.int32).squeeze(-1))
    return buffer, weight


@known
@pytest.mark.parametrize("rows", [1, 2, 17, 130])
@pytest.mark.parametrize(("out_features", "in_features"), [(64, 64), (192, 320), (1024, 128), (64, 4096)])
def test_product(rows, out_features, in_features):
    buffer, weight = written(out_features, in_features)
    x = torch.randn(rows, in_features).bfloat16()
    want = x.double() @ weight.double().t()
    for _ in range(2):  # nothing of the first product is kept
        assert (buffer.matmul(x).double() - want).norm() <= 5e-3 * want.norm()
        buffer, weight = written(out_features, in_features)
        want = x.double() @ weight.double().t()


@known
def test_unaligned_x():
    buffer, weight = written(128, 64)
    x = torch.randn(5 * 64 + 1).bfloat16()[1:].view(5, 64)
    want = x.double() @ weight.double().t()
    assert (buffer.matmul(x).double() - want).norm() <= 5e-3 * want.norm()


@known
def test_each_thread_has_its_own():
    own = onednn_bf16.blocked(64, 64)
    found = []
    thread = threading.Thread(target=lambda: found.append(onednn_bf16.blocked(64, 64)))
    thread.start()
    thread.join()
    assert found[0] is not own
    assert found[0].words.data_ptr() != own.words.data_ptr()


@known
def test_buffers_keep_to_the_bound(monkeypatch):
    buffers.release()
    monkeypatch.setattr(settings, "workspace_bytes", 4 * 64 * 64 * 2)
    first = onednn_bf16.blocked(64, 64)
    assert onednn_bf16.blocked(64, 64) is first
    onednn_bf16.blocked(128, 64)  # takes half of the bound alone
    assert buffers.held_bytes() == 128 * 64 * 2
    assert onednn_bf16.blocked(64, 64) is not first
    onednn_bf16.blocked(256, 64)  # more than the bound: kept, alone
    assert buffers.held_bytes() == 256 * 64 * 2
    buffers.release()
    assert buffers.held_bytes() == 0


@known
def test_the_caller_s_random_numbers_are_left_alone():
    buffers.release()
    torch.manual_seed(3)
    want = torch.randn(4)
    torch.manual_seed(3)
    onednn_bf16.blocked(64, 64)
    assert torch.equal(torch.randn(4), want)


@known
@pytest.mark.parametrize(("rows", "length"), [(64, 48), (64, 70)])
def test_other_orders_are_refused(rows, length):
    assert not onednn_bf16.fits(rows, length)
    with pytest.raises(RuntimeError, match=r"bytes, expected"):
        onednn_bf16.BlockedWeight(rows, length)


@known
@pytest.mark.parametrize("rows", [65, 96, 127, 1000])
def test_a_last_block_that_is_filled_up(rows):
    buffer = onednn_bf16.BlockedWeight(rows, 192)
    blocks = onednn_bf16.padded(rows) // 64
    assert buffer.words.shape == (blocks, 96, 64)
    weight = torch.randn(64 * blocks, 192).bfloat16()  # what stands beyond the rows is not read
    buffer.words.copy_(weight.view(blocks, 64, 96, 2).transpose(1, 2).contiguous().view(torch.int32).squeeze(-1))
    x = torch.randn(7, 192).bfloat16()
    torch.testing.assert_close(buffer.matmul(x), x @ weight[:rows].t())


def test_parts():
    assert onednn_bf16.first_rows(640, 640) == [0]
    assert onednn_bf16.first_rows(640, 256) == [0, 256, 384]
    for rows, length, wanted in (
        (14336, 4096, 1024),  # 8 MB
        (1024, 4096, 1024),
        (11008, 4096, 1024),  # ten parts and three quarters
        (1536, 4096, 768),  # two even parts
        (192, 576, 192),
        (64, 2**20, 64),
    ):
        assert onednn_bf16.rows_at_once(rows, length) == wanted


@known
def test_the_layers_of_a_model_share_buffers():
    """Making one takes as long as the product it serves: a model must not make them again and again."""
    buffers.release()
    made = set()
    for out_features, in_features in ((4096, 4096), (1024, 4096), (11008, 4096), (32000, 4096), (4096, 11008)):
        rows = onednn_bf16.rows_at_once(out_features, in_features)
        made.add(onednn_bf16.blocked(rows, in_features).words.data_ptr())
    assert len(made) == 2
    rows = onednn_bf16.rows_at_once(4096, 4096)
    assert onednn_bf16.blocked(rows, 4096).words.data_ptr() in made
    buffers.release()


def test_an_unknown_order_is_logged(monkeypatch, caplog):
    monkeypatch.setattr(onednn_bf16.BlockedWeight, "matmul", lambda self, x: x @ x.t())
    buffers.release()
    onednn_bf16.works.cache_clear()
    try:
        with caplog.at_level("INFO", logger="requanto.linear.cpu.onednn_bf16"):
            assert not onednn_bf16.works()
        assert "not written in oneDNN's layout on this machine" in caplog.text
    finally:
        onednn_bf16.works.cache_clear()
        buffers.release()

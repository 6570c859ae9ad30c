"""Which tile is chosen, and the user's table on disk."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from requanto_kernels import Config, config, tune, wq_gemm


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REQUANTO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(config, "_user", None)


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942", "xpu"])
@pytest.mark.parametrize("op", ["wq_gemm", "wq_gemm_dx", "scaled_mm", "w4a8_gemm"])
def test_every_device_is_served(arch, op):
    for bits in range(1, 9):
        for m in (1, 16, 17, 4096, 10**6):
            assert isinstance(config.select(arch, op, bits, 128, m, 4096, 4096, "bfloat16"), Config)


def test_user_entries_come_first():
    name = config.key("sm_90", "wq_gemm", 4, 128, 7, 4096, 4096)
    mine = replace(Config(), block_n=32)
    path = config.store({name: mine})
    assert json.loads(path.read_text())["entries"][name]["block_n"] == 32
    assert config.select("sm_90", "wq_gemm", 4, 128, 16, 4096, 4096, "bfloat16") == mine
    assert config.select("sm_90", "wq_gemm", 4, 128, 17, 4096, 4096, "bfloat16") != mine
    config.store({"other": mine})
    assert set(config.user_entries()) == {name, "other"}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_broken_table_is_named():
    config.cache_path().parent.mkdir(parents=True)
    config.cache_path().write_text("{")
    with pytest.raises(ValueError, match=r"kernels\.json"):
        config.user_entries()


def test_split_fills_the_device_but_not_more():
    assert config.split_for(Config(16, 64, 128), 1, 4096, 4096, 132) == 4
    assert config.split_for(Config(16, 64, 128), 1, 28672, 8192, 132) == 1
    assert config.split_for(Config(16, 64, 128), 1, 64, 128, 132) == 1
    assert config.split_for(Config(split_k=3), 1, 4096, 4096, 132) == 3


def test_without_a_device():
    with pytest.raises(ValueError, match=r"x\.device: found cpu"):
        wq_gemm(torch.ones(1, 8), torch.zeros(2, 4, dtype=torch.uint8), torch.ones(2, 1), bits=4)
    with pytest.raises(ValueError, match="op: found 'gemm'"):
        tune([(8, 8)], op="gemm")

"""What tuning launches, under which name it is stored, and how it searches; in Triton's interpreter, without a clock."""

import importlib

import pytest
import torch

from requanto_kernels import Config, config

tune = importlib.import_module("requanto_kernels.tune")  # the package's `tune` is the function
HALF = torch.float16
PROBLEMS = [
    tune.Problem("wq_gemm", 4, 16, 512, group=64, affine=True, scale_dtype=HALF, dtype=HALF),
    tune.Problem("wq_gemm", 4, 16, 512, group=128, scale_dtype=HALF, layout="plain", dtype=HALF),
    tune.Problem("wq_gemm", 4, 16, 512, dtype=HALF),
    tune.Problem("wq_gemm", 3, 16, 512, group=256, affine=True, dtype=HALF),
    tune.Problem("wq_gemm", 5, 16, 512, group=32, affine=True, dtype=HALF),
    tune.Problem("wq_gemm", 4, 16, 512, kind="table", group=64, scale_dtype=HALF, dtype=HALF),
    tune.Problem("wq_gemm", 4, 16, 512, kind="e2m1", group=32, dtype=HALF),
    tune.Problem("wq_gemm", 8, 16, 512, dtype=HALF),
    tune.Problem("wq_gemm", 8, 16, 512, kind="u8", group=64, affine=True, dtype=HALF),
    tune.Problem("wq_gemm", 8, 16, 512, kind="e4m3fn", dtype=HALF),
    tune.Problem("scaled_mm", 8, 16, 512),
    tune.Problem("scaled_mm", 8, 16, 512, kind="e4m3fn"),
    tune.Problem("w4a8_gemm", 2, 16, 512, group=256, scale_dtype=HALF),
    tune.Problem("w4a8_gemm", 4, 16, 512, group=128, affine=True, scale_dtype=HALF),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_a_layer_finds_what_was_tuned_for_it(problem, tmp_path, monkeypatch):
    monkeypatch.setenv("REQUANTO_CACHE", str(tmp_path))
    launch, copies, form = tune._launcher(problem, 3, torch.device("cpu"))
    shipped = config.family("interpreter", problem.op, problem.bits, 3, "float16")
    assert [launch(shipped, i).shape for i in (0, copies - 1)] == [(3, 16)] * 2
    x_dtype = tune._x_dtype(problem)
    name = config.key("interpreter", problem.op, problem.bits, problem.group, 3, 16, 512, x_dtype, form)
    config.store({name: Config(16, 32, 128, num_stages=1)})

    def family(*what):
        raise AssertionError("the tuned entry was not found")

    monkeypatch.setattr(config, "family", family)
    assert launch(None, 0).shape == (3, 16)
    assert tune.candidates(problem, 3, "sm_90")


def test_codes_of_8_bits_have_entries_of_their_own():
    assert [tune._x_dtype(problem) for problem in PROBLEMS[10:]] == ["int8", "float8", "int8", "int8"]


def test_the_search_for_the_fastest_tile():
    problem = tune.Problem("wq_gemm", 4, 4096, 4096, group=128)
    tiles = tune.candidates(problem, 16, "sm_90")
    assert 2 <= len(tiles) <= 10
    assert all(config.block_m <= 32 for config in tiles)
    asked, best_tile = [], tiles[1]

    def clock(config):  # the second tile, deeper and split in 4, is the fastest; the first does not run
        assert config not in asked
        asked.append(config)
        if config == tiles[0]:
            return None
        same = (config.block_m, config.block_n, config.block_k, config.num_warps) == (
            best_tile.block_m,
            best_tile.block_n,
            best_tile.block_k,
            best_tile.num_warps,
        )
        return 10 - 3 * same - (config.num_stages == best_tile.num_stages + 1) - (config.split_k == 4)

    ms, best = tune._best(tiles, problem, 16, clock)
    assert (best.split_k, best.num_stages) == (4, best_tile.num_stages + 1)
    assert ms == 5
    assert len(asked) < 70
    assert tune._best(tiles, problem, 16, lambda config: None) is None


def test_neighbours_change_no_result():
    whole = Config(128, 256, 128, num_warps=8, persistent=True, shrink=True, exact_every=64, left=False)
    found = tune.neighbours(whole, tune.Problem("scaled_mm", 8, 4096, 4096, kind="e4m3fn"), 4096)
    assert {config.exact_every for config in found} == {64}
    assert {config.per_processor for config in found} == {1, 2}
    assert {config.split_k for config in found} == {0}
    few = tune.neighbours(Config(), tune.Problem("w4a8_gemm", 4, 4096, 4096, group=128), 16)
    assert {config.split_k for config in few} == {0, 1, 2, 4, 8, 16}
    assert all(not config.shrink for config in found if (config.block_m, config.block_n) != (128, 256))
    table = tune.neighbours(Config(64, 64, 128, fields=True), tune.Problem("wq_gemm", 4, 64, 512, kind="table"), 64)
    assert all(config.block_m <= 32 or not config.fields for config in table)

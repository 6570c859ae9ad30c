"""Which tile is chosen, and the user's table on disk."""

import json
import logging
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from requanto_kernels import Config, _table, config, tune, wq_gemm


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REQUANTO_CACHE", str(tmp_path / "cache"))
    caches = (config.families, config._shipped, config._family_rows, config.nearest_arch, config._user, config._select)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def select(arch="sm_90", op="wq_gemm", bits=4, m=16):
    return config.select(arch, op, bits, 128, m, 4096, 4096, "bfloat16")


@pytest.mark.parametrize(
    "arch", ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121", "gfx942", "gfx1250", "xpu"]
)
@pytest.mark.parametrize("op", ["wq_gemm", "wq_gemm_dx", "scaled_mm", "w4a8_gemm"])
def test_every_device_is_served(arch, op):
    for bits in range(1, 9):
        for m in (1, 16, 17, 4096, 10**6):
            assert isinstance(config.select(arch, op, bits, 128, m, 4096, 4096, "bfloat16"), Config)


def test_user_entries_come_first():
    name = config.key("sm_90", "wq_gemm", 4, 128, 7, 4096, 4096, "bfloat16", "int/affine/bfloat16/exec")
    mine = replace(Config(), block_n=32)
    path = config.store({name: mine}, {name: {"gpu": "A GPU", "us": 1.5}})
    entry = json.loads(path.read_text())["entries"][_table.prefix() + name]
    assert (entry["config"]["block_n"], entry["gpu"], entry["us"]) == (32, "A GPU", 1.5)
    assert entry["triton"].startswith(_table.prefix().split()[1][:-1])
    assert entry["requanto"]
    asked = ("sm_90", "wq_gemm", 4, 128, 16, 4096, 4096, "bfloat16", "int/affine/bfloat16/exec")
    assert config.select(*asked) == mine
    for place, other in (
        (3, 64),
        (4, 17),
        (7, "float16"),
        (8, "int/affine/float32/exec"),
        (8, "int/affine/bfloat16/plain"),
    ):
        assert config.select(*asked[:place], other, *asked[place + 1 :]) != mine
    config.store({"other": mine})
    assert set(config.user_entries()) == {name, "other"}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def damaged(entry):
    return f'{{"format": 2, "entries": {{"a": {{"config": {entry}}}}}}}'


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", "{}", '{"format": 2, "entries": []}', '{"format": 2, "entries": {"a": 3}}', damaged('{"block_o": 16}'),
        damaged('{"block_n": "64"}'), damaged('{"block_n": 48}'), damaged('{"block_k": 0}'), damaged('{"left": 1}'),
        damaged('{"num_warps": 3}'), damaged('{"num_stages": -1}'), damaged('{"num_warps": true}'), "\x00" * 9,
        "[" * 100_000, '{"entries": {}}', '{"format": 3, "entries": {}}', None,
    ],
)  # fmt: skip
def test_a_damaged_table_of_the_user(text, caplog):
    """It is named in one line, what ships serves, and tuning raises instead of replacing it."""
    shipped = select()
    config.forget()
    path = config.cache_path()
    path.mkdir(parents=True) if text is None else path.parent.mkdir(parents=True)
    if text is not None:
        path.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert [select(m=m) for m in (16, 16, 1)][:2] == [shipped] * 2
        assert config.user_entries() == {}
    (record,) = caplog.records
    assert str(path) in record.message
    assert "requanto tune" in record.message
    for call in (config.check_user_table, lambda: config.store({"new": Config()})):
        with pytest.raises(ValueError, match=r"kernels\.json.*Delete it"):
            call()
    assert text is None or path.read_text() == text


def test_entries_of_another_version_of_triton(monkeypatch, caplog):
    name = config.key("sm_90", "wq_gemm", 4, 128, 16, 4096, 4096, "bfloat16")
    mine = replace(Config(), block_n=32)
    shipped = select()
    monkeypatch.setattr(_table.triton, "__version__", "3.5.1")
    path = config.store({name: mine})
    assert select() == mine
    monkeypatch.undo()
    monkeypatch.setenv("REQUANTO_CACHE", str(path.parent))
    config.forget()
    with caplog.at_level(logging.WARNING):
        assert [select(m=m) for m in (16, 15)] == [shipped] * 2
    (record,) = caplog.records
    for word in (str(path), "1 of 1 tuned tiles are of triton 3.5", _table.prefix()[:-1], "requanto tune"):
        assert word in record.message
    config.store({name: mine})  # both versions' entries stay
    assert select() == mine
    assert {entry.split("/")[0] for entry in json.loads(path.read_text())["entries"]} == {
        "triton 3.5",
        _table.prefix()[:-1],
    }


def test_tables_of_older_formats_and_newer_fields(caplog):
    path = config.cache_path()
    path.parent.mkdir(parents=True)
    path.write_text('{"format": 1, "entries": {"sm_90/wq_gemm/4/128/16/4096x4096": {"block_n": 32}}}')
    with caplog.at_level(logging.WARNING):
        assert config.user_entries() == {}
    assert "format 1, whose 1 tuned tiles" in caplog.text
    config.store({"new": Config()})
    assert list(config.user_entries()) == ["new"]
    text = json.loads(path.read_text())
    text["entries"]["triton 3.7/other"] = {"config": {"block_o": 1}, "requanto": "99.0"}
    path.write_text(json.dumps(text))
    config.forget()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert list(config.user_entries()) == ["new"]
    assert "another version of requanto" in caplog.text


def test_tables_are_exported_and_imported(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no tuned tiles to export"):
        config.export_table(tmp_path / "h200.json")
    config.store({"a": Config(), "b": Config(block_n=32)}, {"a": {"us": 3.0}})
    assert config.export_table(tmp_path / "h200.json") == 2
    monkeypatch.setenv("REQUANTO_CACHE", str(tmp_path / "another"))
    config.store({"b": Config(), "c": Config()})
    assert config.import_table(tmp_path / "h200.json") == 2
    assert config.user_entries() == {"a": Config(), "b": Config(block_n=32), "c": Config()}
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json is no table"):
        config.import_table(tmp_path / "bad.json")
    # Shipped as it is, the file serves.
    (tmp_path / "tables").mkdir()
    monkeypatch.setattr(config, "TABLES", tmp_path / "tables")
    monkeypatch.setenv("REQUANTO_CACHE", str(tmp_path / "empty"))
    (tmp_path / "h200.json").rename(tmp_path / "tables" / "h200.json")
    assert config._shipped() == {"a": Config(), "b": Config(block_n=32)}


def test_no_home_directory(monkeypatch, caplog):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("REQUANTO_CACHE")
    monkeypatch.setattr(config.Path, "home", home)
    assert isinstance(select(), Config)
    assert "home directory" in caplog.text


@pytest.mark.parametrize("text", [None, "{", '{"families": [{"op": "wq_gemm", "config": {"block_m": 12}}]}'])
def test_the_shipped_families_are_missing_or_damaged(tmp_path, monkeypatch, caplog, text):
    monkeypatch.setattr(config, "TABLES", tmp_path)
    if text is not None:
        (tmp_path / "families.json").write_text(text)
    for op in ("wq_gemm", "wq_gemm_dx", "scaled_mm", "w4a8_gemm"):
        assert select("sm_120", op).block_m == 16
    lines = [record.message for record in caplog.records if "families.json" in record.message]
    assert len(lines) == 1
    assert "Install the package again" in lines[0]


def test_a_damaged_shipped_table_for_shapes(tmp_path, monkeypatch, caplog):
    mine = replace(Config(), block_n=32)
    name = _table.prefix() + config.key("sm_90", "wq_gemm", 4, 128, 16, 4096, 4096, "bfloat16")
    (tmp_path / "families.json").write_text((config.TABLES / "families.json").read_text())
    (tmp_path / "a100.json").write_text('{"entries": [')
    (tmp_path / "h200.json").write_text(json.dumps({"format": 2, "entries": {name: {"config": {"block_n": 32}}}}))
    monkeypatch.setattr(config, "TABLES", tmp_path)
    assert select() == mine
    assert [record.message for record in caplog.records if "a100.json" in record.message]
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("arch", "served"),
    [
        ("sm_103", "sm_100"),
        ("sm_121", "sm_120"),
        ("sm_86", "sm_80"),
        ("sm_130", "sm_120"),
        ("gfx1250", None),
        ("xpu", None),
    ],
)
def test_a_device_without_families_is_named_once(arch, served, caplog):
    found = [select(arch, op, bits, m) for op in ("wq_gemm", "scaled_mm") for bits in (4, 8) for m in (1, 500)]
    (record,) = caplog.records
    assert record.message.startswith(f"no tiles ship for {arch}: kernels use those of {served or 'any GPU'}.")
    if served:
        caplog.clear()
        assert found == [
            select(served, op, bits, m) for op in ("wq_gemm", "scaled_mm") for bits in (4, 8) for m in (1, 500)
        ]
        assert not caplog.records


def test_amd_gpus_of_one_generation_share_their_tiles(caplog):
    # gfx1250 is another generation than gfx1201, whatever its name begins with.
    assert [config.nearest_arch(arch) for arch in ("gfx1100", "gfx1151", "gfx1201")] == ["gfx110", "gfx115", "gfx120"]
    assert not caplog.records
    assert config.nearest_arch("gfx1250") == "gfx1250"


def test_selection_is_remembered_and_follows_the_table(tmp_path, monkeypatch):
    first = select()
    hits = config._select.cache_info().hits
    assert select() is first
    assert config._select.cache_info().hits == hits + 1
    mine = replace(Config(), block_n=32)
    config.store({config.key("sm_90", "wq_gemm", 4, 128, 16, 4096, 4096, "bfloat16"): mine})
    assert select() == mine != first
    monkeypatch.setenv("REQUANTO_CACHE", str(tmp_path / "other"))
    assert select() == first


@pytest.mark.parametrize(
    ("present", "served"),
    [("3.6.0", "3.6"), ("3.7.1", "3.7"), ("3.9.0+git1", "3.9"), ("3.10.0", "3.9"), ("4.0.0", "3.9"), ("3.5.1", "3.6")],
)
def test_families_of_a_version_of_triton(present, served, monkeypatch):
    rows = (
        {"op": "wq_gemm", "triton": ["3.6", "3.9"], "config": {"block_n": 32}},
        {"op": "wq_gemm", "config": {"block_n": 128}},
    )
    monkeypatch.setattr(config.triton, "__version__", present)
    monkeypatch.setattr(config, "families", lambda: rows)
    assert config.served_triton() == served
    assert config.family("sm_90", "wq_gemm", 4, 1, "bfloat16").block_n == (32 if served in ("3.6", "3.9") else 128)


def test_split_fills_the_device_but_not_more():
    one = Config(8, 128, 128)
    assert config.split_for(one, 1, 4096, 14336, 132) == 16  # 512 programs of 528 that fit at once
    assert config.split_for(one, 1, 4096, 4096, 132) == 8  # four steps each
    assert config.split_for(one, 1, 28672, 8192, 132) == 2
    assert config.split_for(one, 1, 128, 128, 132) == 1
    assert config.split_for(Config(64, 64, 128), 64, 4096, 4096, 132) == 2
    assert config.split_for(Config(split_k=3), 1, 4096, 4096, 132) == 3


def test_without_a_device():
    with pytest.raises(ValueError, match=r"x\.device: found cpu"):
        wq_gemm(torch.ones(1, 8), torch.zeros(2, 4, dtype=torch.uint8), torch.ones(2, 1), bits=4)
    with pytest.raises(ValueError, match="op: found 'gemm'"):
        tune([(8, 8)], op="gemm")

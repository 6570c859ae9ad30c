"""Selects the tile of a launch: a user's tuned entry, else a shipped one for the shape, else that of a shipped family.

Nothing here measures times; only `tune.py` does. Tables are JSON: `tables/families.json` has tiles per architecture, op and
number of rows; any other file in `tables/` has entries for exact shapes (`_table.py`). The user's entries are in the file
`cache_path()`.

A table that is damaged is named in one warning and not used, so that a model still runs; `store` refuses to replace one.
"""

import json
import logging
import os
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import triton

from . import _table
from ._device import capability

logger = logging.getLogger(__name__)

TABLES = Path(__file__).parent / "tables"
BUCKETS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 4096)


@dataclass(frozen=True)
class Config:
    """One tile. `left`: the weight is the left operand of the matrix instruction; `fields`: one dot per bit field
    of the words instead of one for the joined tile; `persistent`: the persistent kernel of `scaled_mm`, `per_processor`: its
    programs on each multiprocessor; `shrink`: smaller tiles while there are fewer than multiprocessors; `exact_every`: of
    float8, see `scaled_mm.py`."""

    block_m: int = 16
    block_n: int = 64
    block_k: int = 128
    split_k: int = 0  # 0: as far as fills the device
    num_warps: int = 4
    num_stages: int = 3
    group_m: int = 8
    left: bool = True
    fields: bool = False
    persistent: bool = False
    per_processor: int = 1
    shrink: bool = False
    exact_every: int = 0


def bucket(m: int) -> int:
    """M rounded up to a bucket, so that there is not one entry per M."""
    return next((b for b in BUCKETS if m <= b), BUCKETS[-1])


def key(arch: str, op: str, bits: int, group: int, m: int, n: int, k: int, dtype: str, form: str = "") -> str:
    """Name of a tuned entry: all that decides which program is launched, and the shape.

    dtype: of x, "int8" and "float8" for codes. form: `_check.Weight.form`, e.g. "int/affine/bfloat16/exec".
    """
    return "/".join([arch, op, f"{bits}", *([form] if form else []), f"{group}", dtype, f"{bucket(m)}", f"{n}x{k}"])


#: What reading a table may raise: the file, its text, its structure, the fields of an entry.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
#: Tiles that every GPU runs, slowly: used only where `families.json` cannot be read.
_WITHOUT_FAMILIES = tuple(
    {"op": op, "config": {"block_m": 16, "block_n": 32, "block_k": 64, "num_stages": 2}}
    for op in ("wq_gemm", "wq_gemm_dx", "scaled_mm", "w4a8_gemm")
)


@lru_cache(maxsize=1)
def families() -> tuple[dict, ...]:
    """The shipped families, in order of precedence."""
    path = TABLES / "families.json"
    try:
        rows = tuple(json.loads(path.read_text())["families"])
        for row in rows:
            _config(row["op"], row["config"])
    except _DAMAGE as error:
        logger.warning(
            "%s, the tiles of every GPU, is missing or damaged (%s: %s); kernels run with small tiles, slowly. Install "
            "the package again.", path, type(error).__name__, error
        )  # fmt: skip
        return _WITHOUT_FAMILIES
    return rows


@lru_cache(maxsize=1)
def _shipped() -> dict[str, Config]:
    entries: dict[str, Config] = {}
    for path in sorted(TABLES.glob("*.json")):
        if path.name == "families.json":
            continue
        try:
            entries |= _table.read(path, _config)
        except _DAMAGE as error:
            logger.warning(
                "%s, a table of tuned kernels, is damaged (%s: %s) and not used. Install the package again.",
                path, type(error).__name__, error
            )  # fmt: skip
    return entries


def _config(name: str, values: dict) -> Config:
    """The config of an entry. Raises a ValueError or TypeError that names what no kernel can be launched with."""
    config = Config(**values)
    for one in fields(Config):
        value = getattr(config, one.name)
        if type(value) is not type(one.default):
            raise ValueError(f"{name}: {one.name} is {value!r}, expected {type(one.default).__name__}")
        if isinstance(value, bool):
            continue
        sized = one.name.startswith("block_") or one.name == "num_warps"
        least = 0 if one.name in ("split_k", "exact_every") else 1
        if not least <= value <= 4096 or (sized and value & (value - 1)):
            raise ValueError(
                f"{name}: {one.name} is {value}, expected {'a power of two' if sized else least} up to 4096"
            )
    return config


def cache_path() -> Path:
    """The user's table: `$REQUANTO_CACHE` (a folder), else ~/.cache/requanto."""
    return _path_of(os.environ.get("REQUANTO_CACHE"))


def _path_of(root: str | None) -> Path:
    return (Path(root) if root else Path.home() / ".cache" / "requanto") / "kernels.json"


def user_entries() -> dict[str, Config]:
    """The user's table, read once per process and path; empty, after one warning, if the file is damaged."""
    return _user(os.environ.get("REQUANTO_CACHE"))


@lru_cache(maxsize=8)
def _user(root: str | None) -> dict[str, Config]:
    try:
        return _strict(_path_of(root))
    except (ValueError, RuntimeError) as error:  # RuntimeError: there is no home directory
        logger.warning("%s Until then the tiles that ship are used.", error)
        return {}


def _strict(path: Path) -> dict[str, Config]:
    try:
        return _table.read(path, _config)
    except FileNotFoundError:
        return {}
    except _DAMAGE as error:
        raise ValueError(
            f"{path} is no table of tuned kernels that can be read ({type(error).__name__}: {error}). Delete it, or repair "
            f"it, and run `requanto tune` again."
        ) from error


def check_user_table() -> None:
    """Raises a ValueError if the user's table is damaged: before a tuning whose result could not be stored."""
    _strict(cache_path())


def store(entries: dict[str, Config], about: dict[str, dict] | None = None) -> Path:
    """Merges entries into the user's table, which is replaced atomically; those of other versions of Triton stay.

    about: further facts of each entry, by its name: the GPU, microseconds.
    Raises a ValueError if the present table is damaged, since what it holds would be lost.
    """
    path = cache_path()
    _strict(path)
    _table.merge(path, _table.described(entries, about or {}))
    forget()
    return path


def export_table(path: Path | str) -> int:
    """Writes the user's table to a file, for another machine or to ship it in `tables/`; returns the number of entries."""
    _strict(cache_path())
    raw = _table.raw(cache_path())
    if not raw:
        raise ValueError(f"{cache_path()} has no tuned tiles to export; run `requanto tune MODEL` first")
    _table.write(Path(path), raw)
    return len(raw)


def import_table(path: Path | str) -> int:
    """Adds the entries of an exported table to the user's, which they replace; returns their number.

    Raises a ValueError if one of the two is damaged.
    """
    try:
        _table.read(Path(path), _config)
        raw = _table.raw(Path(path))
    except _DAMAGE as error:
        raise ValueError(f"{path} is no table of tuned kernels ({type(error).__name__}: {error})") from error
    _strict(cache_path())
    _table.merge(cache_path(), raw)
    forget()
    return len(raw)


#: How often `forget` was called: cached plans hold only as long as this stays the same.
changes = 0


def forget() -> None:
    """Drops what was read from the user's table and selected with it, as `store` does."""
    global changes
    changes += 1
    _user.cache_clear()
    _select.cache_clear()


def family_bits(bits: int) -> int:
    """The width whose families a width uses that has none of its own: one with as long a block."""
    return {1: 2, 5: 3, 6: 3, 7: 3}.get(bits, bits)


def family(arch: str, op: str, bits: int, m: int, dtype: str, group: int = 0) -> Config:
    """The config of the first shipped family that matches; a key that a family lacks matches every value."""
    for m_max, config in _family_rows(arch, op, family_bits(bits), dtype, group):
        if m_max is None or m <= m_max:
            return config
    raise LookupError(f"no family for {op} on {arch}")


@lru_cache(maxsize=256)
def _family_rows(arch: str, op: str, bits: int, dtype: str, group: int) -> tuple[tuple[int | None, Config], ...]:
    """(most rows of x, config) of the families for this device, op, width, dtype and group size, in order of precedence."""
    return tuple(
        (row.get("m_max"), Config(**row["config"]))
        for row in families()
        if row["op"] == op
        and ("arch" not in row or arch in row["arch"])
        and ("bits" not in row or bits in row["bits"])
        and ("dtype" not in row or dtype in row["dtype"])
        and ("group_max" not in row or 0 < group <= row["group_max"])
        and ("triton" not in row or served_triton() in row["triton"])
    )


#: Versions of Triton that every family is compiled with ahead of time. They allocate registers their own way, so what fits
#: one version may spill in another: a family's "triton" names the versions that it is for.
TRITONS = ("3.6", "3.7", "3.8", "3.9")


def served_triton() -> str:
    """The version whose families are used: the present one, else the nearest of `TRITONS` before it (or the first)."""
    present = tuple(int(part) for part in triton.__version__.split(".")[:2])
    older = [known for known in TRITONS if tuple(int(part) for part in known.split(".")) <= present]
    return older[-1] if older else TRITONS[0]


@lru_cache(maxsize=64)
def nearest_arch(arch: str) -> str:
    """The architecture whose families are used: the highest one with families that is not newer; of AMD's, one whose name
    begins the same, as `gfx110` for `gfx1100`.

    One without families of its own is named in one log line: it uses those for any device, as Intel's GPUs do.
    """
    named = {a for row in families() for a in row.get("arch", ())}
    known = sorted({a for a in named if a.startswith("sm_")}, key=capability)
    lower = [a for a in known if capability(a) <= capability(arch)]
    served = lower[-1] if lower and capability(arch) else arch
    if arch.startswith("gfx"):
        served = max((a for a in named if arch.startswith(a)), key=len, default=arch)
    if served not in named or (served != arch and capability(arch)):
        logger.warning(
            "no tiles ship for %s: kernels use those of %s. `requanto tune` finds the fastest for a model.",
            arch, served if served != arch else "any GPU",
        )  # fmt: skip
    return served


def select(arch: str, op: str, bits: int, group: int, m: int, n: int, k: int, dtype: str, form: str = "") -> Config:
    """The tile for a launch. Selected once for the same arguments and table: layers ask for the same ones again.

    dtype, form: see `key`.
    """
    return _select(os.environ.get("REQUANTO_CACHE"), arch, op, bits, group, m, n, k, dtype, form)


@lru_cache(maxsize=4096)
def _select(
    root: str | None, arch: str, op: str, bits: int, group: int, m: int, n: int, k: int, dtype: str, form: str
) -> Config:
    name = key(arch, op, bits, group, m, n, k, dtype, form)
    for table in (_user(root), _shipped()):
        if name in table:
            return table[name]
    return family(nearest_arch(arch), op, bits, m, dtype, group)


def split_for(config: Config, m: int, n: int, k: int, programs: int) -> int:
    """Number of programs that share one tile's K: enough to fill the device, each with 512 k or more.

    programs: multiprocessors. Their registers hold four programs of few rows (at most 128 registers a thread), two of up to
    32 rows. More programs than fit at once would begin when the others have ended.
    """
    if config.split_k:
        return config.split_k
    tiles = -(-m // config.block_m) * -(-n // config.block_n)
    at_once = 4 if config.block_m <= 8 else 2 if config.block_m <= 32 else 1
    return max(1, min(programs * at_once * 4 // config.num_warps // tiles, k // 512, 32))

"""Selects the tile of a launch: a user's tuned entry, else a shipped one for the shape, else that of a shipped family.

Nothing here measures times; only `tune.py` does. Tables are JSON: `tables/families.json` has tiles per architecture, op and
number of rows; any other file in `tables/` has entries for exact shapes. The user's entries are in the file `cache_path()`.
"""

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from ._device import capability

TABLES = Path(__file__).parent / "tables"
BUCKETS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 4096)


@dataclass(frozen=True)
class Config:
    """One tile. `left`: the weight is the left operand of the matrix instruction; `fields`: one dot per bit field
    of the words instead of one for the joined tile; `persistent`: the persistent kernel of `scaled_mm`."""

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


def bucket(m: int) -> int:
    """M rounded up to a bucket, so that there is not one entry per M."""
    return next((b for b in BUCKETS if m <= b), BUCKETS[-1])


def key(arch: str, op: str, bits: int, group: int, m: int, n: int, k: int) -> str:
    return f"{arch}/{op}/{bits}/{group}/{bucket(m)}/{n}x{k}"


@lru_cache(maxsize=1)
def families() -> tuple[dict, ...]:
    """The shipped families, in order of precedence."""
    return tuple(json.loads((TABLES / "families.json").read_text())["families"])


@lru_cache(maxsize=1)
def _shipped() -> dict[str, Config]:
    entries: dict[str, Config] = {}
    for path in sorted(TABLES.glob("*.json")):
        for name, values in json.loads(path.read_text()).get("entries", {}).items():
            entries[name] = Config(**values)
    return entries


def cache_path() -> Path:
    """The user's table: `$REQUANTO_CACHE` (a folder), else ~/.cache/requanto."""
    root = os.environ.get("REQUANTO_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "requanto") / "kernels.json"


_user: tuple[Path, dict[str, Config]] | None = None


def user_entries() -> dict[str, Config]:
    """The user's table, cached per process and path; an invalid file raises, so that tuning is not lost silently."""
    global _user
    path = cache_path()
    if _user is None or _user[0] != path:
        entries = {}
        if path.exists():
            try:
                entries = {name: Config(**v) for name, v in json.loads(path.read_text())["entries"].items()}
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}: not a table of tuned kernels ({error}); delete it or tune again") from error
        _user = (path, entries)
    return _user[1]


def store(entries: dict[str, Config]) -> Path:
    """Merges entries into the user's table, which is replaced atomically."""
    global _user
    path = cache_path()
    _user = None
    merged = {**user_entries(), **entries}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": 1, "entries": {name: asdict(c) for name, c in sorted(merged.items())}}, indent=1)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text + "\n")
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _user = None
    return path


def family_bits(bits: int) -> int:
    """The width whose families a width uses that has none of its own."""
    return {1: 2, 5: 4, 6: 4, 7: 4}.get(bits, bits)


def family(arch: str, op: str, bits: int, m: int, dtype: str) -> Config:
    """The config of the first shipped family that matches; a key that a family lacks matches every value."""
    bits = family_bits(bits)
    for row in families():
        if (
            row["op"] == op
            and ("arch" not in row or arch in row["arch"])
            and ("bits" not in row or bits in row["bits"])
            and ("dtype" not in row or dtype in row["dtype"])
            and m <= row.get("m_max", m)
        ):
            return Config(**row["config"])
    raise LookupError(f"no family for {op} on {arch}")


def nearest_arch(arch: str) -> str:
    """The architecture whose families are used: the highest one with families that is not newer."""
    known = sorted({a for row in families() for a in row.get("arch", ()) if a.startswith("sm_")}, key=capability)
    lower = [a for a in known if capability(a) <= capability(arch)]
    return lower[-1] if lower and capability(arch) else arch


def select(arch: str, op: str, bits: int, group: int, m: int, n: int, k: int, dtype: str) -> Config:
    name = key(arch, op, bits, group, m, n, k)
    if dtype != "float32":
        for table in (user_entries(), _shipped()):
            if name in table:
                return table[name]
    return family(nearest_arch(arch), op, bits, m, dtype)


def split_for(config: Config, m: int, n: int, k: int, programs: int) -> int:
    """Number of programs that share one tile's K: enough to fill the device once or twice, each with four steps or more."""
    if config.split_k:
        return config.split_k
    tiles = -(-m // config.block_m) * -(-n // config.block_n)
    steps = -(-k // config.block_k)
    split = 1
    while split < 16 and tiles * split < programs and steps >= split * 2 * 4:
        split *= 2
    return split

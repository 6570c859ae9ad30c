"""Mutations of config.json, the index of shards, and maps of types."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from fuzz_words import HOSTILE_NAMES, HOSTILE_VALUES, TYPES, WORDS, NotPossible


def index(directory: Path, rng: random.Random) -> str:
    """The index of shards: other files, paths out of the directory, values of other types."""
    files = sorted(directory.glob("*.index.json"))
    if not files:
        raise NotPossible
    content = json.loads(files[0].read_text())
    table = content["weight_map"]
    name = rng.choice(sorted(table))
    action = rng.choice(("delete", "shard", "path", "junk", "name", "file", "no map", "map", "exchange", "text"))
    if action == "delete":
        del table[name]
    elif action == "shard":
        table[name] = rng.choice(sorted(set(table.values())))
    elif action == "path":
        table[name] = rng.choice(
            ("../decoy/model.safetensors", "/etc/passwd", "..", ".", "/dev/zero", "a\0b", "config.json", "x" * 5000)
        )
    elif action == "junk":
        table[name] = rng.choice(HOSTILE_VALUES)
    elif action == "name":
        table[rng.choice(HOSTILE_NAMES)] = table[name]
    elif action == "file":
        gone = table[name]
        content["weight_map"] = {key: file for key, file in table.items() if file != gone}
    elif action == "no map":
        del content["weight_map"]
    elif action == "map":
        content["weight_map"] = rng.choice(HOSTILE_VALUES)
    elif action == "exchange":
        other = rng.choice(sorted(table))
        table[name], table[other] = table[other], table[name]
    if action == "text":
        _change_text(files[0], rng)
    else:
        files[0].write_text(json.dumps(content))
    return f"{action} {name[:60]}"


def _change_text(path: Path, rng: random.Random, start: int = 0, end: int | None = None) -> None:
    raw = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 2, 10))):
        raw[rng.randrange(start, end or len(raw))] = rng.choice((rng.randrange(256), rng.randrange(32, 127)))
    path.write_bytes(raw)


def _config(directory: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    path = directory / "config.json"
    content = json.loads(path.read_text())
    stored = content.get("quantization_config")
    if not isinstance(stored, dict):
        raise NotPossible
    return path, content, stored


def config_key(directory: Path, rng: random.Random) -> str:
    """A key of quantization_config deleted, added, or with a value of another kind."""
    path, content, stored = _config(directory)
    key = rng.choice(sorted(stored))
    action = rng.choice(("delete", "value", "value", "add", "rename"))
    value = rng.choice(HOSTILE_VALUES)
    if action == "delete":
        del stored[key]
    elif action == "value":
        stored[key] = value
    elif action == "add":
        known = (
            "lm_head",
            "modules",
            "scale_bits",
            "rotation",
            "low_rank",
            "method",
            "bits",
            "max_memory",
            "candidates",
        )
        key = rng.choice(
            (*known, "budget", "activation_modules", "weights_dtype", "digests", "unknown", rng.choice(HOSTILE_NAMES))
        )
        stored[key] = value
    else:
        stored[key + "x"] = stored.pop(key)
    path.write_text(json.dumps(content))
    return f"{action} {key[:50]}: {str(value)[:50]}"


def config_gone(directory: Path, rng: random.Random) -> str:
    """quantization_config missing or of another kind."""
    path, content, stored = _config(directory)
    action = rng.choice(("gone", "junk", "method", "null"))
    if action == "gone":
        del content["quantization_config"]
    elif action == "junk":
        content["quantization_config"] = rng.choice(HOSTILE_VALUES)
    elif action == "method":
        stored["quant_method"] = rng.choice(
            ("gptq", "awq", "bitsandbytes", "torchao", "", None, 3, "QUANTO", ["quanto"])
        )
    else:
        content["quantization_config"] = None
    path.write_text(json.dumps(content))
    return f"{action} {str(content.get('quantization_config'))[:50]}"


def config_text(directory: Path, rng: random.Random) -> str:
    """Bytes of the text of quantization_config changed."""
    path, content, _ = _config(directory)
    raw = path.read_bytes()
    start = raw.index(b'"quantization_config"')
    content.pop("quantization_config")
    end = raw.find(b"\n  }", start)  # the libraries indent by two; one line otherwise
    _change_text(path, rng, start, len(raw) if end < 0 else end)
    return "text"


def table(directory: Path, rng: random.Random) -> str:
    """A line of tensors, activation_modules or digests deleted, added, exchanged, renamed, edited."""
    path, content, stored = _config(directory)
    tables = [
        key for key in ("tensors", "activation_modules", "digests") if isinstance(stored.get(key), dict) and stored[key]
    ]
    if not tables:
        raise NotPossible
    which = rng.choice(tables)
    lines = stored[which]
    name = rng.choice(sorted(lines))
    action = rng.choice(
        ("delete", "all", "hostile", "add", "exchange", "junk", "word", "word", "word", "type", "shape", "drop")
    )
    if action == "delete":
        del lines[name]
    elif action == "all":
        lines.clear()
    elif action == "hostile":
        new = rng.choice(HOSTILE_NAMES)
        lines[rng.choice((new, f"{new}.weight", f"{name}{new}", f"{name.rpartition('.')[0]}.{new}"))] = lines.pop(name)
    elif action == "add":
        lines[rng.choice((*HOSTILE_NAMES, f"{name}x", "lm_head.weight"))] = lines[name]
    elif action == "exchange":
        other = rng.choice(sorted(lines))
        lines[name], lines[other] = lines[other], lines[name]
    elif action == "junk":
        lines[name] = rng.choice(HOSTILE_VALUES)
    else:
        lines[name] = _edited(str(lines[name]), action, rng)
    path.write_text(json.dumps(content))
    return f"{which} {action} {name[:60]}: {str(lines.get(name))[:60]}"


def _edited(line: str, action: str, rng: random.Random) -> str:
    words = line.split() or [""]
    if action == "word":
        words.insert(rng.randint(0, len(words)), rng.choice(WORDS))
        key = rng.choice(WORDS)
        at = [i for i, word in enumerate(words) if word.partition("=")[0] == key.partition("=")[0]]
        if at and rng.random() < 0.5:
            words[at[0]] = key
    elif action == "type":
        words[0] = rng.choice(TYPES)
    elif action == "shape" and len(words) > 1:
        sizes = words[1].split("x")
        sizes[rng.randrange(len(sizes))] = str(
            rng.choice((0, 1, 2, 32, 63, 128, -1, 2**31, 2**62, 10**30, "", "y", "0x8"))
        )
        words[1] = rng.choice(("x".join(sizes), "x".join(sizes[::-1]), f"{words[1]}x1", words[1].rpartition("x")[0]))
    elif len(words) > 1:
        del words[rng.randrange(len(words))]
    return " ".join(words)


def model_class(directory: Path, rng: random.Random) -> str:
    """Another class, or none, for the model."""
    path = directory / "config.json"
    content = json.loads(path.read_text())
    keys = [key for key in ("architectures", "_class_name", "model_type") if key in content]
    if not keys:
        raise NotPossible
    key = rng.choice(keys)
    names = (
        *("pipeline", "AutoModel", "LlamaModel", "LlamaConfig", "AutoTokenizer", "logging", "__name__", "UNet2DModel"),
        *("ModelMixin", "DiffusionPipeline", "os", "PreTrainedModel", "set_seed", "", None, 3, [], "../x", "x.y"),
    )
    value: Any = rng.choice(names)
    if key == "architectures" and rng.random() < 0.8:
        value = [value]
    content[key] = value
    if rng.random() < 0.2:
        del content[key]
    path.write_text(json.dumps(content))
    return f"{key}: {value}"


def quanto_map(directory: Path, rng: random.Random) -> str:
    """optimum-quanto's map, or that of `requanto.quantization_map`."""
    files = [directory / name for name in ("quanto_qmap.json", "map.json") if (directory / name).is_file()]
    if not files:
        raise NotPossible
    content = json.loads(files[0].read_text())
    name = rng.choice(sorted(content))
    action = rng.choice(("gone", "delete", "hostile", "type", "junk", "key", "all", "text"))
    if action == "gone":
        files[0].unlink()
        return "gone"
    if action == "text":
        _change_text(files[0], rng)
        return "text"
    if action == "delete":
        del content[name]
    elif action == "hostile":
        content[rng.choice(HOSTILE_NAMES)] = content.pop(name)
    elif action == "type":
        key = rng.choice(sorted(content[name]))
        content[name][key] = rng.choice((*HOSTILE_VALUES, *TYPES, "qint2", "qint8"))
    elif action == "junk":
        content[name] = rng.choice(HOSTILE_VALUES)
    elif action == "key":
        content[name].pop(rng.choice(sorted(content[name])))
    else:
        content = rng.choice(HOSTILE_VALUES)
    files[0].write_text(json.dumps(content))
    return f"{action} {name}: {str(content.get(name) if isinstance(content, dict) else content)[:60]}"

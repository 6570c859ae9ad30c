"""Conversion of whole checkpoints of other libraries for the command line: a model, a pipeline, a gguf file."""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from requanto.checkpoint.directory import check_target, replaced_directory
from requanto.checkpoint.foreign.directory import (
    EXTRA_FILES,
    ForeignDirectory,
    open_directory,
    open_gguf,
    write_converted,
)
from requanto.checkpoint.foreign.quanto_directory import convert_quanto_directory, is_quanto_directory
from requanto.checkpoint.foreign.translated import tell
from requanto.checkpoint.opening import is_ours, read_json, stored_config
from requanto.checkpoint.weight_files import model_files
from requanto.config.config import QuantoConfig
from requanto.report.companions import companions, save_with_companions
from requanto.report.convert import local_directory

logger = logging.getLogger(__name__)

#: files that say how another library quantized the weights; wrong beside the converted ones
_DESCRIPTIONS = frozenset({*EXTRA_FILES, "quantization_config.json"})
#: what a model may have beside its .gguf file
_BESIDE_GGUF = frozenset(
    {"generation_config.json", "chat_template.jinja", "preprocessor_config.json", "processor_config.json"}
)


@dataclass(frozen=True)
class ConvertedPart:
    """One model that was converted.

    Attributes:
        name: its folder in a pipeline; empty for a model alone.
        format: the format it had.
        quantized: weights whose codes were taken over.
        dequantized: weights that Requanto's format cannot hold, now floats.
    """

    name: str
    format: str
    quantized: int
    dequantized: int


@dataclass
class Conversion:
    """What `convert_checkpoint` did."""

    out: str
    parts: list[ConvertedPart] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def convert_checkpoint(source: str | Path, out: str | Path, *, progress: bool = False) -> Conversion:
    """Writes a checkpoint of another library in Requanto's format.

    A model needs neither its class nor its library: one weight is in memory at a time. Tokenizer and other companions are
    copied. Of a pipeline every quantized model is converted, everything else is copied.

    Args:
        source: a directory, a ``.gguf`` file, or a name on the hub.
        out: the directory to write; the files of an earlier save there are replaced when the new ones are complete.
        progress: show a progress bar.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is not quantized, or Requanto wrote it; ``out`` is its own directory.
        CheckpointError: it is damaged, or its format is not known.
    """
    started, out, pipeline = time.monotonic(), Path(out), False
    check_target(out)
    result = Conversion(str(out))
    if str(source).endswith(".gguf"):
        _convert_gguf(Path(source), out, result)
    elif Path(source).suffix == ".safetensors" and Path(source).is_file():
        raise ValueError(
            f"{source} is a single file, without the config.json that a directory of Requanto's format needs. Open it with "
            f"its class, as in FluxTransformer2DModel.from_single_file(...), and save it with save_pretrained"
        )
    else:
        directory = local_directory(source)
        if out.resolve() == directory.resolve():
            raise ValueError(f"OUT is the checkpoint's own directory {directory}; choose another one")
        pipeline = (directory / "model_index.json").is_file()
        result.bytes_before = _weight_bytes(directory, pipeline)  # before OUT is written, which may be inside
        if pipeline:
            _convert_pipeline(directory, out, result, progress)
        else:
            result.parts.append(_convert_model(directory, out, progress))
    result.bytes_after = _weight_bytes(out, pipeline)
    result.seconds = time.monotonic() - started
    return result


def _weight_bytes(directory: Path, pipeline: bool) -> int:
    return sum(path.stat().st_size for path in directory.glob("**/*.safetensors" if pipeline else "*.safetensors"))


class _Writer:
    """What `save_with_companions` takes for a model."""

    def __init__(self, foreign: ForeignDirectory, progress: bool) -> None:
        self.foreign, self.progress = foreign, progress

    def save_pretrained(self, target: Path) -> None:
        with tqdm(total=len(self.foreign.found.weights), unit="weight", disable=None if self.progress else True) as bar:
            write_converted(self.foreign, target, lambda done, count: bar.update())


def _convert_model(directory: Path, out: Path, progress: bool, name: str = "") -> ConvertedPart:
    if is_quanto_directory(directory):
        convert_quanto_directory(directory, out)
        count = len(read_json(out / "config.json")["quantization_config"]["tensors"])
        return ConvertedPart(name, "optimum-quanto", count, 0)
    foreign = open_directory(directory)
    if foreign is None:
        stored = stored_config(read_json(directory / "config.json"), directory)
        if is_ours(stored):
            raise ValueError(f"{directory} has Requanto's format already; there is nothing to convert")
        if not model_files(directory):
            found = ", ".join(sorted(path.name for path in directory.iterdir())[:8]) or "nothing"
            raise FileNotFoundError(
                f"{directory} holds no .safetensors file; found {found}. Pickles (.bin, .pt) are not opened, because they "
                f"may run code: load them with the library that saved them, and save them again in safetensors files"
            )
        raise ValueError(
            f"{directory} is not quantized: config.json has no quantization_config, and the tensors are those of no "
            f"format that Requanto knows. To quantize it: requanto quantize {directory} OUT"
        )
    tell(foreign.found, str(directory))
    save_with_companions(_Writer(foreign, progress), directory, out, _DESCRIPTIONS)
    found = foreign.found
    return ConvertedPart(name, found.format, len(found.weights), sum(bool(one.reason) for one in found.floats.values()))


def _convert_pipeline(directory: Path, out: Path, result: Conversion, progress: bool) -> None:
    folders = [path for path in sorted(directory.iterdir()) if path.is_dir()]
    quantized = [path for path in folders if (path / "config.json").is_file() and _is_foreign(path)]
    if not quantized:
        raise ValueError(
            f"none of the models in {directory} was quantized by another library; there is nothing to convert"
        )
    with replaced_directory(out) as scratch:
        for path in sorted(directory.iterdir()):
            if path in quantized:
                result.parts.append(_convert_model(path, scratch / path.name, progress, path.name))
            elif path.is_dir():
                shutil.copytree(path, scratch / path.name)
            else:
                shutil.copy2(path, scratch / path.name)


def _is_foreign(directory: Path) -> bool:
    return is_quanto_directory(directory) or open_directory(directory) is not None


def _convert_gguf(source: Path, out: Path, result: Conversion) -> None:
    if not source.is_file():
        raise FileNotFoundError(f"there is no file {source}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from requanto.integrations.gguf_reader import light_reader
    from requanto.tensor.qtensor import QTensor

    # A config of ours asks for packed weights, whatever requanto.settings.foreign says.
    options = {"gguf_file": source.name, "quantization_config": QuantoConfig()}
    model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.bfloat16, **options)
    count = sum(isinstance(parameter, QTensor) for parameter in model.parameters())
    with light_reader():
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)

    class _Saved:
        def save_pretrained(self, target: Path) -> None:
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)

    # The folder of a .gguf file may be any, with files that are none of the model's.
    others = {path.name for path in companions(source.parent)} - _BESIDE_GGUF
    save_with_companions(_Saved(), source.parent, out, others)
    found = open_gguf(source).found
    dequantized = sum(bool(one.reason) for one in found.floats.values())
    result.parts.append(ConvertedPart("", found.format, count, dequantized))
    result.bytes_before = source.stat().st_size

"""What the processes of formats.py share: opening and running a model, greedy tokens, bytes."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 16
PROMPT = "The capital of France is"


def written(folder: Path) -> dict[str, Any]:
    """What a writer said of the checkpoint in ``folder``."""
    return json.loads((folder / "written.json").read_text(encoding="utf-8"))


def class_of(name: str) -> Any:
    """A model class of Transformers or Diffusers by its name."""
    import transformers

    if hasattr(transformers, name):
        return getattr(transformers, name)
    import diffusers

    return getattr(diffusers, name)


def arguments(folder: Path, said: dict[str, Any], dtype: Any) -> tuple[str, list[Any], dict[str, Any]]:
    """The call that opens a checkpoint: name of the class method, its arguments and its keywords."""
    options = dict(said.get("options", {}))
    if single := said.get("single_file"):
        options["config"] = str(folder / options["config"])
        return "from_single_file", [str(folder / single)], options | {"torch_dtype": dtype}
    name = "torch_dtype" if said["kind"] == "diffusers" else "dtype"
    return "from_pretrained", [str(folder / "model")], options | ({} if dtype is None else {name: dtype})


def open_model(folder: Path, said: dict[str, Any], dtype: Any, **more: Any) -> nn.Module:
    """Opens the checkpoint with the class that the writer named.

    Args:
        folder: what a writer filled.
        said: its `written`.
        dtype: of the float parameters; None: the library's own default.
    """
    method, positions, options = arguments(folder, said, dtype)
    return getattr(class_of(said["class"]), method)(*positions, **options, **more).eval()


def prompt(base: Path, vocabulary: int) -> Tensor:
    """Ids ``[1, T]``: a prompt, or numbers if the model has no tokenizer."""
    if (base / "tokenizer.json").exists():
        from transformers import AutoTokenizer

        return torch.tensor([AutoTokenizer.from_pretrained(base)(PROMPT)["input_ids"]])
    return (torch.arange(1, 13) * 7 % vocabulary)[None]


def inputs_of(said: dict[str, Any], outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs that a writer stored, without the prefix of their names."""
    return {name.removeprefix("input."): value for name, value in outputs.items() if name.startswith("input.")}


def call(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The model's first output; float inputs get the model's dtype."""
    dtype = next(
        (p.dtype for p in model.parameters() if p.dtype in (torch.float32, torch.bfloat16, torch.float16)), None
    )
    cast = {name: value.to(dtype) if value.is_floating_point() and dtype else value for name, value in inputs.items()}
    # Z-Image takes lists of images, and returns one.
    listed = {
        name.removeprefix("list."): [value] if name.startswith("list.") else value for name, value in cast.items()
    }
    out = model(**listed)[0]
    return out[0] if isinstance(out, list) else out


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """`call` without gradients, in float32."""
    return call(model, inputs).float()


@torch.no_grad()
def greedy(model: Any, ids: Tensor, count: int = TOKENS) -> Tensor:
    """The tokens that greedy decoding adds, ``[count]``."""
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False
    )
    return out[0, ids.shape[1] :]


def seconds_of(call: Any, count: int = 1, tries: int = 3) -> float:
    """The fastest of some calls, in seconds for each of ``count`` units, after one call that is not counted."""
    call()
    taken = []
    for _ in range(tries):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken) / count


def inner(value: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor consists of."""
    if hasattr(value, "__tensor_flatten__") and type(value) not in (Tensor, nn.Parameter):
        found = []
        for name in value.__tensor_flatten__()[0]:
            part = getattr(value, name)
            found += inner(part) if isinstance(part, Tensor) else []
        return found
    extra = [v for v in vars(value).values() if isinstance(v, Tensor)] if type(value) is not Tensor else []
    state = getattr(value, "quant_state", None)  # bitsandbytes keeps scales beside the parameter
    while state is not None:
        extra += [v for v in vars(state).values() if isinstance(v, Tensor)]
        state = getattr(state, "state2", None)
    return [value, *(one for one in extra if not one.is_meta)]


def held(model: nn.Module, but: str = "") -> int:
    """Bytes of all parameters and buffers, and of tensors that modules keep as attributes; each storage once.

    Args:
        but: name of a parameter that is not counted: the table of embeddings, which most formats leave as it is.
    """
    skipped = set()
    tensors: list[Tensor] = []
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        tensors += inner(value)
        if name == but:
            skipped |= {part.untyped_storage().data_ptr() for part in inner(value)}
    for module in model.modules():
        for one in vars(module).values():
            tensors += inner(one) if isinstance(one, Tensor) else []
    seen = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_meta}
    return sum(size for at, size in seen.items() if at not in skipped)


class Peak(threading.Thread):
    """Samples this process's memory: anonymous pages, and pages of mapped files, which the system can take back."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._stop_it = threading.Event()
        self.before = self.anonymous = self.files = 0

    def __enter__(self) -> Peak:
        self.before, self.files_before = self.now()
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._sample()
        self._stop_it.set()
        self.join()

    @staticmethod
    def now() -> tuple[int, int]:
        """Bytes of anonymous pages and of file pages in memory."""
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return tuple(1024 * int(lines[key].split()[0]) for key in ("RssAnon", "RssFile"))  # type: ignore[return-value]

    def _sample(self) -> None:
        anonymous, files = self.now()
        self.anonymous, self.files = max(self.anonymous, anonymous), max(self.files, files)

    def run(self) -> None:
        while not self._stop_it.wait(0.002):
            self._sample()

    @property
    def grown(self) -> int:
        """The most anonymous memory, less what there was before."""
        return self.anonymous - self.before

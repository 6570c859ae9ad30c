"""Settings for every adapter method of PEFT on tiny layers, and the layers: what `test_peft_methods.py` tries.

The names of `METHODS` are the values of PEFT's own registry (``LORA``, ``OFT`` ...), with a suffix for variants of one
method. A method that a later PEFT adds and that is not listed here fails `test_every_method_of_peft_is_listed`. The table in
docs/training.md is `table()`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import config as lora_configs
from torch import nn
from transformers.pytorch_utils import Conv1D


class Block(nn.Module):
    """Layers of one kind, named ``one`` and ``two``; `example` is an input."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.norm = nn.LayerNorm(48)
        if kind == "linear":
            self.one, self.two = nn.Linear(32, 48), nn.Linear(48, 32)
        elif kind == "conv1d":
            self.one, self.two = Conv1D(48, 32), Conv1D(32, 48)
            nn.init.normal_(self.one.weight, std=0.2)
            nn.init.normal_(self.two.weight, std=0.2)
        elif kind == "conv2d":
            self.one, self.two = nn.Conv2d(16, 48, 3, padding=1), nn.Conv2d(48, 16, 3, padding=1)
        else:
            self.one, self.two = nn.Embedding(40, 48), nn.Linear(48, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Both layers, with a norm between them."""
        x = self.one(x)
        x = self.norm(x.movedim(1, -1)).movedim(-1, 1) if self.kind == "conv2d" else self.norm(x)
        return self.two(torch.nn.functional.gelu(x))

    def example(self) -> torch.Tensor:
        """A batch of inputs."""
        generator = torch.Generator().manual_seed(1)
        if self.kind == "embedding":
            return torch.randint(0, 40, (2, 7), generator=generator)
        shape = (2, 16, 4, 4) if self.kind == "conv2d" else (2, 7, 32)
        return torch.randn(shape, generator=generator)

    def targets(self) -> list[str]:
        """Names of the layers that adapters are added to."""
        return ["one"] if self.kind == "embedding" else ["one", "two"]


@dataclass
class Method:
    """One method: its settings, and how merging goes.

    Attributes:
        peft_type: its name in PEFT's registry.
        settings: arguments of its config; functions are called.
        exact, refused: kinds of layers on which merging is exact, or refused. PEFT supports no others.
        why: the reason, for the page.
    """

    peft_type: str
    settings: dict[str, Any]
    exact: str = ""
    refused: str = ""
    why: str = ""

    @property
    def available(self) -> bool:
        """False if this version of PEFT does not have the method or one of the settings."""
        config = PEFT_TYPE_TO_CONFIG_MAPPING.get(self.peft_type)
        if config is None or not self.settings.keys() <= config.__dataclass_fields__.keys():
            return False
        return all(hasattr(lora_configs, value.name) for value in self.settings.values() if isinstance(value, Config))

    def config(self, block: Block) -> Any:
        """The config for a block."""
        settings = {name: v.make() if isinstance(v, Config) else v for name, v in self.settings.items()}
        config = PEFT_TYPE_TO_CONFIG_MAPPING[self.peft_type]
        fields = config.__dataclass_fields__
        if "target_modules" in fields:
            settings.setdefault("target_modules", block.targets())
        if "fan_in_fan_out" in fields:
            settings.setdefault("fan_in_fan_out", block.kind == "conv1d")
        return config(**settings)

    def expected(self, kind: str) -> str:
        """How merging goes on a kind of layer."""
        if kind in self.exact.split():
            return "exact"
        return "refused" if kind in self.refused.split() else "no such layer"

    def row(self, name: str) -> str:
        """Its line of the table."""
        merge = "exact" if not self.refused else f"exact; refused for {self.refused}" if self.exact else "refused"
        return f"| `{name}` | {merge} | {self.why} |"


@dataclass
class Config:
    """A config inside of LoRA's; not every version of PEFT has all."""

    name: str
    settings: dict[str, Any]

    def make(self) -> Any:
        """The config."""
        return getattr(lora_configs, self.name)(**self.settings)


def _lora(init: Any = False, exact: str = "", refused: str = "", why: str = "", **settings: Any) -> Method:
    return Method("LORA", {"r": 2, "lora_alpha": 4, "init_lora_weights": init, **settings}, exact, refused, why)


ALL = "linear conv1d conv2d embedding"
ROTATES = "turns the weight's columns or rows into each other"
#: methods whose update has a rank that depends on the settings
RANK = "exact up to a rank of a quarter of the weight's smaller side, refused above"
SPREAD = "its update has full rank"
PRODUCT = "multiplies every weight by another number"
METHODS: dict[str, Method] = {
    "LORA": _lora(exact=ALL, why="its two factors, at any rank"),
    "LORA lora_bias": _lora(lora_bias=True, exact="linear conv1d conv2d", why="the bias is added to the layer's"),
    "LORA use_rslora": _lora(use_rslora=True, exact=ALL, why="as LoRA"),
    "LORA use_dora": _lora(
        use_dora=True,
        exact="linear conv1d conv2d",
        refused="embedding",
        why="two factors, and positive factors of rows; on an embedding it scales columns, which share their scales",
    ),
    "LORA gaussian": _lora("gaussian", exact=ALL, why="as LoRA"),
    "LORA orthogonal": _lora("orthogonal", exact="linear conv1d embedding", why="as LoRA"),
    "LORA pissa": _lora(
        "pissa",
        exact="linear conv1d embedding",
        why="as LoRA. What the initialization takes out of the weight is a low-rank term too",
    ),
    "LORA pissa_niter": _lora("pissa_niter_4", exact="linear conv1d embedding", why="as `pissa`"),
    "LORA olora": _lora("olora", exact="linear embedding", why="as `pissa`"),
    "LORA mica": _lora("mica", exact="linear conv1d embedding", why="as LoRA"),
    "LORA kasa_config": _lora(kasa_config=Config("KasaConfig", {}), exact="linear", why="as `pissa`"),
    "LORA use_bdlora": _lora(
        use_bdlora=Config(
            "BdLoraConfig", {"target_modules_bd_a": ["one"], "target_modules_bd_b": ["two"], "nblocks": 2}
        ),
        exact="linear",
        why="as LoRA",
    ),
    "LORA velora_config": _lora(
        velora_config=Config("VeloraConfig", {"num_groups": 4}), exact="linear conv1d", why="as LoRA"
    ),
    "LORA monteclora_config": _lora(
        monteclora_config=Config("MontecloraConfig", {}), exact="linear conv1d", why="as LoRA"
    ),
    "ADALORA": Method(
        "ADALORA",
        {"init_r": 2, "target_r": 2, "total_step": 10, "init_lora_weights": False},
        exact="linear conv1d conv2d",
        why=RANK,
    ),
    "ADAMSS": Method("ADAMSS", {"r": 4, "num_subspaces": 2, "subspace_rank": 1}, exact="linear", why=RANK),
    "BEFT": Method("BEFT", {"init_weights": False}, exact="linear", why="it changes biases only"),
    "BOFT": Method("BOFT", {"boft_block_size": 8, "init_weights": False}, refused="linear conv2d", why=ROTATES),
    "C3A": Method("C3A", {"block_size": 16, "init_weights": False}, refused="linear", why=SPREAD),
    "DEFT": Method("DEFT", {"r": 2, "init_weights": False}, exact="linear conv1d", why=RANK),
    "DELORA": Method("DELORA", {"r": 2, "init_weights": False}, exact="linear", why=RANK),
    "FOURIERFT": Method("FOURIERFT", {"n_frequency": 20, "init_weights": False}, refused="linear conv1d", why=SPREAD),
    "FROD": Method("FROD", {"init_weights": False, "progressbar": False}, refused="linear conv1d", why=SPREAD),
    "GLORA": Method("GLORA", {"r": 2, "init_weights": False}, refused="linear", why=PRODUCT),
    "GRALORA": Method("GRALORA", {"r": 2, "gralora_k": 2, "init_weights": False}, exact="linear conv1d", why=RANK),
    "HIRA": Method("HIRA", {"r": 2, "init_weights": False}, refused=ALL, why=PRODUCT),
    "HRA": Method("HRA", {"r": 2, "init_weights": False}, exact="linear conv2d", why=RANK),
    "IA3": Method(
        "IA3",
        {"feedforward_modules": [], "init_ia3_weights": True},
        exact="linear conv1d conv2d",
        why="factors of rows, which have to be positive (others are stored as a low-rank term)",
    ),
    "IA3 feedforward_modules": Method(
        "IA3",
        {"feedforward_modules": ["one"], "init_ia3_weights": True},
        exact="linear conv1d conv2d",
        why="on such a layer factors of columns, which become a column scale; they have to be positive",
    ),
    "LN_TUNING": Method("LN_TUNING", {"target_modules": ["norm"]}, exact=ALL, why="it changes norms, which are float"),
    "LOHA": Method("LOHA", {"r": 2, "init_weights": False}, exact="linear conv2d", why=f"rank r x r: {RANK}"),
    "LOKR": Method(
        "LOKR", {"r": 2, "init_weights": False}, exact="linear", refused="conv2d", why=f"here of rank 8: {RANK}"
    ),
    "MISS": Method("MISS", {"r": 2, "init_weights": False}, exact="linear", why=RANK),
    "OFT": Method("OFT", {"oft_block_size": 8, "init_weights": False}, refused="linear conv2d embedding", why=ROTATES),
    "OSF": Method("OSF", {"effective_rank": 30}, exact="linear", why=f"{RANK}; PEFT cannot unmerge it"),
    "PEANUT": Method("PEANUT", {"r": 2, "init_weights": False}, exact="linear", why=RANK),
    "PSOFT": Method("PSOFT", {"r": 4, "psoft_alpha": 4, "init_weights": False}, exact="linear", why=RANK),
    "PVERA": Method("PVERA", {"r": 4, "init_weights": False}, exact="linear conv1d", why=RANK),
    "RANDLORA": Method("RANDLORA", {"r": 4, "init_weights": False}, refused="linear conv1d", why=SPREAD),
    "ROAD": Method("ROAD", {"group_size": 8, "init_weights": False}, refused="linear", why=ROTATES),
    "SHIRA": Method("SHIRA", {"r": 2, "random_seed": 1, "init_weights": False}, refused="linear", why=SPREAD),
    "SUPERTUNING": Method("SUPERTUNING", {"init_weights": False, "sparsity": 0.9}, refused="linear", why=SPREAD),
    "TINYLORA": Method("TINYLORA", {"r": 2, "u": 8, "init_v_bound": 0.5}, exact="linear conv1d embedding", why=RANK),
    "TRAINABLE_TOKENS": Method(
        "TRAINABLE_TOKENS",
        {"token_indices": [1, 5], "target_modules": "one"},
        exact="linear embedding",
        why=f"rank is the number of tokens: {RANK}",
    ),
    "UNILORA": Method(
        "UNILORA", {"r": 2, "theta_d_length": 32, "init_theta_d_bound": 0.5}, exact="linear conv1d", why=RANK
    ),
    "VBLORA": Method(
        "VBLORA",
        {"r": 2, "num_vectors": 6, "vector_length": 16, "init_vector_bank_bound": 0.5},
        exact="linear conv1d",
        why=RANK,
    ),
    "VERA": Method("VERA", {"r": 4, "init_weights": False}, exact="linear conv1d", why=RANK),
    "WAVEFT": Method("WAVEFT", {"n_frequency": 20, "init_weights": False}, refused="linear conv1d", why=SPREAD),
}

VIRTUAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
#: methods that need a whole language model. PEFT itself cannot merge them
LANGUAGE_MODEL: dict[str, Method] = {
    "PROMPT_TUNING": Method("PROMPT_TUNING", VIRTUAL),
    "P_TUNING": Method("P_TUNING", {**VIRTUAL, "encoder_hidden_size": 16}),
    "PREFIX_TUNING": Method("PREFIX_TUNING", VIRTUAL),
    "MULTITASK_PROMPT_TUNING": Method("MULTITASK_PROMPT_TUNING", {**VIRTUAL, "num_tasks": 2}),
    "CARTRIDGE": Method("CARTRIDGE", VIRTUAL),
    "CPT": Method(
        "CPT",
        {"task_type": "CAUSAL_LM", "cpt_token_ids": [1, 2, 3], "cpt_mask": [1] * 3, "cpt_tokens_type_mask": [1, 2, 3]},
    ),
    "ADAPTION_PROMPT": Method(
        "ADAPTION_PROMPT", {"task_type": "CAUSAL_LM", "adapter_len": 3, "adapter_layers": 1, "target_modules": None}
    ),
    "LILY": Method("LILY", {"r": 2, "num_B": 2, "init_weights": False, "target_modules": ["q_proj", "o_proj"]}),
    "POLY": Method("POLY", {"task_type": "CAUSAL_LM", "r": 2, "n_tasks": 2, "n_skills": 2, "init_weights": False}),
    "SHADOW": Method(
        "SHADOW",
        {
            "task_type": "CAUSAL_LM",
            "r": 2,
            "shadow_num_hidden_layers": 1,
            "shadow_dropout": 0.0,
            "target_modules": None,
        },
    ),
    "LORA alora_invocation_tokens": _lora(alora_invocation_tokens=[1], task_type="CAUSAL_LM"),
}
#: tried in tests of their own, or not possible: why
ELSEWHERE = {
    "BONE": "a former name of MISS",
    "XLORA": "test_peft_models.py: it needs saved adapters",
    "LORA corda": "test_peft_models.py: it needs data",
    "LORA eva": "test_peft_models.py: it needs data",
    "LORA loftq": "it quantizes the float weight itself, with bitsandbytes",
    "LORA arrow_config": "test_peft_models.py: it needs saved adapters",
}


def table() -> str:
    """The table of docs/training.md."""
    lines = ["| Method | Merge | Why |", "|---|---|---|", *(method.row(name) for name, method in METHODS.items())]
    names = ", ".join(f"`{name}`" for name in LANGUAGE_MODEL)
    return "\n".join([*lines, f"| {names} | PEFT cannot | they change more than weights |"]) + "\n"

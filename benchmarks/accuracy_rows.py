"""The rows of accuracy.py: a library, a setting, and on which texts it is measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        library: of accuracy_libraries.
        label: the setting in words, unique within the library.
        setting: arguments for the library's function.
        heldout: measured on the held-out text too, if ``--texts`` names it.
        samples: the method needs samples: much slower, and not measured on MiniLM (other libraries support only decoders).
    """

    library: str
    label: str
    setting: dict[str, Any] = field(default_factory=dict)
    heldout: bool = False
    samples: bool = False

    @property
    def name(self) -> str:
        """The name; ``--only`` takes prefixes of it."""
        return f"{self.library}/{self.label}"


def ours(
    weights: str, group: int | None = None, scale_bits: int | None = None, heldout: bool = False, **more: Any
) -> Row:
    """A row for Requanto."""
    label = weights + ("" if group is None else f" g{group}")
    label += "" if scale_bits is None else f" scales {scale_bits} bit"
    label += "".join(f" {value}" for value in more.values())
    setting = {"weights": weights, "group_size": group, "scale_bits": scale_bits, **more}
    return Row("requanto", label, setting, heldout, samples=more.get("method") == "gptq")


def intx(bits: int, label: str = "", **more: Any) -> Row:
    """torchao's few-bit integers in groups of 64."""
    setting = {"config": "IntxWeightOnlyConfig", "bits": bits, "group_size": 64, **more}
    return Row("torchao", f"int{bits} g64{label}", setting)


def half_quadratic(bits: int, group: int | None, axis: int = 1) -> Row:
    """A row for hqq; ``axis=1`` (its default) groups along rows."""
    label = f"{bits} bit" + ("" if group is None else f" g{group}") + ("" if axis else " axis 0")
    return Row("hqq", label, {"nbits": bits, "group_size": group, "axis": axis}, heldout=bits == 4 and group == 64)


def of_sdnq(weights: str, label: str = "", heldout: bool = False, **more: Any) -> Row:
    """A row for sdnq; without a group size it chooses one itself."""
    return Row("sdnq", weights + label, {"weights_dtype": weights, **more}, heldout)


BF16 = {"dequantize_fp32": False}  # sdnq's scales in the model's dtype

#: rows without samples first: a run may be stopped early
ROWS = (
    Row("float", "bfloat16", heldout=True),
    ours("int4", 64, heldout=True),
    ours("int4", 64, method="weighted", heldout=True),
    half_quadratic(4, 64),
    of_sdnq("uint4", " g64, bf16 scales", group_size=64, **BF16),
    Row("bitsandbytes", "nf4", {"kind": "nf4", "blocksize": 64}),
    Row("optimum-quanto", "qint4", {"weights": "qint4"}, heldout=True),
    intx(4),
    ours("nf4", heldout=True),
    ours("codebook4", heldout=True),
    ours("int4", 64, method="minmax", heldout=True),
    ours("int4", 16, 4, heldout=True),
    ours("int4", 16, 4, method="weighted", heldout=True),
    ours("int4", 64, 8),
    ours("int4", 64, 8, method="weighted"),
    ours("int4", 32, 4),
    ours("int4", 32, 4, method="weighted"),
    ours("codebook4", 32),
    ours("int4", 64, method="mse"),
    ours("int4", 64, method="hqq", heldout=True),
    Row("bitsandbytes", "fp4", {"kind": "fp4", "blocksize": 64}),
    of_sdnq("uint4", " codebook, bf16 scales", use_codebook=True, **BF16),
    ours("int3", heldout=True),
    ours("int3", method="weighted", heldout=True),
    ours("int3", 64, heldout=True),
    ours("int3", 64, method="weighted", heldout=True),
    ours("int3", 16, 4),
    ours("int3", 16, 4, method="weighted"),
    ours("codebook3"),
    half_quadratic(3, 64),
    intx(3),
    of_sdnq("uint3", " g64, bf16 scales", group_size=64, **BF16),
    of_sdnq("uint3", " codebook, bf16 scales", use_codebook=True, **BF16),
    ours("int2", 16, 4),
    ours("int2", 16, 4, method="weighted"),
    ours("codebook2"),
    half_quadratic(2, 64),
    intx(2),
    of_sdnq("uint2", " codebook, bf16 scales", use_codebook=True, **BF16),
    Row("optimum-quanto", "qint2", {"weights": "qint2"}),
    ours("int8"),
    ours("float8"),
    Row("optimum-quanto", "qint8", {"weights": "qint8"}),
    Row("torchao", "int8", {"config": "Int8WeightOnlyConfig"}),
    half_quadratic(4, 128),
    half_quadratic(4, 64, axis=0),
    intx(4, " asymmetric", mapping="ASYMMETRIC"),
    intx(4, " hqq scale only", algorithm="HQQ_SCALE_ONLY"),
    Row("bitsandbytes", "nf4 double", {"kind": "nf4", "blocksize": 64, "compress_statistics": True}),
    of_sdnq("uint4"),
    of_sdnq("int4", " g64, bf16 scales", group_size=64, **BF16),
    of_sdnq("uint4", " g32, uint8 scales", group_size=32, scale_dtype="uint8"),
    of_sdnq("uint3"),
    half_quadratic(2, 16),
    of_sdnq("uint2"),
    Row("optimum-quanto", "qfloat8", {"weights": "qfloat8"}),
    Row("torchao", "float8", {"config": "Float8WeightOnlyConfig"}),
    Row("bitsandbytes", "int8", {"kind": "int8"}),
    half_quadratic(8, 64),
    of_sdnq("int8"),
    ours("int4", 64, method="gptq", heldout=True),
    Row("gptqmodel", "4 bit g64", {"bits": 4, "group_size": 64}, heldout=True, samples=True),
    ours("int3", 64, method="gptq"),
    Row("gptqmodel", "3 bit g64", {"bits": 3, "group_size": 64}, samples=True),
    ours("int2", 32, method="gptq"),
    Row("gptqmodel", "2 bit g32", {"bits": 2, "group_size": 32}, samples=True),
    *(
        Row("autoround", f"{b} bit g{g}", {"bits": b, "group_size": g, "sym": b > 2, "iters": 50}, samples=True)
        for b, g in ((4, 64), (3, 64), (2, 32))
    ),
)

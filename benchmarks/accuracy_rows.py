"""The rows of accuracy.py: a library and a setting."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One line of the tables.

    Attributes:
        library: of accuracy_libraries.
        label: the setting in words, unique within the library.
        setting: arguments for the library's function.
        samples: the method needs samples.
        decoders: the library supports only decoders.
        extra: not a row of the comparison: measured on the small models only, unless it is named.
    """

    library: str
    label: str
    setting: dict[str, Any] = field(default_factory=dict)
    samples: bool = False
    decoders: bool = False
    extra: bool = False

    @property
    def name(self) -> str:
        """The name; ``--only`` takes patterns of it."""
        return f"{self.library}/{self.label}"


#: options in words
NAMES = {
    **{("method", name): name for name in ("minmax", "mse", "weighted", "aligned", "hqq", "gptq")},
    ("column_scale", False): "no column scale",
    ("rotation", True): "rotated",
}


def ours(
    weights: str, group: int | None = None, scale_bits: int | None = None, extra: bool = False, **more: Any
) -> Row:
    """A row for Requanto: the defaults of a type, but for what is named."""
    words = [weights, f"g{group}" if group else "", f"scales {scale_bits} bit" if scale_bits else ""]
    words += [NAMES.get((key, value), f"{key} {value}") for key, value in more.items() if key != "calibration"]
    setting = {"weights": weights, "group_size": group, "scale_bits": scale_bits, **more}
    setting = {key: value for key, value in setting.items() if value is not None}
    return Row("requanto", " ".join(filter(None, words)), setting, samples="calibration" in more, extra=extra)


def sampled(weights: str, group: int, scale_bits: int, method: str = "gptq", **more: Any) -> Row:
    """A row for Requanto with samples."""
    return ours(weights, group, scale_bits, method=method, calibration=True, **more)


def intx(bits: int, label: str = "", **more: Any) -> Row:
    """torchao's few-bit integers in groups of 64."""
    setting = {"config": "IntxWeightOnlyConfig", "bits": bits, "group_size": 64, **more}
    return Row("torchao", f"int{bits} g64{label}", setting)


def half_quadratic(bits: int, group: int) -> Row:
    """A row for hqq, in groups along rows."""
    return Row("hqq", f"{bits} bit g{group}", {"nbits": bits, "group_size": group, "axis": 1})


def of_sdnq(weights: str, label: str = "", **more: Any) -> Row:
    """A row for sdnq, with scales in the model's dtype."""
    return Row("sdnq", weights + label, {"weights_dtype": weights, "dequantize_fp32": False, **more})


def of_sinq(bits: int, method: str, group: int = 64) -> Row:
    """A row for SINQ: ``dual`` has float scales and zero points, ``sinq`` stores them in 8 bits."""
    return Row("sinq", f"{bits} bit g{group} {method}", {"nbits": bits, "group_size": group, "method": method})


def of_llama_cpp(kind: str, imatrix: bool = True) -> Row:
    """A row for llama.cpp."""
    label = kind + (" imatrix" if imatrix else "")
    return Row("llama.cpp", label, {"kind": kind, "imatrix": imatrix}, samples=imatrix)


ROWS = (
    Row("float", "bfloat16"),
    # 4.5 bits
    ours("int4"),
    ours("int4", 64, method="minmax", column_scale=False),
    half_quadratic(4, 64),
    of_sdnq("uint4", " g64", group_size=64),
    Row("bitsandbytes", "nf4 g64", {"kind": "nf4", "blocksize": 64}),
    of_sinq(4, "dual"),
    intx(4, " asymmetric", mapping="ASYMMETRIC"),
    of_llama_cpp("Q4_K", imatrix=False),
    # 4.2 to 4.31 bits
    ours("int4", 64, 8),
    ours("int4", 32, 4),
    ours("nf4"),
    ours("codebook4"),
    half_quadratic(4, 128),
    intx(4),
    Row("optimum-quanto", "qint4", {"weights": "qint4"}),
    Row("bitsandbytes", "nf4 g64 double", {"kind": "nf4", "blocksize": 64, "compress_statistics": True}),
    of_sinq(4, "sinq"),
    # 3.2 to 3.7 bits
    ours("int3", 64),
    ours("int3", 16, 4),
    ours("int3", 64, method="minmax", column_scale=False),
    half_quadratic(3, 64),
    of_sdnq("uint3", " g64", group_size=64),
    of_sinq(3, "dual"),
    intx(3),
    # 2.5 bits
    ours("int2", 16, 4),
    ours("int2", 16, 4, method="minmax", column_scale=False),
    half_quadratic(2, 64),
    of_sinq(2, "dual"),
    Row("optimum-quanto", "qint2", {"weights": "qint2"}),
    # with samples
    sampled("int4", 64, 8),
    of_llama_cpp("IQ4_NL"),
    of_llama_cpp("Q4_K"),
    of_llama_cpp("IQ4_XS"),
    Row("autoround", "4 bit g64", {"bits": 4, "group_size": 64, "iters": 50}, samples=True, decoders=True),
    Row("gptqmodel", "4 bit g64", {"bits": 4, "group_size": 64}, samples=True, decoders=True),
    sampled("int3", 32, 4),
    of_llama_cpp("IQ3_S"),
    of_llama_cpp("Q3_K"),
    Row("autoround", "3 bit g64", {"bits": 3, "group_size": 64, "iters": 50}, samples=True, decoders=True),
    Row("gptqmodel", "3 bit g64", {"bits": 3, "group_size": 64}, samples=True, decoders=True),
    sampled("int2", 16, 4),
    of_llama_cpp("Q2_K"),
    Row(
        "autoround", "2 bit g32", {"bits": 2, "group_size": 32, "sym": False, "iters": 50}, samples=True, decoders=True
    ),
    Row("gptqmodel", "2 bit g32", {"bits": 2, "group_size": 32}, samples=True, decoders=True),
    # the other types and options of this package
    ours("int8", extra=True),
    ours("float8", extra=True),
    ours("int4", 64, method="mse", column_scale=False, extra=True),
    ours("int4", 64, method="weighted", column_scale=False, extra=True),
    ours("int4", 64, method="aligned", column_scale=False, extra=True),
    ours("int4", 64, method="hqq", column_scale=False, extra=True),
    ours("int4", 16, 4, extra=True),
    ours("nvfp4", extra=True),
    ours("mxfp4", extra=True),
    ours("int4", 64, 8, rotation=True, extra=True),
    ours("int3", 16, 4, rotation=True, extra=True),
    ours("int3", 16, 4, low_rank=16, extra=True),
    ours("codebook3", extra=True),
    ours("codebook2", extra=True),
    Row("optimum-quanto", "qint8", {"weights": "qint8"}, extra=True),
    Row("torchao", "int8", {"config": "Int8WeightOnlyConfig"}, extra=True),
)

"""AWQ checkpoints of AutoAWQ, GPTQModel and AutoRound.

``version: gemm``, codes along N, and of each eight the order 0 2 4 6 1 3 5 7:

    M.qweight   int32 [K, N * bits / 32]
    M.qzeros    int32 [G, N * bits / 32]
    M.scales    float16 [G, N]

``version: gemv``, codes along K in order, and columns of zeros after the last group:

    M.qweight   int32 [N, K / 8]
    M.qzeros    int32 [N, W], W >= G / 8
    M.scales    float16 [N, 8 * W]

    w[n, k] = scales[g, n] * (code[k, n] - zero[g, n])

For models whose MLP has no layer that a scale could be folded into (Falcon, MPT, GPT-J, GPT-NeoX, GPTBigCode, BLOOM,
StarCoder2), AutoAWQ divides the activation's output by ``M.act.scales`` [K]: here the column scale of the next layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from requanto.checkpoint.foreign.found import ForeignCheckpoint, ForeignWeight, Parts
from requanto.checkpoint.foreign.integers import (
    SCALES,
    Form,
    Scheme,
    Stored,
    fitting_scheme,
    form_of_zeros,
    has_negative,
    modules,
    read_schemes,
)
from requanto.checkpoint.foreign.packing import codes_of_words, packed_rows, pieces
from requanto.checkpoint.foreign.source import Source
from requanto.checkpoint.format import CheckpointError
from requanto.config.checks import shown
from requanto.dtypes.bit_packing import packed_length

#: stored place of each of eight codes, of version gemm
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
#: AutoRound packs codes of 5 to 7 bits in the same way
_BITS = (4, 5, 6, 7)
_OTHERS = {
    "gemv_fast": "stores codes in the order of a GPU kernel",
    "llm-awq": "stores codes in the order of a GPU kernel",
    "marlin": "stores codes in the order of a GPU kernel",
    "bitblas": "stores codes in the order of a GPU kernel",
    "exllama": "is no layout of files",
    "exllamav2": "is no layout of files",
    "ipex": "is no layout of files",
}
#: names of the layer after an activation with scales
_AFTER_ACTIVATION = ("c_proj", "dense_4h_to_h", "down_proj", "fc_out")


def scan(config: Mapping[str, Any], source: Source) -> ForeignCheckpoint:
    """See `requanto.checkpoint.foreign.readers`."""
    config = {"bits": config.get("w_bit"), "group_size": config.get("q_group_size"), **config}
    version = str(config.get("version") or config.get("format") or config.get("checkpoint_format") or "gemm").lower()
    if config.get("backend") == "llm-awq":
        version = "llm-awq"
    if version not in ("gemm", "gemv"):
        raise CheckpointError(
            f"quantization_config.version is {shown(version)}, which {_OTHERS.get(version, 'is not known here')}; read are "
            f"'gemm' and 'gemv'. Save the model in version 'gemm' with the library that wrote it, or start from the float "
            f"model"
        )
    if config.get("rotation"):
        raise CheckpointError(
            f"quantization_config.rotation is {shown(config['rotation'])}, which Requanto does not know"
        )
    zero_point = config.get("zero_point")
    if zero_point is not None and type(zero_point) is not bool:
        raise CheckpointError(f"quantization_config.zero_point is {shown(zero_point)}, expected true or false")
    # Transformers writes sym=true beside zero_point=true: a default of its GPTQ config, which says nothing of AWQ.
    symmetric = config.get("sym") if zero_point is None else not zero_point
    schemes = read_schemes({**config, "sym": symmetric}, config.get("dynamic"), "dynamic", symmetric, _BITS)
    group = "one scale a row" if schemes[0].group == -1 else f"group size {schemes[0].group}"
    found = ForeignCheckpoint(format=f"AWQ, {schemes[0].bits} bits, {group}, {version}")
    columns = _activation_scales(source)
    signed = config.get("provider") == "auto-round"
    for name in modules(source):
        add = _add_gemm if version == "gemm" else _add_gemv
        add(found, source, name, schemes, signed, columns.get(name))
    return found


def add_weights(found: ForeignCheckpoint, source: Source, schemes: list[Scheme], signed: bool) -> None:
    """Adds all weights of version gemm, for AutoRound's reader."""
    for name in modules(source):
        _add_gemm(found, source, name, schemes, signed, None)


def _add_gemm(
    found: ForeignCheckpoint, source: Source, module: str, schemes: list[Scheme], signed: bool, column: str | None
) -> None:
    name = f"{module}.weight"
    names = {part: f"{module}.{part}" for part in ("qweight", "qzeros", "scales")}
    weight, scales = source.need(names["qweight"], name), source.need(names["scales"], name)
    if len(weight.shape) != 2 or len(scales.shape) != 2 or 0 in (*weight.shape, *scales.shape):
        raise CheckpointError(
            f"{name}: qweight is {tuple(weight.shape)} and scales {tuple(scales.shape)}, expected two axes of each"
        )
    (k, words), (groups, n) = weight.shape, scales.shape
    bits = words * 32 // n
    if bits not in _BITS or words * 32 != bits * n or n % 8:
        raise CheckpointError(
            f"{names['qweight']} has {words} words in a row for {n} outputs, expected outputs x bits / 32 with 4 bits (or, "
            f"by AutoRound, 5 to 7): the config's version is wrong, or one of the tensors"
        )
    source.need_shape(names["qweight"], name, (k, words), torch.int32)
    source.need_shape(names["scales"], name, (groups, n), *SCALES)
    scheme = fitting_scheme(schemes, bits, k, groups, name)
    if scheme.group != -1 and k % scheme.group:
        raise CheckpointError(
            f"{names['qweight']} has {k} rows, which groups of {scheme.group} do not divide: it is damaged"
        )
    with_zeros = names["qzeros"] in source or not scheme.symmetric
    if with_zeros:
        source.need_shape(names["qzeros"], name, (groups, words), torch.int32)
    else:
        del names["qzeros"]

    def zeros_of(source: Source) -> torch.Tensor | None:
        return _codes_in_order(source[names["qzeros"]], bits, n).t().to(torch.int16) if with_zeros else None

    def stored(source: Source) -> Stored:
        words = source[names["qweight"]]
        rows = torch.empty((n, packed_length(k, bits)), dtype=torch.uint8, device=words.device)
        for start, stop in pieces(n, k, 32):  # 32 codes are whole words of any number of bits
            codes = _codes_in_order(words[:, start * bits // 32 : stop * bits // 32], bits, stop - start)
            rows[start:stop] = packed_rows(codes.t(), bits)
        return Stored(rows, source[names["scales"]].t(), zeros_of(source))

    zeros = "symmetric" if scheme.symmetric else form_of_zeros(zeros_of(source), bits)
    signed = signed and has_negative(source[names["scales"]])
    form = Form(bits, (n, k), scheme.group, zeros, signed, columns=column is not None)
    _add(found, source, name, form, names, stored, column)


def _add_gemv(
    found: ForeignCheckpoint, source: Source, module: str, schemes: list[Scheme], signed: bool, column: str | None
) -> None:
    name = f"{module}.weight"
    names = {part: f"{module}.{part}" for part in ("qweight", "qzeros", "scales")}
    weight, zeros = source.need(names["qweight"], name), source.need(names["qzeros"], name)
    if len(weight.shape) != 2 or len(zeros.shape) != 2:
        raise CheckpointError(
            f"{name}: qweight is {tuple(weight.shape)} and qzeros {tuple(zeros.shape)}, expected two axes of each"
        )
    (n, words), width = weight.shape, zeros.shape[1]
    k = words * 8
    source.need_shape(names["qweight"], name, (n, words), torch.int32)
    source.need_shape(names["qzeros"], name, (n, width), torch.int32)
    source.need_shape(names["scales"], name, (n, width * 8), *SCALES)
    groups = schemes[0].groups(k)  # AutoAWQ has one group size for all layers
    if groups > width * 8:
        raise CheckpointError(
            f"{names['qzeros']} has room for {width * 8} groups, and {k} inputs have {groups} of {schemes[0].group}: "
            f"group_size in the config is wrong, or the tensor is damaged"
        )
    scheme = fitting_scheme(schemes, 4, k, groups, name)

    def zeros_of(source: Source) -> torch.Tensor:
        return codes_of_words(source[names["qzeros"]], 4, groups).to(torch.int16)

    def stored(source: Source) -> Stored:
        rows, scales = source[names["qweight"]].contiguous().view(torch.uint8), source[names["scales"]]
        if bool(scales[:, groups:].any()):
            raise CheckpointError(
                f"{names['scales']} holds more than {groups} scales a row, and {k} inputs have {groups} groups of "
                f"{schemes[0].group}: group_size in the config is wrong, or the tensor is damaged"
            )
        return Stored(rows, scales[:, :groups], zeros_of(source))

    kind = "symmetric" if scheme.symmetric else form_of_zeros(zeros_of(source), 4)
    form = Form(4, (n, k), scheme.group, kind, columns=column is not None)
    _add(found, source, name, form, names, stored, column)


def _add(
    found: ForeignCheckpoint,
    source: Source,
    name: str,
    form: Form,
    names: dict[str, str],
    stored: Callable[[Source], Stored],
    column: str | None,
) -> None:
    sources = tuple(names.values())
    if column is not None:
        source.need_shape(column, name, (form.shape[1],), *SCALES)
        sources += (column,)

    def build(source: Source) -> Parts:
        parts = form.parts(stored(source), name)
        if column is not None:
            parts["column"] = source[column].float().reciprocal()
        return parts

    found.weights[name] = ForeignWeight(form.text, sources, build)


def _codes_in_order(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Words of version gemm ``[R, W]`` -> uint8 codes ``[R, count]``."""
    codes = codes_of_words(words, bits, count)
    places = torch.tensor(_PLACES, dtype=torch.int64, device=words.device)
    return torch.index_select(codes.unflatten(-1, (-1, 8)), 2, places).flatten(-2)


def _activation_scales(source: Source) -> dict[str, str]:
    """Name of the module after each scaled activation -> the tensor of its scales.

    Raises:
        CheckpointError: there is none, so the scale has no place here.
    """
    found: dict[str, str] = {}
    for name in source:
        activation = name.removesuffix(".scales")
        if activation == name or f"{activation}.qweight" in source:
            continue
        parent = activation.rpartition(".")[0]
        after = [f"{parent}.{leaf}" for leaf in _AFTER_ACTIVATION if f"{parent}.{leaf}.qweight" in source]
        if len(after) != 1:
            raise CheckpointError(
                f"{name} is a scale of AutoAWQ by which an activation is divided, and {parent} has no quantized layer after "
                f"it ({' or '.join(_AFTER_ACTIVATION)}) whose columns could be multiplied instead"
            )
        found[after[0]] = name
    return found

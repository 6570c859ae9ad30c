"""Validation of arguments before a launch. Each error names the argument, what was found and what is expected."""

import re
from dataclasses import dataclass

import torch

from ._device import is_interpreted

FP8_KINDS = {
    torch.float8_e4m3fn: "e4m3fn",
    torch.float8_e4m3fnuz: "e4m3fnuz",
    torch.float8_e5m2: "e5m2",
}
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
LAYOUTS = ("plain", "exec")
#: Most bits of exponent of a float of fewer than 8 bits: fp16 must hold all of them.
MOST_EXPONENT_BITS = 4


def fail(name: str, found: object, expected: object) -> None:
    raise ValueError(f"{name}: found {found}, expected {expected}")


def check_dtype(name: str, tensor: torch.Tensor, allowed) -> None:
    if tensor.dtype not in allowed:
        fail(f"{name}.dtype", tensor.dtype, "one of " + ", ".join(str(d) for d in allowed))


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        fail(f"{name}.shape", tuple(tensor.shape), shape)


def check_rows(name: str, tensor: torch.Tensor) -> None:
    """Checks that there are rows: a launch cannot have an empty grid."""
    if 0 in tensor.shape[:-1]:
        fail(f"{name}.shape", tuple(tensor.shape), "at least one row")


def check_devices(**tensors: torch.Tensor | None) -> torch.device:
    """The common device of the tensors; it must be one that Triton supports."""
    present = {name: t for name, t in tensors.items() if t is not None}
    first, anchor = next(iter(present.items()))
    for name, tensor in present.items():
        if tensor.layout is not torch.strided:
            fail(f"{name}.layout", tensor.layout, "torch.strided")
        if tensor.device != anchor.device:
            fail(f"{name}.device", tensor.device, f"{anchor.device}, the device of {first}")
    if anchor.device.type not in ("cuda", "xpu") and not (anchor.device.type == "cpu" and is_interpreted()):
        fail(f"{first}.device", anchor.device, "a CUDA, ROCm or XPU device (or CPU under TRITON_INTERPRET=1)")
    return anchor.device


@dataclass(frozen=True)
class Weight:
    """A checked quantized weight, as the launchers pass it to kernels. `group` 0 means one group as long as K.

    kind: KIND of `_fields.py`. table: values of a codebook; a tensor that is not read without one.
    """

    q: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor | None
    table: torch.Tensor
    n: int
    k: int
    bits: int
    kind: str
    group: int
    exec: bool
    experts: int

    def strides(self) -> tuple[int, int, int, int, int, int, int, int]:
        """q by row, scale by row and group, shift by row and group, then (q, scale, shift) by expert."""
        s, z = self.scale, self.shift if self.shift is not None else self.scale
        expert = (self.q.stride(0), s.stride(0), z.stride(0)) if self.experts else (0, 0, 0)
        return (self.q.stride(-2), *s.stride()[-2:], *z.stride()[-2:], *expert)

    def form(self) -> str:
        """All of the weight but its shape that decides which program runs, in names of tuned tiles (`config.key`)."""
        affine, layout = "symmetric" if self.shift is None else "affine", "exec" if self.exec else "plain"
        return f"{self.kind or 'int'}/{affine}/{str(self.scale.dtype)[6:]}/{layout}"

    def has_pairs(self) -> bool:
        """Whether scales (and shifts) of adjacent rows can be loaded as one 32-bit word: PAIRS of `_scales.py`."""
        return self.n % 2 == 0 and all(
            t.element_size() == 2
            and t.data_ptr() % 4 == 0
            and t.stride(-2) == 1
            and (t.shape[-1] == 1 or t.stride(-1) % 2 == 0)
            and (t.dim() == 2 or t.stride(0) % 2 == 0)
            for t in (self.scale, self.shift if self.shift is not None else self.scale)
        )


def exec_block(bits: int) -> int:
    """Length along K of one block of the execution layout; 1 for widths without that layout."""
    return {2: 256, 3: 256, 4: 128, 5: 256, 6: 128, 7: 256}.get(bits, 1)


def has_exec_layout(bits: int, k: int) -> bool:
    """Whether the two layouts differ for this weight."""
    return exec_block(bits) > 1 and k % exec_block(bits) == 0


def check_bits(bits: int) -> None:
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        fail("bits", repr(bits), "a whole number, 1 to 8")


def _kind_of(qdata: torch.Tensor, bits: int, affine: bool, codebook: torch.Tensor | None, small_float: str) -> str:
    """KIND of the codes."""
    if codebook is not None:
        if bits > 7 or affine or small_float:
            found = f"bits {bits}{', a shift' if affine else ''}{', a small_float' if small_float else ''}"
            fail("codebook", f"one with {found}", "fewer than 8 bits, no shift and no small_float")
        check_dtype("codebook", codebook, FLOATS)
        check_shape("codebook", codebook, (2**bits,))
        return "table"
    if small_float:
        form = re.fullmatch(r"e([1-9])m([0-9])", str(small_float))
        exponent, mantissa = map(int, form.groups()) if form else (0, 0)
        if affine or not form or exponent > MOST_EXPONENT_BITS or 1 + exponent + mantissa != bits or bits > 7:
            expected = f"'' or, without a shift, 'eXmY' of 1 + X + Y = {bits} bits, X at most {MOST_EXPONENT_BITS}"
            fail("small_float", repr(small_float), expected)
        return small_float
    if qdata.dtype == torch.uint8 and bits == 8:
        if not affine:
            fail("shift", None, "a tensor, which unsigned codes of 8 bits need")
        return "u8"
    return FP8_KINDS.get(qdata.dtype, "")


def _inner_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def check_weight(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    k: int,
    bits: int,
    group_size: int | None,
    layout: str,
    experts: bool = False,
    small_float: str = "",
    codebook: torch.Tensor | None = None,
) -> Weight:
    """Checks qdata, scale, shift and codebook against each other and against K."""
    check_bits(bits)
    if layout not in LAYOUTS:
        fail("layout", repr(layout), "'plain' or 'exec'")
    if not isinstance(k, int) or k <= 0:
        fail("K", repr(k), "a positive whole number")
    dims = 3 if experts else 2
    for name, tensor in (("qdata", qdata), ("scale", scale), ("shift", shift)):
        if tensor is not None and tensor.dim() != dims:
            fail(f"{name}.shape", tuple(tensor.shape), f"{dims} dimensions")
    check_dtype("qdata", qdata, (torch.uint8,) if bits < 8 else (torch.int8, torch.uint8, *FP8_KINDS))
    kind = _kind_of(qdata, bits, shift is not None, codebook, small_float)
    check_dtype("scale", scale, FLOATS)
    lead = tuple(qdata.shape[:-1])
    check_shape("qdata", qdata, (*lead, -(-k * bits // 8)))
    group = k if group_size is None else group_size
    if group_size is None and scale.shape[-1] > 1:
        if k % scale.shape[-1]:
            fail("group_size", None, f"a number, since {scale.shape[-1]} groups do not divide K={k}")
        group = k // scale.shape[-1]
    if not isinstance(group, int) or group <= 0:
        fail("group_size", repr(group), "a positive whole number")
    check_shape("scale", scale, (*lead, -(-k // group)))
    if shift is not None:
        check_dtype("shift", shift, FLOATS)
        check_shape("shift", shift, (*lead, -(-k // group)))
    is_exec = layout == "exec" and has_exec_layout(bits, k)
    q = _inner_contiguous(qdata)
    if q.dtype in FP8_KINDS:
        q = q.view(torch.uint8)
    elif is_exec:
        # 16-bit words need even addresses; a tensor in a memory-mapped file may start at any address.
        if q.data_ptr() % 2 or q.storage_offset() % 2 or any(s % 2 for s in q.stride()[:-1]):
            q = q.clone(memory_format=torch.contiguous_format)
        q = q.view(torch.int16)
    return Weight(
        q=q,
        scale=scale,
        shift=shift,
        table=scale if codebook is None else codebook.contiguous(),
        n=lead[-1],
        k=k,
        bits=bits,
        kind=kind,
        group=0 if group >= k else group,
        exec=is_exec,
        experts=lead[0] if experts else 0,
    )


def check_bias(bias: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor | None:
    if bias is not None:
        check_dtype("bias", bias, FLOATS)
        check_shape("bias", bias, shape)
        bias = bias.contiguous()
    return bias


def check_out(out: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device) -> torch.Tensor:
    """The output tensor: the caller's, after a check, or a new one."""
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    check_shape("out", out, shape)
    check_dtype("out", out, (dtype,))
    if not out.is_contiguous():
        fail("out.stride", out.stride(), "a contiguous tensor")
    return out


def check_offsets(offsets: torch.Tensor, experts: int) -> None:
    check_dtype("offsets", offsets, (torch.int32, torch.int64))
    check_shape("offsets", offsets, (experts + 1,))
    if not offsets.is_contiguous():
        fail("offsets.stride", offsets.stride(), "a contiguous tensor")

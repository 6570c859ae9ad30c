"""Device functions that convert codes to numbers: fields of words, bytes of float8, indices into a table.

Integers of up to 8 bits, small floats and float8 are exact in fp16 and bf16. KIND says what codes stand for: "" for signed
integers of 8 bits and all integers below, "u8" for unsigned ones of 8 bits, "e4m3fn" and so on for float8, "e2m1" and so on
for floats of fewer bits (sign, exponent, mantissa; no infinity, no NaN), "table" for indices into a codebook.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def magic_number(dtype, bits: int) -> int:
    """The number that `field_to_float` adds to a code; codes of whole bytes are converted without one."""
    return 0 if dtype.is_fp32() or bits == 8 else 128 if dtype.is_bf16() else 1024


@triton.constexpr_function
def _magic_asm(field_asm: str, bits: int, bf16: bool, form: str) -> str:
    """PTX that ends in `t`, two words of magic number and code, with one fma to subtract the offset.

    The subtraction is an fma since bf16 has fma from sm_80 on, but a subtraction only from sm_90 on.
    """
    one, kind = (0x3F80, "bf16x2") if bf16 else (0x3C00, "f16x2")
    offset = (0xC300 if bf16 else 0xE400) | (1 << (bits - 1) if form == "centred" else 0)  # -(128 + centre), say
    if form == "magic":
        return f"{{\n.reg .b32 t, u;\n{field_asm}\nmov.b32 $0, t;\n}}"
    return f"""{{
    .reg .b32 t, u, v;
    {field_asm}
    mov.b32 u, {one * 0x10001:#x};
    mov.b32 v, {offset * 0x10001:#x};
    fma.rn.{kind} $0, t, u, v;
    }}"""


@triton.constexpr_function
def lop3_asm(field: int, bits: int, bf16: bool, form: str) -> str:
    """PTX for two 16-bit words at once: a shift, one lop3 for mask and magic number, one fma.

    `0xEA` is the truth table of `(a & b) | c`.
    """
    mask, magic = (1 << bits) - 1, 0x4300 if bf16 else 0x6400
    return _magic_asm(
        f"""shr.u32 t, $1, {field * bits};
    lop3.b32 t, t, {mask * 0x10001:#x}, {magic * 0x10001:#x}, 0xEA;""",
        bits, bf16, form,
    )  # fmt: skip


@triton.constexpr_function
def has_planes(bits: int) -> bool:
    """Whether the execution layout stores the low bits of a code apart from the others: see `layout.py`."""
    return bits in (3, 5, 6, 7)


@triton.constexpr_function
def planes_asm(field: int, bits: int, bf16: bool, form: str) -> str:
    """The same for codes in planes: one lop3 for each, with the bits that are joined already as its third operand.

    $1 is the word of the low bits that has this field, $2 and $3 have higher bits of all fields (16-bit numbers).
    """
    low = 2 if bits == 3 else 4
    planes, place = [], low  # (bits, place in the operand, place in the code)
    while place < bits:
        width = min(2 if bits > 5 else 1, bits - place)
        planes.append((width, width * field, place))
        place += width
    lines, joined = [], f"{(0x4300 if bf16 else 0x6400) * 0x10001:#x}"
    for i, plane in enumerate(planes):  # Triton's search for dependencies reads no nested targets
        width, source, target = plane
        distance, mask = source - target, ((1 << width) - 1) << target
        lines.append(f"{'shr.u32' if distance > 0 else 'shl.b32'} t, ${i + 2}, {abs(distance)};")
        lines.append(f"lop3.b32 u, t, {mask * 0x10001:#x}, {joined}, 0xEA;")
        joined = "u"
    lines.append(f"shr.u32 t, $1, {low * field % 16};")
    lines.append(f"lop3.b32 t, t, {((1 << low) - 1) * 0x10001:#x}, u, 0xEA;")
    return _magic_asm("\n".join(lines), bits, bf16, form)


@triton.constexpr_function
def mantissa_bits(kind: str) -> int:
    """Of a small float, 1 for "e2m1"."""
    return int(kind[3])


@triton.constexpr_function
def exponent_repair(kind: str, bf16: bool) -> int:
    """The power of two, as its exponent, by which a small float is multiplied once its bits are those of bf16 or fp16."""
    return (127 if bf16 else 15) - ((1 << (int(kind[1]) - 1)) - 1)


@triton.constexpr_function
def small_float_asm(field: int, kind: str, bf16: bool) -> str:
    """PTX for two words of four 4-bit floats: sign, exponent and mantissa to their places, one fma to correct the exponent.

    `0xEA` is the truth table of `(a & b) | c`. The fma adds -0, which keeps the sign of a zero.
    """
    place, exponent = (7 if bf16 else 10) - mantissa_bits(kind), exponent_repair(kind, bf16)
    factor = (exponent + 127) << 7 if bf16 else (exponent + 15) << 10
    signs, rest = 12 - 4 * field, place - 4 * field
    return f"""{{
    .reg .b32 s, t, u, v;
    shl.b32 s, $1, {signs};
    and.b32 s, s, 0x80008000;
    {"shl" if rest > 0 else "shr"}.b32 t, $1, {abs(rest)};
    lop3.b32 t, t, {(7 << place) * 0x10001:#x}, s, 0xEA;
    mov.b32 u, {factor * 0x10001:#x};
    mov.b32 v, 0x80008000;
    fma.rn.{"bf16x2" if bf16 else "f16x2"} $0, t, u, v;
    }}"""


@triton.jit
def field_bits(words, FIELD: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr):
    """Field number FIELD of each word, as an integer. PLANES: words is what `load_exec` loads of several planes."""
    if not PLANES:
        return (words >> (FIELD * BITS)) & ((1 << BITS) - 1)
    elif BITS == 3:
        return ((words[0] >> (2 * FIELD)) & 3) | (((words[1] >> FIELD) & 1) << 2)
    elif BITS == 6:
        return ((words[0] >> (4 * FIELD)) & 15) | (((words[1] >> (2 * FIELD)) & 3) << 4)
    else:
        low = (low_word(words, FIELD) >> (4 * (FIELD % 4))) & 15
        if BITS == 5:
            return low | (((words[2] >> FIELD) & 1) << 4)
        else:
            return low | (((words[2] >> (2 * FIELD)) & 3) << 4) | (((words[3] >> FIELD) & 1) << 6)


@triton.jit
def low_word(words, FIELD: tl.constexpr):
    """Of 5 or 7 bits, the word whose 4 fields of 4 bits contain this one."""
    if FIELD < 4:
        return words[0]
    else:
        return words[1]


@triton.jit
def planes_to_float(words, FIELD: tl.constexpr, BITS: tl.constexpr, FORM: tl.constexpr, DTYPE: tl.constexpr):
    """Field number FIELD of codes in planes as DTYPE, fp16 or bf16, by PTX."""
    BF16: tl.constexpr = tl.bfloat16 == DTYPE
    ASM: tl.constexpr = planes_asm(FIELD, BITS, BF16, FORM)
    if BITS == 3 or BITS == 6:
        arguments = [words[0], words[1]]
    elif BITS == 5:
        arguments = [low_word(words, FIELD), words[2]]
    else:
        arguments = [low_word(words, FIELD), words[2], words[3]]
    REGISTERS: tl.constexpr = "=r,r,r,r" if BITS == 7 else "=r,r,r"
    if BF16:  # the builtin accepts a dtype, but not a constexpr of one
        return tl.inline_asm_elementwise(ASM, REGISTERS, arguments, dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise(ASM, REGISTERS, arguments, dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def small_to_float(codes, BITS: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """Codes of a small float as DTYPE, exactly.

    As in `fp8_to_float`, the bits become those of a wider format, and a power of two corrects the exponent's bias.
    """
    u = codes.to(tl.int16)
    SIGN: tl.constexpr = 1 << (BITS - 1)
    sign = (u & SIGN) << (16 - BITS)
    if tl.bfloat16 == DTYPE:
        PLACE: tl.constexpr = 7 - mantissa_bits(KIND)
        REPAIR: tl.constexpr = 2.0 ** exponent_repair(KIND, True)
        value = (sign | ((u & (SIGN - 1)) << PLACE)).to(tl.int16).to(tl.bfloat16, bitcast=True)
        return value * tl.full([1, 1], REPAIR, tl.bfloat16)
    else:
        PLACE16: tl.constexpr = 10 - mantissa_bits(KIND)
        REPAIR16: tl.constexpr = 2.0 ** exponent_repair(KIND, False)
        value = (sign | ((u & (SIGN - 1)) << PLACE16)).to(tl.int16).to(tl.float16, bitcast=True)
        return (value * tl.full([1, 1], REPAIR16, tl.float16)).to(DTYPE)


@triton.constexpr_function
def lookup_asm(field: int) -> str:
    """PTX that looks up one 4-bit code of each of two words in 16 values of 16 bits.

    A value is fetched as two bytes: prmt selects 4 bytes of 8 by the low bits of 4 codes, and between two such results by
    their highest bits. $2, $4 .. $16 are the table of `open_table`, 4 low or 4 high bytes each. Only the last instructions
    depend on the field, so the assembler computes the others once for all fields.
    """
    lines = [
        "and.b32 s, $1, 0x77777777;",
        "shr.u32 t, $1, 1;",
        "lop3.b32 t, t, 0x44444444, 0x32103210, 0xEA;",
    ]
    for word in range(2):
        for half, first in (("l", 2), ("h", 10)):
            lines += [
                f"prmt.b32 a, ${first}, ${first + 2}, s;",
                f"prmt.b32 b, ${first + 4}, ${first + 6}, s;",
                f"prmt.b32 {half}, a, b, t;",
            ]
        lines.append(f"prmt.b32 x{word}, l, h, {('0x5140', '0x7362')[field // 2]};")
        lines += ["shr.u32 s, s, 16;", "shr.u32 t, t, 16;"] if word == 0 else []
    lines.append(f"prmt.b32 $0, x0, x1, {('0x5410', '0x7632')[field % 2]};")
    return "{\n.reg .b32 s, t, a, b, l, h, x0, x1;\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def by_permutation(bits: int, kind: str, is_exec: bool, ptx: bool) -> bool:
    """Whether a codebook is held in registers and looked up by byte permutations."""
    return kind == "table" and bits == 4 and is_exec and ptx


@triton.jit
def _four_bytes(table, FIRST: tl.constexpr, SHIFT: tl.constexpr, DTYPE: tl.constexpr):
    """One byte of each of 4 values, in an int32."""
    word = tl.zeros([1, 1], tl.int32)
    for i in tl.static_range(4):
        value = tl.load(table + tl.full([1, 1], FIRST + i, tl.int32)).to(DTYPE).to(tl.int16, bitcast=True)
        word = word | (((value.to(tl.int32) >> SHIFT) & 0xFF) << (8 * i))
    return word


@triton.jit
def open_table(
    table, BITS: tl.constexpr, KIND: tl.constexpr, EXEC: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr
):  # fmt: skip
    """What `load_codes` takes as a table: the pointer, or the values' low and high bytes in 8 registers."""
    if by_permutation(BITS, KIND, EXEC, PTX):
        return (
            _four_bytes(table, 0, 0, DTYPE), _four_bytes(table, 4, 0, DTYPE),
            _four_bytes(table, 8, 0, DTYPE), _four_bytes(table, 12, 0, DTYPE),
            _four_bytes(table, 0, 8, DTYPE), _four_bytes(table, 4, 8, DTYPE),
            _four_bytes(table, 8, 8, DTYPE), _four_bytes(table, 12, 8, DTYPE),
        )  # fmt: skip
    else:
        return table


@triton.jit
def lookup(words, table, FIELD: tl.constexpr, DTYPE: tl.constexpr):
    """Field number FIELD of int16 words, as values of a table in registers."""
    ASM: tl.constexpr = lookup_asm(FIELD)
    arguments = [words, table[0], table[1], table[2], table[3], table[4], table[5], table[6], table[7]]
    if tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(ASM, "=r" + ",r" * 17, arguments, dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise(ASM, "=r" + ",r" * 17, arguments, dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def field_to_float(
    words, table, FIELD: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr, KIND: tl.constexpr, FORM: tl.constexpr,
    DTYPE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Field number FIELD of each word in DTYPE. FORM: see `code_form`. PTX: words have 16 bits; table is from `open_table`.

    Integers need no integer-to-float cast: `0x6400 | q` is 1024 + q in fp16 and `0x4300 | q` is 128 + q in bf16 (Kim et al.
    2022, "Who says elephants can't run"), so the subtraction that follows is exact.
    """
    CENTRE: tl.constexpr = 1 << (BITS - 1) if FORM == "centred" else 0
    if KIND == "table" and PTX and BITS == 4:
        return lookup(words, table, FIELD, DTYPE)
    elif KIND == "table":
        return tl.load(table + field_bits(words, FIELD, BITS, PLANES).to(tl.int32)).to(DTYPE)
    elif FORM == "float" and PTX and BITS == 4:
        if tl.bfloat16 == DTYPE:  # the builtin accepts a dtype, but not a constexpr of one
            SMALL_BF16: tl.constexpr = small_float_asm(FIELD, KIND, True)
            return tl.inline_asm_elementwise(SMALL_BF16, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
        else:
            SMALL_FP16: tl.constexpr = small_float_asm(FIELD, KIND, False)
            return tl.inline_asm_elementwise(SMALL_FP16, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
    elif FORM == "float":
        return small_to_float(field_bits(words, FIELD, BITS, PLANES), BITS, KIND, DTYPE)
    elif tl.float32 == DTYPE:
        return (field_bits(words, FIELD, BITS, PLANES) - CENTRE).to(tl.float32)
    elif PTX and PLANES:
        return planes_to_float(words, FIELD, BITS, FORM, DTYPE)
    elif PTX:
        if tl.bfloat16 == DTYPE:
            BF16: tl.constexpr = lop3_asm(FIELD, BITS, True, FORM)
            return tl.inline_asm_elementwise(BF16, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
        else:
            FP16: tl.constexpr = lop3_asm(FIELD, BITS, False, FORM)
            return tl.inline_asm_elementwise(FP16, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
    else:
        MAGIC: tl.constexpr = 0x4300 if tl.bfloat16 == DTYPE else 0x6400
        OFFSET: tl.constexpr = magic_number(DTYPE, BITS) + CENTRE
        bits = (field_bits(words, FIELD, BITS, PLANES) | MAGIC).to(tl.int16)
        value = bits.to(DTYPE, bitcast=True)
        return value if FORM == "magic" else value - tl.full([1, 1], OFFSET, DTYPE)


@triton.jit
def field_to_int8(words, FIELD: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr, FORM: tl.constexpr):
    """Field number FIELD of each word as int8, "centred" or "plain"."""
    CENTRE: tl.constexpr = 1 << (BITS - 1) if FORM == "centred" else 0
    return (field_bits(words, FIELD, BITS, PLANES) - CENTRE).to(tl.int8)


@triton.jit
def fp8_to_float(codes, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """uint8 bit patterns of a float8 kind as DTYPE, exactly, including NaN.

    "native e4m3fn" uses the hardware conversion (sm_89 and newer). The others shift the bits into the fields of the wider
    format and correct the exponent bias by multiplying with a power of two, which also normalizes subnormal codes.
    """
    u = codes.to(tl.int16)
    if KIND == "native e4m3fn":
        return codes.to(tl.float8e4nv, bitcast=True).to(DTYPE)
    elif KIND == "e5m2":
        return (u << 8).to(tl.float16, bitcast=True).to(tl.float32).to(DTYPE)
    else:
        magnitude = u & 0x7F
        sign = (u & 0x80) << 8
        if tl.bfloat16 == DTYPE:
            REPAIR: tl.constexpr = 2.0**119 if KIND == "e4m3fnuz" else 2.0**120
            value = (sign | (magnitude << 4)).to(tl.int16).to(tl.bfloat16, bitcast=True)
            value = value * tl.full([1, 1], REPAIR, tl.bfloat16)
        else:
            REPAIR16: tl.constexpr = 128.0 if KIND == "e4m3fnuz" else 256.0
            value = (sign | (magnitude << 7)).to(tl.int16).to(tl.float16, bitcast=True)
            value = (value * tl.full([1, 1], REPAIR16, tl.float16)).to(DTYPE)
        nan = (u & 0xFF) == 0x80 if KIND == "e4m3fnuz" else magnitude == 0x7F
        return tl.where(nan, tl.full([1, 1], float("nan"), DTYPE), value)

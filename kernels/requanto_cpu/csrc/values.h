// Codes of a strip as floats, before the scale: 16 rows a vector, column by column or as pairs of bfloat16.
//
// Included inside the namespace of a level, after its vectors and codes.h. A kind of values has
//   Codes                bits and order of the codes
//   per_quad             vectors that 4 columns become: 4 of float32, 2 of pairs of bfloat16 (columns 0 and 2, 1 and 3)
//   marks, mark(flags, quad)  notes codes that it cannot compute: NaN and infinity of 8-bit floats. The caller computes the strip
//                        again from the values that dequantize.h writes.
#ifndef RQ_VALUES_H
#define RQ_VALUES_H

// While it lives, subnormal numbers are numbers: not zeros, as torch.set_flush_denormal(True) has them.
struct WithSubnormals {
#if defined(__SSE__)
  unsigned saved;
  WithSubnormals() : saved(_mm_getcsr()) { _mm_setcsr(saved & ~0x8040u); }
  ~WithSubnormals() { _mm_setcsr(saved); }
#else
  uint64_t saved;
  WithSubnormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved));
    if (saved & FLUSH) __asm__ volatile("msr fpcr, %0" : : "r"(saved & ~FLUSH));
  }
  ~WithSubnormals() {
    if (saved & FLUSH) __asm__ volatile("msr fpcr, %0" : : "r"(saved));
  }
  static constexpr uint64_t FLUSH = (uint64_t)1 << 24;
#endif
};

#define RQ_INLINE_MEMBER inline __attribute__((always_inline))
#define RQ_LAMBDA_INLINE __attribute__((always_inline))

// The number that a code of an 8-bit float stands for.
static __attribute__((noinline)) float float_of_code(int32_t code, uint8_t byte) {
  const int mantissa = code == RQ_E5M2 ? 2 : 3, bias = code == RQ_E5M2 ? 15 : code == RQ_E4M3 ? 7 : 8;
  const int size = byte & 0x7F, exponent = size >> mantissa, fraction = size & ((1 << mantissa) - 1);
  const uint32_t sign = (uint32_t)(byte & 0x80) << 24;
  if (code == RQ_E4M3FNUZ ? byte == 0x80 : code == RQ_E4M3 ? size == 0x7F : size > 0x7C) return float_of_bits(0x7FC00000u | sign);
  if (code == RQ_E5M2 && size == 0x7C) return float_of_bits(0x7F800000u | sign);
  const int number = exponent ? fraction + (1 << mantissa) : fraction, power = (exponent ? exponent : 1) - bias - mantissa;
  const float value = (float)number * float_of_bits((uint32_t)(127 + power) << 23);
  return sign ? -value : value;
}

// Integers, value by value: subtracting the code of 0 is exact.
template <int BITS> struct Integers {
  typedef Coded<BITS> Codes;
  enum { per_quad = 4, marks = 0 };
  Floats zero;
  explicit Integers(const RqWeight* w, const float*) : zero(splat((float)w->zero_code)) {}
  template <int J> RQ_INLINE_MEMBER Floats value(Bytes quad) const { return to_floats(column<J>(quad)) - zero; }
  void mark(Flags&, Bytes) const {}
};

// Integers and tables of up to 6 bits: the value of a code is looked up. `values`: those of `fill_values`.
template <int BITS> struct Looked_up {
  typedef Coded<BITS> Codes;
  enum { per_quad = 4, marks = 0 };
  Table table;
  explicit Looked_up(const RqWeight*, const float* values) : table(load_table(values)) {}
  template <int J> RQ_INLINE_MEMBER Floats value(Bytes quad) const { return lookup<BITS>(table, from_byte<J>(quad)); }
  void mark(Flags&, Bytes) const {}
};

// 8-bit floats: exponent and mantissa, moved to those of a float32, are a number too small by a power of two. (Codes with
// exponent 0 are subnormal float32 on the way: see WithSubnormals.)
template <int CODE> struct Floats_of_8_bits {
  typedef Coded<8> Codes;
  enum { per_quad = 4, marks = 1, SHIFT = CODE == RQ_E5M2 ? 3 : 4, MASK = CODE == RQ_E5M2 ? (int)0x8FE00000 : (int)0x87F00000 };
  Floats power;
  Bytes mask, special;
  explicit Floats_of_8_bits(const RqWeight*, const float*)
      : power(splat(float_of_bits((uint32_t)(127 + (CODE == RQ_E5M2 ? 112 : CODE == RQ_E4M3 ? 120 : 119)) << 23))),
        mask(splat_byte(CODE == RQ_E5M2 ? 0x7C : CODE == RQ_E4M3 ? 0x7F : 0xFF)),
        special(splat_byte(CODE == RQ_E5M2 ? 0x7C : CODE == RQ_E4M3 ? 0x7F : 0x80)) {}
  template <int J> RQ_INLINE_MEMBER Floats value(Bytes quad) const { return float_of_byte<J, SHIFT, MASK>(quad) * power; }
  RQ_INLINE_MEMBER void mark(Flags& flags, Bytes quad) const { mark_equal(flags, quad & mask, special); }
};

// 8-bit floats one by one, for strips with marked codes.
static __attribute__((noinline)) Floats one_by_one(int32_t code, Bytes lowest) {
  uint8_t bytes[64];
  float floats[16];
  store_bytes(bytes, lowest);
  for (int r = 0; r < 16; ++r) floats[r] = float_of_code(code, bytes[4 * r]);
  return load_floats(floats);
}
struct Exact_floats {
  typedef Coded<8> Codes;
  enum { per_quad = 4, marks = 0 };
  int32_t code;
  explicit Exact_floats(const RqWeight* w) : code(w->code) {}
  template <int J> inline Floats value(Bytes quad) const { return one_by_one(code, down<8 * J>(quad)); }
  void mark(Flags&, Bytes) const {}
};

#if RQ_BF16_DOT
// Values that bfloat16 holds exactly, found by codes of up to 6 bits.
template <int BITS> struct Looked_up_pairs {
  typedef Coded<BITS> Codes;
  enum { per_quad = 2, marks = 0 };
  WordTable table;
  explicit Looked_up_pairs(const RqWeight*, const float* values) : table(load_word_table(values)) {}
  RQ_INLINE_MEMBER void pairs(Bytes quad, Bytes* two) const {
    two[0] = lookup_words<BITS>(table, quad);
    two[1] = lookup_words<BITS>(table, down<8>(quad));
  }
  void mark(Flags&, Bytes) const {}
};

// 8-bit floats, NaN and infinity included; and integers of 7 bits.
template <int CODE> struct Byte_pairs {
  typedef Coded<CODE == RQ_INTEGER ? 7 : 8> Codes;
  enum { per_quad = 2, marks = 0 };
  ByteTables tables;
  explicit Byte_pairs(const RqWeight* w, const float*) {
    float values[128];
    for (int i = 0; i < 128; ++i) values[i] = CODE == RQ_INTEGER ? (float)(i - w->zero_code) : float_of_code(CODE, (uint8_t)i);
    tables = load_byte_tables(values);
  }
  RQ_INLINE_MEMBER void pairs(Bytes quad, Bytes* two) const {
    Bytes low = lookup_low(tables, quad), high = lookup_high(tables, quad);
    if (CODE != RQ_INTEGER) high = high | (quad & splat_byte(0x80));
    if (CODE == RQ_E4M3FNUZ) {  // a negative 0 is NaN
      high = replace_equal(high, quad, 0x80, 0x7F);
      low = replace_equal(low, quad, 0x80, 0xC0);
    }
    join_bytes(low, high, two);
  }
  void mark(Flags&, Bytes) const {}
};
#endif

// Values of all codes of up to 6 bits, repeated to 64.
static void fill_values(const RqWeight* w, float* values) {
  const int mask = w->bits <= 6 ? (1 << w->bits) - 1 : 0;
  for (int i = 0; i < 64 && w->bits <= 6; ++i)
    values[i] = w->code == RQ_TABLE ? w->table[i & mask] : (float)((i & mask) - w->zero_code);
}

template <int BITS, class Use> static int with_codes(const RqWeight* w, const float* values, const Use& use) {
  if constexpr (BITS <= lookup_bits) {
    return use(Looked_up<BITS>(w, values));
  } else {
    if (w->code == RQ_INTEGER) return use(Integers<BITS>(w, values));
    if constexpr (BITS <= 6) return use(Looked_up<BITS>(w, values));
    return RQ_E_ARGUMENT;
  }
}

// Calls `use` with the kind of values that a weight has, in float32 arithmetic.
template <class Use> static int with_floats(const RqWeight* w, const Use& use) {
  float values[64];
  fill_values(w, values);
  switch (w->code) {
    case RQ_E4M3: return use(Floats_of_8_bits<RQ_E4M3>(w, values));
    case RQ_E5M2: return use(Floats_of_8_bits<RQ_E5M2>(w, values));
    case RQ_E4M3FNUZ: return use(Floats_of_8_bits<RQ_E4M3FNUZ>(w, values));
    default: break;
  }
  switch (w->bits) {
    case 1: return with_codes<1>(w, values, use);
    case 2: return with_codes<2>(w, values, use);
    case 3: return with_codes<3>(w, values, use);
    case 4: return with_codes<4>(w, values, use);
    case 5: return with_codes<5>(w, values, use);
    case 6: return with_codes<6>(w, values, use);
    case 7: return with_codes<7>(w, values, use);
    case 8: return with_codes<8>(w, values, use);
    default: return RQ_E_ARGUMENT;
  }
}

#if RQ_BF16_DOT
// True if a bfloat16 holds every value, so that `with_pairs` has a kind for them.
static bool has_pairs(const RqWeight* w) {
  if (w->code != RQ_TABLE) return w->bits <= 7 || w->code != RQ_INTEGER;
  for (int i = 0; i < 1 << w->bits; ++i) {
    uint32_t bits;
    memcpy(&bits, &w->table[i], 4);
    if (bits & 0xFFFF || (bits & 0x7F800000) == 0 ? bits & 0x7FFFFFFF : 0) return false;  // the product takes subnormals as 0
  }
  return true;
}

template <class Use> static int with_pairs(const RqWeight* w, const Use& use) {
  float values[64];
  fill_values(w, values);
  switch (w->code) {
    case RQ_E4M3: return use(Byte_pairs<RQ_E4M3>(w, values));
    case RQ_E5M2: return use(Byte_pairs<RQ_E5M2>(w, values));
    case RQ_E4M3FNUZ: return use(Byte_pairs<RQ_E4M3FNUZ>(w, values));
    default: break;
  }
  switch (w->bits) {
    case 1: return use(Looked_up_pairs<1>(w, values));
    case 2: return use(Looked_up_pairs<2>(w, values));
    case 3: return use(Looked_up_pairs<3>(w, values));
    case 4: return use(Looked_up_pairs<4>(w, values));
    case 5: return use(Looked_up_pairs<5>(w, values));
    case 6: return use(Looked_up_pairs<6>(w, values));
    case 7: return use(Byte_pairs<RQ_INTEGER>(w, values));
    default: return RQ_E_ARGUMENT;
  }
}
#endif
#endif

// What RQ_FLOAT and dequantization need of vectors of a strip, beside simd_avx512.h: floats by code, with AVX-512.
#ifndef RQ_SIMD_FLOAT_H
#define RQ_SIMD_FLOAT_H

// Byte J of each row in the lowest bits; what is above it is not cleared.
template <int J> static inline Ints from_byte(Bytes a) { return {J ? _mm512_srli_epi32(a.v, 8 * J) : a.v}; }
static inline Ints ints_of_bytes(const uint8_t* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))}; }
// 16 codes of a stream of bits: `order` has the 4 bytes of each (those from 16 on are 0), `shift` how far they move down.
static inline Ints unpack16(const uint8_t* p, const uint8_t* order, const int32_t* shift, int mask) {
  const __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
  const __m512i words = _mm512_shuffle_epi8(bytes, _mm512_loadu_si512(order));
  return {_mm512_and_si512(_mm512_srlv_epi32(words, _mm512_loadu_si512(shift)), _mm512_set1_epi32(mask))};
}
// 16 rows of 16 bytes from 4 vectors of 4 bytes a row.
static inline void store_rows(const Bytes* q, uint8_t* out, int64_t stride) {
  const __m512i a = _mm512_unpacklo_epi32(q[0].v, q[1].v), b = _mm512_unpackhi_epi32(q[0].v, q[1].v);
  const __m512i c = _mm512_unpacklo_epi32(q[2].v, q[3].v), d = _mm512_unpackhi_epi32(q[2].v, q[3].v);
  const __m512i rows[4] = {_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c), _mm512_unpacklo_epi64(b, d),
                           _mm512_unpackhi_epi64(b, d)};
  for (int i = 0; i < 4; ++i) {  // rows i, i + 4, i + 8, i + 12
    uint8_t* to = out + i * stride;
    _mm_storeu_si128((__m128i*)to, _mm512_castsi512_si128(rows[i]));
    _mm_storeu_si128((__m128i*)(to + 4 * stride), _mm512_extracti32x4_epi32(rows[i], 1));
    _mm_storeu_si128((__m128i*)(to + 8 * stride), _mm512_extracti32x4_epi32(rows[i], 2));
    _mm_storeu_si128((__m128i*)(to + 12 * stride), _mm512_extracti32x4_epi32(rows[i], 3));
  }
}
static inline Bytes as_bytes(Ints a) { return {a.v}; }

// 64 floats, found by the low BITS bits of an index. The caller repeats tables of fewer than 16 values.
struct Table { __m512 part[4]; };
static inline Table load_table(const float* p) {
  return {{_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16), _mm512_loadu_ps(p + 32), _mm512_loadu_ps(p + 48)}};
}
template <int BITS> static inline Floats lookup(const Table& t, Ints index) {
  if constexpr (BITS <= 4) return {_mm512_permutexvar_ps(index.v, t.part[0])};
  const __m512 low = _mm512_permutex2var_ps(t.part[0], index.v, t.part[1]);
  if constexpr (BITS == 5) return {low};
  const __mmask16 upper = _mm512_test_epi32_mask(index.v, _mm512_set1_epi32(32));
  return {_mm512_mask_blend_ps(upper, low, _mm512_permutex2var_ps(t.part[2], index.v, t.part[3]))};
}
constexpr int lookup_bits = 6;  // tables up to this size are as fast as arithmetic

// Byte J of each row moved to the top, then down by SHIFT with copies of its sign, and masked: the bits of a float32.
template <int J, int SHIFT, int MASK> static inline Floats float_of_byte(Bytes a) {
  const __m512i top = J == 3 ? a.v : _mm512_slli_epi32(a.v, 24 - 8 * J);
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_srai_epi32(top, SHIFT), _mm512_set1_epi32(MASK)))};
}
// Whether bytes were equal, over many vectors.
struct Flags { __mmask64 v; };
static inline Flags no_flags() { return {0}; }
static inline void mark_equal(Flags& f, Bytes a, Bytes b) { f.v = _kor_mask64(f.v, _mm512_cmpeq_epi8_mask(a.v, b.v)); }
static inline bool any(Flags f) { return f.v != 0; }

// Rows of x and strips that a tile of a GEMM keeps its sums of in registers.
enum { TILE_ROWS = 14, TILE_STRIPS = 2 };

#if RQ_BF16_DOT
// Values of 16 bits found by the low BITS bits of each half of a row's 4 bytes (bytes 0 and 2): up to 64 of them.
struct WordTable { __m512i low, high; };
static inline __m512i upper_halves(const float* p) {
  const __m256i a = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_loadu_si512(p), 16));
  const __m256i b = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_loadu_si512(p + 16), 16));
  return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}
static inline WordTable load_word_table(const float* p) { return {upper_halves(p), upper_halves(p + 32)}; }
template <int BITS> static inline Bytes lookup_words(WordTable t, Bytes index) {
  if constexpr (BITS <= 5) return {_mm512_permutexvar_epi16(index.v, t.low)};
  return {_mm512_permutex2var_epi16(t.low, index.v, t.high)};
}
// The two bytes of 128 bfloat16, found by 7 bits of each byte.
struct ByteTables { __m512i low[2], high[2]; };
static inline ByteTables load_byte_tables(const float* p) {
  ByteTables t;
  for (int i = 0; i < 2; ++i, p += 64) {
    const __m512i a = upper_halves(p), b = upper_halves(p + 32);
    t.low[i] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(a)), _mm512_cvtepi16_epi8(b), 1);
    t.high[i] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(_mm512_srli_epi16(a, 8))),
                                   _mm512_cvtepi16_epi8(_mm512_srli_epi16(b, 8)), 1);
  }
  return t;
}
static inline Bytes lookup_low(const ByteTables& t, Bytes index) {
  return {_mm512_permutex2var_epi8(t.low[0], index.v, t.low[1])};
}
static inline Bytes lookup_high(const ByteTables& t, Bytes index) {
  return {_mm512_permutex2var_epi8(t.high[0], index.v, t.high[1])};
}
// `a` with `by` where a byte of `b` is `value`.
static inline Bytes replace_equal(Bytes a, Bytes b, int value, int by) {
  return {_mm512_mask_blend_epi8(_mm512_cmpeq_epi8_mask(b.v, _mm512_set1_epi8((char)value)), a.v, _mm512_set1_epi8((char)by))};
}
// Numbers of 16 bits from their bytes: those of bytes 0 and 2, and of bytes 1 and 3.
static inline void join_bytes(Bytes low, Bytes high, Bytes* two) {
  const __m512i mask = _mm512_set1_epi16(255);
  two[0].v = _mm512_ternarylogic_epi32(mask, low.v, _mm512_slli_epi16(high.v, 8), 0xCA);   // mask ? low : high
  two[1].v = _mm512_ternarylogic_epi32(mask, _mm512_srli_epi16(low.v, 8), high.v, 0xCA);
}
// Pairs of bfloat16, rounded to the nearest even: of each row `first`, then `second`. Subnormal numbers become 0.
static inline Bytes pairs_of(Floats first, Floats second) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second.v, first.v);  // 16 of first, then 16 of second
  const __m512i order = _mm512_add_epi32(_mm512_set1_epi32(0x00100000), _mm512_mullo_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(0x00010001)));
  return {_mm512_permutexvar_epi16(order, both)};
}
#endif
#endif

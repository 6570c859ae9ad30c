// What RQ_FLOAT and dequantization need of vectors of a strip, beside simd_avx2.h: floats by code, with AVX2.
#ifndef RQ_SIMD_FLOAT_H
#define RQ_SIMD_FLOAT_H

// Byte J of each row in the lowest bits; what is above it is not cleared.
template <int J> static inline Ints from_byte(Bytes a) {
  return {J ? _mm256_srli_epi32(a.a, 8 * J) : a.a, J ? _mm256_srli_epi32(a.b, 8 * J) : a.b};
}
static inline Ints ints_of_bytes(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128((const __m128i*)p);
  return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}
// 16 codes of a stream of bits: `order` has the 4 bytes of each (those from 16 on are 0), `shift` how far they move down.
static inline Ints unpack16(const uint8_t* p, const uint8_t* order, const int32_t* shift, int mask) {
  const __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p)), low = _mm256_set1_epi32(mask);
  const __m256i* from = (const __m256i*)order;
  const __m256i* by = (const __m256i*)shift;
  const __m256i a = _mm256_srlv_epi32(_mm256_shuffle_epi8(bytes, _mm256_loadu_si256(from)), _mm256_loadu_si256(by));
  const __m256i b = _mm256_srlv_epi32(_mm256_shuffle_epi8(bytes, _mm256_loadu_si256(from + 1)), _mm256_loadu_si256(by + 1));
  return {_mm256_and_si256(a, low), _mm256_and_si256(b, low)};
}
// 16 rows of 16 bytes from 4 vectors of 4 bytes a row.
static inline void store_8_rows(__m256i q0, __m256i q1, __m256i q2, __m256i q3, uint8_t* out, int64_t stride) {
  const __m256i a = _mm256_unpacklo_epi32(q0, q1), b = _mm256_unpackhi_epi32(q0, q1);
  const __m256i c = _mm256_unpacklo_epi32(q2, q3), d = _mm256_unpackhi_epi32(q2, q3);
  const __m256i rows[4] = {_mm256_unpacklo_epi64(a, c), _mm256_unpackhi_epi64(a, c), _mm256_unpacklo_epi64(b, d),
                           _mm256_unpackhi_epi64(b, d)};
  for (int i = 0; i < 4; ++i) {  // rows i and i + 4
    _mm_storeu_si128((__m128i*)(out + i * stride), _mm256_castsi256_si128(rows[i]));
    _mm_storeu_si128((__m128i*)(out + (i + 4) * stride), _mm256_extracti128_si256(rows[i], 1));
  }
}
static inline void store_rows(const Bytes* q, uint8_t* out, int64_t stride) {
  store_8_rows(q[0].a, q[1].a, q[2].a, q[3].a, out, stride);
  store_8_rows(q[0].b, q[1].b, q[2].b, q[3].b, out + 8 * stride, stride);
}
static inline Bytes as_bytes(Ints a) { return {a.a, a.b}; }

// 64 floats, found by the low BITS bits of an index. The caller repeats tables of fewer than 16 values.
struct Table { __m256 low, high; const float* all; };
static inline Table load_table(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8), p}; }
template <int BITS> static inline __m256 lookup_half(const Table& t, __m256i index) {
  if constexpr (BITS <= 3) return _mm256_permutevar8x32_ps(t.low, index);
  if constexpr (BITS >= 5) return _mm256_i32gather_ps(t.all, _mm256_and_si256(index, _mm256_set1_epi32((1 << BITS) - 1)), 4);
  const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // a blend looks at bit 31
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, index), _mm256_permutevar8x32_ps(t.high, index), upper);
}
template <int BITS> static inline Floats lookup(const Table& t, Ints index) {
  return {lookup_half<BITS>(t, index.a), lookup_half<BITS>(t, index.b)};
}
constexpr int lookup_bits = 3;  // tables up to this size are as fast as arithmetic

// Byte J of each row moved to the top, then down by SHIFT with copies of its sign, and masked: the bits of a float32.
template <int J, int SHIFT, int MASK> static inline __m256 float_of_byte_half(__m256i a) {
  const __m256i top = J == 3 ? a : _mm256_slli_epi32(a, 24 - 8 * J);
  return _mm256_castsi256_ps(_mm256_and_si256(_mm256_srai_epi32(top, SHIFT), _mm256_set1_epi32(MASK)));
}
template <int J, int SHIFT, int MASK> static inline Floats float_of_byte(Bytes a) {
  return {float_of_byte_half<J, SHIFT, MASK>(a.a), float_of_byte_half<J, SHIFT, MASK>(a.b)};
}
// Whether bytes were equal, over many vectors.
struct Flags { __m256i v; };
static inline Flags no_flags() { return {_mm256_setzero_si256()}; }
static inline void mark_equal(Flags& f, Bytes a, Bytes b) {
  f.v = _mm256_or_si256(f.v, _mm256_or_si256(_mm256_cmpeq_epi8(a.a, b.a), _mm256_cmpeq_epi8(a.b, b.b)));
}
static inline bool any(Flags f) { return !_mm256_testz_si256(f.v, f.v); }

// Rows of x and strips that a tile of a GEMM keeps its sums of in registers.
enum { TILE_ROWS = 6, TILE_STRIPS = 1 };
#endif

// What RQ_FLOAT and dequantization need of vectors of a strip, beside simd_avx2.h: floats by code, with AVX2.
#ifndef RQ_SIMD_FLOAT_H
#define RQ_SIMD_FLOAT_H

// Byte J of each row in the lowest bits; what is above it is not cleared.
template <int J> static inline Ints from_byte(Bytes a) {
  return {J ? _mm256_srli_epi32(a.a, 8 * J) : a.a, J ? _mm256_srli_epi32(a.b, 8 * J) : a.b};
}
static inline Bytes as_bytes(Ints a) { return {a.a, a.b}; }
static inline Ints load_ints_of_bytes(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128((const __m128i*)p);
  return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}

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

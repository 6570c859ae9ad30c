// 8 consecutive numbers of x with AVX2 and F16C, for all levels of x86: what quantize.h rounds.
//
// Included inside the namespace of a level, after its vectors.
#ifndef RQ_SIMD_X86_H
#define RQ_SIMD_X86_H

static inline Floats8 load8(const void* p, int32_t dtype) {
  if (dtype == RQ_F32) return {_mm256_loadu_ps((const float*)p)};
  const __m128i half = _mm_loadu_si128((const __m128i*)p);
  if (dtype == RQ_F16) return {_mm256_cvtph_ps(half)};
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
}
static inline Ints8 load8_bytes(const void* p) { return {_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))}; }
static inline Floats8 operator*(Floats8 a, float b) { return {_mm256_mul_ps(a.v, _mm256_set1_ps(b))}; }
// The bits of absolute values, which compare as these do; NaN is the largest.
static inline Ints8 size_bits(Floats8 a) {
  return {_mm256_and_si256(_mm256_castps_si256(a.v), _mm256_set1_epi32(0x7FFFFFFF))};
}
static inline Ints8 larger(Ints8 a, Ints8 b) { return {_mm256_max_epi32(a.v, b.v)}; }
static inline Ints8 operator+(Ints8 a, Ints8 b) { return {_mm256_add_epi32(a.v, b.v)}; }
static inline int32_t largest(Ints8 a) {
  const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xB1)));
}
static inline int32_t total(Ints8 a) {
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xB1)));
}
// To the nearest integer, ties to even.
static inline Ints8 rounded(Floats8 a) { return {_mm256_cvtps_epi32(a.v)}; }
static inline Floats8 clamped(Floats8 a, float least, float most) {
  return {_mm256_max_ps(_mm256_min_ps(a.v, _mm256_set1_ps(most)), _mm256_set1_ps(least))};
}
// Adds, per lane, minus 1 where `a` is not zero, and minus 1 where its code is besides below 128 in size.
static inline void count_coarse(Floats8 a, Ints8 code, Ints8* nonzero, Ints8* coarse) {
  const __m256i is = _mm256_castps_si256(_mm256_cmp_ps(a.v, _mm256_setzero_ps(), _CMP_NEQ_UQ));
  const __m256i small = _mm256_cmpgt_epi32(_mm256_set1_epi32(128), _mm256_abs_epi32(code.v));
  nonzero->v = _mm256_add_epi32(nonzero->v, is);
  coarse->v = _mm256_add_epi32(coarse->v, _mm256_and_si256(is, small));
}
static inline Ints8 zeros8() { return {_mm256_setzero_si256()}; }

// Codes of 32 columns, -128 to 127: 8 pieces of 4 bytes, `stride` bytes apart.
static inline void spread_narrow(const Ints8* code, uint8_t* to, int64_t stride) {
  const __m256i low = _mm256_packs_epi32(code[0].v, code[1].v), high = _mm256_packs_epi32(code[2].v, code[3].v);
  alignas(32) int32_t four[8];  // in the order in which packing within 128 bits leaves them
  _mm256_store_si256((__m256i*)four, _mm256_packs_epi16(low, high));
  for (int q = 0; q < 8; ++q) memcpy(to + q * stride, four + (q / 2 | (q & 1) << 2), 4);
}
// Codes in 16 bits: 8 pieces of 8 bytes, each with columns 0, 2, 1, 3, as `dot_wide` takes them.
static inline void spread_wide(const Ints8* code, uint8_t* to, int64_t stride) {
  for (int half = 0; half < 2; ++half) {
    const __m256i packed = _mm256_packs_epi32(code[2 * half].v, code[2 * half + 1].v);
    alignas(32) int64_t four[4];
    _mm256_store_si256((__m256i*)four, _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(packed, 0xD8), 0xD8));
    for (int q = 0; q < 4; ++q) memcpy(to + (4 * half + q) * stride, four + (q / 2 | (q & 1) << 1), 8);
  }
}
#endif

// Vectors of a strip (16 rows) with AVX2, FMA and F16C: two registers hold 4 bytes, one int32 or one float of each row.
//
// Included inside the namespace of a level. With AVX-VNNI (RQ_VNNI) its dot products are used.
#ifndef RQ_SIMD_H
#define RQ_SIMD_H

struct Bytes { __m256i a, b; };  // of each row 4 bytes (a: rows 0 to 7): columns 4 * q to 4 * q + 3, or 2 numbers of 16 bits
struct Ints { __m256i a, b; };   // of each row an int32
struct Floats { __m256 a, b; };  // of each row a float32
struct Floats8 { __m256 v; };    // 8 consecutive numbers of x
struct Ints8 { __m256i v; };

static inline Bytes load_bytes(const void* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
static inline void store_bytes(void* p, Bytes a) {
  _mm256_storeu_si256((__m256i*)p, a.a);
  _mm256_storeu_si256((__m256i*)p + 1, a.b);
}
static inline Bytes splat_byte(int a) {
  const __m256i v = _mm256_set1_epi8((char)a);
  return {v, v};
}
static inline Bytes splat4(const void* p) {  // the same 4 bytes for each row
  int32_t four;
  memcpy(&four, p, 4);
  const __m256i v = _mm256_set1_epi32(four);
  return {v, v};
}
// Shifts move bits between the bytes of a row; the caller masks them.
template <int N> static inline Bytes down(Bytes a) {
  return N ? Bytes{_mm256_srli_epi32(a.a, N), _mm256_srli_epi32(a.b, N)} : a;
}
template <int N> static inline Bytes up(Bytes a) {
  return N ? Bytes{_mm256_slli_epi32(a.a, N), _mm256_slli_epi32(a.b, N)} : a;
}
static inline Bytes operator&(Bytes a, Bytes b) { return {_mm256_and_si256(a.a, b.a), _mm256_and_si256(a.b, b.b)}; }
static inline Bytes operator|(Bytes a, Bytes b) { return {_mm256_or_si256(a.a, b.a), _mm256_or_si256(a.b, b.b)}; }
static inline Bytes operator^(Bytes a, Bytes b) { return {_mm256_xor_si256(a.a, b.a), _mm256_xor_si256(a.b, b.b)}; }

// table[index] for 16 bytes (`load_table16`) and indices below 16.
static inline Bytes load_table16(const uint8_t* p) {
  const __m256i v = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
  return {v, v};
}
static inline Bytes lookup16(Bytes table, Bytes index) {
  return {_mm256_shuffle_epi8(table.a, index.a), _mm256_shuffle_epi8(table.b, index.b)};
}
// Of 64 bytes, in 4 tables of 16, and indices below 64: bits 4 and 5 choose between what the low 4 find.
static inline __m256i lookup64_half(const Bytes* table, __m256i index) {
  const __m256i low = _mm256_and_si256(index, _mm256_set1_epi8(15));
  const __m256i odd = _mm256_slli_epi32(index, 3), upper = _mm256_slli_epi32(index, 2);  // a blend looks at bit 7
  const __m256i a = _mm256_blendv_epi8(_mm256_shuffle_epi8(table[0].a, low), _mm256_shuffle_epi8(table[1].a, low), odd);
  const __m256i b = _mm256_blendv_epi8(_mm256_shuffle_epi8(table[2].a, low), _mm256_shuffle_epi8(table[3].a, low), odd);
  return _mm256_blendv_epi8(a, b, upper);
}
static inline Bytes lookup64(const Bytes* table, Bytes index) {
  return {lookup64_half(table, index.a), lookup64_half(table, index.b)};
}

static inline Ints splat_int(int32_t a) {
  const __m256i v = _mm256_set1_epi32(a);
  return {v, v};
}
static inline Ints operator+(Ints a, Ints b) { return {_mm256_add_epi32(a.a, b.a), _mm256_add_epi32(a.b, b.b)}; }
// Byte J of each row, as int32.
template <int J> static inline Ints column(Bytes a) {
  if (J == 3) return {_mm256_srli_epi32(a.a, 24), _mm256_srli_epi32(a.b, 24)};
  const __m256i mask = _mm256_set1_epi32(255);
  return {_mm256_and_si256(J ? _mm256_srli_epi32(a.a, 8 * J) : a.a, mask),
          _mm256_and_si256(J ? _mm256_srli_epi32(a.b, 8 * J) : a.b, mask)};
}

static inline Floats to_floats(Ints a) { return {_mm256_cvtepi32_ps(a.a), _mm256_cvtepi32_ps(a.b)}; }
static inline Floats splat(float a) {
  const __m256 v = _mm256_set1_ps(a);
  return {v, v};
}
static inline Floats load_floats(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void store_floats(float* p, Floats a) {
  _mm256_storeu_ps(p, a.a);
  _mm256_storeu_ps(p + 8, a.b);
}
static inline Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
static inline Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.a, b.a), _mm256_sub_ps(a.b, b.b)}; }
static inline Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
static inline Floats fma(Floats a, Floats b, Floats c) {  // a * b + c
  return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)};
}
static inline Floats fnma(Floats a, Floats b, Floats c) {  // c - a * b
  return {_mm256_fnmadd_ps(a.a, b.a, c.a), _mm256_fnmadd_ps(a.b, b.b, c.b)};
}

// A sum that is complete here: compilers turn additions in a row into trees otherwise, whose parts do not fit into registers.
static inline __m256i kept(__m256i sum) {
  __asm__("" : "+x"(sum));
  return sum;
}

// Rows of x and strips whose sums a tile of integers keeps in registers; whether dot products take codes as signed bytes.
enum { INTEGER_ROWS = 4, INTEGER_STRIPS = 1, SIGNED_CODES = 0 };

// Integer dot products: of each row, 4 unsigned bytes of the weight by 4 signed bytes of x, added to a sum.
// `Partial` sums up to `partial_steps(bits)` products of codes below 2^bits by codes of x from -127 to 127, and is then added
// to a sum of 32 bits. 0: sums of two such products do not fit into 16 bits, and x has to be in 16 bits (`dot_wide`).
#if defined(__AVXVNNI__)
#define RQ_VNNI 1
typedef Ints Partial;
constexpr int partial_steps(int) { return 8; }
static inline Partial dot(Partial sum, Bytes w, Bytes x) {
  return {_mm256_dpbusd_avx_epi32(sum.a, w.a, x.a), _mm256_dpbusd_avx_epi32(sum.b, w.b, x.b)};
}
static inline Ints widen(Ints sum, Partial p) { return sum + p; }
#else
#define RQ_VNNI 0
struct Partial { __m256i a, b; };  // of each row 2 sums of 16 bits
constexpr int partial_steps(int bits) { return bits <= 4 ? 8 : bits == 5 ? 4 : bits == 6 ? 2 : bits == 7 ? 1 : 0; }
static inline Partial dot(Partial sum, Bytes w, Bytes x) {
  return {kept(_mm256_add_epi16(sum.a, _mm256_maddubs_epi16(w.a, x.a))),
          kept(_mm256_add_epi16(sum.b, _mm256_maddubs_epi16(w.b, x.b)))};
}
static inline Ints widen(Ints sum, Partial p) {
  const __m256i ones = _mm256_set1_epi16(1);
  return {_mm256_add_epi32(sum.a, _mm256_madd_epi16(p.a, ones)), _mm256_add_epi32(sum.b, _mm256_madd_epi16(p.b, ones))};
}
#endif
static inline Partial no_partial() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }

// x in 16 bits: `even` holds its columns 0 and 2 for the 4 bytes of w, `odd` columns 1 and 3.
static inline __m256i dot_wide_half(__m256i sum, __m256i w, __m256i even, __m256i odd) {
  const __m256i first = _mm256_and_si256(w, _mm256_set1_epi16(255)), second = _mm256_srli_epi16(w, 8);
#if RQ_VNNI
  return _mm256_dpwssd_avx_epi32(_mm256_dpwssd_avx_epi32(sum, first, even), second, odd);
#else
  return kept(_mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(first, even), _mm256_madd_epi16(second, odd))));
#endif
}
static inline Ints dot_wide(Ints sum, Bytes w, Bytes even, Bytes odd) {
  return {dot_wide_half(sum.a, w.a, even.a, odd.a), dot_wide_half(sum.b, w.b, even.b, odd.b)};
}

#define RQ_BF16_DOT 0
#define RQ_TILES 0

// 16 numbers in memory of each float dtype; the first `count` of them.
static inline Floats load_dtype(const void* p, int32_t dtype, int count) {
  uint8_t copy[64] = {0};
  if (count < 16) {
    memcpy(copy, p, (size_t)count * (dtype == RQ_F32 ? 4 : 2));
    p = copy;
  }
  if (dtype == RQ_F32) return load_floats((const float*)p);
  const __m128i* half = (const __m128i*)p;
  const __m128i first = _mm_loadu_si128(half), second = _mm_loadu_si128(half + 1);
  if (dtype == RQ_F16) return {_mm256_cvtph_ps(first), _mm256_cvtph_ps(second)};
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(first), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(second), 16))};
}
// To the nearest bfloat16, ties to even; NaN keeps its upper bits, quiet. In the upper halves of the result.
static inline __m256i rounded_to_bfloat16(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i tie = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), tie);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(up, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan);
}
static inline void store_dtype(void* p, int32_t dtype, int count, Floats a) {
  uint8_t copy[64];
  void* to = count < 16 ? copy : p;
  if (dtype == RQ_F32) {
    store_floats((float*)to, a);
  } else if (dtype == RQ_F16) {
    _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph(a.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i*)to + 1, _mm256_cvtps_ph(a.b, _MM_FROUND_TO_NEAREST_INT));
  } else {
    const __m256i low = _mm256_srli_epi32(rounded_to_bfloat16(a.a), 16), high = _mm256_srli_epi32(rounded_to_bfloat16(a.b), 16);
    // Packing works within 128 bits: 0 to 3, 8 to 11, 4 to 7, 12 to 15 become 0 to 15 by exchanging the middle quarters.
    _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xD8));
  }
  if (count < 16) memcpy(p, copy, (size_t)count * (dtype == RQ_F32 ? 4 : 2));
}
#endif

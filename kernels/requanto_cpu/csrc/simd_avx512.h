// Vectors of a strip (16 rows) with AVX-512: one register holds 4 bytes, one int32 or one float of each row.
//
// Included inside the namespace of a level. RQ_VNNI and RQ_BF16 follow from the flags that its file is compiled with.
#ifndef RQ_SIMD_H
#define RQ_SIMD_H

struct Bytes { __m512i v; };   // of each row 4 bytes: the columns 4 * q to 4 * q + 3, or two numbers of 16 bits
struct Ints { __m512i v; };    // of each row an int32
struct Floats { __m512 v; };   // of each row a float32
struct Floats8 { __m256 v; };  // 8 consecutive numbers of x
struct Ints8 { __m256i v; };

static inline Bytes load_bytes(const void* p) { return {_mm512_loadu_si512(p)}; }
static inline void store_bytes(void* p, Bytes a) { _mm512_storeu_si512(p, a.v); }
static inline Bytes splat_byte(int a) { return {_mm512_set1_epi8((char)a)}; }
static inline Bytes splat4(const void* p) {  // the same 4 bytes for each row
  int32_t four;
  memcpy(&four, p, 4);
  return {_mm512_set1_epi32(four)};
}
// Shifts move bits between the bytes of a row; the caller masks them.
template <int N> static inline Bytes down(Bytes a) { return {N ? _mm512_srli_epi32(a.v, N) : a.v}; }
template <int N> static inline Bytes up(Bytes a) { return {N ? _mm512_slli_epi32(a.v, N) : a.v}; }
static inline Bytes operator&(Bytes a, Bytes b) { return {_mm512_and_si512(a.v, b.v)}; }
static inline Bytes operator|(Bytes a, Bytes b) { return {_mm512_or_si512(a.v, b.v)}; }
static inline Bytes operator^(Bytes a, Bytes b) { return {_mm512_xor_si512(a.v, b.v)}; }

// table[index] for 16 bytes (`load_table16`) and indices below 16.
static inline Bytes load_table16(const uint8_t* p) {
  return {_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p))};
}
static inline Bytes lookup16(Bytes table, Bytes index) { return {_mm512_shuffle_epi8(table.v, index.v)}; }
// Of 64 bytes, in 4 tables of 16, and indices below 64: bits 4 and 5 choose between what the low 4 find.
static inline Bytes lookup64(const Bytes* table, Bytes index) {
  const __m512i low = _mm512_and_si512(index.v, _mm512_set1_epi8(15));
  const __mmask64 odd = _mm512_test_epi8_mask(index.v, _mm512_set1_epi8(16));
  const __mmask64 upper = _mm512_test_epi8_mask(index.v, _mm512_set1_epi8(32));
  const __m512i a = _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(table[0].v, low), odd, table[1].v, low);
  const __m512i b = _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(table[2].v, low), odd, table[3].v, low);
  return {_mm512_mask_blend_epi8(upper, a, b)};
}

static inline Ints splat_int(int32_t a) { return {_mm512_set1_epi32(a)}; }
static inline Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
// Byte J of each row, as int32.
template <int J> static inline Ints column(Bytes a) {
  if (J == 3) return {_mm512_srli_epi32(a.v, 24)};
  return {_mm512_and_si512(J ? _mm512_srli_epi32(a.v, 8 * J) : a.v, _mm512_set1_epi32(255))};
}

static inline Floats to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
static inline Floats splat(float a) { return {_mm512_set1_ps(a)}; }
static inline Floats load_floats(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline void store_floats(float* p, Floats a) { _mm512_storeu_ps(p, a.v); }
static inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }    // a * b + c
static inline Floats fnma(Floats a, Floats b, Floats c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a * b

// A sum that is complete here: compilers turn additions in a row into trees otherwise, whose parts do not fit into registers.
static inline __m512i kept(__m512i sum) {
  __asm__("" : "+v"(sum));
  return sum;
}

// Rows of x and strips whose sums a tile of integers keeps in registers; whether dot products take codes as signed bytes.
enum { INTEGER_ROWS = 6, INTEGER_STRIPS = 2, SIGNED_CODES = 0 };

// Integer dot products: of each row, 4 unsigned bytes of the weight by 4 signed bytes of x, added to a sum.
// `Partial` sums up to `partial_steps(bits)` products of codes below 2^bits by codes of x from -127 to 127, and is then added
// to a sum of 32 bits. 0: sums of two such products do not fit into 16 bits, and x has to be in 16 bits (`dot_wide`).
#if defined(__AVX512VNNI__)
#define RQ_VNNI 1
typedef Ints Partial;
constexpr int partial_steps(int) { return 8; }
static inline Partial no_partial() { return {_mm512_setzero_si512()}; }
static inline Partial dot(Partial sum, Bytes w, Bytes x) { return {_mm512_dpbusd_epi32(sum.v, w.v, x.v)}; }
static inline Ints widen(Ints sum, Partial a) { return sum + a; }
#else
#define RQ_VNNI 0
struct Partial { __m512i v; };  // of each row 2 sums of 16 bits
constexpr int partial_steps(int bits) { return bits <= 4 ? 8 : bits == 5 ? 4 : bits == 6 ? 2 : bits == 7 ? 1 : 0; }
static inline Partial no_partial() { return {_mm512_setzero_si512()}; }
static inline Partial dot(Partial sum, Bytes w, Bytes x) {
  return {kept(_mm512_add_epi16(sum.v, _mm512_maddubs_epi16(w.v, x.v)))};
}
static inline Ints widen(Ints sum, Partial a) {
  return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(a.v, _mm512_set1_epi16(1)))};
}
#endif

// x in 16 bits: `even` holds its columns 0 and 2 for the 4 bytes of w, `odd` columns 1 and 3.
static inline Ints dot_wide(Ints sum, Bytes w, Bytes even, Bytes odd) {
  const __m512i first = _mm512_and_si512(w.v, _mm512_set1_epi16(255)), second = _mm512_srli_epi16(w.v, 8);
#if RQ_VNNI
  return {_mm512_dpwssd_epi32(_mm512_dpwssd_epi32(sum.v, first, even.v), second, odd.v)};
#else
  const __m512i products = _mm512_add_epi32(_mm512_madd_epi16(first, even.v), _mm512_madd_epi16(second, odd.v));
  return {kept(_mm512_add_epi32(sum.v, products))};
#endif
}

// bfloat16: of each row 2 numbers of w by 2 of x, added to a float32 (subnormal numbers count as 0).
#if defined(__AVX512BF16__)
#define RQ_BF16_DOT 1
static inline Floats dot_bfloat16(Floats sum, Bytes w, Bytes x) {
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)w.v, (__m512bh)x.v)};
}
#else
#define RQ_BF16_DOT 0
#endif
#if defined(__AMX_BF16__)
#define RQ_TILES 1
#else
#define RQ_TILES 0
#endif

// 16 numbers in memory of each float dtype; the first `count` of them.
static inline __mmask16 first_rows(int count) { return (__mmask16)((1u << count) - 1); }
static inline Floats load_dtype(const void* p, int32_t dtype, int count) {
  const __mmask16 mask = first_rows(count);
  if (dtype == RQ_F32) return {_mm512_maskz_loadu_ps(mask, p)};
  const __m256i half = _mm256_maskz_loadu_epi16(mask, p);
  if (dtype == RQ_F16) return {_mm512_cvtph_ps(half)};
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
static inline void store_dtype(void* p, int32_t dtype, int count, Floats a) {
  const __mmask16 mask = first_rows(count);
  if (dtype == RQ_F32) return _mm512_mask_storeu_ps(p, mask, a.v);
  if (dtype == RQ_F16) return _mm256_mask_storeu_epi16(p, mask, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
#if defined(__AVX512BF16__)  // the instruction takes subnormal numbers as zeros
  if (!_mm512_fpclass_ps_mask(a.v, 0x20)) return _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh(a.v));
#endif
  const __m512i bits = _mm512_castps_si512(a.v);  // to the nearest bfloat16, ties to even; NaN keeps its upper bits, quiet
  const __m512i tie = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), tie);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i rounded = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_mask_storeu_epi16(p, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
#endif

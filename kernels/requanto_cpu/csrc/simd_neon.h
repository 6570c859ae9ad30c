// Vectors of a strip (16 rows) with NEON: four registers hold 4 bytes, one int32 or one float of each row.
//
// Included inside the namespace of a level. With the dot products of ARMv8.2 (RQ_VNNI) sums of 32 bits are built at once.
#ifndef RQ_SIMD_H
#define RQ_SIMD_H

struct Bytes { uint8x16_t a, b, c, d; };   // of each row 4 bytes (a: rows 0 to 3), or 2 numbers of 16 bits
struct Ints { int32x4_t a, b, c, d; };     // of each row an int32
struct Floats { float32x4_t a, b, c, d; };  // of each row a float32
struct Floats8 { float32x4_t a, b; };      // 8 consecutive numbers of x
struct Ints8 { int32x4_t a, b; };

// The same operation on all four registers.
#define RQ_ONE(f, x) {f(x.a), f(x.b), f(x.c), f(x.d)}
#define RQ_TWO(f, x, y) {f(x.a, y.a), f(x.b, y.b), f(x.c, y.c), f(x.d, y.d)}
#define RQ_THREE(f, x, y, z) {f(x.a, y.a, z.a), f(x.b, y.b, z.b), f(x.c, y.c, z.c), f(x.d, y.d, z.d)}

static inline Bytes load_bytes(const void* p) {
  const uint8_t* from = (const uint8_t*)p;
  return {vld1q_u8(from), vld1q_u8(from + 16), vld1q_u8(from + 32), vld1q_u8(from + 48)};
}
static inline void store_bytes(void* p, Bytes a) {
  uint8_t* to = (uint8_t*)p;
  vst1q_u8(to, a.a);
  vst1q_u8(to + 16, a.b);
  vst1q_u8(to + 32, a.c);
  vst1q_u8(to + 48, a.d);
}
static inline Bytes splat_byte(int a) {
  const uint8x16_t v = vdupq_n_u8((uint8_t)a);
  return {v, v, v, v};
}
static inline Bytes splat4(const void* p) {  // the same 4 bytes for each row
  uint32_t four;
  memcpy(&four, p, 4);
  const uint8x16_t v = vreinterpretq_u8_u32(vdupq_n_u32(four));
  return {v, v, v, v};
}
// Shifts move bits between the bytes of a row; the caller masks them.
template <int N> static inline uint8x16_t down_part(uint8x16_t a) {
  if constexpr (N == 0) return a;
  else return vreinterpretq_u8_u32(vshrq_n_u32(vreinterpretq_u32_u8(a), N));
}
template <int N> static inline uint8x16_t up_part(uint8x16_t a) {
  return vreinterpretq_u8_u32(vshlq_n_u32(vreinterpretq_u32_u8(a), N));
}
template <int N> static inline Bytes down(Bytes a) { return RQ_ONE(down_part<N>, a); }
template <int N> static inline Bytes up(Bytes a) { return RQ_ONE(up_part<N>, a); }
static inline Bytes operator&(Bytes a, Bytes b) { return RQ_TWO(vandq_u8, a, b); }
static inline Bytes operator|(Bytes a, Bytes b) { return RQ_TWO(vorrq_u8, a, b); }
static inline Bytes operator^(Bytes a, Bytes b) { return RQ_TWO(veorq_u8, a, b); }

// table[index] for 16 bytes (`load_table16`) and indices below 16.
static inline Bytes load_table16(const uint8_t* p) {
  const uint8x16_t v = vld1q_u8(p);
  return {v, v, v, v};
}
static inline Bytes lookup16(Bytes table, Bytes index) { return RQ_TWO(vqtbl1q_u8, table, index); }
// Of 64 bytes, in 4 tables of 16, and indices below 64.
static inline Bytes lookup64(const Bytes* table, Bytes index) {
  const uint8x16x4_t all = {{table[0].a, table[1].a, table[2].a, table[3].a}};
  return {vqtbl4q_u8(all, index.a), vqtbl4q_u8(all, index.b), vqtbl4q_u8(all, index.c), vqtbl4q_u8(all, index.d)};
}

static inline Ints splat_int(int32_t a) {
  const int32x4_t v = vdupq_n_s32(a);
  return {v, v, v, v};
}
static inline Ints operator+(Ints a, Ints b) { return RQ_TWO(vaddq_s32, a, b); }
// Byte J of each row, as int32.
template <int J> static inline int32x4_t column_part(uint8x16_t a) {
  const uint32x4_t rows = vreinterpretq_u32_u8(a);
  if constexpr (J == 3) return vreinterpretq_s32_u32(vshrq_n_u32(rows, 24));
  else if constexpr (J == 0) return vreinterpretq_s32_u32(vandq_u32(rows, vdupq_n_u32(255)));
  else return vreinterpretq_s32_u32(vandq_u32(vshrq_n_u32(rows, 8 * J), vdupq_n_u32(255)));
}
template <int J> static inline Ints column(Bytes a) { return RQ_ONE(column_part<J>, a); }

static inline Floats to_floats(Ints a) { return RQ_ONE(vcvtq_f32_s32, a); }
static inline Floats splat(float a) {
  const float32x4_t v = vdupq_n_f32(a);
  return {v, v, v, v};
}
static inline Floats load_floats(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}; }
static inline void store_floats(float* p, Floats a) {
  vst1q_f32(p, a.a);
  vst1q_f32(p + 4, a.b);
  vst1q_f32(p + 8, a.c);
  vst1q_f32(p + 12, a.d);
}
static inline Floats operator+(Floats a, Floats b) { return RQ_TWO(vaddq_f32, a, b); }
static inline Floats operator-(Floats a, Floats b) { return RQ_TWO(vsubq_f32, a, b); }
static inline Floats operator*(Floats a, Floats b) { return RQ_TWO(vmulq_f32, a, b); }
static inline Floats fma(Floats a, Floats b, Floats c) { return RQ_THREE(vfmaq_f32, c, a, b); }   // a * b + c
static inline Floats fnma(Floats a, Floats b, Floats c) { return RQ_THREE(vfmsq_f32, c, a, b); }  // c - a * b

// Integer dot products: of each row, 4 bytes of the weight by 4 signed bytes of x, added to a sum. `Partial` as in simd_avx2.h.
#if defined(__ARM_FEATURE_DOTPROD)
#define RQ_VNNI 1
typedef Ints Partial;
constexpr int partial_steps(int) { return 8; }
static inline int32x4_t dot_part(int32x4_t sum, uint8x16_t w, uint8x16_t x) {
  return vdotq_s32(sum, vreinterpretq_s8_u8(w), vreinterpretq_s8_u8(x));
}
static inline Partial dot(Partial sum, Bytes w, Bytes x) { return RQ_THREE(dot_part, sum, w, x); }
static inline Ints widen(Ints sum, Partial p) { return sum + p; }
static inline Partial no_partial() { return splat_int(0); }
#else
#define RQ_VNNI 0
struct Products { int16x8_t low, high; };       // of 4 rows 4 sums of 16 bits each: products are not added across columns
struct Partial { Products a, b, c, d; };
constexpr int partial_steps(int bits) { return bits <= 5 ? 8 : bits == 6 ? 4 : bits == 7 ? 2 : 1; }
static inline Products dot_part(Products sum, uint8x16_t w, uint8x16_t x) {
  const int8x16_t a = vreinterpretq_s8_u8(w), b = vreinterpretq_s8_u8(x);
  return {vmlal_s8(sum.low, vget_low_s8(a), vget_low_s8(b)), vmlal_high_s8(sum.high, a, b)};
}
static inline Partial dot(Partial sum, Bytes w, Bytes x) { return RQ_THREE(dot_part, sum, w, x); }
static inline int32x4_t widen_part(int32x4_t sum, Products p) {
  return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(p.low), vpaddlq_s16(p.high)));
}
static inline Ints widen(Ints sum, Partial p) { return RQ_TWO(widen_part, sum, p); }
static inline Partial no_partial() {
  const Products none = {vdupq_n_s16(0), vdupq_n_s16(0)};
  return {none, none, none, none};
}
#endif

// x in 16 bits: `even` holds its columns 0 and 2 for the 4 bytes of w, `odd` columns 1 and 3.
static inline int32x4_t dot_wide_part(int32x4_t sum, uint8x16_t w, uint8x16_t even, uint8x16_t odd) {
  const int16x8_t both = vreinterpretq_s16_u8(w), x = vreinterpretq_s16_u8(even), y = vreinterpretq_s16_u8(odd);
  const int16x8_t first = vshrq_n_s16(vshlq_n_s16(both, 8), 8), second = vshrq_n_s16(both, 8);
  const int32x4_t low = vmlal_s16(vmull_s16(vget_low_s16(first), vget_low_s16(x)), vget_low_s16(second), vget_low_s16(y));
  const int32x4_t high = vmlal_high_s16(vmull_high_s16(first, x), second, y);
  return vaddq_s32(sum, vpaddq_s32(low, high));
}
static inline Ints dot_wide(Ints sum, Bytes w, Bytes even, Bytes odd) {
  return {dot_wide_part(sum.a, w.a, even.a, odd.a), dot_wide_part(sum.b, w.b, even.b, odd.b),
          dot_wide_part(sum.c, w.c, even.c, odd.c), dot_wide_part(sum.d, w.d, even.d, odd.d)};
}

#define RQ_BF16_DOT 0
#define RQ_TILES 0

// 16 numbers in memory of each float dtype; the first `count` of them.
static inline float32x4_t of_half(uint16x4_t a) { return vcvt_f32_f16(vreinterpret_f16_u16(a)); }
static inline float32x4_t of_bfloat16(uint16x4_t a) { return vreinterpretq_f32_u32(vshll_n_u16(a, 16)); }
static inline Floats load_dtype(const void* p, int32_t dtype, int count) {
  uint8_t copy[64] = {0};
  if (count < 16) {
    memcpy(copy, p, (size_t)count * (dtype == RQ_F32 ? 4 : 2));
    p = copy;
  }
  if (dtype == RQ_F32) return load_floats((const float*)p);
  const uint16_t* from = (const uint16_t*)p;
  struct { uint16x4_t a, b, c, d; } const halves = {vld1_u16(from), vld1_u16(from + 4), vld1_u16(from + 8), vld1_u16(from + 12)};
  if (dtype == RQ_F16) return RQ_ONE(of_half, halves);
  return RQ_ONE(of_bfloat16, halves);
}
static inline uint16x4_t to_half(float32x4_t a) { return vreinterpret_u16_f16(vcvt_f16_f32(a)); }
// To the nearest, ties to even; NaN keeps its upper bits, quiet.
static inline uint16x4_t to_bfloat16(float32x4_t a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a), tie = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t up = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7FFF)), tie);
  return vshrn_n_u32(vbslq_u32(vceqq_f32(a, a), up, vorrq_u32(bits, vdupq_n_u32(0x400000))), 16);
}
static inline void store_dtype(void* p, int32_t dtype, int count, Floats a) {
  uint8_t copy[64];
  void* to = count < 16 ? copy : p;
  if (dtype == RQ_F32) {
    store_floats((float*)to, a);
  } else {
    uint16_t* half = (uint16_t*)to;
    const bool brain = dtype == RQ_BF16;
    vst1_u16(half, brain ? to_bfloat16(a.a) : to_half(a.a));
    vst1_u16(half + 4, brain ? to_bfloat16(a.b) : to_half(a.b));
    vst1_u16(half + 8, brain ? to_bfloat16(a.c) : to_half(a.c));
    vst1_u16(half + 12, brain ? to_bfloat16(a.d) : to_half(a.d));
  }
  if (count < 16) memcpy(p, copy, (size_t)count * (dtype == RQ_F32 ? 4 : 2));
}

// 8 consecutive numbers of x: what quantize.h rounds (simd_x86.h says what each function does).
static inline Floats8 load8(const void* p, int32_t dtype) {
  if (dtype == RQ_F32) return {vld1q_f32((const float*)p), vld1q_f32((const float*)p + 4)};
  const uint16_t* from = (const uint16_t*)p;
  if (dtype == RQ_F16) return {of_half(vld1_u16(from)), of_half(vld1_u16(from + 4))};
  return {of_bfloat16(vld1_u16(from)), of_bfloat16(vld1_u16(from + 4))};
}
static inline Ints8 load8_bytes(const void* p) {
  const int16x8_t halves = vmovl_s8(vld1_s8((const int8_t*)p));
  return {vmovl_s16(vget_low_s16(halves)), vmovl_s16(vget_high_s16(halves))};
}
static inline Floats8 operator*(Floats8 a, float b) { return {vmulq_n_f32(a.a, b), vmulq_n_f32(a.b, b)}; }
static inline Ints8 size_bits(Floats8 a) {
  const int32x4_t mask = vdupq_n_s32(0x7FFFFFFF);
  return {vandq_s32(vreinterpretq_s32_f32(a.a), mask), vandq_s32(vreinterpretq_s32_f32(a.b), mask)};
}
static inline Ints8 larger(Ints8 a, Ints8 b) { return {vmaxq_s32(a.a, b.a), vmaxq_s32(a.b, b.b)}; }
static inline Ints8 operator+(Ints8 a, Ints8 b) { return {vaddq_s32(a.a, b.a), vaddq_s32(a.b, b.b)}; }
static inline int32_t largest(Ints8 a) { return vmaxvq_s32(vmaxq_s32(a.a, a.b)); }
static inline int32_t total(Ints8 a) { return vaddvq_s32(vaddq_s32(a.a, a.b)); }
static inline Ints8 rounded(Floats8 a) { return {vcvtnq_s32_f32(a.a), vcvtnq_s32_f32(a.b)}; }
static inline Floats8 clamped(Floats8 a, float least, float most) {
  const float32x4_t up = vdupq_n_f32(most), down = vdupq_n_f32(least);
  return {vmaxq_f32(vminq_f32(a.a, up), down), vmaxq_f32(vminq_f32(a.b, up), down)};
}
static inline Ints8 is_nonzero(Floats8 a) {
  return {vreinterpretq_s32_u32(vmvnq_u32(vceqzq_f32(a.a))), vreinterpretq_s32_u32(vmvnq_u32(vceqzq_f32(a.b)))};
}
static inline void count_coarse(Floats8 a, Ints8 code, Ints8* nonzero, Ints8* coarse) {
  const Ints8 is = is_nonzero(a);
  const int32x4_t limit = vdupq_n_s32(128);
  const int32x4_t low = vreinterpretq_s32_u32(vcltq_s32(vabsq_s32(code.a), limit));
  const int32x4_t high = vreinterpretq_s32_u32(vcltq_s32(vabsq_s32(code.b), limit));
  *nonzero = *nonzero + is;
  *coarse = *coarse + Ints8{vandq_s32(is.a, low), vandq_s32(is.b, high)};
}
static inline Ints8 zeros8() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
static inline void spread_narrow(const Ints8* code, uint8_t* to, int64_t stride) {
  for (int i = 0; i < 4; ++i) {
    const int16x8_t halves = vcombine_s16(vqmovn_s32(code[i].a), vqmovn_s32(code[i].b));
    int8_t eight[8];
    vst1_s8(eight, vqmovn_s16(halves));
    memcpy(to + 2 * i * stride, eight, 4);
    memcpy(to + (2 * i + 1) * stride, eight + 4, 4);
  }
}
static inline void spread_wide(const Ints8* code, uint8_t* to, int64_t stride) {
  for (int i = 0; i < 8; ++i) {
    int16_t four[4];
    vst1_s16(four, vqmovn_s32(i & 1 ? code[i / 2].b : code[i / 2].a));
    const int16_t pairs[4] = {four[0], four[2], four[1], four[3]};
    memcpy(to + i * stride, pairs, 8);
  }
}

// Rows of x and strips whose sums a tile of integers keeps in registers; whether dot products take codes as signed bytes.
enum { INTEGER_ROWS = 4, INTEGER_STRIPS = 1, SIGNED_CODES = 1 };
#endif

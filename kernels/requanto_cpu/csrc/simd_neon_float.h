// What RQ_FLOAT and dequantization need of vectors of a strip, beside simd_neon.h: floats by code, with NEON.
#ifndef RQ_SIMD_FLOAT_H
#define RQ_SIMD_FLOAT_H

// Byte J of each row in the lowest bits; what is above it is not cleared.
static inline Ints as_ints(Bytes a) { return RQ_ONE(vreinterpretq_s32_u8, a); }
static inline Bytes as_bytes(Ints a) { return RQ_ONE(vreinterpretq_u8_s32, a); }
template <int J> static inline Ints from_byte(Bytes a) { return as_ints(down<8 * J>(a)); }
static inline Ints ints_of_bytes(const uint8_t* p) {
  const uint8x16_t bytes = vld1q_u8(p);
  const int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(bytes))), high = vreinterpretq_s16_u16(vmovl_high_u8(bytes));
  return {vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)};
}
// 16 codes of a stream of bits: `order` has the 4 bytes of each (those from 16 on are 0), `shift` how far they move down.
static inline int32x4_t unpack4(uint8x16_t bytes, const uint8_t* order, const int32_t* shift, int mask) {
  const uint32x4_t words = vreinterpretq_u32_u8(vqtbl1q_u8(bytes, vld1q_u8(order)));
  return vandq_s32(vreinterpretq_s32_u32(vshlq_u32(words, vnegq_s32(vld1q_s32(shift)))), vdupq_n_s32(mask));
}
static inline Ints unpack16(const uint8_t* p, const uint8_t* order, const int32_t* shift, int mask) {
  const uint8x16_t bytes = vld1q_u8(p);
  return {unpack4(bytes, order, shift, mask), unpack4(bytes, order + 16, shift + 4, mask),
          unpack4(bytes, order + 32, shift + 8, mask), unpack4(bytes, order + 48, shift + 12, mask)};
}
// 16 rows of 16 bytes from 4 vectors of 4 bytes a row.
static inline void store_4_rows(uint8x16_t q0, uint8x16_t q1, uint8x16_t q2, uint8x16_t q3, uint8_t* out, int64_t stride) {
  const uint8x16_t q[4] = {q0, q1, q2, q3};
  uint32_t words[4][4];
  for (int i = 0; i < 4; ++i) vst1q_u32(words[i], vreinterpretq_u32_u8(q[i]));
  for (int r = 0; r < 4; ++r)
    for (int i = 0; i < 4; ++i) memcpy(out + r * stride + 4 * i, &words[i][r], 4);
}
static inline void store_rows(const Bytes* q, uint8_t* out, int64_t stride) {
  store_4_rows(q[0].a, q[1].a, q[2].a, q[3].a, out, stride);
  store_4_rows(q[0].b, q[1].b, q[2].b, q[3].b, out + 4 * stride, stride);
  store_4_rows(q[0].c, q[1].c, q[2].c, q[3].c, out + 8 * stride, stride);
  store_4_rows(q[0].d, q[1].d, q[2].d, q[3].d, out + 12 * stride, stride);
}

// 64 floats, found by the low BITS bits of an index. The caller repeats tables of fewer than 16 values.
struct Table { uint8x16x4_t first; const float* all; };
static inline Table load_table(const float* p) {
  const uint8_t* bytes = (const uint8_t*)p;
  return {{{vld1q_u8(bytes), vld1q_u8(bytes + 16), vld1q_u8(bytes + 32), vld1q_u8(bytes + 48)}}, p};
}
template <int BITS> static inline float32x4_t lookup_part(const Table& t, int32x4_t index) {
  const int32x4_t i = vandq_s32(index, vdupq_n_s32(BITS <= 4 ? 15 : (1 << BITS) - 1));
  if constexpr (BITS <= 4) {  // byte j of a float is byte 4 * i + j of the table
    const int32x4_t bytes = vaddq_s32(vmulq_n_s32(i, 0x04040404), vdupq_n_s32(0x03020100));
    return vreinterpretq_f32_u8(vqtbl4q_u8(t.first, vreinterpretq_u8_s32(bytes)));
  }
  const float four[4] = {t.all[vgetq_lane_s32(i, 0)], t.all[vgetq_lane_s32(i, 1)], t.all[vgetq_lane_s32(i, 2)],
                         t.all[vgetq_lane_s32(i, 3)]};
  return vld1q_f32(four);
}
template <int BITS> static inline Floats lookup(const Table& t, Ints index) {
  return {lookup_part<BITS>(t, index.a), lookup_part<BITS>(t, index.b), lookup_part<BITS>(t, index.c),
          lookup_part<BITS>(t, index.d)};
}
constexpr int lookup_bits = 3;  // tables up to this size are as fast as arithmetic

// Byte J of each row moved to the top, then down by SHIFT with copies of its sign, and masked: the bits of a float32.
template <int J, int SHIFT, int MASK> static inline float32x4_t float_of_byte_part(uint8x16_t a) {
  const int32x4_t top = vshlq_n_s32(vreinterpretq_s32_u8(a), 24 - 8 * J);
  return vreinterpretq_f32_s32(vandq_s32(vshrq_n_s32(top, SHIFT), vdupq_n_s32(MASK)));
}
template <int J, int SHIFT, int MASK> static inline Floats float_of_byte(Bytes a) {
  return {float_of_byte_part<J, SHIFT, MASK>(a.a), float_of_byte_part<J, SHIFT, MASK>(a.b),
          float_of_byte_part<J, SHIFT, MASK>(a.c), float_of_byte_part<J, SHIFT, MASK>(a.d)};
}
// Whether bytes were equal, over many vectors.
struct Flags { uint8x16_t v; };
static inline Flags no_flags() { return {vdupq_n_u8(0)}; }
static inline void mark_equal(Flags& f, Bytes a, Bytes b) {
  const Bytes same = RQ_TWO(vceqq_u8, a, b);
  f.v = vorrq_u8(f.v, vorrq_u8(vorrq_u8(same.a, same.b), vorrq_u8(same.c, same.d)));
}
static inline bool any(Flags f) { return vmaxvq_u8(f.v) != 0; }

// Rows of x and strips that a tile of a GEMM keeps its sums of in registers.
enum { TILE_ROWS = 6, TILE_STRIPS = 1 };
#endif

// Scales and shifts as float32: of a strip (16 rows, group by group) and of a row.
//
// Included inside the namespace of a level, after its intrinsics. The numbers are those of requanto.scales.compact, .blocks and
// tensor.qtensor.scaled_values, bit for bit: weight = scale * code - shift, each operation rounded to float32.
#ifndef RQ_SCALES_H
#define RQ_SCALES_H

enum { RQ_LANES = 16 };

static inline float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// 16 contiguous numbers as float32. Loops over constants, which compilers turn into a few vector instructions.
static inline void floats_of_halves(const uint16_t* from, float* out) {
#if defined(__AVX2__)
  for (int i = 0; i < RQ_LANES; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
#else
  for (int i = 0; i < RQ_LANES; i += 4) vst1q_f32(out + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + i))));
#endif
}

static inline void floats_of_bfloats(const uint16_t* from, float* out) {
  for (int i = 0; i < RQ_LANES; ++i) out[i] = float_of_bits((uint32_t)from[i] << 16);
}

static inline void floats_of_bytes(const uint8_t* from, float* out) {
  for (int i = 0; i < RQ_LANES; ++i) out[i] = (float)(int32_t)from[i];
}

// 2^(code - 127); 255 is NaN and 0 is subnormal.
static inline void floats_of_e8m0(const uint8_t* from, float* out) {
  for (int i = 0; i < RQ_LANES; ++i) {
    uint32_t bits = (uint32_t)from[i] << 23;
    bits = bits == 0 ? 0x00400000u : bits;
    out[i] = float_of_bits(bits == 0x7F800000u ? 0x7FC00000u : bits);
  }
}

// Without subnormal numbers on the way, so that it does not depend on the thread's mode (torch.set_flush_denormal).
static inline void floats_of_e4m3(const uint8_t* from, float* out) {
  for (int i = 0; i < RQ_LANES; ++i) {
    const uint32_t size = from[i] & 0x7F, sign = (uint32_t)(from[i] & 0x80) << 24;
    const float small = float_of_bits((size << 20) + (121u << 23)) - 0.015625f;  // the smallest normal number is 2^-6
    uint32_t bits;
    memcpy(&bits, &small, 4);
    bits = size < 8 ? bits : (size << 20) + (120u << 23);
    bits = size == 0x7F ? 0x7FC00000u : bits;
    out[i] = float_of_bits(bits | sign);
  }
}

// How the stored elements are read: an RqDtype, or one of the codes that stand for a number.
enum { RQ_READ_E8M0 = 16, RQ_READ_E4M3 = 17 };

static inline int64_t part_bytes(int32_t read) { return read == RQ_F32 ? 4 : read == RQ_F16 || read == RQ_BF16 ? 2 : 1; }

// `count` (1 to 16) elements from `base + offset` on, `stride` elements apart, as float32; the others are those of zero bytes. Not
// inlined: it has seven callers, and most of its time is not the call.
static __attribute__((noinline)) void load_parts(const void* base, int32_t read, int64_t offset, int64_t stride, int count, float* out) {
  const int64_t bytes = part_bytes(read);
  const uint8_t* from = (const uint8_t*)base + offset * bytes;
  uint8_t copy[RQ_LANES * 4] = {0};
  if (stride != 1 || count != RQ_LANES) {
    for (int i = 0; i < count; ++i) {  // a constant size at a time, as memcpy of a variable one is a call
      const uint8_t* element = from + i * stride * bytes;
      if (bytes == 4) memcpy(copy + 4 * i, element, 4);
      else if (bytes == 2) memcpy(copy + 2 * i, element, 2);
      else copy[i] = *element;
    }
    from = copy;
  }
  switch (read) {
    case RQ_F32: memcpy(out, from, RQ_LANES * 4); break;
    case RQ_F16: floats_of_halves((const uint16_t*)from, out); break;
    case RQ_BF16: floats_of_bfloats((const uint16_t*)from, out); break;
    case RQ_READ_E8M0: floats_of_e8m0(from, out); break;
    case RQ_READ_E4M3: floats_of_e4m3(from, out); break;
    default: floats_of_bytes(from, out);
  }
}

static inline int32_t read_of(int32_t kind, int32_t dtype) {
  return kind == RQ_E8M0 ? RQ_READ_E8M0 : kind == RQ_E4M3S ? RQ_READ_E4M3 : dtype;
}

// Where a scale or a shift is stored: parts [N, G], or a stream of bits along the groups.
typedef struct Parts {
  const void* base;
  int64_t stride_n, stride_g;
  int32_t read, bits;  // bits of a code in a stream; 8 of all that are no codes
} Parts;

static inline Parts scale_parts(const RqWeight* w) {
  const int32_t read = read_of(w->scale_kind, w->scale_dtype);
  return Parts{w->scale, w->scale_stride_n, w->scale_stride_g, read, read == RQ_U8 ? w->scale_bits : 8};
}

static inline Parts shift_parts(const RqWeight* w) {
  return Parts{w->shift, w->shift_stride_n, w->shift_stride_g, w->shift_dtype, w->shift_dtype == RQ_U8 ? w->shift_bits : 8};
}

// Group g of `count` rows from `first` on.
static inline void load_group(const Parts* p, int64_t first, int64_t g, int count, float* out) {
  const int64_t at = first * p->stride_n;
  if (p->bits == 8) return load_parts(p->base, p->read, at + g * p->stride_g, p->stride_n, count, out);
  const int64_t byte = g * p->bits >> 3;
  const int shift = (int)(g * p->bits & 7), mask = (1 << p->bits) - 1;
  const bool two = shift + p->bits > 8;  // the code goes on in the next byte, which is not read otherwise: there may be none
  const uint8_t* from = (const uint8_t*)p->base + at + byte * p->stride_g;
  uint8_t low[RQ_LANES] = {0}, high[RQ_LANES] = {0};
  if (p->stride_n == 1 && count == RQ_LANES) {
    memcpy(low, from, RQ_LANES);
    if (two) memcpy(high, from + p->stride_g, RQ_LANES);
  } else {
    for (int i = 0; i < count; ++i) low[i] = from[i * p->stride_n];
    if (two)
      for (int i = 0; i < count; ++i) high[i] = from[i * p->stride_n + p->stride_g];
  }
  for (int i = 0; i < RQ_LANES; ++i) out[i] = (float)(((low[i] | high[i] << 8) >> shift) & mask);
}

// `count` groups of row n from g on.
static inline void load_row(const Parts* p, int64_t n, int64_t g, int count, float* out) {
  const int64_t at = n * p->stride_n;
  if (p->bits == 8) return load_parts(p->base, p->read, at + g * p->stride_g, p->stride_g, count, out);
  const uint8_t* from = (const uint8_t*)p->base + at;
  const int mask = (1 << p->bits) - 1;
  for (int i = 0; i < count; ++i) {
    const int64_t bit = (g + i) * p->bits;
    const uint8_t* byte = from + (bit >> 3) * p->stride_g;
    const int shift = (int)(bit & 7), low = *byte, high = shift + p->bits > 8 ? byte[p->stride_g] : 0;
    out[i] = (float)(((low | high << 8) >> shift) & mask);
  }
}

static inline int64_t row_blocks(const RqWeight* w) {
  return w->scale_groups > 0 ? (w->groups + w->scale_groups - 1) / w->scale_groups : 1;
}

static inline void finish_scale(const RqWeight* w, const float* row_scale, float* scale) {
  const float zero = (float)w->scale_zero;
  if (w->scale_kind == RQ_CODES)
    for (int i = 0; i < RQ_LANES; ++i) scale[i] = row_scale[i] * (scale[i] - zero);
  else if (w->scale_kind == RQ_E4M3S && w->row_scale)
    for (int i = 0; i < RQ_LANES; ++i) scale[i] = scale[i] * row_scale[i];
}

static inline void finish_shift(const RqWeight* w, const float* row_shift, const float* scale, float* shift) {
  const float factor = w->shift_factor;
  if (w->shift_kind == RQ_CODES && w->row_shift)
    for (int i = 0; i < RQ_LANES; ++i) shift[i] = row_shift[i] * shift[i];
  else if (w->shift_kind == RQ_CODES)
    for (int i = 0; i < RQ_LANES; ++i) shift[i] = scale[i] * (shift[i] * factor);
}

static inline void clear_after(int count, float* out) {
  for (int i = count; i < RQ_LANES; ++i) out[i] = 0.0f;
}

#if defined(RQ_FLOATS_ONLY)  // the other file of the level compiles them: they take as long as a fifth of its kernels
void strip_scales(const RqWeight* w, int64_t strip, int64_t group_begin, int64_t group_end, float* scale, float* shift);
void row_scales(const RqWeight* w, int64_t n, int64_t group_begin, int64_t group_end, float* scale, float* shift);
#else
#include "scale_orders.h"

// Scale and shift of groups `group_begin` to `group_end` of the 16 rows of a strip: [groups][16] each; rows beyond N get 0.
// `shift` is not written if the weight has none, and may be null then, or to leave out shifts.
__attribute__((noinline)) void strip_scales(const RqWeight* w, int64_t strip, int64_t group_begin, int64_t group_end, float* scale, float* shift) {
  const int64_t first = strip * RQ_LANES, blocks = row_blocks(w);
  const int count = w->rows - first < RQ_LANES ? (int)(w->rows - first) : (int)RQ_LANES;
  const Parts scales = scale_parts(w), shifts = shift_parts(w);
  const bool with_shift = shift && w->shift_kind != RQ_NO_SHIFT;
  strip_parts(&scales, w->rows, w->groups, first, group_begin, group_end, scale);
  if (with_shift) strip_parts(&shifts, w->rows, w->groups, first, group_begin, group_end, shift);
  if (!w->row_scale && !w->row_shift && (!with_shift || w->shift_kind != RQ_CODES)) return;
  float row_scale[RQ_LANES] = {0}, row_shift[RQ_LANES] = {0};
  for (int64_t g = group_begin, block_end = group_begin; g < group_end; ++g, scale += RQ_LANES) {
    if (g == block_end) {
      const int64_t block = w->scale_groups > 0 ? g / w->scale_groups : 0;
      block_end = w->scale_groups > 0 ? (block + 1) * w->scale_groups : group_end;
      if (w->row_scale) load_parts(w->row_scale, w->row_dtype, first * blocks + block, blocks, count, row_scale);
      if (w->row_shift) load_parts(w->row_shift, w->row_dtype, first * blocks + block, blocks, count, row_shift);
    }
    finish_scale(w, row_scale, scale);
    if (!with_shift) continue;
    finish_shift(w, row_shift, scale, shift);
    shift += RQ_LANES;
  }
}

// The same of one row n: [groups] each, with room for a multiple of 16 groups.
__attribute__((noinline)) void row_scales(const RqWeight* w, int64_t n, int64_t group_begin, int64_t group_end, float* scale, float* shift) {
  const int64_t blocks = row_blocks(w), groups_of_block = w->scale_groups > 0 ? w->scale_groups : w->groups;
  const Parts scales = scale_parts(w), shifts = shift_parts(w);
  const bool with_shift = shift && w->shift_kind != RQ_NO_SHIFT;
  for (int64_t g = group_begin; g < group_end; g += RQ_LANES, scale += RQ_LANES) {
    const int count = group_end - g < RQ_LANES ? (int)(group_end - g) : (int)RQ_LANES;
    float row_scale[RQ_LANES] = {0}, row_shift[RQ_LANES] = {0}, number[RQ_LANES];
    for (int i = 0; i < count && (w->row_scale || w->row_shift);) {
      const int64_t block = (g + i) / groups_of_block, left = (block + 1) * groups_of_block - g;
      const int end = left < count ? (int)left : count, begin = i;
      if (w->row_scale) load_parts(w->row_scale, w->row_dtype, n * blocks + block, 0, 1, number);
      for (i = begin; w->row_scale && i < end; ++i) row_scale[i] = number[0];
      if (w->row_shift) load_parts(w->row_shift, w->row_dtype, n * blocks + block, 0, 1, number);
      for (i = begin; w->row_shift && i < end; ++i) row_shift[i] = number[0];
      i = end;
    }
    load_row(&scales, n, g, count, scale);
    finish_scale(w, row_scale, scale);
    if (!with_shift) continue;
    load_row(&shifts, n, g, count, shift);
    finish_shift(w, row_shift, scale, shift);
    shift += RQ_LANES;
  }
}
#endif
#endif

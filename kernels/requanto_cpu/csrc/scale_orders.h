// Scales (or shifts) of a strip in the orders that weights have: those of 16 rows side by side, or each row's side by side.
//
// Included in scales.h. The second order is that of checkpoints, and the faster one: scales of a strip are consecutive bytes,
// which the processor fetches ahead, while in the first each group lies N elements further, in another page of memory.
#ifndef RQ_SCALE_ORDERS_H
#define RQ_SCALE_ORDERS_H

// `groups` groups of 16 rows whose elements are contiguous: a vector of elements every `step` bytes.
static __attribute__((noinline)) void contiguous_parts(const uint8_t* from, int64_t step, int32_t read, int64_t groups, float* out) {
  float* const end = out + groups * RQ_LANES;
  switch (read) {
    case RQ_F32:
      for (; out < end; out += RQ_LANES, from += step) memcpy(out, from, RQ_LANES * 4);
      break;
    case RQ_F16:
      for (; out < end; out += RQ_LANES, from += step) floats_of_halves((const uint16_t*)from, out);
      break;
    case RQ_BF16:
      for (; out < end; out += RQ_LANES, from += step) floats_of_bfloats((const uint16_t*)from, out);
      break;
    case RQ_READ_E8M0:
      for (; out < end; out += RQ_LANES, from += step) floats_of_e8m0(from, out);
      break;
    case RQ_READ_E4M3:
      for (; out < end; out += RQ_LANES, from += step) floats_of_e4m3(from, out);
      break;
    default:
      for (; out < end; out += RQ_LANES, from += step) floats_of_bytes(from, out);
  }
}

// 8 numbers of 16 bits of each of 16 rows, which begin `step` bytes apart: those of the rows, number by number.
static inline void transpose_words(const uint8_t* from, int64_t step, uint16_t (*out)[RQ_LANES]) {
#if defined(__AVX2__)
  __m256i v[8], t[8];
  for (int i = 0; i < 8; ++i) {
    const __m128i low = _mm_loadu_si128((const __m128i*)(from + i * step));
    v[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), _mm_loadu_si128((const __m128i*)(from + (i + 8) * step)), 1);
  }
  for (int i = 0; i < 4; ++i) {  // words of rows 2 * i and 2 * i + 1 side by side: columns 0 to 3, 4 to 7
    t[i] = _mm256_unpacklo_epi16(v[2 * i], v[2 * i + 1]);
    t[i + 4] = _mm256_unpackhi_epi16(v[2 * i], v[2 * i + 1]);
  }
  for (int h = 0; h < 8; h += 4) {  // of 4 rows: two columns in each of v[h] and v[h + 1], of the other rows in the next two
    v[h] = _mm256_unpacklo_epi32(t[h], t[h + 1]);
    v[h + 1] = _mm256_unpackhi_epi32(t[h], t[h + 1]);
    v[h + 2] = _mm256_unpacklo_epi32(t[h + 2], t[h + 3]);
    v[h + 3] = _mm256_unpackhi_epi32(t[h + 2], t[h + 3]);
  }
  for (int h = 0; h < 8; h += 4) {
    for (int i = 0; i < 2; ++i) {
      _mm256_storeu_si256((__m256i*)out[h + 2 * i], _mm256_unpacklo_epi64(v[h + i], v[h + i + 2]));
      _mm256_storeu_si256((__m256i*)out[h + 2 * i + 1], _mm256_unpackhi_epi64(v[h + i], v[h + i + 2]));
    }
  }
#else
  for (int i = 0; i < RQ_LANES; ++i)
    for (int j = 0; j < 8; ++j) memcpy(&out[j][i], from + i * step + 2 * j, 2);
#endif
}

// 8 groups of 16 rows whose groups are contiguous, read as a whole: rows begin `step` bytes apart.
static inline void transposed_parts(const uint8_t* from, int64_t step, int32_t read, int32_t bits, float* out) {
  if (read == RQ_F32) {
    for (int i = 0; i < RQ_LANES; ++i)
      for (int j = 0; j < 8; ++j) memcpy(out + j * RQ_LANES + i, from + i * step + 4 * j, 4);
    return;
  }
  uint16_t words[8][RQ_LANES];
  if (read == RQ_F16 || read == RQ_BF16) {
    transpose_words(from, step, words);
    if (read == RQ_F16)
      for (int j = 0; j < 8; ++j) floats_of_halves(words[j], out + j * RQ_LANES);
    else
      for (int j = 0; j < 8; ++j) floats_of_bfloats(words[j], out + j * RQ_LANES);
    return;
  }
  uint16_t codes[RQ_LANES][8];
  const uint64_t mask = (1u << bits) - 1;
  for (int i = 0; i < RQ_LANES; ++i) {
    uint64_t eight;
    memcpy(&eight, from + i * step, 8);
    for (int j = 0; j < 8; ++j) codes[i][j] = (uint16_t)(eight >> (j * bits) & mask);
  }
  transpose_words((const uint8_t*)codes, sizeof codes[0], words);
  for (int j = 0; j < 8; ++j, out += RQ_LANES) {
    uint8_t column[RQ_LANES];
    for (int i = 0; i < RQ_LANES; ++i) column[i] = (uint8_t)words[j][i];
    if (read == RQ_READ_E8M0) floats_of_e8m0(column, out);
    else if (read == RQ_READ_E4M3) floats_of_e4m3(column, out);
    else floats_of_bytes(column, out);
  }
}

// The same of the last `count` rows: nothing is read beyond the `left` bytes of the last of them.
static void last_transposed_parts(const uint8_t* from, int64_t step, int64_t left, const Parts* p, int count, float* out) {
  uint8_t copy[RQ_LANES][32] = {{0}};
  for (int i = 0; i < count; ++i) memcpy(copy[i], from + i * step, (size_t)(left < 32 ? left : 32));
  transposed_parts(copy[0], sizeof copy[0], p->read, p->bits, out);
}

// Groups `begin` to `end` of the rows of a strip, whose groups are contiguous.
static __attribute__((noinline)) void row_major_parts(const Parts* p, int64_t rows, int64_t groups, int64_t first, int64_t begin, int64_t end, float* out) {
  const int64_t bytes = part_bytes(p->read), step = p->stride_n * bytes;
  const int64_t row_bytes = p->bits == 8 ? groups * bytes : (groups * p->bits + 7) / 8;
  const uint8_t* from = (const uint8_t*)p->base + first * step;
  // A whole load reads beyond the groups of a row, but not beyond the next strip's, of at least 16 bytes of codes or 32 others.
  const bool last = first + 2 * RQ_LANES > rows || step < row_bytes;
  for (int64_t g = begin & ~(int64_t)7; g < end; g += 8) {
    const int64_t at = p->bits == 8 ? g * bytes : g / 8 * p->bits, start = g < begin ? begin : g, stop = g + 8 < end ? g + 8 : end;
    const bool whole = start == g && stop == g + 8;
    float eight[8 * RQ_LANES];
    float* into = whole ? out + (g - begin) * RQ_LANES : eight;
    const int count = rows - first < RQ_LANES ? (int)(rows - first) : (int)RQ_LANES;
    if (last) last_transposed_parts(from + at, step, row_bytes - at, p, count, into);
    else transposed_parts(from + at, step, p->read, p->bits, into);
    if (!whole) memcpy(out + (start - begin) * RQ_LANES, eight + (start - g) * RQ_LANES, (size_t)(stop - start) * RQ_LANES * 4);
  }
}

// Parts of groups `begin` to `end` of the rows of a strip from `first` on, of `rows` and `groups` in all; rows beyond are 0.
static void strip_parts(const Parts* p, int64_t rows, int64_t groups, int64_t first, int64_t begin, int64_t end, float* out) {
  const int count = rows - first < RQ_LANES ? (int)(rows - first) : (int)RQ_LANES;
  if (p->bits == 8 && p->stride_n == 1 && count == RQ_LANES) {
    const int64_t bytes = part_bytes(p->read);
    const uint8_t* from = (const uint8_t*)p->base + (first + begin * p->stride_g) * bytes;
    contiguous_parts(from, p->stride_g * bytes, p->read, end - begin, out);
    return;
  }
  if (p->stride_g == 1 && groups > 1) {
    row_major_parts(p, rows, groups, first, begin, end, out);
  } else {
    for (int64_t g = begin; g < end; ++g) load_group(p, first, g, count, out + (g - begin) * RQ_LANES);
  }
  if (count == RQ_LANES) return;
  for (int64_t g = begin; g < end; ++g, out += RQ_LANES) clear_after(count, out);
}
#endif

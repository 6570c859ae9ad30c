// Weights as floats, row by row: of strips and of plain rows.
//
// Included inside the namespace of a level, after values.h. A few hundred columns at a time, which stay in the first cache: codes of
// 8 bits (of strips: 16 rows by transposing vectors), their values, and these times the scale minus the shift, rounded to float32
// each and to the result's dtype, as requanto.tensor.qtensor.scaled_values has it.
#ifndef RQ_DEQUANTIZE_H
#define RQ_DEQUANTIZE_H

enum { PIECE = 512 };  // columns at a time

// How 16 codes of a stream of bits are found (`unpack16`).
typedef struct Unpacking {
  uint8_t order[64];
  int32_t shift[16];
  int32_t mask;
} Unpacking;

static Unpacking unpacking(int bits) {
  Unpacking u;
  for (int i = 0; i < 16; ++i) {
    const int byte = i * bits / 8;
    u.order[4 * i] = (uint8_t)byte;
    u.order[4 * i + 1] = byte < 15 ? (uint8_t)(byte + 1) : 0x80;
    u.order[4 * i + 2] = u.order[4 * i + 3] = 0x80;
    u.shift[i] = i * bits % 8;
  }
  u.mask = (1 << bits) - 1;
  return u;
}

// Values of `count` codes (room for a multiple of 16) from a stream of bits, of which `bytes` bytes may be read.
template <class V> static bool values_of_stream(const V& values, const Unpacking& u, int bits, const uint8_t* from, int64_t bytes,
                                                int flip, int64_t count, float* out) {
  const Bytes flipped = as_bytes(splat_int(flip));
  Flags flags = no_flags();
  const auto write = [&](int64_t i, Ints codes) RQ_LAMBDA_INLINE {
    const Bytes quad = as_bytes(codes) ^ flipped;
    values.mark(flags, quad);
    store_floats(out + i, values.template value<0>(quad));
  };
  int64_t i = 0;
  if (bits == 8)
    for (; i < count && bytes >= 16; i += 16, from += 16, bytes -= 16) write(i, ints_of_bytes(from));
  for (; i < count && bytes >= 16; i += 16, from += 2 * bits, bytes -= 2 * bits) write(i, unpack16(from, u.order, u.shift, u.mask));
  for (; i < count; i += 16, from += 2 * bits, bytes -= 2 * bits) {  // the last bytes of a row: none behind them is read
    uint8_t copy[16] = {0};
    memcpy(copy, from, (size_t)bytes);
    write(i, unpack16(copy, u.order, u.shift, u.mask));
  }
  return any(flags);
}

// How codes become values. Only this is compiled for each kind of values.
typedef struct Decoder Decoder;
struct Decoder {
  const RqWeight* w;
  Unpacking u;
  int bits, flip;  // of a code in the stream; what its bits are exchanged by
  const void* values;
  void (*write)(const Decoder& d, const uint8_t* from, int64_t bytes, int64_t count, float* out);
};

// The same one by one, for codes that were marked and for tables of more than 6 bits (in whole bytes: of 8 bits).
static void values_one_by_one(const Decoder& d, const uint8_t* from, int64_t bytes, int64_t count, float* out) {
  const RqWeight* w = d.w;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t byte = i * d.bits / 8;
    const int low = from[byte], high = byte + 1 < bytes ? from[byte + 1] : 0;
    const int code = ((low | high << 8) >> (i * d.bits % 8)) & d.u.mask;
    out[i] = w->code == RQ_TABLE ? w->table[code] : float_of_code(w->code, (uint8_t)code);
  }
}

template <class V> static void values_of_piece(const Decoder& d, const uint8_t* from, int64_t bytes, int64_t count, float* out) {
  const V& values = *(const V*)d.values;
  if (values_of_stream(values, d.u, d.bits, from, bytes, d.flip, count, out)) values_one_by_one(d, from, bytes, count, out);
}

// Scale and shift of a row or of a strip: those of group g are at g * step.
typedef struct Scaled {
  const float *scale, *shift;  // of the piece's first group; shift: null if there is none
  int64_t step;
} Scaled;

// `count` values in groups of `group` columns, a multiple of 16, of which the first has `left` columns left; or one group.
template <int DTYPE> static void write_groups(const float* values, int64_t count, int64_t left, int64_t group, Scaled s, uint8_t* out) {
  constexpr int64_t bytes = DTYPE == RQ_F32 ? 4 : 2;
  for (int64_t i = 0; i < count; left = group, s.scale += s.step) {
    const int64_t stop = left < count - i ? i + left : count;
    const Floats one = splat(*s.scale);
    if (s.shift) {
      const Floats low = splat(*s.shift);
      s.shift += s.step;
      for (; i + 16 <= stop; i += 16) store_dtype(out + i * bytes, DTYPE, 16, load_floats(values + i) * one - low);
      if (i < stop) store_dtype(out + i * bytes, DTYPE, (int)(stop - i), load_floats(values + i) * one - low);
    } else {
      for (; i + 16 <= stop; i += 16) store_dtype(out + i * bytes, DTYPE, 16, load_floats(values + i) * one);
      if (i < stop) store_dtype(out + i * bytes, DTYPE, (int)(stop - i), load_floats(values + i) * one);
    }
    i = stop;
  }
}

// `count` values with a scale and a shift (or null) for each.
template <int DTYPE> static void write_each(const float* values, int64_t count, const float* scale, const float* shift, uint8_t* out) {
  for (int64_t i = 0; i < count; i += 16) {
    Floats value = load_floats(values + i) * load_floats(scale + i);
    if (shift) value = value - load_floats(shift + i);
    store_dtype(out + i * (DTYPE == RQ_F32 ? 4 : 2), DTYPE, count - i < 16 ? (int)(count - i) : 16, value);
  }
}

// Columns `begin` to `end` of a row, from their values.
static void write_piece(const RqWeight* w, const float* values, int64_t begin, int64_t end, Scaled s, int32_t dtype, uint8_t* out) {
  const int64_t count = end - begin, first = begin / w->group;
  int64_t group_end = (first + 1) * w->group;
  if (w->groups == 1 || w->group % 16 == 0) {  // (pieces begin at multiples of 32)
    const auto write = dtype == RQ_F32 ? write_groups<RQ_F32> : dtype == RQ_F16 ? write_groups<RQ_F16> : write_groups<RQ_BF16>;
    return write(values, count, group_end - begin, w->group, s, out);
  }
  float scale[PIECE], shift[PIECE];
  for (int64_t i = 0; i < count; ++i) {
    if (begin + i == group_end) {
      group_end += w->group;
      s.scale += s.step;
      if (s.shift) s.shift += s.step;
    }
    scale[i] = *s.scale;
    if (s.shift) shift[i] = *s.shift;
  }
  for (int64_t i = count; i % 16; ++i) scale[i] = shift[i] = 0.0f;
  const auto write = dtype == RQ_F32 ? write_each<RQ_F32> : dtype == RQ_F16 ? write_each<RQ_F16> : write_each<RQ_BF16>;
  write(values, count, scale, s.shift ? shift : nullptr, out);
}

// A row of plain codes, or of one byte a code.
static void write_row(const Decoder& d, const uint8_t* row, int64_t row_bytes, int64_t n, int32_t dtype, uint8_t* out) {
  const RqWeight* w = d.w;
  float numbers[PIECE + 16], scale[PIECE + 32], shift[PIECE + 32];
  const int64_t bytes = dtype == RQ_F32 ? 4 : 2;
  for (int64_t begin = 0; begin < w->length; begin += PIECE) {
    const int64_t end = begin + PIECE < w->length ? begin + PIECE : w->length, at = begin * d.bits / 8;
    d.write(d, row + at, row_bytes - at, end - begin, numbers);
    row_scales(w, n, begin / w->group, (end + w->group - 1) / w->group, scale, shift);
    write_piece(w, numbers, begin, end, Scaled{scale, w->shift_kind == RQ_NO_SHIFT ? nullptr : shift, 1}, dtype, out + begin * bytes);
  }
}

// All units of `begin` to `end` of a strip as rows of bytes.
template <int BITS> static void bytes_of_strip(const uint8_t* unit, int64_t units, uint8_t* out, int64_t stride) {
  typedef Coded<BITS> C;
  for (int64_t i = 0; i < units; ++i, unit += C::bytes, out += RQ_COLUMNS) {
    const Bytes low[4] = {C::template at<0>(unit), C::template at<1>(unit), C::template at<2>(unit), C::template at<3>(unit)};
    store_rows(low, out, stride);
    const Bytes high[4] = {C::template at<4>(unit), C::template at<5>(unit), C::template at<6>(unit), C::template at<7>(unit)};
    store_rows(high, out + 16, stride);
  }
}
typedef void (*BytesOfStrip)(const uint8_t* unit, int64_t units, uint8_t* out, int64_t stride);
static BytesOfStrip bytes_of_strip_for(int bits) {
  static constexpr BytesOfStrip all[] = {bytes_of_strip<1>, bytes_of_strip<2>, bytes_of_strip<3>, bytes_of_strip<4>,
                                         bytes_of_strip<5>, bytes_of_strip<6>, bytes_of_strip<7>, bytes_of_strip<8>};
  return all[bits - 1];
}

// Row r of a strip, as one byte a code: 4 bytes of each vector.
static void bytes_of_row(const uint8_t* unit, int bits, int64_t units, int r, uint8_t* out) {
  for (int64_t i = 0; i < units; ++i, out += RQ_COLUMNS) {
    uint32_t quads[8] = {0};
    int low = 0;
    for (int width = 8; width; width /= 2) {
      if (!(bits & width)) continue;
      const int per = 8 / width;
      const uint32_t mask = 0x01010101u * ((1u << width) - 1);
      for (int v = 0; v < width; ++v, unit += 64) {
        uint32_t four;
        memcpy(&four, unit + 4 * r, 4);
        for (int t = 0; t < per; ++t) quads[v * per + t] |= (four >> width * t & mask) << low;
      }
      low += width;
    }
    memcpy(out, quads, RQ_COLUMNS);
  }
}

// Rows `first` to `last` of a strip (0 to 16); `out` is that of the first.
static void write_strip(const Decoder& d, int64_t strip, int first, int last, int32_t dtype, uint8_t* out,
                                           int64_t row_bytes) {
  const RqWeight* w = d.w;
  uint8_t codes[16 * PIECE];
  float numbers[PIECE + 16], scale[(PIECE / 8 + 2) * 16], shift[(PIECE / 8 + 2) * 16];
  const int64_t units = (w->length + RQ_COLUMNS - 1) / RQ_COLUMNS, bytes = dtype == RQ_F32 ? 4 : 2;
  const BytesOfStrip unpack = bytes_of_strip_for(w->bits);
  for (int64_t begin = 0; begin < w->length; begin += PIECE) {
    const int64_t end = begin + PIECE < w->length ? begin + PIECE : w->length;
    unpack(w->codes + (strip * units + begin / RQ_COLUMNS) * w->bits * 64, (end - begin + RQ_COLUMNS - 1) / RQ_COLUMNS, codes, PIECE);
    strip_scales(w, strip, begin / w->group, (end + w->group - 1) / w->group, scale, shift);
    for (int r = first; r < last; ++r) {
      d.write(d, codes + r * PIECE, PIECE, end - begin, numbers);
      write_piece(w, numbers, begin, end, Scaled{scale + r, w->shift_kind == RQ_NO_SHIFT ? nullptr : shift + r, 16}, dtype,
                  out + (r - first) * row_bytes + begin * bytes);
    }
  }
}

// Row n alone.
static void write_row_of_strip(const Decoder& d, int64_t units, int64_t n, int32_t dtype, uint8_t* out) {
  const RqWeight* w = d.w;
  uint8_t codes[PIECE];
  float numbers[PIECE + 16], scale[PIECE / 8 + 32], shift[PIECE / 8 + 32];
  const int64_t bytes = dtype == RQ_F32 ? 4 : 2;
  for (int64_t begin = 0; begin < w->length; begin += PIECE) {
    const int64_t end = begin + PIECE < w->length ? begin + PIECE : w->length;
    const uint8_t* unit = w->codes + (n / RQ_ROWS * units + begin / RQ_COLUMNS) * w->bits * 64;
    bytes_of_row(unit, w->bits, (end - begin + RQ_COLUMNS - 1) / RQ_COLUMNS, (int)(n % RQ_ROWS), codes);
    d.write(d, codes, PIECE, end - begin, numbers);
    row_scales(w, n, begin / w->group, (end + w->group - 1) / w->group, scale, shift);
    write_piece(w, numbers, begin, end, Scaled{scale, w->shift_kind == RQ_NO_SHIFT ? nullptr : shift, 1}, dtype, out + begin * bytes);
  }
}

// Calls `use` with the decoder of a stream of `bits` bits.
template <class V, class Use> static int use_decoder(const V& values, Decoder& d, const Use& use) {
  d.values = &values;
  d.write = values_of_piece<V>;
  use(d);
  return 0;
}
template <class Use> static int with_decoder(const RqWeight* w, int bits, int flip, const Use& use) {
  Decoder d = {w, unpacking(bits), bits, flip, nullptr, values_one_by_one};
  if (w->code == RQ_TABLE && w->bits > 6) return use(d), 0;
  return with_floats(w, [&](const auto& values) { return use_decoder(values, d, use); });
}

static inline bool wrong_rows(const RqWeight* w, int32_t dtype) {
  return w->bits < 1 || w->bits > 8 || (dtype != RQ_F32 && dtype != RQ_F16 && dtype != RQ_BF16) || (w->length && w->group < 1);
}

// Looked-up rows are anywhere in memory: what row n needs is fetched while FETCH_ROWS rows before it are computed.
enum { FETCH_ROWS = 6 };
static inline void fetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const uint8_t*)from + i, 0, 2);
  if (bytes > 0) __builtin_prefetch((const uint8_t*)from + bytes - 1, 0, 2);
}
static inline void fetch_part(const Parts& p, int64_t groups, int64_t n) {
  if (p.stride_g != 1) return;
  fetch((const uint8_t*)p.base + n * p.stride_n * part_bytes(p.read), (groups * p.bits * part_bytes(p.read) + 7) / 8);
}
static void fetch_scales(const RqWeight* w, int64_t n) {
  const int64_t blocks = row_blocks(w), bytes = w->row_dtype == RQ_F32 ? 4 : 2;
  fetch_part(scale_parts(w), w->groups, n);
  if (w->shift_kind != RQ_NO_SHIFT) fetch_part(shift_parts(w), w->groups, n);
  if (w->row_scale) fetch((const uint8_t*)w->row_scale + n * blocks * bytes, blocks * bytes);
  if (w->row_shift) fetch((const uint8_t*)w->row_shift + n * blocks * bytes, blocks * bytes);
}

// Fetches what rows index[*ahead] to index[i + FETCH_ROWS] need. `bytes`: of the codes of `per` rows.
static inline void fetch_rows(const RqWeight* w, const int64_t* index, int64_t i, int64_t end, int64_t per, int64_t bytes, int64_t* ahead) {
  for (; *ahead < end && *ahead <= i + FETCH_ROWS; ++*ahead) {
    fetch(w->codes + index[*ahead] / per * bytes, bytes);
    fetch_scales(w, index[*ahead]);
  }
}

static int strips_to_rows(const RqWeight* w, int64_t start, int64_t stop, const int64_t* index, void* out, int32_t dtype, int64_t out_stride) {
  if (wrong_rows(w, dtype)) return RQ_E_ARGUMENT;
  if (start >= stop || !w->length) return 0;
  const int64_t row_bytes = out_stride * (dtype == RQ_F32 ? 4 : 2), units = (w->length + RQ_COLUMNS - 1) / RQ_COLUMNS;
  return with_decoder(w, 8, 0, [&](const Decoder& d) {
    if (!index) {
      const int64_t first = start / RQ_ROWS, strips = (stop - 1) / RQ_ROWS + 1 - first;
      rq::parallel(strips, (1 << 15) / (16 * w->length) + 1, [&](int64_t begin, int64_t end) {
        const WithSubnormals mode;
        for (int64_t strip = first + begin; strip < first + end; ++strip) {
          const int64_t row = strip * RQ_ROWS, from = row < start ? start : row, to = row + RQ_ROWS < stop ? row + RQ_ROWS : stop;
          write_strip(d, strip, (int)(from - row), (int)(to - row), dtype, (uint8_t*)out + (from - start) * row_bytes, row_bytes);
        }
      });
      return;
    }
    rq::parallel(stop - start, (1 << 15) / w->length + 1, [&](int64_t begin, int64_t end) {
      const WithSubnormals mode;
      for (int64_t i = begin, ahead = begin; i < end; ++i) {
        fetch_rows(w, index, i, end, RQ_ROWS, units * w->bits * 64, &ahead);
        write_row_of_strip(d, units, index[i], dtype, (uint8_t*)out + i * row_bytes);
      }
    });
  });
}

static int plain_to_rows(const RqWeight* weight, int32_t is_signed, int64_t start, int64_t stop, const int64_t* index, void* out,
                         int32_t dtype, int64_t out_stride) {
  if (wrong_rows(weight, dtype)) return RQ_E_ARGUMENT;
  if (start >= stop || !weight->length) return 0;
  RqWeight w = *weight;
  if (is_signed) w.zero_code += 128;  // of codes with their top bit flipped
  const int64_t row_bytes = out_stride * (dtype == RQ_F32 ? 4 : 2), code_bytes = (w.length * w.bits + 7) / 8;
  return with_decoder(&w, w.bits, is_signed ? 128 : 0, [&](const Decoder& d) {
    rq::parallel(stop - start, (1 << 15) / w.length + 1, [&](int64_t begin, int64_t end) {
      const WithSubnormals mode;
      for (int64_t i = begin, ahead = begin; i < end; ++i) {
        if (index) fetch_rows(&w, index, i, end, 1, code_bytes, &ahead);
        const int64_t n = index ? index[i] : start + i;
        write_row(d, w.codes + n * code_bytes, code_bytes, n, dtype, (uint8_t*)out + i * row_bytes);
      }
    });
  });
}
#endif

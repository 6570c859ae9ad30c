// Rounds x to integers: in blocks along K, in the order in which integer_tile.h reads them, or in rows (rq_rows_to_int8).
//
// Included inside the namespace of a level, after its vectors.
#ifndef RQ_QUANTIZE_H
#define RQ_QUANTIZE_H

// How x is rounded and laid out. Blocks (columns that share a scale of x) lie in segments (columns of a chunk that share a
// scale of the weight), segments in chunks (what a tile of x is multiplied with at a time).
struct Rounding {
  int64_t length, units;     // columns of x; units of 32 of them, padded
  int64_t chunk;             // units of a chunk
  int64_t group, segments;   // columns that share a scale of the weight; segments of a row
  int32_t block;             // 32, 16 or 8
  int32_t zero;              // code of 0 of the weight
  float factor;              // of the scales of x: that of the levels of a table
  bool fine;                 // x is rounded to 16 bits, else to 8
  bool wide;                 // its codes are spread to 16 bits
  bool coded;                // x is int8 already
  int64_t rows;              // of this part, padded to whole tiles
  uint8_t* records;          // [chunks][tiles][units of the chunk] records, see integer_tile.h
  float* sums;               // [tiles][segments][rows of the tile]: of the rounded x
  int32_t* starts;           // the same of int8 x: minus the zero code times the sum
  uint8_t* unfit;            // [rows]: 1 for a row that has to be multiplied as floats
};

static inline int64_t row_bytes(const Rounding& p) {  // of a row of x and a unit
  return (p.wide ? 64 : 32) + (p.coded ? 0 : 8 * (32 / p.block));
}
static inline int64_t segment_end(const Rounding& p, int64_t column) {
  const int64_t chunk = (column / 32 / p.chunk + 1) * p.chunk * 32, group = (column / p.group + 1) * p.group;
  const int64_t end = chunk < group ? chunk : group;
  return end < p.length ? end : p.units * 32;
}
// Where the records of a tile begin whose first row is `row`, in the chunk of `count` units from unit `first` on.
static inline uint8_t* tile_records(const Rounding& p, int64_t row, int64_t first, int64_t count) {
  return p.records + (first * p.rows + count * row) * row_bytes(p);
}

enum {
  INFINITE = 0x7F800000,     // bits of infinity; NaN is above
  UNFIT_LARGE = 0x6F800000,  // of 2^96: sums of codes times scales could overflow where that of weights does not
  UNFIT_SMALL = 0x0D800000,  // of 2^-100: reciprocals of scales of smaller blocks overflow, or lose bits
};

static inline float float_from(int32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// The unit from `column` on of a row: 32 numbers, zeros beyond the end.
static inline void load_unit(const void* x, int32_t dtype, int64_t left, Floats8* to) {
  const int64_t bytes = dtype == RQ_F32 ? 4 : 2;
  uint8_t copy[128];
  if (left < 32) {
    memset(copy, 0, sizeof copy);
    memcpy(copy, x, (size_t)(left * bytes));
    x = copy;
  }
  for (int i = 0; i < 4; ++i) to[i] = load8((const uint8_t*)x + 8 * i * bytes, dtype);
}

// One block: 8 * N numbers. Returns false if it is unfit.
template <int N, bool FINE> static inline bool round_block(const Floats8* x, Ints8* code, float* scale, int32_t* sum) {
  constexpr float most = FINE ? 32512.0f : 127.0f;
  Ints8 size = size_bits(x[0]);
  for (int i = 1; i < N; ++i) size = larger(size, size_bits(x[i]));
  const int32_t top = largest(size);
  if (top < UNFIT_SMALL || top >= UNFIT_LARGE) {
    for (int i = 0; i < N; ++i) code[i] = zeros8();
    *scale = 0;
    *sum = 0;
    return top == 0;
  }
  const float absmax = float_from(top), inverse = most / absmax;
  Ints8 all = zeros8(), nonzero = zeros8(), coarse = zeros8();
  for (int i = 0; i < N; ++i) {
    code[i] = rounded(x[i] * inverse);
    all = all + code[i];
    if (FINE) count_coarse(x[i], code[i], &nonzero, &coarse);
  }
  *scale = absmax * (1.0f / most);
  *sum = total(all);
  return !FINE || total(coarse) * 2 >= total(nonzero);  // both are negative
}

// Row r of a tile of R rows; `x` is null for a row of zeros.
template <int N, bool FINE, bool WIDE>
static void round_row(const Rounding& p, const uint8_t* x, int32_t dtype, int64_t tile, int r, int R, uint8_t* unfit) {
  constexpr int blocks = 4 / N;
  const int64_t bytes = dtype == RQ_F32 ? 4 : 2, size = R * row_bytes(p);
  float* sums = p.sums + tile * p.segments + r;
  int64_t end = segment_end(p, 0);
  float segment = 0;
  bool fit = true;
  for (int64_t first = 0; first < p.units; first += p.chunk) {
    const int64_t count = p.units - first < p.chunk ? p.units - first : p.chunk;
    uint8_t* record = tile_records(p, tile, first, count);
    for (int64_t u = first; u < first + count; ++u, record += size) {
      float* scales = (float*)(record + R * (WIDE ? 64 : 32));
      int32_t* starts = (int32_t*)(scales + R * blocks);
      Floats8 numbers[4];
      Ints8 code[4] = {zeros8(), zeros8(), zeros8(), zeros8()};
      if (x) load_unit(x + u * 32 * bytes, dtype, p.length - u * 32, numbers);
      for (int b = 0; b < blocks; ++b) {
        float scale = 0;
        int32_t sum = 0;
        if (x) fit &= round_block<N, FINE>(numbers + b * N, code + b * N, &scale, &sum);
        scales[b * R + r] = scale * p.factor;
        starts[b * R + r] = -p.zero * sum;
        segment += scale * (float)sum;
        if (u * 32 + (b + 1) * 8 * N == end) {
          *sums = segment;
          sums += R;
          segment = 0;
          end = segment_end(p, end);
        }
      }
      if (WIDE) spread_wide(code, record + r * 8, R * 8);
      else spread_narrow(code, record + r * 4, R * 4);
    }
  }
  if (x) *unfit = !fit;
}

// The same of a row of int8 codes.
static void spread_row(const Rounding& p, const uint8_t* x, int64_t tile, int r, int R) {
  const int64_t size = R * row_bytes(p);
  float* sums = p.sums + tile * p.segments + r;
  int32_t* starts = p.starts + tile * p.segments + r;
  int64_t end = segment_end(p, 0);
  int32_t segment = 0;
  for (int64_t first = 0; first < p.units; first += p.chunk) {
    const int64_t count = p.units - first < p.chunk ? p.units - first : p.chunk;
    uint8_t* record = tile_records(p, tile, first, count);
    for (int64_t u = first; u < first + count; ++u, record += size) {
      const int64_t left = p.length - u * 32;
      uint8_t copy[32] = {0};
      const uint8_t* from = x + u * 32;
      if (!x || left < 32) {
        if (x) memcpy(copy, from, (size_t)left);
        from = copy;
      }
      Ints8 code[4];
      for (int i = 0; i < 4; ++i) {
        code[i] = load8_bytes(from + 8 * i);
        segment += total(code[i]);
        if (u * 32 + 8 * (i + 1) == end) {
          *sums = (float)segment;
          *starts = -p.zero * segment;
          sums += R;
          starts += R;
          segment = 0;
          end = segment_end(p, end);
        }
      }
      if (p.wide) spread_wide(code, record + r * 8, R * 8);
      else spread_narrow(code, record + r * 4, R * 4);
    }
  }
}

template <bool FINE, bool WIDE>
static void round_row_of(const Rounding& p, const uint8_t* x, int32_t dtype, int64_t tile, int r, int R, uint8_t* unfit) {
  if (p.block == 32) round_row<4, FINE, WIDE>(p, x, dtype, tile, r, R, unfit);
  else if (p.block == 16) round_row<2, FINE, WIDE>(p, x, dtype, tile, r, R, unfit);
  else round_row<1, FINE, WIDE>(p, x, dtype, tile, r, R, unfit);
}

// Tile of R rows from row `tile` on, of which x has `rows` (bytes `stride` apart).
static void round_tile(const Rounding& p, const uint8_t* x, int64_t stride, int32_t dtype, int64_t tile, int rows, int R) {
  for (int r = 0; r < R; ++r) {
    const uint8_t* row = r < rows ? x + r * stride : nullptr;
    uint8_t* unfit = p.unfit + tile + r;
    if (p.coded) spread_row(p, row, tile, r, R);
    else if (p.fine) round_row_of<true, true>(p, row, dtype, tile, r, R, unfit);
    else if (p.wide) round_row_of<false, true>(p, row, dtype, tile, r, R, unfit);
    else round_row_of<false, false>(p, row, dtype, tile, r, R, unfit);
  }
}

// rq_rows_to_int8: one scale for each row, as requanto.linear.activations.quantize_activations computes it.
static void row_to_int8(const uint8_t* x, int32_t dtype, int64_t length, const float* fixed, int8_t* codes, float* step) {
  const int64_t bytes = dtype == RQ_F32 ? 4 : 2;
  Floats8 numbers[4];
  Ints8 size = zeros8();
  for (int64_t c = 0; c < length; c += 32) {
    load_unit(x + c * bytes, dtype, length - c, numbers);
    for (int i = 0; i < 4; ++i) size = larger(size, size_bits(numbers[i]));
  }
  const int32_t top = largest(size);
  const float tiny = 1e-30f, absmax = float_from(top), scale = fixed ? *fixed : (absmax > tiny ? absmax : tiny) / 127.0f;
  // A row with NaN gives NaN; so does infinity, unless the scale is fixed: then it has the largest code.
  const bool finite = (fixed ? top <= INFINITE : top < INFINITE) && scale - scale == 0;
  *step = finite ? scale : float_from(0x7FC00000);
  float inverse = 1.0f / scale;
  if (!finite || inverse - inverse != 0) inverse = 0;  // a scale that is 0 or has no reciprocal: codes of 0
  for (int64_t c = 0; c < length; c += 32) {
    load_unit(x + c * bytes, dtype, length - c, numbers);
    Ints8 code[4];
    for (int i = 0; i < 4; ++i) code[i] = inverse == 0 ? zeros8() : rounded(clamped(numbers[i] * inverse, -128.0f, 127.0f));
    uint8_t unit[32];
    spread_narrow(code, unit, 4);
    memcpy(codes + c, unit, (size_t)(length - c < 32 ? length - c : 32));
  }
}

static int round_rows(const void* x, int32_t dtype, int64_t rows, int64_t length, int64_t x_stride, const float* fixed,
                      int8_t* codes, float* steps) {
  if (dtype != RQ_F32 && dtype != RQ_F16 && dtype != RQ_BF16) return RQ_E_ARGUMENT;
  rq::parallel(rows, (1 << 15) / (length + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const uint8_t* row = (const uint8_t*)x + r * x_stride * (dtype == RQ_F32 ? 4 : 2);
      row_to_int8(row, dtype, length, fixed, codes + r * length, steps + r);
    }
  });
  return 0;
}
#endif

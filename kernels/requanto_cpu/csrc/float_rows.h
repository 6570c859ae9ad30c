// One to four rows of x by a strip: each weight is decoded in a register and multiplied there.
//
// Included inside the namespace of a level, after values.h. The sums of a group are of the codes' values; they are multiplied by
// the group's scale once, and the shift by the sum of x.
#ifndef RQ_FLOAT_ROWS_H
#define RQ_FLOAT_ROWS_H

enum {
  ROWS_CHUNK = 2048,                  // columns whose scales are on the stack
  ROWS_GROUPS = ROWS_CHUNK / 8 + 2,   // groups that these can touch
};

// Rows of x in a tile: per column (or pair of columns) one word of 4 bytes for each of its rows.
typedef struct Tile {
  const float* words;
  const float* sums;  // of each group and row; null if the weight has no shift
} Tile;

template <class V, int R, int Q, int SETS>
RQ_INLINE void add_quad(const V& values, const uint8_t* unit, const float* x, Floats (*sum)[SETS], Flags& flags) {
  const Bytes quad = V::Codes::template at<Q>(unit);
  values.mark(flags, quad);
  x += Q * V::per_quad * R;
  if constexpr (V::per_quad == 4) {
    const Floats w[4] = {values.template value<0>(quad), values.template value<1>(quad), values.template value<2>(quad),
                         values.template value<3>(quad)};
    for (int j = 0; j < 4; ++j)
      for (int r = 0; r < R; ++r) sum[r][j % SETS] = fma(w[j], splat(x[j * R + r]), sum[r][j % SETS]);
  } else {
#if RQ_BF16_DOT
    Bytes w[2];
    values.pairs(quad, w);
    for (int j = 0; j < 2; ++j)
      for (int r = 0; r < R; ++r) sum[r][(2 * Q + j) % SETS] = dot_bfloat16(sum[r][(2 * Q + j) % SETS], w[j], splat4(x + j * R + r));
#endif
  }
}

template <int R, int SETS> RQ_INLINE void clear_sums(Floats (*sum)[SETS]) {
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < SETS; ++i) sum[r][i] = splat(0.0f);
}

template <int R, int SETS> RQ_INLINE void add_group(Floats (*sum)[SETS], const float* scale, Floats* total) {
  const Floats s = load_floats(scale);
  for (int r = 0; r < R; ++r) {
    Floats all = sum[r][0];
    for (int i = 1; i < SETS; ++i) all = all + sum[r][i];
    total[r] = fma(s, all, total[r]);
  }
}

template <int R> RQ_INLINE void subtract_shift(const float* shift, const float* sums, Floats* total) {
  const Floats s = load_floats(shift);
  for (int r = 0; r < R; ++r) total[r] = fnma(s, splat(sums[r]), total[r]);
}

// Columns `begin` to `end` of a strip (multiples of 32).
template <class V, int R>
static void add_columns(const V& values, const RqWeight* w, const uint8_t* strip, int64_t begin, int64_t end, const Tile& x,
                        const float* scale, const float* shift, Floats* total, Flags& flags) {
  constexpr int SETS = R == 1 ? 4 : TILE_STRIPS > 1 ? 2 : 1, words = 8 * V::per_quad * R;
  const uint8_t* unit = strip + begin / RQ_COLUMNS * V::Codes::bytes;
  const float* px = x.words + begin / RQ_COLUMNS * words;
  int64_t g = begin / w->group, stop = (g + 1) * w->group;
  if (x.sums && g * w->group == begin) subtract_shift<R>(shift, x.sums + g * R, total);
  Floats sum[R][SETS];
  clear_sums<R, SETS>(sum);
  // After columns up to this one: the end of a group, if it is one. (Columns beyond K are zeros of x: the last group's.)
  const auto finish = [&](int64_t column) RQ_LAMBDA_INLINE {
    if (__builtin_expect(column != stop, 1)) return;
    if (g == w->groups - 1) return;
    add_group<R, SETS>(sum, scale, total);
    clear_sums<R, SETS>(sum);
    ++g, stop += w->group, scale += 16, shift += 16;
    if (x.sums && column < end) subtract_shift<R>(shift, x.sums + g * R, total);
  };
  for (int64_t column = begin; column < end; column += RQ_COLUMNS, unit += V::Codes::bytes, px += words) {
    if constexpr (V::Codes::bits == 8 || V::Codes::bits == 4) {  // each two quads alike: less to compile
#pragma GCC unroll 1
      for (int q = 0; q < 8; q += 2) {
        add_quad<V, R, 0, SETS>(values, unit + V::Codes::bytes / 8 * q, px + q * V::per_quad * R, sum, flags);
        add_quad<V, R, 1, SETS>(values, unit + V::Codes::bytes / 8 * q, px + q * V::per_quad * R, sum, flags);
        finish(column + 4 * q + 8);
      }
    } else {
      add_quad<V, R, 0, SETS>(values, unit, px, sum, flags);
      add_quad<V, R, 1, SETS>(values, unit, px, sum, flags);
      finish(column + 8);
      add_quad<V, R, 2, SETS>(values, unit, px, sum, flags);
      add_quad<V, R, 3, SETS>(values, unit, px, sum, flags);
      finish(column + 16);
      add_quad<V, R, 4, SETS>(values, unit, px, sum, flags);
      add_quad<V, R, 5, SETS>(values, unit, px, sum, flags);
      finish(column + 24);
      add_quad<V, R, 6, SETS>(values, unit, px, sum, flags);
      add_quad<V, R, 7, SETS>(values, unit, px, sum, flags);
      finish(column + 32);
    }
  }
  if (g * w->group < end) add_group<R, SETS>(sum, scale, total);
}

// The sums of a strip for R rows of x; true if a code was marked, and the sums are not to be used.
template <class V, int R> static bool rows_by_strip(const V& values, const RqWeight* w, int64_t strip, const Tile& x, Floats* total) {
  float scale[ROWS_GROUPS * 16], shift[ROWS_GROUPS * 16];
  const int64_t columns = (w->length + RQ_COLUMNS - 1) / RQ_COLUMNS * RQ_COLUMNS;
  const uint8_t* codes = w->codes + strip * (columns / RQ_COLUMNS) * V::Codes::bytes;
  Flags flags = no_flags();
  for (int r = 0; r < R; ++r) total[r] = splat(0.0f);
  for (int64_t begin = 0; begin < columns; begin += ROWS_CHUNK) {
    const int64_t end = begin + ROWS_CHUNK < columns ? begin + ROWS_CHUNK : columns;
    const int64_t stop = end < w->length ? end : w->length;
    strip_scales(w, strip, begin / w->group, (stop + w->group - 1) / w->group, scale, x.sums ? shift : nullptr);
    add_columns<V, R>(values, w, codes, begin, end, x, scale, shift, total, flags);
  }
  return any(flags);
}
#endif

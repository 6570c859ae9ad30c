// Many rows of x: weights are decoded into a panel, a few columns of the result wide, and multiplied from there.
//
// Included inside the namespace of a level, after values.h. A panel holds words of 4 bytes: for each column (or pair of columns)
// of the weight one of each of its TILE_STRIPS * 16 rows. Tiles of x hold one word of each of their rows.
#ifndef RQ_FLOAT_TILE_H
#define RQ_FLOAT_TILE_H

enum { PANEL_WIDTH = 16 * TILE_STRIPS };

// Adds products to the sums of a tile, [R][PANEL_WIDTH].
template <bool PAIRS, int R> static void multiply_tile(const float* panel, const float* x, int64_t words, float* sums) {
  Floats sum[R][TILE_STRIPS];
  for (int r = 0; r < R; ++r)
    for (int s = 0; s < TILE_STRIPS; ++s) sum[r][s] = load_floats(sums + r * PANEL_WIDTH + 16 * s);
  for (int64_t k = 0; k < words; ++k, panel += PANEL_WIDTH, x += R) {
    if constexpr (PAIRS) {
#if RQ_BF16_DOT
      Bytes w[TILE_STRIPS];
      for (int s = 0; s < TILE_STRIPS; ++s) w[s] = load_bytes(panel + 16 * s);
      for (int r = 0; r < R; ++r)
        for (int s = 0; s < TILE_STRIPS; ++s) sum[r][s] = dot_bfloat16(sum[r][s], w[s], splat4(x + r));
#endif
    } else {
      Floats w[TILE_STRIPS];
      for (int s = 0; s < TILE_STRIPS; ++s) w[s] = load_floats(panel + 16 * s);
      for (int r = 0; r < R; ++r)
        for (int s = 0; s < TILE_STRIPS; ++s) sum[r][s] = fma(w[s], splat(x[r]), sum[r][s]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int s = 0; s < TILE_STRIPS; ++s) store_floats(sums + r * PANEL_WIDTH + 16 * s, sum[r][s]);
}

template <bool PAIRS, int R = TILE_ROWS>
static void multiply_rows(int rows, const float* panel, const float* x, int64_t words, float* sums) {
  if (rows == R) return multiply_tile<PAIRS, R>(panel, x, words, sums);
  if constexpr (R > 1) multiply_rows<PAIRS, R - 1>(rows, panel, x, words, sums);
}

// The 4 columns of quad Q into the panel: multiplied by their scale, or as pairs that were looked up.
template <class V, bool PAIRS, int Q>
RQ_INLINE void decode_quad(const V& values, const uint8_t* unit, const float* scale, const float* shift, float* panel, Flags& flags) {
  const Bytes quad = V::Codes::template at<Q>(unit);
  values.mark(flags, quad);
  panel += Q * (PAIRS ? 2 : 4) * PANEL_WIDTH;
  if constexpr (V::per_quad == 2) {
#if RQ_BF16_DOT
    Bytes two[2];
    values.pairs(quad, two);
    store_bytes(panel, two[0]);
    store_bytes(panel + PANEL_WIDTH, two[1]);
#endif
  } else {
    Floats w[4] = {values.template value<0>(quad), values.template value<1>(quad), values.template value<2>(quad),
                   values.template value<3>(quad)};
    for (int j = 0; j < 4; ++j) w[j] = w[j] * load_floats(scale);
    if (shift)
      for (int j = 0; j < 4; ++j) w[j] = w[j] - load_floats(shift);
    if constexpr (PAIRS) {
#if RQ_BF16_DOT
      store_bytes(panel, pairs_of(w[0], w[2]));
      store_bytes(panel + PANEL_WIDTH, pairs_of(w[1], w[3]));
#endif
    } else {
      for (int j = 0; j < 4; ++j) store_floats(panel + j * PANEL_WIDTH, w[j]);
    }
  }
}

// Columns `begin` to `end` (multiples of 32) of a strip; true if a code was marked. Padded columns meet zeros of x.
template <class V, bool PAIRS>
static bool decode_strip(const V& values, const RqWeight* w, int64_t strip, int64_t begin, int64_t end, const float* scale,
                         const float* shift, float* panel) {
  const int64_t units = (w->length + RQ_COLUMNS - 1) / RQ_COLUMNS;
  const uint8_t* unit = w->codes + (strip * units + begin / RQ_COLUMNS) * V::Codes::bytes;
  const int64_t last = w->groups - 1;
  int64_t g = begin / w->group, stop = (g + 1) * w->group;
  const auto next = [&](int64_t column) RQ_LAMBDA_INLINE {
    if (V::per_quad == 2 || column != stop || g == last) return;
    ++g, stop += w->group, scale += 16;
    if (shift) shift += 16;
  };
  Flags flags = no_flags();
  for (int64_t column = begin; column < end; column += RQ_COLUMNS, unit += V::Codes::bytes) {
    if constexpr (V::Codes::bits == 8 || V::Codes::bits == 4) {  // each two quads alike: less to compile
#pragma GCC unroll 1
      for (int q = 0; q < 8; q += 2) {
        float* to = panel + q * (PAIRS ? 2 : 4) * PANEL_WIDTH;
        decode_quad<V, PAIRS, 0>(values, unit + V::Codes::bytes / 8 * q, scale, shift, to, flags);
        decode_quad<V, PAIRS, 1>(values, unit + V::Codes::bytes / 8 * q, scale, shift, to, flags);
        next(column + 4 * q + 8);
      }
    } else {
      decode_quad<V, PAIRS, 0>(values, unit, scale, shift, panel, flags);
      decode_quad<V, PAIRS, 1>(values, unit, scale, shift, panel, flags);
      next(column + 8);
      decode_quad<V, PAIRS, 2>(values, unit, scale, shift, panel, flags);
      decode_quad<V, PAIRS, 3>(values, unit, scale, shift, panel, flags);
      next(column + 16);
      decode_quad<V, PAIRS, 4>(values, unit, scale, shift, panel, flags);
      decode_quad<V, PAIRS, 5>(values, unit, scale, shift, panel, flags);
      next(column + 24);
      decode_quad<V, PAIRS, 6>(values, unit, scale, shift, panel, flags);
      decode_quad<V, PAIRS, 7>(values, unit, scale, shift, panel, flags);
      next(column + 32);
    }
    panel += (PAIRS ? 16 : 32) * PANEL_WIDTH;
  }
  return any(flags);
}
#endif

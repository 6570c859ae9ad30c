// The integer kernels: a tile of R rows of x by S strips, sums of 32 bits within each block of x, float32 across blocks.
//
// Included inside the namespace of a level. x was rounded by quantize.h, in the order in which it is read here.
#ifndef RQ_INTEGER_TILE_H
#define RQ_INTEGER_TILE_H

// S, the strips of a tile; how far ahead codes are fetched, into the second-level cache. The first can wait for few lines at a
// time: fetched there, 8192 x 2048 of int4 came at 13 GB/s on one thread, this way at 18. Beyond the end of a strip that is the
// start of the strip that will be read next.
enum { INT_STRIPS = INTEGER_STRIPS, FETCH_AHEAD = 4096 };

// A chunk of a tile. Its records, one for each unit, hold codes of x, [8][R][4] bytes, or [8][R][8] if they have 16 bits
// (columns 0, 2, 1, 3 of each 4); then, unless x was int8, the scales of its blocks, [blocks][R] float32, and what the sums of
// 32 bits start from, [blocks][R] int32: minus the zero code times the sum of the block.
struct IntTile {
  const uint8_t* codes[INT_STRIPS];  // of each strip
  const Bytes* table;                // of Looked
  const uint8_t* x;                  // records
  const int32_t* ends;               // [segments]: the column after the last of each, from the start of the chunk
  int64_t segments;
  const float* scale[INT_STRIPS];    // [segments][16] of each strip
  const float* shift[INT_STRIPS];    // likewise
  const float* sums;                 // [segments][R]: of the rounded x; null without shifts
  const int32_t* starts;             // of int8 x: [segments][R], what sums start from
  bool carry_in, carry_out;          // of int8 x: the first segment goes on from the chunk before, the last in the next
  int32_t block;
  float* y;                          // [R][S][16], added to
  Ints* carry;                       // of int8 x: [R][S], the sums of a segment that goes on
  int64_t fetch_unit, fetch_units;   // number of the unit to fetch in its strip, and units of a strip
  int64_t fetch_bytes, fetch_skip;   // from the unit that is read to that one; from the end of a strip to the start of the next
  const uint8_t* ahead[2];           // scales and shifts of the next strips, to fetch: null, or `ahead_step` bytes a segment
  int64_t ahead_step[2];
};

// Adds the products of 4 columns. P: products that a sum of 16 bits has room for; 0: x has 16 bits.
template <int R, int P, int STEP>
RQ_INLINE void add_products(Ints (&sum)[R][INT_STRIPS], Partial (&partial)[R][INT_STRIPS], const Bytes* code, const uint8_t* x) {
  (void)partial;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    if constexpr (P == 0) {
      const Bytes even = splat4(x + r * 8), odd = splat4(x + r * 8 + 4);
#pragma GCC unroll 4
      for (int s = 0; s < INT_STRIPS; ++s) sum[r][s] = dot_wide(sum[r][s], code[s], even, odd);
    } else {
      const Bytes four = splat4(x + r * 4);
#pragma GCC unroll 4
      for (int s = 0; s < INT_STRIPS; ++s) {
#if RQ_VNNI
        sum[r][s] = dot(sum[r][s], code[s], four);
#else
        partial[r][s] = dot(STEP % P ? partial[r][s] : no_partial(), code[s], four);
        if (STEP % P == P - 1) sum[r][s] = widen(sum[r][s], partial[r][s]);
#endif
      }
    }
  }
}

template <class Source, int R, int P, int Q>
RQ_INLINE void add_unit(Ints (&sum)[R][INT_STRIPS], Partial (&partial)[R][INT_STRIPS], const uint8_t* const* w, const Bytes* table,
                        const uint8_t* x) {
  Bytes code[INT_STRIPS];
#pragma GCC unroll 4
  for (int s = 0; s < INT_STRIPS; ++s) code[s] = Source::template at<Q>(w[s], table);
  add_products<R, P, Q>(sum, partial, code, x + Q * R * (P ? 4 : 8));
  if constexpr (Q < 7) add_unit<Source, R, P, Q + 1>(sum, partial, w, table, x);
}

#define RQ_EACH_SUM                    \
  _Pragma("GCC unroll 8")              \
  for (int r = 0; r < R; ++r)          \
    _Pragma("GCC unroll 4")            \
    for (int s = 0; s < INT_STRIPS; ++s)

// Sums of integers to floats, for each block: t += scale of x * sum.
template <int R> RQ_INLINE void add_block(Floats (&t)[R][INT_STRIPS], const Ints (&sum)[R][INT_STRIPS], const uint8_t* scales) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const Floats d = splat(((const float*)scales)[r]);
#pragma GCC unroll 4
    for (int s = 0; s < INT_STRIPS; ++s) t[r][s] = fma(d, to_floats(sum[r][s]), t[r][s]);
  }
}

// The end of segment g: y += scale of the weight * t - shift * sum of x.
template <int R> RQ_INLINE void add_segment(const IntTile& a, int64_t g, const Floats (&t)[R][INT_STRIPS]) {
#pragma GCC unroll 4
  for (int s = 0; s < INT_STRIPS; ++s) {
    const Floats scale = load_floats(a.scale[s] + 16 * g);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      float* y = a.y + (r * INT_STRIPS + s) * 16;
      Floats result = fma(t[r][s], scale, load_floats(y));
      if (a.sums) result = fnma(load_floats(a.shift[s] + 16 * g), splat(a.sums[g * R + r]), result);
      store_floats(y, result);
    }
  }
  for (int i = 0; i < 2; ++i)
    if (a.ahead[i]) __builtin_prefetch(a.ahead[i] + g * a.ahead_step[i]);
}

// Blocks of 32 columns, whole units in a segment. FETCH: codes come from memory.
template <class Source, int P, bool CODED, bool FETCH, int R> static void int_tile(const IntTile& a) {
  constexpr int codes = R * (P ? 32 : 64), record = codes + (CODED ? 0 : R * 8);
  const uint8_t *w[INT_STRIPS], *x = a.x;
  for (int s = 0; s < INT_STRIPS; ++s) w[s] = a.codes[s];
  int32_t column = 0;
  int64_t fetch_unit = a.fetch_unit, fetch = a.fetch_bytes;
  for (int64_t g = 0; g < a.segments; ++g) {
    Ints sum[R][INT_STRIPS];
    Partial partial[R][INT_STRIPS];
    Floats t[R][INT_STRIPS];
    RQ_EACH_SUM {
      t[r][s] = splat(0);
      if (CODED) sum[r][s] = splat_int(a.starts[g * R + r]);
      if (CODED && g == 0 && a.carry_in) sum[r][s] = sum[r][s] + a.carry[r * INT_STRIPS + s];
    }
    for (; column < a.ends[g]; column += 32, x += record) {
      if (!CODED) RQ_EACH_SUM sum[r][s] = splat_int(((const int32_t*)(x + codes + R * 4))[r]);
      if (FETCH) {
        for (int s = 0; s < INT_STRIPS; ++s)
#pragma GCC unroll 8
          for (int line = 0; line < Source::bytes; line += 64) __builtin_prefetch(w[s] + fetch + line, 0, 2);
        if (++fetch_unit == a.fetch_units) fetch_unit = 0, fetch += a.fetch_skip;
      }
      add_unit<Source, R, P, 0>(sum, partial, w, a.table, x);
#pragma GCC unroll 4
      for (int s = 0; s < INT_STRIPS; ++s) w[s] += Source::bytes;
      if (!CODED) add_block<R>(t, sum, x + codes);
    }
    if (CODED) {
      const bool on = a.carry_out && g == a.segments - 1;
      RQ_EACH_SUM {
        if (on) a.carry[r * INT_STRIPS + s] = sum[r][s];
        t[r][s] = on ? splat(0) : to_floats(sum[r][s]);
      }
    }
    add_segment<R>(a, g, t);
  }
}

// Blocks of 16 or 8 columns, segments of any multiple of 8 columns; codes are bytes that were unpacked.
template <int P, bool CODED, int R> static void int_tile_short(const IntTile& a) {
  constexpr int quad = R * (P ? 4 : 8), codes = 8 * quad;
  const int blocks = 32 / a.block, record = codes + (CODED ? 0 : R * 8 * blocks);
  const uint8_t* x = a.x;
  int64_t g = 0, unit = 0;
  Ints sum[R][INT_STRIPS];
  Partial partial[R][INT_STRIPS];
  Floats t[R][INT_STRIPS];
  RQ_EACH_SUM {
    t[r][s] = splat(0);
    sum[r][s] = splat_int(0);
    if (CODED) sum[r][s] = splat_int(a.starts[r]);
    if (CODED && a.carry_in) sum[r][s] = sum[r][s] + a.carry[r * INT_STRIPS + s];
  }
  for (int32_t column = 0; g < a.segments; ++unit, x += record) {
    for (int b = 0; b < blocks && g < a.segments; ++b) {
      if (!CODED) RQ_EACH_SUM sum[r][s] = splat_int(((const int32_t*)(x + codes))[(blocks + b) * R + r]);
      for (int q = b * a.block / 4; q < (b + 1) * a.block / 4; q += 2) {
        Bytes code[INT_STRIPS];
        for (int s = 0; s < INT_STRIPS; ++s) code[s] = load_bytes(a.codes[s] + unit * 512 + q * 64);
        add_products<R, P, 0>(sum, partial, code, x + q * quad);
        for (int s = 0; s < INT_STRIPS; ++s) code[s] = load_bytes(a.codes[s] + unit * 512 + q * 64 + 64);
        add_products<R, P, 1>(sum, partial, code, x + (q + 1) * quad);
      }
      if (!CODED) add_block<R>(t, sum, x + codes + b * R * 4);
      column += a.block;
      if (column < a.ends[g]) continue;
      const bool on = CODED && a.carry_out && g == a.segments - 1;
      if (CODED) RQ_EACH_SUM {
        if (on) a.carry[r * INT_STRIPS + s] = sum[r][s];
        t[r][s] = on ? splat(0) : to_floats(sum[r][s]);
      }
      add_segment<R>(a, g, t);
      if (++g == a.segments) break;
      RQ_EACH_SUM {
        t[r][s] = splat(0);
        if (CODED) sum[r][s] = splat_int(a.starts[g * R + r]);
      }
    }
  }
}
#endif

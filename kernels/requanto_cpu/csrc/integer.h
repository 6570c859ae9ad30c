// RQ_BLOCKS8, RQ_BLOCKS16 and RQ_CODED: x in int8 or 16 bits, exact sums of 32 bits, float32 across blocks.
//
// Included inside the namespace of a level, after integer_tile.h and quantize.h, and float.h for the rows that it leaves out.
#ifndef RQ_INTEGER_H
#define RQ_INTEGER_H

typedef void (*IntKernel)(const IntTile&);

enum {
  INT_BLOCK_ROWS = 144,   // rows of x that an unpacked panel is multiplied with: whole tiles of 4 and of 6
  INT_PANEL_UNITS = 16,   // columns of a panel, 512: of two strips it takes half of a first-level cache
  INT_SEGMENTS = 128,     // scales of a chunk, decoded
};

// What follows from the weight, the arithmetic and the number of rows.
struct IntPlan {
  Rounding x;
  bool shorts;          // segments that are no whole units
  bool direct;          // few rows of x, and a kernel that unpacks these codes in registers
  bool panel;           // codes are unpacked first; else they are read as bytes
  int32_t width;        // bits of what is multiplied: 8 for tables
};

static IntPlan int_plan(const RqGemm* g) {
  const RqWeight* w = g->weight;
  IntPlan p = {};
  const bool few = g->rows <= INT_FEW_ROWS, table = w->code == RQ_TABLE;
  p.width = table ? 8 : w->bits;
  p.x.length = w->length;
  p.x.units = (w->length + RQ_COLUMNS - 1) / RQ_COLUMNS;
  p.x.coded = g->arithmetic == RQ_CODED;
  p.x.fine = g->arithmetic == RQ_BLOCKS16;
  // Where two products of a code do not fit into 16 bits, int8 codes of x are spread, too.
  p.x.wide = p.x.fine || partial_steps(p.width) < 2;
  p.x.block = w->block;
  p.x.group = w->groups > 1 ? w->group : p.x.units * RQ_COLUMNS;
  p.x.factor = table ? w->level_scale : 1.0f;
  p.x.zero = (table ? 128 : w->zero_code) - (SIGNED_CODES && p.width == 8 ? 128 : 0);
  p.shorts = w->block != 32 || p.x.group % RQ_COLUMNS;
  if (few && !p.shorts) {
    if (p.x.coded) p.direct = !table && (w->bits == 8 || (w->bits == 4 && !p.x.wide));
    else if (table) p.direct = w->bits == 4 && !p.x.fine;
    else p.direct = w->bits < 6 ? w->bits > 1 && !p.x.wide : p.x.wide;
  }
  p.panel = !p.direct && (table || w->bits != 8 || p.shorts);
  p.x.chunk = INT_PANEL_UNITS;
  while (p.direct && p.x.chunk * 64 <= INT_LONGEST && p.x.chunk * 64 <= INT_SEGMENTS * p.x.group) p.x.chunk *= 2;
  for (int64_t c = 0; c < p.x.units * RQ_COLUMNS; c = segment_end(p.x, c)) ++p.x.segments;
  return p;
}

// Rows of a tile, of `left` rows.
static inline int int_tile_rows(int64_t left) { return left >= INTEGER_ROWS ? (int)INTEGER_ROWS : left > 4 ? 6 : left > 1 ? 4 : (int)left; }
static inline int64_t int_padded(int64_t rows) { return rows / INTEGER_ROWS * INTEGER_ROWS + int_tile_rows(rows % INTEGER_ROWS); }

static inline int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// The scratch buffer: which rows are unfit, ends of segments, records of x, sums of segments; in this order.
static int64_t int_bytes(const IntPlan& p, int64_t rows) {
  const int64_t padded = int_padded(rows), segments = p.x.segments * padded * 4;
  return 64 + whole_lines(padded) + whole_lines(p.x.segments * 4) + whole_lines(p.x.units * padded * row_bytes(p.x)) +
         whole_lines(segments) * (p.x.coded ? 2 : 1);
}
static int64_t int_least_bytes(const RqGemm* g) {
  const IntPlan p = int_plan(g);
  const int64_t one = int_bytes(p, 1), other = p.x.coded ? 0 : whole_lines(int_padded(1)) + 64 + float_least_scratch(g);
  return one > other ? one : other;
}
static int64_t int_scratch_bytes(const RqGemm* g, int64_t rows) {
  RqGemm all = *g;
  all.rows = rows;
  const int64_t wanted = int_bytes(int_plan(&all), rows), least = int_least_bytes(&all);
  return wanted > least ? wanted : least;
}

// The kernel for a tile of R rows. Each combination is compiled: those that few weights need go through a panel instead.
template <class Source, int P, bool CODED> static IntKernel few_rows_kernel(int R) {
  return R == 1 ? int_tile<Source, P, CODED, true, 1> : int_tile<Source, P, CODED, true, 4>;
}
template <class Source, int P, bool CODED> static IntKernel rows_kernel(int R) {
  return R == 1   ? int_tile<Source, P, CODED, false, 1>
         : R == 4 ? int_tile<Source, P, CODED, false, 4>
                  : int_tile<Source, P, CODED, false, INTEGER_ROWS>;
}
template <int P, bool CODED> static IntKernel short_kernel(int R) {
  return R == 1   ? int_tile_short<P, CODED, 1>
         : R == 4 ? int_tile_short<P, CODED, 4>
                  : int_tile_short<P, CODED, INTEGER_ROWS>;
}
template <bool CODED> static IntKernel bytes_kernel(const IntPlan& p, int R) {
  const int steps = p.x.wide ? 0 : partial_steps(p.width);
  if (p.shorts) return steps == 0 ? short_kernel<0, CODED>(R) : short_kernel<RQ_VNNI ? 8 : 2, CODED>(R);
  if (!p.panel) return steps == 0 ? rows_kernel<Eight<SIGNED_CODES>, 0, CODED>(R) : rows_kernel<Eight<SIGNED_CODES>, 8, CODED>(R);
#if !RQ_VNNI
  if (steps == 2 || steps == 4) return rows_kernel<Eight<false>, 2, CODED>(R);
#endif
  return steps == 0 ? rows_kernel<Eight<false>, 0, CODED>(R) : rows_kernel<Eight<false>, 8, CODED>(R);
}
static IntKernel int_kernel(const IntPlan& p, const RqWeight* w, int R) {
  if (!p.direct) return p.x.coded ? bytes_kernel<true>(p, R) : bytes_kernel<false>(p, R);
  constexpr int eight = partial_steps(8) < 2 ? 0 : 8;  // of 8 bits, if x has int8 codes
  if (p.x.coded) return w->bits == 4 ? few_rows_kernel<Coded<4>, partial_steps(4), true>(R) : few_rows_kernel<Eight<SIGNED_CODES>, eight, true>(R);
  if (w->code == RQ_TABLE) return few_rows_kernel<Looked<4>, eight, false>(R);
  switch (w->bits) {
    case 2: return few_rows_kernel<Coded<2>, partial_steps(2), false>(R);
    case 3: return few_rows_kernel<Coded<3>, partial_steps(3), false>(R);
    case 4: return few_rows_kernel<Coded<4>, partial_steps(4), false>(R);
    case 5: return few_rows_kernel<Coded<5>, partial_steps(5), false>(R);
    case 6: return few_rows_kernel<Coded<6>, 0, false>(R);
    case 7: return few_rows_kernel<Coded<7>, 0, false>(R);
    default: return few_rows_kernel<Eight<SIGNED_CODES>, 0, false>(R);
  }
}

// Where the scales (or shifts) of the next strips are, to be fetched while these are multiplied.
static void int_ahead(const RqWeight* w, const Parts& parts, int64_t strip, int64_t group, int which, IntTile* t) {
  const bool near = parts.stride_g == 1 && parts.stride_n > 1 && (strip + 2 * INT_STRIPS) * RQ_ROWS <= w->rows;
  const int64_t bytes = part_bytes(parts.read), next = (strip + INT_STRIPS) * RQ_ROWS * parts.stride_n;
  t->ahead_step[which] = INT_STRIPS * RQ_ROWS * bytes;
  t->ahead[which] = near ? (const uint8_t*)parts.base + next * bytes + group * t->ahead_step[which] : nullptr;
}

// What is fetched while units from `first` on are read: codes further on, and those of the next strips once these end.
static void int_fetch(const IntPlan& p, int64_t unit, int64_t first, IntTile* t) {
  const int64_t at = first + FETCH_AHEAD / unit;
  t->fetch_units = p.x.units;
  t->fetch_unit = at % p.x.units;
  t->fetch_skip = (INT_STRIPS - 1) * p.x.units * unit;
  t->fetch_bytes = FETCH_AHEAD / unit * unit + at / p.x.units * t->fetch_skip;
}

// Rows `row` to `stop` of x by the strips from `strip` on. `fresh`: nothing of them was fetched yet.
static void int_block(const RqGemm* g, const IntPlan& p, const int32_t* ends, int64_t strip, int64_t row, int64_t stop, bool fresh, uint8_t* out) {
  alignas(64) uint8_t panel[INT_STRIPS][INT_PANEL_UNITS * 512];
  alignas(64) float scale[INT_STRIPS][INT_SEGMENTS * 16], shift[INT_STRIPS][INT_SEGMENTS * 16];
  alignas(64) float y[INT_BLOCK_ROWS * INT_STRIPS * 16];
  Ints carry[INT_BLOCK_ROWS * INT_STRIPS];
  const RqWeight* w = g->weight;
  const bool shifted = w->shift_kind != RQ_NO_SHIFT;
  const int64_t unit = 64 * w->bits, strips = int_strips(w), padded = int_padded(stop - row);
  Bytes table[4];
  if (w->code == RQ_TABLE) int_table(w, table);
  const IntUnpack unpack = int_unpack(w);
  IntTile t = {};
  t.table = table;
  t.block = w->block;
  memset(y, 0, (size_t)(padded * INT_STRIPS) * 64);
  int64_t segment = 0;
  for (int64_t first = 0; first < p.x.units; first += p.x.chunk, segment += t.segments) {
    const int64_t count = p.x.units - first < p.x.chunk ? p.x.units - first : p.x.chunk, last = (first + count) * 32;
    const int64_t begin = first * 32 / p.x.group, end = last < w->length ? (last + p.x.group - 1) / p.x.group : w->groups;
    t.segments = end - begin;
    t.ends = ends + segment;
    for (int s = 0; s < INT_STRIPS; ++s) {
      // Beyond the last of an odd number of strips: that one again, with scales of 0.
      const int64_t at = strip + s < strips ? strip + s : strips - 1;
      const uint8_t* codes = w->codes + (at * p.x.units + first) * unit;
      if (p.panel) unpack(codes, count, table, panel[s]);
      t.codes[s] = p.panel ? panel[s] : codes;
      if (p.direct && fresh && !first)
        for (int64_t line = 0; line < FETCH_AHEAD && line < count * unit; line += 64) __builtin_prefetch(codes + line, 0, 2);
      int_scales(g, strip + s, begin, end, scale[s], shifted ? shift[s] : nullptr);
      t.scale[s] = scale[s];
      t.shift[s] = shift[s];
    }
    if (p.direct) {
      int_fetch(p, unit, first, &t);
      int_ahead(w, scale_parts(w), strip, begin, 0, &t);
      if (shifted) int_ahead(w, shift_parts(w), strip, begin, 1, &t);
    }
    t.carry_in = first > 0 && first * 32 % INT_LONGEST && first * 32 % p.x.group;
    t.carry_out = last % INT_LONGEST && last < w->length && last % p.x.group;
    for (int64_t r = row; r < stop;) {
      const int R = int_tile_rows(stop - r);
      t.x = tile_records(p.x, r, first, count);
      t.sums = shifted ? p.x.sums + r * p.x.segments + segment * R : nullptr;
      t.starts = p.x.starts + r * p.x.segments + segment * R;
      t.y = y + (r - row) * INT_STRIPS * 16;
      t.carry = carry + (r - row) * INT_STRIPS;
      int_kernel(p, w, R)(t);
      r += R;
    }
  }
  const int64_t bias_bytes = g->bias_dtype == RQ_F32 ? 4 : 2, out_bytes = g->out_dtype == RQ_F32 ? 4 : 2;
  for (int s = 0; s < INT_STRIPS && strip + s < strips; ++s) {
    const int64_t n = (strip + s) * RQ_ROWS, left = w->rows - n;
    const int lanes = left < RQ_ROWS ? (int)left : (int)RQ_ROWS;
    const bool biased = g->bias_dtype != RQ_NONE;
    const Floats bias = biased ? load_dtype((const uint8_t*)g->bias + n * bias_bytes, g->bias_dtype, lanes) : splat(0);
    for (int64_t r = row; r < stop; ++r) {
      Floats value = load_floats(y + ((r - row) * INT_STRIPS + s) * 16);
      if (p.x.coded) value = value * splat(g->steps[r]);
      if (biased) value = value + bias;
      store_dtype(out + (r * g->out_stride + n) * out_bytes, g->out_dtype, lanes, value);
    }
  }
}

// `g->rows` rows of x, for which the scratch buffer has room. `p` and `few` are those of all rows.
static int int_part(const RqGemm* g, IntPlan p, const uint8_t* x, uint8_t* out, uint8_t* scratch, int64_t scratch_bytes) {
  const RqWeight* w = g->weight;
  const int64_t x_bytes = p.x.coded ? 1 : g->x_dtype == RQ_F32 ? 4 : 2;
  p.x.rows = int_padded(g->rows);
  p.x.unfit = scratch;
  int32_t* ends = (int32_t*)(p.x.unfit + whole_lines(p.x.rows));
  p.x.records = (uint8_t*)ends + whole_lines(p.x.segments * 4);
  p.x.sums = (float*)(p.x.records + whole_lines(p.x.units * p.x.rows * row_bytes(p.x)));
  p.x.starts = (int32_t*)((uint8_t*)p.x.sums + whole_lines(p.x.segments * p.x.rows * 4));
  int64_t column = 0;
  for (int64_t s = 0; s < p.x.segments; ++s) {
    const int64_t start = column / 32 / p.x.chunk * p.x.chunk * 32;
    column = segment_end(p.x, column);
    ends[s] = (int32_t)(column - start);
  }
  const int64_t tiles = (g->rows + INTEGER_ROWS - 1) / INTEGER_ROWS, strips = int_strips(w);
  rq::parallel(tiles, (1 << 15) / (INTEGER_ROWS * (w->length + 1)) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i * INTEGER_ROWS, left = g->rows - row;
      const int rows = left < INTEGER_ROWS ? (int)left : (int)INTEGER_ROWS;
      round_tile(p.x, x + row * g->x_stride * x_bytes, g->x_stride * x_bytes, g->x_dtype, row, rows, int_tile_rows(left));
    }
  });
  const int64_t columns = (strips + INT_STRIPS - 1) / INT_STRIPS, blocks = (g->rows + INT_BLOCK_ROWS - 1) / INT_BLOCK_ROWS;
  const int64_t work = INT_STRIPS * RQ_ROWS * (w->length + 1) * (g->rows < INT_BLOCK_ROWS ? g->rows : (int64_t)INT_BLOCK_ROWS);
  rq::parallel(columns * blocks, (1 << 18) / work + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / columns * INT_BLOCK_ROWS, stop = row + INT_BLOCK_ROWS < g->rows ? row + INT_BLOCK_ROWS : g->rows;
      int_block(g, p, ends, i % columns * INT_STRIPS, row, stop, i == begin, out);
    }
  });
  if (p.x.coded) return 0;
  // Runs of rows that are unfit, as floats.
  uint8_t* rest = scratch + whole_lines(p.x.rows);
  for (int64_t row = 0; row < g->rows;) {
    int64_t stop = row;
    while (stop < g->rows && p.x.unfit[stop] == 1) ++stop;
    if (stop == row) {
      ++row;
      continue;
    }
    RqGemm some = *g;
    some.arithmetic = RQ_FLOAT;
    some.rows = stop - row;
    some.scratch_bytes = scratch_bytes - (rest - scratch);
    const int code = gemm_float(&some, x + row * g->x_stride * x_bytes, out + row * g->out_stride * (g->out_dtype == RQ_F32 ? 4 : 2), rest);
    if (code) return code;
    row = stop;
  }
  return 0;
}

static int int_gemm(const RqGemm* gemm, const void* x, void* out, void* scratch) {
  if (!int_takes(gemm)) return RQ_E_ARGUMENT;
  uint8_t* aligned = (uint8_t*)(((uintptr_t)scratch + 63) & ~(uintptr_t)63);
  const int64_t bytes = gemm->scratch_bytes - (aligned - (uint8_t*)scratch);
  const IntPlan p = int_plan(gemm);
  int64_t part = gemm->rows;
  if (gemm->scratch_bytes < int_least_bytes(gemm)) return RQ_E_SCRATCH;
  while (part > 1 && int_bytes(p, part) > gemm->scratch_bytes)
    part = part > INTEGER_ROWS ? (part / 2 + INTEGER_ROWS - 1) / INTEGER_ROWS * INTEGER_ROWS : part - 1;
  RqGemm g = *gemm;
  const int64_t x_bytes = p.x.coded ? 1 : g.x_dtype == RQ_F32 ? 4 : 2, out_bytes = g.out_dtype == RQ_F32 ? 4 : 2;
  for (int64_t row = 0; row < gemm->rows; row += part) {
    g.rows = gemm->rows - row < part ? gemm->rows - row : part;
    if (p.x.coded) g.steps = gemm->steps + row;
    const int code = int_part(&g, p, (const uint8_t*)x + row * g.x_stride * x_bytes, (uint8_t*)out + row * g.out_stride * out_bytes, aligned, bytes);
    if (code) return code;
  }
  return 0;
}
#endif

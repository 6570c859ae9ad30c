// RQ_CODED for more than a few rows with AMX: int8 tiles of x by unsigned codes, exact sums of 32 bits in tile registers.
//
// Included inside the namespace of a level, after amx.h and integer_weight.h.
//
// A tile of the weight is 64 columns of 16 rows: two units of bytes as they lie in a strip, since each unit is [8][16][4]. A tile
// of x is [16 rows][64 columns], copied into that order once. Where groups are odd multiples of 32 columns, both have 32 columns.
// Two tiles of x by two strips are multiplied at a time: 32 x 32 sums in four tile registers.
#ifndef RQ_INTEGER_AMX_H
#define RQ_INTEGER_AMX_H

enum {
  INT_TILE_ROWS = 16,
  INT_TILE_STRIPS = 2,
  INT_TILE_BLOCK = 256,    // rows of x whose tiles stay in the second-level cache while all strips pass
  INT_TILE_COLUMNS = 512,  // of a chunk: of two strips it stays in the first-level cache
  INT_TILE_SEGMENTS = INT_TILE_COLUMNS / 32 + 1,  // of a chunk, at most
};

struct TilePlan {
  int64_t width;     // columns of a tile: 64 or 32
  int64_t count;     // tiles of a row of x
  int64_t group;     // columns that share a scale of the weight
  int64_t segments;  // of a row: parts of a group whose products fit into 32 bits
  int32_t zero;      // code of 0
  bool panel;        // codes are unpacked first
};

static inline int64_t tile_segment_end(const TilePlan& p, int64_t column) {
  const int64_t group = (column / p.group + 1) * p.group, longest = (column / INT_LONGEST + 1) * INT_LONGEST;
  const int64_t end = group < longest ? group : longest, all = p.count * p.width;
  return end < all ? end : all;
}

static TilePlan tile_plan(const RqWeight* w) {
  TilePlan p = {};
  const bool grouped = w->groups > 1, table = w->code == RQ_TABLE;
  p.width = grouped && w->group % 64 ? 32 : 64;
  p.count = (w->length + p.width - 1) / p.width;
  p.group = grouped ? w->group : p.count * p.width;
  p.zero = table ? 128 : w->zero_code;
  p.panel = table || w->bits != 8;
  for (int64_t c = 0; c < p.count * p.width; c = tile_segment_end(p, c)) ++p.segments;
  return p;
}

static bool tiles_take(const RqGemm* g) {
  const RqWeight* w = g->weight;
  return g->arithmetic == RQ_CODED && g->rows > INT_FEW_ROWS && w->length > 0 && (w->groups <= 1 || (w->group > 0 && w->group % 32 == 0));
}

static inline int64_t tile_padded(int64_t rows) { return (rows + INT_TILE_ROWS - 1) / INT_TILE_ROWS * INT_TILE_ROWS; }

// The scratch buffer: x in tiles, and of each segment its sum and what sums of products start from.
struct TileX {
  int8_t* tiles;    // [rows / 16][count][16][width]
  int32_t* starts;  // [rows / 16][segments][16]: minus the zero code times the sum of x
  float* sums;      // likewise: the sum of x
};
static int64_t tile_bytes(const TilePlan& p, int64_t rows) { return 64 + tile_padded(rows) * (p.count * p.width + p.segments * 8); }

// Row tile `i` of x, which has `rows` rows.
static void tile_of_rows(const TilePlan& p, const int8_t* x, int64_t stride, int64_t length, int64_t i, int rows, const TileX& to) {
  const int64_t columns = p.count * p.width;
  for (int r = 0; r < INT_TILE_ROWS; ++r) {
    const int8_t* row = x + r * stride;
    int8_t* tile = to.tiles + i * INT_TILE_ROWS * columns + r * p.width;
    int64_t segment = i * p.segments * INT_TILE_ROWS + r, end = tile_segment_end(p, 0);
    __m512i total = _mm512_setzero_si512();
    for (int64_t c = 0; c < columns; c += p.width, tile += INT_TILE_ROWS * p.width) {
      const int64_t left = r < rows ? length - c : 0, take = left < p.width ? left : p.width;
      const __m512i code = _mm512_maskz_loadu_epi8(take >= 64 ? ~0ull : (1ull << take) - 1, row + c);
      if (p.width == 64) _mm512_storeu_si512(tile, code);
      else _mm256_storeu_si256((__m256i*)tile, _mm512_castsi512_si256(code));
      total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(1), code);
      if (c + p.width != end) continue;
      const int32_t sum = _mm512_reduce_add_epi32(total);
      to.starts[segment] = -p.zero * sum;
      to.sums[segment] = (float)sum;
      total = _mm512_setzero_si512();
      segment += INT_TILE_ROWS;
      end = tile_segment_end(p, end);
    }
  }
}

// What is fetched meanwhile into the second-level cache: `lines` of each of two strips for each tile.
struct TileFetch {
  const uint8_t* from[INT_TILE_STRIPS];
  int64_t lines;
};

// Adds `count` tiles to the sums in the registers. TWO: tiles of x, else one.
template <bool TWO>
static inline void add_tiles(const int8_t* x, int64_t next, int64_t width, const uint8_t* w0, const uint8_t* w1, int64_t count, TileFetch* fetch) {
  const int64_t step = INT_TILE_ROWS * width;
  tile_barrier();
  for (int64_t i = 0; i < count; ++i, x += step, w0 += step, w1 += step) {
    _tile_loadd(6, w0, 64);
    _tile_loadd(4, x, width);
    _tile_loadd(7, w1, 64);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    if (TWO) {
      _tile_loadd(5, x + next, width);
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
    for (int64_t line = 0; line < fetch->lines; ++line)
      for (int s = 0; s < INT_TILE_STRIPS; ++s) __builtin_prefetch(fetch->from[s], 0, 2), fetch->from[s] += 64;
  }
}
// Sums in memory are four tiles in a row, of 16 rows of 16.
static inline void load_integers(const int32_t* sums) {
  tile_barrier();
  load_sums(sums, sums + 512, 1024, 64);
}
static inline void store_integers(int32_t* sums) { store_sums(sums, sums + 512, 1024, 64); }

// Columns of a chunk that belong to one segment.
struct TilePiece {
  int64_t first, count;   // tile of the chunk, tiles
  int64_t group;          // of the chunk, whose scales it has
  bool carry_in, carry_out;  // the segment began in the chunk before, goes on in the next
};
static int tile_pieces(const TilePlan& p, int64_t first, int64_t last, TilePiece* pieces) {
  int found = 0;
  for (int64_t c = first; c < last; ++found) {
    const int64_t end = tile_segment_end(p, c), to = end < last ? end : last;
    pieces[found] = {(c - first) / p.width, (to - c) / p.width, c / p.group - first / p.group, c && tile_segment_end(p, c - 1) != c, to != end};
    c = to;
  }
  return found;
}

// The end of a segment, of up to 16 rows: y += scale of the weight * sum - shift * sum of x. y is not read at the first one.
template <bool FIRST, bool SHIFTED>
static inline void end_segment(const int32_t* products, const int32_t* starts, const float* sums, int64_t rows,
                               const float (*scale)[INT_TILE_SEGMENTS * 16], const float (*shift)[INT_TILE_SEGMENTS * 16], int64_t group, float* y) {
  const Floats each[INT_TILE_STRIPS] = {load_floats(scale[0] + 16 * group), load_floats(scale[1] + 16 * group)};
  for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 2
    for (int s = 0; s < INT_TILE_STRIPS; ++s) {
      float* at = y + (r * INT_TILE_STRIPS + s) * 16;
      const Ints exact = Ints{_mm512_loadu_si512(products + 256 * s + 16 * r)} + splat_int(starts[r]);
      Floats value = fma(to_floats(exact), each[s], FIRST ? splat(0) : load_floats(at));
      if (SHIFTED) value = fnma(load_floats(shift[s] + 16 * group), splat(sums[r]), value);
      store_floats(at, value);
    }
}

// The results of `rows` rows of x, from `row` on, of the strips from `strip` on. Both strips of a row together: they share a line.
static void finish_rows(const RqGemm* g, const float* y, int64_t strip, int64_t row, int64_t rows, uint8_t* out) {
  const int64_t bias_bytes = g->bias_dtype == RQ_F32 ? 4 : 2, out_bytes = g->out_dtype == RQ_F32 ? 4 : 2;
  const bool biased = g->bias_dtype != RQ_NONE;
  Floats bias[INT_TILE_STRIPS];
  int lanes[INT_TILE_STRIPS];
  for (int s = 0; s < INT_TILE_STRIPS; ++s) {
    const int64_t n = (strip + s) * RQ_ROWS, left = g->weight->rows - n;
    lanes[s] = left >= RQ_ROWS ? (int)RQ_ROWS : left > 0 ? (int)left : 0;
    bias[s] = biased && lanes[s] ? load_dtype((const uint8_t*)g->bias + n * bias_bytes, g->bias_dtype, lanes[s]) : splat(0);
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int s = 0; s < INT_TILE_STRIPS && lanes[s]; ++s) {
      Floats value = load_floats(y + (r * INT_TILE_STRIPS + s) * 16) * splat(g->steps[row + r]);
      if (biased) value = value + bias[s];
      store_dtype(out + ((row + r) * g->out_stride + (strip + s) * RQ_ROWS) * out_bytes, g->out_dtype, lanes[s], value);
    }
}

// Rows `row` to `stop` of x by the strips from `strip` on.
static void tile_block(const RqGemm* g, const TilePlan& p, const TileX& x, int64_t strip, int64_t row, int64_t stop, uint8_t* out) {
  alignas(64) uint8_t panel[INT_TILE_STRIPS][INT_TILE_COLUMNS * RQ_ROWS];
  alignas(64) float scale[INT_TILE_STRIPS][INT_TILE_SEGMENTS * 16], shift[INT_TILE_STRIPS][INT_TILE_SEGMENTS * 16];
  alignas(64) float y[INT_TILE_BLOCK * INT_TILE_STRIPS * 16];
  alignas(64) int32_t carry[INT_TILE_BLOCK * INT_TILE_STRIPS * 16], products[2 * INT_TILE_ROWS * INT_TILE_STRIPS * 16];
  TilePiece pieces[INT_TILE_SEGMENTS];
  const RqWeight* w = g->weight;
  const int64_t unit = 64 * w->bits, units = (w->length + RQ_COLUMNS - 1) / RQ_COLUMNS, strips = int_strips(w);
  const int64_t columns = p.count * p.width, out_bytes = g->out_dtype == RQ_F32 ? 4 : 2;
  const bool shifted = w->shift_kind != RQ_NO_SHIFT;
  const IntUnpack unpack = int_unpack(w);
  Bytes table[4];
  if (w->code == RQ_TABLE) int_table(w, table);
  int64_t segment = 0;
  for (int64_t first = 0; first < columns; first += INT_TILE_COLUMNS) {
    const int64_t last = first + INT_TILE_COLUMNS < columns ? first + INT_TILE_COLUMNS : columns, at = first / RQ_COLUMNS;
    const int64_t stored = last / RQ_COLUMNS < units ? last / RQ_COLUMNS : units, begin = first / p.group;
    const int64_t end = last < w->length ? (last + p.group - 1) / p.group : w->groups;
    const bool half = last / RQ_COLUMNS > units;  // the last tile lacks its second unit: whatever is there meets zeros of x
    const uint8_t* codes[INT_TILE_STRIPS];
    for (int s = 0; s < INT_TILE_STRIPS; ++s) {
      codes[s] = w->codes + ((strip + s < strips ? strip + s : strips - 1) * units + at) * unit;
      if (p.panel || half) {
        unpack(codes[s], stored - at, table, panel[s]);
        codes[s] = panel[s];
      }
      int_scales(g, strip + s, begin, end, scale[s], shifted ? shift[s] : nullptr);
    }
    // Fetched meanwhile: the next codes of these strips, or the first of the next ones.
    const int64_t row_pairs = (stop - row + 2 * INT_TILE_ROWS - 1) / (2 * INT_TILE_ROWS), tiles = row_pairs * ((last - first) / p.width);
    TileFetch fetch = {};
    for (int s = 0; s < INT_TILE_STRIPS; ++s)
      fetch.from[s] = w->codes + (last < columns ? (strip + s) * units + stored : (strip + INT_TILE_STRIPS + s) * units) * unit;
    fetch.lines = last < columns || strip + INT_TILE_STRIPS < strips ? ((stored - at) * unit / 64 + tiles - 1) / tiles : 0;
    const int count = tile_pieces(p, first, last, pieces);
    for (int64_t r = row; r < stop; r += 2 * INT_TILE_ROWS) {
      const int64_t rows = stop - r < 2 * INT_TILE_ROWS ? stop - r : 2 * INT_TILE_ROWS;
      int32_t* kept = carry + (r - row) * INT_TILE_STRIPS * 16;
      if (last == columns)
        for (int64_t i = r; i < r + rows; ++i) __builtin_prefetch(out + (i * g->out_stride + strip * RQ_ROWS) * out_bytes, 1);
      // A segment ends while the next one is multiplied, whose sums would be waited for.
      for (int i = 0; i <= count; ++i) {
        if (i < count) {
          const TilePiece& piece = pieces[i];
          if (piece.carry_in) load_integers(kept);
          else zero_sums();
          const int8_t* from = x.tiles + r * columns + (first + piece.first * p.width) * INT_TILE_ROWS;
          const uint8_t *w0 = codes[0] + piece.first * RQ_ROWS * p.width, *w1 = codes[1] + piece.first * RQ_ROWS * p.width;
          if (rows > INT_TILE_ROWS) add_tiles<true>(from, INT_TILE_ROWS * columns, p.width, w0, w1, piece.count, &fetch);
          else add_tiles<false>(from, 0, p.width, w0, w1, piece.count, &fetch);
        }
        const int64_t ended = segment + i - 1;
        for (int64_t t = 0; i > 0 && !pieces[i - 1].carry_out && t < rows; t += INT_TILE_ROWS) {
          const auto end_of = ended ? shifted ? end_segment<false, true> : end_segment<false, false>
                                    : shifted ? end_segment<true, true> : end_segment<true, false>;
          const int64_t left = rows - t, of = (r + t) * p.segments + ended * INT_TILE_ROWS;
          end_of(products + 32 * t, x.starts + of, x.sums + of, left < INT_TILE_ROWS ? left : (int64_t)INT_TILE_ROWS, scale, shift,
                 pieces[i - 1].group, y + (r - row + t) * INT_TILE_STRIPS * 16);
        }
        if (i < count) store_integers(pieces[i].carry_out ? kept : products);
      }
      if (last == columns) finish_rows(g, y + (r - row) * INT_TILE_STRIPS * 16, strip, r, rows, out);
    }
    segment += pieces[count - 1].carry_out ? count - 1 : count;
  }
}

static int tile_part(const RqGemm* g, const TilePlan& p, const int8_t* x, uint8_t* out, uint8_t* scratch) {
  const RqWeight* w = g->weight;
  const int64_t columns = p.count * p.width, padded = tile_padded(g->rows);
  TileX to = {(int8_t*)scratch, (int32_t*)(scratch + padded * columns), (float*)(scratch + padded * (columns + p.segments * 4))};
  rq::parallel(padded / INT_TILE_ROWS, (1 << 15) / (INT_TILE_ROWS * columns) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t left = g->rows - i * INT_TILE_ROWS;
      tile_of_rows(p, x + i * INT_TILE_ROWS * g->x_stride, g->x_stride, w->length, i, left < INT_TILE_ROWS ? (int)left : (int)INT_TILE_ROWS, to);
    }
  });
  const int64_t pairs = (int_strips(w) + INT_TILE_STRIPS - 1) / INT_TILE_STRIPS, blocks = (g->rows + INT_TILE_BLOCK - 1) / INT_TILE_BLOCK;
  const int64_t work = INT_TILE_STRIPS * RQ_ROWS * columns * (g->rows < INT_TILE_BLOCK ? g->rows : (int64_t)INT_TILE_BLOCK);
  rq::parallel(pairs * blocks, (1 << 20) / work + 1, [&](int64_t begin, int64_t end) {
    Tiles registers;
    registers.configure(INT_TILE_ROWS, INT_TILE_ROWS, (int)p.width);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / pairs * INT_TILE_BLOCK, stop = row + INT_TILE_BLOCK < g->rows ? row + INT_TILE_BLOCK : g->rows;
      tile_block(g, p, to, i % pairs * INT_TILE_STRIPS, row, stop, out);
    }
  });
  return 0;
}

static int64_t tile_scratch(const RqGemm* g, int64_t rows) { return tile_bytes(tile_plan(g->weight), rows); }

static int tile_gemm(const RqGemm* gemm, const void* x, void* out, void* scratch) {
  if (!int_takes(gemm)) return RQ_E_ARGUMENT;
  const TilePlan p = tile_plan(gemm->weight);
  if (gemm->scratch_bytes < tile_bytes(p, 1)) return RQ_E_SCRATCH;
  uint8_t* aligned = (uint8_t*)(((uintptr_t)scratch + 63) & ~(uintptr_t)63);
  int64_t part = gemm->rows;
  while (part > INT_TILE_ROWS && tile_bytes(p, part) > gemm->scratch_bytes) part = tile_padded(part / 2);
  RqGemm g = *gemm;
  for (int64_t row = 0; row < gemm->rows; row += part) {
    g.rows = gemm->rows - row < part ? gemm->rows - row : part;
    g.steps = gemm->steps + row;
    uint8_t* to = (uint8_t*)out + row * g.out_stride * (g.out_dtype == RQ_F32 ? 4 : 2);
    const int code = tile_part(&g, p, (const int8_t*)x + row * g.x_stride, to, aligned);
    if (code) return code;
  }
  return 0;
}
#endif

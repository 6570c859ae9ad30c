// RQ_FLOAT: x stays float32 (or bfloat16, with products and float32 sums of the processor), and so do the weights.
//
// Included inside the namespace of a level, after float_rows.h and float_tile.h.
#ifndef RQ_FLOAT_H
#define RQ_FLOAT_H

enum {
  FLOAT_FEW_ROWS = 4,
  PART_ROWS = 588,                                  // rows of x that share a decoded panel: 42 tiles of AVX-512, 98 of others
  PANEL_GROUPS = 2 * 128 * 1024 / 4 / PANEL_WIDTH / 8 + 2,
  PANEL_WORDS = 128 * 1024 / 4 / PANEL_WIDTH,       // columns (or pairs) of a panel: it stays in the second cache
};

static inline int64_t float_columns(const RqWeight* w) { return (w->length + RQ_COLUMNS - 1) / RQ_COLUMNS * RQ_COLUMNS; }
static inline int64_t float_strips(const RqWeight* w) { return (w->rows + RQ_ROWS - 1) / RQ_ROWS; }
static inline bool float_pairs(const RqGemm* g) { return RQ_BF16_DOT && g->x_dtype == RQ_BF16; }
// Numbers of bfloat16 that an element of x is multiplied as, where there are more than a few rows; 0: it stays float32.
static inline int float_parts(const RqGemm* g) {
  const RqWeight* w = g->weight;
  if (RQ_TILES && g->arithmetic == RQ_PARTS && g->x_dtype != RQ_BF16 && w->code == RQ_INTEGER && w->groups == 1 && w->shift_kind == RQ_NO_SHIFT)
    return 2;  // codes are exact in bfloat16, and sums are multiplied by their scale
  return float_pairs(g);
}

// Scratch: words of x and sums of its groups, then for each thread a panel and sums of a block of the result. (As for float32
// x: rows of bfloat16 are computed so, too, if they are unfit.)
#if RQ_TILES
static int64_t amx_slot_bytes(const RqGemm* g, int64_t rows);
#endif
static int64_t float_slot_bytes(const RqGemm* g, int64_t rows) {
  const int64_t words = float_columns(g->weight);
  const int64_t panel = (words < PANEL_WORDS ? words : (int64_t)PANEL_WORDS) * PANEL_WIDTH * 4;
  const int64_t most = panel + (words > PANEL_WORDS ? rows * PANEL_WIDTH * 4 : 0);
#if RQ_TILES
  const int64_t tiles = float_parts(g) ? amx_slot_bytes(g, rows) : 0;
  return most > tiles ? most : tiles;
#endif
  return most;
}
static int64_t float_x_bytes(const RqGemm* g, int64_t rows) {
  const int64_t few = rows <= FLOAT_FEW_ROWS ? FLOAT_FEW_ROWS * (float_columns(g->weight) + g->weight->groups) : 0;
  const int64_t many = rows * (float_columns(g->weight) / (float_pairs(g) ? 2 : 1));
  return ((few > many ? few : many) * 4 + 63) / 64 * 64;
}
static int64_t float_bytes(const RqGemm* g, int64_t rows, int64_t slots) {
  return 64 + float_x_bytes(g, rows) + slots * float_slot_bytes(g, rows);
}
static int64_t float_slots(const RqGemm* g) {
  const int64_t blocks = (float_strips(g->weight) + TILE_STRIPS - 1) / TILE_STRIPS, threads = rq::threads();
  return threads < blocks ? threads : blocks;
}
static int64_t float_scratch_bytes(const RqGemm* g, int64_t rows) {
  return float_bytes(g, rows < PART_ROWS ? rows : (int64_t)PART_ROWS, float_slots(g));
}

// Bits of sizes: 2^96, from which on sums of codes or of x could overflow that of weights does not, up to infinity and NaN; and
// 2^-100: products of bfloat16 take smaller numbers than 2^-126 for zeros.
enum { FLOAT_LARGE = 0x6F800000, FLOAT_SMALL = 0x0D800000 };

// Writes a tile of x: `rows` rows as tiles of R rows, those beyond as zeros. With `sums` ([groups][R]) also the sum of each
// group. `unfit` ([rows]): 1 for a row that `exact_rows` has to compute.
static void pack_tile(const RqGemm* g, const uint8_t* x, int rows, int R, bool pairs, float* words, float* sums, uint8_t* unfit) {
  const RqWeight* w = g->weight;
  const int64_t columns = float_columns(w), bytes = g->x_dtype == RQ_F32 ? 4 : 2;
  float block[16 * RQ_COLUMNS];
  int32_t largest[16] = {0};  // bits of the size
  if (sums) memset(sums, 0, (size_t)(w->groups * R) * 4);
  for (int64_t column = 0; column < columns; column += RQ_COLUMNS) {
    for (int r = 0; r < R; ++r) {
      float* to = block + r * RQ_COLUMNS;
      for (int i = 0; i < RQ_COLUMNS; i += 16) {
        const int64_t left = w->length - column - i;
        const bool none = r >= rows || left <= 0;
        const uint8_t* from = x + r * g->x_stride * bytes + (column + i) * bytes;
        store_floats(to + i, none ? splat(0.0f) : load_dtype(from, g->x_dtype, left < 16 ? (int)left : 16));
      }
      int32_t most = largest[r], bits[RQ_COLUMNS];
      memcpy(bits, to, sizeof bits);
      for (int i = 0; i < RQ_COLUMNS; ++i) most = (bits[i] & 0x7FFFFFFF) > most ? bits[i] & 0x7FFFFFFF : most;
      largest[r] = most;
      if (!sums) continue;
      for (int i = 0; i < RQ_COLUMNS && column + i < w->length; i += 8) {
        float sum = 0.0f;
        for (int j = 0; j < 8; ++j) sum += to[i + j];
        sums[(column + i) / w->group * R + r] += sum;
      }
    }
    if (pairs) {
      uint32_t* out = (uint32_t*)words + column / 2 * R;
      for (int c = 0; c < RQ_COLUMNS; c += c % 4 == 1 ? 3 : 1)  // columns 0 and 2, 1 and 3 of each 4
        for (int r = 0; r < R; ++r, ++out) {
          uint32_t first, second;
          memcpy(&first, block + r * RQ_COLUMNS + c, 4);
          memcpy(&second, block + r * RQ_COLUMNS + c + 2, 4);
          *out = first >> 16 | (second & 0xFFFF0000u);
        }
    } else {
      float* out = words + column * R;
      for (int c = 0; c < RQ_COLUMNS; ++c)
        for (int r = 0; r < R; ++r) *out++ = block[r * RQ_COLUMNS + c];
    }
  }
  for (int r = 0; r < rows; ++r) unfit[r] = largest[r] >= FLOAT_LARGE || (pairs && largest[r] && largest[r] < FLOAT_SMALL);
}

static inline int64_t out_bytes(const RqGemm* g) { return g->out_dtype == RQ_F32 ? 4 : 2; }

static void load_bias(const RqGemm* g, int64_t strip, float* bias) {
  const int64_t left = g->weight->rows - strip * RQ_ROWS;
  const uint8_t* from = (const uint8_t*)g->bias + strip * RQ_ROWS * (g->bias_dtype == RQ_F32 ? 4 : 2);
  store_floats(bias, load_dtype(from, g->bias_dtype, left < 16 ? (int)left : 16));
}

// The sums of a strip for a kind of values. Only this is compiled for each kind, and `DecodeStrip`.
typedef void (*SumStrip)(const void* values, const RqWeight* w, int64_t strip, const Tile& x, Floats* total);
template <class V, int R> static void sum_strip(const void* values, const RqWeight* w, int64_t strip, const Tile& x, Floats* total) {
  if (!rows_by_strip<V, R>(*(const V*)values, w, strip, x, total)) return;
  if constexpr (V::marks) rows_by_strip<Exact_floats, R>(Exact_floats(w), w, strip, x, total);
}

static int few_rows_of(const RqGemm* g, SumStrip sum, const void* values, const Tile& x, uint8_t* out) {
  const RqWeight* w = g->weight;
  const int64_t strips = float_strips(w), grain = (1 << 18) / (16 * float_columns(w)) + 1;
  rq::parallel(strips, grain, [&](int64_t begin, int64_t end) {
    const WithSubnormals mode;
    for (int64_t strip = begin; strip < end; ++strip) {
      Floats total[FLOAT_FEW_ROWS];
      sum(values, w, strip, x, total);
      const int64_t left = w->rows - strip * RQ_ROWS;
      float bias[16];
      if (g->bias) load_bias(g, strip, bias);
      for (int r = 0; r < g->rows; ++r) {
        const Floats value = g->bias ? total[r] + load_floats(bias) : total[r];
        store_dtype(out + (r * g->out_stride + strip * RQ_ROWS) * out_bytes(g), g->out_dtype, left < 16 ? (int)left : 16, value);
      }
    }
  });
  return 0;
}

template <class V> static int few_rows_with(const V& values, const RqGemm* g, const Tile& x, uint8_t* out) {
  return few_rows_of(g, g->rows == 1 ? sum_strip<V, 1> : sum_strip<V, FLOAT_FEW_ROWS>, &values, x, out);
}

// `rows` (1 to 4) rows.
static int few_rows(const RqGemm* g, bool pairs, const Tile& x, uint8_t* out) {
  const auto use = [&](const auto& values) { return few_rows_with(values, g, x, out); };
#if RQ_BF16_DOT
  if (pairs) return with_pairs(g->weight, use);
#endif
  (void)pairs;
  return with_floats(g->weight, use);
}

// Columns of the result that a block has.
static inline int block_columns(const RqWeight* w, int64_t block) {
  const int64_t left = w->rows - block * PANEL_WIDTH;
  return left < PANEL_WIDTH ? (int)left : (int)PANEL_WIDTH;
}

// The sums of `rows` rows, [rows][PANEL_WIDTH], times `scale` (if it is not null) plus the bias: to `out`.
static void write_sums(const RqGemm* g, const float* sums, int rows, int columns, const float* scale, const float* bias, uint8_t* out) {
  const int64_t bytes = out_bytes(g);
  for (int r = 0; r < rows; ++r, sums += PANEL_WIDTH, out += g->out_stride * bytes) {
    for (int s = 0; s < columns; s += 16) {
      Floats value = load_floats(sums + s);
      if (scale) value = value * load_floats(scale + s);
      if (g->bias) value = value + load_floats(bias + s);
      store_dtype(out + s * bytes, g->out_dtype, columns - s < 16 ? columns - s : 16, value);
    }
  }
}

typedef void (*DecodeStrip)(const void* values, const RqWeight* w, int64_t strip, int64_t begin, int64_t end, const float* scale,
                            const float* shift, float* panel);
template <class V, bool PAIRS>
static void decode(const void* values, const RqWeight* w, int64_t strip, int64_t begin, int64_t end, const float* scale,
                   const float* shift, float* panel) {
  if (!decode_strip<V, PAIRS>(*(const V*)values, w, strip, begin, end, scale, shift, panel)) return;
  if constexpr (V::marks) decode_strip<Exact_floats, PAIRS>(Exact_floats(w), w, strip, begin, end, scale, shift, panel);
}

// A GEMM of many rows: how its weight is decoded, and `x`, packed in tiles of R rows. `raw`: panels hold codes' values, and the
// sums are multiplied by the scale.
typedef struct ManyRows {
  DecodeStrip decode;
  const void* values;
  bool raw;
  const float* x;
  int R;
} ManyRows;

#if RQ_TILES
#include "float_amx.h"
#endif

// The result block by block, each TILE_STRIPS strips wide.
template <bool PAIRS> static int many_rows_of(const RqGemm* g, const ManyRows& m, uint8_t* out, uint8_t* scratch, int64_t slots) {
  const bool raw = m.raw;
  const float* x = m.x;
  const int R = m.R;
  const RqWeight* w = g->weight;
  const int64_t strips = float_strips(w), blocks = (strips + TILE_STRIPS - 1) / TILE_STRIPS, per_word = PAIRS ? 2 : 1;
  const int64_t words = float_columns(w) / per_word, slot_bytes = float_slot_bytes(g, g->rows);
  int64_t taken = 0;
  rq::parallel(slots, 1, [&](int64_t slot, int64_t) {
    const WithSubnormals mode;
    float* panel = (float*)(scratch + slot * slot_bytes);
    float* kept = panel + (words < PANEL_WORDS ? words : (int64_t)PANEL_WORDS) * PANEL_WIDTH;
    float scale[PANEL_GROUPS * 16], shift[PANEL_GROUPS * 16], row_scale[PANEL_WIDTH], bias[PANEL_WIDTH];
    float tile[TILE_ROWS * PANEL_WIDTH];
    const float* shifts = w->shift_kind == RQ_NO_SHIFT ? nullptr : shift;
    for (int i = 0; raw && i < 16; ++i) scale[i] = 1.0f;
    for (;;) {  // threads take blocks as they are ready: which one computes a block does not change it
      const int64_t block = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED);
      if (block >= blocks) break;
      for (int64_t from = 0; from < words; from += PANEL_WORDS) {
        const int64_t count = from + PANEL_WORDS < words ? (int64_t)PANEL_WORDS : words - from;
        const int64_t begin = from * per_word, end = begin + count * per_word, stop = end < w->length ? end : w->length;
        for (int s = 0; s < TILE_STRIPS; ++s) {
          // Beyond the last strip of an odd number: that one again. Its sums are not written.
          const int64_t strip = block * TILE_STRIPS + s < strips ? block * TILE_STRIPS + s : strips - 1;
          if (raw) strip_scales(w, strip, 0, 1, row_scale + 16 * s, nullptr);
          else strip_scales(w, strip, begin / w->group, (stop + w->group - 1) / w->group, scale, shift);
          float* to = panel + 16 * s;
          m.decode(m.values, w, strip, begin, end, scale, shifts, to);
          if (g->bias) load_bias(g, strip, bias + 16 * s);
        }
        for (int64_t row = 0; row < g->rows; row += R) {
          const int rows = g->rows - row < R ? (int)(g->rows - row) : R;
          float* sums = words <= PANEL_WORDS ? tile : kept + row * PANEL_WIDTH;
          if (from == 0) memset(sums, 0, (size_t)rows * PANEL_WIDTH * 4);
          multiply_rows<PAIRS>(rows, panel, x + row * words + from * rows, count, sums);
          if (from + count < words) continue;
          uint8_t* to = out + (row * g->out_stride + block * PANEL_WIDTH) * out_bytes(g);
          write_sums(g, sums, rows, block_columns(w, block), raw ? row_scale : nullptr, bias, to);
        }
      }
    }
  });
  return 0;
}

template <bool PAIRS, class V> static int many_rows_with(const V& values, const RqGemm* g, ManyRows m, uint8_t* out, uint8_t* scratch, int64_t slots) {
  m.decode = decode<V, PAIRS>;
  m.values = &values;
#if RQ_TILES
  if constexpr (PAIRS) return float_parts(g) == 2 ? amx_rows_of<2>(g, m, out, scratch, slots) : amx_rows_of<1>(g, m, out, scratch, slots);
#endif
  return many_rows_of<PAIRS>(g, m, out, scratch, slots);
}

// `exact`: each weight is multiplied by its scale, whatever the form of the scales.
template <bool PAIRS>
static int many_rows(const RqGemm* g, const float* x, int R, bool exact, uint8_t* out, uint8_t* scratch, int64_t slots) {
  const RqWeight* w = g->weight;
  // One scale a row: sums of exact values are multiplied by it. Else each weight is, and rounded to bfloat16 with pairs, as a
  // dequantized weight is.
  const bool raw = !exact && w->groups == 1 && w->shift_kind == RQ_NO_SHIFT && !(PAIRS && w->code == RQ_TABLE);
  const ManyRows m = {nullptr, nullptr, raw, x, R};
  const auto use = [&](const auto& values) { return many_rows_with<PAIRS>(values, g, m, out, scratch, slots); };
#if RQ_BF16_DOT
  if constexpr (PAIRS)
    if (raw && has_pairs(w)) return with_pairs(w, use);
#endif
  return with_floats(w, use);
}

// All rows, as tiles of at most TILE_ROWS. `parts`: see `float_parts`.
static int in_tiles(const RqGemm* g, int parts, bool exact, const uint8_t* x, uint8_t* out, float* words, uint8_t* scratch,
                    int64_t slots, uint8_t* unfit) {
  const bool pairs = parts > 0, amx = RQ_TILES && pairs;
  const int64_t tiles = (g->rows + TILE_ROWS - 1) / TILE_ROWS, R = amx ? 16 : (g->rows + tiles - 1) / tiles;
  const int64_t row_words = float_columns(g->weight) / (parts == 1 ? 2 : 1), x_bytes = g->x_dtype == RQ_F32 ? 4 : 2;
  rq::parallel((g->rows + R - 1) / R, 4, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * R; row < end * R && row < g->rows; row += R) {
      const int rows = g->rows - row < R ? (int)(g->rows - row) : (int)R;
      const uint8_t* from = x + row * g->x_stride * x_bytes;
#if RQ_TILES
      if (amx) {
        if (parts == 2) pack_amx_parts(g, from, rows, words + row * row_words, unfit + row);
        else pack_amx(g, from, rows, words + row * row_words, unfit + row);
        continue;
      }
#endif
      pack_tile(g, from, rows, rows, pairs, words + row * row_words, nullptr, unfit + row);
    }
  });
  if (pairs) return many_rows<RQ_BF16_DOT>(g, words, (int)R, exact, out, scratch, slots);
  return many_rows<false>(g, words, (int)R, exact, out, scratch, slots);
}

// Rows with numbers that are very large, no numbers or (with products of bfloat16) very small, once more: as float32, by weights
// that are multiplied by their scales first. `most`: rows whose words there is room for.
static int exact_rows(const RqGemm* g, int64_t most, const uint8_t* unfit, const uint8_t* x, uint8_t* out, float* words,
                      uint8_t* scratch, int64_t slots) {
  const int64_t x_bytes = g->x_stride * (g->x_dtype == RQ_F32 ? 4 : 2), bytes = g->out_stride * out_bytes(g);
  uint8_t again[PART_ROWS];
  for (int64_t row = 0; row < g->rows;) {
    int64_t stop = row;
    while (stop < g->rows && stop - row < most && unfit[stop]) ++stop;
    if (stop > row) {
      RqGemm some = *g;
      some.rows = stop - row;
      const int code = in_tiles(&some, 0, true, x + row * x_bytes, out + row * bytes, words, scratch, slots, again);
      if (code) return code;
    }
    row = stop > row ? stop : row + 1;
  }
  return 0;
}

// `few`: the GEMM has few rows in all. (How rows are computed must not follow from how many threads or bytes of scratch there
// are, nor from the numbers in other rows.)
static int float_part(const RqGemm* g, bool few, const uint8_t* x, uint8_t* out, uint8_t* scratch, int64_t slots) {
  const RqWeight* w = g->weight;
  float* words = (float*)scratch;
  uint8_t unfit[PART_ROWS];
  scratch += float_x_bytes(g, g->rows);
  int code;
  if (few) {
    const int R = g->rows == 1 ? 1 : (int)FLOAT_FEW_ROWS;
#if RQ_BF16_DOT
    const bool pairs = float_pairs(g) && has_pairs(w);
#else
    const bool pairs = false;
#endif
    float* sums = w->shift_kind == RQ_NO_SHIFT ? nullptr : words + FLOAT_FEW_ROWS * float_columns(w);
    pack_tile(g, x, (int)g->rows, R, pairs, words, sums, unfit);
    code = few_rows(g, pairs, Tile{words, sums}, out);
  } else {
    code = in_tiles(g, float_parts(g), false, x, out, words, scratch, slots, unfit);
  }
  const int64_t most = g->rows > FLOAT_FEW_ROWS && float_pairs(g) ? g->rows / 2 : g->rows;
  return code ? code : exact_rows(g, most, unfit, x, out, words, scratch, slots);
}

static int float_gemm(const RqGemm* gemm, const void* x, void* out, void* scratch) {
  // The rows of a part, and the threads, that the scratch buffer has room for.
  const int64_t most = gemm->scratch_bytes, least = gemm->rows < FLOAT_FEW_ROWS ? gemm->rows : (int64_t)FLOAT_FEW_ROWS;
  int64_t slots = float_slots(gemm), part = gemm->rows < PART_ROWS ? gemm->rows : (int64_t)PART_ROWS;
  while (part > least && float_bytes(gemm, part, slots) > most) {
    if (slots > 1 && float_bytes(gemm, least, slots) * 2 > most) slots = (slots + 1) / 2;
    else part = part / 2 < least ? least : part / 2;
  }
  while (slots > 1 && float_bytes(gemm, part, slots) > most) --slots;
  const int64_t parts = (gemm->rows + part - 1) / (part > 0 ? part : 1);
  if (parts > 1) part = (gemm->rows + parts - 1) / parts;  // of one size: each part decodes the weight
  if (float_bytes(gemm, part, slots) > most) return RQ_E_SCRATCH;
  uint8_t* aligned = (uint8_t*)(((uintptr_t)scratch + 63) & ~(uintptr_t)63);
  RqGemm g = *gemm;
  const int64_t x_bytes = gemm->x_dtype == RQ_F32 ? 4 : 2;
  for (int64_t row = 0; row < gemm->rows; row += part) {
    g.rows = gemm->rows - row < part ? gemm->rows - row : part;
    const uint8_t* from = (const uint8_t*)x + row * gemm->x_stride * x_bytes;
    const int code = float_part(&g, gemm->rows <= FLOAT_FEW_ROWS, from, (uint8_t*)out + row * gemm->out_stride * out_bytes(gemm), aligned, slots);
    if (code) return code;
  }
  return 0;
}
#endif

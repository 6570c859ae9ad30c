// Many rows of bfloat16 x with AMX: panels of weights, decoded as float_tile.h does, are the operand B of tiles.
//
// Included inside the namespace of a level, by float.h. x is packed as operand A: for each 16 rows (fewer at the end) and 32
// columns one tile, [rows][16 pairs], in the order of columns that panels have. x of float32 and float16 has two parts, each
// of bfloat16 (`float_parts`): of the first, what x is rounded to, one tile, then one of the second, the rest.
#ifndef RQ_FLOAT_AMX_H
#define RQ_FLOAT_AMX_H

enum {
  AMX_ROWS = 16,     // of x in a tile
  AMX_WORDS = 256,   // pairs of columns of a panel, about: 32 KB, and 32 rows of x take as much
  AMX_PANELS = 8,    // of a block, so that x is read from the second cache or memory once for 256 columns of the result
};

// Pairs of columns of a panel, of `words` in all: parts of one size, since sums are loaded and stored for each.
static inline int64_t amx_words(int64_t words) {
  const int64_t parts = (words + AMX_WORDS / 2) / AMX_WORDS, whole = parts ? (words + parts - 1) / parts : words;
  return (whole + 15) / 16 * 16;
}

// Panels of a block, and its sums.
static inline int64_t amx_slot_bytes(const RqGemm* g, int64_t rows) {
  const int64_t words = float_columns(g->weight) / 2;
  const int64_t panel = amx_words(words) * PANEL_WIDTH * 4;
  return AMX_PANELS * (panel + (rows > 2 * AMX_ROWS ? rows * PANEL_WIDTH * 4 : 0));
}

// 32 columns: of each 4, the second and the third change places.
static inline __m512i pairs_in_panel_order(__m512i all) {
  return _mm512_shufflehi_epi16(_mm512_shufflelo_epi16(all, (_MM_PERM_ENUM)0xD8), (_MM_PERM_ENUM)0xD8);
}

// Up to 16 rows of x. `unfit`: see `pack_tile`.
static void pack_amx(const RqGemm* g, const uint8_t* x, int rows, float* words, uint8_t* unfit) {
  const int64_t length = g->weight->length;
  for (int r = 0; r < rows; ++r, x += g->x_stride * 2) {
    __m512i largest = _mm512_setzero_si512();
    float* to = words + r * 16;
    for (int64_t column = 0; column < length; column += RQ_COLUMNS, to += rows * 16) {
      const __mmask32 mask = length - column < RQ_COLUMNS ? (__mmask32)((1u << (length - column)) - 1) : ~(__mmask32)0;
      const __m512i all = _mm512_maskz_loadu_epi16(mask, x + column * 2);
      largest = _mm512_max_epu16(largest, _mm512_and_si512(all, _mm512_set1_epi16(0x7FFF)));
      store_bytes(to, {pairs_in_panel_order(all)});
    }
    const __m512i odd = _mm512_srli_epi32(largest, 16), even = _mm512_and_si512(largest, _mm512_set1_epi32(0xFFFF));
    const int32_t most = _mm512_reduce_max_epi32(_mm512_max_epi32(odd, even));
    unfit[r] = most >= FLOAT_LARGE >> 16 || (most && most < FLOAT_SMALL >> 16);
  }
}

// As `pack_amx`, of x in two parts.
static void pack_amx_parts(const RqGemm* g, const uint8_t* x, int rows, float* words, uint8_t* unfit) {
  const int64_t length = g->weight->length, bytes = g->x_dtype == RQ_F32 ? 4 : 2;
  for (int r = 0; r < rows; ++r, x += g->x_stride * bytes) {
    __m512i largest = _mm512_setzero_si512();
    float* to = words + r * 16;
    for (int64_t column = 0; column < length; column += RQ_COLUMNS, to += 2 * rows * 16) {
      __m512 all[2], rest[2];
      for (int i = 0; i < 2; ++i) {
        const int64_t left = length - column - 16 * i;
        const uint8_t* from = x + (column + 16 * i) * bytes;
        all[i] = left > 0 ? load_dtype(from, g->x_dtype, left < 16 ? (int)left : 16).v : _mm512_setzero_ps();
        largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(all[i]), _mm512_set1_epi32(0x7FFFFFFF)));
      }
      const __m512i first = (__m512i)_mm512_cvtne2ps_pbh(all[1], all[0]);
      for (int i = 0; i < 2; ++i) {
        const __m256i half = i ? _mm512_extracti64x4_epi64(first, 1) : _mm512_castsi512_si256(first);
        rest[i] = _mm512_sub_ps(all[i], _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)));
      }
      const __m512i second = (__m512i)_mm512_cvtne2ps_pbh(rest[1], rest[0]);
      store_bytes(to, {pairs_in_panel_order(first)});
      store_bytes(to + rows * 16, {pairs_in_panel_order(second)});
    }
    const uint32_t most = _mm512_reduce_max_epu32(largest);
    unfit[r] = most >= FLOAT_LARGE || (most && most < FLOAT_SMALL);
  }
}

enum { AMX_STRIDE = PANEL_WIDTH * 4 };

// x that is multiplied next, fetched into the second cache meanwhile: with many rows it comes from the third, or from memory.
struct AmxFetch {
  const char* tiles[2];
  int lines;  // of each tile for every 16 pairs that are multiplied
};

// Two tiles of x (`first` and `second`, of `a` and `b` rows) by a panel.
template <int PARTS>
static void multiply_two(const float* panel, const float* first, const float* second, int a, int b, int64_t words, bool clear,
                         float* sums, AmxFetch& fetch) {
  float* below = sums + a * PANEL_WIDTH;
  tile_barrier();
  if (clear) zero_sums();
  else load_sums(sums, below, 64, AMX_STRIDE);
  for (int64_t k = 0; k < words; k += 16, panel += 16 * PANEL_WIDTH, first += 16 * PARTS * a, second += 16 * PARTS * b) {
    _tile_loadd(6, panel, AMX_STRIDE);
    _tile_loadd(4, first, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, panel + 16, AMX_STRIDE);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, second, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    for (int line = 0; line < fetch.lines; ++line)
      for (int i = 0; i < 2; ++i) __builtin_prefetch(fetch.tiles[i], 0, 2), fetch.tiles[i] += 64;
    if (PARTS == 1) continue;
    _tile_loadd(4, first + 16 * a, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, second + 16 * b, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  store_sums(sums, below, 64, AMX_STRIDE);
  tile_barrier();
}

// One tile of x, of `a` rows, by two panels: as many sums at once, which do not wait for one another.
template <int PARTS>
static void multiply_one(const float* panel, const float* other, const float* x, int a, int64_t words, bool clear, float* sums,
                         float* other_sums) {
  tile_barrier();
  if (clear) zero_sums();
  else load_sums(sums, other_sums, 64, AMX_STRIDE);
  for (int64_t k = 0; k < words; k += 16, panel += 16 * PANEL_WIDTH, other += 16 * PANEL_WIDTH, x += 16 * PARTS * a) {
    _tile_loadd(4, x, 64);
    if (PARTS == 2) _tile_loadd(5, x + 16 * a, 64);
    _tile_loadd(6, panel, AMX_STRIDE);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, panel + 16, AMX_STRIDE);
    _tile_dpbf16ps(1, 4, 7);
    if (PARTS == 2) {
      _tile_dpbf16ps(0, 5, 6);
      _tile_dpbf16ps(1, 5, 7);
    }
    _tile_loadd(6, other, AMX_STRIDE);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(7, other + 16, AMX_STRIDE);
    _tile_dpbf16ps(3, 4, 7);
    if (PARTS == 2) {
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  store_sums(sums, other_sums, 64, AMX_STRIDE);
  tile_barrier();
}

// All rows of x by the panels of a block, each `panel_words` after the one before, with sums [panels][all rows][PANEL_WIDTH].
template <int PARTS>
static void multiply_block(Tiles& tiles, int64_t all, const float* panel, int64_t panel_words, int panels, const float* x,
                           int64_t x_words, int64_t from, int64_t count, float* sums) {
  const int64_t sums_words = all * PANEL_WIDTH;
  for (int64_t row = 0; row < all; row += 2 * AMX_ROWS) {
    const int a = all - row < AMX_ROWS ? (int)(all - row) : (int)AMX_ROWS;
    const int64_t left = all - row - a;
    const int b = left < AMX_ROWS ? (int)left : (int)AMX_ROWS;
    const float* first = x + row * x_words + from * PARTS * a;
    const float* second = x + (row + a) * x_words + from * PARTS * b;
    float* to = sums + row * PANEL_WIDTH;
    tiles.configure(a, b ? b : a);
    if (b) {
      const int64_t next = row + 2 * AMX_ROWS;
      AmxFetch fetch = {};
      if (next + 2 * AMX_ROWS <= all) {
        for (int i = 0; i < 2; ++i)
          fetch.tiles[i] = (const char*)(x + (next + i * AMX_ROWS) * x_words + from * PARTS * AMX_ROWS);
        fetch.lines = (PARTS * AMX_ROWS + panels - 1) / panels;
      }
      for (int p = 0; p < panels; ++p)
        multiply_two<PARTS>(panel + p * panel_words, first, second, a, b, count, from == 0, to + p * sums_words, fetch);
      continue;
    }
    for (int p = 0; p < panels; p += 2) {  // an odd last one twice
      const int other = p + 1 < panels ? p + 1 : p;
      multiply_one<PARTS>(panel + p * panel_words, panel + other * panel_words, first, a, count, from == 0, to + p * sums_words,
                   to + other * sums_words);
    }
  }
}

// Panels of a block, at most `most`: with wide ones some threads would wait for the last. No result depends on it.
static int amx_width(int64_t panels, int most, int64_t slots) {
  int best = most;
  int64_t least = INT64_MAX;
  for (int wide = most; wide > 0; --wide) {
    const int64_t blocks = (panels + wide - 1) / wide, rounds = (blocks + slots - 1) / slots;
    const int64_t last = blocks - (rounds - 1) * slots == 1 ? panels - (blocks - 1) * wide : wide;
    const int64_t time = 8 * ((rounds - 1) * wide + last) + rounds;  // a block reads x once more
    if (time < least) least = time, best = wide;
  }
  return best;
}

// The result block by block, as `many_rows_of`.
template <int PARTS> static int amx_rows_of(const RqGemm* g, const ManyRows& m, uint8_t* out, uint8_t* scratch, int64_t slots) {
  const RqWeight* w = g->weight;
  const int64_t strips = float_strips(w), all_panels = (strips + 1) / 2, words = float_columns(w) / 2;
  const int wide = amx_width(all_panels, g->rows > 2 * AMX_ROWS ? (int)AMX_PANELS : 2, slots);
  const int64_t blocks = (all_panels + wide - 1) / wide, slot_bytes = float_slot_bytes(g, g->rows);
  const int64_t part = amx_words(words), panel_words = part * PANEL_WIDTH;
  int64_t taken = 0;
  rq::parallel(slots, 1, [&](int64_t slot, int64_t) {
    const WithSubnormals mode;
    Tiles tiles;
    float* panel = (float*)(scratch + slot * slot_bytes);
    float few[AMX_PANELS * 2 * AMX_ROWS * PANEL_WIDTH], scale[PANEL_GROUPS * 16], shift[PANEL_GROUPS * 16];
    float row_scale[AMX_PANELS][PANEL_WIDTH], bias[AMX_PANELS][PANEL_WIDTH];
    float* sums = g->rows <= 2 * AMX_ROWS ? few : panel + AMX_PANELS * panel_words;
    const float* shifts = w->shift_kind == RQ_NO_SHIFT ? nullptr : shift;
    for (int i = 0; m.raw && i < 16; ++i) scale[i] = 1.0f;
    for (;;) {
      const int64_t block = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED);
      if (block >= blocks) break;
      const int panels = all_panels - block * wide < wide ? (int)(all_panels - block * wide) : wide;
      for (int64_t from = 0; from < words; from += part) {
        const int64_t count = from + part < words ? part : words - from;
        const int64_t begin = 2 * from, end = begin + 2 * count, stop = end < w->length ? end : w->length;
        for (int s = 0; s < 2 * panels; ++s) {
          const int64_t at = block * wide * 2 + s, strip = at < strips ? at : strips - 1;
          if (!m.raw) strip_scales(w, strip, begin / w->group, (stop + w->group - 1) / w->group, scale, shift);
          else if (from == 0) strip_scales(w, strip, 0, 1, row_scale[s / 2] + s % 2 * 16, nullptr);
          if (g->bias && from == 0) load_bias(g, strip, bias[s / 2] + s % 2 * 16);
          m.decode(m.values, w, strip, begin, end, scale, shifts, panel + s / 2 * panel_words + s % 2 * 16);
        }
        multiply_block<PARTS>(tiles, g->rows, panel, panel_words, panels, m.x, PARTS * words, from, count, sums);
      }
      for (int p = 0; p < panels; ++p) {
        uint8_t* to = out + (block * wide + p) * PANEL_WIDTH * out_bytes(g);
        write_sums(g, sums + p * g->rows * PANEL_WIDTH, (int)g->rows, block_columns(w, block * wide + p),
                   m.raw ? row_scale[p] : nullptr, bias[p], to);
      }
    }
  });
  return 0;
}
#endif

// What the integer kernels need of a weight: strips unpacked to bytes, and their scales.
//
// Included inside the namespace of a level, after codes.h and scales.h.
#ifndef RQ_INTEGER_WEIGHT_H
#define RQ_INTEGER_WEIGHT_H

typedef void (*IntUnpack)(const uint8_t* from, int64_t units, const Bytes* table, uint8_t* to);

enum {
  INT_FEW_ROWS = 4,       // their tile reads codes from memory and unpacks them in registers
  INT_LONGEST = 1 << 16,  // columns whose products of int8 codes fit into 32 bits
};

static inline int64_t int_strips(const RqWeight* w) { return (w->rows + RQ_ROWS - 1) / RQ_ROWS; }

static IntUnpack int_unpack(const RqWeight* w) {
  if (w->code == RQ_TABLE) {
    switch (w->bits) {
      case 1: return unpack_units<Looked<1>>;
      case 2: return unpack_units<Looked<2>>;
      case 3: return unpack_units<Looked<3>>;
      case 4: return unpack_units<Looked<4>>;
      case 5: return unpack_units<Looked<5>>;
      default: return unpack_units<Looked<6>>;
    }
  }
  switch (w->bits) {
    case 1: return unpack_units<Coded<1>>;
    case 2: return unpack_units<Coded<2>>;
    case 3: return unpack_units<Coded<3>>;
    case 4: return unpack_units<Coded<4>>;
    case 5: return unpack_units<Coded<5>>;
    case 6: return unpack_units<Coded<6>>;
    case 7: return unpack_units<Coded<7>>;
    default: return unpack_units<Eight<SIGNED_CODES>>;
  }
}

// Tables of 64 bytes in 4 of 16, those with fewer repeated.
static void int_table(const RqWeight* w, Bytes* table) {
  uint8_t all[64];
  for (int i = 0; i < 64; ++i) all[i] = w->levels[i & ((1 << w->bits) - 1)] ^ (SIGNED_CODES ? 128 : 0);
  for (int i = 0; i < 4; ++i) table[i] = load_table16(all + 16 * i);
}

// Scales and shifts of groups `begin` to `end` of a strip; beyond the last strip, zeros.
static void int_scales(const RqGemm* g, int64_t strip, int64_t begin, int64_t end, float* scale, float* shift) {
  const RqWeight* w = g->weight;
  if (strip >= int_strips(w)) {
    memset(scale, 0, (size_t)(end - begin) * 64);
    if (shift) memset(shift, 0, (size_t)(end - begin) * 64);
    return;
  }
  strip_scales(w, strip, begin, end, scale, shift);
  if (w->code != RQ_TABLE || g->arithmetic != RQ_CODED) return;  // else the scales of x have this factor
  const Floats factor = splat(w->level_scale);
  for (int64_t i = 0; i < end - begin; ++i) store_floats(scale + 16 * i, load_floats(scale + 16 * i) * factor);
}

static bool int_takes(const RqGemm* g) {
  const RqWeight* w = g->weight;
  const bool floats = g->x_dtype == RQ_F32 || g->x_dtype == RQ_F16 || g->x_dtype == RQ_BF16;
  if (g->arithmetic == RQ_CODED ? !g->steps : !floats) return false;
  if (g->out_dtype < RQ_F32 || g->out_dtype > RQ_BF16 || w->bits < 1 || w->bits > 8) return false;
  if (w->code == RQ_TABLE ? w->bits > 6 || !w->levels : w->code != RQ_INTEGER) return false;
  if (w->block != 32 && w->block != 16 && w->block != 8) return false;
  return w->groups <= 1 || (w->group > 0 && w->group % w->block == 0 && w->group * w->groups == w->length);
}
#endif

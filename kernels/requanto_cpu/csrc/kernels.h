// The kernels of one level and their table. Included by each level_X.cpp after its simd_X.h, which defines the vector types
// and RQ_LEVEL_NAMESPACE, RQ_LEVEL_NAME.
//
// A level is built as two files at the same time, since each takes the compiler several seconds: with RQ_FLOATS_ONLY its float
// arithmetic, with RQ_FLOATS_APART the rest, and the scales of both. Without either, one file has all of it.
#include "level.h"
#include "parallel.h"

#ifdef RQ_ALONE  // a library of this level only: it shares no functions with others
#undef RQ_FLOAT_NAMESPACE
#undef RQ_INTEGER_NAMESPACE
#endif

namespace RQ_LEVEL_NAMESPACE {

#if defined(__AVX2__)
#include "simd_x86.h"
#endif
#include "scales.h"
#include "codes.h"

#if defined(RQ_FLOAT_NAMESPACE)  // the same instructions as in another level, which has compiled this part
using namespace RQ_FLOAT_NAMESPACE::floats;
#elif defined(RQ_FLOATS_APART)
namespace floats { RQ_FLOATS }
using namespace floats;
#else
#if defined(__AVX512F__)
#include "simd_avx512_float.h"
#elif defined(__AVX2__)
#include "simd_avx2_float.h"
#else
#include "simd_neon_float.h"
#endif
#include "values.h"
#include "float_rows.h"
#include "float_tile.h"
#include "float.h"
#include "dequantize.h"
namespace floats {
int64_t float_scratch(const RqGemm* g, int64_t rows) { return float_scratch_bytes(g, rows); }
int64_t float_least_scratch(const RqGemm* g) { return float_bytes(g, FLOAT_FEW_ROWS, 1); }
int gemm_float(const RqGemm* g, const void* x, void* out, void* scratch) { return float_gemm(g, x, out, scratch); }
int dequantize(const RqWeight* w, int64_t start, int64_t stop, const int64_t* index, void* out, int32_t dtype, int64_t out_stride) {
  return strips_to_rows(w, start, stop, index, out, dtype, out_stride);
}
int dequantize_plain(const RqWeight* w, int32_t is_signed, int64_t start, int64_t stop, const int64_t* index, void* out, int32_t dtype,
                     int64_t out_stride) {
  return plain_to_rows(w, is_signed, start, stop, index, out, dtype, out_stride);
}
}  // namespace floats
using namespace floats;
#endif

#if !defined(RQ_FLOATS_ONLY)
#include "columns.h"
#include "float_linear.h"

#if defined(RQ_INTEGER_NAMESPACE)  // likewise
using namespace RQ_INTEGER_NAMESPACE::integers;
#else
#include "integer_weight.h"
#include "integer_tile.h"
#include "quantize.h"
#include "integer.h"
namespace integers {
int64_t int_scratch(const RqGemm* g, int64_t rows) { return int_scratch_bytes(g, rows); }
int64_t int_least_scratch(const RqGemm* g) { return int_least_bytes(g); }
int gemm_integer(const RqGemm* g, const void* x, void* out, void* scratch) { return int_gemm(g, x, out, scratch); }
int rows_to_int8(const void* x, int32_t dtype, int64_t rows, int64_t length, int64_t x_stride, const float* fixed, int8_t* codes,
                 float* steps) {
  return round_rows(x, dtype, rows, length, x_stride, fixed, codes, steps);
}
}  // namespace integers
using namespace integers;
#endif

#if defined(__AMX_INT8__)
#include "integer_weight.h"
#include "integer_amx.h"
#else
static bool tiles_take(const RqGemm*) { return false; }
static int64_t tile_scratch(const RqGemm*, int64_t) { return 0; }
static int tile_gemm(const RqGemm*, const void*, void*, void*) { return RQ_E_MISSING; }
#endif

static bool is_float(const RqGemm* g) { return g->arithmetic == RQ_FLOAT || g->arithmetic == RQ_PARTS; }
static int gemm(const RqGemm* g, const void* x, void* out, void* scratch) {
  if (tiles_take(g)) return tile_gemm(g, x, out, scratch);
  return is_float(g) ? gemm_float(g, x, out, scratch) : gemm_integer(g, x, out, scratch);
}
static int64_t gemm_scratch(const RqGemm* g, int64_t rows) {
  if (tiles_take(g)) return tile_scratch(g, rows);
  return is_float(g) ? float_scratch(g, rows) : int_scratch(g, rows);
}
static int64_t gemm_least_scratch(const RqGemm* g) {
  if (tiles_take(g)) return tile_scratch(g, 1);
  return is_float(g) ? float_least_scratch(g) : int_least_scratch(g);
}

extern const RqKernels kernels = {
    RQ_LEVEL_NAME, gemm, gemm_scratch, gemm_least_scratch, dequantize, dequantize_plain, rows_to_int8, scale_columns, float_linear,
};
#endif

}  // namespace RQ_LEVEL_NAMESPACE

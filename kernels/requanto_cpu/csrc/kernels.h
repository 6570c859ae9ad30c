// The kernels of one level and their table. Included by each level_X.cpp after its simd_X.h, which defines the vector types
// and RQ_LEVEL_NAMESPACE, RQ_LEVEL_NAME.
#include "level.h"
#include "parallel.h"

namespace RQ_LEVEL_NAMESPACE {

#if defined(__AVX2__)
#include "simd_x86.h"
#endif
#include "scales.h"
#include "codes.h"
#include "columns.h"
#include "float_linear.h"

// Not written yet.
static int64_t float_scratch(const RqGemm*, int64_t) { return 64; }
static int64_t float_least_scratch(const RqGemm*) { return 64; }
static int gemm_float(const RqGemm*, const void*, void*, void*) { return RQ_E_MISSING; }
static int dequantize(const RqWeight*, int64_t, int64_t, const int64_t*, void*, int32_t, int64_t) { return RQ_E_MISSING; }
static int dequantize_plain(const RqWeight*, int32_t, int64_t, int64_t, const int64_t*, void*, int32_t, int64_t) {
  return RQ_E_MISSING;
}

#include "integer_tile.h"
#include "quantize.h"
#include "integer.h"

static int gemm(const RqGemm* g, const void* x, void* out, void* scratch) {
  return g->arithmetic == RQ_FLOAT ? gemm_float(g, x, out, scratch) : gemm_integer(g, x, out, scratch);
}
static int64_t gemm_scratch(const RqGemm* g, int64_t rows) {
  return g->arithmetic == RQ_FLOAT ? float_scratch(g, rows) : int_scratch(g, rows);
}
static int64_t gemm_least_scratch(const RqGemm* g) {
  return g->arithmetic == RQ_FLOAT ? float_least_scratch(g) : int_least_scratch(g);
}

extern const RqKernels kernels = {
    RQ_LEVEL_NAME, gemm, gemm_scratch, gemm_least_scratch, dequantize, dequantize_plain, rows_to_int8, scale_columns, float_linear,
};

}  // namespace RQ_LEVEL_NAMESPACE

// The kernels of one level and their table. Included by each level_X.cpp after its simd_X.h, which defines the vector types
// and RQ_LEVEL_NAMESPACE, RQ_LEVEL_NAME.
#include "level.h"
#include "parallel.h"

namespace RQ_LEVEL_NAMESPACE {

#include "float_linear.h"

// Not written yet.
static int gemm(const RqGemm*, const void*, void*, void*) { return RQ_E_MISSING; }
static int64_t gemm_scratch(const RqGemm*, int64_t) { return RQ_E_MISSING; }
static int64_t gemm_least_scratch(const RqGemm*) { return RQ_E_MISSING; }
static int dequantize(const RqWeight*, int64_t, int64_t, const int64_t*, void*, int32_t, int64_t) { return RQ_E_MISSING; }
static int dequantize_plain(const RqWeight*, int32_t, int64_t, int64_t, const int64_t*, void*, int32_t, int64_t) {
  return RQ_E_MISSING;
}
static int rows_to_int8(const void*, int32_t, int64_t, int64_t, int64_t, const float*, int8_t*, float*) {
  return RQ_E_MISSING;
}

extern const RqKernels kernels = {
    RQ_LEVEL_NAME, gemm, gemm_scratch, gemm_least_scratch, dequantize, dequantize_plain, rows_to_int8, float_linear,
};

}  // namespace RQ_LEVEL_NAMESPACE

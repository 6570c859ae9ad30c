// AVX2, FMA, F16C.
#include <immintrin.h>
#include <string.h>

#include "requanto_cpu.h"

#define RQ_LEVEL_NAMESPACE rq_avx2
#define RQ_LEVEL_NAME "avx2"
namespace RQ_LEVEL_NAMESPACE {
#include "simd_avx2.h"
}
#include "kernels.h"

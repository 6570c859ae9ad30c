// AVX2, FMA, F16C, AVX-VNNI (256-bit integer dot products).
#include <immintrin.h>
#include <string.h>

#include "requanto_cpu.h"

#define RQ_LEVEL_NAMESPACE rq_avxvnni
#define RQ_LEVEL_NAME "avxvnni"
#define RQ_FLOAT_NAMESPACE rq_avx2
namespace RQ_LEVEL_NAMESPACE {
#include "simd_avx2.h"
}
#include "kernels.h"

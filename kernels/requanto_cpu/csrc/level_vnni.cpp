// AVX-512 F, BW, VL, DQ, VNNI.
#include <immintrin.h>
#include <string.h>

#include "requanto_cpu.h"

#define RQ_LEVEL_NAMESPACE rq_vnni
#define RQ_LEVEL_NAME "vnni"
#define RQ_FLOAT_NAMESPACE rq_avx512
namespace RQ_LEVEL_NAMESPACE {
#include "simd_avx512.h"
}
#include "kernels.h"

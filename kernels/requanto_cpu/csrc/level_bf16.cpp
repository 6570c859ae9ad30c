// AVX-512 F, BW, VL, DQ, VNNI, BF16, VBMI.
#include <immintrin.h>
#include <string.h>

#include "requanto_cpu.h"

#define RQ_LEVEL_NAMESPACE rq_bf16
#define RQ_LEVEL_NAME "bf16"
#define RQ_INTEGER_NAMESPACE rq_vnni
namespace RQ_LEVEL_NAMESPACE {
#include "simd_avx512.h"
}
#include "kernels.h"

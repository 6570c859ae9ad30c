// AVX-512 F, BW, VL, DQ, VNNI, BF16, VBMI; AMX TILE, BF16, INT8.
#include <immintrin.h>
#include <string.h>

#include "requanto_cpu.h"

#define RQ_LEVEL_NAMESPACE rq_amx
#define RQ_LEVEL_NAME "amx"
#define RQ_INTEGER_NAMESPACE rq_vnni
namespace RQ_LEVEL_NAMESPACE {
#include "simd_avx512.h"
#include "amx.h"
}
#include "kernels.h"

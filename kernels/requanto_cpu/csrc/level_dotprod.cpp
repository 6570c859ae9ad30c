// NEON with integer dot products (ARMv8.2).
#include <arm_neon.h>
#include <string.h>

#include "requanto_cpu.h"

#define RQ_LEVEL_NAMESPACE rq_dotprod
#define RQ_LEVEL_NAME "dotprod"
#define RQ_FLOAT_NAMESPACE rq_neon
namespace RQ_LEVEL_NAMESPACE {
#include "simd_neon.h"
}
#include "kernels.h"

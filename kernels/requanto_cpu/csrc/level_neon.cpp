// NEON, which every 64-bit ARM processor has.
#include <arm_neon.h>
#include <string.h>

#include "requanto_cpu.h"

#define RQ_LEVEL_NAMESPACE rq_neon
#define RQ_LEVEL_NAME "neon"
namespace RQ_LEVEL_NAMESPACE {
#include "simd_neon.h"
}
#include "kernels.h"

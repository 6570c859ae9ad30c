// AVX-512 F, BW, VL, DQ, VNNI, BF16.
#define RQ_LEVEL_NAMESPACE rq_bf16
#define RQ_LEVEL_NAME "bf16"
#include "kernels.h"

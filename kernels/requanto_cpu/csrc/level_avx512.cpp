// AVX-512 F, BW, VL, DQ.
#define RQ_LEVEL_NAMESPACE rq_avx512
#define RQ_LEVEL_NAME "avx512"
#include "kernels.h"

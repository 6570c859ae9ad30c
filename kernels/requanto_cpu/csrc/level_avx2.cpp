// AVX2, FMA, F16C.
#define RQ_LEVEL_NAMESPACE rq_avx2
#define RQ_LEVEL_NAME "avx2"
#include "kernels.h"

// AVX2, FMA, F16C, AVX-VNNI (256-bit integer dot products).
#define RQ_LEVEL_NAMESPACE rq_avxvnni
#define RQ_LEVEL_NAME "avxvnni"
#include "kernels.h"

// AVX-512 F, BW, VL, DQ, VNNI.
#define RQ_LEVEL_NAMESPACE rq_vnni
#define RQ_LEVEL_NAME "vnni"
#include "kernels.h"

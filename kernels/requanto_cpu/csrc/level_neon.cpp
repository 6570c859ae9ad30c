// NEON, which every 64-bit ARM processor has.
#define RQ_LEVEL_NAMESPACE rq_neon
#define RQ_LEVEL_NAME "neon"
#include "kernels.h"

// NEON with integer dot products (ARMv8.2).
#define RQ_LEVEL_NAMESPACE rq_dotprod
#define RQ_LEVEL_NAME "dotprod"
#include "kernels.h"

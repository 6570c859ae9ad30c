// One level: the kernels built for one instruction set. dispatch.cpp picks the level that the processor has.
//
// Each level_X.cpp is compiled with the flags of its instruction set (build.py lists them) and holds all kernels of it:
//
//   #define RQ_LEVEL_NAMESPACE rq_avx512
//   #include "simd_avx512.h"
//   #include "kernels.h"
//
// Whatever is compiled there must stay inside that file: functions are static or in RQ_LEVEL_NAMESPACE, and no template of
// the standard library is used. The linker keeps one copy of an inline function that several files instantiate, and the
// copy with wider instructions would then run on processors that lack them.
#ifndef REQUANTO_LEVEL_H
#define REQUANTO_LEVEL_H
#include "requanto_cpu.h"

typedef struct RqKernels {
  const char* name;
  int (*gemm)(const RqGemm* gemm, const void* x, void* out, void* scratch);
  int64_t (*gemm_scratch)(const RqGemm* gemm, int64_t rows);
  int64_t (*gemm_least_scratch)(const RqGemm* gemm);
  int (*dequantize)(const RqWeight* weight, int64_t start, int64_t stop, const int64_t* index, void* out, int32_t dtype,
                    int64_t out_stride);
  int (*dequantize_plain)(const RqWeight* weight, int32_t is_signed, int64_t start, int64_t stop, const int64_t* index,
                          void* out, int32_t dtype, int64_t out_stride);
  int (*rows_to_int8)(const void* x, int32_t dtype, int64_t rows, int64_t length, int64_t x_stride, const float* fixed,
                      int8_t* codes, float* steps);
  int (*scale_columns)(const void* x, int32_t dtype, int64_t rows, int64_t length, int64_t x_stride, const void* column,
                       int32_t column_dtype, void* out);
  int (*float_linear)(const void* weight, int32_t dtype, int64_t n, int64_t length, int64_t weight_stride, const void* x,
                      int64_t rows, int64_t x_stride, const void* bias, void* out, int64_t out_stride);
} RqKernels;

// Float arithmetic, which the levels after these share: their own instructions are for integers.
#define RQ_FLOATS \
  int64_t float_scratch(const RqGemm* gemm, int64_t rows); \
  int64_t float_least_scratch(const RqGemm* gemm); \
  int gemm_float(const RqGemm* gemm, const void* x, void* out, void* scratch); \
  int dequantize(const RqWeight* weight, int64_t start, int64_t stop, const int64_t* index, void* out, int32_t dtype, \
                 int64_t out_stride); \
  int dequantize_plain(const RqWeight* weight, int32_t is_signed, int64_t start, int64_t stop, const int64_t* index, void* out, \
                       int32_t dtype, int64_t out_stride);
namespace rq_avx2 { namespace floats { RQ_FLOATS } }
namespace rq_avx512 { namespace floats { RQ_FLOATS } }
namespace rq_neon { namespace floats { RQ_FLOATS } }

// Integer arithmetic, which the levels bf16 and amx take from vnni.
#define RQ_INTEGERS \
  int64_t int_scratch(const RqGemm* gemm, int64_t rows); \
  int64_t int_least_scratch(const RqGemm* gemm); \
  int gemm_integer(const RqGemm* gemm, const void* x, void* out, void* scratch); \
  int rows_to_int8(const void* x, int32_t dtype, int64_t rows, int64_t length, int64_t x_stride, const float* fixed, int8_t* codes, \
                   float* steps);
namespace rq_vnni { namespace integers { RQ_INTEGERS } }

// The tables, one for each level; build.py defines RQ_HAVE_... for the levels that the compiler can build.
namespace rq_avx2 { extern const RqKernels kernels; }
namespace rq_avxvnni { extern const RqKernels kernels; }
namespace rq_avx512 { extern const RqKernels kernels; }
namespace rq_vnni { extern const RqKernels kernels; }
namespace rq_bf16 { extern const RqKernels kernels; }
namespace rq_amx { extern const RqKernels kernels; }
namespace rq_neon { extern const RqKernels kernels; }
namespace rq_dotprod { extern const RqKernels kernels; }
#endif

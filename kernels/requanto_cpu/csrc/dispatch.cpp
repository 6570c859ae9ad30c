// Finds the processor's instructions, picks the kernels of a level, and hands calls on. Compiled for the baseline of the
// platform, so it runs on every processor.
#include <string.h>

#include "level.h"
#include "parallel.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace rq {
RqParallelFor parallel_for = nullptr;
RqThreads thread_count = nullptr;
bool used_threads = false;
}  // namespace rq

namespace {

struct Level {
  const char* name;
  const RqKernels* kernels;
  bool (*available)();
};

#if defined(__x86_64__) || defined(_M_X64)
// cpuid and xgetbv instead of __builtin_cpu_supports, which knows AVX-VNNI and AMX only in new compilers.
struct Registers { unsigned a, b, c, d; };

Registers cpuid(unsigned leaf, unsigned part) {
  Registers r = {0, 0, 0, 0};
  if (leaf <= __get_cpuid_max(0, nullptr)) __cpuid_count(leaf, part, r.a, r.b, r.c, r.d);
  return r;
}

bool bit(unsigned word, int number) { return word >> number & 1; }

// Registers that the operating system saves: without it their use is an illegal instruction, whatever the processor has.
unsigned long long saved() {
  if (!bit(cpuid(1, 0).c, 27)) return 0;  // OSXSAVE
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<unsigned long long>(high) << 32 | low;
}

bool has_saved(unsigned long long mask) { return (saved() & mask) == mask; }
Registers leaf7(unsigned part) { return part <= cpuid(7, 0).a ? cpuid(7, part) : Registers{0, 0, 0, 0}; }

bool has_avx2() {
  const unsigned c = cpuid(1, 0).c;
  return bit(c, 12) && bit(c, 28) && bit(c, 29) && bit(leaf7(0).b, 5) && has_saved(0x6);  // FMA, AVX, F16C, AVX2
}
bool has_avx512() {
  const unsigned b = leaf7(0).b;
  return has_avx2() && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31) && has_saved(0xe6);  // F, DQ, BW, VL
}
bool has_vnni() { return has_avx512() && bit(leaf7(0).c, 11); }
#ifdef RQ_TEST_EVEX  // compiled with kernels/tests/evex.h
bool has_avxvnni() { return has_vnni(); }
#else
bool has_avxvnni() { return has_avx2() && bit(leaf7(1).a, 4); }
#endif
bool has_bf16() { return has_vnni() && bit(leaf7(1).a, 5) && bit(leaf7(0).c, 1); }  // and VBMI, which only Cooper Lake lacks
// Linux gives a process tiles only if it asks: once, for all threads and processes that it starts (ARCH_REQ_XCOMP_PERM, 18 is
// the data of tiles). It refuses where a thread's stack for signals is too small for them.
bool may_use_tiles() {
#if defined(__linux__)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return true;
#endif
}
#ifdef RQ_TEST_TILES  // compiled with kernels/tests/tiles.h
bool has_amx() { return has_bf16(); }
#else
bool has_amx() {
  const unsigned d = leaf7(0).d;
  return has_bf16() && bit(d, 22) && bit(d, 24) && bit(d, 25) && has_saved(0x60000) && may_use_tiles();  // BF16, TILE, INT8
}
#endif
#elif defined(__aarch64__)
bool has_neon() { return true; }
bool has_dotprod() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#elif defined(__APPLE__)
  int found = 0;
  size_t size = sizeof found;
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &found, &size, nullptr, 0) == 0 && found;
#else
  return false;
#endif
}
#endif

// The worst first.
const Level LEVELS[] = {
#ifdef RQ_HAVE_AVX2
    {"avx2", &rq_avx2::kernels, has_avx2},
#endif
#ifdef RQ_HAVE_AVXVNNI
    {"avxvnni", &rq_avxvnni::kernels, has_avxvnni},
#endif
#ifdef RQ_HAVE_AVX512
    {"avx512", &rq_avx512::kernels, has_avx512},
#endif
#ifdef RQ_HAVE_VNNI
    {"vnni", &rq_vnni::kernels, has_vnni},
#endif
#ifdef RQ_HAVE_BF16
    {"bf16", &rq_bf16::kernels, has_bf16},
#endif
#ifdef RQ_HAVE_AMX
    {"amx", &rq_amx::kernels, has_amx},
#endif
#ifdef RQ_HAVE_NEON
    {"neon", &rq_neon::kernels, has_neon},
#endif
#ifdef RQ_HAVE_DOTPROD
    {"dotprod", &rq_dotprod::kernels, has_dotprod},
#endif
    {nullptr, nullptr, nullptr},
};

const Level* best() {
  const Level* found = nullptr;
  for (const Level* level = LEVELS; level->name; ++level)
    if (level->available()) found = level;
  return found;
}

// Two threads may both find the best level; they find the same one.
const Level* volatile selected = nullptr;

const Level* current() {
  if (!selected) selected = best();
  return selected;
}

// An embedding's indices are a user's: torch would need three operators to check them.
bool in_range(int64_t rows, int64_t start, int64_t stop, const int64_t* index) {
  for (int64_t i = 0; index && i < stop - start; ++i)
    if (index[i] < 0 || index[i] >= rows) return false;
  return true;
}

// The part of a scratch buffer that holds x times the column scale.
int64_t column_bytes(const RqGemm* gemm, int64_t rows) {
  if (!gemm->column) return 0;
  return (rows * gemm->weight->length * (gemm->x_dtype == RQ_F32 ? 4 : 2) + 63) & ~int64_t{63};
}

int64_t plus(int64_t size_or_code, int64_t bytes) { return size_or_code < 0 ? size_or_code : size_or_code + bytes; }

// x times the column scale, then the GEMM with the rest of the scratch buffer.
int gemm_of_scaled(const RqKernels* kernels, const RqGemm* gemm, const void* x, void* out, void* scratch) {
  const int64_t used = column_bytes(gemm, gemm->rows), length = gemm->weight->length;
  if (gemm->scratch_bytes < used) return RQ_E_SCRATCH;
  const int code = kernels->scale_columns(x, gemm->x_dtype, gemm->rows, length, gemm->x_stride, gemm->column,
                                          gemm->column_dtype, scratch);
  if (code) return code;
  RqGemm rest = *gemm;
  rest.column = nullptr;
  rest.x_stride = length;
  rest.scratch_bytes -= used;
  return kernels->gemm(&rest, scratch, out, static_cast<char*>(scratch) + used);
}

enum { LIST = 96 };

const char* listed(char* text, bool only_available) {
  char names[LIST] = "";
  for (const Level* level = LEVELS; level->name; ++level) {
    if (only_available && !level->available()) continue;
    if (names[0]) strcat(names, ",");
    strcat(names, level->name);
  }
  return static_cast<const char*>(memcpy(text, names, LIST));
}

}  // namespace

RQ_API const char* rq_levels(void) {
  static char text[LIST];  // every thread writes the same bytes
  return listed(text, true);
}

RQ_API const char* rq_built(void) {
  static char text[LIST];
  return listed(text, false);
}

RQ_API int rq_set_level(const char* name) {
  for (const Level* level = LEVELS; level->name; ++level) {
    if (strcmp(level->name, name) == 0 && level->available()) {
      selected = level;
      return 0;
    }
  }
  return RQ_E_LEVEL;
}

RQ_API const char* rq_level(void) { return current() ? current()->name : ""; }

RQ_API const char* rq_error(int code) {
  switch (code) {
    case 0: return "no error";
    case RQ_E_LEVEL: return "the processor has none of the instruction sets that the kernels were built for";
    case RQ_E_MISSING: return "there is no such kernel for this instruction set";
    case RQ_E_ARGUMENT: return "the kernel does not take these arguments";
    case RQ_E_SCRATCH: return "the scratch buffer is too small";
    case RQ_E_MEMORY: return "out of memory";
    case RQ_E_INDEX: return "an index is out of range";
    default: return "unknown error";
  }
}

RQ_API int rq_abi(void) { return RQ_ABI; }

RQ_API void rq_set_parallel(RqParallelFor parallel, RqThreads threads) {
  rq::parallel_for = parallel;
  rq::thread_count = threads;
}

RQ_API int rq_forked(void) {
  if (!rq::used_threads) return 0;
  rq_set_parallel(nullptr, nullptr);
  return 1;
}

RQ_API int64_t rq_gemm_scratch(const RqGemm* gemm, int64_t rows) {
  if (!current()) return RQ_E_LEVEL;
  return plus(current()->kernels->gemm_scratch(gemm, rows), column_bytes(gemm, rows));
}

RQ_API int64_t rq_gemm_least_scratch(const RqGemm* gemm) {
  if (!current()) return RQ_E_LEVEL;
  return plus(current()->kernels->gemm_least_scratch(gemm), column_bytes(gemm, gemm->rows));
}

RQ_API int rq_gemm(const RqGemm* gemm, const void* x, void* out, void* scratch) {
  if (!current()) return RQ_E_LEVEL;
  if (gemm->column) return gemm_of_scaled(current()->kernels, gemm, x, out, scratch);
  return current()->kernels->gemm(gemm, x, out, scratch);
}

RQ_API int rq_dequantize(const RqWeight* weight, int64_t start, int64_t stop, const int64_t* index, void* out, int32_t dtype,
                         int64_t out_stride) {
  if (!current()) return RQ_E_LEVEL;
  if (!in_range(weight->rows, start, stop, index)) return RQ_E_INDEX;
  return current()->kernels->dequantize(weight, start, stop, index, out, dtype, out_stride);
}

RQ_API int rq_dequantize_plain(const RqWeight* weight, int32_t is_signed, int64_t start, int64_t stop, const int64_t* index,
                               void* out, int32_t dtype, int64_t out_stride) {
  if (!current()) return RQ_E_LEVEL;
  if (!in_range(weight->rows, start, stop, index)) return RQ_E_INDEX;
  return current()->kernels->dequantize_plain(weight, is_signed, start, stop, index, out, dtype, out_stride);
}

RQ_API int rq_rows_to_int8(const void* x, int32_t dtype, int64_t rows, int64_t length, int64_t x_stride, const float* fixed,
                           int8_t* codes, float* steps) {
  if (!current()) return RQ_E_LEVEL;
  return current()->kernels->rows_to_int8(x, dtype, rows, length, x_stride, fixed, codes, steps);
}

RQ_API int rq_float_linear(const void* weight, int32_t dtype, int64_t n, int64_t length, int64_t weight_stride, const void* x,
                           int64_t rows, int64_t x_stride, const void* bias, void* out, int64_t out_stride) {
  if (!current()) return RQ_E_LEVEL;
  return current()->kernels->float_linear(weight, dtype, n, length, weight_stride, x, rows, x_stride, bias, out, out_stride);
}

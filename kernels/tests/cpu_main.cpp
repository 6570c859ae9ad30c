// Calls the C interface of the CPU kernels on cases that tests/linear/cpu_cases.py wrote, and writes back the results. It needs
// neither Python nor torch, so it runs under qemu-user (aarch64, old x86 processors) and under AddressSanitizer.
//
//   cpu_main                                lists the levels of this processor
//   cpu_main LEVEL CASES RESULTS THREADS    runs all cases at one level; with `flush` after it in the mode in which subnormal
//                                           numbers count as zeros (torch.set_flush_denormal)
//
// CASES is a sequence of int64 numbers and bytes:
//   count of cases, then for each case
//     function (an index into `Function`), count of arguments, arguments,
//     count of buffers, and for each: its size, 1 if it belongs to the results (else 0), its bytes.
// An argument that stands for a pointer is the number of a buffer, from 1 on; 0 is null. Buffer 1 holds an RqWeight (or is
// empty), buffer 2 an RqGemm (likewise), as ctypes lays them out, with buffer numbers in place of pointers.
// RESULTS: for each case the returned number (int64) and the bytes of the buffers that belong to the results.
//
// Every buffer ends at (odd cases: starts at) a page that may not be touched: a kernel that reads or writes outside crashes here.
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <thread>
#include <vector>

#include "requanto_cpu.h"

namespace {

enum Function { GEMM, SCRATCH, LEAST_SCRATCH, DEQUANTIZE, DEQUANTIZE_PLAIN, PACK, UNPACK, CODES, ROWS_TO_INT8, FLOAT_LINEAR };

struct Buffer {
  uint8_t* data = nullptr;
  int64_t bytes = 0;
  bool result = false;
  void* pages = nullptr;
  size_t mapped = 0;
};

int64_t now_running = -1;
uint32_t thread_count = 1;

[[noreturn]] void stop(const char* what) {
  fprintf(stderr, "cpu_main: %s (case %lld)\n", what, static_cast<long long>(now_running));
  exit(2);
}

void crashed(int number) {
  char text[96];
  const int length = snprintf(text, sizeof text, "cpu_main: signal %d in case %lld\n", number, static_cast<long long>(now_running));
  if (write(2, text, length) < 0) _exit(4);
  _exit(3);
}

int64_t number(FILE* file) {
  int64_t value;
  if (fread(&value, sizeof value, 1, file) != 1) stop("the file of cases ends early");
  return value;
}

Buffer guarded(int64_t bytes, bool at_start) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t inner = (static_cast<size_t>(bytes) + page - 1) / page * page;
  Buffer buffer;
  buffer.bytes = bytes;
  buffer.mapped = inner + 2 * page;
  buffer.pages = mmap(nullptr, buffer.mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (buffer.pages == MAP_FAILED) stop("no memory");
  uint8_t* start = static_cast<uint8_t*>(buffer.pages) + page;
  if (inner && mprotect(start, inner, PROT_READ | PROT_WRITE)) stop("mprotect failed");
  buffer.data = at_start ? start : start + inner - bytes;
  return buffer;
}

// What is below on the stack becomes NaN in every float dtype: kernels that use a local array that they have not written, even
// times zero, give NaN. (The case's number chooses between two patterns.)
__attribute__((noinline)) void dirty_stack() {
  volatile uint8_t below[1 << 19];
  memset(const_cast<uint8_t*>(below), now_running % 3 ? 0xff : 0x7f, sizeof below);
}

// Divides the range as torch does: one part for each thread.
int32_t parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  if (begin >= end) return 0;
  if (grain < 1) grain = 1;
  const int64_t count = end - begin;
  const int64_t parts = thread_count > 1 ? (count + grain - 1) / grain < thread_count ? (count + grain - 1) / grain : thread_count : 1;
  const int64_t each = (count + parts - 1) / parts;
  std::vector<std::thread> threads;
  for (int64_t part = 1; part < parts; ++part) {
    const int64_t from = begin + part * each, to = from + each < end ? from + each : end;
    if (from < to) {
      threads.emplace_back([=] {
        dirty_stack();
        body(from, to, context);
      });
    }
  }
  body(begin, begin + each < end ? begin + each : end, context);
  for (std::thread& thread : threads) thread.join();
  return 0;
}

int32_t threads_of_pool(uint32_t* count) {
  *count = thread_count;
  return 0;
}

// Threads that are started later inherit it.
void flush_subnormal_numbers() {
#if defined(__aarch64__)
  uint64_t mode;
  __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
  __asm__ volatile("msr fpcr, %0" : : "r"(mode | 1u << 24));
#elif defined(__SSE__)
  __builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() | 0x8040);
#endif
}

template <typename T>
T* pointer(const std::vector<Buffer>& buffers, const T* number_of_buffer) {
  const auto index = reinterpret_cast<uintptr_t>(number_of_buffer);
  if (index > buffers.size()) stop("there is no such buffer");
  return index ? reinterpret_cast<T*>(buffers[index - 1].data) : nullptr;
}

void* at(const std::vector<Buffer>& buffers, int64_t index) {
  return pointer(buffers, reinterpret_cast<const char*>(index));
}

int64_t call(int64_t function, const std::vector<int64_t>& a, std::vector<Buffer>& b) {
  RqWeight weight = {};
  RqGemm gemm = {};
  if (b[0].bytes == sizeof weight) {
    memcpy(&weight, b[0].data, sizeof weight);
    weight.codes = pointer(b, weight.codes);
    weight.table = pointer(b, weight.table);
    weight.levels = pointer(b, weight.levels);
    weight.scale = at(b, reinterpret_cast<int64_t>(weight.scale));
    weight.shift = at(b, reinterpret_cast<int64_t>(weight.shift));
    weight.row_scale = pointer(b, weight.row_scale);
    weight.row_shift = pointer(b, weight.row_shift);
  } else if (b[0].bytes) {
    stop("RqWeight has another size here");
  }
  if (b[1].bytes == sizeof gemm) {
    memcpy(&gemm, b[1].data, sizeof gemm);
    gemm.weight = &weight;
    gemm.bias = at(b, reinterpret_cast<int64_t>(gemm.bias));
    gemm.steps = pointer(b, gemm.steps);
    gemm.column = at(b, reinterpret_cast<int64_t>(gemm.column));
  } else if (b[1].bytes) {
    stop("RqGemm has another size here");
  }
  auto bytes = [&](int i) { return static_cast<uint8_t*>(at(b, a[i])); };
  auto index = [&](int i) { return static_cast<const int64_t*>(at(b, a[i])); };
  const auto integer = [&](int i) { return static_cast<int32_t>(a[i]); };
  switch (function) {
    case GEMM: {  // x, out, scratch bytes: 0 all that is wanted, 1 the fewest possible
      const int64_t wanted = a[2] ? rq_gemm_least_scratch(&gemm) : rq_gemm_scratch(&gemm, gemm.rows);
      if (wanted < 0) return wanted;
      Buffer scratch = guarded((wanted + 63) / 64 * 64, false);
      memset(scratch.data, now_running % 3 ? 0xff : 0x7f, scratch.bytes);
      gemm.scratch_bytes = wanted;
      const int64_t code = rq_gemm(&gemm, at(b, a[0]), at(b, a[1]), scratch.data);
      munmap(scratch.pages, scratch.mapped);
      return code;
    }
    case SCRATCH: return rq_gemm_scratch(&gemm, a[0]);
    case LEAST_SCRATCH: return rq_gemm_least_scratch(&gemm);
    case DEQUANTIZE: return rq_dequantize(&weight, a[0], a[1], index(2), at(b, a[3]), integer(4), a[5]);
    case DEQUANTIZE_PLAIN: return rq_dequantize_plain(&weight, integer(6), a[0], a[1], index(2), at(b, a[3]), integer(4), a[5]);
    case PACK: return rq_pack(bytes(0), integer(1), a[2], a[3], static_cast<uint8_t>(a[4]), bytes(5));
    case UNPACK: return rq_unpack(bytes(0), integer(1), a[2], a[3], static_cast<uint8_t>(a[4]), a[5], a[6], bytes(7));
    case CODES: return rq_codes(bytes(0), integer(1), a[2], a[3], static_cast<uint8_t>(a[4]), a[5], a[6], index(7), bytes(8));
    case ROWS_TO_INT8:
      return rq_rows_to_int8(at(b, a[0]), integer(1), a[2], a[3], a[4], static_cast<const float*>(at(b, a[5])),
                             static_cast<int8_t*>(at(b, a[6])), static_cast<float*>(at(b, a[7])));
    case FLOAT_LINEAR:
      return rq_float_linear(at(b, a[0]), integer(1), a[2], a[3], a[4], at(b, a[5]), a[6], a[7], at(b, a[8]), at(b, a[9]), a[10]);
    default: stop("unknown function");
  }
}

void run_case(FILE* cases, FILE* results) {
  const int64_t function = number(cases);
  std::vector<int64_t> arguments(number(cases));
  for (int64_t& argument : arguments) argument = number(cases);
  std::vector<Buffer> buffers(number(cases));
  if (buffers.size() < 2) stop("a case has two buffers at least");
  for (Buffer& buffer : buffers) {
    const int64_t bytes = number(cases);
    const bool result = number(cases);
    buffer = guarded(bytes, now_running % 2);
    buffer.result = result;
    if (bytes && fread(buffer.data, bytes, 1, cases) != 1) stop("the file of cases ends early");
  }
  dirty_stack();
  const int64_t code = call(function, arguments, buffers);
  fwrite(&code, sizeof code, 1, results);
  for (Buffer& buffer : buffers) {
    if (buffer.result) fwrite(buffer.data, 1, buffer.bytes, results);
    munmap(buffer.pages, buffer.mapped);
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 1) {
    printf("%s\n", rq_levels());
    return 0;
  }
  const bool flush = count == 6 && !strcmp(arguments[5], "flush");
  if (count != 5 && !flush) {
    fprintf(stderr, "usage: cpu_main [LEVEL CASES RESULTS THREADS [flush]]\n");
    return 2;
  }
  signal(SIGILL, crashed);
#ifndef __SANITIZE_ADDRESS__  // which reports a crash in more detail
  signal(SIGSEGV, crashed);
  signal(SIGBUS, crashed);
#endif
  thread_count = static_cast<uint32_t>(atoi(arguments[4]));
  rq_set_parallel(parallel_for, threads_of_pool);
  if (rq_set_level(arguments[1])) stop("this processor does not have the level");
  FILE* cases = fopen(arguments[2], "rb");
  FILE* results = fopen(arguments[3], "wb");
  if (!cases || !results) stop("cannot open the files");
  if (flush) flush_subnormal_numbers();
  const int64_t total = number(cases);
  for (now_running = 0; now_running < total; ++now_running) run_case(cases, results);
  return fclose(results) ? 2 : 0;
}

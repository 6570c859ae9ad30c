// Runs humming's own CUDA function that packs a weight, `weight_repack_nk`, on a CPU: 32 threads, block after block.
//   program N K < plain codes of BITS bits, [N, K] > humming's order
// HEADER: process.cuh of the wheel without its includes. PREPROCESS: codes as sign and magnitude, as for bfloat16 and 8 bits.
#include <barrier>
#include <cassert>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

struct Index { uint32_t x, y, z; };
static thread_local Index threadIdx;
static Index blockIdx, blockDim{32, 1, 1}, gridDim;
static std::barrier<> all(32);

#define __global__
#define __shared__ static
#define CUDA_INLINE inline
#define PRAGMA_UNROLL
#define PRAGMA_UNROLL_COUNT(count)
#define __syncthreads() all.arrive_and_wait()
#define CEIL_DIV(a, b) (((a) + (b) - 1) / (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
constexpr uint32_t static_next_power_of_2(uint32_t n) { uint32_t p = 1; while (p < n) p *= 2; return p; }

#include HEADER

int main(int, char **arguments) {
  uint32_t n = atoi(arguments[1]), k = atoi(arguments[2]), words = n * k / 32 * BITS;
  std::vector<uint32_t> in(words), out(words);
  if (fread(in.data(), 4, words, stdin) != words) return 1;
  gridDim = {n / 64, k / 64, 1};
  std::vector<std::thread> threads;
  for (uint32_t t = 0; t < 32; t++) threads.emplace_back([&, t] {
    threadIdx = {t, 0, 0};
    for (uint32_t y = 0; y < gridDim.y; y++) for (uint32_t x = 0; x < gridDim.x; x++) {
      all.arrive_and_wait();
      if (t == 0) blockIdx = {x, y, 0};
      all.arrive_and_wait();
      weight_repack_nk<BITS, 16, true, PREPROCESS, false, false, 0, false, false>(
          in.data(), out.data(), nullptr, n, k, n, k, 3);
    }
  });
  for (auto &thread : threads) thread.join();
  return fwrite(out.data(), 4, words, stdout) != words;
}

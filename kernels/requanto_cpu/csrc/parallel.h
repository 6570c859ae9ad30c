// Threads: those of torch, through the function that Python passed to rq_set_parallel.
#ifndef REQUANTO_PARALLEL_H
#define REQUANTO_PARALLEL_H
#include "requanto_cpu.h"

namespace rq {

extern RqParallelFor parallel_for;  // null: one thread
extern RqThreads thread_count;
extern bool used_threads;  // whether a loop has run on several

// Threads that a parallel loop can use now (torch.set_num_threads changes it at any time).
static inline int64_t threads() {
  uint32_t count = 1;
  if (!thread_count || thread_count(&count) != 0 || count < 1) return 1;
  return count;
}

// body(begin, end) over parts of [0, count) that together cover it, each of at least `grain`, on several threads at once.
// Runs in this thread if there is one part only, or inside another parallel loop.
template <class Body>
static inline void parallel(int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
  if (!parallel_for || count <= grain) {
    body(int64_t{0}, count);
    return;
  }
  if (!__atomic_load_n(&used_threads, __ATOMIC_RELAXED) && threads() > 1) {
    __atomic_store_n(&used_threads, true, __ATOMIC_RELAXED);
  }
  const auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); };
  parallel_for(0, count, grain < 1 ? 1 : grain, call, const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace rq
#endif

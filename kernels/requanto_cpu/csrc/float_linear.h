// A linear layer whose weight stays float, such as a model's output layer: one to four rows of x, at the memory's speed.
//
// Included inside the namespace of a level, after simd_X.h. A row of the weight is a stream of consecutive bytes, as the rows
// are one after the other, so the processor's prefetcher runs ahead of the sums; torch's GEMM of one row reorders blocks first.
#ifndef RQ_FLOAT_LINEAR_H
#define RQ_FLOAT_LINEAR_H

enum {
  LINEAR_MOST_ROWS = 4,          // of x
  LINEAR_LEAST_BYTES = 1 << 16,  // of the weight for a thread
  LINEAR_AHEAD = 2048,           // bytes between what is read and what is prefetched
};

typedef struct FloatLinear {
  const char* weight;
  const char* x;
  int64_t length, weight_bytes, x_bytes;  // K; bytes between rows
} FloatLinear;

template <int D> constexpr int64_t size_of() { return D == RQ_F32 ? 4 : 2; }

// The sum of a vector: halves first, as the vector instructions of every level do it.
static inline float sum_of(Floats a) {
  float part[16];
  store_floats(part, a);
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  return part[0];
}

#if RQ_BF16_DOT
// The first `count` of 32 bfloat16 numbers, zeros after them.
static inline Bytes load_pairs(const char* p, int count) {
  if (count == 32) return load_bytes(p);
  uint8_t copy[64] = {0};
  memcpy(copy, p, (size_t)count * 2);
  return load_bytes(copy);
}
#endif

// One vector of columns (16; 32 where bfloat16 products are used) of ROWS rows of the weight by R rows of x.
template <int D, int R, int ROWS, int SETS>
static inline void add_vector(const FloatLinear& l, const char* w, int64_t k, int count, int set,
                              Floats (*sum)[R][SETS]) {
  const int64_t at = k * size_of<D>();
#if RQ_BF16_DOT
  if constexpr (D == RQ_BF16) {
    Bytes x[R];
    for (int r = 0; r < R; ++r) x[r] = load_pairs(l.x + r * l.x_bytes + at, count);
    for (int i = 0; i < ROWS; ++i) {
      const Bytes weight = load_pairs(w + i * l.weight_bytes + at, count);
      for (int r = 0; r < R; ++r) sum[i][r][set] = dot_bfloat16(sum[i][r][set], weight, x[r]);
    }
    return;
  }
#endif
  Floats x[R];
  for (int r = 0; r < R; ++r) x[r] = load_dtype(l.x + r * l.x_bytes + at, D, count);
  for (int i = 0; i < ROWS; ++i) {
    const Floats weight = load_dtype(w + i * l.weight_bytes + at, D, count);
    for (int r = 0; r < R; ++r) sum[i][r][set] = fma(weight, x[r], sum[i][r][set]);
  }
}

// ROWS rows of the weight from `n` on by R rows of x: totals[r][i].
template <int D, int R, int ROWS>
static inline void dot_rows(const FloatLinear& l, int64_t n, float (*totals)[16]) {
  constexpr int SETS = R == 1 ? 4 : R == 2 ? 2 : 1;  // sums that do not wait for one another
  constexpr int STEP = RQ_BF16_DOT && D == RQ_BF16 ? 32 : 16;
  const char* w = l.weight + n * l.weight_bytes;
  Floats sum[ROWS][R][SETS];
  for (int i = 0; i < ROWS; ++i)
    for (int r = 0; r < R; ++r)
      for (int s = 0; s < SETS; ++s) sum[i][r][s] = splat(0.0f);
  int64_t k = 0;
  for (; k + SETS * STEP <= l.length; k += SETS * STEP)
    for (int s = 0; s < SETS; ++s) {
      const int64_t at = k + s * STEP;
      for (int i = 0; i < ROWS; ++i) __builtin_prefetch(w + i * l.weight_bytes + at * size_of<D>() + LINEAR_AHEAD);
      add_vector<D, R, ROWS>(l, w, at, STEP, s, sum);
    }
  for (; k < l.length; k += STEP)
    add_vector<D, R, ROWS>(l, w, k, l.length - k < STEP ? (int)(l.length - k) : STEP, 0, sum);
  for (int i = 0; i < ROWS; ++i)
    for (int r = 0; r < R; ++r) {
      for (int s = 1; s < SETS; ++s) sum[i][r][0] = sum[i][r][0] + sum[i][r][s];
      totals[r][i] = sum_of(sum[i][r][0]);
    }
}

template <int D, int R>
static void float_rows(const FloatLinear& l, int64_t begin, int64_t end, const char* bias, char* out, int64_t out_bytes) {
  constexpr int ROWS = R == 1 ? 1 : R == 2 ? 2 : 4;
  for (int64_t n = begin; n < end; n += 16) {
    float sums[R][16], few[R][16];
    const int count = end - n < 16 ? (int)(end - n) : 16;
    int i = 0;
    for (; i + ROWS <= count; i += ROWS) {
      dot_rows<D, R, ROWS>(l, n + i, few);
      for (int r = 0; r < R; ++r) memcpy(sums[r] + i, few[r], sizeof(float) * ROWS);
    }
    for (; i < count; ++i) {
      dot_rows<D, R, 1>(l, n + i, few);
      for (int r = 0; r < R; ++r) sums[r][i] = few[r][0];
    }
    for (int r = 0; r < R; ++r) {
      Floats all = load_dtype(sums[r], RQ_F32, count);
      if (bias) all = all + load_dtype(bias + n * size_of<D>(), D, count);
      store_dtype(out + r * out_bytes + n * size_of<D>(), D, count, all);
    }
  }
}

template <int D>
static void float_linear_of(const FloatLinear& l, int64_t rows, int64_t n, const char* bias, char* out, int64_t out_bytes) {
  const int64_t grain = 1 + LINEAR_LEAST_BYTES / (l.length * size_of<D>() + 1);
  rq::parallel(n, grain, [&](int64_t begin, int64_t end) {
    switch (rows) {
      case 1: return float_rows<D, 1>(l, begin, end, bias, out, out_bytes);
      case 2: return float_rows<D, 2>(l, begin, end, bias, out, out_bytes);
      case 3: return float_rows<D, 3>(l, begin, end, bias, out, out_bytes);
      default: return float_rows<D, 4>(l, begin, end, bias, out, out_bytes);
    }
  });
}

static int float_linear(const void* weight, int32_t dtype, int64_t n, int64_t length, int64_t weight_stride, const void* x,
                        int64_t rows, int64_t x_stride, const void* bias, void* out, int64_t out_stride) {
  if (dtype < RQ_F32 || dtype > RQ_BF16 || rows < 0 || rows > LINEAR_MOST_ROWS || n < 0 || length < 0) return RQ_E_ARGUMENT;
  if (!rows || !n) return 0;
  const int64_t size = dtype == RQ_F32 ? 4 : 2;
  const FloatLinear l = {(const char*)weight, (const char*)x, length, weight_stride * size, x_stride * size};
  char* to = (char*)out;
  const char* added = (const char*)bias;
  if (dtype == RQ_F32) float_linear_of<RQ_F32>(l, rows, n, added, to, out_stride * size);
  else if (dtype == RQ_F16) float_linear_of<RQ_F16>(l, rows, n, added, to, out_stride * size);
  else float_linear_of<RQ_BF16>(l, rows, n, added, to, out_stride * size);
  return 0;
}
#endif

// x times the column scale of a weight, before its GEMM.
//
// Included inside the namespace of a level, after simd_X.h.
#ifndef RQ_COLUMNS_H
#define RQ_COLUMNS_H

enum { COLUMNS_OF_A_THREAD = 1 << 15 };  // numbers of x

// Each product is rounded to x's dtype, as torch's x * column is: first the column scale, if it has another dtype.
template <int X>
static void scale_row(const char* x, int64_t length, const char* column, int32_t dtype, char* out) {
  const int64_t size = X == RQ_F32 ? 4 : 2, other = dtype == RQ_F32 ? 4 : 2;
  for (int64_t k = 0; k < length; k += 16) {
    const int count = length - k < 16 ? (int)(length - k) : 16;
    Floats by = load_dtype(column + k * other, dtype, count);
    if (dtype != X && X != RQ_F32) {
      uint8_t rounded[64];
      store_dtype(rounded, X, 16, by);
      by = load_dtype(rounded, X, 16);
    }
    store_dtype(out + k * size, X, count, load_dtype(x + k * size, X, count) * by);
  }
}

// x: [rows, length] with a stride in elements; out: contiguous.
static int scale_columns(const void* x, int32_t dtype, int64_t rows, int64_t length, int64_t x_stride, const void* column,
                         int32_t column_dtype, void* out) {
  if (dtype < RQ_F32 || dtype > RQ_BF16 || column_dtype < RQ_F32 || column_dtype > RQ_BF16) return RQ_E_ARGUMENT;
  const int64_t size = dtype == RQ_F32 ? 4 : 2;
  rq::parallel(rows, 1 + COLUMNS_OF_A_THREAD / (length + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const char* from = (const char*)x + row * x_stride * size;
      char* to = (char*)out + row * length * size;
      if (dtype == RQ_F32) scale_row<RQ_F32>(from, length, (const char*)column, column_dtype, to);
      else if (dtype == RQ_F16) scale_row<RQ_F16>(from, length, (const char*)column, column_dtype, to);
      else scale_row<RQ_BF16>(from, length, (const char*)column, column_dtype, to);
    }
  });
  return 0;
}
#endif

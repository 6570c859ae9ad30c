// The C interface of the CPU kernels, which Python calls through ctypes (requanto_cpu/library.py holds the same structs).
//
// No header of torch or Python is used, so one built library serves all their versions. Threads are torch's own:
// `torch_parallel_for`, a C function of torch's stable interface (torch >= 2.10).
//
// Strips: the order of codes that all kernels read.
//   A weight [N, K] is cut into strips of 16 rows, and each strip along K into units of 32 columns. N and K are padded with
//   zero bytes. A unit holds `bits` * 64 bytes: one plane for each power of two that `bits` consists of, largest first
//   (3 bits: a plane of 2 bits, then one of 1; 7 bits: 4, 2, 1; 8 bits: a single plane of 8).
//   A plane of p bits is p vectors of 64 bytes. Byte 4 * r + j of a vector holds, for row r of the strip, 8 / p codes: code
//   number t (from the low bits on) is that of column 4 * q + j of the unit, with q = v * (8 / p) + t for vector v.
//   So `(vector >> p * t) & mask` is 16 rows x 4 columns: what integer dot product instructions take, 4 bytes a lane.
//   The code is the sum of its planes: of 3 bits `plane2 | plane1 << 2`, of 5 bits `plane4 | plane1 << 4`, of 6 bits
//   `plane4 | plane2 << 4`, of 7 bits `plane4 | plane2 << 4 | plane1 << 6`.
//   Signed 8-bit codes are stored as code + 128 (the top bit flipped); all others as they are.
#ifndef REQUANTO_CPU_H
#define REQUANTO_CPU_H
#include <stdint.h>

#ifdef _WIN32
#define RQ_API extern "C" __declspec(dllexport)
#else
#define RQ_API extern "C" __attribute__((visibility("default")))
#endif

enum { RQ_ROWS = 16, RQ_COLUMNS = 32 };  // of a strip, of a unit

// dtypes of x, results, scales and shifts. RQ_U8: scales or shifts that are codes (the kind says how they are read), of
// `scale_bits` or `shift_bits` bits, in a stream of bits along the groups as in checkpoints, low bits first: code g of row n
// is bits g * b to (g + 1) * b of the bytes n * stride_n + i * stride_g, i = 0, 1, ... With 8 bits byte g is code g.
// (Strides are 1 and N: the byte i of 16 rows is one load, and the shift is the same for all of them.)
enum RqDtype { RQ_NONE = 0, RQ_F32 = 1, RQ_F16 = 2, RQ_BF16 = 3, RQ_U8 = 4 };

// What a code stands for, before the scale.
//   RQ_INTEGER  the number code - zero_code
//   RQ_TABLE    table[code]: up to 64 float32 values (codebooks and small floats of up to 6 bits)
//   RQ_E4M3, RQ_E5M2, RQ_E4M3FNUZ  the 8-bit float with these bits; NaN codes give NaN
enum RqCode { RQ_INTEGER = 0, RQ_TABLE = 1, RQ_E4M3 = 2, RQ_E5M2 = 3, RQ_E4M3FNUZ = 4 };

// How the scale of a group is computed. `part` is what is stored at scale[n, g].
//   RQ_PLAIN   float(part)
//   RQ_CODES   row_scale[n, block of g] * (part - scale_zero)     (scales in 4 to 8 bits)
//   RQ_E8M0    2^(part - 127), 255 is NaN                         (MX)
//   RQ_E4M3S   e4m3(part) * row_scale[n]                          (NVFP4)
// The shift, which is SUBTRACTED (weight = scale * code - shift):
//   RQ_NO_SHIFT; RQ_PLAIN: float(part);
//   RQ_CODES:  scale * (float(part) * shift_factor)  if row_shift is null (zero points in codes; whole zero points: factor 1)
//              row_shift[n, block of g] * part       else
enum RqScaleKind { RQ_NO_SHIFT = 0, RQ_PLAIN = 1, RQ_CODES = 2, RQ_E8M0 = 3, RQ_E4M3S = 4 };

// How x is multiplied.
//   RQ_BLOCKS8   x is rounded to int8 in blocks along K (of RqWeight.block columns), int32 sums, float32 across blocks
//   RQ_BLOCKS16  the same with 16 bits, as two int8 products
//   RQ_FLOAT     float32 (bfloat16 products with float32 sums where x is bfloat16 and the processor has them)
//   RQ_CODED     x is int8 codes with one scale a row (`steps`): exact int32 sums within a group, or a row without groups
// RQ_PARTS: RQ_FLOAT in which x may be the sum of two bfloat16, which keep 16 bits of each element. Only level amx does so, for more
// than 4 rows of float32 or float16 and integer weights with one scale a row and no shift; everything else is as with RQ_FLOAT.
enum RqArithmetic { RQ_BLOCKS8 = 0, RQ_BLOCKS16 = 1, RQ_FLOAT = 2, RQ_CODED = 3, RQ_PARTS = 4 };

typedef struct RqWeight {
  const uint8_t* codes;      // strips, aligned to 64 bytes
  int64_t rows, length;      // N and K, not padded
  int64_t group;             // columns that share a scale, a multiple of 8 that divides K; K if there is one scale a row
  int64_t groups;            // K / group
  int32_t bits, code;        // 1 to 8; RqCode
  int32_t zero_code;         // of RQ_INTEGER
  int32_t block;             // columns that share a scale of x: 32, 16 or 8; divides group unless there is one scale a row
  const float* table;        // of RQ_TABLE: 2^bits values
  const uint8_t* levels;     // of RQ_TABLE: the values as integers, table[code] ~ level_scale * (levels[code] - 128)
  float level_scale;
  int32_t scale_kind, scale_dtype;
  int32_t shift_kind, shift_dtype;
  const void* scale;         // element [n, g] at n * scale_stride_n + g * scale_stride_g elements (RQ_U8: byte, see above)
  const void* shift;         // with strides of its own
  int64_t scale_stride_n, scale_stride_g, shift_stride_n, shift_stride_g;
  const void* row_scale;     // [N, blocks], contiguous, of row_dtype; or null
  const void* row_shift;     // likewise
  int32_t row_dtype;         // RQ_F32, RQ_F16 or RQ_BF16
  int32_t scale_bits, shift_bits;  // of RQ_U8: bits of a code, 1 to 8
  int64_t scale_groups;      // groups that share a row_scale (all of a row, if blocks is 1)
  int32_t scale_zero;        // of RQ_CODES
  float shift_factor;        // of RQ_CODES
} RqWeight;

// One GEMM: out = x @ weight.T + bias.
typedef struct RqGemm {
  const RqWeight* weight;
  int64_t rows;              // of x
  int64_t x_stride, out_stride;  // elements between rows; the last axes are contiguous
  int32_t x_dtype, out_dtype;    // RQ_F32, RQ_F16, RQ_BF16 (of RQ_CODED x is int8 and x_dtype RQ_NONE)
  int32_t arithmetic;
  int32_t bias_dtype;        // RQ_NONE: no bias
  const void* bias;          // [N], contiguous
  const float* steps;        // of RQ_CODED: the scale of each row of x
  int64_t scratch_bytes;     // size of the scratch buffer; rows of x are processed in parts that fit
  const void* column;        // [K], contiguous: x is multiplied by it first, rounded to x's dtype (not of RQ_CODED); or null
  int32_t column_dtype;
} RqGemm;

// All functions may be called from several threads at once. They return 0, or one of these codes; those that return a size,
// the size or a code.
enum RqError {
  RQ_E_LEVEL = -1,     // no level that the processor has was built, or not this one
  RQ_E_MISSING = -2,   // this level has no such kernel
  RQ_E_ARGUMENT = -3,  // a value in the structs or arguments that no kernel takes
  RQ_E_SCRATCH = -4,   // scratch_bytes is below rq_gemm_least_scratch
  RQ_E_MEMORY = -5,    // no memory for a thread's own buffers
  RQ_E_INDEX = -6      // an index is no row of the weight
};

// The instruction sets that were built and that this processor has, best last, separated by commas ("avx2,avx512,vnni,bf16").
RQ_API const char* rq_levels(void);
RQ_API const char* rq_built(void);  // also those that it lacks
// Selects one of them for the process; nothing else may run meanwhile. RQ_E_LEVEL if it is not available.
RQ_API int rq_set_level(const char* name);
RQ_API const char* rq_level(void);  // the selected one, at first the best; "" if the processor has none of them
RQ_API const char* rq_error(int code);  // what a code means
RQ_API int rq_abi(void);  // RQ_ABI of the sources it was built from
// `torch_parallel_for` and `torch_get_num_threads` of the running torch, passed by Python (null: one thread).
typedef int32_t (*RqParallelFor)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);
typedef int32_t (*RqThreads)(uint32_t* count);
RQ_API void rq_set_parallel(RqParallelFor parallel, RqThreads threads);
// For the child of a fork, in which the parent's threads do not exist though OpenMP would wait for them: if a loop has run on
// several threads, all later ones run in one. Returns 1 if so, else 0.
RQ_API int rq_forked(void);
enum { RQ_ABI = 3 };

// Bytes of scratch that `rq_gemm` wants for all rows at once, and the fewest that it can work with.
RQ_API int64_t rq_gemm_scratch(const RqGemm* gemm, int64_t rows);
RQ_API int64_t rq_gemm_least_scratch(const RqGemm* gemm);
// x: [rows, K], out: [rows, N]. With RQ_BLOCKS8 and RQ_BLOCKS16, a row of x is computed as with RQ_FLOAT if it has an element
// of 2^96 or more (infinity and NaN too), a block of others below 2^-100, or (RQ_BLOCKS16) a block in which more than half of the nonzero elements would keep fewer than 8 bits.
RQ_API int rq_gemm(const RqGemm* gemm, const void* x, void* out, void* scratch);

// Rows `start` to `stop`, or those of `index` (int64, stop - start of them; RQ_E_INDEX if one is out of range) if it is
// not null, as floats, row by row: value = float(code) * scale - shift, each operation rounded to float32, then to `dtype`.
RQ_API int rq_dequantize(const RqWeight* weight, int64_t start, int64_t stop, const int64_t* index, void* out, int32_t dtype,
                         int64_t out_stride);
// The same of codes in the plain layout of checkpoints: rows of ceil(K * bits / 8) bytes, low bits first (`codes` of the
// weight points to them; groups of any size; signed 8-bit codes as they are: zero_code 0, `code` RQ_INTEGER, `is_signed`).
RQ_API int rq_dequantize_plain(const RqWeight* weight, int32_t is_signed, int64_t start, int64_t stop, const int64_t* index,
                               void* out, int32_t dtype, int64_t out_stride);

// Plain rows to strips and back. `flip`: 128 for signed 8-bit codes, else 0. `strips` has strips * units * bits * 64 bytes.
RQ_API int rq_pack(const uint8_t* plain, int32_t bits, int64_t rows, int64_t length, uint8_t flip, uint8_t* strips);
RQ_API int rq_unpack(const uint8_t* strips, int32_t bits, int64_t rows, int64_t length, uint8_t flip, int64_t start,
                     int64_t stop, uint8_t* plain);
// Codes of the rows of `index` (or from `start` to `stop`), one byte each: [stop - start, K].
RQ_API int rq_codes(const uint8_t* strips, int32_t bits, int64_t rows, int64_t length, uint8_t flip, int64_t start,
                    int64_t stop, const int64_t* index, uint8_t* codes);

// Rounds rows of x to int8 with one scale a row, as requanto.linear.activations defines it (`fixed`: a static scale, or null).
// codes: [rows, K]; steps: [rows].
RQ_API int rq_rows_to_int8(const void* x, int32_t dtype, int64_t rows, int64_t length, int64_t x_stride, const float* fixed,
                           int8_t* codes, float* steps);

// out = x @ weight.T + bias of a weight [n, length] that is not quantized, for 1 to 4 rows of x. All tensors have that dtype;
// sums are float32. Strides in elements; the last axes are contiguous. bias: [n], or null.
RQ_API int rq_float_linear(const void* weight, int32_t dtype, int64_t n, int64_t length, int64_t weight_stride, const void* x,
                           int64_t rows, int64_t x_stride, const void* bias, void* out, int64_t out_stride);
#endif

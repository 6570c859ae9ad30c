// Included first in the level "amx", computes its tiles in memory, for processors that have AVX-512 BF16 and no AMX. (No emulator
// that is free has AMX.) Like the processor: rows and bytes are those of the configuration, subnormal numbers count as 0.
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#undef _tile_dpbsud
#undef _tile_dpbusd
#undef _tile_dpbuud
#define _tile_loadconfig emulated::load_config
#define _tile_release emulated::release
#define _tile_loadd emulated::load
#define _tile_stream_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_zero emulated::zero
#define _tile_dpbf16ps emulated::products_of_bfloat16
#define _tile_dpbssd emulated::products_of_bytes<int8_t, int8_t>
#define _tile_dpbsud emulated::products_of_bytes<int8_t, uint8_t>
#define _tile_dpbusd emulated::products_of_bytes<uint8_t, int8_t>
#define _tile_dpbuud emulated::products_of_bytes<uint8_t, uint8_t>

// Not in an unnamed namespace: the level is built as two files, which share `Tiles::configure`.
namespace emulated {
struct Tile {
  int rows, bytes;
  uint8_t data[16][64];
};
inline thread_local Tile tiles[8];
inline thread_local bool configured;

// A tile that the thread's configuration has; the processor stops a program that uses another.
inline Tile& tile(int number) {
  if (!configured || !tiles[number].rows || !tiles[number].bytes) abort();
  return tiles[number];
}
inline void load_config(const void* from) {
  const uint8_t* bytes = (const uint8_t*)from;
  if (bytes[0] != 1) abort();
  memset(tiles, 0, sizeof tiles);
  for (int i = 0; i < 8; ++i) {
    tiles[i].bytes = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8;
    tiles[i].rows = bytes[48 + i];
    if (tiles[i].bytes > 64 || tiles[i].rows > 16) abort();
  }
  configured = true;
}
inline void release() { configured = false; }
inline void zero(int number) { memset(tile(number).data, 0, sizeof tiles[0].data); }
inline void load(int number, const void* from, int64_t stride) {
  Tile& t = tile(number);
  memset(t.data, 0, sizeof t.data);
  for (int r = 0; r < t.rows; ++r) memcpy(t.data[r], (const uint8_t*)from + r * stride, (size_t)t.bytes);
}
inline void store(int number, void* to, int64_t stride) {
  const Tile& t = tile(number);
  for (int r = 0; r < t.rows; ++r) memcpy((uint8_t*)to + r * stride, t.data[r], (size_t)t.bytes);
}
inline void check(const Tile& c, const Tile& a, const Tile& b) {
  if (c.rows != a.rows || c.bytes != b.bytes || a.bytes != 4 * b.rows) abort();
}
inline float bfloat16(const uint8_t* p) {
  uint32_t bits = (uint32_t)p[0] << 16 | (uint32_t)p[1] << 24;
  if ((bits & 0x7F800000) == 0) bits &= 0x80000000u;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline void products_of_bfloat16(int sum, int left, int right) {
  Tile &c = tile(sum), &a = tile(left), &b = tile(right);
  check(c, a, b);
  for (int m = 0; m < c.rows; ++m)
    for (int n = 0; n < c.bytes / 4; ++n) {
      float total;
      memcpy(&total, c.data[m] + 4 * n, 4);
      for (int k = 0; k < b.rows; ++k)
        for (int i = 0; i < 2; ++i) total += bfloat16(a.data[m] + 4 * k + 2 * i) * bfloat16(b.data[k] + 4 * n + 2 * i);
      memcpy(c.data[m] + 4 * n, &total, 4);
    }
}
template <class Left, class Right> void products_of_bytes(int sum, int left, int right) {
  Tile &c = tile(sum), &a = tile(left), &b = tile(right);
  check(c, a, b);
  for (int m = 0; m < c.rows; ++m)
    for (int n = 0; n < c.bytes / 4; ++n) {
      int32_t total;
      memcpy(&total, c.data[m] + 4 * n, 4);
      for (int k = 0; k < b.rows; ++k)
        for (int i = 0; i < 4; ++i) total += (int32_t)(Left)a.data[m][4 * k + i] * (int32_t)(Right)b.data[k][4 * n + i];
      memcpy(c.data[m] + 4 * n, &total, 4);
    }
}
}  // namespace emulated

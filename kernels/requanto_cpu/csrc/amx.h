// Tiles of AMX: 8 registers of up to 16 rows of 64 bytes. They are state of a thread: `Tiles` configures them at the start of
// the body of a parallel loop and gives them back at its end (torch's own GEMMs configure them in the same threads between).
//
// Included inside the namespace of a level.
#ifndef RQ_AMX_H
#define RQ_AMX_H

// What the compiler's tile intrinsics do not say: they read memory that was written before, and write what is read after.
static inline void tile_barrier() { __asm__ volatile("" : : : "memory"); }

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];  // of a row of each tile
  uint8_t rows[16];
};

// While it lives, this thread has tiles. Four sums (0 to 3: [A][B] of 2 x 2), two operands A (4, 5) and two B (6, 7), with
// `first` and `second` rows of A, 1 to 16 (0: there is no second, and its tiles must not be used), of `width` bytes.
struct Tiles {
  int first = 0, second = 0, width = 0;
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  ~Tiles() {
    if (first) _tile_release();
  }
  void configure(int a, int b, int bytes = 64) {
    if (a == first && b == second && bytes == width) return;
    first = a, second = b, width = bytes;
    TileConfig config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    const int rows[8] = {a, a, b, b, a, b, bytes / 4, bytes / 4};
    for (int i = 0; i < 8; ++i) {
      config.rows[i] = (uint8_t)rows[i];
      config.bytes[i] = (uint16_t)(!rows[i] ? 0 : i == 4 || i == 5 ? bytes : 64);
    }
    tile_barrier();
    _tile_loadconfig(&config);
    tile_barrier();
  }
};

// The four sums. In memory, `below` is what belongs to the second operand A; sums of the second B are `step` bytes after the first's.
static inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}
static inline void load_sums(const void* sums, const void* below, int64_t step, int64_t stride) {
  _tile_loadd(0, sums, stride);
  _tile_loadd(1, (const char*)sums + step, stride);
  _tile_loadd(2, below, stride);
  _tile_loadd(3, (const char*)below + step, stride);
}
static inline void store_sums(void* sums, void* below, int64_t step, int64_t stride) {
  _tile_stored(0, sums, stride);
  _tile_stored(1, (char*)sums + step, stride);
  _tile_stored(2, below, stride);
  _tile_stored(3, (char*)below + step, stride);
}
#endif

// Plain rows of checkpoints <-> strips (requanto_cpu.h describes both), and strips -> one byte a code.
//
// Compiled for the baseline of the platform. A word of 64 bits holds 8 codes, one a byte, whatever their width: three steps
// spread the 8 * bits bits of 8 plain codes to bytes, or squeeze them together; planes are shifts and masks of these words.
#include <string.h>

#include "parallel.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "strips are read and written as little-endian words"
#endif

namespace {

enum { WORDS = RQ_COLUMNS / 8 };                // of a row in a unit
const uint64_t EACH = 0x0101010101010101u;      // times a mask of a byte: that mask in each byte
const int64_t BYTES_OF_A_THREAD = int64_t{1} << 16;  // a thread that is started for less costs more than it saves

constexpr uint64_t fields(int width, int every) {  // a mask of `width` bits, repeated every so many bits
  uint64_t mask = 0;
  for (int at = 0; at < 64; at += every) mask |= ((uint64_t{1} << width) - 1) << at;
  return mask;
}

// 8 adjacent codes -> one a byte. Each step moves the upper half of a field to the middle of the space that it has.
template <int B>
inline uint64_t spread(uint64_t x) {
  if (B == 8) return x;
  constexpr uint64_t four = (uint64_t{1} << (4 * B % 64)) - 1;
  x = (x & four) | (x >> 4 * B & four) << 32;
  constexpr uint64_t two = fields(2 * B, 32), one = fields(B, 16);
  x = (x & two) | (x & two << 2 * B) << (16 - 2 * B);
  return (x & one) | (x & one << B) << (8 - B);
}

// The reverse.
template <int B>
inline uint64_t squeeze(uint64_t x) {
  if (B == 8) return x;
  constexpr uint64_t two = fields(2 * B, 32), one = fields(B, 16);
  x = (x & one) | (x & one << 8) >> (8 - B);
  x = (x & two) | (x & two << 16) >> (16 - 2 * B);
  return (x & 0xffffffffu) | x >> 32 << 4 * B;
}

// Writes the plane of P bits, from bit LOW of the codes, of one row of a unit: P words, one in each vector.
template <int P, int LOW>
inline void write_plane(const uint64_t* codes, uint8_t* row) {
  constexpr int half = 4 / P;  // words of 8 codes that meet in a vector; 8 bits: half a word
  for (int v = 0; v < P; ++v) {
    uint32_t word;
    if (half == 0) {
      word = static_cast<uint32_t>(codes[v / 2] >> 32 * (v % 2));
    } else {
      uint64_t sum = 0;
      for (int i = 0; i < half; ++i) sum |= (codes[v * half + i] >> LOW & EACH * ((1 << P) - 1)) << 2 * P * i;
      word = static_cast<uint32_t>(sum | sum >> (32 - P));
    }
    memcpy(row + 64 * v, &word, 4);
  }
}

template <int P, int LOW>
inline void read_plane(const uint8_t* row, uint64_t* codes) {
  constexpr int half = 4 / P;
  for (int v = 0; v < P; ++v) {
    uint32_t word;
    memcpy(&word, row + 64 * v, 4);
    if (half == 0) {
      codes[v / 2] |= static_cast<uint64_t>(word) << 32 * (v % 2);
    } else {
      const uint64_t both = word | static_cast<uint64_t>(word >> P) << 32;
      for (int i = 0; i < half; ++i) codes[v * half + i] |= (both >> 2 * P * i & EACH * ((1 << P) - 1)) << LOW;
    }
  }
}

// Planes, largest first. `row` points to byte 4 * r of the unit.
template <int B>
inline void write_row(const uint64_t* codes, uint8_t* row) {
  if (B == 8) return write_plane<8, 0>(codes, row);
  if (B & 4) write_plane<4, 0>(codes, row);
  if (B & 2) write_plane<2, B & 4>(codes, row + 64 * (B & 4));
  if (B & 1) write_plane<1, B & 6>(codes, row + 64 * (B & 6));
}

template <int B>
inline void read_row(const uint8_t* row, uint64_t* codes) {
  for (int i = 0; i < WORDS; ++i) codes[i] = 0;
  if (B == 8) return read_plane<8, 0>(row, codes);
  if (B & 4) read_plane<4, 0>(row, codes);
  if (B & 2) read_plane<2, B & 4>(row + 64 * (B & 4), codes);
  if (B & 1) read_plane<1, B & 6>(row + 64 * (B & 6), codes);
}

// Exchanges two bits of the index of each bit of a word: bit i goes to the place whose number has bits A < B of i swapped.
template <int A, int B>
inline uint64_t swap_index_bits(uint64_t x) {
  constexpr int distance = (1 << B) - (1 << A);
  constexpr uint64_t lower = fields(1 << A, 2 << A) << (1 << A) & fields(1 << B, 2 << B);  // bit A is set, B is not
  const uint64_t differ = (x ^ x >> distance) & lower;
  return x ^ differ ^ differ << distance;
}

// One bit: a row of a unit is one word of 32 bits in both orders, bit 4 * q + j of which becomes bit q of byte j. Two at once.
inline uint64_t write_bits(uint64_t plain) {
  return swap_index_bits<3, 4>(swap_index_bits<2, 4>(swap_index_bits<1, 3>(swap_index_bits<0, 2>(plain))));
}

inline uint64_t read_bits(uint64_t words) {
  return swap_index_bits<0, 2>(swap_index_bits<1, 3>(swap_index_bits<2, 4>(swap_index_bits<3, 4>(words))));
}

struct Shape {
  int64_t rows, length, units, row_bytes;  // row_bytes: of a plain row
  int64_t strip_bytes;
};

Shape shape_of(int bits, int64_t rows, int64_t length) {
  const int64_t units = (length + RQ_COLUMNS - 1) / RQ_COLUMNS;
  return {rows, length, units, (length * bits + 7) / 8, units * bits * 64};
}

// Columns beyond K, of the last unit, become zero.
inline void clear_beyond(uint64_t* codes, int64_t columns) {
  for (int i = 0; i < WORDS; ++i) {
    const int64_t left = columns - 8 * i;
    if (left < 8) codes[i] &= left <= 0 ? 0 : (uint64_t{1} << 8 * left) - 1;
  }
}

// 32 bits of a plain row of 1-bit codes, zero beyond its end.
inline uint32_t plain_bits(const uint8_t* plain, const Shape& of, int64_t row, int64_t unit) {
  uint32_t bits = 0;
  if (row >= of.rows) return bits;
  const int64_t columns = of.length - unit * RQ_COLUMNS;
  const uint8_t* const from = plain + row * of.row_bytes + unit * 4;
  if (columns >= RQ_COLUMNS) {
    memcpy(&bits, from, 4);
    return bits;
  }
  memcpy(&bits, from, static_cast<size_t>((columns + 7) / 8));
  return bits & ((1u << columns) - 1);
}

void pack_strips_of_bits(const uint8_t* plain, const Shape& of, uint8_t* strips, int64_t begin, int64_t end) {
  for (int64_t strip = begin; strip < end; ++strip) {
    uint8_t* unit = strips + strip * of.strip_bytes;
    for (int64_t u = 0; u < of.units; ++u, unit += 64) {
      for (int r = 0; r < RQ_ROWS; r += 2) {
        const int64_t row = strip * RQ_ROWS + r;
        const uint64_t upper = plain_bits(plain, of, row + 1, u);
        const uint64_t words = write_bits(plain_bits(plain, of, row, u) | upper << 32);
        memcpy(unit + 4 * r, &words, 8);
      }
    }
  }
}

template <int B>
void pack_strips(const uint8_t* plain, const Shape& of, uint8_t flip, uint8_t* strips, int64_t begin, int64_t end) {
  const uint8_t* const plain_end = plain + of.rows * of.row_bytes;
  for (int64_t strip = begin; strip < end; ++strip) {
    uint8_t* unit = strips + strip * of.strip_bytes;
    for (int64_t u = 0; u < of.units; ++u, unit += 64 * B) {
      const int64_t columns = of.length - u * RQ_COLUMNS;
      for (int r = 0; r < RQ_ROWS; ++r) {
        uint64_t codes[WORDS] = {0, 0, 0, 0};
        const int64_t row = strip * RQ_ROWS + r;
        if (row < of.rows) {
          const uint8_t* from = plain + row * of.row_bytes + u * 4 * B;
          uint8_t copy[40];
          if (columns < RQ_COLUMNS || plain_end - from < 40) {  // words are read 8 bytes at a time, up to 4 * B + 7
            const int64_t rest = of.row_bytes - u * 4 * B;
            memset(copy, 0, sizeof copy);
            memcpy(copy, from, static_cast<size_t>(rest < 4 * B ? rest : 4 * B));
            from = copy;
          }
          for (int i = 0; i < WORDS; ++i) {
            memcpy(&codes[i], from + i * B, 8);
            codes[i] = spread<B>(codes[i]);
            if (B == 8) codes[i] ^= EACH * flip;
          }
          if (columns < RQ_COLUMNS) clear_beyond(codes, columns);
        }
        write_row<B>(codes, unit + 4 * r);
      }
    }
  }
}

// 32 codes, or those of the last unit, as plain bytes.
template <int B>
inline void write_plain(const uint64_t* codes, uint8_t flip, uint8_t* to, int64_t rest) {
  uint8_t copy[4 * B];
  uint8_t* const place = rest < 4 * B ? copy : to;
  for (int i = 0; i < WORDS; ++i) {
    const uint64_t word = B == 8 ? codes[i] ^ EACH * flip : squeeze<B>(codes[i]);
    memcpy(place + i * B, &word, B);
  }
  if (rest < 4 * B) memcpy(to, copy, static_cast<size_t>(rest));
}

template <int B>
void unpack_rows(const uint8_t* strips, const Shape& of, uint8_t flip, int64_t start, int64_t stop, uint8_t* plain) {
  for (int64_t row = start; row < stop;) {
    const int64_t strip = row / RQ_ROWS, end = stop < (strip + 1) * RQ_ROWS ? stop : (strip + 1) * RQ_ROWS;
    const uint8_t* unit = strips + strip * of.strip_bytes;
    for (int64_t u = 0; u < of.units; ++u, unit += 64 * B) {
      for (int64_t r = row; r < end; ++r) {
        const uint8_t* from = unit + 4 * (r % RQ_ROWS);
        uint8_t* to = plain + (r - start) * of.row_bytes + u * 4 * B;
        const int64_t rest = of.row_bytes - u * 4 * B;
        if (B == 1) {
          uint32_t word;
          memcpy(&word, from, 4);
          const uint64_t bits = read_bits(word);
          if (rest >= 4) {
            memcpy(to, &bits, 4);
          } else {
            memcpy(to, &bits, static_cast<size_t>(rest));
          }
          continue;
        }
        uint64_t codes[WORDS];
        read_row<B>(from, codes);
        write_plain<B>(codes, flip, to, rest);
      }
    }
    row = end;
  }
}

// Codes of one row, for output rows `begin` to `end`; row by row where an index chooses them, else a strip at a time.
template <int B>
void code_rows(const uint8_t* strips, const Shape& of, uint8_t flip, int64_t start, const int64_t* index, int64_t begin,
               int64_t end, uint8_t* codes) {
  for (int64_t out = begin; out < end;) {
    const int64_t row = index ? index[out] : start + out;
    const int64_t together = index ? 1 : RQ_ROWS - row % RQ_ROWS, count = together < end - out ? together : end - out;
    const uint8_t* unit = strips + row / RQ_ROWS * of.strip_bytes;
    for (int64_t u = 0; u < of.units; ++u, unit += 64 * B) {
      for (int64_t r = 0; r < count; ++r) {
        uint64_t words[WORDS];
        read_row<B>(unit + 4 * (row % RQ_ROWS + r), words);
        write_plain<8>(words, B == 8 ? flip : 0, codes + (out + r) * of.length + u * RQ_COLUMNS, of.length - u * RQ_COLUMNS);
      }
    }
    out += count;
  }
}

bool fits(int32_t bits, int64_t rows, int64_t length) { return bits >= 1 && bits <= 8 && rows >= 0 && length >= 0; }

int64_t grain(int64_t bytes_of_one) { return bytes_of_one > 0 ? BYTES_OF_A_THREAD / bytes_of_one + 1 : BYTES_OF_A_THREAD; }

// Runs `action` with the number of bits as a type, so that all shifts and masks are constants.
template <int B>
struct Bits {
  enum { value = B };
};

template <class Action>
void with_bits(int bits, const Action& action) {
  switch (bits) {
    case 1: return action(Bits<1>());
    case 2: return action(Bits<2>());
    case 3: return action(Bits<3>());
    case 4: return action(Bits<4>());
    case 5: return action(Bits<5>());
    case 6: return action(Bits<6>());
    case 7: return action(Bits<7>());
    default: return action(Bits<8>());
  }
}

}  // namespace

RQ_API int rq_pack(const uint8_t* plain, int32_t bits, int64_t rows, int64_t length, uint8_t flip, uint8_t* strips) {
  if (!fits(bits, rows, length)) return RQ_E_ARGUMENT;
  const Shape of = shape_of(bits, rows, length);
  with_bits(bits, [&](auto b) {
    rq::parallel((rows + RQ_ROWS - 1) / RQ_ROWS, grain(of.strip_bytes), [&](int64_t begin, int64_t end) {
      if (bits == 1) return pack_strips_of_bits(plain, of, strips, begin, end);
      pack_strips<decltype(b)::value>(plain, of, flip, strips, begin, end);
    });
  });
  return 0;
}

RQ_API int rq_unpack(const uint8_t* strips, int32_t bits, int64_t rows, int64_t length, uint8_t flip, int64_t start,
                     int64_t stop, uint8_t* plain) {
  if (!fits(bits, rows, length) || start < 0 || start > stop || stop > rows) return RQ_E_ARGUMENT;
  const Shape of = shape_of(bits, rows, length);
  with_bits(bits, [&](auto b) {
    rq::parallel(stop - start, grain(of.row_bytes), [&](int64_t begin, int64_t end) {
      unpack_rows<decltype(b)::value>(strips, of, flip, start + begin, start + end, plain + begin * of.row_bytes);
    });
  });
  return 0;
}

RQ_API int rq_codes(const uint8_t* strips, int32_t bits, int64_t rows, int64_t length, uint8_t flip, int64_t start,
                    int64_t stop, const int64_t* index, uint8_t* codes) {
  if (!fits(bits, rows, length) || start > stop || (!index && (start < 0 || stop > rows))) return RQ_E_ARGUMENT;
  const Shape of = shape_of(bits, rows, length);
  with_bits(bits, [&](auto b) {
    rq::parallel(stop - start, grain(length), [&](int64_t begin, int64_t end) {
      code_rows<decltype(b)::value>(strips, of, flip, start, index, begin, end, codes);
    });
  });
  return 0;
}

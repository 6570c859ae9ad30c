// Codes of a strip as bytes: 16 rows x 4 columns a vector, from the planes that requanto_cpu.h describes.
//
// Included inside the namespace of a level, after its vectors.
#ifndef RQ_CODES_H
#define RQ_CODES_H

#define RQ_INLINE static inline __attribute__((always_inline))

// Bits AT to AT + P of the codes of columns 4 * Q to 4 * Q + 3, from a plane of P bits.
template <int P, int AT, int Q> RQ_INLINE Bytes plane_part(const uint8_t* plane) {
  constexpr int per = 8 / P, shift = P * (Q % per) - AT;
  const Bytes bytes = load_bytes(plane + 64 * (Q / per));
  if constexpr (P == 8) return bytes;
  else if constexpr (shift >= 0) return down<shift>(bytes) & splat_byte(((1 << P) - 1) << AT);
  else return up<-shift>(bytes) & splat_byte(((1 << P) - 1) << AT);
}

// Codes of BITS bits, from a unit of 64 * BITS bytes.
template <int BITS> struct Coded {
  static constexpr int bits = BITS, bytes = 64 * BITS;
  static constexpr int top = BITS == 8 ? 8 : BITS >= 4 ? 4 : BITS >= 2 ? 2 : 1;  // bits of the first plane
  template <int Q> RQ_INLINE Bytes at(const uint8_t* unit, const Bytes* = nullptr) {
    if constexpr (BITS == 3 || BITS == 5) return plane_part<top, 0, Q>(unit) | plane_part<1, top, Q>(unit + 64 * top);
    else if constexpr (BITS == 6) return plane_part<4, 0, Q>(unit) | plane_part<2, 4, Q>(unit + 256);
    else if constexpr (BITS == 7)
      return plane_part<4, 0, Q>(unit) | plane_part<2, 4, Q>(unit + 256) | plane_part<1, 6, Q>(unit + 384);
    else return plane_part<top, 0, Q>(unit);
  }
};

// 8-bit codes as they are in memory, or, where dot products take signed bytes, with the top bit flipped.
template <bool FLIP> struct Eight {
  static constexpr int bits = 8, bytes = 512;
  template <int Q> RQ_INLINE Bytes at(const uint8_t* unit, const Bytes* = nullptr) {
    const Bytes code = load_bytes(unit + 64 * Q);
    return FLIP ? code ^ splat_byte(128) : code;
  }
};

// What a table of bytes has for codes of up to 6 bits: 8 bits each.
template <int BITS> struct Looked {
  static constexpr int bits = 8, bytes = 64 * BITS;
  template <int Q> RQ_INLINE Bytes at(const uint8_t* unit, const Bytes* table) {
    const Bytes code = Coded<BITS>::template at<Q>(unit);
    if constexpr (BITS <= 4) return lookup16(table[0], code);
    else return lookup64(table, code);
  }
};

// All 8 vectors of a unit, for each unit, to `to`: the strip in 8 bits.
template <class Source, int Q> RQ_INLINE void unpack_from(const uint8_t* unit, const Bytes* table, uint8_t* to) {
  store_bytes(to + 64 * Q, Source::template at<Q>(unit, table));
  if constexpr (Q < 7) unpack_from<Source, Q + 1>(unit, table, to);
}
template <class Source> static void unpack_units(const uint8_t* from, int64_t units, const Bytes* table, uint8_t* to) {
  for (int64_t u = 0; u < units; ++u, from += Source::bytes, to += 512) unpack_from<Source, 0>(from, table, to);
}
#endif

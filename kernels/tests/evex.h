// Included first in the level "avxvnni", compiles it for AVX-512 VNNI: the same dot products, in the other encoding. Most processors
// have one or the other, and no emulator that is free has AVX-VNNI.
#include <immintrin.h>
#define __AVXVNNI__ 1
#define _mm256_dpbusd_avx_epi32 _mm256_dpbusd_epi32
#define _mm256_dpwssd_avx_epi32 _mm256_dpwssd_epi32

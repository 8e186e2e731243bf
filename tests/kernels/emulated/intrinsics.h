// AVX-512 and AMX in plain C++, so that the builds for them run, and can be tested, on a CPU with AVX2 alone.
//
// `.ci/emulate` includes this file before csrc/isa_*.cpp. It holds the intrinsics that csrc/ uses and no more; one that
// is missing does not compile. As in Intel's manual, products of bf16 take subnormal numbers as zero.
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#if defined(EMULATE_BF16)
#define __AVX512BF16__ 1
#endif
#if defined(EMULATE_AMX)
#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#endif

namespace emulated {

union Lanes {
  __m512 ps;
  __m512i si;
  __m512bh bh;
  __m256 halves[2];
  __m256i int_halves[2];
  float f32[16];
  uint64_t u64[8];
  uint32_t u32[16];
  uint16_t u16[32];
};
inline Lanes lanes(__m512 v) { Lanes l; l.ps = v; return l; }
inline Lanes lanes(__m512i v) { Lanes l; l.si = v; return l; }
inline Lanes lanes(__m512bh v) { Lanes l; l.bh = v; return l; }

template <class F>
inline __m512i each32(F f) {
  Lanes out;
  for (int i = 0; i < 16; ++i) out.u32[i] = f(i);
  return out.si;
}
template <class F>
inline __m512i each16(F f) {
  Lanes out;
  for (int i = 0; i < 32; ++i) out.u16[i] = f(i);
  return out.si;
}
template <class F>
inline __m512 each_float(F f) {
  Lanes out;
  for (int i = 0; i < 16; ++i) out.f32[i] = f(i);
  return out.ps;
}

// Loads, stores and casts.
inline __m512 loadu_ps(const void* p) { Lanes l; memcpy(&l, p, 64); return l.ps; }
inline __m512i loadu_si512(const void* p) { Lanes l; memcpy(&l, p, 64); return l.si; }
inline void storeu_ps(void* p, __m512 v) { memcpy(p, &v, 64); }
inline void storeu_si512(void* p, __m512i v) { memcpy(p, &v, 64); }
inline void whole_line(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 64) fprintf(stderr, "an aligned access of %p\n", p), abort();
}
inline __m512 load_ps(const void* p) { whole_line(p); return loadu_ps(p); }
inline __m512i load_si512(const void* p) { whole_line(p); return loadu_si512(p); }
inline void store_si512(void* p, __m512i v) { whole_line(p); storeu_si512(p, v); }
inline __m512 castsi512_ps(__m512i v) { return lanes(v).ps; }
inline __m512i castps_si512(__m512 v) { return lanes(v).si; }
inline __m256 castps512_ps256(__m512 v) { return lanes(v).halves[0]; }
inline __m256 extractf32x8_ps(__m512 v, int half) { return lanes(v).halves[half]; }
inline __m512i inserti64x4(__m512i v, __m256i half, int place) {
  Lanes l = lanes(v);
  l.int_halves[place] = half;
  return l.si;
}
inline __m512i broadcast_i64x4(__m256i v) { Lanes l; l.int_halves[0] = l.int_halves[1] = v; return l.si; }

// Constants.
inline __m512 setzero_ps() { return each_float([](int) { return 0.0f; }); }
inline __m512i setzero_si512() { return each32([](int) { return 0u; }); }
inline __m512 set1_ps(float v) { return each_float([=](int) { return v; }); }
inline __m512i set1_epi32(int v) { return each32([=](int) { return static_cast<uint32_t>(v); }); }
inline __m512i set1_epi16(short v) { return each16([=](int) { return static_cast<uint16_t>(v); }); }
template <class... I>
inline __m512i setr_epi32(I... values) {
  static_assert(sizeof...(values) == 16, "sixteen lanes");
  const int all[] = {values...};
  return loadu_si512(all);
}
template <class... I>
inline __m512i set_epi32(I... values) {
  static_assert(sizeof...(values) == 16, "sixteen lanes");
  const int all[] = {values...};
  return each32([&](int i) { return static_cast<uint32_t>(all[15 - i]); });
}

// Arithmetic.
inline __m512 add_ps(__m512 a, __m512 b) { return a + b; }
inline __m512 mul_ps(__m512 a, __m512 b) { return a * b; }
inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const Lanes x = lanes(a), y = lanes(b);
  Lanes z = lanes(c);
  for (int h = 0; h < 2; ++h) z.halves[h] = _mm256_fmadd_ps(x.halves[h], y.halves[h], z.halves[h]);
  return z.ps;
}
#define EMULATE_EACH32(name, expression)           \
  inline __m512i name(__m512i first, __m512i second) { \
    const Lanes x = lanes(first), y = lanes(second);   \
    return each32([&](int i) -> uint32_t {             \
      const uint32_t a = x.u32[i], b = y.u32[i];       \
      return expression;                               \
    });                                                \
  }
EMULATE_EACH32(add_epi32, a + b)
EMULATE_EACH32(mullo_epi32, a * b)
EMULATE_EACH32(and_si512, a & b)
EMULATE_EACH32(or_si512, a | b)
EMULATE_EACH32(xor_si512, a ^ b)
#undef EMULATE_EACH32
template <class F>
inline __m512i map32(__m512i v, F f) {
  const Lanes l = lanes(v);
  return each32([&](int i) { return f(l.u32[i]); });
}
inline __m512i slli_epi32(__m512i v, unsigned by) {
  return map32(v, [=](uint32_t lane) { return by < 32 ? lane << by : 0u; });
}
inline __m512i srli_epi32(__m512i v, unsigned by) {
  return map32(v, [=](uint32_t lane) { return by < 32 ? lane >> by : 0u; });
}
inline __m512i srli_epi16(__m512i v, unsigned by) {
  const Lanes l = lanes(v);
  return each16([&](int i) { return static_cast<uint16_t>(by < 16 ? l.u16[i] >> by : 0); });
}
inline __m512i ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
  const Lanes x = lanes(a), y = lanes(b), z = lanes(c);
  return each32([&](int i) {
    uint32_t out = 0;
    for (int row = 0; row < 8; ++row)
      if (table >> row & 1)
        out |= (row & 4 ? x.u32[i] : ~x.u32[i]) & (row & 2 ? y.u32[i] : ~y.u32[i]) & (row & 1 ? z.u32[i] : ~z.u32[i]);
    return out;
  });
}

// Conversions.
inline __m512i cvtepu8_epi32(__m128i v) {
  uint8_t b[16];
  memcpy(b, &v, 16);
  return each32([&](int i) { return static_cast<uint32_t>(b[i]); });
}
inline __m512i cvtepu8_epi16(__m256i v) {
  uint8_t b[32];
  memcpy(b, &v, 32);
  return each16([&](int i) { return static_cast<uint16_t>(b[i]); });
}
inline __m512i cvtepu16_epi32(__m256i v) {
  uint16_t b[16];
  memcpy(b, &v, 32);
  return each32([&](int i) { return static_cast<uint32_t>(b[i]); });
}
inline __m256i cvtepi32_epi16(__m512i v) {
  uint16_t out[16];
  const Lanes l = lanes(v);
  for (int i = 0; i < 16; ++i) out[i] = static_cast<uint16_t>(l.u32[i]);
  __m256i half;
  memcpy(&half, out, 32);
  return half;
}
inline __m512 cvtph_ps(__m256i v) {
  Lanes l;
  for (int h = 0; h < 2; ++h) l.halves[h] = _mm256_cvtph_ps(h ? _mm256_extracti128_si256(v, 1) : _mm256_castsi256_si128(v));
  return l.ps;
}
inline __m256i cvtps_ph(__m512 v, int) {  // to nearest even
  const Lanes l = lanes(v);
  return _mm256_set_m128i(_mm256_cvtps_ph(l.halves[1], 0), _mm256_cvtps_ph(l.halves[0], 0));
}

// Lanes moved.
inline __m512 permutexvar_ps(__m512i index, __m512 v) {
  const Lanes at = lanes(index), l = lanes(v);
  return each_float([&](int i) { return l.f32[at.u32[i] & 15]; });
}
inline __m512 permutex2var_ps(__m512 a, __m512i index, __m512 b) {
  const Lanes at = lanes(index), x = lanes(a), y = lanes(b);
  return each_float([&](int i) { return (at.u32[i] & 16 ? y : x).f32[at.u32[i] & 15]; });
}
inline __m512i permutexvar_epi16(__m512i index, __m512i v) {
  const Lanes at = lanes(index), l = lanes(v);
  return each16([&](int i) { return l.u16[at.u16[i] & 31]; });
}
inline __m512i shuffle_i32x4(__m512i a, __m512i b, int control) {
  const Lanes x = lanes(a), y = lanes(b);
  return each32([&](int i) { return (i < 8 ? x : y).u32[(control >> i / 4 * 2 & 3) * 4 + i % 4]; });
}
inline __m512i unpack32(__m512i a, __m512i b, int from) {
  const Lanes x = lanes(a), y = lanes(b);
  return each32([&](int i) { return (i % 2 ? y : x).u32[i / 4 * 4 + from + i % 4 / 2]; });
}
inline __m512i unpack64(__m512i a, __m512i b, int from) {
  const Lanes x = lanes(a), y = lanes(b);
  Lanes out;
  for (int i = 0; i < 8; ++i) out.u64[i] = (i % 2 ? y : x).u64[i / 2 * 2 + from];
  return out.si;
}
inline __m512i unpacklo_epi32(__m512i a, __m512i b) { return unpack32(a, b, 0); }
inline __m512i unpackhi_epi32(__m512i a, __m512i b) { return unpack32(a, b, 2); }
inline __m512i unpacklo_epi64(__m512i a, __m512i b) { return unpack64(a, b, 0); }
inline __m512i unpackhi_epi64(__m512i a, __m512i b) { return unpack64(a, b, 1); }
inline __m512 i32gather_ps(__m512i index, const float* base, int) {
  const Lanes at = lanes(index);
  return each_float([&](int i) { return base[static_cast<int32_t>(at.u32[i])]; });
}

// Masks: lanes that are off are neither read nor written.
inline __m512 maskz_loadu_ps(__mmask16 mask, const float* p) {
  return each_float([&](int i) { return mask >> i & 1 ? p[i] : 0.0f; });
}
inline __m512i maskz_loadu_epi16(__mmask32 mask, const void* p) {
  return each16([&](int i) { return mask >> i & 1 ? static_cast<const uint16_t*>(p)[i] : uint16_t{0}; });
}
inline __m256i half_maskz_loadu_epi16(__mmask16 mask, const void* p) {
  return lanes(maskz_loadu_epi16(mask, p)).int_halves[0];
}
inline void mask_storeu_ps(float* p, __mmask16 mask, __m512 v) {
  const Lanes l = lanes(v);
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) p[i] = l.f32[i];
}
inline void half_mask_storeu_epi16(void* p, __mmask16 mask, __m256i v) {
  uint16_t l[16];
  memcpy(l, &v, 32);
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) static_cast<uint16_t*>(p)[i] = l[i];
}
inline __m512i mask_mov_epi32(__m512i off, __mmask16 mask, __m512i on) {
  const Lanes x = lanes(off), y = lanes(on);
  return each32([&](int i) { return mask >> i & 1 ? y.u32[i] : x.u32[i]; });
}
inline __m512 maskz_mov_ps(__mmask16 mask, __m512 v) {
  return lanes(mask_mov_epi32(setzero_si512(), mask, castps_si512(v))).ps;
}
inline __mmask16 unordered(__m512 a, __m512 b) {
  const Lanes x = lanes(a), y = lanes(b);
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<unsigned>(x.f32[i] != x.f32[i] || y.f32[i] != y.f32[i]) << i;
  return static_cast<__mmask16>(mask);
}
template <int PREDICATE>
inline __mmask16 cmp_ps_mask(__m512 a, __m512 b) {
  static_assert(PREDICATE == _CMP_UNORD_Q, "the only one in use");
  return unordered(a, b);
}
inline __mmask16 cmpge_epu32_mask(__m512i a, __m512i b) {
  const Lanes x = lanes(a), y = lanes(b);
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<unsigned>(x.u32[i] >= y.u32[i]) << i;
  return static_cast<__mmask16>(mask);
}

// bf16.
inline float flushed(float v) { return fabsf(v) < 0x1p-126f ? copysignf(0.0f, v) : v; }
inline float widened(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float v;
  memcpy(&v, &wide, 4);
  return flushed(v);
}
inline uint16_t narrowed(float v) {  // to nearest even; NaN stays one
  v = flushed(v);
  uint32_t bits;
  memcpy(&bits, &v, 4);
  if (v != v) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float add_pair(float sum, const uint16_t* a, const uint16_t* b, int first) {
  sum = flushed(fmaf(widened(a[first]), widened(b[first]), sum));
  return flushed(fmaf(widened(a[1 - first]), widened(b[1 - first]), sum));
}
inline __m512bh cvtne2ps_pbh(__m512 high, __m512 low) {
  const Lanes x = lanes(low), y = lanes(high);
  Lanes out;
  for (int i = 0; i < 32; ++i) out.u16[i] = narrowed(i < 16 ? x.f32[i] : y.f32[i - 16]);
  return out.bh;
}
inline __m512 dpbf16_ps(__m512 sums, __m512bh a, __m512bh b) {
  const Lanes s = lanes(sums), x = lanes(a), y = lanes(b);
  return each_float([&](int i) { return add_pair(s.f32[i], x.u16 + 2 * i, y.u16 + 2 * i, 1); });
}

// The matrix unit: eight tiles of 16 rows and 64 bytes, one set per thread, to be configured before use.
struct Unit {
  bool on = false;
  uint16_t tiles[8][16][32];
};
inline thread_local Unit unit;
inline void configured() {
  if (!unit.on) fprintf(stderr, "a tile instruction without a configuration\n"), abort();
}
inline void tile_loadconfig(const void* config) {
  for (int i = 0; i < 8; ++i)  // palette, start row, 14 reserved bytes; bytes of a row, 16 bits; rows, 8 bits
    if (static_cast<const uint8_t*>(config)[16 + 2 * i] != 64 || static_cast<const uint8_t*>(config)[48 + i] != 16)
      fprintf(stderr, "tiles of another shape than 16 x 64 bytes\n"), abort();
  unit.on = true;
  memset(unit.tiles, 0, sizeof unit.tiles);
}
inline void tile_release() { unit.on = false; }
inline void tile_zero(int t) {
  configured();
  memset(unit.tiles[t], 0, sizeof unit.tiles[t]);
}
inline void tile_loadd(int t, const void* from, int64_t stride) {
  configured();
  for (int i = 0; i < 16; ++i) memcpy(unit.tiles[t][i], static_cast<const char*>(from) + i * stride, 64);
}
inline void tile_stored(int t, void* to, int64_t stride) {
  configured();
  for (int i = 0; i < 16; ++i) memcpy(static_cast<char*>(to) + i * stride, unit.tiles[t][i], 64);
}
// The products of even and of odd places are summed apart, from zero on, and the sum of both is added to the tile.
inline void tile_dpbf16ps(int t, int a, int b) {
  configured();
  float sums[16][16], wide_a[2][16][16], wide_b[2][16][16];  // [place][row][pair]
  memcpy(sums, unit.tiles[t], sizeof sums);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 32; ++j) {
      wide_a[j % 2][i][j / 2] = widened(unit.tiles[a][i][j]);
      wide_b[j % 2][i][j / 2] = widened(unit.tiles[b][i][j]);
    }
  for (int i = 0; i < 16; ++i) {
    float parts[2][16] = {};
    for (int k = 0; k < 16; ++k)
      for (int place = 0; place < 2; ++place)
        for (int j = 0; j < 16; ++j)
          parts[place][j] = flushed(fmaf(wide_a[place][i][k], wide_b[place][k][j], parts[place][j]));
    for (int j = 0; j < 16; ++j) sums[i][j] = flushed(sums[i][j] + flushed(parts[0][j] + parts[1][j]));
  }
  memcpy(unit.tiles[t], sums, sizeof sums);
}

}  // namespace emulated

#define _mm512_loadu_ps emulated::loadu_ps
#define _mm512_loadu_si512 emulated::loadu_si512
#define _mm512_storeu_ps emulated::storeu_ps
#define _mm512_storeu_si512 emulated::storeu_si512
#define _mm512_load_ps emulated::load_ps
#define _mm512_load_si512 emulated::load_si512
#define _mm512_store_si512 emulated::store_si512
#define _mm512_castsi512_ps emulated::castsi512_ps
#define _mm512_castps_si512 emulated::castps_si512
#define _mm512_castps512_ps256 emulated::castps512_ps256
#define _mm512_extractf32x8_ps emulated::extractf32x8_ps
#define _mm512_inserti64x4 emulated::inserti64x4
#define _mm512_broadcast_i64x4 emulated::broadcast_i64x4
#define _mm512_setzero_ps emulated::setzero_ps
#define _mm512_setzero_si512 emulated::setzero_si512
#define _mm512_set1_ps emulated::set1_ps
#define _mm512_set1_epi32 emulated::set1_epi32
#define _mm512_set1_epi16 emulated::set1_epi16
#define _mm512_setr_epi32 emulated::setr_epi32
#define _mm512_set_epi32 emulated::set_epi32
#define _mm512_add_ps emulated::add_ps
#define _mm512_mul_ps emulated::mul_ps
#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_add_epi32 emulated::add_epi32
#define _mm512_mullo_epi32 emulated::mullo_epi32
#define _mm512_and_si512 emulated::and_si512
#define _mm512_or_si512 emulated::or_si512
#define _mm512_xor_si512 emulated::xor_si512
#define _mm512_slli_epi32 emulated::slli_epi32
#define _mm512_srli_epi32 emulated::srli_epi32
#define _mm512_srli_epi16 emulated::srli_epi16
#define _mm512_ternarylogic_epi32 emulated::ternarylogic_epi32
#define _mm512_cvtepu8_epi32 emulated::cvtepu8_epi32
#define _mm512_cvtepu8_epi16 emulated::cvtepu8_epi16
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtps_ph emulated::cvtps_ph
#define _mm512_permutexvar_ps emulated::permutexvar_ps
#define _mm512_permutex2var_ps emulated::permutex2var_ps
#define _mm512_permutexvar_epi16 emulated::permutexvar_epi16
#define _mm512_shuffle_i32x4 emulated::shuffle_i32x4
#define _mm512_unpacklo_epi32 emulated::unpacklo_epi32
#define _mm512_unpackhi_epi32 emulated::unpackhi_epi32
#define _mm512_unpacklo_epi64 emulated::unpacklo_epi64
#define _mm512_unpackhi_epi64 emulated::unpackhi_epi64
#define _mm512_i32gather_ps emulated::i32gather_ps
#define _mm512_maskz_loadu_ps emulated::maskz_loadu_ps
#define _mm512_maskz_loadu_epi16 emulated::maskz_loadu_epi16
#define _mm256_maskz_loadu_epi16 emulated::half_maskz_loadu_epi16
#define _mm512_mask_storeu_ps emulated::mask_storeu_ps
#define _mm256_mask_storeu_epi16 emulated::half_mask_storeu_epi16
#define _mm512_mask_mov_epi32 emulated::mask_mov_epi32
#define _mm512_maskz_mov_ps emulated::maskz_mov_ps
#define _mm512_cmp_ps_mask(a, b, predicate) emulated::cmp_ps_mask<predicate>(a, b)
#define _mm512_cmpge_epu32_mask emulated::cmpge_epu32_mask
#define _mm512_cvtne2ps_pbh emulated::cvtne2ps_pbh
#define _mm512_dpbf16_ps emulated::dpbf16_ps
#define _tile_loadconfig emulated::tile_loadconfig
#define _tile_release emulated::tile_release
#define _tile_zero emulated::tile_zero
#define _tile_loadd emulated::tile_loadd
#define _tile_stored emulated::tile_stored
#define _tile_dpbf16ps emulated::tile_dpbf16ps

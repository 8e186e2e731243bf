// Dropout whose mask is a function of (seed, row, column), so it is recomputed wherever it is needed and never stored.
//
//   key(i) = mix(mix(low(i) ^ low(seed)) + high(seed) + high(i) * GOLDEN)
//   x[i, k] is kept when mix(key(i) + k * GOLDEN) >= floor(p 2^32), and is then to be multiplied by 1 / (1 - p)
//
// all modulo 2^32; mix is lowbias32 of Chris Wellons' hash prospector. kernels/fastlora_kernels/low_rank.py has the
// same function for tensors.
#include "weights.inl.h"

namespace fastlora {
namespace FASTLORA_ISA {

constexpr uint32_t GOLDEN = 0x9e3779b9u;

inline uint32_t mix(uint32_t h) {
  h ^= h >> 16;
  h *= 0x7feb352du;
  h ^= h >> 15;
  h *= 0x846ca68bu;
  return h ^ (h >> 16);
}

struct Dropout {
  bool on;
  uint32_t low, high, threshold;
  float scale;  // 1 / (1 - p)

  explicit Dropout(const fastlora_lora& lora) : on(lora.seed), low(0), high(0), threshold(0), scale(1.0f) {
    if (!on) return;
    const uint64_t seed = static_cast<uint64_t>(*lora.seed);
    low = static_cast<uint32_t>(seed);
    high = static_cast<uint32_t>(seed >> 32);
    threshold = static_cast<uint32_t>(lora.dropout * 4294967296.0);
    scale = static_cast<float>(1.0 / (1.0 - lora.dropout));
  }
  uint32_t key(int64_t row) const {
    const uint64_t i = static_cast<uint64_t>(row);
    return mix(mix(static_cast<uint32_t>(i) ^ low) + high + static_cast<uint32_t>(i >> 32) * GOLDEN);
  }
};

#if defined(__AVX512F__)
inline __m512i mix(__m512i h) {
  h = _mm512_xor_si512(h, _mm512_srli_epi32(h, 16));
  h = _mm512_mullo_epi32(h, _mm512_set1_epi32(0x7feb352d));
  h = _mm512_xor_si512(h, _mm512_srli_epi32(h, 15));
  h = _mm512_mullo_epi32(h, _mm512_set1_epi32(static_cast<int>(0x846ca68bu)));
  return _mm512_xor_si512(h, _mm512_srli_epi32(h, 16));
}
inline __mmask16 keep(const Dropout& d, uint32_t key, int64_t col) {
  const __m512i lane = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                          _mm512_set1_epi32(static_cast<int>(GOLDEN)));
  const __m512i first = _mm512_set1_epi32(static_cast<int>(key + static_cast<uint32_t>(col) * GOLDEN));
  return _mm512_cmpge_epu32_mask(mix(_mm512_add_epi32(lane, first)), _mm512_set1_epi32(static_cast<int>(d.threshold)));
}
// v, the VW values of a row from column `col` on, with those that are dropped at zero.
inline vf drop(const Dropout& d, uint32_t key, int64_t col, vf v) { return _mm512_maskz_mov_ps(keep(d, key, col), v); }
#else
inline vf drop(const Dropout& d, uint32_t key, int64_t col, vf v) {
  float lanes[VW];
  vstore(lanes, v);
  for (int i = 0; i < VW; ++i)
    if (mix(key + static_cast<uint32_t>(col + i) * GOLDEN) < d.threshold) lanes[i] = 0.0f;
  return vload(lanes);
}
#endif

// A row of `count` values from column `col` on, dropped out in place.
inline void drop_row(const Dropout& d, uint32_t key, int64_t col, int64_t count, float* row) {
  int64_t c = 0;
  for (; c + VW <= count; c += VW) vstore(row + c, drop(d, key, col + c, vload(row + c)));
  if (c < count) vstore_part(row + c, drop(d, key, col + c, vload_part(row + c, count - c)), count - c);
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora

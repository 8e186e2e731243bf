// The few vector operations the kernels are written in, for the instruction set the including file is compiled for.
// vf is VW floats. Multiply-adds are explicit: the library is built with -ffp-contract=off.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#include <float.h>

#include <type_traits>

#include "fastlora.h"

namespace fastlora {
namespace FASTLORA_ISA {

using bf16 = uint16_t;  // the upper half of a float

inline float to_float(float v) { return v; }
inline float to_float(bf16 v) {
  uint32_t bits = static_cast<uint32_t>(v) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
// Round to nearest even; a NaN stays a (quiet) NaN.
inline bf16 round_bf16(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16>((bits >> 16) | 0x40);
  return static_cast<bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
struct fp16 {
  uint16_t bits;
};

inline float to_float(fp16 v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16, magnitude = v.bits & 0x7fff;
  uint32_t bits = (magnitude << 13) + ((127 - 15) << 23);
  if (magnitude >= 0x7c00) bits += (127 - 15) << 23;  // infinity or NaN
  float f;
  memcpy(&f, &bits, 4);
  if (magnitude < 0x400) f = static_cast<float>(magnitude) * 0x1p-24f;  // subnormal
  memcpy(&bits, &f, 4);
  bits |= sign;
  memcpy(&f, &bits, 4);
  return f;
}

// Round to nearest even.
inline fp16 round_fp16(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00 | (magnitude >> 13 & 0x3ff);
  } else if (magnitude >= 0x477ff000) {  // from 65520 on
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves multiples of 2^-24 in the low bits
    float f;
    memcpy(&f, &magnitude, 4);
    f += 0.5f;
    memcpy(&half, &f, 4);
    half -= 0x3f000000;
  } else {
    half = (magnitude - ((127 - 15) << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  return fp16{static_cast<uint16_t>(sign | half)};
}

inline void store_scalar(float* p, float v) { *p = v; }
inline void store_scalar(fp16* p, float v) { *p = round_fp16(v); }
inline void store_scalar(bf16* p, float v) { *p = round_bf16(v); }

#if defined(__AVX512F__)
constexpr int VW = 16;
using vf = __m512;
inline vf vzero() { return _mm512_setzero_ps(); }
inline vf vset(float v) { return _mm512_set1_ps(v); }
inline vf vload(const float* p) { return _mm512_loadu_ps(p); }
inline vf vload(const bf16* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
inline vf vload(const fp16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline __m256i vhalf_bits(vf v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline void vstore(fp16* p, vf v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), vhalf_bits(v)); }
inline void vstore(float* p, vf v) { _mm512_storeu_ps(p, v); }
inline __m512i vround_bits(vf v) {  // bf16 bits in the low half of each lane
  __m512i bits = _mm512_castps_si512(v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff)), 16);
  __m512i nan = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  return _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), nan);
}
inline void vstore(bf16* p, vf v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(vround_bits(v)));
}
inline float vsum(vf v) {
  __m256 h = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
#elif defined(__AVX2__)
constexpr int VW = 8;
using vf = __m256;
inline vf vzero() { return _mm256_setzero_ps(); }
inline vf vset(float v) { return _mm256_set1_ps(v); }
inline vf vload(const float* p) { return _mm256_loadu_ps(p); }
inline vf vload(const bf16* p) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
inline vf vload(const fp16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline void vstore(fp16* p, vf v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void vstore(float* p, vf v) { _mm256_storeu_ps(p, v); }
inline __m256i vround_bits(vf v) {
  __m256i bits = _mm256_castps_si256(v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff)), 16);
  __m256i nan = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
  return _mm256_blendv_epi8(r, nan, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
}
inline void vstore(bf16* p, vf v) {
  __m256i r = vround_bits(v);
  __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
inline float vsum(vf v) {
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
#else
constexpr int VW = 4;
typedef float vf __attribute__((vector_size(16)));
inline vf vzero() { return vf{0, 0, 0, 0}; }
inline vf vset(float v) { return vf{v, v, v, v}; }
inline vf vload(const float* p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline vf vload(const bf16* p) { return vf{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
inline vf vload(const fp16* p) { return vf{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
inline vf vfma(vf a, vf b, vf c) { return a * b + c; }
inline void vstore(fp16* p, vf v) {
  for (int i = 0; i < VW; ++i) p[i] = round_fp16(v[i]);
}
inline void vstore(float* p, vf v) { memcpy(p, &v, sizeof v); }
inline void vstore(bf16* p, vf v) {
  for (int i = 0; i < VW; ++i) p[i] = round_bf16(v[i]);
}
inline float vsum(vf v) { return (v[0] + v[2]) + (v[1] + v[3]); }
#endif

// The first `count` lanes of a vector, the rest zero.
#if defined(__AVX512F__)
inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
inline vf vload_part(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(first_lanes(count), p); }
inline vf vload_part(const bf16* p, int64_t count) {
  const __m256i bits = _mm256_maskz_loadu_epi16(first_lanes(count), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline vf vload_part(const fp16* p, int64_t count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), p));
}
inline void vstore_part(fp16* p, vf v, int64_t count) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), vhalf_bits(v));
}
inline void vstore_part(float* p, vf v, int64_t count) { _mm512_mask_storeu_ps(p, first_lanes(count), v); }
inline void vstore_part(bf16* p, vf v, int64_t count) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), _mm512_cvtepi32_epi16(vround_bits(v)));
}
#else
template <class T>
inline vf vload_part(const T* p, int64_t count) {
  T lanes[VW] = {};
  memcpy(lanes, p, count * sizeof(T));
  return vload(lanes);
}
template <class T>
inline void vstore_part(T* p, vf v, int64_t count) {
  T lanes[VW];
  vstore(lanes, v);
  memcpy(p, lanes, count * sizeof(T));
}
#endif

template <class T>
inline constexpr bool is_bf16 = std::is_same<T, bf16>::value;
template <class T>
inline constexpr int32_t dtype_of = is_bf16<T> ? FASTLORA_BF16 : sizeof(T) == 2 ? FASTLORA_F16 : FASTLORA_F32;

// Call f with a pointer to values of `dtype`.
template <class F>
inline void as_type(int32_t dtype, const void* p, F f) {
  if (dtype == FASTLORA_F32)
    f(static_cast<const float*>(p));
  else if (dtype == FASTLORA_BF16)
    f(static_cast<const bf16*>(p));
  else
    f(static_cast<const fp16*>(p));
}

template <class Pointer>
using values_of = typename std::remove_const<typename std::remove_pointer<Pointer>::type>::type;

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t v, int64_t to) { return (v + to - 1) / to * to; }

}  // namespace FASTLORA_ISA
}  // namespace fastlora

// Reading a stored weight: spans of one row, decoded to float or bf16 in natural order.
//
// A 4-bit value is code[nibble] * absmax[block], computed in float and rounded once to the wanted type, so decoded
// weights equal bitsandbytes' bit for bit. The product is taken once per block for all 16 codes (a scaled table in
// registers); decoding a weight is then one permute.
#include "kernels.h"
#include "simd.inl.h"

namespace fastlora {
namespace FASTLORA_ISA {

inline float block_absmax(const fastlora_weight& w, int64_t block) {
  if (!w.nested_absmax) return static_cast<const float*>(w.absmax)[block];
  float scaled = w.nested_code[static_cast<const uint8_t*>(w.absmax)[block]] * w.nested_absmax[block >> 8];
  return scaled + *w.nested_offset;
}

// The magnitudes of `count` blocks from `block` on.
inline void block_absmaxes(const fastlora_weight& w, int64_t block, int64_t count, float* out) {
  int64_t i = 0;
#if defined(__AVX512F__)
  const uint8_t* codes = static_cast<const uint8_t*>(w.absmax) + block;
  const __m512 offset = _mm512_set1_ps(w.nested_absmax ? *w.nested_offset : 0.0f);
  for (; w.nested_absmax && i + 16 <= count && ((block + i) & 255) <= 240; i += 16) {
    const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
    const __m512 scale = _mm512_set1_ps(w.nested_absmax[(block + i) >> 8]);
    vstore(out + i, _mm512_add_ps(_mm512_mul_ps(_mm512_i32gather_ps(index, w.nested_code, 4), scale), offset));
  }
#endif
  while (w.nested_absmax && i < count) {  // those that share an outer magnitude
    const uint8_t* codes = static_cast<const uint8_t*>(w.absmax) + block;
    const float* code = w.nested_code;
    const float scale = w.nested_absmax[(block + i) >> 8], offset = *w.nested_offset;
    const int64_t stop = min64(count, ((block + i) | 255) + 1 - block);
    for (; i < stop; ++i) out[i] = code[codes[i]] * scale + offset;
  }
  for (; i < count; ++i) out[i] = block_absmax(w, block + i);
}

// The 16 codes of one block, scaled and rounded to the values that dtype `rounding` has, kept as floats.
struct Table {
#if defined(__AVX512F__)
  __m512 scaled;
  Table(const float* code, float absmax, int32_t rounding) {
    scaled = _mm512_mul_ps(_mm512_loadu_ps(code), _mm512_set1_ps(absmax));
    if (rounding == FASTLORA_F16) scaled = _mm512_cvtph_ps(vhalf_bits(scaled));
    if (rounding == FASTLORA_BF16) scaled = _mm512_castsi512_ps(_mm512_slli_epi32(vround_bits(scaled), 16));
  }
  void values(float* out) const { _mm512_storeu_ps(out, scaled); }
  // bf16 bits, the 16 entries twice: a 5-bit permute index then needs no mask.
  __m512i bf16_twice() const {
    __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(scaled), 16));
    return _mm512_broadcast_i64x4(half);
  }
#elif defined(__AVX2__)
  __m256 low, high;
  static __m256 rounded(__m256 v, int32_t rounding) {
    if (rounding == FASTLORA_F16) return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    if (rounding == FASTLORA_BF16) return _mm256_castsi256_ps(_mm256_slli_epi32(vround_bits(v), 16));
    return v;
  }
  Table(const float* code, float absmax, int32_t rounding) {
    const __m256 scale = _mm256_set1_ps(absmax);
    low = rounded(_mm256_mul_ps(_mm256_loadu_ps(code), scale), rounding);
    high = rounded(_mm256_mul_ps(_mm256_loadu_ps(code + 8), scale), rounding);
  }
  void values(float* out) const {
    _mm256_storeu_ps(out, low);
    _mm256_storeu_ps(out + 8, high);
  }
#else
  float scaled[16];
  Table(const float* code, float absmax, int32_t rounding) {
    for (int i = 0; i < 16; ++i) {
      float v = code[i] * absmax;
      scaled[i] = rounding == FASTLORA_BF16  ? to_float(round_bf16(v))
                  : rounding == FASTLORA_F16 ? to_float(round_fp16(v))
                                             : v;
    }
  }
  void values(float* out) const { memcpy(out, scaled, sizeof scaled); }
#endif
};

#if defined(__AVX512F__)
constexpr int UNIT = 32;  // weights decoded at a time
// 32 weights from 16 bytes: those at even positions, then those at odd ones.
inline void decode_split(const uint8_t* bytes, const Table& t, vf& even, vf& odd) {
  __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  even = _mm512_permutexvar_ps(_mm512_srli_epi32(b, 4), t.scaled);
  odd = _mm512_permutexvar_ps(b, t.scaled);  // the index is the low four bits
}
inline void decode_unit(const uint8_t* bytes, const Table& t, float* out) {
  vf even, odd;
  decode_split(bytes, t, even, odd);
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  vstore(out, _mm512_permutex2var_ps(even, low, odd));
  vstore(out + 16, _mm512_permutex2var_ps(even, high, odd));
}
inline void decode_unit(const uint8_t* bytes, const Table& t, bf16* out) {
  __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  __m512i index = _mm512_or_si512(_mm512_srli_epi32(b, 4), _mm512_slli_epi32(b, 16));
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, t.bf16_twice()));
}
#elif defined(__AVX2__)
constexpr int UNIT = 16;
inline vf lookup(__m256i index, const Table& t) {  // the low four bits of each lane
  vf low = _mm256_permutevar8x32_ps(t.low, index), high = _mm256_permutevar8x32_ps(t.high, index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
inline void decode_split(const uint8_t* bytes, const Table& t, vf& even, vf& odd) {
  __m256i b = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
  even = lookup(_mm256_srli_epi32(b, 4), t);
  odd = lookup(b, t);
}
template <class T>
inline void decode_unit(const uint8_t* bytes, const Table& t, T* out) {
  vf even, odd;
  decode_split(bytes, t, even, odd);
  vf low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
  vstore(out, _mm256_permute2f128_ps(low, high, 0x20));
  vstore(out + 8, _mm256_permute2f128_ps(low, high, 0x31));
}
#else
constexpr int UNIT = 2;
template <class T>
inline void decode_unit(const uint8_t* bytes, const Table& t, T* out) {
  store_scalar(out, t.scaled[*bytes >> 4]);
  store_scalar(out + 1, t.scaled[*bytes & 15]);
}
#endif

// Weights [first, last) of the flattened matrix, all in one block.
template <class T>
inline void decode_span(const uint8_t* packed, int64_t first, int64_t last, const Table& t, T* out) {
  int64_t i = first;
  if ((i & 1) == 0)
    for (; i + UNIT <= last; i += UNIT, out += UNIT) decode_unit(packed + i / 2, t, out);
  if (i == last) return;
  float values[16];
  t.values(values);
  for (; i < last; ++i) store_scalar(out++, values[(i & 1) ? packed[i / 2] & 15 : packed[i / 2] >> 4]);
}

template <class S, class T>
inline void copy_row(const S* in, int64_t count, T* out) {
  if constexpr (std::is_same<S, T>::value) {
    memcpy(out, in, count * sizeof(T));
  } else {
    int64_t j = 0;
    for (; j + VW <= count; j += VW) vstore(out + j, vload(in + j));
    if (j < count) vstore_part(out + j, vload_part(in + j, count - j), count - j);
  }
}

// W[row, col : col + count] to out; decoded values are rounded to dtype `rounding`.
template <class T>
inline void decode_row(const fastlora_weight& w, int64_t row, int64_t col, int64_t count, int32_t rounding, T* out) {
  int64_t i = row * w.k + col;
  const int64_t last = i + count;
  if (w.format == FASTLORA_4BIT) {
    while (i < last) {
      const int64_t block = i >> w.block_shift;
      const int64_t stop = min64(last, (block + 1) << w.block_shift);
      decode_span(static_cast<const uint8_t*>(w.data), i, stop, Table(w.code, block_absmax(w, block), rounding), out);
      out += stop - i;
      i = stop;
    }
  } else {
    as_type(w.dtype, w.data, [&](auto* values) { copy_row(values + i, count, out); });
  }
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora

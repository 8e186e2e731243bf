// Block-wise 4-bit quantisation and its inverse, bit-equal to formats/blockwise.py. Needs weights.inl.h before it.
//
// void quantize_4bit(int32_t dtype, int64_t n, const void* x, const float* thresholds, const uint8_t* order,
//                    int64_t blocksize, uint8_t* packed, float* absmax, int threads)
//   x: n >= 1 values of F32, BF16 or F16. thresholds: 15 floats, ascending. order: 16 nibbles; a scaled value becomes
//   order[number of thresholds below it]. blocksize: even. packed: (n + 1) / 2 bytes, high nibble first.
//   absmax: ceil(n / blocksize) floats; NaN or infinite where the block holds such a value.
//
// void dequantize_4bit(int32_t dtype, const fastlora_weight& w, void* out, int threads)
//   w: 4-bit. out: w.n * w.k values of F32, BF16 or F16.

namespace fastlora {
namespace FASTLORA_ISA {

constexpr int64_t FEW_VALUES = 1 << 15;  // below this a thread pool costs more than it saves
constexpr int GROUP = 64;                // values that are converted, scaled and packed at a time
inline void load_group(const float* x, int64_t count, float* out) { memcpy(out, x, count * sizeof(float)); }
inline void load_group(const bf16* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(x[i]);
}
inline void load_group(const fp16* x, int64_t count, float* out) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16)
    _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i))));
#elif defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
#endif
  for (; i < count; ++i) out[i] = to_float(x[i]);
}

inline void store_group(const float* values, int64_t count, fp16* out) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                        _mm512_cvtps_ph(_mm512_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < count; ++i) out[i] = round_fp16(values[i]);
}

// How scaled values become nibbles: each threshold below a value adds its step.
struct Rounding {
  float threshold[15];
  int32_t first, step[15];
  Rounding(const float* thresholds, const uint8_t* order) : first(order[0]) {
    for (int t = 0; t < 15; ++t) {
      threshold[t] = thresholds[t];
      step[t] = order[t + 1] - order[t];
    }
  }
  // GROUP scaled values to GROUP / 2 bytes.
  void pack(const float* scaled, uint8_t* out) const {
    int32_t nibble[GROUP];
    for (int i = 0; i < GROUP; ++i) nibble[i] = first;
    for (int t = 0; t < 15; ++t) {
      const float limit = threshold[t];
      const int32_t add = step[t];
      for (int i = 0; i < GROUP; ++i) nibble[i] += scaled[i] > limit ? add : 0;
    }
    for (int i = 0; i < GROUP / 2; ++i) out[i] = static_cast<uint8_t>(nibble[2 * i] << 4 | nibble[2 * i + 1]);
  }
};

// max |x|; NaN when there is one: as integers, magnitudes order like floats, and NaN comes last.
template <class T>
inline float largest(const T* x, int64_t count) {
  int32_t most = 0;
  for (int64_t start = 0; start < count; start += GROUP) {
    float values[GROUP];
    int32_t bits[GROUP];
    const int64_t here = min64(GROUP, count - start);
    load_group(x + start, here, values);
    memcpy(bits, values, here * sizeof(float));
    for (int64_t i = 0; i < here; ++i) {
      const int32_t magnitude = bits[i] & 0x7fffffff;
      most = magnitude > most ? magnitude : most;
    }
  }
  float f;
  memcpy(&f, &most, 4);
  return f;
}

// One block: a full one is multiplied by the inverse of its magnitude, a shorter one divided by it.
template <class T>
inline void quantize_block(const T* x, int64_t count, bool full, const Rounding& rounding, uint8_t* packed,
                           float* absmax) {
  constexpr float tiny = 1e-38f;
  const float most = largest(x, count), divisor = most < tiny ? tiny : most, inverse = 1.0f / divisor;
  *absmax = full ? most : divisor;
  for (int64_t start = 0; start < count; start += GROUP) {
    float values[GROUP] = {};
    uint8_t bytes[GROUP / 2];
    const int64_t here = min64(GROUP, count - start);
    load_group(x + start, here, values);
    for (int i = 0; i < GROUP; ++i) values[i] = full ? values[i] * inverse : values[i] / divisor;
    rounding.pack(values, bytes);
    memcpy(packed + start / 2, bytes, (here + 1) / 2);
  }
}

template <class T>
void quantize_all(const T* x, int64_t n, const Rounding& rounding, int64_t blocksize, uint8_t* packed, float* absmax,
                  int threads) {
  const int64_t blocks = (n + blocksize - 1) / blocksize;
#pragma omp parallel for num_threads(n < FEW_VALUES ? 1 : threads) schedule(static)
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = b * blocksize, count = min64(blocksize, n - first);
    quantize_block(x + first, count, count == blocksize, rounding, packed + first / 2, absmax + b);
  }
}

void quantize_4bit(int32_t dtype, int64_t n, const void* x, const float* thresholds, const uint8_t* order,
                   int64_t blocksize, uint8_t* packed, float* absmax, int threads) {
  const Rounding rounding(thresholds, order);
  if (dtype == FASTLORA_F32)
    quantize_all(static_cast<const float*>(x), n, rounding, blocksize, packed, absmax, threads);
  else if (dtype == FASTLORA_BF16)
    quantize_all(static_cast<const bf16*>(x), n, rounding, blocksize, packed, absmax, threads);
  else
    quantize_all(static_cast<const fp16*>(x), n, rounding, blocksize, packed, absmax, threads);
}

inline void dequantize_block(const uint8_t* packed, int64_t first, int64_t last, const Table& t, float* out) {
  decode_span(packed, first, last, t, out + first);
}
inline void dequantize_block(const uint8_t* packed, int64_t first, int64_t last, const Table& t, bf16* out) {
  decode_span(packed, first, last, t, out + first);
}
inline void dequantize_block(const uint8_t* packed, int64_t first, int64_t last, const Table& t, fp16* out) {
  float values[GROUP];
  for (int64_t i = first; i < last; i += GROUP) {
    const int64_t stop = min64(i + GROUP, last);
    decode_span(packed, i, stop, t, values);
    store_group(values, stop - i, out + i);
  }
}

template <class T>
void dequantize_all(const fastlora_weight& w, int32_t rounding, T* out, int threads) {
  const int64_t n = w.n * w.k, blocks = (n + (int64_t{1} << w.block_shift) - 1) >> w.block_shift;
#pragma omp parallel for num_threads(n < FEW_VALUES ? 1 : threads) schedule(static)
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = b << w.block_shift, last = min64(n, (b + 1) << w.block_shift);
    const Table table(w.code, block_absmax(w, b), rounding);
    dequantize_block(static_cast<const uint8_t*>(w.data), first, last, table, out);
  }
}

void dequantize_4bit(int32_t dtype, const fastlora_weight& w, void* out, int threads) {
  if (dtype == FASTLORA_F32)
    dequantize_all(w, FASTLORA_F32, static_cast<float*>(out), threads);
  else if (dtype == FASTLORA_BF16)
    dequantize_all(w, FASTLORA_BF16, static_cast<bf16*>(out), threads);
  else
    dequantize_all(w, FASTLORA_F32, static_cast<fp16*>(out), threads);
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora

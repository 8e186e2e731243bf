// Column scaling, the magnitude of DoRA: y = z * scale + bias over (m, n), and its gradients.
#include "group.inl.h"

namespace fastlora {
namespace FASTLORA_ISA {

constexpr int64_t STRIPE = 256;  // columns a thread takes at a time

template <class T>
inline void scale_row(const T* z, const float* scale, const float* bias, int64_t count, T* y) {
  int64_t c = 0;
  for (; c + VW <= count; c += VW) {
    const vf offset = bias ? vload(bias + c) : vzero();
    vstore(y + c, vfma(vload(z + c), vload(scale + c), offset));
  }
  if (c == count) return;
  const vf offset = bias ? vload_part(bias + c, count - c) : vzero();
  vstore_part(y + c, vfma(vload_part(z + c, count - c), vload_part(scale + c, count - c), offset), count - c);
}

template <class T>
void scale_columns(int64_t m, int64_t n, const T* z, const float* scale, const float* bias, T* y, int threads) {
#pragma omp parallel for num_threads(m * n < FEW_PRODUCTS ? 1 : threads) schedule(static)
  for (int64_t i = 0; i < m; ++i) scale_row(z + i * n, scale, bias, n, y + i * n);
}

// dz of one row, and its products dy * z added to `sums`.
template <class T>
inline void scale_row_backward(const T* dy, const T* z, const float* scale, int64_t count, T* dz, float* sums) {
  for (int64_t c = 0; c < count; c += VW) {
    const int64_t here = min64(VW, count - c);
    const bool whole = here == VW;
    const vf g = whole ? vload(dy + c) : vload_part(dy + c, here);
    if (sums) {
      const vf part = whole ? vload(z + c) : vload_part(z + c, here);
      const vf sum = vfma(g, part, whole ? vload(sums + c) : vload_part(sums + c, here));
      whole ? vstore(sums + c, sum) : vstore_part(sums + c, sum, here);
    }
    if (!dz) continue;
    const vf d = g * (whole ? vload(scale + c) : vload_part(scale + c, here));
    whole ? vstore(dz + c, d) : vstore_part(dz + c, d, here);
  }
}

// Sums of ROWS rows each are added up in order, so dscale does not depend on the number of threads.
template <class T>
void scale_columns_backward(int64_t m, int64_t n, const T* dy, int64_t lddy, const T* z, const float* scale, T* dz,
                            float* dscale, int threads) {
  constexpr int64_t ROWS = 32;
  const int64_t chunks = (m + ROWS - 1) / ROWS;
  float* sums = dscale ? static_cast<float*>(scratch(SCRATCH_SHARED, (chunks * n + 1) * sizeof(float))) : nullptr;
#pragma omp parallel num_threads(m * n < FEW_PRODUCTS ? 1 : threads)
  {
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      float* own = sums ? sums + chunk * n : nullptr;
      if (own) memset(own, 0, n * sizeof(float));
      for (int64_t i = chunk * ROWS; i < min64(m, chunk * ROWS + ROWS); ++i)
        scale_row_backward(dy + i * lddy, z ? z + i * n : nullptr, scale, n, dz ? dz + i * n : nullptr, own);
    }
#pragma omp for schedule(static)
    for (int64_t stripe = 0; stripe < (dscale ? n : 0); stripe += STRIPE) {
      const int64_t cols = min64(STRIPE, n - stripe);
      alignas(64) float total[STRIPE] = {};
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        for (int64_t c = 0; c < cols; ++c) total[c] += sums[chunk * n + stripe + c];
      memcpy(dscale + stripe, total, cols * sizeof(float));
    }
  }
}

// out (n) = row sums of squares of W.
template <class T>
void weight_squares(const fastlora_weight& w, float* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < w.n; ++row) {
    alignas(64) float values[CHUNK];
    double sum = 0;
    for (int64_t c = 0; c < w.k; c += CHUNK) {
      const int64_t count = min64(CHUNK, w.k - c);
      decode_row(w, row, c, count, dtype_of<T>, values);
      for (int64_t i = 0; i < count; i += 4 * VW) {  // short float sums: as exact as their one rounding allows
        float part;
        dots<1, 1>(values + i, 0, values + i, min64(4 * VW, count - i), 1.0f, &part, 1);
        sum += part;
      }
    }
    out[row] = static_cast<float>(sum);
  }
}

// ---- by dtype ----

void weight_squares(int32_t dtype, const fastlora_weight& w, float* out, int threads) {
  as_type(dtype, nullptr, [&](auto* p) { weight_squares<values_of<decltype(p)>>(w, out, threads); });
}

void scale_columns(int32_t dtype, int64_t m, int64_t n, const void* z, const float* scale, const float* bias, void* y,
                   int threads) {
  as_type(dtype, z, [&](auto* values) {
    scale_columns(m, n, values, scale, bias, static_cast<values_of<decltype(values)>*>(y), threads);
  });
}

void scale_columns_backward(int32_t dtype, int64_t m, int64_t n, const void* dy, int64_t lddy, const void* z,
                            const float* scale, void* dz, float* dscale, int threads) {
  as_type(dtype, dy, [&](auto* values) {
    using T = values_of<decltype(values)>;
    scale_columns_backward(m, n, values, lddy, static_cast<const T*>(z), scale, static_cast<T*>(dz), dscale, threads);
  });
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora

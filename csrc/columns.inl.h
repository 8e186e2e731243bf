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

// dz and dscale of one stripe of columns: sums over rows in a fixed order, a few rows at a time in float.
template <class T>
inline void scale_stripe_backward(int64_t m, int64_t n, const T* dy, int64_t lddy, const T* z, const float* scale,
                                  T* dz, float* dscale, int64_t count) {
  constexpr int64_t RUN = 32;
  alignas(64) float total[STRIPE] = {};
  for (int64_t run = 0; run < m; run += RUN)
    for (int64_t c = 0; c < count; c += VW) {
      const int64_t left = count - c;
      const vf factor = left >= VW ? vload(scale + c) : vload_part(scale + c, left);
      vf sum = vzero();
      for (int64_t i = run; i < min64(run + RUN, m); ++i) {
        const T* g = dy + i * lddy + c;
        const vf gv = left >= VW ? vload(g) : vload_part(g, left);
        if (dscale) sum = vfma(gv, left >= VW ? vload(z + i * n + c) : vload_part(z + i * n + c, left), sum);
        if (dz && left >= VW)
          vstore(dz + i * n + c, gv * factor);
        else if (dz)
          vstore_part(dz + i * n + c, gv * factor, left);
      }
      vstore(total + c, vload(total + c) + sum);
    }
  if (dscale) memcpy(dscale, total, count * sizeof(float));
}

template <class T>
void scale_columns_backward(int64_t m, int64_t n, const T* dy, int64_t lddy, const T* z, const float* scale, T* dz,
                            float* dscale, int threads) {
#pragma omp parallel for num_threads(m * n < FEW_PRODUCTS ? 1 : threads) schedule(static)
  for (int64_t c = 0; c < n; c += STRIPE)
    scale_stripe_backward(m, n, dy + c, lddy, z ? z + c : nullptr, scale + c, dz ? dz + c : nullptr,
                          dscale ? dscale + c : nullptr, min64(STRIPE, n - c));
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
      float part;
      dots<1, 1>(values, 0, values, count, 1.0f, &part, 1);
      sum += part;
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

// Layers that are fed the same x (q, k and v; gate and up): S in one pass over x, dA in one pass over x, and dx
// summed over all layers in float before its one rounding.
#include "lora_linear.inl.h"

namespace fastlora {
namespace FASTLORA_ISA {

// The layers' adapters as one of all their ranks: A (sum of r, k), without B.
struct Stacked {
  fastlora_lora lora = {};

  Stacked(int count, const fastlora_lora* layers, int64_t k) {
    for (int i = 0; i < count; ++i) {
      lora.r += layers[i].r;
      if (layers[i].r) lora.dtype = layers[i].dtype;
    }
    const int64_t row = k * (lora.dtype == FASTLORA_F32 ? 4 : 2);  // bytes
    auto* a = static_cast<char*>(scratch(SCRATCH_STACKED, lora.r * row));
    lora.a = a;
    for (int i = 0; i < count; ++i) {
      memcpy(a, layers[i].a, layers[i].r * row);
      a += layers[i].r * row;
    }
  }
};

// Columns [rank, rank + r) of a matrix of `width` columns, from or to (m, r).
inline void copy_columns(int64_t m, float* wide, int64_t width, int64_t rank, float* narrow, int64_t r, bool gather) {
  for (int64_t i = 0; i < m; ++i) {
    float* part = wide + i * width + rank;
    memcpy(gather ? part : narrow + i * r, gather ? narrow + i * r : part, r * sizeof(float));
  }
}

template <class T>
void group_forward(int64_t m, const T* x, int64_t ldx, int count, const fastlora_weight* w, const float* const* bias,
                   const fastlora_lora* lora, float* const* s, void* const* y, int threads) {
  const int64_t k = w->k;
  const Stacked all(count, lora, k);
  const Rows rows(all.lora, m);
  auto* sums = static_cast<float*>(scratch(SCRATCH_GROUP, m * all.lora.r * sizeof(float)));
  if (all.lora.r)
    as_type(all.lora.dtype, all.lora.a,
            [&](auto* a) { project_x(m, x, ldx, k, a, all.lora, rows, sums, threads); });
  int64_t rank = 0;
  for (int i = 0; i < count; rank += lora[i++].r) {
    copy_columns(m, sums, all.lora.r, rank, s[i], lora[i].r, false);
    apply(m, x, ldx, w[i], bias[i], lora[i], Rows(lora[i], m), s[i], static_cast<T*>(y[i]), threads);
  }
}

template <class T, class L>
void group_backward(int64_t m, int count, const void* const* dy, const int64_t* lddy, const T* x, int64_t ldx,
                    const float* const* s, const fastlora_weight* w, const fastlora_lora* lora, T* dx, L* da,
                    void* const* db, int threads) {
  const Stacked all(count, lora, w->k);
  const int64_t r = all.lora.r;
  const Rows rows(all.lora, m);
  const Dropout none(all.lora);
  auto* ds = static_cast<float*>(scratch(SCRATCH_GROUP, 2 * m * r * sizeof(float)));
  std::vector<Part<T>> parts;
  int64_t rank = 0;
  for (int i = 0; i < count; rank += lora[i++].r) {
    const T* grad = static_cast<const T*>(dy[i]);
    const Rows own(lora[i], m);
    parts.push_back({grad, lddy[i], w + i});
    if (!lora[i].r) continue;
    project_dy<T, L>(m, grad, lddy[i], w[i].n, lora[i], own, ds + m * r, threads);
    copy_columns(m, ds, r, rank, ds + m * r, lora[i].r, true);
    if (db[i])
      outer(s[i], grad, lddy[i], m, own, lora[i].r, w[i].n, lora[i].scaling, none, true, static_cast<L*>(db[i]),
            threads);
  }
  if (dx)
    input_gradient<L>(Gemm<T, T>{parts.data(), count, m, true, all.lora, rows, ds, nullptr, nullptr, dx, threads});
  if (da) outer(ds, x, ldx, m, rows, r, w->k, 1.0f, none, false, da, threads);
}

void lora_group(int32_t dtype, int64_t m, const void* x, int64_t ldx, int count, const fastlora_weight* w,
                const float* const* bias, const fastlora_lora* lora, float* const* s, void* const* y, int threads) {
  as_type(dtype, x, [&](auto* rows) { group_forward(m, rows, ldx, count, w, bias, lora, s, y, threads); });
}

void lora_group_backward(int32_t dtype, int64_t m, int count, const void* const* dy, const int64_t* lddy,
                         const void* x, int64_t ldx, const float* const* s, const fastlora_weight* w,
                         const fastlora_lora* lora, void* dx, void* da, void* const* db, int threads) {
  int32_t adapter = FASTLORA_F32;
  for (int i = 0; i < count; ++i)
    if (lora[i].r) adapter = lora[i].dtype;
  as_type(dtype, x, [&](auto* rows) {
    using T = values_of<decltype(rows)>;
    as_type(adapter, nullptr, [&](auto* p) {
      using L = values_of<decltype(p)>;
      group_backward<T, L>(m, count, dy, lddy, rows, ldx, s, w, lora, static_cast<T*>(dx), static_cast<L*>(da), db,
                           threads);
    });
  });
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora

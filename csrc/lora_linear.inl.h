// The fused LoRA linear, forward and backward, for one instruction set (FASTLORA_ISA, set by the including file).
#include "gemv.inl.h"

namespace fastlora {
namespace FASTLORA_ISA {

template <class T>
void forward(int64_t m, const T* x, int64_t ldx, const fastlora_weight& w, const float* bias,
             const fastlora_lora& lora, float* s, T* y, int threads) {
  if (lora.r && lora.dtype == FASTLORA_F32) {
    project(x, ldx, m, static_cast<const float*>(lora.a), lora.r, w.k, 1.0f, s, threads);
  } else if (lora.r && m <= FEW_TOKENS) {
    project(x, ldx, m, static_cast<const bf16*>(lora.a), lora.r, w.k, 1.0f, s, threads);
  } else if (lora.r) {  // worth widening once
    auto* wide = static_cast<float*>(scratch(SCRATCH_SHARED, lora.r * w.k * sizeof(float)));
    widen(static_cast<const bf16*>(lora.a), lora.r, w.k, wide);
    project(x, ldx, m, wide, lora.r, w.k, 1.0f, s, threads);
  }
  if (few_tokens<T>(w, m))
    gemv(Gemv<T>{x, ldx, m, w, bias, lora, s, y, threads});
  else
    panel_gemm(Gemm<T>{x, ldx, m, w, false, lora, s, bias, y, threads});
}

template <class T, class L>
void backward(int64_t m, const T* dy, int64_t lddy, const T* x, int64_t ldx, const float* s, const fastlora_weight& w,
              const fastlora_lora& lora, T* dx, L* da, L* db, int threads) {
  const int64_t r = lora.r;
  float* ds = nullptr;
  if (r && (dx || da)) {
    auto* shared = static_cast<float*>(scratch(SCRATCH_SHARED, (w.n + m) * r * sizeof(float)));
    ds = shared + w.n * r;
    widen_transposed(static_cast<const L*>(lora.b), w.n, r, shared, threads);
    project(dy, lddy, m, shared, r, w.n, lora.scaling, ds, threads);
  }
  if (dx) panel_gemm(Gemm<T>{dy, lddy, m, w, true, lora, ds, nullptr, dx, threads});
  if (da) accumulate_outer(ds, r, x, ldx, m, w.k, 1.0f, false, da, threads);
  if (db) accumulate_outer(s, r, dy, lddy, m, w.n, lora.scaling, true, db, threads);
}

void lora_linear(int32_t dtype, int64_t m, const void* x, int64_t ldx, const fastlora_weight& w, const float* bias,
                 const fastlora_lora& lora, float* s, void* y, int threads) {
  if (dtype == FASTLORA_F32)
    forward(m, static_cast<const float*>(x), ldx, w, bias, lora, s, static_cast<float*>(y), threads);
  else
    forward(m, static_cast<const bf16*>(x), ldx, w, bias, lora, s, static_cast<bf16*>(y), threads);
}

template <class T>
void backward_any(int64_t m, const void* dy, int64_t lddy, const void* x, int64_t ldx, const float* s,
                  const fastlora_weight& w, const fastlora_lora& lora, void* dx, void* da, void* db, int threads) {
  const T *dy_t = static_cast<const T*>(dy), *x_t = static_cast<const T*>(x);
  T* dx_t = static_cast<T*>(dx);
  if (lora.dtype == FASTLORA_F32)
    backward(m, dy_t, lddy, x_t, ldx, s, w, lora, dx_t, static_cast<float*>(da), static_cast<float*>(db), threads);
  else
    backward(m, dy_t, lddy, x_t, ldx, s, w, lora, dx_t, static_cast<bf16*>(da), static_cast<bf16*>(db), threads);
}

void lora_linear_backward(int32_t dtype, int64_t m, const void* dy, int64_t lddy, const void* x, int64_t ldx,
                          const float* s, const fastlora_weight& w, const fastlora_lora& lora, void* dx, void* da,
                          void* db, int threads) {
  if (dtype == FASTLORA_F32)
    backward_any<float>(m, dy, lddy, x, ldx, s, w, lora, dx, da, db, threads);
  else
    backward_any<bf16>(m, dy, lddy, x, ldx, s, w, lora, dx, da, db, threads);
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora

// The fused LoRA linear, forward and backward, for one instruction set (FASTLORA_ISA, set by the including file).
#include "gemv.inl.h"

namespace fastlora {
namespace FASTLORA_ISA {

#if defined(__AMX_BF16__)
template <class T>
inline bool on_tiles(int64_t m) {
  return is_bf16<T> && m >= TILE_TOKENS;
}

// out (m, r) = scale * drop(x) narrow, with A (r, k) `by_rank` or B (n, r).
template <class L>
inline void project_all(const bf16* x, int64_t ldx, const Rows& rows, const L* matrix, int64_t r,
                        int64_t length, bool by_rank, float scale, const Dropout& dropout, float* out, int threads) {
  const int pieces = sizeof(L) == 4 ? 3 : 1;
  const std::vector<Narrow> all = narrow(rows, matrix, r, length, by_rank, false, pieces, SCRATCH_SPLIT, threads);
  project_tiles({x, ldx, length, rows, all, by_rank, pieces, r, scale, dropout, out}, rows.m, threads);
}

// The gemm whose epilogue multiplies S with the second factor on the matrix unit.
template <class L, class O>
inline void gemm_tiles(Gemm<bf16, O> g, const L* factor, float scale, int threads) {
  const int pieces = sizeof(L) == 4 ? 3 : 1;
  const int64_t r = g.lora.r;
  if (pieces == 3 && !(all_finite(g.s, g.m * r) && all_finite(factor, r * g.columns()))) return panel_gemm(g);
  const std::vector<Narrow> all = narrow(g.rows, factor, r, g.columns(), g.backward, true, pieces, SCRATCH_SPLIT, threads);
  int64_t widest = 0;
  for (const Narrow& span : all) widest = span.width > widest ? span.width : widest;
  const int64_t lds = round_up(widest, 32);
  auto* s = static_cast<bf16*>(scratch(SCRATCH_OPERAND, (g.m + 32) * lds * sizeof(bf16)));
  tile_rows_of(g.rows, g.s, g.m, r, scale, pieces, s, lds, threads);
  const TileTerm term{s, lds, all};
  g.tiles = &term;
  panel_gemm(g);
}
#endif

// s (m, r) = drop(x) A^T, zero outside the spans.
template <class T, class L>
void project_x(int64_t m, const T* x, int64_t ldx, int64_t k, const L* a, const fastlora_lora& lora,
               const Rows& rows, float* s, int threads) {
  const Dropout dropout(lora);
  if (lora.spans) memset(s, 0, m * lora.r * sizeof(float));
#if defined(__AMX_BF16__)
  if constexpr (is_bf16<T>)
    if (on_tiles<T>(m)) {
      project_all(x, ldx, rows, a, lora.r, k, true, 1.0f, dropout, s, threads);
      if (!std::is_same<L, float>::value || all_finite(s, m * lora.r)) return;
    }
#endif
  if (sizeof(L) == 4 || m <= FEW_TOKENS) {
    for (const Span& g : rows.spans) project(x, ldx, rows, g, a, lora.r, k, 1.0f, dropout, s, threads);
    return;
  }
  auto* wide = static_cast<float*>(scratch(SCRATCH_SHARED, lora.r * k * sizeof(float)));  // widened once
  widen(a, lora.r, k, wide);
  for (const Span& g : rows.spans) project(x, ldx, rows, g, wide, lora.r, k, 1.0f, dropout, s, threads);
}

// A forward gemm, the low-rank term on the matrix unit where there is one.
template <class T>
void apply_panels(const Gemm<T, T>& g) {
#if defined(__AMX_BF16__)
  if constexpr (is_bf16<T>)
    if (g.lora.r && on_tiles<T>(g.m))
      return as_type(g.lora.dtype, g.lora.b, [&](auto* b) { gemm_tiles(g, b, g.lora.scaling, g.threads); });
#endif
  panel_gemm(g);
}

// y = x W^T + bias + scaling s B^T, for an s that is there.
template <class T>
void apply(int64_t m, const T* x, int64_t ldx, const fastlora_weight& w, const float* bias, const fastlora_lora& lora,
           const Rows& rows, const float* s, T* y, int threads) {
  if (few_tokens<T>(w, lora, m)) return gemv(Gemv<T>{x, ldx, m, w, bias, lora, s, y, threads});
  const Part<T> part{x, ldx, &w};
  apply_panels(Gemm<T, T>{&part, 1, m, false, lora, rows, s, nullptr, bias, y, threads});
}

template <class T>
void forward(int64_t m, const T* x, int64_t ldx, const fastlora_weight& w, const float* bias,
             const fastlora_lora& lora, float* s, T* y, int threads) {
  const Rows rows(lora, m);
  if (lora.r)
    as_type(lora.dtype, lora.a, [&](auto* a) { project_x(m, x, ldx, w.k, a, lora, rows, s, threads); });
  apply(m, x, ldx, w, bias, lora, rows, s, y, threads);
}

// out (length, columns) = s^T drop(x).
template <class T, class L>
void outer(const float* s, const T* x, int64_t ldx, int64_t m, const Rows& rows, int64_t r, int64_t columns,
           float scale, const Dropout& dropout, bool transposed, L* out, int threads) {
#if defined(__AMX_BF16__)
  if constexpr (is_bf16<T>)
    if (on_tiles<T>(m)) {
      outer_tiles(s, r, x, ldx, rows, columns, scale, sizeof(L) == 4 ? 3 : 1, dropout, transposed, out, threads);
      if (all_finite(out, r * columns)) return;
    }
#endif
  (void)m;
  accumulate_outer(s, r, x, ldx, rows, columns, scale, dropout, transposed, out, threads);
}

// ds (m, r) = scaling dy B, zero outside the spans.
template <class T, class L>
void project_dy(int64_t m, const T* dy, int64_t lddy, int64_t n, const fastlora_lora& lora, const Rows& rows,
                float* ds, int threads) {
  fastlora_lora plain = lora;
  plain.seed = nullptr;
  const Dropout none(plain);
  const L* b = static_cast<const L*>(lora.b);
  if (lora.spans) memset(ds, 0, m * lora.r * sizeof(float));
#if defined(__AMX_BF16__)
  if constexpr (is_bf16<T>)
    if (on_tiles<T>(m)) {
      project_all(dy, lddy, rows, b, lora.r, n, false, lora.scaling, none, ds, threads);
      if (!std::is_same<L, float>::value || all_finite(ds, m * lora.r)) return;
    }
#endif
  auto* across = static_cast<float*>(scratch(SCRATCH_SPLIT, n * lora.r * sizeof(float)));
  widen_transposed(b, n, lora.r, across, threads);
  for (const Span& g : rows.spans) project(dy, lddy, rows, g, across, lora.r, n, lora.scaling, none, ds, threads);
}

// dx = dy W + drop(ds A)
template <class L, class T>
void input_gradient(const Gemm<T, T>& g) {
#if defined(__AMX_BF16__)
  if constexpr (is_bf16<T>)
    if (g.lora.r && on_tiles<T>(g.m)) return gemm_tiles(g, static_cast<const L*>(g.lora.a), 1.0f, g.threads);
#endif
  panel_gemm(g);
}

template <class T, class L>
void backward(int64_t m, const T* dy, int64_t lddy, const T* x, int64_t ldx, const float* s, const fastlora_weight& w,
              const fastlora_lora& lora, T* dx, L* da, L* db, int threads) {
  const Rows rows(lora, m);
  const int64_t r = lora.r;
  const Dropout dropout(lora);
  float* ds = nullptr;
  if (r && (dx || da)) {
    ds = static_cast<float*>(scratch(SCRATCH_SHARED, m * r * sizeof(float)));
    project_dy<T, L>(m, dy, lddy, w.n, lora, rows, ds, threads);
  }
  const Part<T> part{dy, lddy, &w};
  if (dx) input_gradient<L>(Gemm<T, T>{&part, 1, m, true, lora, rows, ds, nullptr, nullptr, dx, threads});
  fastlora_lora plain = lora;
  plain.seed = nullptr;
  if (da) outer(ds, x, ldx, m, rows, r, w.k, 1.0f, dropout, false, da, threads);
  if (db) outer(s, dy, lddy, m, rows, r, w.n, lora.scaling, Dropout(plain), true, db, threads);
}

void lora_linear(int32_t dtype, int64_t m, const void* x, int64_t ldx, const fastlora_weight& w, const float* bias,
                 const fastlora_lora& lora, float* s, void* y, int threads) {
  as_type(dtype, x, [&](auto* rows) {
    forward(m, rows, ldx, w, bias, lora, s, static_cast<values_of<decltype(rows)>*>(y), threads);
  });
}

void lora_linear_backward(int32_t dtype, int64_t m, const void* dy, int64_t lddy, const void* x, int64_t ldx,
                          const float* s, const fastlora_weight& w, const fastlora_lora& lora, void* dx, void* da,
                          void* db, int threads) {
  as_type(dtype, dy, [&](auto* rows) {
    using T = values_of<decltype(rows)>;
    as_type(lora.dtype, nullptr, [&](auto* p) {
      using L = values_of<decltype(p)>;
      backward(m, rows, lddy, static_cast<const T*>(x), ldx, s, w, lora, static_cast<T*>(dx), static_cast<L*>(da),
               static_cast<L*>(db), threads);
    });
  });
}

// out (m, n) = x (m, k) W^T in float, W decoded to T.
template <class T, class X>
void dots_with(int64_t m, const X* x, const fastlora_weight& w, float* out, int threads) {
  const fastlora_lora none = {};
#if defined(FASTLORA_BF16_DOT)
  constexpr int pieces = is_bf16<T> && sizeof(X) == 4 ? 3 : 1;
#else
  constexpr int pieces = 1;
#endif
  const Rows rows(none, pieces * m);
  if constexpr (pieces == 1 && std::is_same<T, X>::value) {
    const Part<T> part{x, w.k, &w};
    panel_gemm(Gemm<T, float>{&part, 1, m, false, none, rows, nullptr, nullptr, nullptr, out, threads});
  } else if constexpr (pieces == 1) {  // float sums; the weight's values are those of T
    const Part<X> part{x, w.k, &w};
    Gemm<X, float> g{&part, 1, m, false, none, rows, nullptr, nullptr, nullptr, out, threads};
    g.rounding = dtype_of<T>;
    panel_gemm(g);
  } else {
#if defined(FASTLORA_BF16_DOT)
    auto* split = static_cast<bf16*>(scratch(SCRATCH_SPLIT, pieces * m * w.k * sizeof(bf16)));
    auto* sums = static_cast<float*>(scratch(SCRATCH_SHARED, pieces * m * w.n * sizeof(float)));
    split_rows(x, w.k, m, w.k, 1.0f, pieces, split, w.k, m * w.k, threads);
    const Part<bf16> part{split, w.k, &w};
    panel_gemm(Gemm<bf16, float>{&part, 1, pieces * m, false, none, rows, nullptr, nullptr, nullptr, sums, threads});
    for (int64_t i = 0; i < m * w.n; ++i) out[i] = sums[i] + (sums[m * w.n + i] + sums[2 * m * w.n + i]);
#endif
  }
}

void weight_dots(int32_t dtype, int32_t x_dtype, int64_t m, const void* x, const fastlora_weight& w, float* out,
                 int threads) {
  as_type(dtype, nullptr, [&](auto* p) {
    using T = values_of<decltype(p)>;
    if (x_dtype == FASTLORA_F32)
      dots_with<T>(m, static_cast<const float*>(x), w, out, threads);
    else
      dots_with<T>(m, static_cast<const T*>(x), w, out, threads);
  });
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora

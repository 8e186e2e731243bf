// DoRA: norms of the rows of W + scaling B A, and the linear that is scaled by magnitude / norm.
#include "products.inl.h"

namespace fastlora {
namespace FASTLORA_ISA {

// Up to VW rows from `first` on: sqrt(squares + 2 scaling <dots, B> + scaling^2 <B gram, B>), row by row; `across` (r,
// VW) are the dots of these rows, B (n, r), gram (r, r).
template <class T>
inline void few_norms(int64_t first, int64_t rows, int64_t r, const float* squares, const float* across, const T* b,
                      const float* gram, float scaling, float* out) {
  for (int64_t q = 0; q < rows; ++q) {
    const T* ranks = b + (first + q) * r;
    float cross = 0, own = 0;
    for (int64_t i = 0; i < r; ++i) cross += to_float(ranks[i]) * across[i * VW + q];
    for (int64_t j = 0; j < r; j += VW) {
      const int64_t count = min64(VW, r - j);
      vf sum = vzero();
      for (int64_t i = 0; i < r; ++i) sum = vfma(vset(to_float(ranks[i])), vload_part(gram + i * r + j, count), sum);
      own += vsum(sum * vload_part(ranks + j, count));
    }
    const double s = scaling, total = squares[first + q] + 2 * s * cross + s * s * own;
    out[first + q] = static_cast<float>(__builtin_sqrt(total < 0 ? 0 : total));
  }
}

template <class T>
void row_norms(int64_t n, int64_t r, const float* squares, const float* dot, const T* b, const float* gram,
               float scaling, float* out, int threads) {
#pragma omp parallel for num_threads(n * r * r < FEW_PRODUCTS ? 1 : threads) schedule(static)
  for (int64_t first = 0; first < n; first += VW) {
    const int64_t rows = min64(VW, n - first);
    auto* across = static_cast<float*>(scratch(SCRATCH_LOW_RANK, r * VW * sizeof(float)));
    for (int64_t i = 0; i < r; ++i) vstore(across + i * VW, vload_part(dot + i * n + first, rows));
    few_norms(first, rows, r, squares, across, b, gram, scaling, out);
  }
}

// gram (r, r) = A A^T.
template <class L>
inline void gram_of(const L* a, int64_t r, int64_t k, float* gram, int threads) {
#pragma omp parallel for num_threads(r * r * k < FEW_PRODUCTS ? 1 : threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      float sum;
      dots<1, 1>(a + i * k, 0, a + j * k, k, 1.0f, &sum, 1);
      gram[i * r + j] = gram[j * r + i] = sum;
    }
}

// The operands of the norms.
template <class L>
struct Magnitude {
  int64_t n, r;
  const L* b;
  float scaling;
  const float *gram, *squares, *magnitude;
  float* norms;
};

// The factors magnitude / norm. Rows of A pass over each panel before those of x: W A^T costs no decoding of its own.
template <class X, class L>
struct MagnitudeFactors : Factors {
  const Gemm<X, float>& dots;  // A, in `pieces` that are added up, times W^T
  int pieces;
  const Magnitude<L>& of;

  MagnitudeFactors(const Gemm<X, float>& dots, int pieces, const Magnitude<L>& of) : dots(dots), pieces(pieces), of(of) {}

  void take(const void* panel, void* rows, int64_t red, int64_t depth, const Step& step, int64_t col, int64_t cols,
            float* factors) const override {
    using Compute = compute_of<X>;
    Workspace<Compute> s{};
    s.panel = static_cast<Compute*>(const_cast<void*>(panel)), s.rows = static_cast<Compute*>(rows);
    const fastlora_lora none = {};
    const Dropout off(none);
    const Span& all = dots.rows.spans[0];
    Step own = step;
    own.position = 0, own.stride = PANEL_COLUMNS;
    own.partial = static_cast<float*>(scratch(SCRATCH_DOTS, (dots.m + 1) * PANEL_COLUMNS * sizeof(float)));
    for (int64_t i = 0; i < dots.m; i += Shape<Compute>::ROWS)
      row_block<Compute>(dots, s, dots.parts[0], red, depth, own, all, off, i, min64(Shape<Compute>::ROWS, dots.m - i), col,
                         cols);
    if (!step.last) return;
    for (int64_t first = col; first < col + cols; first += VW) {
      const int64_t count = min64(VW, col + cols - first);
      float* across = own.partial;  // no longer needed
      for (int64_t i = 0; i < of.r; ++i) vstore(across + i * VW, dot(i, first, count));
      few_norms(first, count, of.r, of.squares, across, of.b, of.gram, of.scaling, of.norms);
    }
    for (int64_t c = 0; c < cols; ++c) {
      const float norm = of.norms[col + c];
      factors[c] = norm < FLT_MIN ? 0 : of.magnitude[col + c] / norm;  // a row of zeros stays one
    }
  }

 private:
  vf dot(int64_t i, int64_t first, int64_t count) const {
    const float* line = dots.out + i * of.n + first;
    const int64_t next = of.r * of.n;
    if (pieces == 1) return vload_part(line, count);
    return vload_part(line, count) + (vload_part(line + next, count) + vload_part(line + 2 * next, count));
  }
};

// z = x W^T + scaling s B^T and y = z * magnitude / norm + bias, from z as it is rounded.
template <class T, class L, class X>
void scaled_panels(const Gemm<T, T>& z, const X* a, int pieces, const Magnitude<L>& of, const Rows& rows, int threads) {
  const fastlora_lora none = {};
  const fastlora_weight& w = *z.parts->w;
  const Part<X> part{a, w.k, &w};
  auto* dots = static_cast<float*>(scratch(SCRATCH_NORMS, (rows.m * w.n + 1) * sizeof(float)));
  Gemm<X, float> g{&part, 1, rows.m, false, none, rows, nullptr, nullptr, nullptr, dots, threads};
  g.rounding = dtype_of<T>;
  const MagnitudeFactors<X, L> factors(g, pieces, of);
  Gemm<T, T> scaled = z;
  scaled.factors = &factors;
  apply_panels(scaled);
}

template <class T, class L>
void scaled_linear(int64_t m, const T* x, int64_t ldx, const fastlora_weight& w, const fastlora_lora& lora,
                   const float* squares, const float* magnitude, const float* bias, float* norms, float* s, T* z, T* y,
                   int threads) {
  const Rows rows(lora, m);
  const int64_t r = lora.r;
  const L* a = static_cast<const L*>(lora.a);
  auto* gram = static_cast<float*>(scratch(SCRATCH_GRAM, (r * r + 1) * sizeof(float)));
  gram_of(a, r, w.k, gram, threads);
  const Magnitude<L> of{w.n, r, static_cast<const L*>(lora.b), lora.scaling, gram, squares, magnitude, norms};
  project_x(m, x, ldx, w.k, a, lora, rows, s, threads);
  const Part<T> part{x, ldx, &w};
  const Gemm<T, T> g{&part, 1, m, false, lora, rows, s, nullptr, bias, z, threads, dtype_of<T>, nullptr, y};
  const fastlora_lora none = {};
#if defined(FASTLORA_BF16_DOT)
  if constexpr (is_bf16<T> && sizeof(L) == 4) {
    auto* split = static_cast<bf16*>(scratch(SCRATCH_STACKED, (3 * r * w.k + 1) * sizeof(bf16)));
    split_rows(a, w.k, r, w.k, 1.0f, 3, split, w.k, r * w.k, threads);
    return scaled_panels(g, split, 3, of, Rows(none, 3 * r), threads);
  }
#endif
  scaled_panels(g, a, 1, of, Rows(none, r), threads);
}

// ---- by dtype ----

void row_norms(int32_t dtype, int64_t n, int64_t r, const float* squares, const float* dots, const void* b,
               const float* gram, float scaling, float* out, int threads) {
  as_type(dtype, b, [&](auto* ranks) { row_norms(n, r, squares, dots, ranks, gram, scaling, out, threads); });
}

void scaled_linear(int32_t dtype, int64_t m, const void* x, int64_t ldx, const fastlora_weight& w,
                   const fastlora_lora& lora, const float* squares, const float* magnitude, const float* bias,
                   float* norms, float* s, void* z, void* y, int threads) {
  as_type(dtype, x, [&](auto* rows) {
    using T = values_of<decltype(rows)>;
    const auto run = [&](auto* p) {
      using L = values_of<decltype(p)>;
      scaled_linear<T, L>(m, rows, ldx, w, lora, squares, magnitude, bias, norms, s, static_cast<T*>(z),
                          static_cast<T*>(y), threads);
    };
    if (lora.dtype == FASTLORA_F32)
      run(static_cast<const float*>(nullptr));
    else
      run(static_cast<const T*>(nullptr));
  });
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora

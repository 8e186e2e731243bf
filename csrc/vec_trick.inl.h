// LoKr beside the base: y + x kron(w1, w2)^T by the vec trick, tokens in the lanes of vectors.
//
// A token is X (k1, k2) and its update w1 X w2^T (n1, n2), with w2 = P or, of low rank, Q P:
//   T1 (k1, c) = X P^T;  T2 (n1, c) = w1 T1;  D (n1, n2) = T2 Q^T, or T2 where there is no Q (c = n2).
// VW tokens are computed at once, each matrix an array of vectors. Sums for the factors' gradients run over chunks of
// tokens, at most MOST_CHUNKS, which are added up in order, so that they do not depend on the number of threads.
#include "norms.inl.h"

namespace fastlora {
namespace FASTLORA_ISA {

// (rows, count) floats, rows = VW, to lanes: out[c * VW + r] = in[r * count + c].
inline void to_lanes(const float* in, int64_t count, float* out) {
#if defined(__AVX512F__)
  transpose_lanes(reinterpret_cast<const uint32_t*>(in), count, count, reinterpret_cast<uint32_t*>(out), VW);
#else
  for (int64_t c = 0; c < count; ++c)
    for (int r = 0; r < VW; ++r) out[c * VW + r] = in[r * count + c];
#endif
}

inline void from_lanes(const float* in, int64_t count, float* out) {
  int64_t c = 0;
#if defined(__AVX512F__)
  for (; c + 16 <= count; c += 16) {
    __m512i r[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(in + (c + i) * VW);
    transpose16(r);
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + i * count + c, r[i]);
  }
#endif
  for (; c < count; ++c)
    for (int r = 0; r < VW; ++r) out[r * count + c] = in[c * VW + r];
}

// out (rows, c) = in (rows, q) P^T, P (c, q): vectors times numbers.
inline void times_right(const float* in, int64_t rows, int64_t q, const float* p, int64_t c, float* out) {
  constexpr int J = 8;
  for (int64_t i = 0; i < rows; ++i, in += q * VW, out += c * VW) {
    int64_t j = 0;
    for (; j + J <= c; j += J) {
      vf sum[J];
      for (int e = 0; e < J; ++e) sum[e] = vzero();
      for (int64_t k = 0; k < q; ++k) {
        const vf value = vload(in + k * VW);
        for (int e = 0; e < J; ++e) sum[e] = vfma(vset(p[(j + e) * q + k]), value, sum[e]);
      }
      for (int e = 0; e < J; ++e) vstore(out + (j + e) * VW, sum[e]);
    }
    for (; j < c; ++j) {
      vf sum = vzero();
      for (int64_t k = 0; k < q; ++k) sum = vfma(vset(p[j * q + k]), vload(in + k * VW), sum);
      vstore(out + j * VW, sum);
    }
  }
}

// out (n, c) = W in (k, c), W (n, k).
inline void times_left(const float* w, int64_t n, int64_t k, const float* in, int64_t c, float* out) {
  constexpr int I = 8;
  for (int64_t j = 0; j < c; ++j) {
    int64_t i = 0;
    for (; i + I <= n; i += I) {
      vf sum[I];
      for (int e = 0; e < I; ++e) sum[e] = vzero();
      for (int64_t q = 0; q < k; ++q) {
        const vf value = vload(in + (q * c + j) * VW);
        for (int e = 0; e < I; ++e) sum[e] = vfma(vset(w[(i + e) * k + q]), value, sum[e]);
      }
      for (int e = 0; e < I; ++e) vstore(out + ((i + e) * c + j) * VW, sum[e]);
    }
    for (; i < n; ++i) {
      vf sum = vzero();
      for (int64_t q = 0; q < k; ++q) sum = vfma(vset(w[i * k + q]), vload(in + (q * c + j) * VW), sum);
      vstore(out + (i * c + j) * VW, sum);
    }
  }
}

// sums (a, b), vectors, += over e of left[e, i] right[e, j]: left (count, a), right (count, b), elements `step` apart.
inline void add_outer(const float* left, int64_t a, const float* right, int64_t b, int64_t count, float* sums) {
  for (int64_t i = 0; i < a; ++i)
    for (int64_t j = 0; j < b; ++j) {
      vf sum = vzero();  // short sums, which keep the rounding errors small
      for (int64_t e = 0; e < count; ++e) sum = vfma(vload(left + (e * a + i) * VW), vload(right + (e * b + j) * VW), sum);
      vstore(sums + (i * b + j) * VW, vload(sums + (i * b + j) * VW) + sum);
    }
}

// sums (a, b) += over e of left[i, e] right[j, e].
inline void add_inner(const float* left, int64_t a, const float* right, int64_t b, int64_t count, float* sums) {
  for (int64_t i = 0; i < a; ++i)
    for (int64_t j = 0; j < b; ++j) {
      vf sum = vzero();
      for (int64_t e = 0; e < count; ++e)
        sum = vfma(vload(left + (i * count + e) * VW), vload(right + (j * count + e) * VW), sum);
      vstore(sums + (i * b + j) * VW, vload(sums + (i * b + j) * VW) + sum);
    }
}

// The shapes and factors of one layer.
struct Kron {
  int64_t n1, k1, n2, k2, c;
  const float *w1, *p, *q;  // (n1, k1), (c, k2), (n2, c) or NULL

  int64_t n() const { return n1 * n2; }
  int64_t k() const { return k1 * k2; }
  int64_t factors() const { return n1 * k1 + c * k2 + (q ? n2 * c : 0); }
};

// Buffers of one block of VW tokens.
struct Lanes {
  float *rows, *x, *t1, *t2, *d, *g2, *g1;

  explicit Lanes(const Kron& kron) {
    const int64_t widest = kron.n() > kron.k() ? kron.n() : kron.k();
    const int64_t inner = (kron.k1 + kron.n1) * kron.c;
    auto* at = static_cast<float*>(scratch(SCRATCH_PANEL, (3 * widest + 2 * inner) * VW * sizeof(float)));
    rows = at, x = rows + widest * VW, d = x + widest * VW;
    t1 = d + widest * VW, t2 = t1 + kron.k1 * kron.c * VW;
    g1 = t2 + kron.n1 * kron.c * VW, g2 = g1 + kron.k1 * kron.c * VW;
  }
};

// Rows of a matrix to lanes; rows that are not there are zero.
template <class T>
inline void load_lanes(const T* from, int64_t ld, int64_t rows, int64_t count, float* buffer, float* out) {
  for (int64_t r = 0; r < VW; ++r)
    for (int64_t c = 0; c < count; c += VW) {
      const int64_t here = min64(VW, count - c);
      vstore_part(buffer + r * count + c, r < rows ? vload_part(from + r * ld + c, here) : vzero(), here);
    }
  to_lanes(buffer, count, out);
}

inline void forward_lanes(const Kron& kron, const Lanes& s) {
  times_right(s.x, kron.k1, kron.k2, kron.p, kron.c, s.t1);
  times_left(kron.w1, kron.n1, kron.k1, s.t1, kron.c, s.t2);
}

// out (m, n) = base + x kron(w1, w2)^T, rounded once.
template <class T>
void kron_linear(int64_t m, const T* x, int64_t ldx, const Kron& kron, const T* base, T* out, int threads) {
  const int64_t n = kron.n();
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t first = 0; first < m; first += VW) {
    const Lanes s(kron);
    const int64_t rows = min64(VW, m - first);
    load_lanes(x + first * ldx, ldx, rows, kron.k(), s.rows, s.x);
    forward_lanes(kron, s);
    if (kron.q) times_right(s.t2, kron.n1, kron.c, kron.q, kron.n2, s.d);
    from_lanes(kron.q ? s.d : s.t2, n, s.rows);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < n; c += VW) {
        const int64_t here = min64(VW, n - c), at = (first + r) * n + c;
        vstore_part(out + at, vload_part(base + at, here) + vload_part(s.rows + r * n + c, here), here);
      }
  }
}

// (rows, columns) to (columns, rows).
inline const float* transposed(const float* from, int64_t rows, int64_t columns, float* out) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) out[j * rows + i] = from[i * columns + j];
  return out;
}

// dx (m, k) and the gradients of w1, P and Q, one behind the other in `factors`; either may be NULL.
template <class T>
void kron_linear_backward(int64_t m, const T* dy, int64_t lddy, const T* x, int64_t ldx, const Kron& kron, T* dx,
                          float* factors, int threads) {
  constexpr int64_t BLOCKS = 4, MOST_CHUNKS = 64;
  const int64_t even = round_up((m + MOST_CHUNKS - 1) / MOST_CHUNKS, VW);
  const int64_t tokens = even > BLOCKS * VW ? even : BLOCKS * VW, chunks = (m + tokens - 1) / tokens;
  const int64_t k = kron.k(), count = kron.factors();
  auto* across = static_cast<float*>(scratch(SCRATCH_SPLIT, (count + 1) * sizeof(float)));
  const float* w1t = transposed(kron.w1, kron.n1, kron.k1, across);
  const float* pt = transposed(kron.p, kron.c, kron.k2, across + kron.n1 * kron.k1);
  const float* qt = kron.q ? transposed(kron.q, kron.n2, kron.c, across + kron.n1 * kron.k1 + kron.c * kron.k2) : nullptr;
  auto* parts = static_cast<float*>(scratch(SCRATCH_SHARED, (factors ? chunks * count : 1) * sizeof(float)));
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const Lanes s(kron);
    auto* sums = static_cast<float*>(scratch(SCRATCH_PARTIAL, (count + 1) * VW * sizeof(float)));
    float *dw1 = sums, *dp = dw1 + kron.n1 * kron.k1 * VW, *dq = dp + kron.c * kron.k2 * VW;
    if (factors) memset(sums, 0, count * VW * sizeof(float));
    for (int64_t first = chunk * tokens; first < min64(m, (chunk + 1) * tokens); first += VW) {
      const int64_t rows = min64(VW, m - first);
      load_lanes(dy + first * lddy, lddy, rows, kron.n(), s.rows, s.d);
      const float* g2 = s.d;
      if (qt) {
        times_right(s.d, kron.n1, kron.n2, qt, kron.c, s.g2);
        g2 = s.g2;
      }
      times_left(w1t, kron.k1, kron.n1, g2, kron.c, s.g1);
      if (factors) {
        load_lanes(x + first * ldx, ldx, rows, k, s.rows, s.x);
        forward_lanes(kron, s);
        if (qt) add_outer(s.d, kron.n2, s.t2, kron.c, kron.n1, dq);
        add_inner(g2, kron.n1, s.t1, kron.k1, kron.c, dw1);
        add_outer(s.g1, kron.c, s.x, kron.k2, kron.k1, dp);
      }
      if (!dx) continue;
      times_right(s.g1, kron.k1, kron.c, pt, kron.k2, s.x);
      from_lanes(s.x, k, s.rows);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < k; c += VW) {
          const int64_t here = min64(VW, k - c);
          vstore_part(dx + (first + r) * k + c, vload_part(s.rows + r * k + c, here), here);
        }
    }
    for (int64_t i = 0; factors && i < count; ++i) parts[chunk * count + i] = vsum(vload(sums + i * VW));
  }
  for (int64_t i = 0; factors && i < count; ++i) {
    double total = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total += parts[chunk * count + i];
    factors[i] = static_cast<float>(total);
  }
}

// ---- by dtype ----

void kron_linear(int32_t dtype, int64_t m, const void* x, int64_t ldx, const int64_t* size, const float* w1,
                 const float* p, const float* q, const void* base, void* out, int threads) {
  const Kron kron{size[0], size[1], size[2], size[3], size[4], w1, p, q};
  as_type(dtype, x, [&](auto* rows) {
    using T = values_of<decltype(rows)>;
    kron_linear(m, rows, ldx, kron, static_cast<const T*>(base), static_cast<T*>(out), threads);
  });
}

void kron_linear_backward(int32_t dtype, int64_t m, const void* dy, int64_t lddy, const void* x, int64_t ldx,
                          const int64_t* size, const float* w1, const float* p, const float* q, void* dx,
                          float* factors, int threads) {
  const Kron kron{size[0], size[1], size[2], size[3], size[4], w1, p, q};
  as_type(dtype, dy, [&](auto* rows) {
    using T = values_of<decltype(rows)>;
    kron_linear_backward(m, rows, lddy, static_cast<const T*>(x), ldx, kron, static_cast<T*>(dx), factors, threads);
  });
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora

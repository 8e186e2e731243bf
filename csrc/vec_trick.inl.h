// LoKr beside the base: y + x kron(w1, w2)^T by the vec trick, tokens in the lanes of vectors.
//
// A token is X (k1, k2) and its update w1 X w2^T (n1, n2), with w2 = P or, of low rank, Q P:
//   T1 (k1, c) = X P^T;  T2 (n1, c) = w1 T1;  D (n1, n2) = T2 Q^T, or T2 where there is no Q (c = n2).
// VW tokens are computed at once, each matrix an array of vectors. Sums for the factors' gradients run over chunks of
// tokens, at most MOST_CHUNKS, which are added up in order, so that they do not depend on the number of threads.
#include "norms.inl.h"

namespace fastlora {
namespace FASTLORA_ISA {

// VW x VW transpose.
inline void transpose_vectors(vf v[VW]) {
#if defined(__AVX512F__)
  __m512i lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = _mm512_castps_si512(v[i]);
  transpose16(lanes);
  for (int i = 0; i < 16; ++i) v[i] = _mm512_castsi512_ps(lanes[i]);
#elif defined(__AVX2__)
  transpose8(v);
#else
  for (int i = 0; i < VW; ++i)
    for (int j = 0; j < i; ++j) {
      const float value = v[i][j];
      v[i][j] = v[j][i], v[j][i] = value;
    }
#endif
}

// Rows of a matrix to lanes, out[c * VW + r] = from[r * ld + c]; rows that are not there are zero.
template <class T>
inline void load_lanes(const T* from, int64_t ld, int64_t rows, int64_t count, float* out) {
  for (int64_t c = 0; c < count; c += VW) {
    const int64_t here = min64(VW, count - c);
    vf v[VW];
    for (int r = 0; r < VW; ++r) {
      const T* at = from + r * ld + c;
      v[r] = r >= rows ? vzero() : here == VW ? vload(at) : vload_part(at, here);
    }
    transpose_vectors(v);
    for (int64_t i = 0; i < here; ++i) vstore(out + (c + i) * VW, v[i]);
  }
}

// Rows of a matrix += lanes, rounded once.
template <class T>
inline void add_lanes(const float* lanes, int64_t rows, int64_t count, T* out) {
  for (int64_t c = 0; c < count; c += VW) {
    const int64_t here = min64(VW, count - c);
    vf v[VW];
    for (int64_t i = 0; i < VW; ++i) v[i] = i < here ? vload(lanes + (c + i) * VW) : vzero();
    transpose_vectors(v);
    for (int64_t r = 0; r < rows; ++r) {
      T* at = out + r * count + c;
      if (here == VW)
        vstore(at, vload(at) + v[r]);
      else
        vstore_part(at, vload_part(at, here) + v[r], here);
    }
  }
}

// A matrix whose element (i, e) is at data + i * row + e * step: a number, or with `vectors` VW of them.
struct Side {
  const float* data;
  int64_t row, step;
};

// A matrix of numbers, and its transpose.
inline Side as_is(const float* data, int64_t columns) { return {data, columns, 1}; }
inline Side turned(const float* data, int64_t columns) { return {data, 1, columns}; }

// Where element (i, j) of a result is: a vector at data + i * row + j * column.
struct Result {
  float* data;
  int64_t row, column;
};

// out (I, J) = or, with `add`, += over e of left[i, e] right[j, e].
template <bool vectors, bool add, int I, int J>
inline void contract_tile(const Side& left, int64_t i, const Side& right, int64_t j, int64_t count, const Result& out) {
  const int64_t ls = vectors ? left.step * VW : left.step, rs = right.step * VW;
  const float *l[I], *r[J];
  for (int p = 0; p < I; ++p) l[p] = left.data + (i + p) * left.row * (vectors ? VW : 1);
  for (int q = 0; q < J; ++q) r[q] = right.data + (j + q) * right.row * VW;
  vf sum[I][J];
  for (int p = 0; p < I; ++p)
    for (int q = 0; q < J; ++q) sum[p][q] = vzero();
  for (int64_t e = 0; e < count; ++e) {
    vf value[J];
    for (int q = 0; q < J; ++q) value[q] = vload(r[q] + e * rs);
    for (int p = 0; p < I; ++p) {
      const vf other = vectors ? vload(l[p] + e * ls) : vset(l[p][e * ls]);
      for (int q = 0; q < J; ++q) sum[p][q] = vfma(other, value[q], sum[p][q]);
    }
  }
  for (int p = 0; p < I; ++p)
    for (int q = 0; q < J; ++q) {
      float* to = out.data + ((i + p) * out.row + (j + q) * out.column) * VW;
      vstore(to, add ? vload(to) + sum[p][q] : sum[p][q]);  // short sums keep the rounding errors small
    }
}

// out (a, b) = or += left (a, count) right (b, count)^T; the right side has vectors.
template <bool vectors, bool add>
inline void contract(const Side& left, int64_t a, const Side& right, int64_t b, int64_t count, const Result& out) {
  constexpr int I = 4, J = 2;
  for (int64_t j = 0; j < b; j += J) {
    const bool pair = j + J <= b;
    int64_t i = 0;
    for (; i + I <= a; i += I)
      if (pair)
        contract_tile<vectors, add, I, J>(left, i, right, j, count, out);
      else
        contract_tile<vectors, add, I, 1>(left, i, right, j, count, out);
    for (; i < a; ++i)
      if (pair)
        contract_tile<vectors, add, 1, J>(left, i, right, j, count, out);
      else
        contract_tile<vectors, add, 1, 1>(left, i, right, j, count, out);
  }
}

// out (rows, c) = in (rows, q) P^T, P (c, q): vectors times numbers.
inline void times_right(const float* in, int64_t rows, int64_t q, const Side& p, int64_t c, float* out) {
  contract<false, false>(p, c, {in, q, 1}, rows, q, {out, 1, c});
}

// out (n, c) = W in (k, c), W (n, k).
inline void times_left(const Side& w, int64_t n, int64_t k, const float* in, int64_t c, float* out) {
  contract<false, false>(w, n, {in, 1, c}, c, k, {out, c, 1});
}

// sums (a, b) += left (count, a)^T right (count, b).
inline void add_outer(const float* left, int64_t a, const float* right, int64_t b, int64_t count, float* sums) {
  contract<true, true>({left, 1, a}, a, {right, 1, b}, b, count, {sums, b, 1});
}

// sums (a, b) += left (a, count) right (b, count)^T.
inline void add_inner(const float* left, int64_t a, const float* right, int64_t b, int64_t count, float* sums) {
  contract<true, true>({left, count, 1}, a, {right, count, 1}, b, count, {sums, b, 1});
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
  float *x, *d, *t1, *t2, *g1, *g2;

  explicit Lanes(const Kron& kron) {
    const int64_t inner = (kron.k1 + kron.n1) * kron.c;
    const int64_t vectors = kron.n() + kron.k() + 2 * inner;
    x = static_cast<float*>(scratch(SCRATCH_PANEL, vectors * VW * sizeof(float)));
    d = x + kron.k() * VW;
    t1 = d + kron.n() * VW, t2 = t1 + kron.k1 * kron.c * VW;
    g1 = t2 + kron.n1 * kron.c * VW, g2 = g1 + kron.k1 * kron.c * VW;
  }
};

inline void forward_lanes(const Kron& kron, const Lanes& s) {
  times_right(s.x, kron.k1, kron.k2, as_is(kron.p, kron.k2), kron.c, s.t1);
  times_left(as_is(kron.w1, kron.k1), kron.n1, kron.k1, s.t1, kron.c, s.t2);
}

// y (m, n) += x kron(w1, w2)^T, rounded once.
template <class T>
void add_kron(int64_t m, const T* x, int64_t ldx, const Kron& kron, T* y, int threads) {
  const int64_t n = kron.n();
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t first = 0; first < m; first += VW) {
    const Lanes s(kron);
    const int64_t rows = min64(VW, m - first);
    load_lanes(x + first * ldx, ldx, rows, kron.k(), s.x);
    forward_lanes(kron, s);
    if (kron.q) times_right(s.t2, kron.n1, kron.c, as_is(kron.q, kron.c), kron.n2, s.d);
    add_lanes(kron.q ? s.d : s.t2, rows, n, y + first * n);
  }
}

// Adds to dx (m, k), and makes the gradients of w1, P and Q, one behind the other in `factors`; either may be NULL.
template <class T>
void add_kron_backward(int64_t m, const T* dy, int64_t lddy, const T* x, int64_t ldx, const Kron& kron, T* dx,
                       float* factors, int threads) {
  constexpr int64_t FEWEST = 64, MOST_CHUNKS = 64;
  const int64_t even = round_up((m + MOST_CHUNKS - 1) / MOST_CHUNKS, VW);
  const int64_t tokens = even > FEWEST ? even : FEWEST, chunks = (m + tokens - 1) / tokens;
  const int64_t k = kron.k(), count = kron.factors();
  auto* parts = static_cast<float*>(scratch(SCRATCH_SHARED, (factors ? chunks * count : 1) * sizeof(float)));
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const Lanes s(kron);
    auto* sums = static_cast<float*>(scratch(SCRATCH_PARTIAL, (count + 1) * VW * sizeof(float)));
    float *dw1 = sums, *dp = dw1 + kron.n1 * kron.k1 * VW, *dq = dp + kron.c * kron.k2 * VW;
    if (factors) memset(sums, 0, count * VW * sizeof(float));
    for (int64_t first = chunk * tokens; first < min64(m, (chunk + 1) * tokens); first += VW) {
      const int64_t rows = min64(VW, m - first);
      load_lanes(dy + first * lddy, lddy, rows, kron.n(), s.d);
      const float* g2 = s.d;
      if (kron.q) {
        times_right(s.d, kron.n1, kron.n2, turned(kron.q, kron.c), kron.c, s.g2);
        g2 = s.g2;
      }
      times_left(turned(kron.w1, kron.k1), kron.k1, kron.n1, g2, kron.c, s.g1);
      if (factors) {
        load_lanes(x + first * ldx, ldx, rows, k, s.x);
        forward_lanes(kron, s);
        if (kron.q) add_outer(s.d, kron.n2, s.t2, kron.c, kron.n1, dq);
        add_inner(g2, kron.n1, s.t1, kron.k1, kron.c, dw1);
        add_outer(s.g1, kron.c, s.x, kron.k2, kron.k1, dp);
      }
      if (!dx) continue;
      times_right(s.g1, kron.k1, kron.c, turned(kron.p, kron.k2), kron.k2, s.x);
      add_lanes(s.x, rows, k, dx + first * k);
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

void add_kron(int32_t dtype, int64_t m, const void* x, int64_t ldx, const int64_t* size, const float* w1,
              const float* p, const float* q, void* y, int threads) {
  const Kron kron{size[0], size[1], size[2], size[3], size[4], w1, p, q};
  as_type(dtype, x, [&](auto* rows) {
    using T = values_of<decltype(rows)>;
    add_kron(m, rows, ldx, kron, static_cast<T*>(y), threads);
  });
}

void add_kron_backward(int32_t dtype, int64_t m, const void* dy, int64_t lddy, const void* x, int64_t ldx,
                       const int64_t* size, const float* w1, const float* p, const float* q, void* dx, float* factors,
                       int threads) {
  const Kron kron{size[0], size[1], size[2], size[3], size[4], w1, p, q};
  as_type(dtype, dy, [&](auto* rows) {
    using T = values_of<decltype(rows)>;
    add_kron_backward(m, rows, lddy, static_cast<const T*>(x), ldx, kron, static_cast<T*>(dx), factors, threads);
  });
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora

// Factors of LoHa and LoKr: products of every row (or column, or entry) of one small matrix with every one of another,
// and their gradients. Sums are float; one rounding to the parameters' dtype.
#include "columns.inl.h"

namespace fastlora {
namespace FASTLORA_ISA {

constexpr int64_t RUN_COLUMNS = 512;  // columns a thread takes at a time

template <class T>
inline void multiply_into(const T* u, const T* v, int64_t count, T* out) {
  int64_t c = 0;
  for (; c + VW <= count; c += VW) vstore(out + c, vload(u + c) * vload(v + c));
  if (c < count) vstore_part(out + c, vload_part(u + c, count - c) * vload_part(v + c, count - c), count - c);
}

template <class T>
inline void add_product(const T* u, const T* v, int64_t count, float* sum) {
  int64_t c = 0;
  for (; c + VW <= count; c += VW) vstore(sum + c, vfma(vload(u + c), vload(v + c), vload(sum + c)));
  for (; c < count; ++c) sum[c] += to_float(u[c]) * to_float(v[c]);
}

// out (r1 r2, k): row (i, j) = u[i] * v[j].
template <class T>
void row_products(int64_t r1, int64_t r2, int64_t k, const T* u, const T* v, T* out, int threads) {
#pragma omp parallel for num_threads(r1 * r2 * k < FEW_PRODUCTS ? 1 : threads) schedule(static)
  for (int64_t i = 0; i < r1 * r2; ++i) multiply_into(u + i / r2 * k, v + i % r2 * k, k, out + i * k);
}

// du (r1, k) = sum over j of g[(i, j)] * v[j]; dv (r2, k) = sum over i of g[(i, j)] * u[i].
template <class T>
void row_products_backward(int64_t r1, int64_t r2, int64_t k, const T* g, const T* u, const T* v, T* du, T* dv,
                           int threads) {
#pragma omp parallel for num_threads(r1 * r2 * k < FEW_PRODUCTS ? 1 : threads) schedule(static)
  for (int64_t col = 0; col < k; col += RUN_COLUMNS) {
    const int64_t cols = min64(RUN_COLUMNS, k - col);
    float sum[RUN_COLUMNS];
    for (int64_t i = 0; i < r1; ++i) {
      memset(sum, 0, sizeof sum);
      for (int64_t j = 0; j < r2; ++j) add_product(g + (i * r2 + j) * k + col, v + j * k + col, cols, sum);
      for (int64_t c = 0; c < cols; ++c) store_scalar(du + i * k + col + c, sum[c]);
    }
    for (int64_t j = 0; j < r2; ++j) {
      memset(sum, 0, sizeof sum);
      for (int64_t i = 0; i < r1; ++i) add_product(g + (i * r2 + j) * k + col, u + i * k + col, cols, sum);
      for (int64_t c = 0; c < cols; ++c) store_scalar(dv + j * k + col + c, sum[c]);
    }
  }
}

// out (n, r1 r2): column (i, j) = u[:, i] * v[:, j].
template <class T>
void column_products(int64_t n, int64_t r1, int64_t r2, const T* u, const T* v, T* out, int threads) {
#pragma omp parallel for num_threads(n * r1 * r2 < FEW_PRODUCTS ? 1 : threads) schedule(static)
  for (int64_t row = 0; row < n; ++row)
    for (int64_t i = 0; i < r1; ++i) {
      const vf scale = vset(to_float(u[row * r1 + i]));
      T* to = out + (row * r1 + i) * r2;
      for (int64_t j = 0; j < r2; j += VW) {
        const int64_t count = min64(VW, r2 - j);
        vstore_part(to + j, scale * vload_part(v + row * r2 + j, count), count);
      }
    }
}

// du (n, r1) = sum over j of g[:, (i, j)] * v[:, j]; dv (n, r2) = sum over i of g[:, (i, j)] * u[:, i].
template <class T>
void column_products_backward(int64_t n, int64_t r1, int64_t r2, const T* g, const T* u, const T* v, T* du, T* dv,
                              int threads) {
#pragma omp parallel for num_threads(n * r1 * r2 < FEW_PRODUCTS ? 1 : threads) schedule(static)
  for (int64_t row = 0; row < n; ++row) {
    const T *line = g + row * r1 * r2, *from = v + row * r2;
    for (int64_t i = 0; i < r1; ++i) {
      vf sum = vzero();
      for (int64_t j = 0; j < r2; j += VW) {
        const int64_t count = min64(VW, r2 - j);
        sum = vfma(vload_part(line + i * r2 + j, count), vload_part(from + j, count), sum);
      }
      store_scalar(du + row * r1 + i, vsum(sum));
    }
    for (int64_t j = 0; j < r2; j += VW) {
      const int64_t count = min64(VW, r2 - j);
      vf sum = vzero();
      for (int64_t i = 0; i < r1; ++i)
        sum = vfma(vload_part(line + i * r2 + j, count), vset(to_float(u[row * r1 + i])), sum);
      vstore_part(dv + row * r2 + j, sum, count);
    }
  }
}

// out (a c, b d): entry (i, p), (j, q) = u[i, j] v[p, q].
template <class T>
void kron(int64_t a, int64_t b, int64_t c, int64_t d, const T* u, const T* v, T* out, int threads) {
#pragma omp parallel for num_threads(a * b * c * d < FEW_PRODUCTS ? 1 : threads) schedule(static)
  for (int64_t line = 0; line < a * c; ++line)
    for (int64_t j = 0; j < b; ++j) {
      const vf scale = vset(to_float(u[line / c * b + j]));
      const T* from = v + line % c * d;
      T* to = out + (line * b + j) * d;
      for (int64_t q = 0; q < d; q += VW) {
        const int64_t count = min64(VW, d - q);
        vstore_part(to + q, scale * vload_part(from + q, count), count);
      }
    }
}

// du (a, b) = sum over p, q of g v[p, q]; dv (c, d) = sum over i, j of u[i, j] g.
template <class T>
void kron_backward(int64_t a, int64_t b, int64_t c, int64_t d, const T* g, const T* u, const T* v, T* du, T* dv,
                   int threads) {
#pragma omp parallel num_threads(a * b * c * d < FEW_PRODUCTS ? 1 : threads)
  {
#pragma omp for schedule(static) nowait
    for (int64_t e = 0; e < a * b; ++e) {
      float sum = 0;
      for (int64_t p = 0; p < c; ++p) {
        float part;
        dots<1, 1>(g + ((e / b * c + p) * b + e % b) * d, 0, v + p * d, d, 1.0f, &part, 1);
        sum += part;
      }
      store_scalar(du + e, sum);
    }
#pragma omp for schedule(static)
    for (int64_t p = 0; p < c; ++p)
      for (int64_t q = 0; q < d; q += VW) {
        const int64_t count = min64(VW, d - q);
        vf total = vzero();
        for (int64_t run = 0; run < a * b; run += 8) {  // short sums, which keep the rounding errors small
          vf sum = vzero();
          for (int64_t e = run; e < min64(run + 8, a * b); ++e)
            sum = vfma(vset(to_float(u[e])), vload_part(g + ((e / b * c + p) * b + e % b) * d + q, count), sum);
          total = total + sum;
        }
        vstore_part(dv + p * d + q, total, count);
      }
  }
}

// ---- by dtype ----

void products(int32_t dtype, int32_t kind, const int64_t* size, const void* u, const void* v, void* out,
              int threads) {
  as_type(dtype, u, [&](auto* left) {
    using T = values_of<decltype(left)>;
    const T* right = static_cast<const T*>(v);
    T* to = static_cast<T*>(out);
    if (kind == FASTLORA_ROWS) row_products(size[0], size[1], size[2], left, right, to, threads);
    if (kind == FASTLORA_COLUMNS) column_products(size[0], size[1], size[2], left, right, to, threads);
    if (kind == FASTLORA_KRON) kron(size[0], size[1], size[2], size[3], left, right, to, threads);
  });
}

void products_backward(int32_t dtype, int32_t kind, const int64_t* size, const void* g, const void* u, const void* v,
                       void* du, void* dv, int threads) {
  as_type(dtype, u, [&](auto* left) {
    using T = values_of<decltype(left)>;
    const T *right = static_cast<const T*>(v), *grad = static_cast<const T*>(g);
    T *dl = static_cast<T*>(du), *dr = static_cast<T*>(dv);
    if (kind == FASTLORA_ROWS) row_products_backward(size[0], size[1], size[2], grad, left, right, dl, dr, threads);
    if (kind == FASTLORA_COLUMNS)
      column_products_backward(size[0], size[1], size[2], grad, left, right, dl, dr, threads);
    if (kind == FASTLORA_KRON)
      kron_backward(size[0], size[1], size[2], size[3], grad, left, right, dl, dr, threads);
  });
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora

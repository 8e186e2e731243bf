// The products with a side of r: drop(x) A^T, dy B, dS^T drop(x), dy^T S. Float sums whatever the inputs' type.
#include "gemm.inl.h"

namespace fastlora {
namespace FASTLORA_ISA {

constexpr int64_t FEW_PRODUCTS = 1 << 14;  // below this one thread is done before another has woken

// Scalar products of MR rows of x with JR rows of a; sums of DOT_RUN vectors are added to totals.
constexpr int64_t DOT_RUN = (VW == 4 ? 8 : 32) * VW;
template <int MR, int JR, class X, class L>
inline void dots(const X* x, int64_t ldx, const L* a, int64_t k, float scale, float* out, int64_t ldo) {
  vf total[MR][JR];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < JR; ++j) total[i][j] = vzero();
  for (int64_t run = 0; run < k; run += DOT_RUN) {
    vf acc[MR][JR];
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < JR; ++j) acc[i][j] = vzero();
    const int64_t stop = min64(run + DOT_RUN, k);
    for (int64_t c = run; c < stop; c += VW) {
      const bool whole = c + VW <= stop;
      vf av[JR];
      for (int j = 0; j < JR; ++j) av[j] = whole ? vload(a + j * k + c) : vload_part(a + j * k + c, stop - c);
      for (int i = 0; i < MR; ++i) {
        const vf xv = whole ? vload(x + i * ldx + c) : vload_part(x + i * ldx + c, stop - c);
        for (int j = 0; j < JR; ++j) acc[i][j] = vfma(xv, av[j], acc[i][j]);
      }
    }
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < JR; ++j) total[i][j] = total[i][j] + acc[i][j];
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < JR; ++j) out[i * ldo + j] = scale * vsum(total[i][j]);
}

// Rows [first, first + count) of x times a (r, k)^T, scaled; row i goes to out + i * ldo.
template <int MR, class X, class L>
inline void project_rows(const X* x, int64_t ldx, int64_t count, const L* a, int64_t r, int64_t k, float scale,
                         float* out, int64_t ldo) {
  constexpr int JR = VW == 16 || MR == 1 ? 8 : 4;  // the sums are in registers, and each load meets several
  for (int64_t j = 0; j < r; j += JR) {
    const bool wide = j + JR <= r;
    if (wide && count == MR) {
      dots<MR, JR>(x, ldx, a + j * k, k, scale, out + j, ldo);
      continue;
    }
    for (int64_t i = 0; i < count; ++i)
      if (wide)
        dots<1, JR>(x + i * ldx, ldx, a + j * k, k, scale, out + i * ldo + j, ldo);
      else
        for (int64_t q = j; q < r; ++q) dots<1, 1>(x + i * ldx, ldx, a + q * k, k, scale, out + i * ldo + q, ldo);
  }
}

// One span of out (m, r) = scale * drop(x) (m, k) a (r, k)^T.
template <class X, class L>
inline void project(const X* x, int64_t ldx, const Rows& rows, const Span& g, const L* a, int64_t r, int64_t k,
                    float scale, const Dropout& dropout, float* out, int threads) {
  constexpr int MR = 3;
  const int64_t last = g.first + g.count;
  const L* ranks = a + g.rank * k;
  if (dropout.on) scale *= dropout.scale;
#pragma omp parallel for num_threads(g.count * g.r * k < FEW_PRODUCTS ? 1 : threads) schedule(static)
  for (int64_t i = g.first; i < last; i += MR) {
    const int64_t count = min64(MR, last - i), row = rows.at(i);
    if (!dropout.on && rows.adjoin(i, count)) {
      project_rows<MR>(x + row * ldx, ldx, count, ranks, g.r, k, scale, out + row * r + g.rank, r);
      continue;
    }
    auto* kept = static_cast<float*>(scratch(SCRATCH_ROWS, MR * k * sizeof(float)));
    auto* sums = static_cast<float*>(scratch(SCRATCH_LOW_RANK, MR * g.r * sizeof(float)));
    pack_rows(Lines<X>{x, ldx, &rows, i}, count, k, kept);
    for (int64_t p = 0; p < count && dropout.on; ++p) drop_row(dropout, dropout.key(rows.at(i + p)), 0, k, kept + p * k);
    project_rows<MR>(kept, k, count, ranks, g.r, k, scale, sums, g.r);
    for (int64_t p = 0; p < count; ++p)
      memcpy(out + rows.at(i + p) * r + g.rank, sums + p * g.r, g.r * sizeof(float));
  }
}

// An adapter matrix (rows, cols) to float.
template <class L>
inline void widen(const L* matrix, int64_t rows, int64_t cols, float* out) {
  pack_rows(Lines<L>{matrix, cols, nullptr, 0}, rows, cols, out);
}

// Its transpose (cols, rows) in float.
template <class L>
inline void widen_transposed(const L* matrix, int64_t rows, int64_t cols, float* out, int threads) {
#pragma omp parallel for num_threads(rows * cols < FEW_PRODUCTS ? 1 : threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) out[j * rows + i] = to_float(matrix[i * cols + j]);
}

// out (JR, columns) += s^T x (rows, columns) for JR ranks of s from `rank` on and two vectors of columns.
template <int JR>
inline void outer(const float* const* s, int64_t rank, const float* x, int64_t rows, float* out, int64_t ld) {
  vf acc[JR][2];
  for (int j = 0; j < JR; ++j) acc[j][0] = acc[j][1] = vzero();
  for (int64_t i = 0; i < rows; ++i) {
    const vf x0 = vload(x + i * ld), x1 = vload(x + i * ld + VW);
    for (int j = 0; j < JR; ++j) {
      const vf sv = vset(s[i][rank + j]);
      acc[j][0] = vfma(sv, x0, acc[j][0]);
      acc[j][1] = vfma(sv, x1, acc[j][1]);
    }
  }
  for (int j = 0; j < JR; ++j) {
    vstore(out + j * ld, vload(out + j * ld) + acc[j][0]);
    vstore(out + j * ld + VW, vload(out + j * ld + VW) + acc[j][1]);
  }
}

template <class X>
inline void prefetch(const X* values, int64_t count) {
  const char* at = reinterpret_cast<const char*>(values);
  for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(X)); i += 64) __builtin_prefetch(at + i, 0, 2);
}

// out = scale * s (m, r)^T drop(x) (m, columns), stored (r, columns), or (columns, r) when `transposed`.
template <class X, class L>
inline void accumulate_outer(const float* s, int64_t r, const X* x, int64_t ldx, const Rows& all,
                             int64_t columns, float scale, const Dropout& dropout, bool transposed, L* out,
                             int threads) {
  constexpr int JR = VW == 16 ? 8 : 4;  // twice as many sums, in registers
  constexpr int64_t WIDTH = 128, ROWS = 32, LD = WIDTH + 16;  // 9 cache lines apart: no two rows share a set
  constexpr int64_t AHEAD = ROWS * 2 * VW / WIDTH;            // rows of the next block to fetch per step of columns
  if (dropout.on) scale *= dropout.scale;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t col = 0; col < columns; col += WIDTH) {
    auto* sums = static_cast<float*>(scratch(SCRATCH_LOW_RANK, (r + ROWS) * LD * sizeof(float)));
    float* block = sums + r * LD;
    memset(sums, 0, (r + ROWS) * LD * sizeof(float));
    const int64_t cols = min64(WIDTH, columns - col);
    for (const Span& g : all.spans)
      for (int64_t first = 0; first < g.count; first += ROWS) {
        const int64_t rows = min64(ROWS, g.count - first);
        const float* lines[ROWS];
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t row = all.at(g.first + first + i);
          lines[i] = s + row * r;
          pack_rows(Lines<X>{x + col, ldx, nullptr, row}, 1, cols, block + i * LD);
          if (dropout.on) drop_row(dropout, dropout.key(row), col, cols, block + i * LD);
        }
        for (int64_t c = 0; c < cols; c += 2 * VW) {
          int64_t j = g.rank;
          const int64_t last = g.rank + g.r;
          for (; j + JR <= last; j += JR) outer<JR>(lines, j, block + c, rows, sums + j * LD + c, LD);
          for (; j < last; ++j) outer<1>(lines, j, block + c, rows, sums + j * LD + c, LD);
          const int64_t next = first + ROWS + c / (2 * VW) * AHEAD;  // too far apart for the hardware to foresee
          for (int64_t i = next; i < min64(next + AHEAD, g.count); ++i)
            prefetch(x + col + all.at(g.first + i) * ldx, cols);
        }
      }
    for (int64_t c = 0; c < cols; ++c)
      for (int64_t j = 0; j < r; ++j)
        store_scalar(out + (transposed ? (col + c) * r + j : j * columns + col + c), scale * sums[j * LD + c]);
  }
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora

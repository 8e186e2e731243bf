// What follows the sums of a tile: partial sums of earlier panels, the low-rank term, the bias, one rounding.
#include "micro.inl.h"

namespace fastlora {
namespace FASTLORA_ISA {

// The low-rank term of a block of rows, and the bias: S (m, r) * U (r, columns), or finished in `low`, (rows, GROUP).
// U, the bias and `low` are zero-padded to the panel's width.
struct Epilogue {
  const float* s;
  const float* u;
  const float* bias;
  const float* low;
  int64_t r, rank, ranks;  // all ranks (the width of S); the span of this block
  const Dropout& dropout;
  int64_t first;  // column of the output at which the panel starts
  const Rows& rows;
  const float* scale;  // what is stored is then z, without the bias, and, where `scaled` says, z * scale + bias
  void* scaled;
};

// U of a panel lies as a panel of the float micro-kernel does: [group of LOW_GROUP columns][r][LOW_GROUP].
constexpr int64_t LOW_GROUP = 2 * VW;
inline int64_t low_rank_place(int64_t r, int64_t col) { return col / LOW_GROUP * r * LOW_GROUP + col % LOW_GROUP; }

// The low-rank term of ROWS rows and two vectors of columns.
template <int ROWS>
inline void low_rank(const Epilogue& e, const int64_t row[ROWS], int64_t col, const float* low, int64_t ld, vf term[ROWS][2]) {
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < 2; ++v) term[i][v] = low ? vload(low + i * ld + v * VW) : vzero();
  for (int64_t j = e.rank; !low && j < e.rank + e.ranks; ++j) {
    const float* u = e.u + low_rank_place(e.r, col) + j * LOW_GROUP;
    const vf u0 = vload(u), u1 = vload(u + VW);
    for (int i = 0; i < ROWS; ++i) {
      const vf s = vset(e.s[row[i] * e.r + j]);
      term[i][0] = vfma(s, u0, term[i][0]);
      term[i][1] = vfma(s, u1, term[i][1]);
    }
  }
  if (!e.dropout.on) return;
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < 2; ++v)
      term[i][v] = vset(e.dropout.scale) * drop(e.dropout, e.dropout.key(row[i]), e.first + col + v * VW, term[i][v]);
}

// One tile of sums over one panel's depth: added to the partial sums, and on the last panel finished and stored.
struct Step {
  bool first, last;
  float* partial;  // (rows of a block, stride), by position
  int64_t stride, position;  // of the block's first row
};
constexpr Step WHOLE{true, true, nullptr, 0, 0};  // nothing to add up

template <class O>
inline void store_first(O* p, vf v, int64_t count) {
  if (count >= VW)
    vstore(p, v);
  else
    vstore_part(p, v, count);
}

// Rows `i0` on of a tile whose first row is at `position`.
template <int ROWS, class O>
inline void finish_rows(const float* tile, int64_t ld, int64_t cols, const Epilogue& e, const Step& step,
                        int64_t position, int64_t i0, int64_t col, int64_t c, O* out, int64_t ldo) {
  vf sums[ROWS][2];
  const int64_t at = i0 * ld + c;
  position += i0;
  col += c;
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < 2; ++v) {
      float* part = step.partial + (position - step.position + i) * step.stride + col + v * VW;
      sums[i][v] = vload(tile + at + i * ld + v * VW);
      if (!step.first) sums[i][v] = sums[i][v] + vload(part);
      if (!step.last) vstore(part, sums[i][v]);
    }
  if (!step.last) return;
  int64_t row[ROWS];
  for (int i = 0; i < ROWS; ++i) row[i] = e.rows.at(position + i);
  if (e.ranks) {
    vf term[ROWS][2];
    low_rank<ROWS>(e, row, col, e.low ? e.low + at : nullptr, ld, term);
    for (int i = 0; i < ROWS; ++i)
      for (int v = 0; v < 2; ++v) sums[i][v] = sums[i][v] + term[i][v];
  }
  for (int i = 0; e.bias && !e.scale && i < ROWS; ++i)
    for (int v = 0; v < 2; ++v) sums[i][v] = sums[i][v] + vload(e.bias + col + v * VW);
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < 2; ++v) {
      const int64_t place = row[i] * ldo + col + v * VW, left = cols - c - v * VW;
      if (left <= 0) continue;
      store_first(out + place, sums[i][v], left);
      if (!e.scale) continue;
      const vf z = left >= VW ? vload(out + place) : vload_part(out + place, left);
      const vf offset = e.bias ? vload(e.bias + col + v * VW) : vzero();
      store_first(static_cast<O*>(e.scaled) + place, vfma(z, vload(e.scale + col + v * VW), offset), left);
    }
}

template <class O>
inline void finish(const float* tile, int64_t ld, int64_t rows, int64_t cols, const Epilogue& e, const Step& step, int64_t position,
                   int64_t col, O* out, int64_t ldo) {
  for (int64_t c = 0; c < cols; c += 2 * VW) {
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) finish_rows<4>(tile, ld, cols, e, step, position, i, col, c, out, ldo);
    for (; i < rows; ++i) finish_rows<1>(tile, ld, cols, e, step, position, i, col, c, out, ldo);
  }
}

// U of one panel: forward scaling * B[col + c, j], backward A[j, col + c].
template <class L>
inline void pack_low_rank(const L* matrix, int64_t r, int64_t ld, bool transposed, float scaling, int64_t col,
                          int64_t cols, float* u) {
  memset(u, 0, r * PANEL_COLUMNS * sizeof(float));
  for (int64_t c = 0; c < cols; ++c)
    for (int64_t j = 0; j < r; ++j)
      u[low_rank_place(r, c) + j * LOW_GROUP] =
          scaling * to_float(transposed ? matrix[(col + c) * r + j] : matrix[j * ld + col + c]);
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora

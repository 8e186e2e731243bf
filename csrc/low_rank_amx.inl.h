// The products with a side of r on the matrix unit, for bf16 activations.
//
// The narrow operand (A, B, S or dS) is bf16 as it is when the adapter is bf16: torch rounds S there as well. A float
// adapter is split into three bf16 pieces, whose sum is exact to 2^-24, and sums are taken 512 products at a time.
#include "low_rank.inl.h"

namespace fastlora {
namespace FASTLORA_ISA {

#if defined(FASTLORA_BF16_DOT)
// v as a sum of bf16 pieces: piece p of 16 values to out + p * apart.
inline void split(vf v, int pieces, bf16* out, int64_t apart, int64_t count = 16) {
  for (int p = 0; p < pieces; ++p, out += apart) {
    const __m256i bits = _mm512_cvtepi32_epi16(vround_bits(v));
    _mm256_mask_storeu_epi16(out, first_lanes(count), bits);
    v = v - _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
}

// `rows` rows of `cols` values of a matrix: piece p of row i to out + p * apart + i * ldo.
template <class L>
inline void split_rows(const L* in, int64_t ldi, int64_t rows, int64_t cols, float scale, int pieces, bf16* out,
                       int64_t ldo, int64_t apart, int threads) {
#pragma omp parallel for num_threads(rows * cols < FEW_PRODUCTS ? 1 : threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < cols; c += 16) {
      const int64_t count = min64(16, cols - c);
      const L* p = in + i * ldi + c;
      split(vset(scale) * (count == 16 ? vload(p) : vload_part(p, count)), pieces, out + i * ldo + c, apart, count);
    }
}
#endif

#if defined(__AMX_BF16__)
constexpr int64_t TILE_TOKENS = 32;  // fewer are done sooner by low_rank.inl.h

// The ranks of each span of `matrix` in pieces. By rank (r, length): piece p of rank j is row p * r + j.
// Else (length, r): piece p of rank j is column p * r + j. `expand`: pieces 0, 0, 1, which meet S in pieces 0, 1, 0.
template <class L>
inline std::vector<Narrow> narrow(const Segments& segments, const L* matrix, int64_t r, int64_t length, bool by_rank, bool expand,
                     int pieces, ScratchSlot slot, int threads) {
  std::vector<Narrow> out;
  int64_t total = 0;
  for (const Segment& s : segments.spans) total += pieces * s.r * length;
  bf16* to = static_cast<bf16*>(scratch(slot, total * sizeof(bf16)));
  if (is_bf16<L> && segments.spans.size() == 1 && segments.spans[0].r == r)  // as it is
    return {{reinterpret_cast<const bf16*>(matrix), r}};
  for (const Segment& s : segments.spans) {
    const L* from = by_rank ? matrix + s.rank * length : matrix + s.rank;
    const int64_t rows = by_rank ? s.r : length, cols = by_rank ? length : s.r;
    const int64_t ldo = by_rank ? length : pieces * s.r, apart = by_rank ? s.r * length : s.r;
    const bool twice = expand && pieces == 3;
    split_rows(from, by_rank ? length : r, rows, cols, 1.0f, twice ? 2 : pieces, to + (twice ? apart : 0), ldo, apart,
               threads);
    for (int64_t i = 0; twice && i < rows; ++i) memcpy(to + i * ldo, to + apart + i * ldo, cols * sizeof(bf16));
    out.push_back({to, pieces * s.r});
    to += pieces * s.r * length;
  }
  return out;
}

// Row `row` of x, dropped out, in bf16.
inline void drop_row(const Dropout& d, uint32_t key, int64_t col, int64_t count, const bf16* x, bf16* out) {
  for (int64_t c = 0; c < count; c += 16) {
    const __mmask16 inside = first_lanes(min64(16, count - c));
    const __mmask16 kept = keep(d, key, col + c) & inside;
    _mm256_mask_storeu_epi16(out + c, inside, _mm256_maskz_loadu_epi16(kept, x + c));
  }
}

// One segment of out (m, r) = scale * drop(x) (m, k) narrow^T, where `narrow` is W for pack_panel_forward or, when
// `backward`, for pack_panel_backward.
inline void project_tiles(const bf16* x, int64_t ldx, const Segment& g, const fastlora_weight& narrow, bool backward,
                          int pieces, int64_t r, float scale, const Dropout& dropout, float* out, int threads) {
  const int64_t reduction = backward ? narrow.n : narrow.k, columns = pieces * g.r, ld = round_up(columns, 32);
  const int64_t deepest = pieces == 1 ? 2048 : 512, last = g.row + g.rows;
  if (dropout.on) scale *= dropout.scale;
  bf16* panel = static_cast<bf16*>(scratch(SCRATCH_OPERAND, ld * deepest * sizeof(bf16) + g.rows * ld * sizeof(float)));
  float* sums = reinterpret_cast<float*>(panel + ld * deepest);
#pragma omp parallel num_threads(threads)
  {
    MatrixUnit unit;
    auto* rows = static_cast<bf16*>(scratch(SCRATCH_ROWS, 32 * (deepest > CHUNK ? deepest : CHUNK) * sizeof(bf16)));
    auto* kept = static_cast<bf16*>(scratch(SCRATCH_PANEL, 32 * deepest * sizeof(bf16)));
    alignas(64) float tile[32 * 32];
    for (int64_t red = 0; red < reduction; red += deepest) {
      const int64_t depth = min64(deepest, reduction - red), stride = round_up(depth, 32);
#pragma omp for schedule(static)
      for (int64_t c = 0; c < columns; c += 16)
        if (backward)
          pack_panel_backward(narrow, c, min64(16, columns - c), red, depth, FASTLORA_BF16, rows, panel + c * stride);
        else
          pack_panel_forward(narrow, c, min64(16, columns - c), red, depth, FASTLORA_BF16, rows, panel + c * stride);
#pragma omp for schedule(static)
      for (int64_t row = g.row; row < last; row += 32) {
        const int64_t count = min64(32, last - row);
        const bf16* a = x + row * ldx + red;
        int64_t lda = ldx;
        for (int64_t i = 0; dropout.on && i < count; ++i)
          drop_row(dropout, dropout.key(row + i), red, depth, a + i * ldx, kept + i * deepest);
        if (dropout.on) a = kept, lda = deepest;
        const bool direct = in_place<bf16>(count, depth);
        if (!direct) pack_rows(a, lda, count, depth, rows);
        for (int64_t c = 0; c < ld; c += 32) {
          micro(direct ? a : rows, direct ? lda : PACKED, count, depth, panel + c * stride, tile);
          for (int64_t i = 0; i < count; ++i)
            for (int64_t v = 0; v < 32; v += 16) {
              float* sum = sums + (row - g.row + i) * ld + c + v;
              const vf here = vload(tile + i * 32 + v);
              vstore(sum, red ? vload(sum) + here : here);
            }
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < g.rows; ++i)
      for (int64_t j = 0; j < g.r; j += 16) {
        const int64_t count = min64(16, g.r - j);
        vf sum = vzero();
        for (int p = pieces - 1; p >= 0; --p) sum = sum + vload_part(sums + i * ld + p * g.r + j, count);
        vstore_part(out + (g.row + i) * r + g.rank + j, vset(scale) * sum, count);
      }
  }
}

// S (m, r) as rows of bf16 for the epilogue: the ranks of a row's span in pieces 0, 1, 0 from column 0 on.
inline void tile_rows_of(const Segments& segments, const float* s, int64_t m, int64_t r, float scale, int pieces,
                         bf16* out, int64_t ld, int threads) {
  memset(out + m * ld, 0, 32 * ld * sizeof(bf16));  // read with the last rows
  for (const Segment& g : segments.rows) {
#pragma omp parallel for num_threads(g.rows * g.r < FEW_PRODUCTS ? 1 : threads) schedule(static)
    for (int64_t i = g.row; i < g.row + g.rows; ++i) {
      bf16* line = out + i * ld;
      split_rows(s + i * r + g.rank, r, 1, g.r, scale, pieces == 3 ? 2 : 1, line, ld, g.r, 1);
      if (pieces == 3) memcpy(line + 2 * g.r, line, g.r * sizeof(bf16));
      memset(line + pieces * g.r, 0, (ld - pieces * g.r) * sizeof(bf16));
    }
  }
}

// s^T of one span's rows in pieces: row p * r + j is piece p of rank j, `ld` values long, zero beyond the rows.
// Called by all threads of a parallel region.
inline void transpose_split(const float* s, int64_t r, const Segments& all, const Segment& g, int pieces, bf16* out,
                            int64_t ld) {
#pragma omp for schedule(static) nowait
  for (int64_t i = 0; i < ld; i += 16)
    for (int64_t j = 0; j < g.r; j += 16) {
      const int64_t count = min64(16, g.r - j), left = g.rows - i;
      __m512i lanes[16];
      for (int q = 0; q < 16; ++q)
        lanes[q] = q < left ? _mm512_castps_si512(vload_part(s + all.at(g, i + q) * r + g.rank + j, count))
                            : _mm512_setzero_si512();
      transpose16(lanes);
      for (int64_t q = 0; q < count; ++q)
        split(_mm512_castsi512_ps(lanes[q]), pieces, out + (j + q) * ld + i, g.r * ld);
    }
}

// Columns [col, col + cols) of x, rows [first, first + count) of a span, in pairs of rows as pack_panel_backward
// leaves a weight.
inline void pack_pairs(const bf16* x, int64_t ldx, const Segments& all, const Segment& g, int64_t first, int64_t count,
                       int64_t col, int64_t cols, const Dropout& dropout, bf16* rows, bf16* panel) {
  const int64_t stride = round_up(count, 32) * 16, width = round_up(cols, 16);
  for (int64_t r = 0; r < count; r += 32) {
    for (int64_t i = 0; i < 32; ++i) {
      bf16* line = rows + i * PANEL_COLUMNS;
      const int64_t filled = r + i < count ? cols : 0;
      const int64_t row = filled ? all.at(g, first + r + i) : 0;
      if (filled && dropout.on)
        drop_row(dropout, dropout.key(row), col, cols, x + row * ldx + col, line);
      else if (filled)
        memcpy(line, x + row * ldx + col, cols * sizeof(bf16));
      memset(line + filled, 0, (width - filled) * sizeof(bf16));
    }
    for (int64_t c = 0; c < width; c += 16) interleave_rows(rows + c, panel + c / 16 * stride + r * 16);
  }
}

// out (cols, r) = scale * sums (r, PANEL_COLUMNS)^T
template <class L>
inline void store_transposed(const float* sums, int64_t r, int64_t cols, float scale, L* out) {
  for (int64_t c = 0; c < cols; c += 16)
    for (int64_t j = 0; j < r; j += 16) {
      const int64_t count = min64(16, r - j);
      __m512i lanes[16];
      for (int64_t q = 0; q < 16; ++q)
        lanes[q] = q < count ? _mm512_castps_si512(vset(scale) * vload(sums + (j + q) * PANEL_COLUMNS + c))
                             : _mm512_setzero_si512();
      transpose16(lanes);
      for (int64_t q = 0; q < min64(16, cols - c); ++q)
        vstore_part(out + (c + q) * r + j, _mm512_castsi512_ps(lanes[q]), count);
    }
}

// out = scale * s (m, r)^T drop(x) (m, columns), stored (r, columns), or (columns, r) when `transposed`.
template <class L>
inline void outer_tiles(const float* s, int64_t r, const bf16* x, int64_t ldx, const Segments& segments,
                        int64_t columns, float scale, int pieces, const Dropout& dropout, bool transposed, L* out,
                        int threads) {
  constexpr int64_t WIDTH = PANEL_COLUMNS;
  const int64_t deepest = pieces == 1 ? 2048 : 512;
  if (dropout.on) scale *= dropout.scale;
  std::vector<Narrow> left;  // each span's s^T, a row `width` values long
  int64_t total = 0;
  for (const Segment& g : segments.spans) {
    left.push_back({nullptr, round_up(g.rows, 32)});
    total += round_up(pieces * g.r, 32) * left.back().width;
  }
  const bf16* next = static_cast<bf16*>(scratch(SCRATCH_OPERAND, total * sizeof(bf16)));
  for (size_t q = 0; q < left.size(); ++q) {
    left[q].data = next;
    next += round_up(pieces * segments.spans[q].r, 32) * left[q].width;
  }
  const int64_t width = min64(WIDTH, round_up((columns + 2 * threads - 1) / (2 * threads), 32));
#pragma omp parallel num_threads(threads)
  {
    for (size_t q = 0; q < left.size(); ++q)
      transpose_split(s, r, segments, segments.spans[q], pieces, const_cast<bf16*>(left[q].data), left[q].width);
#pragma omp barrier
    MatrixUnit unit;
    auto* rows = static_cast<bf16*>(scratch(SCRATCH_ROWS, 32 * WIDTH * sizeof(bf16)));
    auto* panel = static_cast<bf16*>(scratch(SCRATCH_PANEL, WIDTH * deepest * sizeof(bf16)));
    auto* sums = static_cast<float*>(scratch(SCRATCH_LOW_RANK, r * WIDTH * sizeof(float)));
    alignas(64) float tile[32 * 32];
#pragma omp for schedule(dynamic, 1)
    for (int64_t col = 0; col < columns; col += width) {
      const int64_t cols = min64(width, columns - col);
      memset(sums, 0, r * WIDTH * sizeof(float));
      for (size_t q = 0; q < left.size(); ++q) {
        const Segment& g = segments.spans[q];
        for (int64_t red = 0; red < g.rows && g.r; red += deepest) {
          const int64_t depth = min64(deepest, g.rows - red), stride = round_up(depth, 32);
          pack_pairs(x, ldx, segments, g, red, depth, col, cols, dropout, rows, panel);
          for (int64_t p = 0; p < pieces * g.r; p += 32) {
            const int64_t count = min64(32, pieces * g.r - p);
            for (int64_t c = 0; c < cols; c += 32) {
              const Product product{left[q].data + p * left[q].width + red, left[q].width, panel + c * stride, stride};
              multiply(&product, 1, count, tile);
              for (int64_t i = 0; i < count; ++i)
                for (int64_t v = 0; v < 32; v += 16) {
                  float* sum = sums + (g.rank + (p + i) % g.r) * WIDTH + c + v;
                  vstore(sum, vload(sum) + vload(tile + i * 32 + v));
                }
            }
          }
        }
      }
      if (transposed)
        store_transposed(sums, r, cols, scale, out + col * r);
      else
        for (int64_t j = 0; j < r; ++j)
          for (int64_t c = 0; c < cols; c += 16)
            vstore_part(out + j * columns + col + c, vset(scale) * vload(sums + j * WIDTH + c), min64(16, cols - c));
    }
  }
}
#endif

}  // namespace FASTLORA_ISA
}  // namespace fastlora

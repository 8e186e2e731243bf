// The products with a side of r on the matrix unit, for bf16 activations.
//
// The narrow operand (A, B, S or dS) is bf16 as it is when the adapter is bf16: torch rounds S there as well. A float
// adapter is split into three bf16 pieces, whose sum is exact to 2^-24, and sums are taken 512 products at a time.
// Pieces of a product with an infinity may be a NaN in sum: where that shows, low_rank.inl.h computes it again.
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

// `cols` values of a row: piece p to out + p * apart.
template <class L>
inline void split_row(const L* in, int64_t cols, float scale, int pieces, bf16* out, int64_t apart) {
  for (int64_t c = 0; c < cols; c += 16) {
    const int64_t count = min64(16, cols - c);
    split(vset(scale) * (count == 16 ? vload(in + c) : vload_part(in + c, count)), pieces, out + c, apart, count);
  }
}

// `rows` rows of a matrix: piece p of row i to out + p * apart + i * ldo. Not for use in a parallel region.
template <class L>
inline void split_rows(const L* in, int64_t ldi, int64_t rows, int64_t cols, float scale, int pieces, bf16* out,
                       int64_t ldo, int64_t apart, int threads) {
#pragma omp parallel for num_threads(rows * cols < FEW_PRODUCTS ? 1 : threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i) split_row(in + i * ldi, cols, scale, pieces, out + i * ldo, apart);
}
#endif

#if defined(__AMX_BF16__)
constexpr int64_t TILE_TOKENS = 32;  // fewer are done sooner by low_rank.inl.h

template <class L>
inline bool all_finite(const L*, int64_t) {
  return true;  // not split
}
inline bool all_finite(const float* values, int64_t count) {
  bool any = false;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    memcpy(&bits, values + i, 4);
    any |= (bits & 0x7f800000u) == 0x7f800000u;
  }
  return !any;
}

// The ranks of each span of `matrix` in pieces. By rank (r, length): piece p of rank j is row p * r + j.
// Else (length, r): piece p of rank j is column p * r + j. `expand`: pieces 0, 0, 1, which meet S in pieces 0, 1, 0.
template <class L>
inline std::vector<Narrow> narrow(const Rows& rows_of, const L* matrix, int64_t r, int64_t length, bool by_rank, bool expand,
                     int pieces, ScratchSlot slot, int threads) {
  std::vector<Narrow> out;
  int64_t total = 0;
  for (const Span& s : rows_of.spans) total += pieces * s.r * length;
  bf16* to = static_cast<bf16*>(scratch(slot, total * sizeof(bf16)));
  if (is_bf16<L> && rows_of.spans.size() == 1 && rows_of.spans[0].r == r)  // as it is
    return {{reinterpret_cast<const bf16*>(matrix), r}};
  for (const Span& s : rows_of.spans) {
    out.push_back({to, pieces * s.r});
    to += pieces * s.r * length;
  }
  const bool twice = expand && pieces == 3;
  const int taken = twice ? 2 : pieces;
  for (size_t q = 0; q < out.size(); ++q) {
    const Span& s = rows_of.spans[q];
    bf16* start = const_cast<bf16*>(out[q].data);
    const L* from = by_rank ? matrix + s.rank * length : matrix + s.rank;
    const int64_t rows = by_rank ? s.r : length, cols = by_rank ? length : s.r;
    const int64_t ldo = by_rank ? length : pieces * s.r, apart = by_rank ? s.r * length : s.r;
    split_rows(from, by_rank ? length : r, rows, cols, 1.0f, taken, start + (twice ? apart : 0), ldo, apart, threads);
    for (int64_t i = 0; twice && i < rows; ++i)
      memcpy(start + i * ldo, start + apart + i * ldo, cols * sizeof(bf16));
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

// The rows at 32 or fewer positions, of one span.
struct Block {
  int64_t position, count;
  const Span* span;
};

inline std::vector<Block> blocks_of(const Rows& rows) {
  std::vector<Block> out;
  for (const Span& g : rows.spans)
    for (int64_t i = 0; i < g.count && g.r; i += 32) out.push_back({g.first + i, min64(32, g.count - i), &g});
  return out;
}

// out (m, r) = scale * drop(x) (m, length) narrow, each row with the ranks of its span alone: narrow is (width, length)
// `by_rank`, else (length, width), per span.
struct Projection {
  const bf16* x;
  int64_t ldx, length;
  const Rows& all;
  const std::vector<Narrow>& narrow;
  bool by_rank;
  int pieces;
  int64_t r;
  float scale;
  const Dropout& dropout;
  float* out;
};

// The panel of one span over `depth` reductions from `red` on; called by all threads.
inline void pack_narrow(const Projection& p, const Narrow& from, int64_t red, int64_t depth, bf16* rows, bf16* panel) {
  fastlora_weight w = {};
  w.n = p.by_rank ? from.width : p.length, w.k = p.by_rank ? p.length : from.width;
  w.dtype = FASTLORA_BF16, w.data = from.data;
  const int64_t stride = round_up(depth, 32);
#pragma omp for schedule(static) nowait
  for (int64_t c = 0; c < from.width; c += 16)
    if (p.by_rank)
      pack_panel_forward(w, c, min64(16, from.width - c), red, depth, FASTLORA_BF16, rows, panel + c * stride);
    else
      pack_panel_backward(w, c, min64(16, from.width - c), red, depth, FASTLORA_BF16, rows, panel + c * stride);
}

// Sums of a block over one depth, added to those of earlier ones.
inline void project_block(const Projection& p, const Block& b, const bf16* panel, int64_t red, int64_t depth,
                          bf16* rows, bf16* kept, float* sums, int64_t ld) {
  alignas(64) float tile[32 * 32];
  const bf16* a = p.x + p.all.at(b.position) * p.ldx + red;
  int64_t lda = p.ldx;
  Lines<bf16> lines{p.x + red, p.ldx, &p.all, b.position};
  bool direct = in_place<bf16>(b.count, depth) && p.all.adjoin(b.position, b.count);
  if (p.dropout.on) {
    for (int64_t i = 0; i < b.count; ++i)
      drop_row(p.dropout, p.dropout.key(p.all.at(b.position + i)), red, depth, lines[i], kept + i * depth);
    a = kept, lda = depth;
    lines = {kept, depth, nullptr, 0};
    direct = in_place<bf16>(b.count, depth);
  }
  if (!direct) pack_rows(lines, b.count, depth, rows);
  for (int64_t c = 0; c < p.pieces * b.span->r; c += 32) {
    micro(direct ? a : rows, direct ? lda : PACKED, b.count, depth, panel + c * round_up(depth, 32), tile);
    for (int64_t i = 0; i < b.count; ++i)
      for (int64_t v = 0; v < 32; v += 16) {
        float* sum = sums + i * ld + c + v;
        const vf here = vload(tile + i * 32 + v);
        vstore(sum, red ? vload(sum) + here : here);
      }
  }
}

inline void add_pieces(const Projection& p, const Block& b, const float* sums, int64_t ld) {
  const Span& g = *b.span;
  const float scale = p.dropout.on ? p.scale * p.dropout.scale : p.scale;
  for (int64_t i = 0; i < b.count; ++i)
    for (int64_t j = 0; j < g.r; j += 16) {
      const int64_t count = min64(16, g.r - j);
      vf sum = vzero();
      for (int q = p.pieces - 1; q >= 0; --q) sum = sum + vload_part(sums + i * ld + q * g.r + j, count);
      vstore_part(p.out + p.all.at(b.position + i) * p.r + g.rank + j, vset(scale) * sum, count);
    }
}

inline void project_tiles(const Projection& p, int64_t m, int threads) {
  const int64_t deepest = p.pieces == 1 ? 2048 : 512;
  int64_t widest = 0;
  std::vector<Row> at;  // where each span's panel begins
  int64_t total = 0;
  for (const Narrow& span : p.narrow) {
    at.push_back({total});
    total += round_up(span.width, 32) * deepest;
    widest = span.width > widest ? span.width : widest;
  }
  const int64_t ld = round_up(widest, 32), kept_sums = p.length > deepest ? m : 0;
  auto* panels = static_cast<bf16*>(scratch(SCRATCH_OPERAND, total * sizeof(bf16) + kept_sums * ld * sizeof(float)));
  float* all_sums = reinterpret_cast<float*>(panels + total);
  const std::vector<Block> blocks = blocks_of(p.all);
#pragma omp parallel num_threads(threads)
  {
    MatrixUnit unit;
    auto* rows = static_cast<bf16*>(scratch(SCRATCH_ROWS, 32 * (deepest > CHUNK ? deepest : CHUNK) * sizeof(bf16)));
    auto* kept = static_cast<bf16*>(scratch(SCRATCH_PANEL, 32 * deepest * sizeof(bf16)));
    auto* own = static_cast<float*>(scratch(SCRATCH_LOW_RANK, 32 * ld * sizeof(float)));
    for (int64_t red = 0; red < p.length; red += deepest) {
      const int64_t depth = min64(deepest, p.length - red);
      for (size_t q = 0; q < at.size(); ++q) pack_narrow(p, p.narrow[q], red, depth, rows, panels + at[q].index);
#pragma omp barrier
#pragma omp for schedule(static)
      for (size_t i = 0; i < blocks.size(); ++i) {
        float* sums = kept_sums ? all_sums + blocks[i].position * ld : own;
        project_block(p, blocks[i], panels + at[blocks[i].span->id].index, red, depth, rows, kept, sums, ld);
        if (red + depth == p.length) add_pieces(p, blocks[i], sums, ld);
      }
    }
  }
}

// S (m, r) as rows of bf16 for the epilogue, by position: the ranks of a row's span in pieces 0, 1, 0 from column 0 on.
inline void tile_rows_of(const Rows& rows, const float* s, int64_t m, int64_t r, float scale, int pieces,
                         bf16* out, int64_t ld, int threads) {
  memset(out + m * ld, 0, 32 * ld * sizeof(bf16));  // read with the last rows
#pragma omp parallel num_threads(m * r < FEW_PRODUCTS ? 1 : threads)
  for (const Span& g : rows.spans) {
#pragma omp for schedule(static) nowait
    for (int64_t i = g.first; i < g.first + g.count; ++i) {
      bf16* line = out + i * ld;
      split_row(s + rows.at(i) * r + g.rank, g.r, scale, pieces == 3 ? 2 : 1, line, g.r);
      if (pieces == 3) memcpy(line + 2 * g.r, line, g.r * sizeof(bf16));
      memset(line + pieces * g.r, 0, (ld - pieces * g.r) * sizeof(bf16));
    }
  }
}

// s^T of one span's rows in pieces: row p * r + j is piece p of rank j, `ld` values long, zero beyond the rows.
// Called by all threads of a parallel region.
inline void transpose_split(const float* s, int64_t r, const Rows& all, const Span& g, int pieces, bf16* out,
                            int64_t ld) {
#pragma omp for schedule(static) nowait
  for (int64_t i = 0; i < ld; i += 16)
    for (int64_t j = 0; j < g.r; j += 16) {
      const int64_t count = min64(16, g.r - j), left = g.count - i;
      __m512i lanes[16];
      for (int q = 0; q < 16; ++q)
        lanes[q] = q < left ? _mm512_castps_si512(vload_part(s + all.at(g.first + i + q) * r + g.rank + j, count))
                            : _mm512_setzero_si512();
      transpose16(lanes);
      for (int64_t q = 0; q < count; ++q)
        split(_mm512_castsi512_ps(lanes[q]), pieces, out + (j + q) * ld + i, g.r * ld);
    }
}

// Columns [col, col + cols) of x, rows [first, first + count) of a span, in pairs of rows as pack_panel_backward
// leaves a weight.
inline void pack_pairs(const bf16* x, int64_t ldx, const Rows& all, const Span& g, int64_t first, int64_t count,
                       int64_t col, int64_t cols, const Dropout& dropout, bf16* rows, bf16* panel) {
  const int64_t stride = round_up(count, 32) * 16, width = round_up(cols, 16);
  for (int64_t r = 0; r < count; r += 32) {
    for (int64_t i = 0; i < 32; ++i) {
      bf16* line = rows + i * PANEL_COLUMNS;
      const int64_t filled = r + i < count ? cols : 0;
      const int64_t row = filled ? all.at(g.first + first + r + i) : 0;
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
inline void outer_tiles(const float* s, int64_t r, const bf16* x, int64_t ldx, const Rows& all,
                        int64_t columns, float scale, int pieces, const Dropout& dropout, bool transposed, L* out,
                        int threads) {
  constexpr int64_t WIDTH = PANEL_COLUMNS;
  const int64_t deepest = pieces == 1 ? 2048 : 512;
  if (dropout.on) scale *= dropout.scale;
  std::vector<Narrow> left;  // each span's s^T, a row `width` values long
  int64_t total = 0;
  for (const Span& g : all.spans) {
    left.push_back({nullptr, round_up(g.count, 32)});
    total += round_up(pieces * g.r, 32) * left.back().width;
  }
  const bf16* next = static_cast<bf16*>(scratch(SCRATCH_OPERAND, total * sizeof(bf16)));
  for (size_t q = 0; q < left.size(); ++q) {
    left[q].data = next;
    next += round_up(pieces * all.spans[q].r, 32) * left[q].width;
  }
  const int64_t width = min64(WIDTH, round_up((columns + 2 * threads - 1) / (2 * threads), 32));
#pragma omp parallel num_threads(threads)
  {
    for (size_t q = 0; q < left.size(); ++q)
      transpose_split(s, r, all, all.spans[q], pieces, const_cast<bf16*>(left[q].data), left[q].width);
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
        const Span& g = all.spans[q];
        for (int64_t red = 0; red < g.count && g.r; red += deepest) {
          const int64_t depth = min64(deepest, g.count - red), stride = round_up(depth, 32);
          pack_pairs(x, ldx, all, g, red, depth, col, cols, dropout, rows, panel);
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

// out (m, columns) = A (m, reduction) * panel + bias + drop(S U), one thread per panel of columns.
//
// Each element is summed in one fixed order by one thread, so results do not depend on the number of threads.
// The weight is decoded once per panel, or, where a panel does not hold the whole reduction, once per panel and block
// of rows; the panel, the packed rows of A and the partial sums stay in cache.
#include "epilogue.inl.h"

namespace fastlora {
namespace FASTLORA_ISA {

// A bf16 matrix with one side of `width` ranks.
struct Narrow {
  const bf16* data;
  int64_t width;
};

// The low-rank term for the matrix unit: S and U in bf16, one operand per span (low_rank_amx.inl.h).
struct TileTerm {
  const bf16* s;  // (m, lds) by position, the ranks of a row's span from column 0 on
  int64_t lds;
  const std::vector<Narrow>& factors;  // per span: (n, width) forward, (width, k) backward
};

// A factor for each output, found from the panels as they pass (norms.inl.h).
struct Factors {
  // Takes a panel of columns [col, col + cols); after the last one they are in `factors`, (PANEL_COLUMNS).
  virtual void take(const void* panel, void* rows, int64_t red, int64_t depth, const Step& step, int64_t col,
                    int64_t cols, float* factors) const = 0;
};

// What the two directions share. `backward`: A is dy, columns are W's columns; else A is x, columns are W's rows.
// Several parts, each a matrix A and a weight with the same columns, are summed.
template <class T>
struct Part {
  const T* a;
  int64_t lda;
  const fastlora_weight* w;
};
template <class T, class O>
struct Gemm {
  const Part<T>* parts;
  int count;
  int64_t m;
  bool backward;
  const fastlora_lora& lora;
  const Rows& rows;
  const float* s;         // (m, r)
  const TileTerm* tiles;  // in place of s, where the matrix unit adds the term
  const float* bias;
  O* out;
  int threads;
  int32_t rounding = dtype_of<T>;  // of decoded weights
  const Factors* factors = nullptr;  // then `out` has no bias, and scaled = out * factors + bias
  O* scaled = nullptr;

  int64_t columns() const { return backward ? parts->w->k : parts->w->n; }
  int64_t reduction(int part) const { return backward ? parts[part].w->n : parts[part].w->k; }
};

// Buffers of one thread for one panel.
template <class Compute>
struct Workspace {
  int64_t block, stride;  // of the partial sums: rows, and columns from one row to the next
  Compute *panel, *rows;
  float *partial, *bias, *u, *factors;
  std::vector<Narrow> low_panels;  // per span
};

template <class Compute, class T, class O>
inline Workspace<Compute> workspace(const Gemm<T, O>& g, int64_t col, int64_t cols) {
  using S = Shape<Compute>;
  int64_t deepest = 0, steps = 0;
  for (int i = 0; i < g.count; ++i) {
    const int64_t depth = round_up(min64(S::DEPTH, g.reduction(i)), 32);
    deepest = depth > deepest ? depth : deepest;
    steps += (g.reduction(i) + S::DEPTH - 1) / S::DEPTH;
  }
  Workspace<Compute> s{};
  s.panel = static_cast<Compute*>(scratch(SCRATCH_PANEL, PANEL_COLUMNS * deepest * sizeof(Compute)));
  // rows of W while packing, then rows of A: never both
  constexpr int64_t weight_rows = 32 * CHUNK;
  const int64_t rows = S::ROWS * deepest > weight_rows ? S::ROWS * deepest : weight_rows;
  s.rows = static_cast<Compute*>(scratch(SCRATCH_ROWS, rows * sizeof(Compute)));
  s.block = steps > 1 ? min64(S::BLOCK, g.m) : g.m;
  s.stride = round_up(cols, S::GROUP);
  if (steps > 1) s.partial = static_cast<float*>(scratch(SCRATCH_PARTIAL, s.block * s.stride * sizeof(float)));
  const int64_t ranks = g.tiles ? 0 : g.lora.r;
  auto* low = static_cast<float*>(scratch(SCRATCH_LOW_RANK, (ranks + 1) * PANEL_COLUMNS * sizeof(float)));
  if (g.bias) {
    memcpy(low, g.bias + col, cols * sizeof(float));
    memset(low + cols, 0, (PANEL_COLUMNS - cols) * sizeof(float));
    s.bias = low;
  }
  if (!ranks) return s;
  s.u = low + PANEL_COLUMNS;
  const void* matrix = g.backward ? g.lora.a : g.lora.b;
  const float scaling = g.backward ? 1.0f : g.lora.scaling;
  as_type(g.lora.dtype, matrix, [&](auto* values) {
    pack_low_rank(values, ranks, g.columns(), !g.backward, scaling, col, cols, s.u);
  });
  return s;
}

#if defined(__AMX_BF16__)
// `cols` rows of `width` ranks, one beside the other, to a panel: what pack_panel_forward makes of a dense weight.
inline void pack_ranks(const bf16* rows, int64_t width, int64_t cols, bf16* panel) {
  const int64_t stride = round_up(width, 32);
  for (int64_t c = 0; c < cols; c += 16)
    for (int64_t j = 0; j < width; j += 32) {
      const int64_t count = min64(32, width - j);
      const auto inside = static_cast<__mmask32>((uint64_t{1} << count) - 1);
      __m512i lanes[16];
      for (int64_t i = 0; i < 16; ++i)
        lanes[i] = c + i < cols ? _mm512_maskz_loadu_epi16(inside, rows + (c + i) * width + j) : _mm512_setzero_si512();
      transpose16(lanes);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(panel + c * stride + j * 16 + i * 32, lanes[i]);
    }
}

// U of one panel, per span, as the matrix unit reads it.
template <class T, class O>
inline void pack_low_panels(const Gemm<T, O>& g, int64_t col, int64_t cols, Workspace<bf16>& s) {
  int64_t total = 0;
  for (const Narrow& factor : g.tiles->factors) total += round_up(factor.width, 32);
  bf16* panel = static_cast<bf16*>(scratch(SCRATCH_LOW_PANEL, total * PANEL_COLUMNS * sizeof(bf16)));
  for (const Narrow& factor : g.tiles->factors) {
    const int64_t depth = factor.width;
    fastlora_weight u = {};
    u.n = g.backward ? depth : g.columns(), u.k = g.backward ? g.columns() : depth;
    u.dtype = FASTLORA_BF16, u.data = factor.data;
    if (depth && g.backward) pack_panel_backward(u, col, cols, 0, depth, FASTLORA_BF16, s.rows, panel);
    if (depth && !g.backward) pack_ranks(factor.data + col * depth, depth, cols, panel);
    s.low_panels.push_back({panel, depth});
    panel += round_up(depth, 32) * PANEL_COLUMNS;
  }
}
#endif

// The rows at `count` positions of the output, all of one span, over the depth of one panel.
template <class Compute, class T, class O>
inline void row_block(const Gemm<T, O>& g, const Workspace<Compute>& s, const Part<T>& part, int64_t red,
                      int64_t depth, const Step& step, const Span& span, const Dropout& dropout, int64_t position,
                      int64_t count, int64_t col, int64_t cols) {
  constexpr int GROUP = Shape<Compute>::GROUP;
  alignas(64) float tile[Shape<Compute>::ROWS * GROUP];
  Epilogue e{g.s, s.u, s.bias, nullptr, g.lora.r, span.rank, span.r, dropout, col, g.rows, s.factors, g.scaled + col};
  const int64_t stride = sizeof(Compute) == 2 ? round_up(depth, 32) : depth;
  const T* a = part.a + g.rows.at(position) * part.lda + red;
  const bool direct = in_place<Compute, T>(count, depth) && g.rows.adjoin(position, count);
  if (!direct) pack_rows(Lines<T>{part.a + red, part.lda, &g.rows, position}, count, depth, s.rows);
  const float* low = nullptr;  // the low-rank term, where it is a product of the float micro-kernel like any other
  if (std::is_same<Compute, float>::value && span.r && !dropout.on && g.rows.adjoin(position, count)) {
    low = g.s + g.rows.at(position) * g.lora.r + span.rank;
    e.ranks = 0;
  }
  for (int64_t c = 0; c < cols; c += GROUP) {
    const Compute* from = direct ? reinterpret_cast<const Compute*>(a) : s.rows;
#if defined(__AMX_BF16__)
    if constexpr (is_bf16<Compute>) {
      if (g.tiles) {
        alignas(64) float low[Shape<Compute>::ROWS * GROUP];
        const Narrow& u = s.low_panels[span.id];
        const Product products[2] = {
            {from, direct ? part.lda : PACKED, s.panel + c * stride, depth},
            {g.tiles->s + position * g.tiles->lds, g.tiles->lds, u.data + c * round_up(u.width, 32), u.width}};
        const bool add = step.last && u.width;
        multiply(products, add && !dropout.on ? 2 : 1, count, tile);
        e.ranks = 0;
        if (add && dropout.on) {
          multiply(products + 1, 1, count, low);
          e.low = low, e.ranks = span.r;
        }
        finish(tile, GROUP, count, min64(GROUP, cols - c), e, step, position, c, g.out + col, g.columns());
        continue;
      }
    }
#endif
    const int64_t lda = direct ? part.lda : PACKED;
    if constexpr (std::is_same<Compute, float>::value) {  // the partial sums are the tile
      const bool whole = step.first && step.last;
      const int64_t ld = whole ? GROUP : step.stride;
      float* sums = whole ? tile : step.partial + (position - step.position) * ld + c;
      micro(from, lda, count, depth, s.panel + c * stride, sums, ld, !step.first);
      if (step.last && low) {
        const float* u = s.u + low_rank_place(g.lora.r, c) + span.rank * GROUP;
        micro(low, g.lora.r, count, span.r, u, sums, ld, true);
      }
      if (step.last) finish(sums, ld, count, min64(GROUP, cols - c), e, WHOLE, position, c, g.out + col, g.columns());
    } else {
      micro(from, lda, count, depth, s.panel + c * stride, tile);
      finish(tile, GROUP, count, min64(GROUP, cols - c), e, step, position, c, g.out + col, g.columns());
    }
  }
}

// The rows at positions [first, first + block) over the whole reduction, panel by panel.
template <class Compute, class T, class O>
inline void row_steps(const Gemm<T, O>& g, const Workspace<Compute>& s, const Dropout& dropout, int64_t first,
                      int64_t col, int64_t cols, float* factors) {
  using S = Shape<Compute>;
  const int64_t end = min64(first + s.block, g.m);
  for (int i = 0; i < g.count; ++i) {
    const int64_t reduction = g.reduction(i);
    for (int64_t red = 0; red < reduction || red == 0; red += S::DEPTH) {
      const int64_t depth = min64(S::DEPTH, reduction - red);
      const Step step{i == 0 && red == 0, i + 1 == g.count && red + depth >= reduction, s.partial, s.stride, first};
      if (g.backward)
        pack_panel_backward(*g.parts[i].w, col, cols, red, depth, g.rounding, s.rows, s.panel);
      else
        pack_panel_forward(*g.parts[i].w, col, cols, red, depth, g.rounding, s.rows, s.panel);
      if (g.factors && first == 0) g.factors->take(s.panel, s.rows, red, depth, step, col, cols, factors);
      for (const Span& span : g.rows.spans) {
        const int64_t last = min64(span.first + span.count, end);
        for (int64_t at = span.first > first ? span.first : first; at < last; at += S::ROWS)
          row_block<Compute>(g, s, g.parts[i], red, depth, step, span, dropout, at, min64(S::ROWS, last - at), col, cols);
      }
    }
  }
}

template <class Compute, class T, class O>
inline void one_panel(const Gemm<T, O>& g, int64_t col, int64_t cols) {
  Workspace<Compute> s = workspace<Compute>(g, col, cols);
#if defined(__AMX_BF16__)
  if constexpr (is_bf16<Compute>)
    if (g.tiles) pack_low_panels(g, col, cols, s);
#endif
  fastlora_lora plain = g.lora;
  if (!g.backward) plain.seed = nullptr;  // forward, the mask is in S
  const Dropout dropout(plain);
  alignas(64) float factors[PANEL_COLUMNS] = {};
  s.factors = g.factors ? factors : nullptr;
  if (g.factors && g.m == 0) row_steps(g, s, dropout, 0, col, cols, factors);  // the norms are an output
  for (int64_t first = 0; first < g.m; first += s.block) row_steps(g, s, dropout, first, col, cols, factors);
}

template <class T, class O>
inline void panel_gemm(const Gemm<T, O>& g) {
  using Compute = compute_of<T>;
  const int64_t columns = g.columns();
  // at least two panels a thread, so that neither waits long for the other
  const int64_t width = min64(PANEL_COLUMNS, round_up((columns + 2 * g.threads - 1) / (2 * g.threads), 32));
  const int64_t panels = (columns + width - 1) / width;
#pragma omp parallel num_threads(g.threads)
  {
    MatrixUnit unit;
#pragma omp for schedule(dynamic, 1)
    for (int64_t p = 0; p < panels; ++p) one_panel<Compute>(g, p * width, min64(width, columns - p * width));
  }
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora

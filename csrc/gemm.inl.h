// out (m, columns) = A (m, reduction) * panel + bias + drop(S U), one thread per panel of columns.
//
// Each element is summed in one fixed order by one thread, so results do not depend on the number of threads.
// The weight is decoded once per panel; the panel, the packed rows of A and the partial sums stay in cache.
#include "panel.inl.h"

namespace fastlora {
namespace FASTLORA_ISA {

// ---- micro-kernels: tile (rows, GROUP) = A block * panel group, float sums ----

constexpr int64_t PACKED = 0;  // in place of a leading dimension: A is as pack_rows left it

// Sums of RUN products are added to the tile, which keeps rounding errors from growing with the depth.
constexpr int64_t RUN = VW == 4 ? 16 : 32;  // shorter where there is no FMA
template <int MR>
inline void micro_float(const float* a, int64_t depth, const float* b, float* tile) {
  constexpr int GROUP = Shape<float>::GROUP;
  for (int i = 0; i < MR * GROUP; i += VW) vstore(tile + i, vzero());
  for (int64_t run = 0; run < depth; run += RUN) {
    vf acc[MR][2];
    for (int i = 0; i < MR; ++i) acc[i][0] = acc[i][1] = vzero();
    const int64_t stop = min64(run + RUN, depth);
    for (int64_t k = run; k < stop; ++k, b += GROUP) {
      const vf b0 = vload(b), b1 = vload(b + VW);
      for (int i = 0; i < MR; ++i) {
        const vf ai = vset(a[i * depth + k]);
        acc[i][0] = vfma(ai, b0, acc[i][0]);
        acc[i][1] = vfma(ai, b1, acc[i][1]);
      }
    }
    for (int i = 0; i < MR; ++i) {
      float* line = tile + i * GROUP;
      vstore(line, vload(line) + acc[i][0]);
      vstore(line + VW, vload(line + VW) + acc[i][1]);
    }
  }
}

inline void micro(const float* a, int64_t, int64_t rows, int64_t depth, const float* b, float* tile) {
  constexpr int GROUP = Shape<float>::GROUP;
  constexpr int MR = VW == 16 ? 12 : 6;
  int64_t i = 0;
  for (; i + MR <= rows; i += MR) micro_float<MR>(a + i * depth, depth, b, tile + i * GROUP);
  for (; i + 4 <= rows; i += 4) micro_float<4>(a + i * depth, depth, b, tile + i * GROUP);
  for (; i < rows; ++i) micro_float<1>(a + i * depth, depth, b, tile + i * GROUP);
}

#if defined(__AMX_BF16__)
// A product of up to 32 rows and 32 columns, added up in the tiles: A packed, or 32 rows where they lie, `lda`
// elements apart; B a panel's group of columns.
struct Product {
  const bf16* a;
  int64_t lda;
  const bf16* b;
  int64_t depth;  // reductions; A and B are zero-padded to a multiple of 32
};

// C tiles 0..3, A tiles 4..5, B tiles 6..7: 32 x 32 outputs per step of 32 reductions.
template <bool TALL>
inline void add_product(const Product& p) {
  const int64_t steps = round_up(p.depth, 32) / 32, next = steps * 512;
  const bool packed = p.lda == PACKED;
  const int64_t line = packed ? 64 : 2 * p.lda, step = packed ? 512 : 32, lower = packed ? next : 16 * p.lda;
  const bf16* a = p.a;
  for (int64_t t = 0; t < next; t += 512, a += step) {
    _tile_loadd(4, a, line);
    _tile_loadd(6, p.b + t, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, p.b + next + t, 64);
    _tile_dpbf16ps(1, 4, 7);
    if (!TALL) continue;
    _tile_loadd(5, a + lower, line);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

template <bool TALL>
inline void multiply(const Product* products, int count, float* tile) {
  _tile_zero(0);
  _tile_zero(1);
  if (TALL) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int i = 0; i < count; ++i) add_product<TALL>(products[i]);
  _tile_stored(0, tile, 128);
  _tile_stored(1, tile + 16, 128);
  if (TALL) {
    _tile_stored(2, tile + 16 * 32, 128);
    _tile_stored(3, tile + 16 * 32 + 16, 128);
  }
}

// tile (rows, 32) = sum of `count` products.
inline void multiply(const Product* products, int count, int64_t rows, float* tile) {
  if (rows > 16)
    multiply<true>(products, count, tile);
  else
    multiply<false>(products, count, tile);
}
inline void micro(const bf16* a, int64_t lda, int64_t rows, int64_t depth, const bf16* b, float* tile) {
  const Product product{a, lda, b, depth};
  multiply(&product, 1, rows, tile);
}
// The tile shapes are per-thread state; released so that a context switch need not save 8 KiB.
struct MatrixUnit {
  MatrixUnit() {
    struct alignas(64) {
      uint8_t palette, start_row, reserved[14];
      uint16_t bytes[16];
      uint8_t rows[16];
    } config = {};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
  }
  ~MatrixUnit() { _tile_release(); }
};
#else
struct MatrixUnit {
  MatrixUnit() {}
};
#if defined(FASTLORA_BF16_DOT)
template <int MR>
inline void micro_bf16(const bf16* a, int64_t steps, const bf16* b, float* tile) {
  __m512 acc[MR][2];
  for (int i = 0; i < MR; ++i) acc[i][0] = acc[i][1] = vzero();
  const bf16* b_next = b + steps * 512;
  for (int64_t t = 0; t < steps * 512; t += 512)
    for (int64_t p = 0; p < 512; p += 32) {
      const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b + t + p);
      const __m512bh b1 = (__m512bh)_mm512_loadu_si512(b_next + t + p);
      for (int i = 0; i < MR; ++i) {
        int32_t pair;
        memcpy(&pair, a + t + i * 32 + p / 16, 4);
        const __m512bh ai = (__m512bh)_mm512_set1_epi32(pair);
        acc[i][0] = _mm512_dpbf16_ps(acc[i][0], ai, b0);
        acc[i][1] = _mm512_dpbf16_ps(acc[i][1], ai, b1);
      }
    }
  for (int i = 0; i < MR; ++i) {
    vstore(tile + i * 32, acc[i][0]);
    vstore(tile + i * 32 + 16, acc[i][1]);
  }
}
inline void micro(const bf16* a, int64_t, int64_t rows, int64_t depth, const bf16* b, float* tile) {
  const int64_t steps = round_up(depth, 32) / 32;
  for (int64_t block = 0; block < rows; block += 16, a += steps * 512, tile += 16 * 32) {
    const int64_t here = min64(16, rows - block);
    int64_t i = 0;
    for (; i + 8 <= here; i += 8) micro_bf16<8>(a + i * 32, steps, b, tile + i * 32);
    for (; i < here; i += 4) micro_bf16<4>(a + i * 32, steps, b, tile + i * 32);  // rows of A are padded to 16
  }
}
#endif
#endif

// Whether rows of A can be multiplied where they lie: the matrix unit reads whole tiles at any distance.
template <class Compute>
inline bool in_place(int64_t rows, int64_t depth) {
#if defined(__AMX_BF16__)
  return sizeof(Compute) == 2 && rows == 32 && depth % 32 == 0;
#else
  (void)rows, (void)depth;
  return false;
#endif
}

// ---- epilogue ----

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
};

// The low-rank term of ROWS rows and two vectors of columns.
template <int ROWS>
inline void low_rank(const Epilogue& e, int64_t row, int64_t col, const float* low, int64_t ld, vf term[ROWS][2]) {
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < 2; ++v) term[i][v] = low ? vload(low + i * ld + v * VW) : vzero();
  for (int64_t j = e.rank; !low && j < e.rank + e.ranks; ++j) {
    const float* u = e.u + j * PANEL_COLUMNS + col;
    const vf u0 = vload(u), u1 = vload(u + VW);
    for (int i = 0; i < ROWS; ++i) {
      const vf s = vset(e.s[(row + i) * e.r + j]);
      term[i][0] = vfma(s, u0, term[i][0]);
      term[i][1] = vfma(s, u1, term[i][1]);
    }
  }
  if (!e.dropout.on) return;
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < 2; ++v)
      term[i][v] = vset(e.dropout.scale) * drop(e.dropout, e.dropout.key(row + i), e.first + col + v * VW, term[i][v]);
}

// One tile of sums over one panel's depth: added to the partial sums, and on the last panel finished and stored.
struct Step {
  bool first, last;
  float* partial;  // (m, PANEL_COLUMNS)
};

// Rows `i` on of a tile whose first row is `row`.
template <int ROWS, class O>
inline void finish_rows(const float* tile, int64_t ld, int64_t cols, const Epilogue& e, const Step& step, int64_t row,
                        int64_t i0, int64_t col, int64_t c, O* out, int64_t ldo) {
  vf sums[ROWS][2];
  const int64_t at = i0 * ld + c;
  row += i0;
  col += c;
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < 2; ++v) {
      float* part = step.partial + (row + i) * PANEL_COLUMNS + col + v * VW;
      sums[i][v] = vload(tile + at + i * ld + v * VW);
      if (!step.first) sums[i][v] = sums[i][v] + vload(part);
      if (!step.last) vstore(part, sums[i][v]);
    }
  if (!step.last) return;
  if (e.ranks) {
    vf term[ROWS][2];
    low_rank<ROWS>(e, row, col, e.low ? e.low + at : nullptr, ld, term);
    for (int i = 0; i < ROWS; ++i)
      for (int v = 0; v < 2; ++v) sums[i][v] = sums[i][v] + term[i][v];
  }
  for (int i = 0; e.bias && i < ROWS; ++i)
    for (int v = 0; v < 2; ++v) sums[i][v] = sums[i][v] + vload(e.bias + col + v * VW);
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < 2; ++v) {
      O* p = out + (row + i) * ldo + col + v * VW;
      const int64_t left = cols - c - v * VW;
      if (left >= VW)
        vstore(p, sums[i][v]);
      else if (left > 0)
        vstore_part(p, sums[i][v], left);
    }
}

template <int GROUP, class O>
inline void finish(const float* tile, int64_t rows, int64_t cols, const Epilogue& e, const Step& step, int64_t row,
                   int64_t col, O* out, int64_t ldo) {
  for (int64_t c = 0; c < cols; c += 2 * VW) {
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) finish_rows<4>(tile, GROUP, cols, e, step, row, i, col, c, out, ldo);
    for (; i < rows; ++i) finish_rows<1>(tile, GROUP, cols, e, step, row, i, col, c, out, ldo);
  }
}

// U of one panel: forward scaling * B[col + c, j], backward A[j, col + c].
template <class L>
inline void pack_low_rank(const L* matrix, int64_t r, int64_t ld, bool transposed, float scaling, int64_t col,
                          int64_t cols, float* u) {
  for (int64_t j = 0; j < r; ++j) {
    float* line = u + j * PANEL_COLUMNS;
    for (int64_t c = 0; c < cols; ++c)
      line[c] = scaling * to_float(transposed ? matrix[(col + c) * r + j] : matrix[j * ld + col + c]);
    memset(line + cols, 0, (PANEL_COLUMNS - cols) * sizeof(float));
  }
}

// A bf16 matrix with one side of `width` ranks.
struct Narrow {
  const bf16* data;
  int64_t width;
};

// The low-rank term for the matrix unit: S and U in bf16, one operand per segment and span (low_rank_amx.inl.h).
struct TileTerm {
  const bf16* s;  // (m, lds), the ranks of a row's span from column 0 on
  int64_t lds;
  const std::vector<Narrow>& factors;  // per span: (n, width) forward, (width, k) backward
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
  const Segments& segments;
  const float* s;         // (m, r)
  const TileTerm* tiles;  // in place of s, where the matrix unit adds the term
  const float* bias;
  O* out;
  int threads;
  int32_t rounding = dtype_of<T>;  // of decoded weights

  int64_t columns() const { return backward ? parts->w->k : parts->w->n; }
  int64_t reduction(int part) const { return backward ? parts[part].w->n : parts[part].w->k; }
};

// Buffers of one thread for one panel.
template <class Compute>
struct Workspace {
  Compute *panel, *rows;
  float *partial, *bias, *u;
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
  if (steps > 1) s.partial = static_cast<float*>(scratch(SCRATCH_PARTIAL, g.m * PANEL_COLUMNS * sizeof(float)));
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
    if (depth && !g.backward) pack_panel_forward(u, col, cols, 0, depth, FASTLORA_BF16, s.rows, panel);
    s.low_panels.push_back({panel, depth});
    panel += round_up(depth, 32) * PANEL_COLUMNS;
  }
}
#endif

// `count` rows of the output, over the depth of one panel, all of one segment.
template <class Compute, class T, class O>
inline void row_block(const Gemm<T, O>& g, const Workspace<Compute>& s, const Part<T>& part, int64_t red,
                      int64_t depth, const Step& step, const Segment& segment, const Dropout& dropout, int64_t row,
                      int64_t count, int64_t col, int64_t cols) {
  constexpr int GROUP = Shape<Compute>::GROUP;
  alignas(64) float tile[Shape<Compute>::ROWS * GROUP];
  Epilogue e{g.s, s.u, s.bias, nullptr, g.lora.r, segment.rank, segment.r, dropout, col};
  const int64_t stride = sizeof(Compute) == 2 ? round_up(depth, 32) : depth;
  const T* a = part.a + row * part.lda + red;
  const bool direct = in_place<Compute>(count, depth);
  if (!direct) pack_rows(a, part.lda, count, depth, s.rows);
  for (int64_t c = 0; c < cols; c += GROUP) {
    const Compute* from = direct ? reinterpret_cast<const Compute*>(a) : s.rows;
#if defined(__AMX_BF16__)
    if constexpr (is_bf16<Compute>) {
      if (g.tiles) {
        alignas(64) float low[Shape<Compute>::ROWS * GROUP];
        const Narrow& u = s.low_panels[segment.span];
        const Product products[2] = {
            {from, direct ? part.lda : PACKED, s.panel + c * stride, depth},
            {g.tiles->s + row * g.tiles->lds, g.tiles->lds, u.data + c * round_up(u.width, 32), u.width}};
        const bool add = step.last && u.width;
        multiply(products, add && !dropout.on ? 2 : 1, count, tile);
        e.ranks = 0;
        if (add && dropout.on) {
          multiply(products + 1, 1, count, low);
          e.low = low, e.ranks = segment.r;
        }
        finish<GROUP>(tile, count, min64(GROUP, cols - c), e, step, row, c, g.out + col, g.columns());
        continue;
      }
    }
#endif
    micro(from, direct ? part.lda : PACKED, count, depth, s.panel + c * stride, tile);
    finish<GROUP>(tile, count, min64(GROUP, cols - c), e, step, row, c, g.out + col, g.columns());
  }
}

template <class Compute, class T, class O>
inline void one_panel(const Gemm<T, O>& g, int64_t col, int64_t cols) {
  using S = Shape<Compute>;
  Workspace<Compute> s = workspace<Compute>(g, col, cols);
#if defined(__AMX_BF16__)
  if constexpr (is_bf16<Compute>)
    if (g.tiles) pack_low_panels(g, col, cols, s);
#endif
  fastlora_lora plain = g.lora;
  if (!g.backward) plain.seed = nullptr;  // forward, the mask is in S
  const Dropout dropout(plain);
  for (int i = 0; i < g.count; ++i) {
    const int64_t reduction = g.reduction(i);
    for (int64_t red = 0; red < reduction || red == 0; red += S::DEPTH) {
      const int64_t depth = min64(S::DEPTH, reduction - red);
      const Step step{i == 0 && red == 0, i + 1 == g.count && red + depth >= reduction, s.partial};
      if (g.backward)
        pack_panel_backward(*g.parts[i].w, col, cols, red, depth, g.rounding, s.rows, s.panel);
      else
        pack_panel_forward(*g.parts[i].w, col, cols, red, depth, g.rounding, s.rows, s.panel);
      for (const Segment& segment : g.segments.rows)
        for (int64_t row = 0; row < segment.rows; row += S::ROWS)
          row_block<Compute>(g, s, g.parts[i], red, depth, step, segment, dropout, segment.row + row,
                             min64(S::ROWS, segment.rows - row), col, cols);
    }
  }
}

template <class T, class O>
inline void panel_gemm(const Gemm<T, O>& g) {
#if defined(FASTLORA_BF16_DOT)
  using Compute = typename std::conditional<is_bf16<T>, bf16, float>::type;
#else
  using Compute = float;
#endif
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

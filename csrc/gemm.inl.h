// out (m, columns) = A (m, reduction) * panel + bias + S U, one thread per panel of columns.
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
// C tiles 0..3, A tiles 4..5, B tiles 6..7: 32 x 32 outputs per step of 32 reductions. A: packed, or 32 rows where
// they lie, `lda` elements apart.
inline void micro(const bf16* a, int64_t lda, int64_t rows, int64_t depth, const bf16* b, float* tile) {
  const int64_t steps = round_up(depth, 32) / 32, next = steps * 512;
  const bool packed = lda == PACKED;
  const int64_t line = packed ? 64 : 2 * lda, step = packed ? 512 : 32, lower = packed ? next : 16 * lda;
  _tile_zero(0);
  _tile_zero(1);
  if (rows > 16) {
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t t = 0; t < next; t += 512, a += step) {
      _tile_loadd(4, a, line);
      _tile_loadd(6, b + t, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + next + t, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a + lower, line);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(2, tile + 16 * 32, 128);
    _tile_stored(3, tile + 16 * 32 + 16, 128);
  } else {
    for (int64_t t = 0; t < next; t += 512, a += step) {
      _tile_loadd(4, a, line);
      _tile_loadd(6, b + t, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + next + t, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
  }
  _tile_stored(0, tile, 128);
  _tile_stored(1, tile + 16, 128);
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

// The low-rank term S (m, r) * U (r, columns) and the bias of one panel; U and bias are zero-padded to its width.
struct Epilogue {
  const float* s;
  const float* u;
  const float* bias;
  int64_t r;
};

// Add the low-rank term and the bias to ROWS rows and two vectors of columns of the finished sums.
template <int ROWS>
inline void add_low_rank(const Epilogue& e, int64_t row, int64_t col, vf sums[ROWS][2]) {
  for (int64_t j = 0; j < e.r; ++j) {
    const float* u = e.u + j * PANEL_COLUMNS + col;
    const vf u0 = vload(u), u1 = vload(u + VW);
    for (int i = 0; i < ROWS; ++i) {
      const vf s = vset(e.s[(row + i) * e.r + j]);
      sums[i][0] = vfma(s, u0, sums[i][0]);
      sums[i][1] = vfma(s, u1, sums[i][1]);
    }
  }
  if (!e.bias) return;
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < 2; ++v) sums[i][v] = sums[i][v] + vload(e.bias + col + v * VW);
}

// One tile of sums over one panel's depth: added to the partial sums, and on the last panel finished and stored.
struct Step {
  bool first, last;
  float* partial;  // (m, PANEL_COLUMNS)
};

template <int ROWS, class T>
inline void finish_rows(const float* tile, int64_t ld, int64_t cols, const Epilogue& e, const Step& step, int64_t row,
                        int64_t col, T* out, int64_t ldo) {
  vf sums[ROWS][2];
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < 2; ++v) {
      float* part = step.partial + (row + i) * PANEL_COLUMNS + col + v * VW;
      sums[i][v] = vload(tile + i * ld + v * VW);
      if (!step.first) sums[i][v] = sums[i][v] + vload(part);
      if (!step.last) vstore(part, sums[i][v]);
    }
  if (!step.last) return;
  add_low_rank<ROWS>(e, row, col, sums);
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < 2; ++v) {
      T* p = out + (row + i) * ldo + col + v * VW;
      const int64_t left = cols - v * VW;
      if (left >= VW)
        vstore(p, sums[i][v]);
      else if (left > 0)
        vstore_part(p, sums[i][v], left);
    }
}

template <class T, int GROUP>
inline void finish(const float* tile, int64_t rows, int64_t cols, const Epilogue& e, const Step& step, int64_t row,
                   int64_t col, T* out, int64_t ldo) {
  for (int64_t c = 0; c < cols; c += 2 * VW) {
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4)
      finish_rows<4>(tile + i * GROUP + c, GROUP, cols - c, e, step, row + i, col + c, out, ldo);
    for (; i < rows; ++i)
      finish_rows<1>(tile + i * GROUP + c, GROUP, cols - c, e, step, row + i, col + c, out, ldo);
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

// What the two directions share. `backward`: A is dy, columns are W's columns; else A is x, columns are W's rows.
template <class T>
struct Gemm {
  const T* a;
  int64_t lda, m;
  const fastlora_weight& w;
  bool backward;
  const fastlora_lora& lora;
  const float* s;
  const float* bias;
  T* out;
  int threads;
};

template <class Compute, class T>
inline void one_panel(const Gemm<T>& g, int64_t col, int64_t cols) {
  using S = Shape<Compute>;
  constexpr int GROUP = S::GROUP;
  const int64_t reduction = g.backward ? g.w.n : g.w.k, columns = g.backward ? g.w.k : g.w.n;
  const int64_t deepest = round_up(min64(S::DEPTH, reduction), 32);
  const bool as_bf16 = sizeof(T) == 2;

  auto* panel = static_cast<Compute*>(scratch(SCRATCH_PANEL, PANEL_COLUMNS * deepest * sizeof(Compute)));
  // rows of W while packing, then rows of A: never both
  constexpr int64_t weight_rows = 32 * CHUNK;
  auto* rows = static_cast<Compute*>(scratch(
      SCRATCH_ROWS, (S::ROWS * deepest > weight_rows ? S::ROWS * deepest : weight_rows) * sizeof(Compute)));
  float* partial = nullptr;
  if (reduction > S::DEPTH)
    partial = static_cast<float*>(scratch(SCRATCH_PARTIAL, g.m * PANEL_COLUMNS * sizeof(float)));
  auto* low = static_cast<float*>(scratch(SCRATCH_LOW_RANK, (g.lora.r + 1) * PANEL_COLUMNS * sizeof(float)));

  Epilogue e{g.s, low + PANEL_COLUMNS, nullptr, g.lora.r};
  if (g.bias) {
    memcpy(low, g.bias + col, cols * sizeof(float));
    memset(low + cols, 0, (PANEL_COLUMNS - cols) * sizeof(float));
    e.bias = low;
  }
  if (g.lora.r) {
    const void* matrix = g.backward ? g.lora.a : g.lora.b;
    const float scaling = g.backward ? 1.0f : g.lora.scaling;
    if (g.lora.dtype == FASTLORA_F32)
      pack_low_rank(static_cast<const float*>(matrix), g.lora.r, g.w.k, !g.backward, scaling, col, cols, low + PANEL_COLUMNS);
    else
      pack_low_rank(static_cast<const bf16*>(matrix), g.lora.r, g.w.k, !g.backward, scaling, col, cols, low + PANEL_COLUMNS);
  }

  alignas(64) float tile[S::ROWS * GROUP];
  for (int64_t red = 0; red < reduction || red == 0; red += S::DEPTH) {
    const int64_t depth = min64(S::DEPTH, reduction - red);
    const Step step{red == 0, red + depth >= reduction, partial};
    if (g.backward)
      pack_panel_backward(g.w, col, cols, red, depth, as_bf16, rows, panel);
    else
      pack_panel_forward(g.w, col, cols, red, depth, as_bf16, rows, panel);
    const int64_t stride = sizeof(Compute) == 2 ? round_up(depth, 32) : depth;
    for (int64_t row = 0; row < g.m; row += S::ROWS) {
      const int64_t count = min64(S::ROWS, g.m - row);
      const T* a = g.a + row * g.lda + red;
      const bool direct = in_place<Compute>(count, depth);
      if (!direct) pack_rows(a, g.lda, count, depth, rows);
      for (int64_t c = 0; c < cols; c += GROUP) {
        micro(direct ? reinterpret_cast<const Compute*>(a) : rows, direct ? g.lda : PACKED, count, depth,
              panel + c * stride, tile);
        finish<T, GROUP>(tile, count, min64(GROUP, cols - c), e, step, row, c, g.out + col, columns);
      }
    }
  }
}

template <class T>
inline void panel_gemm(const Gemm<T>& g) {
#if defined(FASTLORA_BF16_DOT)
  using Compute = T;
#else
  using Compute = float;
#endif
  const int64_t columns = g.backward ? g.w.k : g.w.n;
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

// Micro-kernels: tile (rows, GROUP) = A block * panel group, float sums.
#include "panel.inl.h"

namespace fastlora {
namespace FASTLORA_ISA {

constexpr int64_t PACKED = 0;  // in place of a leading dimension: A is as pack_rows left it

// Sums of RUN products are added to the tile, which keeps rounding errors from growing with the depth.
constexpr int64_t RUN = VW == 4 ? 16 : VW == 8 ? 64 : 32;  // shorter where there is no FMA

// Rows of A lie `lda` apart, those of the tile `ld`; `add`: to what the tile holds. A function of its own, so that the
// sums have all registers: inlined, one of them is spilled, and costs half the speed.
template <int MR>
__attribute__((noinline)) void micro_float(const float* a, int64_t lda, int64_t depth, const float* b, float* tile,
                                           int64_t ld, bool add) {
  for (int64_t run = 0; run < depth || run == 0; run += RUN, add = true) {
    vf acc[MR][2];
    for (int i = 0; i < MR; ++i) acc[i][0] = acc[i][1] = vzero();
    const int64_t stop = min64(run + RUN, depth);
    for (int64_t k = run; k < stop; ++k, b += 2 * VW) {
      const vf b0 = vload(b), b1 = vload(b + VW);
      for (int i = 0; i < MR; ++i) {
        const vf ai = vset(a[i * lda + k]);
        acc[i][0] = vfma(ai, b0, acc[i][0]);
        acc[i][1] = vfma(ai, b1, acc[i][1]);
      }
    }
    for (int i = 0; i < MR; ++i)
      for (int v = 0; v < 2; ++v) {
        float* sums = tile + i * ld + v * VW;
        vstore(sums, add ? vload(sums) + acc[i][v] : acc[i][v]);
      }
  }
}

// One to six rows.
inline void micro_rows(const float* a, int64_t lda, int64_t rows, int64_t depth, const float* b, float* tile, int64_t ld,
                       bool add) {
  switch (rows) {
    case 1: return micro_float<1>(a, lda, depth, b, tile, ld, add);
    case 2: return micro_float<2>(a, lda, depth, b, tile, ld, add);
    case 3: return micro_float<3>(a, lda, depth, b, tile, ld, add);
    case 4: return micro_float<4>(a, lda, depth, b, tile, ld, add);
    case 5: return micro_float<5>(a, lda, depth, b, tile, ld, add);
    default: return micro_float<6>(a, lda, depth, b, tile, ld, add);
  }
}

// Fewer than four rows take the time of four, so none but the last rows of few are left with less.
inline void micro(const float* a, int64_t lda, int64_t rows, int64_t depth, const float* b, float* tile, int64_t ld,
                  bool add) {
  constexpr int MR = VW == 16 ? 12 : 6;
  if (lda == PACKED) lda = depth;
  int64_t i = 0, left = rows;
  for (; left == MR || left > MR + 2; i += MR, left -= MR)
    micro_float<MR>(a + i * lda, lda, depth, b, tile + i * ld, ld, add);
  while (left > 0) {
    const int64_t count = left > 6 ? 4 : left;
    micro_rows(a + i * lda, lda, count, depth, b, tile + i * ld, ld, add);
    i += count, left -= count;
  }
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
// A function of its own for the same reason as micro_float.
template <int MR>
__attribute__((noinline)) void micro_bf16(const bf16* a, int64_t steps, const bf16* b, float* tile) {
  constexpr int64_t RUN_STEPS = 8;  // of 32 products, summed before they are added to the tile
  const bf16* b_next = b + steps * 512;
  for (int64_t run = 0; run < steps || run == 0; run += RUN_STEPS) {
    __m512 acc[MR][2];
    for (int i = 0; i < MR; ++i) acc[i][0] = acc[i][1] = vzero();
    for (int64_t t = run * 512; t < min64(run + RUN_STEPS, steps) * 512; t += 512)
      for (int p = 0; p < 16; ++p) {
        const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b + t + 32 * p);
        const __m512bh b1 = (__m512bh)_mm512_loadu_si512(b_next + t + 32 * p);
        for (int i = 0; i < MR; ++i) {
          int32_t pair;
          memcpy(&pair, a + t + 2 * p + i * 32, 4);
          const __m512bh ai = (__m512bh)_mm512_set1_epi32(pair);
          acc[i][0] = _mm512_dpbf16_ps(acc[i][0], ai, b0);
          acc[i][1] = _mm512_dpbf16_ps(acc[i][1], ai, b1);
        }
      }
    for (int i = 0; i < MR; ++i)
      for (int v = 0; v < 2; ++v) {
        float* sums = tile + i * 32 + v * 16;
        vstore(sums, run ? vload(sums) + acc[i][v] : acc[i][v]);
      }
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

// Whether rows of A can be multiplied where they lie: floats always, and the matrix unit reads whole tiles at any
// distance.
template <class Compute, class T = Compute>
inline bool in_place(int64_t rows, int64_t depth) {
  if (!std::is_same<Compute, T>::value) return false;
  if (sizeof(Compute) == 4) return true;
#if defined(__AMX_BF16__)
  return rows == 32 && depth % 32 == 0;
#else
  (void)rows, (void)depth;
  return false;
#endif
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora

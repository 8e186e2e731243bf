// Panels: what the matrix kernels multiply. Two compute types:
//   float  every instruction set; panel layout [group of GROUP columns][reduction][GROUP]
//   bf16   vdpbf16ps and AMX; reduction in pairs, zero-padded to 32: [group of 16 columns][pair][16][2], which is a
//          row of AMX tiles (32 reductions x 16 columns, 1 KiB each) as it stands
//
// pack_panel reads W[columns, reduction] (forward) or W[reduction, columns] (backward) and decodes each weight once.
#include "rows.inl.h"

namespace fastlora {
namespace FASTLORA_ISA {

#if defined(__AVX512BF16__)
#define FASTLORA_BF16_DOT 1
#endif

#if defined(FASTLORA_BF16_DOT)
template <class T>
using compute_of = typename std::conditional<is_bf16<T>, bf16, float>::type;
#else
template <class T>
using compute_of = float;
#endif

template <class Compute>
struct Shape;
template <>
struct Shape<float> {
  static constexpr int GROUP = 2 * VW;     // columns of one micro-kernel call
  static constexpr int64_t DEPTH = 512;    // reduction of one panel
  static constexpr int ROWS = VW == 4 ? 24 : 48;  // rows of A packed at a time
  static constexpr int64_t BLOCK = 8 * 48;        // rows whose partial sums are kept, for which a panel is decoded
};
template <>
struct Shape<bf16> {
  static constexpr int GROUP = 32;
  static constexpr int64_t DEPTH = 2048;
  static constexpr int ROWS = 32;
  static constexpr int64_t BLOCK = 1024;
};
constexpr int64_t PANEL_COLUMNS = 256;

#if defined(__AVX512F__)
// 16 x 16 transpose of 32-bit lanes.
inline void transpose16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
// 8 x 8 transpose of 32-bit lanes.
inline void transpose8(__m256 r[8]) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}
#endif

// out[c * ld_out + r] = in[r * ld_in + c] for 32-bit values, r < 16, c < count.
inline void transpose_lanes(const uint32_t* in, int64_t ld_in, int64_t count, uint32_t* out, int64_t ld_out) {
  int64_t c = 0;
#if defined(__AVX512F__)
  for (; c + 16 <= count; c += 16) {
    __m512i r[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(in + i * ld_in + c);
    transpose16(r);
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + (c + i) * ld_out, r[i]);
  }
#elif defined(__AVX2__)
  for (; c + 8 <= count; c += 8)
    for (int half = 0; half < 16; half += 8) {
      __m256 r[8];
      for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(in + (half + i) * ld_in + c));
      transpose8(r);
      for (int i = 0; i < 8; ++i) _mm256_storeu_ps(reinterpret_cast<float*>(out + (c + i) * ld_out + half), r[i]);
    }
#endif
  for (; c < count; ++c)
    for (int r = 0; r < 16; ++r) out[c * ld_out + r] = in[r * ld_in + c];
}

// Decode `count` reductions of 16 rows starting at `row`; rows beyond `rows` and reductions beyond `count` are zero.
constexpr int64_t CHUNK = 512;
template <class T>
inline void decode_rows16(const fastlora_weight& w, int64_t row, int64_t rows, int64_t col, int64_t count,
                          int32_t rounding, T* out) {
  for (int64_t i = 0; i < 16; ++i) {
    T* line = out + i * CHUNK;
    const int64_t filled = i < rows ? count : 0;
    if (filled) decode_row(w, row + i, col, count, rounding, line);
    memset(line + filled, 0, (round_up(count, 32) - filled) * sizeof(T));
  }
}

// Forward: columns are rows of W.
inline void pack_panel_forward(const fastlora_weight& w, int64_t col, int64_t cols, int64_t red, int64_t depth,
                               int32_t rounding, float* rows, float* panel) {
  constexpr int GROUP = Shape<float>::GROUP;
  for (int64_t c = 0; c < cols; c += 16)
    for (int64_t r = 0; r < depth; r += CHUNK) {
      const int64_t count = min64(CHUNK, depth - r);
      decode_rows16(w, col + c, cols - c, red + r, count, rounding, rows);
      for (int64_t g = c; g < c + 16; g += min64(16, GROUP)) {  // GROUP is 8 on the baseline
        float* out = panel + g / GROUP * GROUP * depth + r * GROUP + g % GROUP;
        if (GROUP >= 16) {
          transpose_lanes(reinterpret_cast<uint32_t*>(rows), CHUNK, count, reinterpret_cast<uint32_t*>(out), GROUP);
        } else {
          for (int64_t k = 0; k < count; ++k)
            for (int64_t i = 0; i < GROUP; ++i) out[k * GROUP + i] = rows[(g - c + i) * CHUNK + k];
        }
      }
    }
}
#if defined(FASTLORA_BF16_DOT)
// Whether every 64 weights from a row's start lie in one block, so that a step shares one absmax per row.
inline bool aligned(const fastlora_weight& w, int64_t multiple) {
  return w.format == FASTLORA_4BIT && w.block_shift >= 6 && w.k % multiple == 0;
}

// 16 rows of W, `count` (a multiple of 128) reductions: transposed while packed, eight nibbles to a lane, one row per
// lane; then a lane looks up its code, scales it and is rounded. Nothing is decoded twice or moved after decoding.
inline void pack_rows16(const fastlora_weight& w, int64_t row, int64_t red, int64_t count, bf16* out) {
  const __m512 code = _mm512_loadu_ps(w.code);
  alignas(64) static const uint16_t pairs[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i interleave = _mm512_load_si512(pairs);
  const uint8_t* packed = static_cast<const uint8_t*>(w.data);
  for (int64_t k = red; k < red + count; k += 128) {
    alignas(64) float absmax[2][16];
    __m512i bytes[16];
    for (int64_t i = 0; i < 16; ++i) {
      const int64_t first = (row + i) * w.k + k;
      absmax[0][i] = block_absmax(w, first >> w.block_shift);
      absmax[1][i] = block_absmax(w, (first + 64) >> w.block_shift);
      bytes[i] = _mm512_loadu_si512(packed + first / 2);
    }
    transpose16(bytes);  // bytes[j], lane i: row i, weights 8 j .. 8 j + 7
    for (int j = 0; j < 16; ++j) {
      const __m512 scale = _mm512_load_ps(absmax[j / 8]);
      for (int b = 0; b < 4; ++b, out += 32) {
        const __m512 even = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes[j], 8 * b + 4), code);
        const __m512 odd = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes[j], 8 * b), code);
        const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_mul_ps(odd, scale), _mm512_mul_ps(even, scale));
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(interleave, (__m512i)both));
      }
    }
  }
}

inline void pack_panel_forward(const fastlora_weight& w, int64_t col, int64_t cols, int64_t red, int64_t depth,
                               int32_t, bf16* rows, bf16* panel) {
  const int64_t pairs = round_up(depth, 32) / 2;
  const int64_t fast = aligned(w, 128) ? depth / 128 * 128 : 0;
  for (int64_t c = 0; c < cols; c += 16) {
    bf16* out = panel + c / 16 * pairs * 32;
    int64_t r = cols - c >= 16 ? fast : 0;
    if (r) pack_rows16(w, col + c, red, r, out);
    for (; r < depth; r += CHUNK) {
      const int64_t count = min64(CHUNK, depth - r);
      decode_rows16(w, col + c, cols - c, red + r, count, FASTLORA_BF16, rows);
      transpose_lanes(reinterpret_cast<uint32_t*>(rows), CHUNK / 2, round_up(count, 32) / 2,
                      reinterpret_cast<uint32_t*>(out + r / 2 * 32), 16);
    }
  }
}
#endif

// Backward: columns are columns of W.
inline void pack_panel_backward(const fastlora_weight& w, int64_t col, int64_t cols, int64_t red, int64_t depth,
                                int32_t rounding, float* rows, float* panel) {
  constexpr int GROUP = Shape<float>::GROUP;
  for (int64_t r = 0; r < depth; ++r) {
    decode_row(w, red + r, col, cols, rounding, rows);
    memset(rows + cols, 0, (round_up(cols, GROUP) - cols) * sizeof(float));
    for (int64_t c = 0; c < cols; c += GROUP)
      memcpy(panel + c * depth + r * GROUP, rows + c, GROUP * sizeof(float));
  }
}
#if defined(FASTLORA_BF16_DOT)
// 64 columns of the rows n and n + 1 of W, interleaved: one table holds both rows' scaled codes, and the fifth bit of
// the index tells the rows apart. Four groups of 16 columns, `stride` apart.
inline void pack_row_pair(const fastlora_weight& w, int64_t row, int64_t col, bf16* out, int64_t stride) {
  const int64_t first = row * w.k + col, second = first + w.k;
  const uint8_t* packed = static_cast<const uint8_t*>(w.data);
  const __m512 code = _mm512_loadu_ps(w.code);
  const __m512bh table =
      _mm512_cvtne2ps_pbh(_mm512_mul_ps(code, _mm512_set1_ps(block_absmax(w, second >> w.block_shift))),
                          _mm512_mul_ps(code, _mm512_set1_ps(block_absmax(w, first >> w.block_shift))));
  const __m256i nibble = _mm256_set1_epi8(15), row_bit = _mm256_set1_epi16(0x1000);
  for (int half = 0; half < 2; ++half) {
    const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + first / 2 + 16 * half));
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + second / 2 + 16 * half));
    // byte pairs (row n, row n + 1): weights 0..15 in the low lane, 16..31 in the high one
    const __m256i both = _mm256_set_m128i(_mm_unpackhi_epi8(a, b), _mm_unpacklo_epi8(a, b));
    const __m256i even = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(both, 4), nibble), row_bit);
    const __m256i odd = _mm256_or_si256(_mm256_and_si256(both, nibble), row_bit);
    const __m256i low = _mm256_unpacklo_epi16(even, odd), high = _mm256_unpackhi_epi16(even, odd);
    const __m512i index0 = _mm512_cvtepu8_epi16(_mm256_permute2x128_si256(low, high, 0x20));
    const __m512i index1 = _mm512_cvtepu8_epi16(_mm256_permute2x128_si256(low, high, 0x31));
    _mm512_storeu_si512(out + 2 * half * stride, _mm512_permutexvar_epi16(index0, (__m512i)table));
    _mm512_storeu_si512(out + (2 * half + 1) * stride, _mm512_permutexvar_epi16(index1, (__m512i)table));
  }
}

// 16 columns of 32 rows, PANEL_COLUMNS apart, to 16 pairs of rows.
inline void interleave_rows(const bf16* rows, bf16* out) {
  for (int64_t p = 0; p < 16; ++p, rows += 2 * PANEL_COLUMNS, out += 32) {
    const __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows)));
    const __m512i odd =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + PANEL_COLUMNS)));
    _mm512_storeu_si512(out, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
  }
}

// Any format and alignment: 32 rows of W at a time through a buffer; columns beyond `cols` are zero up to 16.
inline void pack_row_block(const fastlora_weight& w, int64_t row, int64_t count, int64_t col, int64_t cols,
                           bf16* rows, bf16* out, int64_t stride) {
  const int64_t width = round_up(cols, 16);
  for (int64_t i = 0; i < 32; ++i) {
    bf16* line = rows + i * PANEL_COLUMNS;
    const int64_t filled = i < count ? cols : 0;
    if (filled) decode_row(w, row + i, col, cols, FASTLORA_BF16, line);
    memset(line + filled, 0, (width - filled) * sizeof(bf16));
  }
  for (int64_t c = 0; c < width; c += 16) interleave_rows(rows + c, out + c / 16 * stride);
}

inline void pack_panel_backward(const fastlora_weight& w, int64_t col, int64_t cols, int64_t red, int64_t depth,
                                int32_t, bf16* rows, bf16* panel) {
  const int64_t pairs = round_up(depth, 32) / 2, stride = pairs * 32;
  const int64_t fast = aligned(w, 64) && col % 64 == 0 ? cols / 64 * 64 : 0;
  for (int64_t r = 0; r < depth; r += 32) {
    const int64_t count = min64(32, depth - r), whole = count == 32 ? fast : 0;
    for (int64_t p = 0; p < 16 && whole; ++p)
      for (int64_t c = 0; c < whole; c += 64)
        pack_row_pair(w, red + r + 2 * p, col + c, panel + c / 16 * stride + (r / 2 + p) * 32, stride);
    if (whole < cols)
      pack_row_block(w, red + r, count, col + whole, cols - whole, rows, panel + whole / 16 * stride + r * 16, stride);
  }
}
#endif

// `count` rows of a matrix, those at positions `first` on; `all` NULL: as they lie.
template <class T>
struct Lines {
  const T* base;
  int64_t ld;
  const Rows* all;
  int64_t first;
  const T* operator[](int64_t i) const { return base + (all ? all->at(first + i) : first + i) * ld; }
};

// Rows of A to float, row-major with `depth` per row.
template <class T>
inline void pack_rows(const Lines<T>& a, int64_t rows, int64_t depth, float* out) {
  for (int64_t i = 0; i < rows; ++i, out += depth) {
    const T* line = a[i];
    int64_t k = 0;
    for (; k + VW <= depth; k += VW) vstore(out + k, vload(line + k));
    for (; k < depth; ++k) out[k] = to_float(line[k]);
  }
}
// Rows of A to tiles [16 rows][32 reductions], zero-padded: tile t of row block b at out + (b * steps + t) * 512.
inline void pack_rows(const Lines<bf16>& a, int64_t rows, int64_t depth, bf16* out) {
  const int64_t steps = round_up(depth, 32) / 32, whole = depth / 32;
  for (int64_t i = 0; i < round_up(rows, 16); ++i) {
    bf16* line = out + (i / 16 * steps * 16 + i % 16) * 32;
    const bf16* from = i < rows ? a[i] : nullptr;
    const int64_t filled = from ? whole : 0;
    for (int64_t t = 0; t < filled; ++t) memcpy(line + t * 512, from + t * 32, 64);
    for (int64_t t = filled; t < steps; ++t) memset(line + t * 512, 0, 64);
    if (from && depth % 32) memcpy(line + whole * 512, from + whole * 32, (depth % 32) * sizeof(bf16));
  }
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora

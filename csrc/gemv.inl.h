// Few tokens: the weight goes from packed bytes to registers to sums; nothing decoded is stored.
//
// x is reordered once into the order in which nibbles decode.
// A weight whose rows are no multiple of 128 long, or whose blocks are of 32, is decoded through a small buffer.
#include "low_rank_amx.inl.h"

namespace fastlora {
namespace FASTLORA_ISA {

constexpr int64_t FEW_TOKENS = 8;

template <class T>
struct Gemv {
  const T* x;
  int64_t ldx, m;
  const fastlora_weight& w;
  const float* bias;
  const fastlora_lora& lora;
  const float* s;
  T* y;
  int threads;
};

// The magnitudes of `count` runs of 64 weights from the flattened position `first` on; blocks are of 64 or more. All NaN
// are the quiet one, which may be rounded like a number.
inline void half_absmaxes(const fastlora_weight& w, int64_t first, int64_t count, float* out) {
  if (w.block_shift == 6)
    block_absmaxes(w, first >> 6, count, out);
  else
    for (int64_t i = 0; i < count; ++i) out[i] = block_absmax(w, (first + 64 * i) >> w.block_shift);
  for (int64_t i = 0; i < count; ++i) out[i] = out[i] == out[i] ? out[i] : __builtin_nanf("");
}

template <class L>
inline float low_rank_dot(const float* s, const L* b, int64_t r) {
  vf sum = vzero();
  int64_t j = 0;
  for (; j + VW <= r; j += VW) sum = vfma(vload(s + j), vload(b + j), sum);
  if (j < r) sum = vfma(vload_part(s + j, r - j), vload_part(b + j, r - j), sum);
  return vsum(sum);
}

template <class T>
inline void store_output(const Gemv<T>& g, int64_t i, int64_t row, float sum) {
  const int32_t* span = g.lora.spans ? g.lora.spans + 2 * i : nullptr;
  const int64_t first = span ? span[0] : 0, r = (span ? span[1] : g.lora.r) - first;
  const int64_t from = row * g.lora.r + first;
  if (g.bias) sum += g.bias[row];
  if (r)
    as_type(g.lora.dtype, g.lora.b, [&](auto* b) {
      sum += g.lora.scaling * low_rank_dot(g.s + i * g.lora.r + first, b + from, r);
    });
  store_scalar(g.y + i * g.w.n + row, sum);
}

#if defined(__AVX2__)
// How a step of WEIGHTS weights of one row, two halves with a magnitude each, is multiplied with x. x is stored in
// the order in which the nibbles of the step decode: position(j) is where the step's j-th weight goes.
struct FloatScheme {
  using Packed = float;
  static constexpr int64_t WEIGHTS = 128;
  const float* code;
  int32_t rounding;
  FloatScheme(const float* code, int32_t rounding) : code(code), rounding(rounding) {}
  static int64_t position(int64_t j) { return j / (2 * VW) * (2 * VW) + j % 2 * VW + j % (2 * VW) / 2; }
  static void prepare(float*, int64_t) {}
  template <int M>
  void add(const uint8_t* bytes, const float* absmax, const float* x, int64_t ldx, vf (&sums)[M]) const {
    for (int half = 0; half < 2; ++half) {
      const Table table(code, absmax[half], rounding);
      for (int64_t j = 64 * half; j < 64 * half + 64; j += 2 * VW) {
        vf even, odd;
        decode_split(bytes + j / 2, table, even, odd);
        for (int i = 0; i < M; ++i)
          sums[i] = vfma(odd, vload(x + i * ldx + j + VW), vfma(even, vload(x + i * ldx + j), sums[i]));
      }
    }
  }
};
#if !defined(__AVX512F__)
// bf16 weights from byte shuffles: a table of their low and one of their high bytes, so that a shuffle of each yields
// 32 weights, those at even positions of 64 or those at odd ones; a bf16 before 16 zero bits is a float.
struct PlaneTable {
  __m256i low, high;  // bytes of the 16 scaled codes, in both halves
  // Rounded to nearest, ties away from zero; the quiet NaN stays one.
  PlaneTable(__m256 even, __m256 odd, float absmax) {
    const __m256 scale = _mm256_set1_ps(absmax);
    const __m256i half = _mm256_set1_epi32(0x8000);
    const __m256i first = _mm256_add_epi32(_mm256_castps_si256(_mm256_mul_ps(even, scale)), half);
    const __m256i second = _mm256_add_epi32(_mm256_castps_si256(_mm256_mul_ps(odd, scale)), half);
    const __m256i words = _mm256_blend_epi16(_mm256_srli_epi32(first, 16), second, 0xaa);
    const __m256i split = _mm256_broadcastsi128_si256(_mm_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0));
    const __m256i bytes = _mm256_shuffle_epi8(words, split);  // each half: 8 low bytes, 8 high bytes
    low = _mm256_permute4x64_epi64(bytes, 0x88);
    high = _mm256_permute4x64_epi64(bytes, 0xdd);
  }
};
struct PlaneScheme {
  using Packed = float;
  static constexpr int64_t WEIGHTS = 128;
  __m256 even, odd;  // codes 0, 2, ... and 1, 3, ...
  PlaneScheme(const float* code, int32_t) {
    const __m256 first = _mm256_loadu_ps(code), second = _mm256_loadu_ps(code + 8);
    even = order(_mm256_shuffle_ps(first, second, 0x88));
    odd = order(_mm256_shuffle_ps(first, second, 0xdd));
  }
  static __m256 order(__m256 v) { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8)); }
  // Ties are to go to even, which only a code that is a power of two can have: the last bit of such a magnitude makes
  // the tables' ties away from zero go there.
  static void prepare(float* absmax, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      uint32_t bits;
      memcpy(&bits, absmax + i, 4);
      bits -= (bits & 0x1ffff) == 0x8000;
      memcpy(absmax + i, &bits, 4);
    }
  }
  static int64_t position(int64_t j) {
    const int64_t byte = j % 64 / 2;
    return j / 64 * 64 + (j % 2 * 4 + byte % 16 / 8 * 2 + byte % 2) * VW + byte / 16 * 4 + byte % 8 / 2;
  }
  // Calls f(i, weights) for the 8 vectors of 64 weights.
  template <class F>
  void decode(const uint8_t* bytes, float absmax, F f) const {
    const __m256i nibble = _mm256_set1_epi8(15), upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    const PlaneTable table(even, odd, absmax);
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
    for (int place = 0; place < 2; ++place) {
      const __m256i index = _mm256_and_si256(place ? packed : _mm256_srli_epi16(packed, 4), nibble);
      const __m256i low = _mm256_shuffle_epi8(table.low, index), high = _mm256_shuffle_epi8(table.high, index);
      for (int part = 0; part < 2; ++part) {
        const __m256i pairs = part ? _mm256_unpackhi_epi8(low, high) : _mm256_unpacklo_epi8(low, high);
        f(4 * place + 2 * part, _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)));
        f(4 * place + 2 * part + 1, _mm256_castsi256_ps(_mm256_and_si256(pairs, upper)));
      }
    }
  }
  template <int M>
  void add(const uint8_t* bytes, const float* absmax, const float* x, int64_t ldx, vf (&sums)[M]) const {
    if constexpr (M <= 2) {  // sums of their own first, so that few steps wait for one another
      for (int half = 0; half < 2; ++half, x += 64, bytes += 32) {
        vf part[M][2];
        decode(bytes, absmax[half], [&](int v, vf weights) {
          for (int i = 0; i < M; ++i) {
            const vf xv = vload(x + i * ldx + v * VW);
            part[i][v % 2] = v < 2 ? weights * xv : vfma(weights, xv, part[i][v % 2]);
          }
        });
        for (int i = 0; i < M; ++i) sums[i] = sums[i] + (part[i][0] + part[i][1]);
      }
    } else {  // through a buffer, because decoding and M sums do not fit into the registers together
      alignas(64) float weights[WEIGHTS];
      for (int half = 0; half < 2; ++half)
        decode(bytes + 32 * half, absmax[half], [&](int v, vf found) { vstore(weights + 64 * half + v * VW, found); });
      vf part[M][2];
      for (int i = 0; i < M; ++i) part[i][0] = sums[i], part[i][1] = vzero();
      for (int64_t v = 0; v < WEIGHTS; v += 2 * VW) {
        const vf even = vload(weights + v), odd = vload(weights + v + VW);
        for (int i = 0; i < M; ++i) {
          part[i][0] = vfma(even, vload(x + i * ldx + v), part[i][0]);
          part[i][M <= 4] = vfma(odd, vload(x + i * ldx + v + VW), part[i][M <= 4]);
        }
      }
      for (int i = 0; i < M; ++i) sums[i] = M <= 4 ? part[i][0] + part[i][1] : part[i][0];
    }
  }
};
#endif
#if defined(FASTLORA_BF16_DOT)
// 128 weights are 32 words of four nibbles; words 16..31 are the second half. One table holds both halves' scaled
// codes and the fifth bit of the index tells them apart, so each of four lookups yields 32 finished bf16 weights:
// lookup j those at 4 i + j, i < 32.
struct QuadTable {
  __m512i table;
  QuadTable(const float* code, const float* absmax) {
    const __m512 c = _mm512_loadu_ps(code);
    table = (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(c, _mm512_set1_ps(absmax[1])),
                                         _mm512_mul_ps(c, _mm512_set1_ps(absmax[0])));
  }
  // Calls f(j, weights) for the four lookups.
  template <class F>
  void lookups(__m512i words, F f) const {
    const __m512i nibbles = _mm512_set1_epi16(0x0f0f);
    const __m512i half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(0x1010), 1);
    // (words & nibbles) | half: an index in each byte; the high nibble of a byte comes first
    const __m512i even = _mm512_ternarylogic_epi32(_mm512_srli_epi16(words, 4), nibbles, half, 0xea);
    const __m512i odd = _mm512_ternarylogic_epi32(words, nibbles, half, 0xea);
    f(0, _mm512_permutexvar_epi16(even, table));
    f(1, _mm512_permutexvar_epi16(odd, table));
    f(2, _mm512_permutexvar_epi16(_mm512_srli_epi16(even, 8), table));
    f(3, _mm512_permutexvar_epi16(_mm512_srli_epi16(odd, 8), table));
  }
};
struct Bf16Scheme {
  using Packed = bf16;
  static constexpr int64_t WEIGHTS = 128;
  const float* code;
  Bf16Scheme(const float* code, int32_t) : code(code) {}
  static int64_t position(int64_t j) { return j % 4 * 32 + j / 4; }
  static void prepare(float*, int64_t) {}
  template <int M>
  void add(const uint8_t* bytes, const float* absmax, const bf16* x, int64_t ldx, vf (&sums)[M]) const {
    const QuadTable table(code, absmax);
    __m512bh weights[4];
    table.lookups(_mm512_loadu_si512(bytes), [&](int j, __m512i found) { weights[j] = (__m512bh)found; });
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < 4; ++j)
        sums[i] = _mm512_dpbf16_ps(sums[i], weights[j], (__m512bh)_mm512_loadu_si512(x + i * ldx + 32 * j));
  }
};
#endif

template <class Scheme, int M, int NR, class T>
inline void packed_rows(const Gemv<T>& g, int64_t row, int64_t apart, const typename Scheme::Packed* x) {
  constexpr int64_t AHEAD = 4096;  // bytes
  constexpr int64_t RUN = 32;  // steps whose magnitudes are decoded together
  const int64_t k = g.w.k;
  const Scheme scheme(g.w.code, dtype_of<T>);
  const uint8_t* packed = static_cast<const uint8_t*>(g.w.data) + row * k / 2;
  vf sums[NR][M];
  for (int n = 0; n < NR; ++n)
    for (int i = 0; i < M; ++i) sums[n][i] = vzero();
  alignas(64) float absmax[NR][2 * RUN];
  for (int64_t run = 0; run < k; run += RUN * Scheme::WEIGHTS) {
    const int64_t steps = min64(RUN, (k - run) / Scheme::WEIGHTS);
    for (int n = 0; n < NR; ++n) {
      half_absmaxes(g.w, (row + n * apart) * k + run, 2 * steps, absmax[n]);
      Scheme::prepare(absmax[n], 2 * steps);
    }
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t c = run + step * Scheme::WEIGHTS;
      for (int n = 0; n < NR; ++n) {
        const uint8_t* bytes = packed + (n * apart * k + c) / 2;
        __builtin_prefetch(bytes + AHEAD);
        scheme.template add<M>(bytes, absmax[n] + 2 * step, x + c, k, sums[n]);
      }
    }
  }
  for (int n = 0; n < NR; ++n)
    for (int i = 0; i < M; ++i) store_output(g, i, row + n * apart, vsum(sums[n][i]));
}

template <class Scheme, int M, class T>
inline void packed_gemv(const Gemv<T>& g) {
  using P = typename Scheme::Packed;
  constexpr int NR = M <= 2 ? 4 : VW == 16 && M <= 4 ? 2 : 1;  // more would not fit into the registers
  const int64_t k = g.w.k;
  P* x = static_cast<P*>(scratch(SCRATCH_SHARED, M * k * sizeof(P)));
#pragma omp parallel for num_threads(M * k < FEW_PRODUCTS / 8 ? 1 : g.threads) schedule(static)
  for (int64_t u = 0; u < M * k; u += Scheme::WEIGHTS) {
    const T* from = g.x + u / k * g.ldx + u % k;
    for (int64_t j = 0; j < Scheme::WEIGHTS; ++j) {
      if constexpr (std::is_same<P, T>::value)
        x[u + Scheme::position(j)] = from[j];
      else
        x[u + Scheme::position(j)] = to_float(from[j]);
    }
  }
  // The NR rows of a step lie far apart: each is a stream of its own that the hardware prefetches.
  const int64_t groups = g.w.n / NR;
#pragma omp parallel for num_threads(g.threads) schedule(static)
  for (int64_t row = 0; row < groups; ++row) packed_rows<Scheme, M, NR>(g, row, groups, x);
  for (int64_t row = groups * NR; row < g.w.n; ++row) packed_rows<Scheme, M, 1>(g, row, 0, x);
}

template <class Scheme, class T>
inline void packed_gemv(const Gemv<T>& g) {
  switch (g.m) {
    case 1: return packed_gemv<Scheme, 1>(g);
    case 2: return packed_gemv<Scheme, 2>(g);
    case 3: return packed_gemv<Scheme, 3>(g);
    case 4: return packed_gemv<Scheme, 4>(g);
    case 5: return packed_gemv<Scheme, 5>(g);
    case 6: return packed_gemv<Scheme, 6>(g);
    case 7: return packed_gemv<Scheme, 7>(g);
    default: return packed_gemv<Scheme, 8>(g);
  }
}
#endif

// Any 4-bit format and any alignment: rows are decoded 512 values at a time.
template <class T>
inline void buffered_gemv(const Gemv<T>& g) {
#pragma omp parallel for num_threads(g.threads) schedule(static)
  for (int64_t row = 0; row < g.w.n; ++row) {
    float buffer[CHUNK], sums[FEW_TOKENS] = {};
    for (int64_t c = 0; c < g.w.k; c += CHUNK) {
      const int64_t count = min64(CHUNK, g.w.k - c);
      decode_row(g.w, row, c, count, dtype_of<T>, buffer);
      for (int64_t i = 0; i < g.m; ++i) {
        float part;
        dots<1, 1>(g.x + i * g.ldx + c, g.ldx, buffer, count, 1.0f, &part, 1);
        sums[i] += part;
      }
    }
    for (int64_t i = 0; i < g.m; ++i) store_output(g, i, row, sums[i]);
  }
}

// A dense weight: eight rows at a time, as they lie.
template <class T>
inline void dense_gemv(const Gemv<T>& g) {
  constexpr int64_t JR = 8;
  const T* w = static_cast<const T*>(g.w.data);
#pragma omp parallel for num_threads(g.w.n * g.w.k < FEW_PRODUCTS ? 1 : g.threads) schedule(static)
  for (int64_t row = 0; row < g.w.n; row += JR) {
    const int64_t count = min64(JR, g.w.n - row);
    for (int64_t i = 0; i < g.m; ++i) {
      float sums[JR];
      project_rows<1>(g.x + i * g.ldx, g.ldx, 1, w + row * g.w.k, count, g.w.k, 1.0f, sums, JR);
      for (int64_t j = 0; j < count; ++j) store_output(g, i, row + j, sums[j]);
    }
  }
}

#if defined(__AMX_BF16__)
// Whether tile_gemv takes a weight: whole tiles, and tokens that share all ranks.
inline bool tile_weight(const fastlora_weight& w, const fastlora_lora& lora) {
  return aligned(w, 128) && w.n % 16 == 0 && !lora.spans;
}

inline float lora_b(const fastlora_lora& lora, int64_t index) {
  return lora.dtype == FASTLORA_F32 ? static_cast<const float*>(lora.b)[index]
                                    : to_float(static_cast<const bf16*>(lora.b)[index]);
}

// Up to 16 tokens on the matrix unit: Y^T = W X^T with 16 rows of W decoded into four tiles at a time.
constexpr int64_t MOST_TOKENS = 16;

// x to tiles of [16 pairs][16 tokens][2], in the order of QuadTable's lookups: tile (step, j) at (4 step + j) * 512.
inline void pack_tokens(const Gemv<bf16>& g, int64_t step, bf16* out) {
  for (int64_t j = 0; j < 4; ++j)
    for (int64_t i = 0; i < 32; ++i)
      for (int64_t t = 0; t < g.m; ++t)
        out[j * 512 + i / 2 * 32 + t * 2 + i % 2] = g.x[t * g.ldx + step * 128 + 4 * i + j];
}

// The packed row block: magnitudes decoded for RUN steps at a time, tiles decoded one step ahead of their use, so that
// a tile is not loaded from lines still being stored.
inline void tile_rows(const Gemv<bf16>& g, int64_t row, const bf16* x, const float* s) {
  constexpr int64_t RUN = 16;
  alignas(64) float absmax[16][2 * RUN], sums[4][16][16];
  alignas(64) bf16 tiles[2][4][16][32];
  const int64_t k = g.w.k, steps = k / 128;
  const uint8_t* packed = static_cast<const uint8_t*>(g.w.data) + row * k / 2;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step <= steps; ++step) {
    if (step < steps) {
      if (step % RUN == 0)
        for (int n = 0; n < 16; ++n)
          half_absmaxes(g.w, (row + n) * k + step * 128, 2 * min64(RUN, steps - step), absmax[n]);
      for (int n = 0; n < 16; ++n) {
        const QuadTable table(g.w.code, absmax[n] + 2 * (step % RUN));
        const __m512i words = _mm512_loadu_si512(packed + (n * k + step * 128) / 2);
        __builtin_prefetch(packed + ((16 + n) * k + step * 128) / 2, 0, 2);  // the same place in the next block
        table.lookups(words, [&](int j, __m512i weights) { _mm512_store_si512(tiles[step & 1][j][n], weights); });
      }
    }
    if (step == 0) continue;
    const auto& a = tiles[(step - 1) & 1];
    const bf16* b = x + (step - 1) * 2048;
    _tile_loadd(4, a[0], 64);
    _tile_loadd(5, b, 64);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, a[1], 64);
    _tile_loadd(7, b + 512, 64);
    _tile_dpbf16ps(1, 6, 7);
    _tile_loadd(4, a[2], 64);
    _tile_loadd(5, b + 1024, 64);
    _tile_dpbf16ps(2, 4, 5);
    _tile_loadd(6, a[3], 64);
    _tile_loadd(7, b + 1536, 64);
    _tile_dpbf16ps(3, 6, 7);
  }
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  __m512i out[16];
  for (int64_t n = 0; n < 16; ++n) {
    vf sum = vload(sums[0][n]) + vload(sums[1][n]) + (vload(sums[2][n]) + vload(sums[3][n]));
    if (g.bias) sum = sum + vset(g.bias[row + n]);
    for (int64_t j = 0; j < g.lora.r; ++j) sum = vfma(vset(lora_b(g.lora, (row + n) * g.lora.r + j)), vload(s + 16 * j), sum);
    out[n] = _mm512_castps_si512(sum);
  }
  transpose16(out);  // one token each
  for (int64_t i = 0; i < g.m; ++i) vstore(g.y + i * g.w.n + row, _mm512_castsi512_ps(out[i]));
}

inline void tile_gemv(const Gemv<bf16>& g) {
  const int64_t steps = g.w.k / 128, whole = g.w.n / 16;
  auto* s = static_cast<float*>(scratch(SCRATCH_SHARED, g.lora.r * 64 + steps * 2048 * sizeof(bf16)));
  bf16* x = reinterpret_cast<bf16*>(s + 16 * g.lora.r);
  for (int64_t j = 0; j < g.lora.r; ++j)  // scaling * S^T, 16 tokens to a line
    for (int64_t i = 0; i < 16; ++i) s[16 * j + i] = i < g.m ? g.lora.scaling * g.s[i * g.lora.r + j] : 0.0f;
#pragma omp parallel num_threads(g.threads)
  {
#pragma omp for schedule(static)
    for (int64_t step = 0; step < steps; ++step) {
      memset(x + step * 2048, 0, 2048 * sizeof(bf16));
      pack_tokens(g, step, x + step * 2048);
    }
    MatrixUnit unit;
#pragma omp for schedule(static)
    for (int64_t block = 0; block < whole; ++block) tile_rows(g, block * 16, x, s);
  }
}
#endif

// Whether `m` tokens are few enough for the kernels of this file.
template <class T>
inline bool few_tokens(const fastlora_weight& w, const fastlora_lora& lora, int64_t m) {
#if defined(__AMX_BF16__)
  if (is_bf16<T> && tile_weight(w, lora)) return m <= MOST_TOKENS;
#endif
  (void)w, (void)lora;
  return m <= FEW_TOKENS;
}

template <class T>
inline void gemv(const Gemv<T>& g) {
#if defined(__AMX_BF16__)
  if constexpr (is_bf16<T>)
    if (g.m > 1 && tile_weight(g.w, g.lora)) return tile_gemv(g);  // one token: registers are faster
#endif
#if defined(__AVX2__)
  if (g.w.format == FASTLORA_4BIT && g.w.k % 128 == 0 && g.w.block_shift >= 6) {
#if defined(FASTLORA_BF16_DOT)
    if constexpr (is_bf16<T>) return packed_gemv<Bf16Scheme>(g);
#elif !defined(__AVX512F__)
    if constexpr (is_bf16<T>) return packed_gemv<PlaneScheme>(g);
#endif
    return packed_gemv<FloatScheme>(g);
  }
#endif
  if (g.w.format == FASTLORA_DENSE) return dense_gemv(g);
  buffered_gemv(g);
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora

// Mixtures of experts: weights of one shape one behind the other, each for its own rows of x, which are sorted by expert.
//
// Every expert's rows go through the fused linear. Where many experts have few rows each, threads take whole experts;
// else they share each one's work. An element is summed in one order either way, so the bits are the same.
#include "vec_trick.inl.h"

namespace fastlora {
namespace FASTLORA_ISA {

constexpr int64_t EXPERTS_PER_THREAD = 2;  // with fewer, threads share the work of one expert after the other

struct Segment {
  int64_t expert, first, rows;
};

// The experts that have rows, and whether threads take whole ones.
struct Segments {
  std::vector<Segment> all;
  int64_t rows = 0;
  bool across = false;

  Segments(int64_t count, const int64_t* ends, int threads) {
    int64_t most = 0;
    for (int64_t e = 0; e < count; ++e) {
      const int64_t own = ends[e] - rows;
      if (own) all.push_back({e, rows, own});
      if (own > most) most = own;
      rows = ends[e];
    }
    across = threads > 1 && static_cast<int64_t>(all.size()) >= EXPERTS_PER_THREAD * threads && most * threads <= rows;
  }
};

// Calls run(segment, threads) for each expert that has rows.
template <class F>
void for_experts(const Segments& segments, int threads, F run) {
  const int64_t count = segments.all.size();
  if (!segments.across) {
    for (const Segment& one : segments.all) run(one, threads);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < count; ++i) run(segments.all[i], 1);
}

// The weight of expert e, where `w` is that of the first.
inline fastlora_weight weight_of(const fastlora_weight& w, int64_t e) {
  fastlora_weight own = w;
  const int64_t values = w.n * w.k;
  if (w.format == FASTLORA_DENSE) {
    own.data = static_cast<const char*>(w.data) + e * values * (w.dtype == FASTLORA_F32 ? 4 : 2);
    return own;
  }
  const int64_t blocks = (values + (int64_t{1} << w.block_shift) - 1) >> w.block_shift;
  own.data = static_cast<const char*>(w.data) + e * ((values + 1) / 2);
  own.absmax = static_cast<const char*>(w.absmax) + e * blocks * (w.nested_absmax ? 1 : 4);
  if (w.nested_absmax) {
    own.nested_absmax = w.nested_absmax + e * ((blocks + 255) / 256);
    own.nested_offset = w.nested_offset + e;
  }
  return own;
}

inline fastlora_lora update_of(const fastlora_lora& lora, const fastlora_weight& w, int64_t e) {
  fastlora_lora own = lora;
  if (!lora.r) return own;
  const int64_t bytes = lora.dtype == FASTLORA_F32 ? 4 : 2;
  own.a = static_cast<const char*>(lora.a) + e * lora.r * w.k * bytes;
  own.b = static_cast<const char*>(lora.b) + e * w.n * lora.r * bytes;
  return own;
}

template <class T>
void experts_forward(int64_t m, const T* x, int64_t ldx, int64_t count, const int64_t* ends, const fastlora_weight& w,
                     const float* bias, const fastlora_lora& lora, float* s, T* y, int threads) {
  const Segments segments(count, ends, threads);
  const int64_t r = lora.r;
  for_experts(segments, threads, [&](const Segment& one, int inner) {
    forward(one.rows, x + one.first * ldx, ldx, weight_of(w, one.expert), bias ? bias + one.expert * w.n : nullptr,
            update_of(lora, w, one.expert), s ? s + one.first * r : nullptr, y + one.first * w.n, inner);
  });
  const int64_t left = m - segments.rows;
  memset(static_cast<void*>(y + segments.rows * w.n), 0, left * w.n * sizeof(T));
  if (r) memset(s + segments.rows * r, 0, left * r * sizeof(float));
}

template <class T, class L>
void experts_backward(int64_t m, const T* dy, int64_t lddy, const T* x, int64_t ldx, const float* s, int64_t count,
                      const int64_t* ends, const fastlora_weight& w, const fastlora_lora& lora, T* dx, L* da, L* db,
                      int threads) {
  const Segments segments(count, ends, threads);
  const int64_t r = lora.r;
  for (int64_t e = 0, before = 0; e < count; before = ends[e++]) {
    if (ends[e] > before) continue;
    if (da) memset(static_cast<void*>(da + e * r * w.k), 0, r * w.k * sizeof(L));
    if (db) memset(static_cast<void*>(db + e * w.n * r), 0, w.n * r * sizeof(L));
  }
  for_experts(segments, threads, [&](const Segment& one, int inner) {
    backward<T, L>(one.rows, dy + one.first * lddy, lddy, x ? x + one.first * ldx : nullptr, ldx,
                   s ? s + one.first * r : nullptr, weight_of(w, one.expert), update_of(lora, w, one.expert),
                   dx ? dx + one.first * w.k : nullptr, da ? da + one.expert * r * w.k : nullptr,
                   db ? db + one.expert * w.n * r : nullptr, inner);
  });
  if (dx) memset(static_cast<void*>(dx + segments.rows * w.k), 0, (m - segments.rows) * w.k * sizeof(T));
}

void lora_experts(int32_t dtype, int64_t m, const void* x, int64_t ldx, int64_t count, const int64_t* ends,
                  const fastlora_weight& w, const float* bias, const fastlora_lora& lora, float* s, void* y,
                  int threads) {
  as_type(dtype, x, [&](auto* rows) {
    experts_forward(m, rows, ldx, count, ends, w, bias, lora, s, static_cast<values_of<decltype(rows)>*>(y), threads);
  });
}

void lora_experts_backward(int32_t dtype, int64_t m, const void* dy, int64_t lddy, const void* x, int64_t ldx,
                           const float* s, int64_t count, const int64_t* ends, const fastlora_weight& w,
                           const fastlora_lora& lora, void* dx, void* da, void* db, int threads) {
  as_type(dtype, dy, [&](auto* rows) {
    using T = values_of<decltype(rows)>;
    as_type(lora.dtype, nullptr, [&](auto* p) {
      using L = values_of<decltype(p)>;
      experts_backward<T, L>(m, rows, lddy, static_cast<const T*>(x), ldx, s, count, ends, w, lora,
                             static_cast<T*>(dx), static_cast<L*>(da), static_cast<L*>(db), threads);
    });
  });
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora

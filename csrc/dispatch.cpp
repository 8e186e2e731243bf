// The C ABI of fastlora.h: validates, then calls the widest instruction set this CPU has.
#include <stdlib.h>
#include <string.h>

#include <atomic>

#include "kernels.h"
#if defined(FASTLORA_X86)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastlora {

#define FASTLORA_DECLARE(ISA) \
  namespace ISA {             \
  extern const Kernels kernels; \
  }
FASTLORA_DECLARE(baseline)
#if defined(FASTLORA_X86)
FASTLORA_DECLARE(avx2)
FASTLORA_DECLARE(avx512)
FASTLORA_DECLARE(avx512bf16)
FASTLORA_DECLARE(amx)
#endif

namespace {

#if defined(FASTLORA_X86)
// Linux hands out the 8 KiB of tile state on request only.
bool amx_granted() {
  unsigned eax = 7, ebx = 0, ecx = 0, edx = 0;
  __asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  if ((edx & (amx_bf16 | amx_tile)) != (amx_bf16 | amx_tile)) return false;
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#endif

bool supported(const Kernels& k) {
#if defined(FASTLORA_EMULATED)  // by .ci/emulate, for tests
  return true;
#elif defined(FASTLORA_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (&k == &avx2::kernels) return avx2;
  if (&k == &avx512::kernels) return avx512;
  if (&k == &avx512bf16::kernels) return bf16;
  if (&k == &amx::kernels) return bf16 && amx_granted();
#endif
  return &k == &baseline::kernels;
}

const Kernels* const all[] = {
#if defined(FASTLORA_X86)
    &amx::kernels, &avx512bf16::kernels, &avx512::kernels, &avx2::kernels,
#endif
    &baseline::kernels};

const Kernels* widest() {
  for (const Kernels* k : all)
    if (supported(*k)) return k;
  return &baseline::kernels;
}

std::atomic<const Kernels*> chosen{nullptr};

const Kernels& kernels() {
  const Kernels* k = chosen.load(std::memory_order_acquire);
  if (!k) chosen.store(k = widest(), std::memory_order_release);
  return *k;
}

struct Scratch {
  void* data[SCRATCH_SLOTS] = {};
  size_t bytes[SCRATCH_SLOTS] = {};
  ~Scratch() {
    for (void* p : data) free(p);
  }
};
thread_local Scratch mine;

bool known(int32_t dtype) { return dtype >= FASTLORA_F32 && dtype <= FASTLORA_F16; }

bool valid(int32_t dtype, int64_t m, const fastlora_weight* w, const fastlora_lora* lora, int32_t threads) {
  if (!known(dtype)) return false;
  if (!w || !lora || m < 0 || w->n < 0 || w->k < 0 || lora->r < 0 || threads < 1) return false;
  if (lora->r && lora->dtype != FASTLORA_F32 && lora->dtype != dtype) return false;
  if (lora->seed && !(lora->dropout >= 0 && lora->dropout < 1)) return false;
  for (int64_t i = 0; lora->spans && i < m; ++i) {
    const int32_t *span = lora->spans + 2 * i;
    if (span[0] < 0 || span[1] < span[0] || span[1] > lora->r) return false;
  }
  if (w->format == FASTLORA_DENSE) return w->dtype == dtype;
  return w->format == FASTLORA_4BIT && w->block_shift >= 4 && w->block_shift < 32 &&
         (!w->nested_absmax || (w->nested_code && w->nested_offset));
}

bool valid_group(int32_t dtype, int64_t m, int32_t count, const fastlora_weight* w, const fastlora_lora* lora,
                 int32_t threads) {
  int32_t adapter = -1;
  for (int32_t i = 0; i < count; ++i) {
    if (!valid(dtype, m, w + i, lora + i, threads) || w[i].k != w->k || lora[i].seed || lora[i].spans) return false;
    if (lora[i].r && adapter >= 0 && lora[i].dtype != adapter) return false;
    if (lora[i].r) adapter = lora[i].dtype;
  }
  return count > 0;
}

bool valid_experts(int32_t dtype, int64_t m, int64_t count, const int64_t* ends, const fastlora_weight* w,
                   const fastlora_lora* lora, int32_t threads) {
  if (!valid(dtype, m, w, lora, threads) || lora->seed || lora->spans || count < 1) return false;
  int64_t last = 0;
  for (int64_t i = 0; i < count; last = ends[i++])
    if (ends[i] < last || ends[i] > m) return false;
  return true;
}

}  // namespace

void* scratch(ScratchSlot slot, size_t bytes) {
  if (mine.bytes[slot] < bytes) {
    free(mine.data[slot]);
    mine.bytes[slot] = (bytes + 4095) / 4096 * 4096;
    mine.data[slot] = aligned_alloc(4096, mine.bytes[slot]);
    if (!mine.data[slot]) abort();  // no way to report from inside a parallel region
  }
  return mine.data[slot];
}

}  // namespace fastlora

extern "C" {

int32_t fastlora_abi_version(void) { return FASTLORA_ABI; }

const char* fastlora_source_id(void) { return FASTLORA_SOURCE_ID; }

const char* fastlora_isa(void) { return fastlora::kernels().name; }

int32_t fastlora_set_isa(const char* name) {
  for (const fastlora::Kernels* k : fastlora::all)
    if (strcmp(k->name, name) == 0 && fastlora::supported(*k)) {
      fastlora::chosen.store(k);
      return 0;
    }
  return FASTLORA_EINVAL;
}

int32_t fastlora_lora_linear(int32_t dtype, int64_t m, const void* x, int64_t ldx, const fastlora_weight* w,
                             const float* bias, const fastlora_lora* lora, float* s, void* y, int32_t threads) {
  if (!fastlora::valid(dtype, m, w, lora, threads)) return FASTLORA_EINVAL;
  if (m && w->n) fastlora::kernels().lora_linear(dtype, m, x, ldx, *w, bias, *lora, s, y, threads);
  return 0;
}

int32_t fastlora_lora_linear_backward(int32_t dtype, int64_t m, const void* dy, int64_t lddy, const void* x,
                                      int64_t ldx, const float* s, const fastlora_weight* w,
                                      const fastlora_lora* lora, void* dx, void* da, void* db, int32_t threads) {
  if (!fastlora::valid(dtype, m, w, lora, threads)) return FASTLORA_EINVAL;
  fastlora::kernels().lora_linear_backward(dtype, m, dy, lddy, x, ldx, s, *w, *lora, dx, da, db, threads);
  return 0;
}

int32_t fastlora_lora_group(int32_t dtype, int64_t m, const void* x, int64_t ldx, int32_t count,
                            const fastlora_weight* w, const float* const* bias, const fastlora_lora* lora,
                            float* const* s, void* const* y, int32_t threads) {
  if (!fastlora::valid_group(dtype, m, count, w, lora, threads)) return FASTLORA_EINVAL;
  if (m) fastlora::kernels().lora_group(dtype, m, x, ldx, count, w, bias, lora, s, y, threads);
  return 0;
}

int32_t fastlora_lora_group_backward(int32_t dtype, int64_t m, int32_t count, const void* const* dy,
                                     const int64_t* lddy, const void* x, int64_t ldx, const float* const* s,
                                     const fastlora_weight* w, const fastlora_lora* lora, void* dx, void* da,
                                     void* const* db, int32_t threads) {
  if (!fastlora::valid_group(dtype, m, count, w, lora, threads)) return FASTLORA_EINVAL;
  fastlora::kernels().lora_group_backward(dtype, m, count, dy, lddy, x, ldx, s, w, lora, dx, da, db, threads);
  return 0;
}

int32_t fastlora_lora_experts(int32_t dtype, int64_t m, const void* x, int64_t ldx, int64_t count, const int64_t* ends,
                              const fastlora_weight* w, const float* bias, const fastlora_lora* lora, float* s,
                              void* y, int32_t threads) {
  if (!fastlora::valid_experts(dtype, m, count, ends, w, lora, threads)) return FASTLORA_EINVAL;
  if (m && w->n) fastlora::kernels().lora_experts(dtype, m, x, ldx, count, ends, *w, bias, *lora, s, y, threads);
  return 0;
}

int32_t fastlora_lora_experts_backward(int32_t dtype, int64_t m, const void* dy, int64_t lddy, const void* x,
                                       int64_t ldx, const float* s, int64_t count, const int64_t* ends,
                                       const fastlora_weight* w, const fastlora_lora* lora, void* dx, void* da,
                                       void* db, int32_t threads) {
  if (!fastlora::valid_experts(dtype, m, count, ends, w, lora, threads)) return FASTLORA_EINVAL;
  fastlora::kernels().lora_experts_backward(dtype, m, dy, lddy, x, ldx, s, count, ends, *w, *lora, dx, da, db,
                                            threads);
  return 0;
}

int32_t fastlora_weight_dots(int32_t dtype, int32_t x_dtype, int64_t m, const void* x, const fastlora_weight* w,
                             float* out, int32_t threads) {
  const fastlora_lora none = {};
  if (!fastlora::valid(dtype, m, w, &none, threads) || (x_dtype != dtype && x_dtype != FASTLORA_F32))
    return FASTLORA_EINVAL;
  if (m && w->n) fastlora::kernels().weight_dots(dtype, x_dtype, m, x, *w, out, threads);
  return 0;
}

int32_t fastlora_weight_squares(int32_t dtype, const fastlora_weight* w, float* out, int32_t threads) {
  const fastlora_lora none = {};
  if (!fastlora::valid(dtype, 0, w, &none, threads)) return FASTLORA_EINVAL;
  fastlora::kernels().weight_squares(dtype, *w, out, threads);
  return 0;
}

int32_t fastlora_row_norms(int32_t dtype, int64_t n, int64_t r, const float* squares, const float* dots, const void* b,
                           const float* gram, float scaling, float* out, int32_t threads) {
  if (!fastlora::known(dtype) || n < 0 || r < 0 || threads < 1) return FASTLORA_EINVAL;
  fastlora::kernels().row_norms(dtype, n, r, squares, dots, b, gram, scaling, out, threads);
  return 0;
}

int32_t fastlora_scaled_linear(int32_t dtype, int64_t m, const void* x, int64_t ldx, const fastlora_weight* w,
                               const fastlora_lora* lora, const float* squares, const float* magnitude,
                               const float* bias, float* norms, float* s, void* z, void* y, int32_t threads) {
  if (!fastlora::valid(dtype, m, w, lora, threads) || (lora->dtype != dtype && lora->dtype != FASTLORA_F32))
    return FASTLORA_EINVAL;
  fastlora::kernels().scaled_linear(dtype, m, x, ldx, *w, *lora, squares, magnitude, bias, norms, s, z, y, threads);
  return 0;
}

int32_t fastlora_products(int32_t dtype, int32_t kind, const int64_t* size, const void* u, const void* v, void* out,
                          int32_t threads) {
  if (!fastlora::known(dtype) || kind < FASTLORA_ROWS || kind > FASTLORA_KRON || threads < 1) return FASTLORA_EINVAL;
  fastlora::kernels().products(dtype, kind, size, u, v, out, threads);
  return 0;
}

int32_t fastlora_products_backward(int32_t dtype, int32_t kind, const int64_t* size, const void* g, const void* u,
                                   const void* v, void* du, void* dv, int32_t threads) {
  if (!fastlora::known(dtype) || kind < FASTLORA_ROWS || kind > FASTLORA_KRON || threads < 1) return FASTLORA_EINVAL;
  fastlora::kernels().products_backward(dtype, kind, size, g, u, v, du, dv, threads);
  return 0;
}

int32_t fastlora_scale_columns(int32_t dtype, int64_t m, int64_t n, const void* z, const float* scale,
                               const float* bias, void* y, int32_t threads) {
  if (!fastlora::known(dtype) || m < 0 || n < 0 || threads < 1) return FASTLORA_EINVAL;
  fastlora::kernels().scale_columns(dtype, m, n, z, scale, bias, y, threads);
  return 0;
}

int32_t fastlora_scale_columns_backward(int32_t dtype, int64_t m, int64_t n, const void* dy, int64_t lddy,
                                        const void* z, const float* scale, void* dz, float* dscale, int32_t threads) {
  if (!fastlora::known(dtype) || m < 0 || n < 0 || (dscale && !z) || threads < 1) return FASTLORA_EINVAL;
  fastlora::kernels().scale_columns_backward(dtype, m, n, dy, lddy, z, scale, dz, dscale, threads);
  return 0;
}

int32_t fastlora_add_kron(int32_t dtype, int64_t m, const void* x, int64_t ldx, const int64_t* size, const float* w1,
                          const float* p, const float* q, void* y, int32_t threads) {
  if (!fastlora::known(dtype) || m < 0 || threads < 1) return FASTLORA_EINVAL;
  fastlora::kernels().add_kron(dtype, m, x, ldx, size, w1, p, q, y, threads);
  return 0;
}

int32_t fastlora_add_kron_backward(int32_t dtype, int64_t m, const void* dy, int64_t lddy, const void* x, int64_t ldx,
                                   const int64_t* size, const float* w1, const float* p, const float* q, void* dx,
                                   float* factors, int32_t threads) {
  if (!fastlora::known(dtype) || m < 0 || threads < 1) return FASTLORA_EINVAL;
  fastlora::kernels().add_kron_backward(dtype, m, dy, lddy, x, ldx, size, w1, p, q, dx, factors, threads);
  return 0;
}

int32_t fastlora_quantize_4bit(int32_t dtype, int64_t n, const void* x, const float* thresholds, const uint8_t* order,
                               int64_t blocksize, uint8_t* packed, float* absmax, int32_t threads) {
  if (dtype < FASTLORA_F32 || dtype > FASTLORA_F16 || n < 0 || blocksize < 2 || blocksize % 2 || threads < 1)
    return FASTLORA_EINVAL;
  if (n) fastlora::kernels().quantize_4bit(dtype, n, x, thresholds, order, blocksize, packed, absmax, threads);
  return 0;
}

int32_t fastlora_dequantize_4bit(int32_t dtype, const fastlora_weight* w, void* out, int32_t threads) {
  const fastlora_lora none = {};
  if (dtype < FASTLORA_F32 || dtype > FASTLORA_F16 || !w || w->format != FASTLORA_4BIT) return FASTLORA_EINVAL;
  if (!fastlora::valid(FASTLORA_F32, 0, w, &none, threads)) return FASTLORA_EINVAL;
  fastlora::kernels().dequantize_4bit(dtype, *w, out, threads);
  return 0;
}

}  // extern "C"

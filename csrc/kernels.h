// What every instruction set provides, and the scratch memory they share. Internal: not part of the C ABI.
#pragma once
#include <stddef.h>

#include "fastlora.h"

namespace fastlora {

// One entry per instruction set; the functions have the arguments of fastlora.h after validation.
struct Kernels {
  const char* name;
  void (*lora_linear)(int32_t dtype, int64_t m, const void* x, int64_t ldx, const fastlora_weight& w,
                      const float* bias, const fastlora_lora& lora, float* s, void* y, int threads);
  void (*lora_linear_backward)(int32_t dtype, int64_t m, const void* dy, int64_t lddy, const void* x, int64_t ldx,
                               const float* s, const fastlora_weight& w, const fastlora_lora& lora, void* dx,
                               void* da, void* db, int threads);
  void (*lora_group)(int32_t dtype, int64_t m, const void* x, int64_t ldx, int count, const fastlora_weight* w,
                     const float* const* bias, const fastlora_lora* lora, float* const* s, void* const* y,
                     int threads);
  void (*lora_group_backward)(int32_t dtype, int64_t m, int count, const void* const* dy, const int64_t* lddy,
                              const void* x, int64_t ldx, const float* const* s, const fastlora_weight* w,
                              const fastlora_lora* lora, void* dx, void* da, void* const* db, int threads);
  void (*lora_experts)(int32_t dtype, int64_t m, const void* x, int64_t ldx, int64_t count, const int64_t* ends,
                       const fastlora_weight& w, const float* bias, const fastlora_lora& lora, float* s, void* y,
                       int threads);
  void (*lora_experts_backward)(int32_t dtype, int64_t m, const void* dy, int64_t lddy, const void* x, int64_t ldx,
                                const float* s, int64_t count, const int64_t* ends, const fastlora_weight& w,
                                const fastlora_lora& lora, void* dx, void* da, void* db, int threads);
  void (*quantize_4bit)(int32_t dtype, int64_t n, const void* x, const float* thresholds, const uint8_t* order,
                        int64_t blocksize, uint8_t* packed, float* absmax, int threads);
  void (*weight_dots)(int32_t dtype, int32_t x_dtype, int64_t m, const void* x, const fastlora_weight& w, float* out,
                      int threads);
  void (*weight_squares)(int32_t dtype, const fastlora_weight& w, float* out, int threads);
  void (*row_norms)(int32_t dtype, int64_t n, int64_t r, const float* squares, const float* dots, const void* b,
                    const float* gram, float scaling, float* out, int threads);
  void (*scaled_linear)(int32_t dtype, int64_t m, const void* x, int64_t ldx, const fastlora_weight& w,
                        const fastlora_lora& lora, const float* squares, const float* magnitude, const float* bias,
                        float* norms, float* s, void* z, void* y, int threads);
  void (*scale_columns)(int32_t dtype, int64_t m, int64_t n, const void* z, const float* scale, const float* bias,
                        void* y, int threads);
  void (*scale_columns_backward)(int32_t dtype, int64_t m, int64_t n, const void* dy, int64_t lddy, const void* z,
                                 const float* scale, void* dz, float* dscale, int threads);
  void (*products)(int32_t dtype, int32_t kind, const int64_t* size, const void* u, const void* v, void* out,
                   int threads);
  void (*products_backward)(int32_t dtype, int32_t kind, const int64_t* size, const void* g, const void* u,
                            const void* v, void* du, void* dv, int threads);
  void (*add_kron)(int32_t dtype, int64_t m, const void* x, int64_t ldx, const int64_t* size, const float* w1,
                   const float* p, const float* q, void* y, int threads);
  void (*add_kron_backward)(int32_t dtype, int64_t m, const void* dy, int64_t lddy, const void* x, int64_t ldx,
                            const int64_t* size, const float* w1, const float* p, const float* q, void* dx,
                            float* factors, int threads);
  void (*dequantize_4bit)(int32_t dtype, const fastlora_weight& w, void* out, int threads);
};

// What a thread keeps between calls. Each slot is a buffer of its own.
enum ScratchSlot {
  SCRATCH_PANEL,
  SCRATCH_ROWS,
  SCRATCH_PARTIAL,
  SCRATCH_LOW_RANK,
  SCRATCH_LOW_PANEL,
  SCRATCH_SHARED,
  SCRATCH_SPLIT,
  SCRATCH_OPERAND,
  SCRATCH_STACKED,
  SCRATCH_GROUP,
  SCRATCH_DOTS,
  SCRATCH_NORMS,
  SCRATCH_GRAM,
  SCRATCH_SLOTS
};

// At least `bytes` bytes aligned to 64, owned by the calling thread and reused by its later calls.
void* scratch(ScratchSlot slot, size_t bytes);

}  // namespace fastlora

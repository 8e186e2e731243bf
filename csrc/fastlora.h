// C ABI of the native CPU kernels: plain pointers and integers, no torch, no Python.
//
// Sizes are in elements. Every pointer is to contiguous memory unless a leading dimension (ld*) is given.
// Functions return 0, or FASTLORA_EINVAL when an argument is outside what is documented here, with nothing written.
#pragma once
#include <stdint.h>

#define FASTLORA_API __attribute__((visibility("default")))
#define FASTLORA_ABI 5
#define FASTLORA_EINVAL 1

#ifdef __cplusplus
extern "C" {
#endif

// Floating-point types of activations, adapters and dense weights.
enum { FASTLORA_F32 = 0, FASTLORA_BF16 = 1, FASTLORA_F16 = 2 };
// Weight formats.
enum { FASTLORA_DENSE = 0, FASTLORA_4BIT = 1 };

// A frozen weight W of n rows (out_features) and k columns (in_features), row-major.
typedef struct {
  int64_t n, k;
  int32_t format;              // FASTLORA_DENSE or FASTLORA_4BIT
  int32_t dtype;               // FASTLORA_DENSE: F32 or BF16
  const void* data;            // dense values, or packed nibbles, high nibble first over the flattened (n, k)
  const float* code;           // 4-bit: the 16 values of the code book
  const void* absmax;          // 4-bit: one per block: float, or uint8_t codes when nested_absmax is given
  const float* nested_absmax;  // double quantisation: one per 256 blocks; else NULL
  const float* nested_code;    // double quantisation: the 256 values of the 8-bit code book
  const float* nested_offset;  // double quantisation: one value, added to every decoded absmax
  int32_t block_shift;         // 4-bit: log2(blocksize)
} fastlora_weight;

// A low-rank update scaling * B A; r == 0 means none.
typedef struct {
  int64_t r;
  int32_t dtype;         // F32, or the dtype of the activations
  float scaling;
  const void* a;         // (r, k)
  const void* b;         // (n, r)
  const int32_t* spans;  // (m, 2): row i of x has the ranks spans[2 i] up to spans[2 i + 1] alone; NULL: all of them
  const int64_t* seed;   // one value: x is dropped out on its way to A, by the mask of dropout.inl.h; NULL: no dropout
  double dropout;        // with a seed: the probability, at least 0 and below 1
} fastlora_lora;

// FASTLORA_ABI of the library, bumped with every change of this file.
FASTLORA_API int32_t fastlora_abi_version(void);
// Hash of the sources the library was built from.
FASTLORA_API const char* fastlora_source_id(void);
// Instruction set in use: "baseline", "avx2", "avx512", "avx512bf16" or "amx".
FASTLORA_API const char* fastlora_isa(void);
// Use instruction set `name`; FASTLORA_EINVAL when it is unknown or this CPU lacks it.
FASTLORA_API int32_t fastlora_set_isa(const char* name);

// y (m, n) = x W^T + bias + scaling s B^T, and s (m, r) = drop(x) A^T in float, zero outside each row's span.
//   dtype: of x and y, F32, BF16 or F16; a dense weight must have the same. bias: (n) or NULL. s: NULL when r == 0.
FASTLORA_API int32_t fastlora_lora_linear(int32_t dtype, int64_t m, const void* x, int64_t ldx,
                                          const fastlora_weight* w, const float* bias, const fastlora_lora* lora,
                                          float* s, void* y, int32_t threads);

// Gradients of the above for the output gradient dy (m, n); an output that is NULL is not computed.
//   ds = scaling (dy B), zero outside each row's span;
//   dx (m, k) = dy W + drop(ds A);  da (r, k) = ds^T drop(x);  db (n, r) = scaling dy^T s.
//   da and db have lora->dtype; da needs x, db needs s.
FASTLORA_API int32_t fastlora_lora_linear_backward(int32_t dtype, int64_t m, const void* dy, int64_t lddy,
                                                   const void* x, int64_t ldx, const float* s,
                                                   const fastlora_weight* w, const fastlora_lora* lora, void* dx,
                                                   void* da, void* db, int32_t threads);

// Layers that are fed the same x: `count` of them, with one k; arrays have one entry per layer. No dropout, no spans,
// and one adapter dtype. Outputs are those of fastlora_lora_linear for each layer.
FASTLORA_API int32_t fastlora_lora_group(int32_t dtype, int64_t m, const void* x, int64_t ldx, int32_t count,
                                         const fastlora_weight* w, const float* const* bias,
                                         const fastlora_lora* lora, float* const* s, void* const* y, int32_t threads);

// Its gradients: dx (m, k) summed over the layers, da (sum of r, k) one layer's below the other's, db per layer;
// dx, da and entries of db may be NULL.
FASTLORA_API int32_t fastlora_lora_group_backward(int32_t dtype, int64_t m, int32_t count, const void* const* dy,
                                                  const int64_t* lddy, const void* x, int64_t ldx,
                                                  const float* const* s, const fastlora_weight* w,
                                                  const fastlora_lora* lora, void* dx, void* da, void* const* db,
                                                  int32_t threads);

// Mixtures of experts: `count` weights of one shape, of which `w` is the first; in each of its arrays (data, absmax,
// nested_absmax, nested_offset) and in those of `lora` and `bias` the next expert's values follow at once. Rows of x are
// sorted by expert; ends (count) ascend to at most m: expert e has the rows from ends[e - 1] up to ends[e]. Outputs are
// those of fastlora_lora_linear for each expert's rows, and zero in rows of none. No dropout, no spans.
FASTLORA_API int32_t fastlora_lora_experts(int32_t dtype, int64_t m, const void* x, int64_t ldx, int64_t count,
                                           const int64_t* ends, const fastlora_weight* w, const float* bias,
                                           const fastlora_lora* lora, float* s, void* y, int32_t threads);

// Its gradients: dx (m, k), da (count, r, k), db (count, n, r), zero where an expert has no rows; each may be NULL.
FASTLORA_API int32_t fastlora_lora_experts_backward(int32_t dtype, int64_t m, const void* dy, int64_t lddy,
                                                    const void* x, int64_t ldx, const float* s, int64_t count,
                                                    const int64_t* ends, const fastlora_weight* w,
                                                    const fastlora_lora* lora, void* dx, void* da, void* db,
                                                    int32_t threads);

// out (m, n) float = x (m, k) W^T, x of dtype F32 or `dtype`, W decoded to `dtype`; sums as exact as float allows.
FASTLORA_API int32_t fastlora_weight_dots(int32_t dtype, int32_t x_dtype, int64_t m, const void* x,
                                          const fastlora_weight* w, float* out, int32_t threads);

// out (n) = sum of squares of each row of W, decoded to `dtype`.
FASTLORA_API int32_t fastlora_weight_squares(int32_t dtype, const fastlora_weight* w, float* out, int32_t threads);

// out (n) = ||W + scaling B A|| of each row: the root of squares + 2 scaling <dots, B> + scaling^2 <B gram, B>, with
// squares (n) of fastlora_weight_squares, dots (r, n) = A W^T, B (n, r) of `dtype`, gram (r, r) = A A^T.
FASTLORA_API int32_t fastlora_row_norms(int32_t dtype, int64_t n, int64_t r, const float* squares, const float* dots,
                                        const void* b, const float* gram, float scaling, float* out, int32_t threads);

// DoRA: z (m, n) = x W^T + scaling s B^T, s as in fastlora_lora_linear; norms (n) as in fastlora_row_norms, W decoded to
// `dtype`; y (m, n) = z * (magnitude / norms) + bias, the factor being 0 for norms below FLT_MIN. squares and
// magnitude (n), bias (n) or NULL; the adapter has the dtype F32 or `dtype`.
FASTLORA_API int32_t fastlora_scaled_linear(int32_t dtype, int64_t m, const void* x, int64_t ldx,
                                            const fastlora_weight* w, const fastlora_lora* lora, const float* squares,
                                            const float* magnitude, const float* bias, float* norms, float* s, void* z,
                                            void* y, int32_t threads);

// y (m, n) = z * scale + bias; scale (n), bias (n) or NULL; z and y of `dtype`, contiguous.
FASTLORA_API int32_t fastlora_scale_columns(int32_t dtype, int64_t m, int64_t n, const void* z, const float* scale,
                                            const float* bias, void* y, int32_t threads);

// Its gradients: dz (m, n) = dy * scale, and dscale (n) = column sums of dy * z; either may be NULL.
FASTLORA_API int32_t fastlora_scale_columns_backward(int32_t dtype, int64_t m, int64_t n, const void* dy,
                                                     int64_t lddy, const void* z, const float* scale, void* dz,
                                                     float* dscale, int32_t threads);

// Products of two small matrices of `dtype`; `kind` says which and what `size` holds.
//   ROWS (r1, r2, k): u (r1, k), v (r2, k) -> out (r1 r2, k), row (i, j) = u[i] * v[j]
//   COLUMNS (n, r1, r2): u (n, r1), v (n, r2) -> out (n, r1 r2), column (i, j) = u[:, i] * v[:, j]
//   KRON (a, b, c, d): u (a, b), v (c, d) -> out (a c, b d), the Kronecker product
enum { FASTLORA_ROWS = 0, FASTLORA_COLUMNS = 1, FASTLORA_KRON = 2 };
FASTLORA_API int32_t fastlora_products(int32_t dtype, int32_t kind, const int64_t* size, const void* u, const void* v,
                                       void* out, int32_t threads);
// Their gradients du and dv for the gradient g of out; all of `dtype`.
FASTLORA_API int32_t fastlora_products_backward(int32_t dtype, int32_t kind, const int64_t* size, const void* g,
                                                const void* u, const void* v, void* du, void* dv, int32_t threads);

// LoKr beside the base: y (m, n1 n2) += x kron(w1, w2)^T for x (m, k1 k2), rounded once. size: n1, k1, n2, k2, c.
// w1 (n1, k1); w2 (n2, k2) is p (c = n2) where q is NULL, else q (n2, c) times p (c, k2).
FASTLORA_API int32_t fastlora_add_kron(int32_t dtype, int64_t m, const void* x, int64_t ldx, const int64_t* size,
                                       const float* w1, const float* p, const float* q, void* y, int32_t threads);
// Its gradients for dy (m, n1 n2): that of x is added to dx (m, k1 k2), and `factors` becomes those of w1, p and q one
// behind the other; either may be NULL.
FASTLORA_API int32_t fastlora_add_kron_backward(int32_t dtype, int64_t m, const void* dy, int64_t lddy, const void* x,
                                                int64_t ldx, const int64_t* size, const float* w1, const float* p,
                                                const float* q, void* dx, float* factors, int32_t threads);

// Block-wise 4-bit quantisation of n values of x (F32, BF16 or F16), bit-equal to bitsandbytes.
//   thresholds: 15 floats, ascending; order: 16 nibbles; a scaled value becomes order[number of thresholds below it].
//   packed: (n + 1) / 2 bytes; absmax: ceil(n / blocksize) floats. blocksize: even.
FASTLORA_API int32_t fastlora_quantize_4bit(int32_t dtype, int64_t n, const void* x, const float* thresholds,
                                            const uint8_t* order, int64_t blocksize, uint8_t* packed, float* absmax,
                                            int32_t threads);

// The n * k values of a 4-bit weight, as F32, BF16 or F16.
FASTLORA_API int32_t fastlora_dequantize_4bit(int32_t dtype, const fastlora_weight* w, void* out, int32_t threads);
#ifdef __cplusplus
}
#endif

// Every kernel of one instruction set and the table that dispatch.cpp picks. The including file sets FASTLORA_ISA.
#include "experts.inl.h"
#include "quantize.inl.h"

namespace fastlora {
namespace FASTLORA_ISA {

#define FASTLORA_NAME_(isa) #isa
#define FASTLORA_NAME(isa) FASTLORA_NAME_(isa)
extern const Kernels kernels;
const Kernels kernels = {  // in the order of kernels.h
    FASTLORA_NAME(FASTLORA_ISA),
    lora_linear,
    lora_linear_backward,
    lora_group,
    lora_group_backward,
    lora_experts,
    lora_experts_backward,
    quantize_4bit,
    weight_dots,
    weight_squares,
    row_norms,
    scaled_linear,
    scale_columns,
    scale_columns_backward,
    products,
    products_backward,
    add_kron,
    add_kron_backward,
    dequantize_4bit,
};

}  // namespace FASTLORA_ISA
}  // namespace fastlora

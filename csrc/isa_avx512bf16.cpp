#define FASTLORA_ISA avx512bf16
#include "kernels.inl.h"

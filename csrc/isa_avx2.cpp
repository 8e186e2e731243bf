#define FASTLORA_ISA avx2
#include "kernels.inl.h"

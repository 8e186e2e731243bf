#define FASTLORA_ISA baseline
#include "kernels.inl.h"

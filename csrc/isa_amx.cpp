#define FASTLORA_ISA amx
#include "kernels.inl.h"

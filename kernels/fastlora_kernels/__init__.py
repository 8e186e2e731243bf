"""Everything that computes: 4-bit formats, Triton kernels and the loader of the CPU library."""

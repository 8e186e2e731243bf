"""FP4: one sign bit, two exponent bits, one mantissa bit, as bitsandbytes lays them out.

The low three bits stand for 0, 1/192, 8/12, 12/12, 4/12, 6/12, 2/12, 3/12; the high bit is the
sign, and both zeros decode to +0.
"""

from __future__ import annotations

from fastlora_kernels.formats.codebook import Codebook

CODE: tuple[float, ...] = (
    0.0,
    0.0052083334885537624,
    0.6666666865348816,
    1.0,
    0.3333333432674408,
    0.5,
    0.1666666716337204,
    0.25,
    0.0,
    -0.0052083334885537624,
    -0.6666666865348816,
    -1.0,
    -0.3333333432674408,
    -0.5,
    -0.1666666716337204,
    -0.25,
)

FP4 = Codebook("fp4", CODE)

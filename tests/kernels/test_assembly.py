"""Reading the main loop out of machine code."""

from __future__ import annotations

import pytest
from fastlora_kernels import assembly

NVIDIA = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
.L_x_1:
        /*0020*/                   LDG.E.U8 R6, [R2.64] ;
        /*0030*/              @P0  LDGSTS.E.BYPASS.128 [R9], [R4.64] ;
        /*0040*/                   PRMT R5, R6, 0x5410, R7 ;
        /*0050*/                   PRMT R7, R6, 0x7632, R7 ;
        /*0060*/                   LOP3.LUT R8, R5, 0xf, RZ, 0xc0, !PT ;
        /*0070*/                   HMMA.16816.F32.BF16 R12, R4, R8, R12 ;
        /*0080*/                   HMMA.16816.F32.BF16 R16, R4, R10, R16 ;
        /*0090*/                   IADD3 R2, R2, 0x10, RZ ;
        /*00a0*/                   ISETP.LT.AND P1, PT, R2, R3, PT ;
        /*00b0*/              @P1  BRA `(.L_x_1) ;
        /*00c0*/                   STG.E [R20.64], R12 ;
        /*00d0*/                   EXIT ;
"""
AMD = """
kernel:
	s_load_dwordx2 s[0:1], s[4:5], 0x0
.LBB0_1:
	global_load_dwordx4 v[0:3], v4, s[0:1]
	v_perm_b32 v5, v0, v1, s2
	v_perm_b32 v6, v0, v1, s3
	v_mul_f32_e32 v5, v5, v6
	v_mfma_f32_16x16x16_bf16 v[8:11], v[0:1], v[2:3], v[8:11]
	v_add_u32_e32 v4, 16, v4
	s_add_i32 s6, s6, 1
	s_cmp_lt_i32 s6, s7
	v_mov_b32_e32 v12, v13
	s_cbranch_scc1 .LBB0_1
	s_endpgm
"""


@pytest.mark.parametrize(
    ("code", "length", "matrix", "nbytes", "operation"),
    [(NVIDIA, 10, 2, 17, ("PRMT", 2)), (AMD, 10, 1, 16, ("v_perm_b32", 2))],
    ids=["nvidia", "amd"],
)
def test_main_loop(
    code: str, length: int, matrix: int, nbytes: int, operation: tuple[str, int]
) -> None:
    loop = assembly.main_loop(code)
    assert loop.loops
    assert (len(loop.instructions), loop.matrix, loop.global_bytes) == (length, matrix, nbytes)
    assert loop.counts[operation[0]] == operation[1]


def test_code_without_a_loop_counts_once() -> None:
    straight = "\n".join(line for line in NVIDIA.splitlines() if "BRA" not in line)
    loop = assembly.main_loop(straight)
    assert not loop.loops
    assert len(loop.instructions) == 13


def test_the_loop_with_matrix_instructions_is_the_main_one() -> None:
    longer = "".join(f"        /*1{i:03x}*/   IADD3 R2, R2, 0x10, RZ ;\n" for i in range(40))
    second = f".L_x_2:\n{longer}        /*2000*/  @P1  BRA `(.L_x_2) ;\n"
    code = NVIDIA.replace("        /*00c0*/", second + "        /*00c0*/")
    assert assembly.main_loop(code).matrix == 2

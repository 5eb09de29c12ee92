"""Masks in Triton's interpreter are bool, as its newest version wants them."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from rnnfast.triton_kernels.steps import only_if


@triton.jit
def fill(p_x, N, wanted, AS_IS: tl.constexpr):
    i_x = tl.arange(0, 8)
    if AS_IS:
        b_mask = (i_x < N) & (tl.program_id(0) == wanted)
    else:
        b_mask = only_if(i_x < N, tl.program_id(0) == wanted)
    tl.store(p_x + i_x, 1.0, mask=b_mask)


@pytest.mark.parametrize("wanted", [0, 1])
def test_a_condition_of_the_program_makes_a_mask_of_bool(wanted):
    x = torch.zeros(8)
    fill[(1,)](x, 5, wanted, AS_IS=False)
    assert x.tolist() == [1.0 - wanted] * 5 + [0.0] * 3


def test_a_mask_of_numbers_is_found():
    """By this folder's check, or by Triton itself; a broadcast comparison is one."""
    with pytest.raises(Exception, match="mask"):
        fill[(1,)](torch.zeros(8), 5, 0, AS_IS=True)

"""What backward measures, from what it has left behind: one program a step (and slice of rows).

It is no part of the loop over time, which it would hold up: the loop leaves c_t, and here all
multiprocessors take the sums at once. Norms are by Blue's sums, so that none is lost on the way to
float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .backward import gradients_outside
from .rnn import through
from .steps import chosen, clip_scale, lengths_of, squares, stops


@triton.jit
def square_sum(b_small, b_usual, b_large):
    """The one of Blue's sums that is right, as it is, in float64."""
    b_sum, b_unit = chosen(b_small, b_usual, b_large)
    b_unit = b_unit.to(tl.float64)
    return b_sum.to(tl.float64) / (b_unit * b_unit)


@triton.jit
def put(p_field, b_x, i_b, B, PER_SAMPLE: tl.constexpr, FIELDS: tl.constexpr):
    """One field of the rows, or its sum over them."""
    if PER_SAMPLE:
        tl.store(p_field + i_b.to(tl.int64) * FIELDS, b_x, mask=i_b < B)
    else:
        tl.store(p_field, tl.sum(b_x, 0))


@triton.jit(
    do_not_specialize=(
        "T", "B", "s_g_t", "s_g_b", "s_y_t", "s_y_b", "s_dp_t", "s_dp_b", "limit", "window",
        "slices",
    )
)  # fmt: skip
def measure(
    p_record, p_carry, p_grad_y, p_grad_h_n, p_y, p_dp, p_lengths, p_reset,
    T, B, s_g_t, s_g_b, s_y_t, s_y_b, s_dp_t, s_dp_b, limit, window, slices,
    S: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    CLIPS: tl.constexpr, WINDOWED: tl.constexpr, PER_SAMPLE: tl.constexpr, UNIT: tl.constexpr,
    FIELDS: tl.constexpr, BS: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """record [D, T, N, FIELDS] float64 in the order of record.FIELDS, N = B or, over rows, 1."""
    i_t, i_d = tl.program_id(0) % T, tl.program_id(1)
    b_state = tl.zeros([BB], tl.float64)
    b_came = tl.zeros([BB], tl.float64)
    b_after = tl.zeros([BB], tl.float64)
    b_preact = tl.zeros([BB], tl.float64)
    b_slopes = tl.zeros([BB], tl.float64)
    b_bad_gradients = tl.zeros([BB], tl.float64)
    b_bad_states = tl.zeros([BB], tl.float64)
    b_entries = tl.zeros([BB], tl.float64)
    b_carried = tl.zeros([BB], tl.float64)
    b_most = tl.zeros([BB], tl.int32)  # magnitudes are ordered as their bits are, NaN the largest
    i_b = (tl.program_id(0) // T) * BB + tl.arange(0, BB)
    for _ in range(slices):
        b_length = lengths_of(p_lengths, i_b, T, B)
        b_valid = i_t < b_length
        b_end = tl.where(i_d == 1, 0, b_length - 1)
        b_stop = stops(p_reset, i_t + 1 - i_d, i_b, b_length, B, window, WINDOWED)
        i_row = (i_d * B + i_b).to(tl.int64)[None, :] * (HEADS * S)
        for i_head in range(HEADS):
            i_group = i_d * HEADS + i_head
            b_small = tl.zeros([BB], tl.float32)
            b_usual = tl.zeros([BB], tl.float32)
            b_large = tl.zeros([BB], tl.float32)
            for i_start in range(0, S, BS):
                i_s = i_start + tl.arange(0, BS)
                b_inside = (i_s < S)[:, None] & b_valid[None, :]
                i_unit = (i_group * S + i_s)[:, None]
                i_g = i_b.to(tl.int64)[None, :] * s_g_b * UNIT + i_unit
                i_state = i_row + (i_head * S + i_s)[:, None]
                b_g = gradients_outside(
                    p_grad_y, p_grad_h_n, i_t, i_g, i_state, b_inside, i_t == b_end, s_g_t, UNIT
                )
                i_carry = (i_t.to(tl.int64) * B + i_b)[None, :] * (D * HEADS * S) + i_unit
                b_carry = tl.load(p_carry + i_carry, mask=b_inside, other=0)
                i_y = (i_t.to(tl.int64) * s_y_t + i_b.to(tl.int64)[None, :] * s_y_b) * UNIT
                b_h = tl.load(p_y + i_y + i_unit, mask=b_inside, other=0).to(tl.float32)
                i_dp = (i_t.to(tl.int64) * s_dp_t + i_b.to(tl.int64)[None, :] * s_dp_b) * UNIT
                b_da = tl.load(p_dp + i_dp + i_unit, mask=b_inside, other=0).to(tl.float32)
                b_dh = b_carry + b_g
                b_x, b_y, b_z = squares(b_dh, 0)
                b_small, b_usual, b_large = b_small + b_x, b_usual + b_y, b_large + b_z
                b_x, b_y, b_z = squares(b_carry, 0)
                b_came += square_sum(b_x, b_y, b_z)
                b_x, b_y, b_z = squares(b_da, 0)
                b_preact += square_sum(b_x, b_y, b_z)
                b_slope = tl.abs(through(tl.full([BS, BB], 1.0, tl.float32), b_h, F))
                b_slopes += tl.sum(tl.where(b_inside, b_slope, 0.0), 0).to(tl.float64)
                # Counts are sums of float32: of integers, 0 or 1, Triton 3.9 makes a sum of bits,
                # for which it reserves a stack.
                b_good = (tl.abs(b_dh) < float("inf")) & (tl.abs(b_da) < float("inf"))
                b_bad_gradients += tl.sum(tl.where(b_good, 0.0, 1.0), 0).to(tl.float64)
                b_good = tl.abs(b_h) < float("inf")
                b_bad_states += tl.sum(tl.where(b_good, 0.0, 1.0), 0).to(tl.float64)
                b_bits = tl.abs(b_dh).to(tl.int32, bitcast=True)
                b_most = tl.maximum(b_most, tl.max(b_bits, 0))
            b_square = square_sum(b_small, b_usual, b_large)
            b_state += b_square
            if CLIPS:
                b_scale = clip_scale(b_small, b_usual, b_large, limit).to(tl.float64)
                b_after += b_square * b_scale * b_scale
            else:
                b_after += b_square
        b_units = tl.where(b_valid, HEADS * S, 0)
        b_entries += b_units.to(tl.float64)
        b_carried += tl.where(b_stop | (i_t == b_end), 0, b_units).to(tl.float64)
        i_b += BB
    if PER_SAMPLE:
        i_b -= BB
    i_step = i_d.to(tl.int64) * T + i_t
    p_step = p_record + i_step * (B if PER_SAMPLE else 1) * FIELDS
    put(p_step + 0, b_state, i_b, B, PER_SAMPLE, FIELDS)
    put(p_step + 1, b_came, i_b, B, PER_SAMPLE, FIELDS)
    put(p_step + 2, b_after, i_b, B, PER_SAMPLE, FIELDS)
    put(p_step + 3, b_preact, i_b, B, PER_SAMPLE, FIELDS)
    if PER_SAMPLE:
        b_max = b_most.to(tl.float32, bitcast=True).to(tl.float64)
        tl.store(p_step + 4 + i_b.to(tl.int64) * FIELDS, b_max, mask=i_b < B)
    else:
        b_max = tl.max(b_most, 0).to(tl.float32, bitcast=True).to(tl.float64)
        tl.store(p_step + 4, b_max)
    put(p_step + 5, b_slopes, i_b, B, PER_SAMPLE, FIELDS)
    put(p_step + 6, b_bad_gradients, i_b, B, PER_SAMPLE, FIELDS)
    put(p_step + 7, b_bad_states, i_b, B, PER_SAMPLE, FIELDS)
    put(p_step + 8, b_entries, i_b, B, PER_SAMPLE, FIELDS)
    put(p_step + 9, b_carried, i_b, B, PER_SAMPLE, FIELDS)

"""The record of a backward pass: one program a step (and slice of rows).

It runs after the loop over time, which it would slow down. The loop stores c_t; here all
multiprocessors add up at once. Norms come from Blue's sums, so that no digit is lost on the way to
float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .backward import gradients_outside
from .steps import choose_sum, clip_scale, row_lengths, squares, stops


@triton.jit
def square_sum(b_small, b_usual, b_large):
    """The sum of squares in float64, from Blue's sums."""
    b_sum, b_unit = choose_sum(b_small, b_usual, b_large)
    b_unit = b_unit.to(tl.float64)
    return b_sum.to(tl.float64) / (b_unit * b_unit)


@triton.jit
def store_field(p_field, b_x, i_b, B, PER_SAMPLE: tl.constexpr, FIELDS: tl.constexpr):
    """One field of each row, or its sum over the rows."""
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
    p_record, p_carry, outside, p_y, p_dp, rows,
    T, B, s_g_t, s_g_b, s_y_t, s_y_b, s_dp_t, s_dp_b, limit, window, slices,
    FORM: tl.constexpr, GAIN: tl.constexpr, PER_SAMPLE: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """record [D, T, N, FIELDS] float64 in the order of record.FIELDS; N is B, or 1 for the sum over
    rows. GAIN is the cell's `gain`."""
    BS: tl.constexpr = FORM.BS
    BB: tl.constexpr = FORM.BB
    F: tl.constexpr = FORM.F
    i_t, i_d = tl.program_id(0) % T, tl.program_id(1)
    b_state_squares = tl.zeros([BB], tl.float64)
    b_carry_squares = tl.zeros([BB], tl.float64)
    b_clipped = tl.zeros([BB], tl.float64)
    b_preact_squares = tl.zeros([BB], tl.float64)
    b_gains = tl.zeros([BB], tl.float64)
    b_bad_gradients = tl.zeros([BB], tl.float64)
    b_bad_states = tl.zeros([BB], tl.float64)
    b_entries = tl.zeros([BB], tl.float64)
    b_carried = tl.zeros([BB], tl.float64)
    # The bits of magnitudes have the order of the magnitudes; NaN is the largest.
    b_largest = tl.zeros([BB], tl.int32)
    i_b = (tl.program_id(0) // T) * BB + tl.arange(0, BB)
    for _ in range(slices):
        b_length = row_lengths(rows.lengths, i_b, T, B)
        b_valid = i_t < b_length
        b_end = tl.where(i_d == 1, 0, b_length - 1)
        b_stop = stops(rows.reset, i_t + 1 - i_d, i_b, b_length, B, window, FORM)
        i_row = (i_d * B + i_b).to(tl.int64)[None, :] * (FORM.HEADS * FORM.S)
        for i_head in range(FORM.HEADS):
            i_group = i_d * FORM.HEADS + i_head
            b_small = tl.zeros([BB], tl.float32)
            b_usual = tl.zeros([BB], tl.float32)
            b_large = tl.zeros([BB], tl.float32)
            for i_start in range(0, FORM.S, BS):
                i_s = i_start + tl.arange(0, BS)
                b_inside = (i_s < FORM.S)[:, None] & b_valid[None, :]
                i_unit = (i_group * FORM.S + i_s)[:, None]
                i_g = i_b.to(tl.int64)[None, :] * s_g_b * FORM.UNIT + i_unit
                i_state = i_row + (i_head * FORM.S + i_s)[:, None]
                b_g = gradients_outside(
                    outside, i_t, i_g, i_state, b_inside, i_t == b_end, s_g_t, FORM
                )
                i_carry = (i_t.to(tl.int64) * B + i_b)[None, :] * (FORM.GROUPS * FORM.S) + i_unit
                b_carry = tl.load(p_carry + i_carry, mask=b_inside, other=0)
                i_y = (i_t.to(tl.int64) * s_y_t + i_b.to(tl.int64)[None, :] * s_y_b) * FORM.UNIT
                b_h = tl.load(p_y + i_y + i_unit, mask=b_inside, other=0).to(tl.float32)
                i_dp = (i_t.to(tl.int64) * s_dp_t + i_b.to(tl.int64)[None, :] * s_dp_b) * FORM.UNIT
                b_da = tl.load(p_dp + i_dp + i_unit, mask=b_inside, other=0).to(tl.float32)
                b_dh = b_carry + b_g
                b_x, b_y, b_z = squares(b_dh, 0)
                b_small, b_usual, b_large = b_small + b_x, b_usual + b_y, b_large + b_z
                b_x, b_y, b_z = squares(b_carry, 0)
                b_carry_squares += square_sum(b_x, b_y, b_z)
                b_x, b_y, b_z = squares(b_da, 0)
                b_preact_squares += square_sum(b_x, b_y, b_z)
                b_gain = tl.where(b_inside, GAIN((b_h,), F), 0.0)
                b_gains += tl.sum(b_gain, 0).to(tl.float64)
                # Counts add float32 values. From integers 0 and 1 Triton 3.9 makes a sum of bits,
                # for which it reserves a stack.
                b_good = (tl.abs(b_dh) < float("inf")) & (tl.abs(b_da) < float("inf"))
                b_bad_gradients += tl.sum(tl.where(b_good, 0.0, 1.0), 0).to(tl.float64)
                b_good = tl.abs(b_h) < float("inf")
                b_bad_states += tl.sum(tl.where(b_good, 0.0, 1.0), 0).to(tl.float64)
                b_bits = tl.abs(b_dh).to(tl.int32, bitcast=True)
                b_largest = tl.maximum(b_largest, tl.max(b_bits, 0))
            b_square = square_sum(b_small, b_usual, b_large)
            b_state_squares += b_square
            if FORM.CLIPS:
                b_scale = clip_scale(b_small, b_usual, b_large, limit).to(tl.float64)
                b_clipped += b_square * b_scale * b_scale
            else:
                b_clipped += b_square
        b_units = tl.where(b_valid, FORM.HEADS * FORM.S, 0)
        b_entries += b_units.to(tl.float64)
        b_carried += tl.where(b_stop | (i_t == b_end), 0, b_units).to(tl.float64)
        i_b += BB
    if PER_SAMPLE:
        i_b -= BB
    i_step = i_d.to(tl.int64) * T + i_t
    p_step = p_record + i_step * (B if PER_SAMPLE else 1) * FIELDS
    store_field(p_step + 0, b_state_squares, i_b, B, PER_SAMPLE, FIELDS)
    store_field(p_step + 1, b_carry_squares, i_b, B, PER_SAMPLE, FIELDS)
    store_field(p_step + 2, b_clipped, i_b, B, PER_SAMPLE, FIELDS)
    store_field(p_step + 3, b_preact_squares, i_b, B, PER_SAMPLE, FIELDS)
    if PER_SAMPLE:
        b_max = b_largest.to(tl.float32, bitcast=True).to(tl.float64)
        tl.store(p_step + 4 + i_b.to(tl.int64) * FIELDS, b_max, mask=i_b < B)
    else:
        b_max = tl.max(b_largest, 0).to(tl.float32, bitcast=True).to(tl.float64)
        tl.store(p_step + 4, b_max)
    store_field(p_step + 5, b_gains, i_b, B, PER_SAMPLE, FIELDS)
    store_field(p_step + 6, b_bad_gradients, i_b, B, PER_SAMPLE, FIELDS)
    store_field(p_step + 7, b_bad_states, i_b, B, PER_SAMPLE, FIELDS)
    store_field(p_step + 8, b_entries, i_b, B, PER_SAMPLE, FIELDS)
    store_field(p_step + 9, b_carried, i_b, B, PER_SAMPLE, FIELDS)
    # The two sums of a cell state, which these cells do not have.
    store_field(p_step + 10, b_carried * 0, i_b, B, PER_SAMPLE, FIELDS)
    store_field(p_step + 11, b_carried * 0, i_b, B, PER_SAMPLE, FIELDS)

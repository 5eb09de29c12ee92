"""Backpropagation through time: one program a slice of rows (resident), or a team (tiled).

    c_t = W_hh^T da_{t'},  dh_t = g_t + c_t,  dn_t = clip(dh_t) f'(n_t)
    da_t = dn_t, or rstd (dahat - mean(dahat) - ahat mean(dahat ahat)),  dahat = gamma dn_t

t' being the step after t in the order of the direction. Shapes as in forward; grad_y like y,
grad_h_n and dh_0 [D, B, HEADS * S], dp like y; carry [T, B, G * S] float32, dense: c_t for the
record; dgamma, dbeta [slices, G * S] float32, one part of the sum each. ANEW: f' comes from ahat.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rnn import through, value
from .steps import (
    arrive_and_wait,
    clip_scale,
    lengths_of,
    of_rows,
    of_states,
    of_units,
    only_if,
    operand,
    product,
    product_of_all,
    rows_at,
    squares,
    stops,
    sums_of_all,
    weights_of,
)

RUN_TIME = (
    "T", "B", "s_g_t", "s_g_b", "s_y_t", "s_y_b", "s_a_t", "s_a_b", "s_dp_t", "s_dp_b",
    "limit", "window",
)  # fmt: skip


@triton.jit
def gradients_outside(
    p_grad_y, p_grad_h_n, i_t, i_g_y, i_state, b_inside, b_ends, s_g_t, UNIT: tl.constexpr
):  # fmt: skip
    """g_t in float32: of y, and of h_n where a row ends."""
    b_g = tl.zeros(b_inside.shape, tl.float32)
    if p_grad_y is not None:
        p_step = p_grad_y + i_t.to(tl.int64) * s_g_t * UNIT
        b_g += tl.load(p_step + i_g_y, mask=b_inside, other=0).to(tl.float32)
    if p_grad_h_n is not None:
        b_mask = b_inside & b_ends[None, :]
        b_g += tl.load(p_grad_h_n + i_state, mask=b_mask, other=0).to(tl.float32)
    return b_g


@triton.jit
def state_anew(b_ahat, b_gamma, b_beta, F: tl.constexpr):
    """h from ahat: rounded to 16 bits it has few digits of f' left where f is flat."""
    b_n = b_ahat * b_gamma
    if b_beta is not None:
        b_n += b_beta
    return value(b_n, F)


@triton.jit(do_not_specialize=RUN_TIME)
def resident(
    p_grad_y, p_grad_h_n, p_y, p_w, p_gamma, p_beta, p_ahat, p_rstd, p_lengths, p_reset,
    p_dp, p_dh_0, p_dgamma, p_dbeta, p_carry,
    T, B, s_g_t, s_g_b, s_y_t, s_y_b, s_a_t, s_a_b, s_dp_t, s_dp_b, limit, window,
    S: tl.constexpr, SW: tl.constexpr, HEADS: tl.constexpr, G: tl.constexpr, F: tl.constexpr,
    CLIPS: tl.constexpr, WINDOWED: tl.constexpr, ANEW: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr, BS: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    i_g = tl.program_id(1)
    i_d = i_g // HEADS
    i_s, i_b = tl.arange(0, BS), tl.program_id(0) * BB + tl.arange(0, BB)
    b_units, b_wide, b_rows = i_s < S, i_s < SW, i_b < B
    b_inside = b_units[:, None] & b_rows[None, :]
    i_unit = (i_g * S + i_s)[:, None]
    b_length = lengths_of(p_lengths, i_b, T, B)
    b_w = tl.load(  # transposed
        p_w + (i_g * SW + i_s).to(tl.int64)[None, :] * SW + i_s[:, None],
        mask=b_wide[:, None] & b_wide[None, :],
        other=0,
    )
    b_w = operand(b_w, PRECISION)
    dtype = p_dp.dtype.element_ty
    b_gamma = None if p_gamma is None else of_units(p_gamma, i_unit, b_units)
    b_beta = None if p_beta is None else of_units(p_beta, i_unit, b_units)
    b_dgamma = tl.zeros([BS, BB], tl.float32)
    b_dbeta = tl.zeros([BS, BB], tl.float32)
    i_own = i_unit - i_d * (HEADS * S)
    i_end = of_states(i_d, i_b, i_own, B, HEADS * S)
    # In the order of the direction a row ends at its last valid step.
    b_end = tl.where(i_d == 1, 0, b_length - 1)
    i_t = (1 - i_d) * (T - 1)
    b_g = gradients_outside(
        p_grad_y, p_grad_h_n, i_t, of_rows(i_b, s_g_b, i_unit, UNIT), i_end, b_inside,
        i_t == b_end, s_g_t, UNIT,
    )  # fmt: skip
    p_step = p_y + i_t.to(tl.int64) * s_y_t * UNIT
    b_h = tl.load(p_step + of_rows(i_b, s_y_b, i_unit, UNIT), mask=b_inside, other=0)
    b_carry = tl.zeros([BS, BB], tl.float32)
    # What the step after this one needs comes in while this one computes; no other stages, which
    # would cost registers.
    for _ in tl.range(T, num_stages=1):
        i_row = rows_at(i_b, i_t, T) if UNIT == 1 else i_b
        i_state = of_states(i_d, i_row, i_own, B, HEADS * S)
        i_g_y = of_rows(i_row, s_g_b, i_unit, UNIT)
        i_y = of_rows(i_row, s_y_b, i_unit, UNIT)
        i_a = of_rows(i_row, s_a_b, i_unit, UNIT)
        i_dp = of_rows(i_row, s_dp_b, i_unit, UNIT)
        b_dh = b_carry + b_g
        b_of_slope = b_h.to(tl.float32)
        i_next = i_t - 1 + 2 * i_d
        b_more = only_if(b_inside, (i_next >= 0) & (i_next < T))
        b_g = gradients_outside(
            p_grad_y, p_grad_h_n, i_next, i_g_y, i_state, b_more, i_next == b_end, s_g_t, UNIT
        )
        b_h = tl.load(p_y + i_next.to(tl.int64) * s_y_t * UNIT + i_y, mask=b_more, other=0)
        b_valid = (i_t < b_length)[None, :]
        if p_carry is not None:
            i_carry = (i_t.to(tl.int64) * B + i_row)[None, :] * (G * S) + i_unit
            tl.store(p_carry + i_carry, b_carry, mask=b_inside)
        if CLIPS:
            b_small, b_usual, b_large = squares(b_dh, 0)
            b_dh *= clip_scale(b_small, b_usual, b_large, limit)[None, :]
        if p_gamma is not None:
            p_step = p_ahat + i_t.to(tl.int64) * s_a_t * UNIT
            b_ahat = tl.load(p_step + i_a, mask=b_inside, other=0).to(tl.float32)
            i_rstd = (i_t.to(tl.int64) * B + i_row) * G + i_g
            b_rstd = tl.load(p_rstd + i_rstd, mask=b_rows, other=0)[None, :]
            if ANEW:
                b_of_slope = state_anew(b_ahat, b_gamma, b_beta, F)
            b_dn = tl.where(b_valid & b_inside, through(b_dh, b_of_slope, F), 0.0)
            b_dgamma += b_dn * b_ahat
            b_dbeta += b_dn
            b_dahat = b_dn * b_gamma
            b_mean = tl.sum(b_dahat, 0) / S
            b_along = tl.sum(b_dahat * b_ahat, 0) / S
            b_da = b_rstd * (b_dahat - b_mean[None, :] - b_ahat * b_along[None, :])
        else:
            b_da = through(b_dh, b_of_slope, F)
        b_da = tl.where(b_valid & b_inside, b_da, 0.0).to(dtype)
        tl.store(p_dp + i_t.to(tl.int64) * s_dp_t * UNIT + i_dp, b_da, mask=b_inside)
        b_back = product(b_w, operand(b_da, PRECISION), tl.zeros([BS, BB], tl.float32), PRECISION)
        b_stop = stops(p_reset, i_t + i_d, i_row, b_length, B, window, WINDOWED)
        b_carry = tl.where(b_stop[None, :], 0.0, tl.where(b_valid, b_back, b_carry))
        i_t = i_next
    if p_dh_0 is not None:
        if p_grad_h_n is not None:
            b_empty = b_inside & (b_length == 0)[None, :]
            b_carry += tl.load(p_grad_h_n + i_end, mask=b_empty, other=0).to(tl.float32)
        tl.store(p_dh_0 + i_end, b_carry.to(dtype), mask=b_inside)
    if p_dgamma is not None:
        i_part = tl.program_id(0).to(tl.int64) * (G * S) + i_g * S + i_s
        tl.store(p_dgamma + i_part, tl.sum(b_dgamma, 1), mask=b_units)
        if p_dbeta is not None:
            tl.store(p_dbeta + i_part, tl.sum(b_dbeta, 1), mask=b_units)


@triton.jit(do_not_specialize=(*RUN_TIME, "programs", "slices", "units"))
def tiled(
    p_grad_y, p_grad_h_n, p_y, p_w, p_gamma, p_beta, p_ahat, p_rstd, p_lengths, p_reset,
    p_dp, p_dh_0, p_dgamma, p_dbeta, p_carry, p_counter, p_exchange,
    T, B, s_g_t, s_g_b, s_y_t, s_y_b, s_a_t, s_a_b, s_dp_t, s_dp_b, limit, window,
    programs, slices, units,
    S: tl.constexpr, SW: tl.constexpr, HEADS: tl.constexpr, G: tl.constexpr, F: tl.constexpr,
    CLIPS: tl.constexpr, WINDOWED: tl.constexpr, ANEW: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    BB: tl.constexpr, BP: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """As forward's: programs read da of the step after from dp itself, and the sums over all units
    that clipping and layer norm need from p_exchange [teams, 6, BP, BB] float32."""
    i_r, i_team = tl.program_id(0), tl.program_id(1)
    i_s = i_r * BR + tl.arange(0, BR)
    b_units, b_wide = i_s < S, i_s < SW
    p_arrivals, p_sums = p_counter + i_team, p_exchange + i_team * 6 * BP * BB
    dtype = p_dp.dtype.element_ty
    arrived = tl.zeros([], tl.int64)
    for i_set in range(i_team, G * slices, tl.num_programs(1)):
        i_g, i_slice = i_set % G, i_set // G
        i_d, i_b = i_g // HEADS, i_slice * BB + tl.arange(0, BB)
        b_rows = i_b < B
        b_inside = b_units[:, None] & b_rows[None, :]
        b_length = lengths_of(p_lengths, i_b, T, B)
        i_unit = (i_g * S + i_s)[:, None]
        p_weights = p_w + tl.cast(i_g * SW, tl.int64) * SW + i_s[:, None]  # transposed
        b_w = None
        if KEPT:
            b_w = weights_of(p_weights, SW, tl.arange(0, BK), b_wide, SW, PRECISION)
        b_gamma = None if p_gamma is None else of_units(p_gamma, i_unit, b_units)
        b_beta = None if p_beta is None else of_units(p_beta, i_unit, b_units)
        b_dgamma = tl.zeros([BR, BB], tl.float32)
        b_dbeta = tl.zeros([BR, BB], tl.float32)
        i_own = (i_g % HEADS) * S + i_s[:, None]
        b_nothing = tl.zeros([BR, BB], tl.float32)
        b_end = tl.where(i_d == 1, 0, b_length - 1)
        i_t = (1 - i_d) * (T - 1)
        for _ in range(T):
            i_row = rows_at(i_b, i_t, T) if UNIT == 1 or PRECISION == "tf32x3" else i_b
            i_state = of_states(i_d, i_row, i_own, B, HEADS * S)
            i_g_y = of_rows(i_row, s_g_b, i_unit, UNIT)
            i_y = of_rows(i_row, s_y_b, i_unit, UNIT)
            i_a = of_rows(i_row, s_a_b, i_unit, UNIT)
            i_dp = of_rows(i_row, s_dp_b, i_g * S, UNIT)
            b_g = gradients_outside(
                p_grad_y, p_grad_h_n, i_t, i_g_y, i_state, b_inside, i_t == b_end, s_g_t, UNIT
            )
            p_step = p_y + i_t.to(tl.int64) * s_y_t * UNIT
            b_of_slope = tl.load(p_step + i_y, mask=b_inside, other=0).to(tl.float32)
            b_stop = stops(p_reset, i_t + 1 - i_d, i_row, b_length, B, window, WINDOWED)
            b_live = (i_t < b_length) & (i_t != b_end) & ~b_stop
            p_after = p_dp + (i_t + 1 - 2 * i_d).to(tl.int64) * s_dp_t * UNIT + i_dp
            b_carry = product_of_all(
                b_w, p_weights, SW, p_after, b_wide, b_live, b_nothing, units, S, SW, BK,
                PRECISION, UNIT,
            )  # fmt: skip
            if p_carry is not None:
                i_carry = (i_t.to(tl.int64) * B + i_row)[None, :] * (G * S) + i_unit
                tl.store(p_carry + i_carry, b_carry, mask=b_inside)
            b_valid = (i_t < b_length)[None, :]
            b_dh = b_carry + b_g
            if CLIPS:
                b_small, b_usual, b_large = squares(tl.where(b_inside, b_dh, 0.0), 0)
                arrived += programs
                b_small, b_usual, b_large = sums_of_all(
                    b_small, b_usual, b_large, p_sums, i_r, programs, p_arrivals, arrived, BP, BB
                )
                b_dh *= clip_scale(b_small, b_usual, b_large, limit)[None, :]
            if p_gamma is not None:
                p_step = p_ahat + i_t.to(tl.int64) * s_a_t * UNIT
                b_ahat = tl.load(p_step + i_a, mask=b_inside, other=0).to(tl.float32)
                i_rstd = (i_t.to(tl.int64) * B + i_row) * G + i_g
                b_rstd = tl.load(p_rstd + i_rstd, mask=b_rows, other=0)[None, :]
                if ANEW:
                    b_of_slope = state_anew(b_ahat, b_gamma, b_beta, F)
                b_dn = tl.where(b_valid & b_inside, through(b_dh, b_of_slope, F), 0.0)
                b_dgamma += b_dn * b_ahat
                b_dbeta += b_dn
                b_dahat = b_dn * b_gamma
                b_mean, b_along = tl.sum(b_dahat, 0), tl.sum(b_dahat * b_ahat, 0)
                arrived += programs
                b_mean, b_along, _ = sums_of_all(
                    b_mean, b_along, b_along, p_sums + 3 * BP * BB, i_r, programs, p_arrivals,
                    arrived, BP, BB,
                )  # fmt: skip
                b_mean, b_along = b_mean / S, b_along / S
                b_da = b_rstd * (b_dahat - b_mean[None, :] - b_ahat * b_along[None, :])
            else:
                b_da = through(b_dh, b_of_slope, F)
            b_da = tl.where(b_valid & b_inside, b_da, 0.0).to(dtype)
            p_step = p_dp + i_t.to(tl.int64) * s_dp_t * UNIT
            tl.store(p_step + i_dp + i_s[:, None], b_da, mask=b_inside)
            # dp of this step is complete, and p_exchange may be written again.
            arrived += programs
            arrive_and_wait(p_arrivals, arrived)
            i_t += 2 * i_d - 1
        if p_dh_0 is not None:
            b_first = tl.where(i_d == 1, b_length - 1, 0)
            b_stop = stops(p_reset, b_first + i_d, i_b, b_length, B, window, WINDOWED)
            p_first = p_dp + b_first.to(tl.int64)[None, :] * s_dp_t * UNIT
            p_first += of_rows(i_b, s_dp_b, i_g * S, UNIT)
            b_carry = product_of_all(
                b_w, p_weights, SW, p_first, b_wide, (b_length > 0) & ~b_stop, b_nothing,
                units, S, SW, BK, PRECISION, UNIT,
            )  # fmt: skip
            i_end = of_states(i_d, i_b, i_own, B, HEADS * S)
            if p_grad_h_n is not None:
                b_empty = b_inside & (b_length == 0)[None, :]
                b_carry += tl.load(p_grad_h_n + i_end, mask=b_empty, other=0).to(tl.float32)
            tl.store(p_dh_0 + i_end, b_carry.to(dtype), mask=b_inside)
        if p_dgamma is not None:
            i_part = tl.cast(i_slice, tl.int64) * (G * S) + i_g * S + i_s
            tl.store(p_dgamma + i_part, tl.sum(b_dgamma, 1), mask=b_units)
            if p_dbeta is not None:
                tl.store(p_dbeta + i_part, tl.sum(b_dbeta, 1), mask=b_units)

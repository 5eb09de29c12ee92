"""Backpropagation through time: one program a slice of rows (resident), or a team (tiled).

    c_t = W_hh^T da_{t'},  dh_t = g_t + c_t,  dn_t = clip(dh_t) f'(n_t)
    da_t = dn_t, or rstd (dahat - mean(dahat) - ahat mean(dahat ahat)),  dahat = gamma dn_t

t' is the step after t in the order of the direction. Shapes as in forward; grad_y and dp are like
y, grad_h_n and dh_0 [D, B, HEADS * S]; carry [T, B, GROUPS * S] float32, dense, is c_t for the
record; dgamma, dbeta [slices, GROUPS * S] float32 hold one part of the sum a slice of rows. STEP
and STEP_BACK are the cell's `step` and `step_back`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import scaled
from .steps import (
    Factor,
    arrive_and_wait,
    clip_scale,
    load_parameter,
    load_weights,
    only_if,
    operand,
    place_of,
    product,
    row_lengths,
    row_offsets,
    rows_at,
    rstd_offsets,
    squares,
    state_offsets,
    stops,
    team_product,
    team_sums,
    units_of,
)

RUN_TIME = (
    "T", "B", "s_g_t", "s_g_b", "s_y_t", "s_y_b", "s_a_t", "s_a_b", "s_dp_t", "s_dp_b",
    "limit", "window",
)  # fmt: skip


@triton.jit
def gradients_outside(outside, i_t, i_g_y, i_state, b_inside, b_ends, s_g_t, FORM: tl.constexpr):
    """g_t in float32: the gradient of y, and where a row ends the gradient of h_n."""
    b_g = tl.zeros(b_inside.shape, tl.float32)
    if outside.y is not None:
        p_step = outside.y + i_t.to(tl.int64) * s_g_t * FORM.UNIT
        b_g += tl.load(p_step + i_g_y, mask=b_inside, other=0).to(tl.float32)
    if outside.h_n is not None:
        b_mask = b_inside & b_ends[None, :]
        b_g += tl.load(outside.h_n + i_state, mask=b_mask, other=0).to(tl.float32)
    return b_g


@triton.jit
def load_normed(normed, i_a, i_t, i_row, place, s_a_t, B, FORM: tl.constexpr):
    """ahat in float32, and rstd [1, rows]."""
    p_step = normed.ahat + i_t.to(tl.int64) * s_a_t * FORM.UNIT
    b_ahat = tl.load(p_step + i_a, mask=place.b_inside, other=0).to(tl.float32)
    i_rstd = rstd_offsets(i_t, i_row, place.i_g, B, FORM)
    return b_ahat, tl.load(normed.rstd + i_rstd, mask=place.b_rows, other=0)[None, :]


@triton.jit
def recompute_state(b_ahat, b_gamma, b_beta, FORM: tl.constexpr, STEP: tl.constexpr):
    """h from ahat. An h that was rounded to 16 bits has few digits of f' left where f is flat."""
    F: tl.constexpr = FORM.F
    b_h, _, _ = STEP((scaled(b_ahat, b_gamma, b_beta),), (), F)
    return b_h


@triton.jit
def through_norm(b_dahat, b_ahat, b_rstd, b_mean, b_along):
    """da, from dahat and the means of dahat and of dahat ahat."""
    return b_rstd * (b_dahat - b_mean[None, :] - b_ahat * b_along[None, :])


@triton.jit
def store_dh_0(b_carry, outside, gradients, i_end, place, b_length):
    """dh_0; it is the gradient of h_n where a row has no step."""
    dtype = gradients.dp.dtype.element_ty
    if outside.h_n is not None:
        b_empty = place.b_inside & (b_length == 0)[None, :]
        b_carry += tl.load(outside.h_n + i_end, mask=b_empty, other=0).to(tl.float32)
    tl.store(gradients.dh_0 + i_end, b_carry.to(dtype), mask=place.b_inside)


@triton.jit
def store_norm_gradients(b_dgamma, b_dbeta, gradients, i_slice, place, FORM: tl.constexpr):
    """The part of these rows in dgamma and dbeta."""
    i_part = tl.cast(i_slice, tl.int64) * (FORM.GROUPS * FORM.S) + place.i_g * FORM.S + place.i_s
    tl.store(gradients.dgamma + i_part, tl.sum(b_dgamma, 1), mask=place.b_units)
    if gradients.dbeta is not None:
        tl.store(gradients.dbeta + i_part, tl.sum(b_dbeta, 1), mask=place.b_units)


@triton.jit(do_not_specialize=RUN_TIME)
def resident(
    outside, p_y, weights, normed, rows, gradients,
    T, B, s_g_t, s_g_b, s_y_t, s_y_b, s_a_t, s_a_b, s_dp_t, s_dp_b, limit, window,
    FORM: tl.constexpr, STEP: tl.constexpr, STEP_BACK: tl.constexpr,
):  # fmt: skip
    """W_hh^T of the group stays where the products read it; c_t never leaves the registers."""
    BS: tl.constexpr = FORM.BS
    BB: tl.constexpr = FORM.BB
    F: tl.constexpr = FORM.F
    i_g, i_s = tl.program_id(1), tl.arange(0, BS)
    i_b = tl.program_id(0) * BB + tl.arange(0, BB)
    at = place_of(i_g, units_of(i_s, FORM), i_b, B, FORM)
    i_unit = (i_g * FORM.S + i_s)[:, None]
    b_length = row_lengths(rows.lengths, i_b, T, B)
    b_w = tl.load(  # transposed
        weights.w + (i_g * FORM.SW + i_s).to(tl.int64)[None, :] * FORM.SW + i_s[:, None],
        mask=at.b_wide[:, None] & at.b_wide[None, :],
        other=0,
    )
    b_w = operand(b_w, FORM)
    dtype = gradients.dp.dtype.element_ty
    b_gamma = None
    if weights.gamma is not None:
        b_gamma = load_parameter(weights.gamma, i_unit, at.b_units)
    b_beta = None
    if weights.beta is not None:
        b_beta = load_parameter(weights.beta, i_unit, at.b_units)
    b_dgamma = tl.zeros([BS, BB], tl.float32)
    b_dbeta = tl.zeros([BS, BB], tl.float32)
    WIDTH: tl.constexpr = FORM.HEADS * FORM.S
    i_own = i_unit - at.i_d * WIDTH
    i_end = state_offsets(at.i_d, i_b, i_own, B, WIDTH)
    # In the order of the direction a row ends at its last valid step.
    b_end = tl.where(at.i_d == 1, 0, b_length - 1)
    i_t = (1 - at.i_d) * (T - 1)
    i_g_y = row_offsets(i_b, s_g_b, i_unit, FORM)
    b_g = gradients_outside(outside, i_t, i_g_y, i_end, at.b_inside, i_t == b_end, s_g_t, FORM)
    p_step = p_y + i_t.to(tl.int64) * s_y_t * FORM.UNIT
    b_h = tl.load(p_step + row_offsets(i_b, s_y_b, i_unit, FORM), mask=at.b_inside, other=0)
    b_carry = tl.zeros([BS, BB], tl.float32)
    # This step loads the next one's values while it computes. More stages would cost registers.
    for _ in tl.range(T, num_stages=1):
        i_row = rows_at(i_b, i_t, T) if FORM.UNIT == 1 else i_b
        i_state = state_offsets(at.i_d, i_row, i_own, B, WIDTH)
        i_g_y = row_offsets(i_row, s_g_b, i_unit, FORM)
        i_y = row_offsets(i_row, s_y_b, i_unit, FORM)
        i_a = row_offsets(i_row, s_a_b, i_unit, FORM)
        i_dp = row_offsets(i_row, s_dp_b, i_unit, FORM)
        b_dh = b_carry + b_g
        b_slope_state = b_h.to(tl.float32)
        i_next = i_t - 1 + 2 * at.i_d
        b_ahead = only_if(at.b_inside, (i_next >= 0) & (i_next < T))
        b_g = gradients_outside(
            outside, i_next, i_g_y, i_state, b_ahead, i_next == b_end, s_g_t, FORM
        )
        p_step = p_y + i_next.to(tl.int64) * s_y_t * FORM.UNIT
        b_h = tl.load(p_step + i_y, mask=b_ahead, other=0)
        b_valid = (i_t < b_length)[None, :]
        if gradients.carry is not None:
            i_carry = (i_t.to(tl.int64) * B + i_row)[None, :] * (FORM.GROUPS * FORM.S) + i_unit
            tl.store(gradients.carry + i_carry, b_carry, mask=at.b_inside)
        if FORM.CLIPS:
            b_small, b_usual, b_large = squares(b_dh, 0)
            b_dh *= clip_scale(b_small, b_usual, b_large, limit)[None, :]
        if weights.gamma is not None:
            b_ahat, b_rstd = load_normed(normed, i_a, i_t, i_row, at, s_a_t, B, FORM)
            if FORM.RECOMPUTE_STATE:
                b_slope_state = recompute_state(b_ahat, b_gamma, b_beta, FORM, STEP)
            b_real = b_valid & at.b_inside
            b_dpre, _ = STEP_BACK(b_dh, (), (b_slope_state,), F)
            b_dn = tl.where(b_real, b_dpre[0], 0.0)
            b_dgamma += b_dn * b_ahat
            b_dbeta += b_dn
            b_dahat = b_dn * b_gamma
            b_mean = tl.sum(b_dahat, 0) / FORM.S
            b_along = tl.sum(b_dahat * b_ahat, 0) / FORM.S
            b_da = through_norm(b_dahat, b_ahat, b_rstd, b_mean, b_along)
        else:
            b_dpre, _ = STEP_BACK(b_dh, (), (b_slope_state,), F)
            b_da = b_dpre[0]
        b_da = tl.where(b_valid & at.b_inside, b_da, 0.0).to(dtype)
        p_step = gradients.dp + i_t.to(tl.int64) * s_dp_t * FORM.UNIT
        tl.store(p_step + i_dp, b_da, mask=at.b_inside)
        b_zero = tl.zeros([BS, BB], tl.float32)
        b_back = product(b_w, operand(b_da, FORM), b_zero, FORM)
        b_stop = stops(rows.reset, i_t + at.i_d, i_row, b_length, B, window, FORM)
        b_carry = tl.where(b_stop[None, :], 0.0, tl.where(b_valid, b_back, b_carry))
        i_t = i_next
    if gradients.dh_0 is not None:
        store_dh_0(b_carry, outside, gradients, i_end, at, b_length)
    if gradients.dgamma is not None:
        store_norm_gradients(b_dgamma, b_dbeta, gradients, tl.program_id(0), at, FORM)


@triton.jit(do_not_specialize=(*RUN_TIME, "programs", "slices", "units"))
def tiled(
    outside, p_y, weights, normed, rows, gradients, exchange,
    T, B, s_g_t, s_g_b, s_y_t, s_y_b, s_a_t, s_a_b, s_dp_t, s_dp_b, limit, window,
    programs, slices, units,
    FORM: tl.constexpr, STEP: tl.constexpr, STEP_BACK: tl.constexpr,
):  # fmt: skip
    """As in forward, but the programs read da of the step after from dp, and exchange.sums
    [teams, 6, BP, BB] float32 holds the sums over all units for clipping and layer norm."""
    BS: tl.constexpr = FORM.BS
    BB: tl.constexpr = FORM.BB
    SW: tl.constexpr = FORM.SW
    F: tl.constexpr = FORM.F
    i_r, i_team = tl.program_id(0), tl.program_id(1)
    i_s = i_r * BS + tl.arange(0, BS)
    own_units = units_of(i_s, FORM)
    p_arrivals = exchange.counter + i_team
    p_sums = exchange.sums + i_team * 6 * FORM.BP * BB
    dtype = gradients.dp.dtype.element_ty
    arrived = tl.zeros([], tl.int64)
    for i_set in range(i_team, FORM.GROUPS * slices, tl.num_programs(1)):
        i_g, i_slice = i_set % FORM.GROUPS, i_set // FORM.GROUPS
        i_b = i_slice * BB + tl.arange(0, BB)
        at = place_of(i_g, own_units, i_b, B, FORM)
        b_length = row_lengths(rows.lengths, i_b, T, B)
        i_unit = (i_g * FORM.S + i_s)[:, None]
        p_weights = weights.w + tl.cast(i_g * SW, tl.int64) * SW + i_s[:, None]
        b_w = None
        if FORM.KEPT:
            b_w = load_weights(p_weights, SW, tl.arange(0, FORM.BK), at.b_wide, FORM)
        factor = Factor(b_w, p_weights, SW, at.b_wide)  # transposed
        b_gamma = None
        if weights.gamma is not None:
            b_gamma = load_parameter(weights.gamma, i_unit, at.b_units)
        b_beta = None
        if weights.beta is not None:
            b_beta = load_parameter(weights.beta, i_unit, at.b_units)
        b_dgamma = tl.zeros([BS, BB], tl.float32)
        b_dbeta = tl.zeros([BS, BB], tl.float32)
        WIDTH: tl.constexpr = FORM.HEADS * FORM.S
        i_own = (i_g % FORM.HEADS) * FORM.S + i_s[:, None]
        b_zero = tl.zeros([BS, BB], tl.float32)
        b_end = tl.where(at.i_d == 1, 0, b_length - 1)
        i_t = (1 - at.i_d) * (T - 1)
        for _ in range(T):
            i_row = i_b
            if FORM.UNIT == 1 or FORM.PRECISION == "tf32x3":
                i_row = rows_at(i_b, i_t, T)
            i_state = state_offsets(at.i_d, i_row, i_own, B, WIDTH)
            i_g_y = row_offsets(i_row, s_g_b, i_unit, FORM)
            i_y = row_offsets(i_row, s_y_b, i_unit, FORM)
            i_a = row_offsets(i_row, s_a_b, i_unit, FORM)
            i_dp = row_offsets(i_row, s_dp_b, i_g * FORM.S, FORM)
            b_g = gradients_outside(
                outside, i_t, i_g_y, i_state, at.b_inside, i_t == b_end, s_g_t, FORM
            )
            p_step = p_y + i_t.to(tl.int64) * s_y_t * FORM.UNIT
            b_slope_state = tl.load(p_step + i_y, mask=at.b_inside, other=0).to(tl.float32)
            b_stop = stops(rows.reset, i_t + 1 - at.i_d, i_row, b_length, B, window, FORM)
            b_live = (i_t < b_length) & (i_t != b_end) & ~b_stop
            i_after = (i_t + 1 - 2 * at.i_d).to(tl.int64) * s_dp_t * FORM.UNIT
            p_after = gradients.dp + i_after + i_dp
            b_carry = team_product(factor, p_after, b_live, b_zero, units, FORM)
            if gradients.carry is not None:
                i_carry = (i_t.to(tl.int64) * B + i_row)[None, :] * (FORM.GROUPS * FORM.S)
                i_carry += i_unit
                tl.store(gradients.carry + i_carry, b_carry, mask=at.b_inside)
            b_valid = (i_t < b_length)[None, :]
            b_dh = b_carry + b_g
            if FORM.CLIPS:
                b_squares = squares(tl.where(at.b_inside, b_dh, 0.0), 0)
                arrived += programs
                b_small, b_usual, b_large = team_sums(
                    b_squares, p_sums, i_r, programs, p_arrivals, arrived, FORM
                )
                b_dh *= clip_scale(b_small, b_usual, b_large, limit)[None, :]
            if weights.gamma is not None:
                b_ahat, b_rstd = load_normed(normed, i_a, i_t, i_row, at, s_a_t, B, FORM)
                if FORM.RECOMPUTE_STATE:
                    b_slope_state = recompute_state(b_ahat, b_gamma, b_beta, FORM, STEP)
                b_real = b_valid & at.b_inside
                b_dpre, _ = STEP_BACK(b_dh, (), (b_slope_state,), F)
                b_dn = tl.where(b_real, b_dpre[0], 0.0)
                b_dgamma += b_dn * b_ahat
                b_dbeta += b_dn
                b_dahat = b_dn * b_gamma
                b_mean, b_along = tl.sum(b_dahat, 0), tl.sum(b_dahat * b_ahat, 0)
                arrived += programs
                p_second = p_sums + 3 * FORM.BP * BB
                b_mean, b_along, _ = team_sums(
                    (b_mean, b_along, b_along), p_second, i_r, programs, p_arrivals, arrived, FORM
                )
                b_mean, b_along = b_mean / FORM.S, b_along / FORM.S
                b_da = through_norm(b_dahat, b_ahat, b_rstd, b_mean, b_along)
            else:
                b_dpre, _ = STEP_BACK(b_dh, (), (b_slope_state,), F)
                b_da = b_dpre[0]
            b_da = tl.where(b_valid & at.b_inside, b_da, 0.0).to(dtype)
            p_step = gradients.dp + i_t.to(tl.int64) * s_dp_t * FORM.UNIT
            tl.store(p_step + i_dp + i_s[:, None], b_da, mask=at.b_inside)
            # dp of this step is complete, and exchange.sums may be written again.
            arrived += programs
            arrive_and_wait(p_arrivals, arrived)
            i_t += 2 * at.i_d - 1
        if gradients.dh_0 is not None:
            b_first = tl.where(at.i_d == 1, b_length - 1, 0)
            b_stop = stops(rows.reset, b_first + at.i_d, i_b, b_length, B, window, FORM)
            p_first = gradients.dp + b_first.to(tl.int64)[None, :] * s_dp_t * FORM.UNIT
            p_first += row_offsets(i_b, s_dp_b, i_g * FORM.S, FORM)
            b_live = (b_length > 0) & ~b_stop
            b_carry = team_product(factor, p_first, b_live, b_zero, units, FORM)
            i_end = state_offsets(at.i_d, i_b, i_own, B, WIDTH)
            store_dh_0(b_carry, outside, gradients, i_end, at, b_length)
        if gradients.dgamma is not None:
            store_norm_gradients(b_dgamma, b_dbeta, gradients, i_slice, at, FORM)

"""Forward through time: one program a slice of rows (resident), or a team of programs (tiled).

    a_t = p_t + W_hh h_{t-1},  n_t = a_t or gamma ahat_t + beta,  h_t = f(n_t)

Shapes: p, y, ahat [T, B, GROUPS * S], last axis dense; w [GROUPS, SW, SW], zeros beyond S; h_0, h_n
[D, B, HEADS * S]; rstd [T, B, GROUPS]; lengths [B] int64; reset [T, B]; gamma, beta [GROUPS * S]
float32. A group is one direction of one of HEADS heads. Strides count UNIT values: the distance of
any two rows is a multiple of them. Rows of w begin at 16 bytes. STEP is the cell's `step`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .steps import (
    Factor,
    arrive_and_wait,
    cuts,
    load_parameter,
    load_weights,
    moments,
    only_if,
    operand,
    place_of,
    product,
    row_lengths,
    row_offsets,
    rstd_offsets,
    team_product,
    units_of,
)

RUN_TIME = ("T", "B", "s_p_t", "s_p_b", "s_y_t", "s_y_b", "eps")


@triton.jit
def normed(b_a, b_mean, b_rest, b_squares, eps, FORM: tl.constexpr):
    """ahat and rstd from the moments."""
    b_rstd = tl.div_rn(1.0, tl.sqrt_rn(b_squares / FORM.S + eps))
    return (b_a - b_mean[None, :] - b_rest[None, :]) * b_rstd[None, :], b_rstd


@triton.jit
def scaled(b_ahat, b_gamma, b_beta):
    """n = gamma ahat + beta."""
    b_n = b_ahat * b_gamma
    if b_beta is not None:
        b_n += b_beta
    return b_n


@triton.jit
def team_moments(p_sums, i_first, programs, FORM: tl.constexpr):
    """moments of all units, from mean and sum of squares [rows] of each program's units, which the
    team has stored in p_sums from row i_first on."""
    # Combined after Chan et al. (1979): every sum of squares is around a mean.
    i_p = tl.arange(0, FORM.BP)
    p_all = p_sums + (i_first + i_p)[:, None] * FORM.BB
    p_all += tl.arange(0, FORM.BB)[None, :]
    b_exists = (i_p < programs)[:, None]
    b_numbers = tl.minimum(FORM.S - i_p * FORM.BS, FORM.BS)[:, None]
    b_means = tl.load(p_all, mask=b_exists, other=0, cache_modifier=".cg")
    b_mean = tl.sum(tl.where(b_exists, b_means * b_numbers, 0.0), 0) / FORM.S
    b_distance = tl.where(b_exists, b_means - b_mean[None, :], 0.0)
    b_rest = tl.sum(b_numbers * b_distance, 0) / FORM.S
    b_distance = tl.where(b_exists, b_distance - b_rest[None, :], 0.0)
    b_all = tl.load(p_all + FORM.BP * FORM.BB, mask=b_exists, other=0, cache_modifier=".cg")
    return b_mean, b_rest, tl.sum(b_all + b_numbers * b_distance * b_distance, 0)


@triton.jit(do_not_specialize=RUN_TIME)
def resident(
    p_p, weights, p_h_0, rows, results,
    T, B, s_p_t, s_p_b, s_y_t, s_y_b, eps,
    FORM: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """W_hh of the group stays where the products read it; h_{t-1} never leaves the registers."""
    BS: tl.constexpr = FORM.BS
    BB: tl.constexpr = FORM.BB
    S: tl.constexpr = FORM.S
    F: tl.constexpr = FORM.F
    i_g, i_s = tl.program_id(1), tl.arange(0, BS)
    i_b = tl.program_id(0) * BB + tl.arange(0, BB)
    at = place_of(i_g, units_of(i_s, FORM), i_b, B, FORM)
    i_unit = (i_g * FORM.S + i_s)[:, None]
    b_length = row_lengths(rows.lengths, i_b, T, B)
    b_w = tl.load(
        weights.w + (i_g * FORM.SW + i_s).to(tl.int64)[:, None] * FORM.SW + i_s[None, :],
        mask=at.b_wide[:, None] & at.b_wide[None, :],
        other=0,
    )
    b_w = operand(b_w, FORM)
    dtype = results.y.dtype.element_ty
    b_gamma = None
    if weights.gamma is not None:
        b_gamma = load_parameter(weights.gamma, i_unit, at.b_units)
    b_beta = None
    if weights.beta is not None:
        b_beta = load_parameter(weights.beta, i_unit, at.b_units)
    WIDTH: tl.constexpr = FORM.HEADS * FORM.S
    i_state = (at.i_d * B + i_b).to(tl.int64)[None, :] * WIDTH + (i_unit - at.i_d * WIDTH)
    b_h = tl.zeros([BS, BB], dtype)
    if p_h_0 is not None:
        b_h = tl.load(p_h_0 + i_state, mask=at.b_inside, other=0)
    i_t = at.i_d * (T - 1)
    i_p = row_offsets(i_b, s_p_b, i_unit, FORM)
    i_y = row_offsets(i_b, s_y_b, i_unit, FORM)
    p_step = p_p + i_t.to(tl.int64) * s_p_t * FORM.UNIT
    b_next = tl.load(p_step + i_p, mask=at.b_inside, other=0)
    for _ in range(T):
        b_p = b_next.to(tl.float32)
        i_next = i_t + 1 - 2 * at.i_d  # its p is loaded while this step computes
        b_ahead = only_if(at.b_inside, (i_next >= 0) & (i_next < T))
        p_step = p_p + i_next.to(tl.int64) * s_p_t * FORM.UNIT
        b_next = tl.load(p_step + i_p, mask=b_ahead, other=0)
        b_before = b_h
        if rows.reset is not None:
            b_cut = cuts(rows.reset, i_t + at.i_d, i_b, b_length, B)
            b_before = tl.where(b_cut[None, :], 0.0, b_h).to(dtype)
        b_n = product(b_w, operand(b_before, FORM), b_p, FORM)
        b_valid = (i_t < b_length)[None, :]
        i_step = i_t.to(tl.int64) * s_y_t * FORM.UNIT
        if weights.gamma is not None:
            b_mean, b_rest, b_squares = moments(b_n, at.b_units[:, None], S)
            b_ahat, b_rstd = normed(b_n, b_mean, b_rest, b_squares, eps, FORM)
            b_stored = tl.where(b_valid, b_ahat, 0.0).to(dtype)
            tl.store(results.ahat + i_step + i_y, b_stored, mask=at.b_inside)
            i_rstd = rstd_offsets(i_t, i_b, i_g, B, FORM)
            p_row = results.rstd + i_rstd
            tl.store(p_row, tl.where(i_t < b_length, b_rstd, 0.0), mask=at.b_rows)
            b_n = scaled(b_ahat, b_gamma, b_beta)
        b_new, _, _ = STEP((b_n,), (), F)
        b_new = b_new.to(dtype)
        b_h = tl.where(b_valid, b_new, b_h)
        b_new = tl.where(b_valid, b_new, 0.0).to(dtype)
        tl.store(results.y + i_step + i_y, b_new, mask=at.b_inside)
        i_t = i_next
    tl.store(results.h_n + i_state, b_h, mask=at.b_inside)


@triton.jit(do_not_specialize=(*RUN_TIME, "programs", "slices", "units"))
def tiled(
    p_p, weights, p_h_0, rows, results, exchange,
    T, B, s_p_t, s_p_b, s_y_t, s_y_b, eps, programs, slices, units,
    FORM: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Program i_r of a team has BS units of the state of BB rows. A team goes through all steps of
    one (group, slice of rows), then of its next one. The programs read h_{t-1} of one another
    from y. With layer norm they read the moments of one another from exchange.sums
    [teams, 2, BP, BB] float32. Weights come from the L2 cache, BK columns at a time, or all stay in
    registers (KEPT).
    """
    BS: tl.constexpr = FORM.BS
    BB: tl.constexpr = FORM.BB
    F: tl.constexpr = FORM.F
    i_r, i_team = tl.program_id(0), tl.program_id(1)
    i_s = i_r * BS + tl.arange(0, BS)
    own_units = units_of(i_s, FORM)
    p_arrivals = exchange.counter + i_team
    dtype = results.y.dtype.element_ty
    arrived = tl.zeros([], tl.int64)
    for i_set in range(i_team, FORM.GROUPS * slices, tl.num_programs(1)):
        i_g, i_b = i_set % FORM.GROUPS, (i_set // FORM.GROUPS) * BB + tl.arange(0, BB)
        at = place_of(i_g, own_units, i_b, B, FORM)
        b_length = row_lengths(rows.lengths, i_b, T, B)
        i_unit = (i_g * FORM.S + i_s)[:, None]
        p_weights = weights.w + (i_g * FORM.SW + i_s).to(tl.int64)[:, None] * FORM.SW
        b_w = None
        if FORM.KEPT:
            b_w = load_weights(p_weights, 1, tl.arange(0, FORM.BK), at.b_wide, FORM)
        factor = Factor(b_w, p_weights, 1, at.b_wide)
        b_gamma = None
        if weights.gamma is not None:
            b_gamma = load_parameter(weights.gamma, i_unit, at.b_units)
        b_beta = None
        if weights.beta is not None:
            b_beta = load_parameter(weights.beta, i_unit, at.b_units)
        i_row = (at.i_d * B + i_b).to(tl.int64)[None, :] * (FORM.HEADS * FORM.S)
        i_row += (i_g % FORM.HEADS) * FORM.S
        b_empty = at.b_inside & (b_length == 0)[None, :]
        b_h = tl.zeros([BS, BB], dtype)
        if p_h_0 is not None:
            b_h = tl.load(p_h_0 + i_row + i_s[:, None], mask=b_empty, other=0)
        tl.store(results.h_n + i_row + i_s[:, None], b_h, mask=b_empty)
        i_p = row_offsets(i_b, s_p_b, i_unit, FORM)
        i_y = row_offsets(i_b, s_y_b, i_unit, FORM)
        i_t = at.i_d * (T - 1)
        for _ in range(T):
            p_step = p_p + i_t.to(tl.int64) * s_p_t * FORM.UNIT
            b_n = tl.load(p_step + i_p, mask=at.b_inside, other=0).to(tl.float32)
            # h_{t-1} is in y, or in h_0 where the row begins.
            b_first = i_t == tl.where(at.i_d == 1, b_length - 1, 0)
            b_live = ~cuts(rows.reset, i_t + at.i_d, i_b, b_length, B) & (i_t < b_length)
            i_before = (i_t - 1 + 2 * at.i_d).to(tl.int64) * s_y_t * FORM.UNIT
            i_before += i_b.to(tl.int64) * s_y_b * FORM.UNIT + i_g * FORM.S
            p_before = (results.y + i_before)[None, :]
            if p_h_0 is None:
                b_live &= ~b_first
            else:
                p_before = tl.where(b_first[None, :], p_h_0 + i_row, p_before)
            b_n = team_product(factor, p_before, b_live, b_n, units, FORM)
            b_valid = (i_t < b_length)[None, :]
            i_step = i_t.to(tl.int64) * s_y_t * FORM.UNIT
            if weights.gamma is not None:
                number = tl.minimum(FORM.S - i_r * BS, BS)
                b_mean, b_rest, b_squares = moments(b_n, at.b_units[:, None], number)
                p_mine = exchange.sums + (i_team * 2 * FORM.BP + i_r) * BB + tl.arange(0, BB)
                tl.store(p_mine, b_mean + b_rest)
                tl.store(p_mine + FORM.BP * BB, b_squares)
                arrived += programs
                arrive_and_wait(p_arrivals, arrived)
                i_first = i_team * 2 * FORM.BP
                b_mean, b_rest, b_squares = team_moments(exchange.sums, i_first, programs, FORM)
                b_ahat, b_rstd = normed(b_n, b_mean, b_rest, b_squares, eps, FORM)
                b_stored = tl.where(b_valid, b_ahat, 0.0).to(dtype)
                tl.store(results.ahat + i_step + i_y, b_stored, mask=at.b_inside)
                i_rstd = rstd_offsets(i_t, i_b, i_g, B, FORM)
                b_rstd = tl.where(i_t < b_length, b_rstd, 0.0)
                tl.store(results.rstd + i_rstd, b_rstd, mask=only_if(at.b_rows, i_r == 0))
                b_n = scaled(b_ahat, b_gamma, b_beta)
            b_new, _, _ = STEP((b_n,), (), F)
            b_new = b_new.to(dtype)
            p_step = results.y + i_step + i_y
            tl.store(p_step, tl.where(b_valid, b_new, 0.0).to(dtype), mask=at.b_inside)
            b_last = i_t == tl.where(at.i_d == 1, 0, b_length - 1)
            b_ends = at.b_inside & b_valid & b_last[None, :]
            tl.store(results.h_n + i_row + i_s[:, None], b_new, mask=b_ends)
            # y of this step is complete, and exchange.sums may be written again.
            arrived += programs
            arrive_and_wait(p_arrivals, arrived)
            i_t += 1 - 2 * at.i_d

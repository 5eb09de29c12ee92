"""Forward through time: one program a slice of rows (resident), or a team of programs (tiled).

    a_t = p_t + W_hh h_{t-1},  n_t = a_t or gamma ahat_t + beta,  h_t = f(n_t)

Shapes: p, y, ahat [T, B, G * S], last axis dense; w_hh [G, SW, SW], zeros beyond S; h_0, h_n
[D, B, HEADS * S]; rstd [T, B, G]; lengths [B] int64; reset [T, B]; gamma, beta [G * S] float32. A
group of G is one direction of one of HEADS heads. Strides are in units of UNIT values, a whole
number of which lies between any two rows; rows of w_hh begin at 16 bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rnn import value
from .steps import (
    arrive_and_wait,
    cuts,
    lengths_of,
    moments,
    of_units,
    only_if,
    operand,
    product,
    product_of_all,
    weights_of,
)

RUN_TIME = ("T", "B", "s_p_t", "s_p_b", "s_y_t", "s_y_b", "eps")


@triton.jit(do_not_specialize=RUN_TIME)
def resident(
    p_p, p_w, p_gamma, p_beta, p_h_0, p_lengths, p_reset, p_y, p_h_n, p_ahat, p_rstd,
    T, B, s_p_t, s_p_b, s_y_t, s_y_b, eps,
    S: tl.constexpr, SW: tl.constexpr, HEADS: tl.constexpr, G: tl.constexpr, F: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr, BS: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """W_hh of the group stays where the products read it; h_{t-1} never leaves the registers."""
    i_g = tl.program_id(1)
    i_d = i_g // HEADS
    i_s, i_b = tl.arange(0, BS), tl.program_id(0) * BB + tl.arange(0, BB)
    b_units, b_wide, b_rows = i_s < S, i_s < SW, i_b < B
    b_inside = b_units[:, None] & b_rows[None, :]
    i_unit = (i_g * S + i_s)[:, None]
    b_length = lengths_of(p_lengths, i_b, T, B)
    b_w = tl.load(
        p_w + (i_g * SW + i_s).to(tl.int64)[:, None] * SW + i_s[None, :],
        mask=b_wide[:, None] & b_wide[None, :],
        other=0,
    )
    b_w = operand(b_w, PRECISION)
    dtype = p_y.dtype.element_ty
    b_gamma = None if p_gamma is None else of_units(p_gamma, i_unit, b_units)
    b_beta = None if p_beta is None else of_units(p_beta, i_unit, b_units)
    i_state = (i_d * B + i_b).to(tl.int64)[None, :] * (HEADS * S) + (i_unit - i_d * (HEADS * S))
    b_h = tl.zeros([BS, BB], dtype)
    if p_h_0 is not None:
        b_h = tl.load(p_h_0 + i_state, mask=b_inside, other=0)
    i_t = i_d * (T - 1)
    i_p = i_b.to(tl.int64)[None, :] * s_p_b * UNIT + i_unit
    i_y = i_b.to(tl.int64)[None, :] * s_y_b * UNIT + i_unit
    b_next = tl.load(p_p + i_t.to(tl.int64) * s_p_t * UNIT + i_p, mask=b_inside, other=0)
    for _ in range(T):
        b_p = b_next.to(tl.float32)
        i_next = i_t + 1 - 2 * i_d  # its p comes in while this step computes
        b_more = only_if(b_inside, (i_next >= 0) & (i_next < T))
        b_next = tl.load(p_p + i_next.to(tl.int64) * s_p_t * UNIT + i_p, mask=b_more, other=0)
        b_before = b_h
        if p_reset is not None:
            b_cut = cuts(p_reset, i_t + i_d, i_b, b_length, B)
            b_before = tl.where(b_cut[None, :], 0.0, b_h).to(dtype)
        b_n = product(b_w, operand(b_before, PRECISION), b_p, PRECISION)
        b_valid = (i_t < b_length)[None, :]
        i_step = i_t.to(tl.int64) * s_y_t * UNIT
        if p_gamma is not None:
            b_mean, b_rest, b_squares = moments(b_n, b_units[:, None], S)
            b_rstd = tl.div_rn(1.0, tl.sqrt_rn(b_squares / S + eps))
            b_n = (b_n - b_mean[None, :] - b_rest[None, :]) * b_rstd[None, :]
            b_stored = tl.where(b_valid, b_n, 0.0).to(dtype)
            tl.store(p_ahat + i_step + i_y, b_stored, mask=b_inside)
            i_rstd = (i_t.to(tl.int64) * B + i_b) * G + i_g
            tl.store(p_rstd + i_rstd, tl.where(i_t < b_length, b_rstd, 0.0), mask=b_rows)
            b_n = b_n * b_gamma
            if p_beta is not None:
                b_n += b_beta
        b_new = value(b_n, F).to(dtype)
        b_h = tl.where(b_valid, b_new, b_h)
        b_new = tl.where(b_valid, b_new, 0.0).to(dtype)
        tl.store(p_y + i_step + i_y, b_new, mask=b_inside)
        i_t = i_next
    tl.store(p_h_n + i_state, b_h, mask=b_inside)


@triton.jit(do_not_specialize=(*RUN_TIME, "programs", "slices", "units"))
def tiled(
    p_p, p_w, p_gamma, p_beta, p_h_0, p_lengths, p_reset, p_y, p_h_n, p_ahat, p_rstd,
    p_counter, p_exchange,
    T, B, s_p_t, s_p_b, s_y_t, s_y_b, eps, programs, slices, units,
    S: tl.constexpr, SW: tl.constexpr, HEADS: tl.constexpr, G: tl.constexpr, F: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    BB: tl.constexpr, BP: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Program i_r of a team has BR units of the state of BB rows; a team goes through the whole of
    time for one (group, slice of rows), then for its next one. Programs read h_{t-1} of one another
    from y itself, and with layer norm the moments of the others' units from p_exchange
    [teams, 2, BP, BB] float32. Weights come from the L2 cache, BK columns at a time, or, KEPT, are
    all of them in registers.
    """
    i_r, i_team = tl.program_id(0), tl.program_id(1)
    i_s = i_r * BR + tl.arange(0, BR)
    b_units, b_wide = i_s < S, i_s < SW
    p_arrivals = p_counter + i_team
    dtype = p_y.dtype.element_ty
    arrived = tl.zeros([], tl.int64)
    for i_set in range(i_team, G * slices, tl.num_programs(1)):
        i_g, i_b = i_set % G, (i_set // G) * BB + tl.arange(0, BB)
        i_d = i_g // HEADS
        b_rows = i_b < B
        b_inside = b_units[:, None] & b_rows[None, :]
        b_length = lengths_of(p_lengths, i_b, T, B)
        i_unit = (i_g * S + i_s)[:, None]
        p_weights = p_w + (i_g * SW + i_s).to(tl.int64)[:, None] * SW
        b_w = None
        if KEPT:
            b_w = weights_of(p_weights, 1, tl.arange(0, BK), b_wide, SW, PRECISION)
        b_gamma = None if p_gamma is None else of_units(p_gamma, i_unit, b_units)
        b_beta = None if p_beta is None else of_units(p_beta, i_unit, b_units)
        i_row = (i_d * B + i_b).to(tl.int64)[None, :] * (HEADS * S) + (i_g % HEADS) * S
        b_empty = b_inside & (b_length == 0)[None, :]
        b_h = tl.zeros([BR, BB], dtype)
        if p_h_0 is not None:
            b_h = tl.load(p_h_0 + i_row + i_s[:, None], mask=b_empty, other=0)
        tl.store(p_h_n + i_row + i_s[:, None], b_h, mask=b_empty)
        i_p = i_b.to(tl.int64)[None, :] * s_p_b * UNIT + i_unit
        i_y = i_b.to(tl.int64)[None, :] * s_y_b * UNIT + i_unit
        i_t = i_d * (T - 1)
        for _ in range(T):
            b_p = tl.load(p_p + i_t.to(tl.int64) * s_p_t * UNIT + i_p, mask=b_inside, other=0)
            b_n = b_p.to(tl.float32)
            # Of y's last step, and of h_0 where there is none.
            b_first = i_t == tl.where(i_d == 1, b_length - 1, 0)
            b_live = ~cuts(p_reset, i_t + i_d, i_b, b_length, B) & (i_t < b_length)
            i_before = (i_t - 1 + 2 * i_d).to(tl.int64) * s_y_t * UNIT
            i_before += i_b.to(tl.int64) * s_y_b * UNIT + i_g * S
            p_before = (p_y + i_before)[None, :]
            if p_h_0 is None:
                b_live &= ~b_first
            else:
                p_before = tl.where(b_first[None, :], p_h_0 + i_row, p_before)
            b_n = product_of_all(
                b_w, p_weights, 1, p_before, b_wide, b_live, b_n, units, S, SW, BK, PRECISION,
                UNIT,
            )  # fmt: skip
            b_valid = (i_t < b_length)[None, :]
            i_step = i_t.to(tl.int64) * s_y_t * UNIT
            if p_gamma is not None:
                number = tl.minimum(S - i_r * BR, BR)
                b_mean, b_rest, b_squares = moments(b_n, b_units[:, None], number)
                p_mine = p_exchange + (i_team * 2 * BP + i_r) * BB + tl.arange(0, BB)
                tl.store(p_mine, b_mean + b_rest)
                tl.store(p_mine + BP * BB, b_squares)
                arrived += programs
                arrive_and_wait(p_arrivals, arrived)
                # Together as Chan et al. (1979) have it: no sum of squares but around a mean.
                i_p_r = tl.arange(0, BP)
                p_all = p_exchange + (i_team * 2 * BP + i_p_r)[:, None] * BB
                p_all += tl.arange(0, BB)[None, :]
                b_there = (i_p_r < programs)[:, None]
                b_numbers = tl.minimum(S - i_p_r * BR, BR)[:, None]
                b_means = tl.load(p_all, mask=b_there, other=0, cache_modifier=".cg")
                b_mean = tl.sum(tl.where(b_there, b_means * b_numbers, 0.0), 0) / S
                b_apart = tl.where(b_there, b_means - b_mean[None, :], 0.0)
                b_rest = tl.sum(b_numbers * b_apart, 0) / S
                b_apart = tl.where(b_there, b_apart - b_rest[None, :], 0.0)
                b_all = tl.load(p_all + BP * BB, mask=b_there, other=0, cache_modifier=".cg")
                b_squares = tl.sum(b_all + b_numbers * b_apart * b_apart, 0)
                b_rstd = tl.div_rn(1.0, tl.sqrt_rn(b_squares / S + eps))
                b_n = (b_n - b_mean[None, :] - b_rest[None, :]) * b_rstd[None, :]
                b_stored = tl.where(b_valid, b_n, 0.0).to(dtype)
                tl.store(p_ahat + i_step + i_y, b_stored, mask=b_inside)
                i_rstd = (i_t.to(tl.int64) * B + i_b) * G + i_g
                b_scale = tl.where(i_t < b_length, b_rstd, 0.0)
                tl.store(p_rstd + i_rstd, b_scale, mask=only_if(b_rows, i_r == 0))
                b_n = b_n * b_gamma
                if p_beta is not None:
                    b_n += b_beta
            b_new = value(b_n, F).to(dtype)
            tl.store(p_y + i_step + i_y, tl.where(b_valid, b_new, 0.0).to(dtype), mask=b_inside)
            b_last = i_t == tl.where(i_d == 1, 0, b_length - 1)
            b_ends = b_inside & b_valid & b_last[None, :]
            tl.store(p_h_n + i_row + i_s[:, None], b_new, mask=b_ends)
            # y of this step is complete, and p_exchange may be written again.
            arrived += programs
            arrive_and_wait(p_arrivals, arrived)
            i_t += 1 - 2 * i_d

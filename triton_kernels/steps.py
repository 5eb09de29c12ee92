"""Shared by the kernels of both passes: places and masks, products, sums over units, the barrier.

Blocks of a state are [units, rows of the batch]. Every row has a length: T where none is given, and
0 beyond the batch. Edge e lies between real steps e - 1 and e.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Blue's three scaled sums of squares (ACM TOMS 4, 1978): one for values below 2^-40 (subnormal ones
# too), one for usual values, one for values from 2^50 on. Each is accurate in its range.
SMALL = tl.constexpr(2.0**100)
LARGE = tl.constexpr(2.0**-80)
LEAST = tl.constexpr(2.0**-80)  # the usual sum is accurate between these two
MOST = tl.constexpr(2.0**100)


class Units(NamedTuple):
    """The units of a program, in any group: [units]."""

    i_s: Any
    b_units: Any  # whether the unit exists
    b_wide: Any  # whether W_hh has a row of it


class Place(NamedTuple):
    """The units and rows of a program in a group."""

    i_g: Any  # group
    i_d: Any  # direction
    i_s: Any  # [units], in the group
    b_units: Any  # as in Units
    b_wide: Any
    b_rows: Any  # [rows]: whether the row exists
    b_inside: Any  # [units, rows]


class Factor(NamedTuple):
    """W_hh or its transpose, as a program of a team multiplies by it."""

    b_w: Any  # [units, BK], an operand; None where the weights come from the L2 cache
    p_w: Any  # [units, 1], of column 0
    s_k: Any  # values from one column to the next
    b_wide: Any  # as in Units


@triton.jit
def units_of(i_s, FORM: tl.constexpr):
    return Units(i_s, i_s < FORM.S, i_s < FORM.SW)


@triton.jit
def place_of(i_g, units, i_b, B, FORM: tl.constexpr):
    i_s, b_units, b_wide = units
    i_d, b_rows = i_g // FORM.HEADS, i_b < B
    b_inside = b_units[:, None] & b_rows[None, :]
    return Place(i_g, i_d, i_s, b_units, b_wide, b_rows, b_inside)


@triton.jit
def row_lengths(p_lengths, i_b, T, B):
    """[rows]: how many steps a row has."""
    b_inside = i_b < B
    if p_lengths is None:
        return tl.where(b_inside, T, 0)
    else:
        return tl.load(p_lengths + i_b, mask=b_inside, other=0).to(tl.int32)


@triton.jit
def cuts(p_reset, i_e, i_b, b_length, B):
    """[rows]: whether a reset lies at edge e."""
    if p_reset is None:
        return b_length < 0
    else:
        b_inside = i_e < b_length
        i_reset = i_e.to(tl.int64) * B + i_b
        return (tl.load(p_reset + i_reset, mask=b_inside, other=0) != 0) & b_inside


@triton.jit
def stops(p_reset, i_e, i_b, b_length, B, window, FORM: tl.constexpr):
    """[rows]: whether no gradient crosses edge e."""
    b_stop = cuts(p_reset, i_e, i_b, b_length, B)
    if FORM.WINDOWED:
        b_stop |= only_if(i_e < b_length, (i_e % window == 0) & (i_e > 0))
    return b_stop


@triton.jit
def only_if(b_mask, condition):
    """b_mask where a condition of the whole program holds, and nowhere otherwise. The comparison
    with 0 changes no compiled code. Triton's interpreter needs it: it holds a broadcast comparison
    as int32, and since Triton 3.9 it takes only masks of bool."""
    return (b_mask & condition) != 0


@triton.jit
def rows_at(i_b, i_t, T):
    """i_b, at a step i_t < T. The compiler must not know that every step has the same rows: it
    would compute the addresses in all sequences once, and keep them in more registers than there
    are."""
    return i_b + tl.where(i_t < T, 0, 1)


@triton.jit
def row_offsets(i_b, s_b, i_unit, FORM: tl.constexpr):
    """[units, rows]: offsets in a step of a sequence, whose rows are s_b UNIT values apart."""
    return i_b.to(tl.int64)[None, :] * s_b * FORM.UNIT + i_unit


@triton.jit
def state_offsets(i_d, i_b, i_unit, B, WIDTH: tl.constexpr):
    """[units, rows]: offsets in a tensor [D, B, WIDTH] such as h_n; i_unit counts per direction."""
    return (i_d * B + i_b).to(tl.int64)[None, :] * WIDTH + i_unit


@triton.jit
def rstd_offsets(i_t, i_b, i_g, B, FORM: tl.constexpr):
    """[rows]: offsets in rstd [T, B, GROUPS]."""
    return (i_t.to(tl.int64) * B + i_b) * FORM.GROUPS + i_g


@triton.jit
def load_parameter(p_x, i_unit, b_units):
    """[units, 1] of a parameter of the norm."""
    return tl.load(p_x + i_unit, mask=b_units[:, None], other=0)


@triton.jit
def operand(b_x, FORM: tl.constexpr):
    """x as a factor of a product: TF32 hardware would cut digits off, and a network that forgets by
    rounding down measures a gradient that it made vanish itself."""
    if FORM.PRECISION == "tf32":
        b_bits = b_x.to(tl.int32, bitcast=True)
        b_rounded = ((b_bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        return tl.where(b_x == b_x, b_rounded, b_x)  # a NaN of all ones would turn into a zero
    else:
        return b_x


@triton.jit
def product(b_w, b_x, b_added, FORM: tl.constexpr):
    """w x + added in float32, of operands."""
    PRECISION: tl.constexpr = FORM.PRECISION
    if PRECISION == "half":
        return tl.dot(b_w, b_x, b_added)
    else:
        return tl.dot(b_w, b_x, b_added, input_precision=PRECISION)


@triton.jit
def transposed_product(b_w, b_x, b_added, FORM: tl.constexpr):
    """The same product, computed as rows by units: a warp then holds 8 units in registers. As units
    by rows it holds 16, and two warps hold the same ones where there are too few units."""
    return tl.trans(product(tl.trans(b_x), tl.trans(b_w), tl.trans(b_added), FORM))


@triton.jit
def moments(b_a, b_inside, number):
    """Over the units inside: mean [rows] in two parts, and the sum of squares around it."""
    b_mean = tl.sum(tl.where(b_inside, b_a, 0.0), 0) / number
    b_centred = tl.where(b_inside, b_a - b_mean[None, :], 0.0)
    b_rest = tl.sum(b_centred, 0) / number  # what the mean has lost to rounding
    b_centred = tl.where(b_inside, b_centred - b_rest[None, :], 0.0)
    return b_mean, b_rest, tl.sum(b_centred * b_centred, 0)


@triton.jit
def squares(b_x, AXIS: tl.constexpr):
    """Blue's three sums."""
    b_small, b_large = b_x * SMALL, b_x * LARGE
    b_of_small = tl.sum(b_small * b_small, AXIS)
    return b_of_small, tl.sum(b_x * b_x, AXIS), tl.sum(b_large * b_large, AXIS)


@triton.jit
def choose_sum(b_small, b_usual, b_large):
    """The accurate sum, and the factor by which its values were scaled. An inf takes the last
    sum; a NaN stays a NaN."""
    b_is_small, b_is_large = b_usual < LEAST, b_usual > MOST
    b_sum = tl.where(b_is_small, b_small, tl.where(b_is_large, b_large, b_usual))
    return b_sum, tl.where(b_is_small, SMALL, tl.where(b_is_large, LARGE, 1.0))


@triton.jit
def clip_scale(b_small, b_usual, b_large, limit):
    """min(1, limit / norm) [rows]; 1 where the norm is inf or NaN."""
    b_sum, b_unit = choose_sum(b_small, b_usual, b_large)
    b_norm, b_limit = tl.sqrt_rn(b_sum), limit * b_unit
    b_clips = (b_norm > b_limit) & (b_norm < float("inf"))
    return tl.where(b_clips, tl.div_rn(b_limit, b_norm), 1.0)


@triton.jit
def load_weights(p_w, s_k, i_k, b_wide, FORM: tl.constexpr):
    """[units, K], an operand: columns i_k, s_k apart, from p_w [units, 1]. Masks end at SW, where
    rows do: if they ended at S, inside of a vector, the compiler would make single loads."""
    b_mask = b_wide[:, None] & (i_k < FORM.SW)[None, :]
    b_w = tl.load(p_w + i_k.to(tl.int64)[None, :] * s_k, mask=b_mask, other=0)
    return operand(b_w, FORM)


@triton.jit
def load_team_state(p_x, i_k, b_live, FORM: tl.constexpr):
    """[K, rows], an operand: units i_k from p_x [1, rows], where all programs of the team have
    stored theirs; 0 in the rows that are not live. The barrier's acquire makes the stores visible;
    .cg reads the L2 cache and leaves out an L1 cache that may be stale."""
    b_mask = (i_k < FORM.S)[:, None] & b_live[None, :]
    b_x = tl.load(p_x + i_k[:, None], mask=b_mask, other=0, cache_modifier=".cg")
    return operand(b_x, FORM)


@triton.jit
def team_product(factor, p_x, b_live, b_added, units, FORM: tl.constexpr):
    """w x + added over the state of all units. Without a b_w, BK columns are loaded at a time.

    units is S, as a number that the compiler does not know: it would unroll the loop, which then
    wants more registers than there are. The same holds for three products of 16 units a warp with
    single loads (UNIT 1).
    """
    if factor.b_w is None:
        for i_start in range(0, units, FORM.BK):
            i_k = i_start + tl.arange(0, FORM.BK)
            b_part = load_weights(factor.p_w, factor.s_k, i_k, factor.b_wide, FORM)
            b_x = load_team_state(p_x, i_k, b_live, FORM)
            if FORM.UNIT == 1 and FORM.PRECISION == "tf32x3":
                b_added = transposed_product(b_part, b_x, b_added, FORM)
            else:
                b_added = product(b_part, b_x, b_added, FORM)
        return b_added
    else:
        b_x = load_team_state(p_x, tl.arange(0, FORM.BK), b_live, FORM)
        return transposed_product(factor.b_w, b_x, b_added, FORM)


@triton.jit
def arrive_and_wait(p_counter, arrived):
    """Waits for all programs of a team. A program that returns sees all their earlier stores.

    The counter only grows: `arrived` is its value once the last program is here.
    """
    tl.debug_barrier()  # all threads have stored before the one atomic operation
    seen = tl.atomic_add(p_counter, 1, sem="acq_rel", scope="gpu") + 1
    while seen < arrived:
        seen = tl.atomic_add(p_counter, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()  # no thread reads before the counter was seen


@triton.jit
def team_sums(b_mine, p_sums, i_r, programs, p_counter, arrived, FORM: tl.constexpr):
    """Three [rows], added over the programs of a team. Every program adds in the same order, so all
    get the same bits. p_sums [3, BP, BB] must not be written before another arrive_and_wait."""
    p_mine = p_sums + i_r * FORM.BB + tl.arange(0, FORM.BB)
    tl.store(p_mine, b_mine[0])
    tl.store(p_mine + FORM.BP * FORM.BB, b_mine[1])
    tl.store(p_mine + 2 * FORM.BP * FORM.BB, b_mine[2])
    arrive_and_wait(p_counter, arrived)
    i_p = tl.arange(0, FORM.BP)[:, None]
    p_all = p_sums + i_p * FORM.BB + tl.arange(0, FORM.BB)[None, :]
    b_exists = i_p < programs
    b_x = tl.load(p_all, mask=b_exists, other=0, cache_modifier=".cg")
    b_x = tl.sum(b_x, 0)
    b_y = tl.load(p_all + FORM.BP * FORM.BB, mask=b_exists, other=0, cache_modifier=".cg")
    b_y = tl.sum(b_y, 0)
    b_z = tl.load(p_all + 2 * FORM.BP * FORM.BB, mask=b_exists, other=0, cache_modifier=".cg")
    return b_x, b_y, tl.sum(b_z, 0)

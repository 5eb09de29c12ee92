"""What the kernels of both passes share: masks over the rows of the batch, sums over the units.

Blocks of a state are [units, rows of the batch]. Every row has a length, T where none is given, and
0 beyond the batch. Edge e lies between real steps e - 1 and e.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Blue's three scaled sums of squares (ACM TOMS 4, 1978), each right where the one before is not:
# of values below 2^-40, of the usual ones, of values from 2^50 on. Subnormal values included.
SMALL = tl.constexpr(2.0**100)
LARGE = tl.constexpr(2.0**-80)
LEAST = tl.constexpr(2.0**-80)  # of the usual sum
MOST = tl.constexpr(2.0**100)


@triton.jit
def lengths_of(p_lengths, i_b, T, B):
    """[rows]: how many steps each has."""
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
def stops(p_reset, i_e, i_b, b_length, B, window, WINDOWED: tl.constexpr):
    """[rows]: whether no gradient crosses edge e."""
    b_stop = cuts(p_reset, i_e, i_b, b_length, B)
    if WINDOWED:
        b_stop |= only_if(i_e < b_length, (i_e % window == 0) & (i_e > 0))
    return b_stop


@triton.jit
def only_if(b_mask, condition):
    """b_mask where a condition of the whole program holds, and nowhere otherwise. The comparison
    with 0 changes no compiled code. It is for Triton's interpreter, which holds a broadcast
    comparison as int32, and since Triton 3.9 loads and stores by masks of bool alone."""
    return (b_mask & condition) != 0


@triton.jit
def rows_at(i_b, i_t, T):
    """i_b, at a step i_t < T. That every step has the same rows the compiler is not to know: it
    would compute the addresses in all sequences once, and keep them in more registers than there
    are."""
    return i_b + tl.where(i_t < T, 0, 1)


@triton.jit
def of_rows(i_b, s_b, i_unit, UNIT: tl.constexpr):
    """[units, rows]: where in a step of a sequence, whose rows are s_b UNIT values apart."""
    return i_b.to(tl.int64)[None, :] * s_b * UNIT + i_unit


@triton.jit
def of_states(i_d, i_b, i_unit, B, WIDTH: tl.constexpr):
    """[units, rows]: where in what is [D, B, WIDTH], such as h_n; i_unit of the direction."""
    return (i_d * B + i_b).to(tl.int64)[None, :] * WIDTH + i_unit


@triton.jit
def of_units(p_x, i_unit, b_units):
    """[units, 1] of a parameter of the norm."""
    return tl.load(p_x + i_unit, mask=b_units[:, None], other=0)


@triton.jit
def operand(b_x, PRECISION: tl.constexpr):
    """x as a factor of a product: TF32 hardware would cut digits off, and a network that forgets by
    rounding down measures a gradient that it made vanish itself."""
    if PRECISION == "tf32":
        b_bits = b_x.to(tl.int32, bitcast=True)
        b_rounded = ((b_bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        return tl.where(b_x == b_x, b_rounded, b_x)  # a NaN of all ones would turn into a zero
    else:
        return b_x


@triton.jit
def product(b_w, b_x, b_added, PRECISION: tl.constexpr):
    """w x + added in float32, of operands."""
    if PRECISION == "half":
        return tl.dot(b_w, b_x, b_added)
    else:
        return tl.dot(b_w, b_x, b_added, input_precision=PRECISION)


@triton.jit
def product_turned(b_w, b_x, b_added, PRECISION: tl.constexpr):
    """The same as rows by units: a warp's registers then have 8 units; it is 16 otherwise, and two
    warps the same ones where that makes no more parts."""
    return tl.trans(product(tl.trans(b_x), tl.trans(b_w), tl.trans(b_added), PRECISION))


@triton.jit
def moments(b_a, b_inside, number):
    """mean [rows] in two parts, and the sum of squares around it, of the units inside."""
    b_mean = tl.sum(tl.where(b_inside, b_a, 0.0), 0) / number
    b_centred = tl.where(b_inside, b_a - b_mean[None, :], 0.0)
    b_rest = tl.sum(b_centred, 0) / number  # what the mean itself has lost to rounding
    b_centred = tl.where(b_inside, b_centred - b_rest[None, :], 0.0)
    return b_mean, b_rest, tl.sum(b_centred * b_centred, 0)


@triton.jit
def squares(b_x, AXIS: tl.constexpr):
    """Blue's three sums."""
    b_small, b_large = b_x * SMALL, b_x * LARGE
    b_of_small = tl.sum(b_small * b_small, AXIS)
    return b_of_small, tl.sum(b_x * b_x, AXIS), tl.sum(b_large * b_large, AXIS)


@triton.jit
def chosen(b_small, b_usual, b_large):
    """The sum that is right, and what its values were multiplied by. inf takes the last one, a NaN
    stays what it is."""
    b_is_small, b_is_large = b_usual < LEAST, b_usual > MOST
    b_sum = tl.where(b_is_small, b_small, tl.where(b_is_large, b_large, b_usual))
    return b_sum, tl.where(b_is_small, SMALL, tl.where(b_is_large, LARGE, 1.0))


@triton.jit
def clip_scale(b_small, b_usual, b_large, limit):
    """min(1, limit / norm) [rows]; 1 where the norm is inf or NaN."""
    b_sum, b_unit = chosen(b_small, b_usual, b_large)
    b_norm, b_limit = tl.sqrt_rn(b_sum), limit * b_unit
    b_clips = (b_norm > b_limit) & (b_norm < float("inf"))
    return tl.where(b_clips, tl.div_rn(b_limit, b_norm), 1.0)


@triton.jit
def weights_of(p_w, s_k, i_k, b_units, SW: tl.constexpr, PRECISION: tl.constexpr):
    """[units, K], an operand: columns i_k, s_k apart, from p_w [units, 1]. Masks end at SW, where
    rows do: an end at S could lie inside of what a vector load takes, and there would be none."""
    b_mask = b_units[:, None] & (i_k < SW)[None, :]
    b_w = tl.load(p_w + i_k.to(tl.int64)[None, :] * s_k, mask=b_mask, other=0)
    return operand(b_w, PRECISION)


@triton.jit
def state_of_all(p_x, i_k, b_live, S: tl.constexpr, PRECISION: tl.constexpr):
    """[K, rows], an operand: units i_k from p_x [1, rows], which all programs of the team have
    made: out of the L2 cache where a load may say so (.cg), and after the barrier's acquire in any
    case. 0 in the rows that are not live."""
    b_mask = (i_k < S)[:, None] & b_live[None, :]
    b_x = tl.load(p_x + i_k[:, None], mask=b_mask, other=0, cache_modifier=".cg")
    return operand(b_x, PRECISION)


@triton.jit
def product_of_all(
    b_w, p_w, s_k, p_x, b_units, b_live, b_added, units,
    S: tl.constexpr, SW: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """w x + added over the state of all units, w being b_w or, where that is None, BK columns at a
    time from p_w. units is S, as a number that the compiler does not know: unrolled, the loop wants
    more registers than there are. With single loads (UNIT 1) they do not do for three products of
    16 units a warp, either."""
    if b_w is None:
        for i_start in range(0, units, BK):
            i_k = i_start + tl.arange(0, BK)
            b_part = weights_of(p_w, s_k, i_k, b_units, SW, PRECISION)
            b_x = state_of_all(p_x, i_k, b_live, S, PRECISION)
            if UNIT == 1 and PRECISION == "tf32x3":
                b_added = product_turned(b_part, b_x, b_added, PRECISION)
            else:
                b_added = product(b_part, b_x, b_added, PRECISION)
        return b_added
    else:
        b_x = state_of_all(p_x, tl.arange(0, BK), b_live, S, PRECISION)
        return product_turned(b_w, b_x, b_added, PRECISION)


@triton.jit
def arrive_and_wait(p_counter, arrived):
    """All programs of a team: whoever returns sees what any of them has stored before.

    The counter only grows: `arrived` is what it is once the last one is here.
    """
    tl.debug_barrier()  # the stores of all threads come before the one atomic operation
    seen = tl.atomic_add(p_counter, 1, sem="acq_rel", scope="gpu") + 1
    while seen < arrived:
        seen = tl.atomic_add(p_counter, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()  # and no thread reads before it has seen the counter


@triton.jit
def sums_of_all(
    b_x, b_y, b_z, p_exchange, i_r, programs, p_counter, arrived, BP: tl.constexpr, BB: tl.constexpr
):  # fmt: skip
    """Three [rows], added over the programs of a team by each in one order. p_exchange [3, BP, BB]:
    not to be written again before another arrive_and_wait."""
    p_mine = p_exchange + i_r * BB + tl.arange(0, BB)
    tl.store(p_mine, b_x)
    tl.store(p_mine + BP * BB, b_y)
    tl.store(p_mine + 2 * BP * BB, b_z)
    arrive_and_wait(p_counter, arrived)
    i_p = tl.arange(0, BP)[:, None]
    p_all = p_exchange + i_p * BB + tl.arange(0, BB)[None, :]
    b_there = i_p < programs
    b_x = tl.sum(tl.load(p_all, mask=b_there, other=0, cache_modifier=".cg"), 0)
    b_y = tl.sum(tl.load(p_all + BP * BB, mask=b_there, other=0, cache_modifier=".cg"), 0)
    b_z = tl.sum(tl.load(p_all + 2 * BP * BB, mask=b_there, other=0, cache_modifier=".cg"), 0)
    return b_x, b_y, b_z

"""The CPU kernels and the oracle of every cell against float64: options, layouts, whole sequences
beside the modules of torch.nn.

test_judge.py and test_judge_gates.py show that the judge finds what is wrong.

Deterministic mode fills what torch allocates with NaN: an element that no kernel wrote fails.
"""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from cases import (
    FLOATS,
    NONLINEARITIES,
    NORM_RESULTS,
    RESULTS,
    Case,
    assert_good,
    examples,
    make_case,
    needs_cpu,
    own_rounding,
    run,
    run_differentiated,
    run_functional,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rnnfast.backends import cpu
from rnnfast.cells import CELLS
from rnnfast.recurrence import tensors as layout
from rnnfast.recurrence.norm import layer_norm
from rnnfast.testing import error_ratio, worst_step
from rnnfast.validate.kernels import SEQUENCES
from rnnfast.validate.layers import as_layer, exact_layer
from rnnfast.validate.long_double import AVAILABLE
from rnnfast.validate.runs import CELL_RESULTS
from rnnfast.validate.sequences import Comparison, compare_layers, compare_loops, judged

needs_long_double = pytest.mark.skipif(not AVAILABLE, reason="this machine has no long double")
pytestmark = pytest.mark.usefixtures("outputs_start_as_nan")
ENOUGH = 100  # values pooled in a step; the seeds are known, so chance strikes once or never
LEVELS = cpu._C.simd_levels() if cpu._C else ["none"]
GATED = [name for name, cell in CELLS.items() if cell.gated]
EVERY = [*NONLINEARITIES, *GATED]  # names that make_case takes


def rarer(param: str, values: list, usual: list) -> pytest.MarkDecorator:
    """Values of a parameter, of which `make test` runs the usual ones."""
    marks = [[] if value in usual else pytest.mark.proof for value in values]
    return pytest.mark.parametrize(
        param, [pytest.param(value, marks=mark) for value, mark in zip(values, marks)]
    )


gated_floats = rarer("dtype", FLOATS, [torch.float32, torch.bfloat16])


def every_cell(dtypes: list[torch.dtype], gated: list[torch.dtype]) -> pytest.MarkDecorator:
    """(f, dtype); `make test` runs gates in the dtypes ``gated`` alone."""
    pairs = itertools.product(EVERY, dtypes)
    return pytest.mark.parametrize(
        ("f", "dtype"),
        [
            pytest.param(f, d, marks=pytest.mark.proof if f in GATED and d not in gated else [])
            for f, d in pairs
        ],
    )


def seeds_of(cell: str, H: int) -> range:
    """The cases whose errors are pooled. dc_0 is a product of gates, and its errors have a heavy
    tail: few units need more cases."""
    return range(20 if cell in GATED and H < 33 else 5)


def options_of(cell: str, **options) -> dict:
    """Options for a case of that cell: no norm of gates, and c of all steps where there is a c."""
    if cell not in GATED:
        return options
    options.pop("norm", None)
    return options | {"all_cells": "c" in CELLS[cell].states}


@pytest.fixture(autouse=True)
def threads(cores_enough):
    """One, where a test says nothing: so many small cases only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_memory_that_nobody_wrote_is_nan():
    """The other tests rely on this: the backend allocates in these ways."""
    x = torch.zeros(2, 3, 4)
    for fresh in (x.new_empty(5), torch.empty_like(x), layout.empty_rows(x, 4)):
        assert fresh.isnan().all()


# ------------------------------------------------------------------------------ every single step


@needs_cpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("T", "B", "D"), [(2, 7, 2), (3, 1, 1)])
@rarer("cell", ["tanh", *GATED], ["tanh"])
def test_a_large_hidden_size_is_within_its_budget(cell, dtype, T, B, D):
    case = make_case(T, B, 650, D, dtype, cell)
    assert_good(case, run(case))


@needs_cpu
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_simd_level_is_within_the_budget(dtype, level):
    before = cpu._C.simd_level()
    cpu._C.set_simd_level(level)
    try:
        for seed, (H, B, f) in enumerate(itertools.product([3, 33, 100], [3, 7], EVERY)):
            case = make_case(4, B, H, 2, dtype, f, seed, lengths=True)
            assert_good(case, run(case))
            for norm in (False,) if f in GATED else (False, True):
                case = random_case(H, dtype, f, norm, seed)
                assert_good(case, run(case))
    finally:
        cpu._C.set_simd_level(before)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_oracle_is_within_the_budget_of_its_own_dtype(dtype):
    """Differentiated by PyTorch, and by the formula that second derivatives differentiate."""
    u = own_rounding("reference", dtype)
    for seed, (D, lengths, f) in enumerate(itertools.product([1, 2], [False, True], EVERY)):
        busy = {"norm": True, "reset": True, "bptt_window": 2, "clip_state_grad": 4.0}
        for more in ({}, options_of(f, **busy)):
            case = make_case(
                4, 3, 18, D, dtype, f, seed, lengths=lengths, heads=1 + seed % 2, **more
            )
            # PyTorch takes 1 - s from a rounded s, which has few digits near a closed gate.
            if f not in GATED:
                assert_good(case, run_differentiated(case), **u)
            assert_good(case, run(case, "reference"), **u)


def random_case(S: int, dtype: torch.dtype, f: str, norm: bool, seed: int) -> Case:
    """With any of the options, H per head being S."""
    pick = random.Random(f"{S} {dtype} {f} {norm} {seed}")
    T, B, D, heads = (pick.choice(v) for v in ([1, 2, 5, 9], [1, 3, 7], [1, 2], [1, 2, 3]))
    case = make_case(
        *(T, B, S * heads, D, dtype, f, seed),
        lengths=pick.random() < 0.5,
        heads=heads,
        norm=norm,
        reset=pick.random() < 0.5,
        bptt_window=pick.choice([None, 1, 2, 3]),
        # none, all, about half of the steps, none of them
        clip_state_grad=pick.choice([None, 0.1, 1.5 * math.sqrt(S), 1e3]),
        all_cells=f in GATED and "c" in CELLS[f].states and pick.random() < 0.5,
    )
    return case._replace(beta=None) if pick.random() < 0.25 else case


@pytest.mark.parametrize("S", [2, 3, 17, 33, 100, 129])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_step_with_options_is_within_its_budget(own_backend, dtype, S):
    u = own_rounding(own_backend, dtype)
    for f, norm, seed in itertools.product(NONLINEARITIES, [False, True], range(6)):
        case = random_case(S, dtype, f, norm, seed)
        assert_good(case, run(case, own_backend), **u)


@pytest.mark.parametrize("S", [2, 17, 33, 129])
@pytest.mark.parametrize("cell", GATED)
@gated_floats
def test_every_step_of_gates_with_options_is_within_its_budget(own_backend, dtype, cell, S):
    u = own_rounding(own_backend, dtype)
    for seed in range(6):
        case = random_case(S, dtype, cell, False, seed)
        assert_good(case, run(case, own_backend), **u)


@pytest.mark.parametrize("dtype", FLOATS)
@rarer("cell", ["tanh", *GATED], ["tanh", "lstm"])
def test_a_long_sequence_with_options_is_within_its_budget_at_every_step(own_backend, cell, dtype):
    options = {"heads": 2, "norm": True, "reset": True, "bptt_window": 35, "clip_state_grad": 5.0}
    options = options_of(cell, **options)
    case = make_case(500, 3, 34, 2, dtype, cell, lengths=True, **options)
    assert_good(case, run(case, own_backend), **own_rounding(own_backend, dtype))


def laid_out(x: Tensor | None, layout: str) -> Tensor | None:
    """The same values of [T, B, W], elsewhere in memory."""
    if x is None or layout == "time first":
        return x
    if layout == "batch first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "every other row":
        return torch.stack([x, torch.full_like(x, torch.nan)], 2)[:, :, 0]
    if layout == "gaps in rows":
        return torch.stack([x, torch.full_like(x, torch.nan)], 3)[..., 0]
    assert layout == "expanded over time"
    return x[:1].expand_as(x)


LAYOUTS = ["time first", "batch first", "every other row", "gaps in rows", "expanded over time"]


@st.composite
def cases(draw, names: list[str]) -> Case:
    T, B, heads = draw(st.integers(1, 12)), draw(st.integers(1, 9)), draw(st.integers(1, 3))
    f = draw(st.sampled_from(names))
    norm = f not in GATED and draw(st.booleans())
    S = draw(st.integers(1 + norm, 70 // heads))
    options = {"D": draw(st.integers(1, 2)), "dtype": draw(st.sampled_from(FLOATS))}
    options |= {"heads": heads, "norm": norm, "reset": draw(st.booleans())}
    options["bptt_window"] = draw(st.none() | st.integers(1, T + 1))
    options["clip_state_grad"] = draw(st.none() | st.floats(0.01, 100))
    options["norm_eps"] = draw(st.sampled_from([1e-5, 1e-2, 1.0]))
    options["all_cells"] = f in GATED and "c" in CELLS[f].states and draw(st.booleans())
    case = make_case(T, B, S * heads, nonlinearity=f, seed=draw(st.integers(0, 99)), **options)
    lengths = draw(st.none() | st.lists(st.integers(0, T), min_size=B, max_size=B))
    used = draw(st.sampled_from(["both", "y", "h_n"]))
    if case.c_0 is not None:
        starts, ends = draw(st.booleans()), draw(st.booleans())
        case = case._replace(c_0=case.c_0 if starts else None)
        case = case._replace(grad_c_n=case.grad_c_n if ends else None)
    if case.grad_cells is not None:
        case = case._replace(grad_cells=laid_out(case.grad_cells, draw(st.sampled_from(LAYOUTS))))
    return case._replace(
        p=laid_out(case.p, draw(st.sampled_from(LAYOUTS))),
        w_hh=case.w_hh.mT.contiguous().mT if draw(st.booleans()) else case.w_hh,
        beta=case.beta if draw(st.booleans()) else None,
        h_0=case.h_0 if draw(st.booleans()) else None,
        lengths=None if lengths is None else torch.tensor(lengths),
        grad_y=None if used == "h_n" else laid_out(case.grad_y, draw(st.sampled_from(LAYOUTS))),
        grad_h_n=None if used == "y" else case.grad_h_n,
    )


KINDS = pytest.mark.parametrize("names", [NONLINEARITIES, GATED], ids=["rnn", "gates"])


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])
@KINDS
def test_any_shape_layout_and_option_is_within_the_budget(names, backend):
    @settings(max_examples=examples(150))
    @given(case=cases(names))
    def check(case):
        assert_good(case, run(case, backend), **own_rounding(backend, case.p.dtype))

    check()


@needs_cpu
@KINDS
def test_any_case_agrees_with_the_oracle_in_float64(names):
    """The judge restarts each step; this compares the whole sequences."""

    @settings(max_examples=examples(60))
    @given(case=cases(names))
    def check(case):
        case = case.to(torch.float64)
        found, wanted = run_functional(case), run_functional(case, "reference")
        assert found.keys() == wanted.keys()
        for name, exact in wanted.items():
            if exact is not None:
                assert (found[name] - exact).abs().max() <= 1e-13 * case.p.shape[0] * max(
                    1.0, exact.abs().max().item()
                ), name

    check()


# ----------------------------------------------------------------- whole sequences, and torch.nn


@needs_long_double
@pytest.mark.parametrize("f", EVERY)
def test_two_oracles_agree(f):
    case = make_case(6, 3, 5, 1, torch.float64, f)
    found = as_layer(case, "reference")
    for name, (high, _) in exact_layer(case).items():
        assert (found[name] - high).abs().max() <= 1e-14 * high.abs().max(), name


def assert_no_worse_than_torch(cases: list[Case], batch_first: bool = False) -> None:
    assert_compares(judged(compare_layers(cases, "cpu", batch_first), cases, ENOUGH))


def assert_compares(found: dict[str, Comparison]) -> None:
    bad = [str(comparison) for comparison in found.values() if not comparison.good]
    assert not bad, "; ".join(bad)


@needs_cpu
@pytest.mark.parametrize(("T", "B", "H"), SEQUENCES)
@rarer("f", EVERY, NONLINEARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_whole_sequences_err_no_more_than_torch(dtype, f, T, B, H):
    assert_no_worse_than_torch([make_case(T, B, H, 1, dtype, f, s) for s in seeds_of(f, H)])


@needs_cpu
@every_cell(FLOATS, [torch.float32, torch.bfloat16])
def test_both_directions_err_no_more_than_torch(dtype, f):
    if dtype == torch.float64 and not AVAILABLE:
        pytest.skip("this machine has no long double")
    cases = [make_case(50, 7, 33, 2, dtype, f, seed) for seed in range(5)]
    assert_no_worse_than_torch(cases, batch_first=True)


@needs_cpu
@every_cell([torch.float32, torch.bfloat16, torch.float16], [])
def test_rows_of_unequal_length_err_no_more_than_torch(dtype, f):
    """torch.nn takes them packed: none of length 0, one of length T."""
    cases = [make_case(50, 7, 33, 2, dtype, f, seed, lengths=True) for seed in range(5)]
    for case in cases:
        case.lengths.clamp_(min=1)[3] = 50
    assert_no_worse_than_torch(cases)


@pytest.mark.proof
@needs_cpu
@pytest.mark.parametrize("f", ["tanh", "relu", *GATED])
def test_2000_steps_in_float32_err_no_more_than_torch(f):
    cases = [make_case(2000, 3, 64, 1, torch.float32, f, seed) for seed in range(5)]
    assert_compares(compare_layers(cases, "cpu"))


# ----------------------------------------------------- whole sequences, where torch has no kernel


@pytest.mark.parametrize(
    ("T", "B", "H", "options"),
    [
        (50, 7, 33, {}),
        (20, 3, 100, {}),
        (20, 3, 129, {"D": 2}),
        (30, 5, 102, {"heads": 3}),
        (40, 7, 68, {"D": 2, "heads": 2, "lengths": True, "reset": True, "clip_state_grad": 8.0}),
    ],
)
@pytest.mark.parametrize("f", NONLINEARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layer_norm_errs_no_more_than_the_eager_loop(own_backend, dtype, f, T, B, H, options):
    if own_backend == "reference" and dtype != torch.float32:
        pytest.skip("there the formula of backward reads ahat in 16 bits, and computes in them")
    cases = [
        make_case(T, B, H, dtype=dtype, nonlinearity=f, seed=s, norm=True, **options)
        for s in range(5)
    ]
    assert_compares(judged(compare_loops(cases, own_backend), cases, ENOUGH))


@pytest.mark.parametrize("S", [3, 17, 33, 100, 129])
def test_a_large_mean_costs_layer_norm_no_more_than_the_rounding_of_a(own_backend, S):
    """|mean| / std = 1000: a variance as mean(a^2) - mean(a)^2 would keep one digit of seven."""
    runs, rounded = [], []
    for seed in range(5):
        case = make_case(6, 16, 2 * S, seed=seed, heads=2, norm=True)
        case = case._replace(p=case.p + 1000)
        found = run(case, own_backend)
        before = torch.cat([case.h_0, found["y"][:-1]]).double().unflatten(-1, (2, S))
        w = case.w_hh.double().view(2, S, S)
        a = case.p.double().unflatten(-1, (2, S)) + torch.einsum("tbnj,nij->tbni", before, w)
        exact, _ = layer_norm(a, case.options.norm_eps)
        runs.append((found["ahat"].unflatten(-1, (2, S)), exact))
        rounded.append((layer_norm(a.float().double(), case.options.norm_eps)[0], exact))
    assert error_ratio(worst_step(runs), worst_step(rounded)) <= 1.25


# --------------------------------------------------------------------------- bits, threads, NaN


@needs_cpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("T", "B", "H", "D"),
    [
        (40, 7, 33, 2),
        (40, 1, 100, 1),
        (20, 64, 64, 1),
        (9, 1, 200, 1),
        (9, 3, 217, 2),
        (70, 31, 20, 2),  # two sums of points
    ],
)
@pytest.mark.parametrize(
    "options",
    [{}, {"reset": True, "bptt_window": 3, "clip_state_grad": 4.0, "norm": True}],
    ids=["plain", "options"],
)
@rarer("cell", ["tanh", *GATED], ["tanh"])
def test_two_runs_give_the_same_bits_at_any_number_of_threads(
    threads, cell, dtype, T, B, H, D, options
):
    options = options_of(cell, **options)
    case = make_case(T, B, H, D, dtype, cell, lengths=True, **options)
    names = RESULTS + (NORM_RESULTS if "norm" in options else [])
    first = None
    for n in (1, 2, 3, 4):
        threads(n)
        found, again = run(case), run(case)
        names += [name for name in CELL_RESULTS if name in found and name not in names]
        for name in names:
            assert torch.equal(found[name], again[name]), (name, n)
        assert_good(case, found)
        first = first or found
        for name in names:
            assert torch.equal(found[name], first[name]), (name, n)


SPECIAL = [torch.nan, torch.inf, -torch.inf]


INPUTS = ["p", "w_hh", "h_0", "grad_y", "grad_h_n"]
INPUTS += ["c_0", "grad_c_n", "grad_cells", "b_hh"]
SPREAD = [
    pytest.param(f, where, dtype, marks=[] if usual or f not in GATED else pytest.mark.proof)
    for f in EVERY
    for where in INPUTS
    if getattr(make_case(1, 1, 2, 1, nonlinearity=f, **options_of(f)), where) is not None
    for dtype, usual in zip(FLOATS, [True, False, True, False])
]


@needs_cpu
@pytest.mark.parametrize(("f", "where", "dtype"), SPREAD)
@pytest.mark.parametrize("special", SPECIAL)
def test_nan_and_inf_spread_as_in_torch(where, special, dtype, f):
    """The same elements are NaN, inf and -inf; no other row of the batch is touched."""
    case = make_case(6, 5, 19, 2, dtype, f, **options_of(f))
    x = getattr(case, where).clone()
    over_time = {"p": (3, 2, 4), "grad_y": (3, 2, 4), "grad_cells": (3, 2, 4), "b_hh": (40,)}
    x[over_time.get(where, (1, 2, 4))] = special
    case = case._replace(**{where: x})
    found, wanted = run(case), run(case, "reference")
    names = RESULTS + [name for name in CELL_RESULTS if name in found]
    for name in names:
        assert found[name].isnan().equal(wanted[name].isnan()), name
        assert found[name].isposinf().equal(wanted[name].isposinf()), name
        assert found[name].isneginf().equal(wanted[name].isneginf()), name
    if special != special:
        assert any(found[name].isnan().any() for name in names)

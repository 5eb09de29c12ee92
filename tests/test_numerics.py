"""The kernels against float64: every step of every case, and whole sequences beside nn.RNN.

Deterministic mode fills what torch allocates with NaN: an element that no kernel wrote fails.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnfast
from rnnfast import testing
from rnnfast.backends import cpu, reference
from rnnfast.testing import error_ratio, judge_backward, judge_forward, worst_step

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NONLINEARITIES = ["tanh", "relu", "sigmoid"]
RESULTS = ["y", "h_n", "dp", "dw_hh", "dh_0"]
LEVELS = cpu._C.simd_levels() if cpu._C else ["none"]

needs_cpu = pytest.mark.skipif(cpu._C is None, reason="the extension rnnfast._C is not built")


@pytest.fixture(autouse=True)
def _outputs_start_as_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def threads():
    """One, where a test says nothing: so many small cases only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


class Case(NamedTuple):
    p: Tensor  # [T, B, D * H]
    w_hh: Tensor  # [D, H, H]
    h_0: Tensor | None  # [D, B, H]
    lengths: Tensor | None  # [B]
    grad_y: Tensor | None
    grad_h_n: Tensor | None
    nonlinearity: str = "tanh"

    def to(self, dtype: torch.dtype) -> Case:
        return Case(*(cast(x, dtype) for x in self[:-1]), self.nonlinearity)


def cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return x if x is None or not x.is_floating_point() else x.to(dtype)


def make_case(T, B, H, D=1, dtype=torch.float32, nonlinearity="tanh", seed=0, lengths=False):
    """A contracting one: ||W_hh||_2 = 0.95."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    w = normal(D, H, H)
    w *= 0.95 / torch.linalg.matrix_norm(w, 2)[:, None, None]
    p, h_0, grad_y, grad_h_n = (
        normal(*shape) for shape in [(T, B, D * H), (D, B, H), (T, B, D * H), (D, B, H)]
    )
    n = torch.randint(0, T + 1, (B,), generator=generator) if lengths else None
    return Case(p, w, h_0, n, grad_y, grad_h_n, nonlinearity).to(dtype)


def run(case: Case, backend: str = "cpu") -> dict[str, Tensor | None]:
    """Through functional.rnn and autograd."""
    leaves = {
        name: x.detach().requires_grad_()
        for name, x in zip(("p", "w_hh", "h_0"), case)
        if x is not None
    }
    y, h_n = rnnfast.functional.rnn(
        **leaves, lengths=case.lengths, nonlinearity=case.nonlinearity, backend=backend
    )
    used = [(x, g) for x, g in ((y, case.grad_y), (h_n, case.grad_h_n)) if g is not None]
    outputs, gradients = zip(*used)
    grads = torch.autograd.grad(outputs, list(leaves.values()), gradients)
    found = {"y": y.detach(), "h_n": h_n.detach(), "dh_0": None}
    return found | {f"d{name}": grad for name, grad in zip(leaves, grads)}


def judge(case: Case, found: dict[str, Tensor | None], **options) -> list[testing.Verdict]:
    p, w_hh, h_0, lengths, grad_y, grad_h_n, f = case
    y, h_n, dp, dw_hh, dh_0 = (found[name] for name in RESULTS)
    return [
        *judge_forward(p, w_hh, h_0, lengths, f, y, h_n, **options),
        *judge_backward(grad_y, grad_h_n, y, w_hh, h_0, lengths, f, dp, dw_hh, dh_0, **options),
    ]


def assert_good(case: Case, found: dict[str, Tensor | None], **options) -> None:
    bad = [str(verdict) for verdict in judge(case, found, **options) if not verdict.good]
    shape = tuple(case.p.shape), tuple(case.w_hh.shape)
    assert not bad, f"{shape} {case.p.dtype} {case.nonlinearity}: " + "; ".join(bad)


def test_memory_that_nobody_wrote_is_nan():
    """What the other tests rest on: these are the ways in which the backend allocates."""
    x = torch.zeros(2, 3, 4)
    for fresh in (x.new_empty(5), torch.empty_like(x), cpu.empty_rows(x, 4)):
        assert fresh.isnan().all()


# ------------------------------------------------------------------------------ every single step


@needs_cpu
@pytest.mark.parametrize("H", [1, 3, 17, 33, 100, 129])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_step_is_within_its_budget(dtype, H):
    shapes = itertools.product([1, 2, 5], [1, 3, 7], [1, 2], [False, True], NONLINEARITIES)
    for seed, (T, B, D, lengths, f) in enumerate(shapes):
        case = make_case(T, B, H, D, dtype, f, seed, lengths)
        assert_good(case, run(case))


@needs_cpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("T", "B", "D"), [(2, 7, 2), (3, 1, 1)])
def test_a_large_hidden_size_is_within_its_budget(dtype, T, B, D):
    case = make_case(T, B, 650, D, dtype)
    assert_good(case, run(case))


@needs_cpu
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_long_sequence_is_within_its_budget_at_every_step(dtype):
    case = make_case(2000, 3, 17, 2, dtype, lengths=True)
    assert_good(case, run(case))


@needs_cpu
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_simd_level_is_within_the_budget(dtype, level):
    before = cpu._C.simd_level()
    cpu._C.set_simd_level(level)
    try:
        for seed, (H, B, f) in enumerate(itertools.product([3, 33, 100], [3, 7], NONLINEARITIES)):
            case = make_case(4, B, H, 2, dtype, f, seed, lengths=True)
            assert_good(case, run(case))
    finally:
        cpu._C.set_simd_level(before)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_oracle_is_within_the_budget_of_its_own_dtype(dtype):
    """Its operations round in the dtype they compute in, 16 bits included."""
    u = torch.finfo(dtype).eps / 2
    for seed, (D, lengths, f) in enumerate(
        itertools.product([1, 2], [False, True], NONLINEARITIES)
    ):
        case = make_case(4, 3, 17, D, dtype, f, seed, lengths)
        assert_good(case, run(case, "reference"), u_operand=u)
        p, *others = case[:4]
        y, h_n = reference.forward(p, None, None, None, *others, f)
        inputs = (*case[4:6], y, p, None, *others, True, True, f)
        dp, _, _, _, dw_hh, dh_0 = reference.backward(*inputs)
        found = dict(zip(RESULTS, (y, h_n, dp, dw_hh, dh_0)))
        assert_good(case, found, u_operand=u)  # the formula for second derivatives


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
def cases(draw) -> Case:
    T, B, H = draw(st.integers(1, 12)), draw(st.integers(1, 9)), draw(st.integers(1, 70))
    f = draw(st.sampled_from(NONLINEARITIES))
    options = {"D": draw(st.integers(1, 2)), "dtype": draw(st.sampled_from(FLOATS))}
    case = make_case(T, B, H, nonlinearity=f, seed=draw(st.integers(0, 99)), **options)
    lengths = draw(st.none() | st.lists(st.integers(0, T), min_size=B, max_size=B))
    used = draw(st.sampled_from(["both", "y", "h_n"]))
    return case._replace(
        p=laid_out(case.p, draw(st.sampled_from(LAYOUTS))),
        w_hh=case.w_hh.mT.contiguous().mT if draw(st.booleans()) else case.w_hh,
        h_0=case.h_0 if draw(st.booleans()) else None,
        lengths=None if lengths is None else torch.tensor(lengths),
        grad_y=None if used == "h_n" else laid_out(case.grad_y, draw(st.sampled_from(LAYOUTS))),
        grad_h_n=None if used == "y" else case.grad_h_n,
    )


@needs_cpu
@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=cases())
def test_any_shape_layout_and_option_is_within_the_budget(case):
    assert_good(case, run(case))


@needs_cpu
@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=cases())
def test_any_case_agrees_with_the_oracle_in_float64(case):
    """The judge restarts each step; this compares the whole sequences."""
    case = case.to(torch.float64)
    found, wanted = run(case), run(case, "reference")
    assert found.keys() == wanted.keys()
    for name, exact in wanted.items():
        if exact is not None:
            assert (found[name] - exact).abs().max() <= 1e-13 * case.p.shape[0] * max(
                1.0, exact.abs().max().item()
            ), name


# ------------------------------------------------------------------- whole sequences, and nn.RNN


def in_long_double(case: Case, bias: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """An oracle of its own, in 64 bits of mantissa: what float64 results are judged by.

    x = p, W_ih = I: the gradients of the whole layer. Each value as high + low, two float64.
    """
    np = pytest.importorskip("numpy")
    if np.finfo(np.longdouble).nmant < 63:
        pytest.skip("this machine has no long double")
    x, w_hh, h_0, _, grad_y, grad_h_n = (
        v if v is None else v.numpy().astype(np.longdouble) for v in case[:6]
    )
    f, slope = {
        "tanh": (np.tanh, lambda h: 1 - h * h),
        "relu": (lambda a: np.maximum(a, 0), lambda h: 1.0 * (h > 0)),
        "sigmoid": (lambda a: 1 / (1 + np.exp(-a)), lambda h: h * (1 - h)),
    }[case.nonlinearity]
    (T, B, _), (D, H, _) = x.shape, w_hh.shape
    p = x + bias.numpy()
    y, dp = np.zeros_like(p), np.zeros_like(p)
    h_n, dw_hh, dh_0, dw_ih = (np.zeros_like(v) for v in (h_0, w_hh, h_0, w_hh))
    for d in range(D):
        columns, times = slice(d * H, (d + 1) * H), list(range(T))[:: -1 if d else 1]
        h = h_0[d]
        for t in times:
            h = y[t, :, columns] = f(p[t, :, columns] + h @ w_hh[d].T)
        h_n[d], carry = h, grad_h_n[d]
        for i in reversed(range(T)):
            t = times[i]
            before = y[times[i - 1], :, columns] if i else h_0[d]
            da = (carry + grad_y[t, :, columns]) * slope(y[t, :, columns])
            dp[t, :, columns], carry = da, da @ w_hh[d]
            dw_hh[d] += da.T @ before
            dw_ih[d] += da.T @ x[t, :, columns]
        dh_0[d] = carry
    db = dp.sum((0, 1)).reshape(D, H)

    def split(v) -> tuple[Tensor, Tensor]:
        high = v.astype(np.float64)
        return torch.from_numpy(high), torch.from_numpy((v - high).astype(np.float64))

    values = (y, h_n, dp.reshape(T, B, D, H).sum(2), dw_hh, dh_0, dw_ih, db, db)
    return dict(zip(LAYER_RESULTS, map(split, values)))


LAYER_RESULTS = ["y", "h_n", "dx", "dw_hh", "dh_0", "dw_ih", "db_ih", "db_hh"]


def layer_bias(case: Case) -> Tensor:
    """Eighths, which every dtype holds: [D * H]."""
    return torch.arange(case.p.shape[2]).remainder(7).sub(3).to(case.p.dtype) / 8


def as_layer(case: Case, kind: str, batch_first: bool = False) -> dict[str, Tensor]:
    """The case as one layer with W_ih = I, so that dx is the sum of dp over directions.

    kind: "torch" is nn.RNN, anything else a backend of rnnfast.RNN.
    """
    D, H, _ = case.w_hh.shape
    options = {"bidirectional": D == 2, "batch_first": batch_first, "dtype": case.p.dtype}
    if kind == "torch":
        rnn = nn.RNN(H, H, nonlinearity=case.nonlinearity, **options)
    else:
        rnn = rnnfast.RNN(H, H, nonlinearity=case.nonlinearity, backend=kind, **options)
    names = ["weight_hh_l0", "weight_ih_l0", "bias_ih_l0", "bias_hh_l0"]
    bias, nothing = layer_bias(case).view(D, H), torch.zeros(D, H)
    eye = torch.eye(H).expand(D, H, H)
    with torch.no_grad():
        for name, value in zip(names, (case.w_hh, eye, bias, nothing)):
            for d, suffix in enumerate(["", "_reverse"][:D]):
                getattr(rnn, name + suffix).copy_(value[d])

    def swap(v: Tensor) -> Tensor:
        return v.transpose(0, 1) if batch_first else v

    x = swap(case.p[..., :H]).detach().requires_grad_()
    h_0 = case.h_0.detach().requires_grad_()
    if case.lengths is None:
        y, h_n = rnn(x, h_0)
    elif kind == "torch":
        packed = pack_padded_sequence(x, case.lengths, batch_first, enforce_sorted=False)
        y, h_n = rnn(packed, h_0)
        y, _ = pad_packed_sequence(y, batch_first)
    else:
        y, h_n = rnn(x, h_0, lengths=case.lengths)
    torch.autograd.backward([y, h_n], [swap(case.grad_y), case.grad_h_n])
    dw_hh, dw_ih, db_ih, db_hh = (
        torch.stack([getattr(rnn, name + s).grad for s in ["", "_reverse"][:D]]) for name in names
    )
    y, dx = swap(y.detach()), swap(x.grad)
    values = (y, h_n.detach(), dx, dw_hh, h_0.grad, dw_ih, db_ih, db_hh)
    return dict(zip(LAYER_RESULTS, values))


def exact_layer(case: Case) -> dict[str, tuple[Tensor, Tensor]]:
    """What as_layer should give, as high + low."""
    if case.p.dtype == torch.float64:
        return in_long_double(case, layer_bias(case))
    found = as_layer(case.to(torch.float64), "reference")
    return {name: (v, torch.zeros_like(v)) for name, v in found.items()}


def ratios_to_torch(cases: list[Case], backend: str, batch_first: bool = False) -> dict[str, float]:
    """{result: our worst step's RMS error against that of nn.RNN (the eager loop for sigmoid)}."""
    peer = "reference" if cases[0].nonlinearity == "sigmoid" else "torch"
    runs = {backend: [], peer: []}
    for case in cases:
        H = case.w_hh.shape[1]
        case = case._replace(p=torch.cat([case.p[..., :H]] * case.w_hh.shape[0], -1))
        exact = exact_layer(case)
        for kind, pairs in runs.items():
            found = as_layer(case, kind, batch_first)
            # found - high is exact where they are close, so that low is not lost
            pairs.append({n: (found[n].double() - high, low) for n, (high, low) in exact.items()})

    def worst(kind: str, name: str) -> testing.StepError:
        pairs = [found[name] for found in runs[kind]]
        if name not in ("y", "dx"):  # no time axis
            pairs = [(v.unsqueeze(0), e.unsqueeze(0)) for v, e in pairs]
        return worst_step(pairs)

    return {name: error_ratio(worst(backend, name), worst(peer, name)) for name in LAYER_RESULTS}


@pytest.mark.parametrize("f", NONLINEARITIES)
def test_two_oracles_agree(f):
    case = make_case(6, 3, 5, 1, torch.float64, f)
    found = as_layer(case, "reference")
    for name, (high, _) in exact_layer(case).items():
        assert (found[name] - high).abs().max() <= 1e-14 * high.abs().max(), name


def judged(ratios: dict[str, float], cases: list[Case]) -> dict[str, float]:
    """Those of them that say something about the kernel.

    Left out is what pools fewer than 100 values a step, which is chance, and gradients of ReLU in
    16 bits, where one unit that rounds to the other side of 0 outweighs all rounding.
    """
    _, B, H = *cases[0].p.shape[:2], cases[0].w_hh.shape[1]
    pooled = dict.fromkeys(LAYER_RESULTS, len(cases) * B * H)
    pooled |= {"dw_hh": len(cases) * H * H, "dw_ih": len(cases) * H * H}
    pooled |= {"db_ih": len(cases) * H, "db_hh": len(cases) * H}
    narrow = cases[0].p.dtype.itemsize < 4
    names = [name for name in ratios if pooled[name] >= 100]
    if narrow and cases[0].nonlinearity == "relu":
        names = ["y", "h_n"]
    return {name: ratios[name] for name in names}


def assert_no_worse_than_torch(cases: list[Case], batch_first: bool = False) -> None:
    ratios = judged(ratios_to_torch(cases, "cpu", batch_first), cases)
    assert all(ratio <= 1.25 for ratio in ratios.values()), ratios  # NaN fails


@needs_cpu
@pytest.mark.parametrize(
    ("T", "B", "H"),
    [(20, 64, 1), (20, 64, 3), (20, 64, 17), (50, 7, 33), (20, 3, 100), (20, 3, 129), (10, 8, 512)],
)
@pytest.mark.parametrize("f", NONLINEARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_whole_sequences_err_no_more_than_torch(dtype, f, T, B, H):
    assert_no_worse_than_torch([make_case(T, B, H, 1, dtype, f, seed) for seed in range(5)])


@needs_cpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("f", NONLINEARITIES)
def test_both_directions_err_no_more_than_torch(dtype, f):
    cases = [make_case(50, 7, 33, 2, dtype, f, seed) for seed in range(5)]
    assert_no_worse_than_torch(cases, batch_first=True)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("f", NONLINEARITIES)
def test_rows_of_unequal_length_err_no_more_than_torch(dtype, f):
    """nn.RNN takes them packed: none of length 0, one of length T."""
    cases = [make_case(50, 7, 33, 2, dtype, f, seed, lengths=True) for seed in range(5)]
    for case in cases:
        case.lengths.clamp_(min=1)[3] = 50
    assert_no_worse_than_torch(cases)


@needs_cpu
@pytest.mark.parametrize("f", ["tanh", "relu"])
def test_2000_steps_in_float32_err_no_more_than_torch(f):
    cases = [make_case(2000, 3, 64, 1, torch.float32, f, seed) for seed in range(5)]
    ratios = ratios_to_torch(cases, "cpu")
    assert all(ratio <= 1.25 for ratio in ratios.values()), ratios


# --------------------------------------------------------------------------- bits, threads, NaN


@needs_cpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("T", "B", "H", "D"),
    [(40, 7, 33, 2), (40, 1, 100, 1), (20, 64, 64, 1), (9, 1, 200, 1), (9, 3, 217, 2)],
)
def test_two_runs_give_the_same_bits_at_any_number_of_threads(threads, dtype, T, B, H, D):
    case = make_case(T, B, H, D, dtype, lengths=True)
    first = None
    for n in (1, 2, 3):
        threads(n)
        found, again = run(case), run(case)
        for name in RESULTS:
            assert torch.equal(found[name], again[name]), (name, n)
        assert_good(case, found)
        first = first or found
        for name in RESULTS:
            assert torch.equal(found[name], first[name]), (name, n)


SPECIAL = [torch.nan, torch.inf, -torch.inf]


@needs_cpu
@pytest.mark.parametrize("f", NONLINEARITIES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("where", ["p", "w_hh", "h_0", "grad_y", "grad_h_n"])
def test_nan_and_inf_spread_as_in_torch(where, special, dtype, f):
    """The same elements are NaN, inf and -inf; no other row of the batch is touched."""
    case = make_case(6, 5, 19, 2, dtype, f)
    x = getattr(case, where).clone()
    x[(3, 2, 4) if where in ("p", "grad_y") else (1, 2, 4)] = special
    case = case._replace(**{where: x})
    found, wanted = run(case), run(case, "reference")
    for name in RESULTS:
        assert found[name].isnan().equal(wanted[name].isnan()), name
        assert found[name].isposinf().equal(wanted[name].isposinf()), name
        assert found[name].isneginf().equal(wanted[name].isneginf()), name
    if special != special:
        assert any(found[name].isnan().any() for name in RESULTS)


# -------------------------------------------------------------------------- the judge is awake


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_judge_finds_one_zeroed_step_of_one_row(dtype):
    """A global score at this size is 1e-5."""
    case = make_case(2000, 64, 8, dtype=dtype)
    right = run(case, "reference")
    u = torch.finfo(dtype).eps / 2
    assert_good(case, right, u_operand=u)
    for name in ("y", "dp"):
        found = right | {name: right[name].clone()}
        found[name][1234, 17] = 0
        (verdict,) = (v for v in judge(case, found, u_operand=u) if v.name == name)
        assert not verdict.good
        assert verdict.index[1] == 17
        assert verdict.index[0] in (1233, 1234, 1235), "it, or the step restarted from it"
        assert f"{name}: {verdict.ratio:.3g} of its error budget at [" in str(verdict)


FAULTS = {  # what is wrong with a kernel: (the results it has wrong, those results)
    "W_hh transposed": ("y dp", lambda c, r: oracle(c, w_hh=c.w_hh.mT)),
    "a bias forgotten": ("y", lambda c, r: oracle(c, p=c.p - layer_bias(c))),
    "h_0 forgotten": ("y", lambda c, r: oracle(c, h_0=torch.zeros_like(c.h_0))),
    "dW_hh without h_0": ("dw_hh", lambda c, r: {"dw_hh": oracle(c, h_0=None)["dw_hh"]}),
    "lengths forgotten": ("y h_n dp", lambda c, r: oracle(c, lengths=None)),
    "h_n a step too early": ("h_n", lambda c, r: {"h_n": r["h_n"] * 0 + r["y"][1, :, :8]}),
    "another nonlinearity": ("y dp", lambda c, r: oracle(c, nonlinearity="sigmoid")),
    "forward late by a step": ("y", lambda c, r: {"y": r["y"].roll(1, 0)}),
    "backward late by a step": ("dp", lambda c, r: {"dp": r["dp"].roll(-1, 0)}),
    "grad_h_n forgotten": ("dp", lambda c, r: oracle(c, grad_h_n=None)),
    "grad_y forgotten": ("dp", lambda c, r: oracle(c, grad_y=None)),
    "directions swapped": ("y", lambda c, r: {"y": r["y"].roll(8, -1)}),
    "dh_0 not carried": ("dh_0", lambda c, r: {"dh_0": r["dh_0"] * 0}),
    "one element not written": ("y", lambda c, r: {"y": r["y"].where(c.p < c.p.max(), torch.nan)}),
}


def oracle(case: Case, **changed) -> dict[str, Tensor | None]:
    return run(case._replace(**changed), "reference")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_judge_finds_a_planted_fault(dtype, fault):
    case = make_case(9, 5, 8, 2, dtype, seed=3, lengths=True)
    case.lengths[:2] = torch.tensor([9, 4])
    right = run(case, "reference")
    u = torch.finfo(dtype).eps / 2
    assert_good(case, right, u_operand=u)
    names, results = FAULTS[fault]
    bad = {v.name for v in judge(case, right | results(case, right), u_operand=u) if not v.good}
    assert set(names.split()) <= bad


def test_the_sequence_score_names_the_worst_step_and_fails_on_nan():
    exact = torch.zeros(5, 3, 4, dtype=torch.float64)
    noise = torch.full_like(exact, 1e-7)
    noise[3] = 2e-7
    worst = worst_step([(noise, exact), (-noise, exact)])
    assert worst == (pytest.approx(2e-7), 3)
    assert error_ratio(worst, worst_step([(noise / 2, exact)])) == pytest.approx(2)
    noise[1, 0, 0] = torch.nan
    broken = worst_step([(noise, exact)])
    assert broken.t == 1
    assert not error_ratio(broken, worst) <= 1.25

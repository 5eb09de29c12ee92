"""The judge is awake: it finds each of the faults that a kernel may have, and nothing else."""

from __future__ import annotations

import pytest
import torch
from cases import (
    FLOATS,
    Case,
    assert_good,
    judge,
    make_case,
    needs_cpu,
    own_rounding,
    run,
    run_differentiated,
)
from torch import Tensor

from rnnfast.recurrence import loop
from rnnfast.recurrence.clipping import clip
from rnnfast.recurrence.groups import Saved
from rnnfast.testing import error_ratio, worst_step

Found = dict[str, Tensor | None]


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_judge_finds_one_zeroed_step_of_one_row(dtype):
    """A global score at this size is 1e-5."""
    case = make_case(2000, 64, 8, dtype=dtype)
    right = oracle(case)
    u = own_rounding("reference", dtype)
    assert_good(case, right, **u)
    for name in ("y", "dp"):
        found = right | {name: right[name].clone()}
        found[name][1234, 17] = 0
        (verdict,) = (v for v in judge(case, found, **u) if v.name == name)
        assert not verdict.good
        assert verdict.index[1] == 17
        assert verdict.index[0] in (1233, 1234, 1235), "it, or the step restarted from it"
        assert f"{name}: {verdict.ratio:.3g} of its error budget at [" in str(verdict)


def oracle(case: Case, **changed) -> Found:
    return run(case._replace(**changed), "reference")


def differing(case: Case, **options) -> Found:
    """With other options."""
    return oracle(case.with_options(**options))


def assert_found(case: Case, names: str, wrong) -> None:
    """names: the results in which the fault shows; wrong: right results -> those it has wrong."""
    right = oracle(case)
    u = own_rounding("reference", case.p.dtype)
    assert_good(case, right, **u)
    bad = {v.name for v in judge(case, right | wrong(case, right), **u) if not v.good}
    assert set(names.split()) <= bad


FAULTS = {  # what is wrong with a kernel: (the results where it shows, the wrong results)
    "W_hh transposed": ("y dp", lambda c, r: oracle(c, w_hh=c.w_hh.mT)),
    "a bias forgotten": ("y", lambda c, r: oracle(c, p=c.p - 0.125)),
    "h_0 forgotten": ("y", lambda c, r: oracle(c, h_0=torch.zeros_like(c.h_0))),
    "dW_hh without h_0": ("dw_hh", lambda c, r: {"dw_hh": oracle(c, h_0=None)["dw_hh"]}),
    "lengths forgotten": ("y h_n dp", lambda c, r: oracle(c, lengths=None)),
    "h_n a step too early": ("h_n", lambda c, r: {"h_n": r["h_n"] * 0 + r["y"][1, :, :8]}),
    "another nonlinearity": ("y dp", lambda c, r: differing(c, nonlinearity="sigmoid")),
    "forward late by a step": ("y", lambda c, r: {"y": r["y"].roll(1, 0)}),
    "backward late by a step": ("dp", lambda c, r: {"dp": r["dp"].roll(-1, 0)}),
    "grad_h_n forgotten": ("dp", lambda c, r: oracle(c, grad_h_n=None)),
    "grad_y forgotten": ("dp", lambda c, r: oracle(c, grad_y=None)),
    "directions swapped": ("y", lambda c, r: {"y": r["y"].roll(8, -1)}),
    "dh_0 not carried": ("dh_0", lambda c, r: {"dh_0": r["dh_0"] * 0}),
    "one element not written": ("y", lambda c, r: {"y": r["y"].where(c.p < c.p.max(), torch.nan)}),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_judge_finds_a_planted_fault(dtype, fault):
    case = make_case(9, 5, 8, 2, dtype, seed=3, lengths=True)
    case.lengths[:2] = torch.tensor([9, 4])
    assert_found(case, *FAULTS[fault])


def with_reset_at_0(case: Case) -> Case:
    """In every row, so that the first step of both directions and h_0 are concerned."""
    case.reset[0] = True
    return case


RECURRENCE_FAULTS = {
    "one head": ("y dp", lambda c, r: oracle(c, w_hh=c.w_hh.roll(4, 1))),
    "reset ignored": ("y dp dw_hh dh_0", lambda c, r: oracle(c, reset=None)),
    "reset one step late": ("y dp", lambda c, r: oracle(c, reset=c.reset.roll(1, 0))),
    "reset of the state alone": (
        "dp dh_0",
        lambda c, r: backward(c, r, reset=torch.zeros_like(c.reset)) | {"dw_hh": r["dw_hh"]},
    ),
    "reset of the gradient alone": ("y", lambda c, r: pick(oracle(c, reset=None), "y", "h_n")),
    "dW_hh across a reset": ("dw_hh", lambda c, r: pick(backward(c, r, reset=None), "dw_hh")),
    "dh_0 across a reset": ("dh_0", lambda c, r: pick(backward(c, r, reset=None), "dh_0")),
    "gradient across the window": ("dp", lambda c, r: differing(c, bptt_window=None)),
    "the window a step longer": ("dp", lambda c, r: differing(c, bptt_window=4)),
    "the window one step late": ("dp", lambda c, r: late_window(c)),
    "dW_hh without the terms at the window's edges": ("dw_hh", lambda c, r: cut_dw(c, r)),
    "clip ignored": ("dp", lambda c, r: differing(c, clip_state_grad=None)),
    "clip at twice the limit": ("dp", lambda c, r: differing(c, clip_state_grad=3.0)),
    "clip over all heads": ("dp", lambda c, r: patched(c, "clip", clip_over_all_heads)),
    "clip of the elements": ("dp", lambda c, r: patched(c, "clip", lambda c, x: (x.clamp(-c, c),))),
    "dh_0 clipped": ("dh_0", lambda c, r: {"dh_0": clip(0.01, r["dh_0"])[0]}),
}
NORM_FAULTS = {
    "gamma forgotten": ("y dp", lambda c, r: oracle(c, gamma=torch.ones_like(c.gamma))),
    "beta forgotten": ("y", lambda c, r: oracle(c, beta=None)),
    "eps forgotten": ("y ahat rstd", lambda c, r: differing(c, norm_eps=1e-30)),
    "eps beside the root": ("y ahat rstd", lambda c, r: patched(c, "layer_norm", eps_outside)),
    "unbiased variance": ("y ahat rstd", lambda c, r: patched(c, "layer_norm", unbiased)),
    "mean over all heads": ("y ahat", lambda c, r: patched(c, "layer_norm", mean_over_all_heads)),
    "norm over all heads": ("y ahat rstd", lambda c, r: patched(c, "layer_norm", over_all_heads)),
    "backward without the mean": ("dp", lambda c, r: wrong_backward(c, "mean")),
    "backward without the second mean": ("dp", lambda c, r: wrong_backward(c, "rstd")),
    "backward without gamma": ("dp", lambda c, r: backward(c, r, gamma=c.gamma * 0 + 1)),
    "ahat saved a step late": ("ahat", lambda c, r: {"ahat": r["ahat"].roll(1, 0)}),
    "rstd saved a step late": ("rstd", lambda c, r: {"rstd": r["rstd"].roll(1, 0)}),
    "backward from the step before's ahat": (
        "dp dgamma",
        lambda c, r: backward(c, r | {"ahat": r["ahat"].roll(1, 0)}),
    ),
    "ahat past the end not 0": (
        "ahat rstd",
        lambda c, r: pick(oracle(c, lengths=None), "ahat", "rstd"),
    ),
    # a factor 0 at the step that BPTT takes last takes it out of the sum
    "dgamma without the last step": (
        "dgamma",
        lambda c, r: pick(backward(c, r | {"ahat": but_first_step(r["ahat"], 0)}), "dgamma"),
    ),
    "dbeta without the last step": (
        "dbeta",
        lambda c, r: pick(backward(c, r | flat_at_first(r)), "dbeta"),
    ),
    "dgamma of one row twice": (
        "dgamma dbeta",
        lambda c, r: {name: r[name] + one_row(c, r)[name] for name in ("dgamma", "dbeta")},
    ),
    "gamma and beta swapped": ("dgamma dbeta", lambda c, r: swapped(r, "dgamma", "dbeta")),
}


@pytest.mark.parametrize("fault", RECURRENCE_FAULTS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_judge_finds_a_fault_of_the_recurrence(dtype, norm, fault):
    options = {"heads": 2, "reset": True, "bptt_window": 3, "clip_state_grad": 1.5, "norm": norm}
    case = with_reset_at_0(make_case(9, 5, 8, 2, dtype, seed=3, lengths=True, **options))
    case.lengths[:2] = torch.tensor([9, 4])
    assert_found(case, *RECURRENCE_FAULTS[fault])


@pytest.mark.parametrize("fault", NORM_FAULTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_judge_finds_a_fault_of_layer_norm(dtype, fault):
    heads = 4 if fault == "unbiased variance" else 2  # wrong by 1 / S, which 16 bits must tell
    case = make_case(9, 5, 16, 2, dtype, seed=3, lengths=True, heads=heads, norm=True)
    case.lengths[:2] = torch.tensor([9, 4])
    if fault.startswith("eps"):  # a variance that it outweighs
        case = case._replace(p=case.p / 1000, w_hh=case.w_hh / 1000)
    assert_found(case, *NORM_FAULTS[fault])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_judge_finds_that_backward_forgot_beta(dtype):
    """It needs it in 16 bits alone, where f' is that of ahat."""
    case = make_case(9, 5, 16, 2, dtype, seed=3, lengths=True, heads=2, norm=True)
    assert_found(case, "dp dgamma dbeta", lambda c, r: backward(c, r, beta=None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_judge_finds_a_variance_as_the_difference_of_two_large_means(dtype):
    """At |mean| / std = 1000; 16 bits do not hold such numbers."""
    case = make_case(9, 5, 16, 2, dtype, seed=3, heads=2, norm=True)
    case = case._replace(p=case.p + 1000)
    assert_found(case, "y ahat rstd", lambda c, r: patched(c, "layer_norm", in_one_pass))


RECORD_FAULTS = (
    {  # of a record [D, T, B, fields]; of a field's norm 1% is beyond every budget
        "one step off": ("state_norm carry_norm preact_norm gain", lambda r: r.roll(1, 1)),
        "rows swapped": ("state_norm state_max", lambda r: r.flip(2)),
        "directions swapped": ("state_norm gain", lambda r: r.flip(0)),
        "one head": ("gain entries", lambda r: r / 2),
        "not finite": ("state_norm", lambda r: r.where(r != r[..., :1], torch.nan)),
        "not written": ("nonfinite_grad nonfinite_state", lambda r: r * torch.nan),
    }
    | {
        name: (
            name,
            lambda r, i=i, by=by: r.index_copy(-1, torch.tensor([i]), r[..., i : i + 1] * by),
        )
        for i, (name, by) in enumerate(
            [
                ("state_norm", 1.02),
                ("carry_norm", 1.02),
                ("clipped_norm", 1.02),
                ("preact_norm", 1.02),
                ("state_max", 1.01),
                ("gain", 1.01),
            ]
        )
    }
)


@needs_cpu
@pytest.mark.parametrize("fault", RECORD_FAULTS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_judge_finds_a_fault_of_the_record(dtype, norm, fault):
    options = {"heads": 2, "reset": True, "bptt_window": 3, "clip_state_grad": 1.5, "norm": norm}
    case = make_case(9, 5, 8, 2, dtype, seed=3, lengths=True, per_sample=True, **options)
    case.lengths[:2] = torch.tensor([9, 4])
    oracle = run(case, "reference", recorded=True)
    assert_good(case, oracle, **own_rounding("reference", dtype))
    found = run(case, recorded=True)  # which errs less in 16 bits
    assert_good(case, found)
    names, wrong = RECORD_FAULTS[fault]
    verdicts = judge(case, found | {"record": wrong(found["record"])})
    bad = {v.name.removeprefix("record.") for v in verdicts if not v.good}
    assert set(names.split()) <= bad


def pick(found: Found, *names: str) -> Found:
    return {name: found[name] for name in names}


def swapped(found: Found, one: str, other: str) -> Found:
    return {one: found[other], other: found[one]}


def backward(case: Case, found: Found, **changed) -> Found:
    """The gradients that the formula makes of what was saved."""
    case = case._replace(**changed)
    kept = case.kept(found["y"], Saved(None, found["ahat"], found["rstd"]))
    dp, weights, states = loop.backward(case.given, kept, case.options)
    found = {
        "dp": dp,
        "dw_hh": weights.w_hh.view_as(case.w_hh),
        "dgamma": weights.gamma,
        "dbeta": weights.beta,
    }
    return found | {"dh_0": states.h}


def patched(case: Case, name: str, function, of=oracle) -> Found:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, name, function)
        return of(case)


def late_window(case: Case) -> Found:
    """Edges at 1 + k, 1 + 2 k, ..."""
    right = loop.Edges.window

    class Late(loop.Edges):
        def window(self, e: int) -> Tensor | bool:
            return e > 1 and right(self, e - 1)

    return patched(case, "Edges", Late)


def cut_dw(case: Case, found: Found) -> Found:
    """As if the window cut the state, too."""
    window, T = case.options.bptt_window, len(case.p)
    edges = (torch.arange(T) % window == 0) & (torch.arange(T) > 0)
    return pick(backward(case, found, reset=case.reset | edges.unsqueeze(1)), "dw_hh")


def clip_over_all_heads(limit: float, dh: Tensor) -> tuple[Tensor]:
    """dh: [n, B, S]"""
    n = dh.shape[0]
    (together,) = clip(limit, dh.transpose(0, 1).flatten(1))
    return (together.unflatten(1, (n, -1)).transpose(0, 1),)


def layer_norm(a: Tensor, mean: Tensor, variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rstd = (variance + eps).rsqrt()
    return (a - mean) * rstd, rstd


def unbiased(a: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return layer_norm(a, a.mean(-1, keepdim=True), a.var(-1, keepdim=True), eps)


def eps_outside(a: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rstd = 1 / (a.std(-1, keepdim=True, correction=0) + eps)
    return (a - a.mean(-1, keepdim=True)) * rstd, rstd


def in_one_pass(a: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    mean = a.mean(-1, keepdim=True)
    variance = (a.square().mean(-1, keepdim=True) - mean.square()).clamp(min=0)
    return layer_norm(a, mean, variance, eps)


def mean_over_all_heads(a: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """a: [n, B, S]"""
    variance = a.var(-1, keepdim=True, correction=0)
    return layer_norm(a, a.mean((0, 2), keepdim=True), variance, eps)


def over_all_heads(a: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(a, (0, 2), keepdim=True, correction=0)
    return layer_norm(a, mean, variance.expand(len(a), -1, 1), eps)


def wrong_backward(case: Case, constant: str) -> Found:
    """PyTorch's derivative of a layer norm in which the mean, or rstd, counts as a constant."""

    def norm(a: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        mean = a.mean(-1, keepdim=True)
        centred = a - (mean.detach() if constant == "mean" else mean)
        rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
        return centred * (rstd.detach() if constant == "rstd" else rstd), rstd

    return patched(case, "layer_norm", norm, run_differentiated)


def but_first_step(x: Tensor, value: float) -> Tensor:
    """Fills all steps of direction 0 but the first, which BPTT takes last."""
    x = x.clone()
    x[0, :, : x.shape[2] // 2] = value
    return x


def flat_at_first(found: Found) -> Found:
    """f' = 0 there, of y and of ahat."""
    return {"y": but_first_step(found["y"], 1), "ahat": but_first_step(found["ahat"], 100)}


def one_row(case: Case, found: Found) -> Found:
    """The gradients of row 0 alone."""
    row = case._replace(
        h_0=case.h_0[:, :1],
        lengths=case.lengths[:1],
        grad_y=case.grad_y[:, :1],
        grad_h_n=case.grad_h_n[:, :1],
    )
    return backward(row, {n: x[:, :1] for n, x in found.items() if n in ("y", "ahat", "rstd")})


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

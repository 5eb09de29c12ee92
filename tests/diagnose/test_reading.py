"""Half-life, horizon and verdict, on recurrences whose answer is known."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from flows import assert_close, inputs, make
from torch import Tensor

import rnnfast
from rnnfast.gradient_flow import GradientFlow
from rnnfast.gradient_flow.flow import FIELDS, combine_ranks
from rnnfast.gradient_flow.reading import WORST_FIRST, NonFinite, advice

H = 4


def scaled(backend: str, w: float, **options) -> rnnfast.RNN:
    """h_t = f(w h_{t-1} + 1): with ReLU its derivative is w, at every step and for every unit."""
    options = {"nonlinearity": "relu", "dtype": torch.float32} | options
    rnn = make(backend, 1, H, **options)
    with torch.no_grad():
        for name, weight in rnn.named_parameters():
            weight.zero_()
            if name.startswith("weight_hh"):
                weight.copy_(w * torch.eye(H))
            elif name.startswith("bias_ih"):
                weight.fill_(1)
    return rnn


def flow_of(rnn: rnnfast.RNN, T: int, every_step: bool, B: int = 2, **arguments) -> GradientFlow:
    x = torch.zeros(T, B, rnn.input_size, dtype=rnn.weight_ih_l0.dtype)
    y, h_n = rnn(x, **arguments)
    (y.sum() if every_step else h_n.sum()).backward()
    return rnn.gradient_flow


# -------------------------------------------------------------------- half-life, horizon, verdict


@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.parametrize("direction", [0, 1])
@pytest.mark.parametrize(
    ("w", "T", "verdict"),
    [
        (0.5, 30, "vanishing"),
        (0.5, 400, "vanishing"),  # most of it is 0 in float32
        (0.9, 100, "vanishing"),
        (0.99, 1000, "vanishing"),
        (0.99, 600, "healthy"),
        (1.0, 300, "healthy"),
        (1.1, 80, "exploding"),
        (1.1, 60, "healthy"),
    ],
)
def test_a_known_factor(w, T, verdict, direction, every_step, own_backend):
    flow = flow_of(scaled(own_backend, w, bidirectional=True), T, every_step)
    half_life = math.log(2) / -math.log(w) if w < 1 else math.inf
    horizon = math.ceil(math.log(1000) / -math.log(w)) if w < 1 else math.inf
    assert flow.half_life.shape == flow.horizon.shape == flow.log_growth.shape == (1, 2)
    assert flow.half_life[0, direction].item() == pytest.approx(half_life, rel=1e-4)
    assert flow.log_growth[0, direction].item() == pytest.approx(math.log(w), abs=1e-6)
    assert flow.horizon[0, direction].item() == (horizon if horizon < T else math.inf)
    assert flow.verdicts[0][direction].word == verdict
    assert f"over {T} steps" in flow.verdicts[0][direction].evidence


def test_the_range_of_float16_ends_early(own_backend):
    """da is stored in it: below 6e-8 it is 0, and the gradient is not cut off, but out of range."""
    flow = flow_of(scaled(own_backend, 0.5, dtype=torch.float16), 60, every_step=False)
    assert flow.carry_norm[0, 0, 0] == 0
    assert flow.half_life.item() == pytest.approx(1, rel=1e-3)
    assert flow.horizon.item() == 10
    flow = flow_of(scaled(own_backend, 0.5, dtype=torch.bfloat16), 60, every_step=False)
    assert flow.carry_norm[0, 0, 0] > 0
    assert flow.half_life.item() == pytest.approx(1, rel=1e-3)


def test_the_norm_says_nothing_under_a_loss_at_every_step(own_backend):
    """Why factors are looked at, and not the slope of the norm."""
    flow = flow_of(scaled(own_backend, 0.5), 50, every_step=True)
    norms = flow.state_norm[0, 0, :30]
    assert norms.max() / norms.min() < 1.0001
    assert flow.half_life.item() == pytest.approx(1, rel=1e-5)


def test_rows_apart(own_backend):
    rnn = scaled(own_backend, 0.9, track_gradient_flow="sample")
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(torch.diag(torch.tensor([0.5, 0.9, 1.0, 0.7])))
    y = rnn(torch.zeros(40, H, 1))[0]
    y[-1].diagonal().sum().backward()  # of each row another unit
    flow = rnn.gradient_flow
    assert flow.factors.shape == (1, 1, 40, H)
    assert flow.half_life.shape == flow.horizon.shape == (1, 1, H)
    wanted = [1.0, math.log(2) / -math.log(0.9), math.inf, math.log(2) / -math.log(0.7)]
    assert flow.half_life[0, 0].tolist() == pytest.approx(wanted, rel=1e-4)
    assert flow.horizon[0, 0].tolist() == [10, math.inf, math.inf, 20]
    assert flow.pooled().half_life.shape == (1, 1)
    assert "4 rows apart" in repr(flow)


def test_one_step_has_no_factor(own_backend):
    flow = flow_of(scaled(own_backend, 0.5), 1, every_step=False)
    assert flow.factors.isnan().all()
    assert flow.half_life.isnan().all()
    assert flow.horizon.isnan().all()
    assert flow.verdict.word == "unknown"
    assert flow.advice == ()


@pytest.mark.parametrize("direction", [0, 1])
def test_a_loss_in_the_middle(direction, own_backend):
    """The horizon counts from where the gradient sets out."""
    rnn = scaled(own_backend, 0.5, bidirectional=True)
    rnn(torch.zeros(60, 2, 1))[0][30].sum().backward()
    flow = rnn.gradient_flow
    assert flow.half_life[0, direction].item() == pytest.approx(1, rel=1e-5)
    assert flow.horizon[0, direction].item() == 10
    assert flow.factors[0, direction].isfinite().sum() == (29 if direction else 30)


def test_window_and_clipping_leave_the_factor(own_backend):
    """The edge of a window ends the horizon; the half-life is of the steps between."""
    rnn = scaled(own_backend, 0.9, bptt_window=8, clip_state_grad=1e-3)
    flow = flow_of(rnn, 30, every_step=True)
    assert flow.half_life.item() == pytest.approx(math.log(2) / -math.log(0.9), rel=1e-4)
    assert flow.factors[0, 0, 7::8].isnan().all()
    assert flow.horizon.item() == 30 - 24  # 24 is the last edge


@pytest.mark.parametrize("per_sample", [True, "sample"])
@pytest.mark.parametrize("direction", [0, 1])
def test_lengths_and_resets_leave_the_factor(per_sample, direction, own_backend):
    """Where some rows stop and others go on, the ratio of two norms is no factor."""
    rnn = scaled(own_backend, 0.9, bidirectional=True, track_gradient_flow=per_sample)
    T, lengths = 40, [40, 25, 0, 33]
    reset = torch.zeros(T, 4, dtype=torch.bool)
    reset[11, 1] = reset[20, 0] = reset[35, 1] = True
    flow = flow_of(rnn, T, True, 4, lengths=lengths, reset=reset)
    known = flow.factors[0, direction][flow.factors[0, direction].isfinite()]
    assert len(known) > 30
    assert (known - 0.9).abs().max() < 1e-5
    if per_sample == "sample":
        assert flow.half_life[0, direction, 2].isnan()
        found = flow.half_life[0, direction, [0, 1, 3]].tolist()
        assert found == pytest.approx([math.log(2) / -math.log(0.9)] * 3, rel=1e-4)
        ends = [20, 11] if direction else [39 - 19, 24 - 10]  # at a reset
        assert flow.horizon[0, direction, [0, 1, 3]].tolist() == [*ends, math.inf]
    else:
        stopped = [10, 19] if direction == 0 else [11, 20]
        assert flow.factors[0, direction, stopped].isnan().all()


def test_a_gradient_that_is_cut_off_is_gone(own_backend):
    """f' = 0 for all units at one step: the factor is 0, and not unknown."""
    rnn = scaled(own_backend, 1.0)
    with torch.no_grad():
        rnn.weight_ih_l0.fill_(1)
    x = torch.zeros(30, 2, 1)
    x[12] = -1000
    rnn(x)[1].sum().backward()
    flow = rnn.gradient_flow
    assert flow.factors[0, 0, 11] == 0
    assert flow.factors[0, 0, :11].isnan().all()
    assert flow.half_life.item() == 0
    assert flow.verdict.word == "vanishing"
    assert "gradient times 0 over" in flow.verdict.evidence


# --------------------------------------------------------------------------------- other verdicts


def test_dead(own_backend):
    rnn = make(own_backend, 3, 16, nonlinearity="relu")
    with torch.no_grad():
        rnn.bias_ih_l0.fill_(-20)
        rnn.bias_ih_l0[0] = 20  # 1 of 16: a mean slope of 0.06 would not do
        rnn.weight_hh_l0.zero_()
    rnn(inputs(20, 2, 3))[0].sum().backward()
    assert rnn.gradient_flow.verdict.word != "dead"
    with torch.no_grad():
        rnn.bias_ih_l0[0] = -20
    rnn(inputs(20, 2, 3))[0].sum().backward()
    verdict = rnn.gradient_flow.verdict
    assert verdict.word == "dead"
    assert "at 100% of the steps" in verdict.evidence
    assert any("he" in text for text in rnn.gradient_flow.advice)


@pytest.mark.parametrize("nonlinearity", ["tanh", "sigmoid"])
def test_saturated(nonlinearity, own_backend):
    rnn = make(own_backend, 3, 16, nonlinearity=nonlinearity)
    with torch.no_grad():
        rnn.bias_ih_l0.fill_(10)
    rnn(inputs(20, 2, 3))[0].sum().backward()
    flow = rnn.gradient_flow
    assert flow.verdict.word == "saturated"
    assert f"of {0.25 if nonlinearity == 'sigmoid' else 1:g} at most" in flow.verdict.evidence
    assert any('norm="layer"' in text for text in flow.advice)


def test_a_gradient_that_arrives_through_few_units_is_healthy(own_backend):
    """ReLU with W_hh = I and 1 unit of 32 active: the gain is 0.03, and the factor 1."""
    rnn = make(own_backend, 3, 32, nonlinearity="relu")
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(torch.eye(32))
        rnn.weight_ih_l0.zero_()
        rnn.bias_ih_l0.fill_(-1)
        rnn.bias_ih_l0[0] = 1
        rnn.bias_hh_l0.zero_()
    rnn(inputs(300, 2, 3))[0][-1, :, 0].sum().backward()
    flow = rnn.gradient_flow
    assert (flow.gain < 0.05).all()
    assert flow.horizon.item() == math.inf
    assert flow.verdict.word == "healthy"
    assert flow.advice == ()
    found = rnnfast.probe(rnn, inputs(300, 2, 3))
    assert found.verdict.word == "healthy"
    assert "nothing here keeps it from learning" in found.summary


@pytest.mark.parametrize(("w", "word"), [(1.0, "healthy"), (1.6, "exploding"), (0.5, "saturated")])
def test_flat_units_are_a_cause_where_the_gradient_vanishes(w, word, own_backend):
    """f' is 0.07 at all steps, and W_hh = w / f' makes the factor w."""
    rnn = make(own_backend, 1, 4, dtype=torch.float64)
    a = math.atanh(math.sqrt(1 - 0.07))  # tanh' = 0.07
    with torch.no_grad():
        for weight in rnn.parameters():
            weight.zero_()
        rnn.weight_hh_l0.copy_(w / 0.07 * torch.eye(4))
        rnn.weight_ih_l0.fill_(1)
    h = math.tanh(a)
    x = torch.full((20, 2, 1), a - w / 0.07 * h, dtype=torch.float64)
    x[0] = a
    rnn(x)[0][-1].sum().backward()
    flow = rnn.gradient_flow
    assert flow.gain.mean().item() == pytest.approx(0.07, rel=0.05)
    assert flow.verdict.word == word


def test_an_explosion_is_worse_than_dead_units(own_backend):
    rnn = scaled(own_backend, 2.0, bidirectional=True)
    with torch.no_grad():
        rnn.bias_ih_l0.fill_(-20)
    flow = flow_of(rnn, 30, every_step=True)
    assert [verdict.word for verdict in flow.verdicts[0]] == ["dead", "exploding"]
    assert flow.verdict.word == "exploding"


@pytest.mark.parametrize("nonlinearity", ["relu", "tanh"])
def test_layer_norm_is_a_cure_of_dead_and_of_flat_units(nonlinearity, own_backend):
    words = []
    for norm in (None, "layer"):
        rnn = make(own_backend, 3, 16, nonlinearity=nonlinearity, norm=norm)
        with torch.no_grad():
            rnn.bias_ih_l0.fill_(-20)
        rnn(inputs(20, 2, 3))[0].sum().backward()
        words.append(rnn.gradient_flow.verdict.word)
        cures = rnn.gradient_flow.advice
        assert any("norm=" in text for text in cures) == (norm is None)
    assert words[0] == ("dead" if nonlinearity == "relu" else "saturated")
    assert words[1] not in ("dead", "saturated")


def test_a_sigmoid_at_its_steepest_is_not_saturated(own_backend):
    rnn = make(own_backend, nonlinearity="sigmoid")
    rnn(inputs())[0].sum().backward()
    assert rnn.gradient_flow.verdict.word == "vanishing"  # 0.25 at each step, by W_hh


def test_layers_without_a_gradient_are_unknown(own_backend):
    rnn = make(own_backend, num_layers=2)
    y, _ = rnn(inputs())
    torch.autograd.grad(y.sum(), rnn.weight_hh_l1)
    words = [verdicts[0].word for verdicts in rnn.gradient_flow.verdicts]
    assert words == ["unknown", "healthy"]
    assert "no gradient came to this layer" in repr(rnn.gradient_flow)


def test_the_worst_verdict_of_all(own_backend):
    rnn = scaled(own_backend, 0.1, num_layers=2, bidirectional=True)
    with torch.no_grad():
        rnn.weight_ih_l1.zero_()
        rnn.weight_hh_l1_reverse.copy_(torch.eye(H) * 2)
    flow = flow_of(rnn, 20, every_step=True)
    assert flow.verdict == flow.verdicts[1][1]
    assert (flow.verdict.word, flow.verdict.layer, flow.verdict.direction) == ("exploding", 1, 1)


# ------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("direction", [0, 1])
@pytest.mark.parametrize("layer", [0, 1])
def test_the_first_state_that_is_not_finite(layer, direction, own_backend):
    rnn = make(own_backend, num_layers=2, bidirectional=True, nonlinearity="relu")
    x = inputs(20, 2, 3)
    if layer == 0:
        x[7, 1, 0] = math.nan
        wanted = NonFinite(0, 0, 7, "state")
    else:
        getattr(rnn, "weight_hh_l1" + "_reverse" * direction).data[0, 1] = math.nan
        wanted = NonFinite(1, direction, 19 if direction else 0, "state")
    rnn(x)[0].sum().backward()
    assert rnn.gradient_flow.first_nonfinite == wanted
    assert rnn.gradient_flow.verdict.word == "non-finite"
    assert f"layer {layer}" in rnn.gradient_flow.verdict.evidence


def test_the_first_gradient_that_is_not_finite(own_backend):
    rnn = make(own_backend, num_layers=2)
    y, _ = rnn(inputs(20, 2, 3))
    grad = torch.ones_like(y)
    grad[11, 0, 3] = math.inf
    y.backward(grad)
    flow = rnn.gradient_flow
    assert flow.first_nonfinite == NonFinite(1, 0, 11, "gradient")
    assert "the gradient of layer 1 at step 11" in flow.verdict.evidence


def test_all_finite(own_backend):
    rnn = make(own_backend)
    rnn(inputs())[0].sum().backward()
    assert rnn.gradient_flow.first_nonfinite is None


# ---------------------------------------------------------------------------- advice, text, JSON


def test_advice_leaves_out_what_is_in_use(own_backend):
    plain = flow_of(scaled(own_backend, 0.1), 30, every_step=False).advice
    assert any("norm=" in text for text in plain)
    assert any("orthogonal" in text for text in plain)
    rnn = scaled(own_backend, 0.1)
    rnn.init = "orthogonal"
    found = flow_of(rnn, 30, every_step=False).advice
    assert found == tuple(text for text in plain if "orthogonal" not in text)


def measured_accuracies() -> dict[tuple[str, ...], float]:
    """{what a network of docs/cures.csv is made of: how much was right, mean of its runs}"""
    found: dict[tuple[str, ...], list[float]] = {}
    lines = (Path(__file__).parents[2] / "docs" / "cures.csv").read_text().splitlines()
    for row in csv.DictReader(lines):
        if row["optimizer"] == "Adam":
            found.setdefault(tuple(row["network"].split(", ")), []).append(float(row["accuracy"]))
    return {made_of: statistics.mean(runs) for made_of, runs in found.items()}


def test_advice_against_forgetting_is_what_was_measured_to_help():
    right = measured_accuracies()
    plain = right["tanh", "torch's init"]
    named = {
        'nonlinearity="relu" with init="identity"': right["ReLU", "identity"],
        'init="orthogonal"': right["tanh", "orthogonal"],
        'init="glorot"': right["tanh", "Glorot"],
        'norm="layer"': right["tanh", "layer norm"],
    }
    found = advice("vanishing", {"cell": "rnn_tanh", "nonlinearity": "tanh"})
    assert found == tuple(named)
    assert all(named[text] > 2 * plain for text in found)
    assert list(named.values()) == sorted(named.values(), reverse=True)
    assert not any(right[made, "torch's init"] > plain for made in ("LSTM", "GRU"))  # not named
    for_relu = advice("vanishing", {"cell": "rnn_relu", "nonlinearity": "relu"})
    assert for_relu == (found[0], *(f'nonlinearity="tanh" with {text}' for text in found[1:]))


@pytest.mark.parametrize("made", ["lstm", "gru"])
def test_advice_to_gated_cells_is_what_was_measured_to_help(made):
    right, name = measured_accuracies(), made.upper()
    (text,) = advice("vanishing", {"cell": made, "bias": True, "forget_bias": None})
    assert text == "chrono_steps=T, where T is the number of steps to remember"
    assert right[name, "chrono_steps=108"] > 2 * right[name, "torch's init"]
    assert advice("vanishing", {"cell": made, "chrono_steps": 50}) == ()
    (text,) = advice("vanishing", {"cell": made, "bias": False, "forget_bias": 1.0})
    assert text.startswith("bias=True, forget_bias=None with chrono_steps=T")
    for word in ("exploding", "non-finite"):
        assert any("clip_state_grad" in cure for cure in advice(word, {"cell": made}))
        assert not any("norm=" in cure or "init=" in cure for cure in advice(word, {"cell": made}))


def test_advice_names_no_change_that_is_none():
    for word in WORST_FIRST:
        for network in (
            {"nonlinearity": "relu", "init": "identity"},
            {"nonlinearity": "tanh", "init": "orthogonal", "norm": "layer"},
            {"nonlinearity": "tanh", "init": "glorot", "clip_state_grad": 0.5},
        ):
            for text in advice(word, {"cell": "rnn_tanh"} | network):
                own = {name: value for name, value in network.items() if name != "nonlinearity"}
                assert not any(f'{name}="{value}"' in text for name, value in own.items())
                assert "clip_state_grad" not in text or "clip_state_grad" not in network
    tanh = {"cell": "rnn_tanh", "nonlinearity": "tanh"}
    tanh_identity = tanh | {"init": "identity"}
    assert 'nonlinearity="relu" with init="identity"' in advice("vanishing", tanh_identity)
    assert 'norm="layer"' in advice("vanishing", tanh | {"norm": "batch"})


def test_printed(own_backend):
    flow = flow_of(scaled(own_backend, 0.5), 30, every_step=False)
    lines = repr(flow).splitlines()
    assert lines[0] == "Gradient flow over 30 time steps"
    assert lines[1] == "layer  half-life  horizon  mean |f'|  verdict    because"
    assert lines[2].split()[:5] == ["0", "1", "10", "1", "vanishing"]
    assert all(line.startswith("try: ") for line in lines[3:])


def test_printed_by_rich(own_backend):
    rich = pytest.importorskip("rich.console")
    console = rich.Console(width=120, record=True, file=io.StringIO())
    console.print(flow_of(scaled(own_backend, 0.5), 30, every_step=False))
    text = console.export_text()
    assert "vanishing" in text
    assert "init" in text


def test_as_json(own_backend):
    rnn = scaled(own_backend, 1.1, num_layers=2, bidirectional=True)
    flow = flow_of(rnn, 5, every_step=True)
    found = json.loads(json.dumps(flow.to_dict(), allow_nan=False))
    assert found["half_life"] == [[None, None], ["inf", "inf"]]  # W_ih of layer 1 is 0
    assert found["network"]["nonlinearity"] == "relu"
    assert found["first_nonfinite"] is None
    assert found["verdicts"][1][0] == flow.verdicts[1][0]._asdict()
    for name in FIELDS:
        assert getattr(flow, name).tolist() == found["fields"][name]


def test_as_json_with_what_is_not_finite(own_backend):
    rnn, x = make(own_backend), inputs()
    x[3] = math.nan
    rnn(x)[0].sum().backward()
    found = json.loads(json.dumps(rnn.gradient_flow.to_dict(), allow_nan=False))
    assert found["first_nonfinite"] == {"layer": 0, "direction": 0, "step": 3, "what": "state"}
    assert None in found["fields"]["state_norm"][0][0]


# ------------------------------------------------------------------------------------- of ranks


def two_ranks(backend: str, lengths: tuple[int, int]) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Records of two halves of a batch, each of its own T, and that of the mean of their losses."""
    rnn = make(backend, num_layers=2)
    whole = inputs(max(lengths), 4, 3)
    fields = []
    for i, T in enumerate(lengths):
        rnn(whole[:T, 2 * i : 2 * i + 2])[0].square().sum().backward()
        fields.append(rnn.gradient_flow.fields())
    of_rows = [length for length in lengths for _ in range(2)]
    (rnn(whole, lengths=of_rows)[0].square().sum() / 2).backward()
    return fields, rnn.gradient_flow


@pytest.mark.parametrize("lengths", [(6, 6), (6, 4), (3, 5)])
def test_ranks_together(lengths, own_backend):
    fields, whole = two_ranks(own_backend, lengths)
    found = combine_ranks(fields, whole)
    assert_close(found, whole, 1e-12)
    assert torch.allclose(found.half_life, whole.half_life, rtol=1e-9)


def test_a_rank_without_a_record_counts(own_backend):
    """Its loss is 0 in the mean."""
    fields, whole = two_ranks(own_backend, (6, 6))
    alone = GradientFlow(**fields[0], network=whole.network)
    found = combine_ranks([fields[0], None], whole)
    assert torch.equal(found.state_norm, alone.state_norm / 2)
    assert torch.equal(found.gain, alone.gain)
    nothing = {name: torch.full_like(x, math.nan) for name, x in fields[0].items()}
    assert torch.equal(combine_ranks([fields[0], nothing], whole).state_norm, found.state_norm)
    assert combine_ranks([nothing, nothing], whole).state_norm.isnan().all()


def test_ranks_of_two_networks_are_refused(own_backend):
    fields, whole = two_ranks(own_backend, (6, 6))
    other = {name: x[:1] for name, x in fields[0].items()}
    with pytest.raises(ValueError, match="not of one network"):
        combine_ranks([fields[0], other], whole)


def test_reduce_needs_ranks(own_backend):
    flow = flow_of(scaled(own_backend, 0.5), 5, every_step=False)
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialized"):
        flow.reduce()


# ------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("per_sample", [True, "sample"])
def test_plot(per_sample, own_backend, tmp_path):
    pytest.importorskip("matplotlib")
    options = {"num_layers": 2, "bidirectional": True, "track_gradient_flow": per_sample}
    rnn = scaled(own_backend, 0.5, **options)
    figure = flow_of(rnn, 30, every_step=False).plot()
    assert len(figure.axes) == 4
    for axes in figure.axes:
        assert axes.get_yscale() == "log"
        assert axes.get_xlabel() == "time step t"
        assert "vanishing, half-life 1 steps" in axes.get_title(loc="left")
        assert any("1/1000 left after 10 steps" in text.get_text() for text in axes.texts)
    figure.savefig(tmp_path / "flow.png")


def test_plot_of_nothing(own_backend, tmp_path):
    pytest.importorskip("matplotlib")
    rnn, x = make(own_backend, nonlinearity="relu"), inputs()
    x[:] = math.nan
    rnn(x)[0].sum().backward()
    figure = rnn.gradient_flow.plot()
    figure.savefig(tmp_path / "nan.png")
    rnn = scaled(own_backend, 1.0)
    figure = flow_of(rnn, 1, every_step=False).plot()
    figure.savefig(tmp_path / "one.png")

"""The probe, the monitor and the pictures on LSTM and GRU."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from flows import inputs
from ranks import leave, meet, spawn
from test_gated_flow import BACKENDS, BOTH, IN, B, H, flow_of, pinned
from torch import Tensor, nn

import rnnfast
from rnnfast.gradient_flow import GradientFlow

T = 60
plots = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)


def texts(picture) -> str:
    said = [text.get_text() for text in picture.texts]
    for axes in picture.axes:
        said += [axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel()]
        said += axes.get_legend_handles_labels()[1]
    return "\n".join(said)


# -------------------------------------------------------------------------------------- the probe


@BOTH
@pytest.mark.parametrize("backend", ["cpu", pytest.param("reference", marks=pytest.mark.proof)])
@pytest.mark.parametrize("w", [0.8, 0.99])
def test_the_probe_finds_the_decay_of_a_pinned_gate(make, backend, w):
    rnn = pinned(make, w, backend, num_layers=2, bidirectional=True, dtype=torch.float64)
    found = rnnfast.probe(rnn, inputs(T, B, IN), lengths=[T, T, 9, 1])
    torch.testing.assert_close(found.lyapunov, torch.full((2, 2), math.log(w), dtype=torch.float64))
    assert found.log_growth[..., 0].isnan().all()  # growth begins at lag 1
    torch.testing.assert_close(
        found.log_growth[..., 1:], torch.full((2, 2, T - 1), math.log(w), dtype=torch.float64)
    )
    top = found.norm[1]  # from lag 9 on of the same two samples
    torch.testing.assert_close(
        top[:, 10:] / top[:, 9:-1],
        torch.full((2, T - 10), w, dtype=torch.float64),
        rtol=1e-9,
        atol=0,
    )
    word = "vanishing" if w == 0.8 else "healthy"
    assert found.verdict.word == word
    assert found.half_life.flatten().tolist() == [pytest.approx(math.log(2) / -math.log(w))] * 4
    assert ("gates closed" in found.verdict.evidence) == (word == "vanishing")
    assert f"mean {found.flow.cell.gain_name}" in str(found)


@BACKENDS
def test_the_norm_of_an_lstm_probe_is_that_of_c(backend):
    """The first norm is of dh_T / dc_T = o (1 - tanh(c)^2), and each step back multiplies by f."""
    rnn = pinned(rnnfast.LSTM, 0.9, backend, dtype=torch.float64)
    x = inputs(5, 1, IN)
    found = rnnfast.probe(rnn, x)
    with torch.no_grad():
        _, (_, c) = rnn(x)
        a_o = (rnn.weight_ih_l0 @ x[-1, 0] + rnn.bias_ih_l0 + rnn.bias_hh_l0)[3 * H :]
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(1, 1, H, generator=generator, dtype=torch.float64).flatten()
    first = (v / v.norm() * a_o.sigmoid() * (1 - c.flatten().tanh() ** 2)).norm().item()
    wanted = [first * 0.9**lag for lag in range(5)]
    assert found.norm.flatten().tolist() == pytest.approx(wanted, rel=1e-9)


@BOTH
def test_the_probe_of_torchs_module_is_that_of_ours(make):
    ours = make(IN, H, 2)
    theirs = rnnfast.to_torch(make(IN, H, 2))
    theirs.load_state_dict(ours.state_dict())
    x = inputs(T, B, IN, dtype=torch.float32)
    states = torch.randn(2, B, H)
    hx = (states, states) if make is rnnfast.LSTM else states
    found = [rnnfast.probe(rnn, x, hx) for rnn in (ours, theirs)]
    assert torch.equal(found[0].norm, found[1].norm)
    assert found[0].to_dict() == found[1].to_dict()
    assert "chrono_steps" in found[0].advice[0]
    assert found[0].summary.startswith("The input of ")
    unbatched = rnnfast.probe(ours, x[:, 0])
    assert unbatched.norm.shape == (2, 1, T)


# ------------------------------------------------------------------------------------ the monitor


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = rnnfast.LSTM(IN, 6, 2, bidirectional=True, track_gradient_flow=True)
        self.second = rnnfast.GRU(12, 5, track_gradient_flow="sample")
        self.third = rnnfast.RNN(5, 5, track_gradient_flow=True)

    def forward(self, x: Tensor) -> Tensor:
        for rnn in (self.first, self.second, self.third):
            x, _ = rnn(x)
        return x


def trained(steps: int = 3, **options) -> tuple[rnnfast.GradientMonitor, list[list[GradientFlow]]]:
    model = Mixed()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    flows = []
    with rnnfast.GradientMonitor(model, optimizer, **options) as monitor:
        for seed in range(steps):
            optimizer.zero_grad()
            model(inputs(20, B, IN, dtype=torch.float32, seed=seed)).square().sum().backward()
            optimizer.step()
            flows.append([rnn.gradient_flow for rnn in (model.first, model.second, model.third)])
    return monitor, flows


def test_the_monitor_has_the_numbers_of_each_record():
    monitor, flows = trained()
    rows = {(row.step, row.rnn, row.layer, row.direction): row for row in monitor.rows()}
    assert len(rows) == 3 * (4 + 1 + 1)
    for step, each in enumerate(flows, 1):
        for name, flow in zip(("first", "second", "third"), each, strict=True):
            whole = flow.pooled()
            for verdict in (v for layer in whole.verdicts for v in layer):
                place = verdict.layer, verdict.direction
                row = rows[(step, name, *place)]
                assert (row.verdict, row.evidence) == (verdict.word, verdict.evidence)
                assert row.half_life == pytest.approx(whole.half_life[place].item(), rel=1e-9)
                assert row.log_growth == pytest.approx(whole.log_growth[place].item(), rel=1e-9)
                assert row.gain == pytest.approx(whole.gain[place].mean().item(), rel=1e-9)
    (steps, norms) = monitor.norms("state_norm")["first", 1, 1]
    assert steps == [1, 2, 3]
    torch.testing.assert_close(norms[2], flows[2][0].state_norm[1, 1].float())


def test_parts_of_a_batch_have_the_half_life_of_the_whole():
    """Gradient accumulation: norms of c are put together as all others are."""
    model = rnnfast.LSTM(IN, H, track_gradient_flow=True, dtype=torch.float64)
    x, optimizer = inputs(20, B, IN), torch.optim.SGD(model.parameters(), 0.0)
    with rnnfast.GradientMonitor(model, optimizer) as monitor:
        for rows in x.split(1, dim=1):
            model(rows)[0].square().sum().backward()
        optimizer.step()
    model(x)[0].square().sum().backward()
    (row,) = monitor.rows()
    assert row.passes == B
    assert row.half_life == pytest.approx(model.gradient_flow.half_life.item(), rel=1e-12)


def network(name: str) -> nn.RNNBase:
    torch.manual_seed(0)
    options = {"num_layers": 2, "bidirectional": True, "track_gradient_flow": True}
    return getattr(rnnfast, name)(IN, H, **options, dtype=torch.float64)


def train_on_a_rank(rank: int, name: str, folder: str) -> None:
    meet(rank, folder)
    model = network(name)
    parallel = nn.parallel.DistributedDataParallel(model)  # alive while backward runs
    parallel(inputs(20, 4, IN)[:, 2 * rank : 2 * rank + 2])[0].square().sum().backward()
    grads = [p.grad for p in model.parameters()]
    torch.save((grads, model.gradient_flow.reduce().half_life), f"{folder}/{rank}")
    leave()


@pytest.mark.proof
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_two_ranks_have_the_gradients_and_half_life_of_the_whole_batch(name, tmp_path):
    spawn(train_on_a_rank, name, str(tmp_path))
    model = network(name)
    (model(inputs(20, 4, IN))[0].square().sum() / 2).backward()
    for rank in range(2):
        grads, half_life = torch.load(tmp_path / str(rank))
        for found, p in zip(grads, model.parameters(), strict=True):
            assert (found - p.grad).abs().max() <= 1e-12 * p.grad.abs().max()
        torch.testing.assert_close(half_life, model.gradient_flow.half_life, rtol=1e-12, atol=0)


# ----------------------------------------------------------------------------------- the pictures


@plots
@BOTH
def test_the_picture_shows_the_state_whose_gradient_decays(make):
    flow = flow_of(pinned(make, 0.9), T, True)
    picture = flow.plot()
    state = "c" if make is rnnfast.LSTM else "h"
    assert f"gradient $dL/d{state}_t$" in texts(picture)
    norms, carries = (line.get_ydata() for line in picture.axes[0].lines[:2])
    wanted = flow.cell_norm if make is rnnfast.LSTM else flow.state_norm
    assert list(norms) == wanted.flatten().tolist()
    wanted = flow.cell_carry_norm if make is rnnfast.LSTM else flow.carry_norm
    assert list(carries)[:-1] == wanted.flatten().tolist()[:-1]
    probed = rnnfast.probe(pinned(make, 0.9), inputs(T, B, IN, dtype=torch.float32)).plot()
    assert f"$v^T dh_{{end}}/d{state}_t$" in texts(probed)


@plots
def test_the_heat_map_names_all_states(tmp_path):
    monitor, _ = trained(out=tmp_path)
    assert "norm of $dL/dh_t$ and $dL/dc_t$" in texts(monitor.plot())
    assert (tmp_path / "gradient_flow.png").exists()
    assert "gates closed: mean f" in (tmp_path / "gradient_flow.csv").read_text()


# ----------------------------------------------------------------------------------------- advice


@pytest.mark.parametrize("make", [rnnfast.LSTM, rnnfast.GRU])
def test_the_advice_helps_a_network_that_forgets(make):
    """As advised: chrono_steps=T with the T of the task."""
    x = inputs(T, B, IN, dtype=torch.float32)
    forgets = rnnfast.probe(make(IN, H), x)
    assert forgets.verdict.word == "vanishing"
    assert forgets.advice[0].startswith("chrono_steps=T")
    assert rnnfast.probe(make(IN, H, chrono_steps=T), x).verdict.word == "healthy"


@BOTH
def test_an_exploding_gradient_is_clipped_as_advised(make):
    torch.manual_seed(0)
    words = []
    for options in ({}, {"clip_state_grad": 1.0}):
        rnn = make(IN, H, track_gradient_flow="sample", **options)
        with torch.no_grad():
            rnn.weight_ih_l0.zero_()
            rnn.weight_hh_l0.copy_(8 * torch.randn(rnn.weight_hh_l0.shape))
        flow = flow_of(rnn, 10, True)
        words.append(flow.pooled().clipped_norm.max().item())
    assert words[1] <= 1.0001 * math.sqrt(B) < words[0]

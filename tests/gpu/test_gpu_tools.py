"""The package around the kernels: what is chosen, measured, saved and swapped on a GPU."""

from __future__ import annotations

import io

import pytest
import torch
from flows import assert_close
from torch import nn
from twins import SAME, assert_same_results, results

import rnnfast

T, B, IN, H = 6, 3, 5, 8


def pair(device: str, backend: str = "auto", **options) -> tuple[rnnfast.RNN, rnnfast.RNN]:
    """The same weights: by the reference on the CPU, and by ``backend`` on ``device``."""
    options = {"dtype": torch.float64} | options
    here = rnnfast.RNN(IN, H, backend="reference", **options)
    there = rnnfast.RNN(IN, H, backend=backend, device=device, **options)
    there.load_state_dict(here.state_dict())
    return here, there


def test_auto_takes_the_first_that_can_run(device):
    from rnnfast.backends import BACKENDS, passed_over

    x = torch.randn(T, B, IN, device=device)
    for options in ({}, {"norm": "layer"}, {"nonlinearity": "sigmoid"}):
        rnn = rnnfast.RNN(IN, H, device=device, **options)
        serving = [name for name in BACKENDS if not passed_over(name, rnn._problem(x))]
        assert rnnfast.explain(rnn, x).startswith(f"{serving[0]} (auto)")
        named = rnnfast.RNN(IN, H, device=device, backend=serving[0], **options)
        named.load_state_dict(rnn.state_dict())
        assert torch.equal(rnn(x)[0], named(x)[0])
    assert f"on {device}" in rnnfast.info()


@pytest.mark.parametrize("tracking", [True, "sample"])
def test_record_equals_the_one_of_the_cpu(tracking, own_backend, exact, device):
    options = {"num_layers": 2, "bidirectional": True, "norm": "layer", "bptt_window": 4}
    here, there = pair(device, own_backend, track_gradient_flow=tracking, dtype=exact, **options)
    x, lengths = torch.randn(T, B, IN, dtype=exact), [T, 0, 4]
    for rnn in (here, there):
        y, h_n = rnn(x.to(rnn.weight_hh_l0.device), lengths=lengths)
        (y.square().sum() + h_n.sum()).backward()
    assert_close(there.gradient_flow, here.gradient_flow, SAME[exact])
    assert there.gradient_flow.verdict.word == here.gradient_flow.verdict.word


def test_probe_equals_the_one_of_the_cpu(device):
    here, there = pair(device, num_layers=2)
    x = torch.randn(T, B, IN, dtype=torch.float64)
    found, wanted = (
        rnnfast.probe(rnn, x.to(rnn.weight_hh_l0.device), lengths=[T, 2, 4])
        for rnn in (there, here)
    )
    assert_close(found.flow, wanted.flow, 1e-12)
    assert found.norm.isfinite().all()


def test_monitor_records_a_training_with_a_grad_scaler(device, tmp_path):
    rows = []
    for rnn in pair(device, track_gradient_flow=True):
        where = rnn.weight_hh_l0.device
        optimizer = torch.optim.SGD(rnn.parameters(), 0.1)
        scaler = torch.amp.GradScaler(where.type, init_scale=2.0**10)
        generator = torch.Generator().manual_seed(1)
        out = tmp_path / str(len(rows))
        with rnnfast.GradientMonitor(rnn, optimizer, scaler, out=out) as monitor:
            for _ in range(3):
                x = torch.randn(T, B, IN, generator=generator, dtype=torch.float64)
                optimizer.zero_grad()
                scaler.scale(rnn(x.to(where))[0].square().sum()).backward()
                scaler.step(optimizer)
                scaler.update()
        rows.append(monitor.rows())
        assert (out / "gradient_flow.csv").stat().st_size > 0
    wanted, found = rows
    assert [row.step for row in found] == [1, 2, 3]
    for a, b in zip(found, wanted):
        assert a.state_norm_last == pytest.approx(b.state_norm_last, rel=1e-10)
        assert (a.verdict, a.passes) == (b.verdict, b.passes)


def test_checkpoint_goes_to_the_cpu_and_back(backend, exact, device):
    _, rnn = pair(device, backend, num_layers=2, dtype=exact)
    file = io.BytesIO()
    torch.save(rnn.state_dict(), file)
    file.seek(0)
    here = rnnfast.RNN(IN, H, 2, dtype=exact, backend="reference")
    here.load_state_dict(torch.load(file, map_location="cpu"))
    x = torch.randn(T, B, IN, dtype=exact)
    wanted = results(here, x)
    assert_same_results(results(rnn, x.to(device)), wanted)
    assert_same_results(results(here.to(device), x.to(device)), wanted)


def test_model_is_replaced_and_goes_back(device):
    model = nn.Sequential(nn.Linear(IN, IN), nn.RNN(IN, H, 2)).to(device)
    x = torch.randn(T, B, IN, device=device)
    weight, wanted = model[1].weight_hh_l0, model(x)[0]
    rnnfast.replace(model, report=None)
    assert type(model[1]) is rnnfast.RNN
    assert model[1].weight_hh_l0 is weight
    model[1].backend = "torch"
    assert torch.equal(model(x)[0], wanted)
    rnnfast.to_torch(model, report=None)
    assert type(model[1]) is nn.RNN
    assert torch.equal(model(x)[0], wanted)

"""GradientMonitor: which passes a training step has, and its report of them."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import itertools
import math
import pickle
import weakref

import pytest
import torch
from flows import IN, B, T, inputs, make
from monitored import Two, loss_of, sgd, train
from torch import Tensor

import rnnfast
from rnnfast.diagnose.history import BLOCK, Row
from rnnfast.gradient_flow import GradientFlow

Monitor = rnnfast.GradientMonitor


def assert_tells(rows: list[Row], flow: GradientFlow) -> None:
    """Rows of one RNN and step say what the record said."""
    flow = flow.pooled()
    L, D, _ = flow.gain.shape
    places = itertools.product(range(L), range(D))
    assert [(row.layer, row.direction) for row in rows] == list(places)
    for row in rows:
        at = row.layer, row.direction
        for name in ("half_life", "horizon", "log_growth"):
            wanted = getattr(flow, name)[at].item()
            assert getattr(row, name) == pytest.approx(wanted, rel=1e-9, nan_ok=True), name
        assert row.time_steps == (flow.entries[at] > 0).sum()
        assert row.gain == pytest.approx(flow.gain[at].nanmean().item(), nan_ok=True)
        last = max(row.time_steps - 1, 0)
        for name, t in (("state_norm_first", 0), ("state_norm_last", last)):
            wanted = flow.state_norm[at][t].item()
            assert getattr(row, name) == pytest.approx(wanted, rel=1e-12, nan_ok=True), name
        verdict = flow.verdicts[row.layer][row.direction]
        assert (row.verdict, row.evidence) == (verdict.word, verdict.evidence)
        assert row.nonfinite_grad == flow.nonfinite_grad[at].nansum()
        assert row.nonfinite_state == flow.nonfinite_state[at].nansum()


# --------------------------------------------------------------------------- what a step is made of


@pytest.mark.parametrize("tracking", [True, "sample"])
def test_each_step_says_what_its_record_says(tracking, own_backend):
    model = Two(backend=own_backend, track_gradient_flow=tracking)
    optimizer, flows = sgd(model), []
    with Monitor(model, optimizer) as monitor:
        for step, steps in enumerate([T, 3, 9]):
            optimizer.zero_grad()
            lengths = [steps, 2, 1] if step == 1 else None
            model(inputs(steps, B, IN, seed=step), lengths=lengths).square().sum().backward()
            flows.append((model.encoder.gradient_flow, model.decoder.gradient_flow))
            optimizer.step()
    rows = monitor.rows()
    assert len(rows) == 3 * 5
    for step, pair in enumerate(flows):
        for name, flow in zip(("encoder", "decoder"), pair):
            of_it = [row for row in rows if (row.step, row.rnn) == (step + 1, name)]
            assert {(row.passes, row.skipped) for row in of_it} == {(1, False)}
            assert_tells(of_it, flow)
    for field in ("carry_norm", "state_norm"):
        found = monitor.norms(field)
        encoder = [("encoder", i, d) for i in (0, 1) for d in (0, 1)]
        assert list(found) == [*encoder, ("decoder", 0, 0)]
        steps, norms = found["encoder", 1, 1]
        assert steps == [1, 2, 3]
        assert norms.shape == (3, 9)
        assert norms.dtype == torch.float32
        for values, (flow, _) in zip(norms, flows):
            flow = flow.pooled()
            there = (flow.entries if field == "state_norm" else flow.carried)[1, 1] > 0
            known = values[: len(there)]
            wanted = getattr(flow, field)[1, 1].float()
            assert torch.allclose(known[there], wanted[there], rtol=1e-6, atol=0)
            assert known[~there].isnan().all()
            assert values[len(there) :].isnan().all()


@pytest.mark.parametrize("lengths", [[6, 6, 6, 6], [6, 6, 4, 4]])
def test_accumulated_passes_are_parts_of_a_batch(lengths, own_backend):
    rnn = make(own_backend, num_layers=2, bidirectional=True)
    x, optimizer = inputs(6, 4, IN), sgd(rnn, 0.0)
    loss_of(rnn, x, lengths=lengths).backward()
    whole = rnn.gradient_flow
    with Monitor(rnn, optimizer) as monitor:
        for part in (slice(0, 2), slice(2, 4)):
            rnn_input = x[: max(lengths[part]), part]
            loss_of(rnn, rnn_input).backward()
        optimizer.step()
        loss_of(rnn, x, lengths=lengths).backward()
        optimizer.step()
    rows = monitor.rows()
    assert [row.passes for row in rows] == [2] * 4 + [1] * 4
    assert_tells(rows[:4], whole)
    assert_tells(rows[4:], whole)


def test_a_layer_without_gradient_and_an_rnn_without_pass():
    model = Two()
    optimizer = sgd(model)
    with Monitor(model, optimizer) as monitor:
        y, _ = model.encoder(inputs())
        y.detach_()
        model.decoder(y)[0].sum().backward()  # the encoder gets no gradient
        optimizer.step()
        optimizer.step()  # nothing to anything
        rnn = model.encoder
        (grad,) = torch.autograd.grad(rnn(inputs())[0].sum(), rnn.weight_hh_l1)
        rnn.weight_hh_l1.grad = grad
        optimizer.step()
    rows = monitor.rows()
    assert [(row.step, row.rnn) for row in rows] == [(1, "decoder")] + [(3, "encoder")] * 4
    assert [row.verdict for row in rows[1:3]] == ["unknown"] * 2
    assert [row.time_steps for row in rows[1:]] == [0, 0, T, T]
    assert_tells(rows[1:], model.encoder.gradient_flow)


def test_passes_that_leave_no_gradient_count_only_where_there_is_no_other():
    """An attack on the input, before and after: not part of the step."""
    rnn, x = make("auto"), inputs().requires_grad_()
    optimizer = sgd(rnn)

    def look() -> None:
        torch.autograd.grad(1e6 * loss_of(rnn, x), x)

    with Monitor(rnn, optimizer) as monitor:
        look()
        loss_of(rnn, inputs(seed=3)).backward()
        flow = rnn.gradient_flow
        look()
        optimizer.step()
        optimizer.step()  # no pass came after the first
        rnn.requires_grad_(False)
        look()
        loss_of(rnn, x).backward()
        frozen = rnn.gradient_flow
        optimizer.step()
    rows = monitor.rows()
    assert [(row.step, row.passes) for row in rows] == [(1, 1), (3, 1)]
    assert_tells(rows[:1], flow)
    assert_tells(rows[1:], frozen)


def test_what_came_before_the_monitor_is_not_of_its_first_step():
    rnn = make("auto")
    optimizer = sgd(rnn)
    loss_of(rnn, inputs()).backward()
    with Monitor(rnn, optimizer) as monitor:
        optimizer.step()
        loss_of(rnn, inputs()).backward()
    assert monitor.rows() == []
    with monitor:
        optimizer.step()
    assert monitor.rows() == []
    assert monitor.steps == 2


def test_a_closure_called_many_times_counts_once():
    """As LBFGS calls it; what has accumulated before the step stays."""
    rnn = make("auto")
    optimizer = torch.optim.LBFGS(rnn.parameters(), lr=0.01, max_iter=4)
    flows = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(rnn, inputs())
        loss.backward()
        flows.append(rnn.gradient_flow)
        return loss

    with Monitor(rnn, optimizer) as monitor:
        optimizer.step(closure)
        assert len(flows) > 1
        assert_tells(monitor.rows(), flows[-1])
        loss_of(rnn, inputs()).backward()
        optimizer.step(closure)
    assert [row.passes for row in monitor.rows()] == [1, 2]


def test_steps_without_an_optimizer():
    rnn = make("auto")
    monitor = Monitor(rnn)
    with pytest.raises(RuntimeError, match="step: wanted inside"):
        monitor.step()
    with monitor:
        for _ in range(3):
            for seed in range(2):
                loss_of(rnn, inputs(seed=seed)).backward()
            monitor.step()
    assert [(row.step, row.passes) for row in monitor.rows()] == [(1, 2), (2, 2), (3, 2)]


# ------------------------------------------------------------------------------ with a GradScaler


@pytest.mark.parametrize("optimizer_steps", [True, False])
def test_the_loss_scale_is_divided_out(optimizer_steps):
    """Also where it has been changed before anyone looks. A power of two leaves all bits."""
    x, found = inputs(dtype=torch.float32), []
    for scale in (1.0, 2.0**10):
        rnn = make("auto", dtype=torch.float32)
        optimizer = sgd(rnn)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1)
        with Monitor(rnn, optimizer if optimizer_steps else None, scaler) as monitor:
            for _ in range(2):
                optimizer.zero_grad()
                scaler.scale(loss_of(rnn, x)).backward()
                scaler.step(optimizer)
                scaler.update()
                if not optimizer_steps:
                    monitor.step()
        assert scaler.get_scale() == 4 * scale
        found.append((monitor.rows(), monitor.norms("state_norm")["model", 0, 0][1]))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_steps_that_the_scaler_leaves_out_are_marked():
    """Number 2 is left out twice and then made, number 3 is left out as the training ends."""
    rnn = make("auto", dtype=torch.float32)
    optimizer = sgd(rnn)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with Monitor(rnn, optimizer, scaler) as monitor:
        for factor in (1.0, math.inf, math.inf, 1.0, math.inf):
            optimizer.zero_grad()
            scaler.scale(factor * loss_of(rnn, inputs(dtype=torch.float32))).backward()
            scaler.step(optimizer)
            scaler.update()
    rows = monitor.rows()
    wanted = [(1, False), (2, True), (2, True), (2, False), (3, True)]
    assert [(row.step, row.skipped) for row in rows] == wanted
    assert [row.nonfinite_grad > 0 for row in rows] == [skipped for _, skipped in wanted]
    assert {row.first_nonfinite for row in rows} == {"", f"the gradient of layer 0 at step {T - 1}"}
    assert [row.passes for row in rows] == [1] * 5
    steps, norms = monitor.norms("state_norm")["model", 0, 0]
    assert steps == [1, 2, 3]
    assert norms[:2].isfinite().all()
    assert norms[2].isinf().all()


# -------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize(("every", "recorded"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [1, 4, 7])])
def test_every(every, recorded):
    """What is accumulated at other steps is not of those that are recorded."""
    rnn = make("auto")
    optimizer = sgd(rnn)
    with Monitor(rnn, optimizer, every=every) as monitor:
        for step in range(7):
            optimizer.zero_grad()
            for seed in range(1 + step % 2):
                loss_of(rnn, inputs(seed=seed)).backward()
            optimizer.step()
    assert [row.step for row in monitor.rows()] == recorded
    assert [row.passes for row in monitor.rows()] == [2 - step % 2 for step in recorded]
    assert monitor.steps == 7


@pytest.mark.parametrize("steps", [3, BLOCK, 2 * BLOCK + 5])
def test_maps_thin_out_and_numbers_stay(steps):
    model = make("auto", 2, 2)
    optimizer = sgd(model)
    with Monitor(model, optimizer, keep=8, start=10) as monitor:
        for step in range(steps):
            loss_of(model, inputs(3, 1, 2, seed=step)).backward()
            optimizer.step()
    assert [row.step for row in monitor.rows()] == list(range(11, 11 + steps))
    found, norms = monitor.norms()["model", 0, 0]
    assert len(found) == len(norms) <= 8
    distance = 1 if steps <= 8 else found[1] - found[0]
    assert found == list(range(11, 11 + steps, distance))
    assert 2 * len(found) >= min(steps, 8)


def test_kept_maps_do_not_hold_what_they_were_read_with():
    rnn = make("auto")
    optimizer = sgd(rnn)
    with Monitor(rnn, optimizer, keep=2) as monitor:
        for _ in range(BLOCK):
            loss_of(rnn, inputs()).backward()
            optimizer.step()
    (maps,) = {len(history.maps) for history in monitor._histories.values()}
    assert maps <= 2
    for history in monitor._histories.values():
        for x in history.maps.values():
            assert x.untyped_storage().nbytes() == 4 * x.numel()
        for block in history._blocks:
            for x in block.numbers.values():
                assert x.untyped_storage().nbytes() == x.element_size() * x.numel()


# -------------------------------------------------------------------------- entering, and leaving


def test_nothing_is_left_of_it():
    model = Two()
    optimizer = sgd(model)

    def hooks() -> list[int]:
        of_tensors = [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]
        of_steps = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
        return [*of_tensors, *map(len, of_steps)]

    before = hooks()
    with contextlib.suppress(ZeroDivisionError), Monitor(model, optimizer) as monitor:
        train(model, optimizer)
        assert sum(hooks()) == sum(before) + 4
        raise ZeroDivisionError
    assert hooks() == before
    assert len(monitor.rows()) == 5
    train(model, optimizer)
    assert len(monitor.rows()) == 5
    there = weakref.ref(monitor)
    del monitor
    gc.collect()
    assert there() is None


def test_it_may_go_on_later():
    model = make("auto")
    optimizer = sgd(model)
    with Monitor(model, optimizer) as monitor:
        loss_of(model, inputs()).backward()
        optimizer.step()
        with pytest.raises(RuntimeError, match="entered already"), monitor:
            pass
    loss_of(model, inputs()).backward()
    optimizer.step()  # nobody counts
    with monitor:
        loss_of(model, inputs()).backward()
        optimizer.step()
    assert [row.step for row in monitor.rows()] == [1, 2]


def test_training_is_the_same_with_it():
    found = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = Two()
        optimizer = sgd(model)
        if watched:
            with Monitor(model, optimizer):
                train(model, optimizer, 3)
        else:
            train(model, optimizer, 3)
        found.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *found))


def test_a_model_and_its_optimizer_are_copied_meanwhile():
    model = Two()
    optimizer = sgd(model)
    with Monitor(model, optimizer) as monitor:
        train(model, optimizer)
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        torch.save((model, model.state_dict(), optimizer.state_dict()), io.BytesIO())
        copy.deepcopy(optimizer)
        for twin in twins:
            train(twin, sgd(twin))  # is not watched
        train(model, optimizer)
    assert [row.step for row in monitor.rows()] == [1] * 5 + [2] * 5


def test_a_backward_pass_that_fails_leaves_no_trace():
    rnn = make("auto")
    optimizer = sgd(rnn)
    with Monitor(rnn, optimizer) as monitor:
        x = inputs().requires_grad_()
        x.register_hook(lambda g: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss_of(rnn, x).backward()
        optimizer.zero_grad()
        loss_of(rnn, inputs(seed=2)).backward()
        flow = rnn.gradient_flow
        optimizer.step()
    assert_tells(monitor.rows(), flow)
    assert monitor.rows()[0].passes == 1

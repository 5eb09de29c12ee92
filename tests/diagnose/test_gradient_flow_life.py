"""Which backward pass a record is of, and what else may happen to a module that has one."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from flows import (
    IN,
    NORMS,
    B,
    H,
    T,
    assert_close,
    inputs,
    make,
    same,
)
from ranks import leave, meet, spawn
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

import rnnfast
from rnnfast.backends import BACKENDS
from rnnfast.gradient_flow import GradientFlow
from rnnfast.modules import records
from rnnfast.recurrence import record

# --------------------------------------------------------------------------- which pass it is of


def run(rnn: rnnfast.RNN, x: Tensor | None = None, call=None) -> GradientFlow:
    y, h_n = (call or rnn)(inputs() if x is None else x)
    (y.square().sum() + h_n.sum()).backward()
    return rnn.gradient_flow


def gradients_of(rnn: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in rnn.parameters()]


def test_reading_what_is_not_there_raises(own_backend):
    rnn = make(own_backend, track_gradient_flow=False)
    with pytest.raises(RuntimeError, match="this RNN does not record it"):
        _ = rnn.gradient_flow
    rnn = make(own_backend)
    for forward in (lambda: None, lambda: rnn(inputs())):
        forward()
        with pytest.raises(RuntimeError, match="no backward pass has come through"):
            _ = rnn.gradient_flow


def test_tracking_may_begin_later(own_backend):
    rnn = make(own_backend, track_gradient_flow=False, num_layers=2)
    rnn.track_gradient_flow = True
    with pytest.raises(RuntimeError, match="no backward pass has come through"):
        _ = rnn.gradient_flow
    assert same(run(rnn), run(make(own_backend, num_layers=2)))


def test_a_retained_graph_gives_the_same_bits(own_backend):
    rnn = make(own_backend, num_layers=2, norm="layer", clip_state_grad=0.5)
    loss = rnn(inputs())[0].square().sum()
    loss.backward(retain_graph=True)
    grads, flow = gradients_of(rnn), rnn.gradient_flow
    rnn.zero_grad()
    run(rnn, 2 * inputs())  # the record of another pass
    assert not same(rnn.gradient_flow, flow)
    rnn.zero_grad()
    loss.backward()
    assert same(gradients_of(rnn), grads)
    assert same(rnn.gradient_flow, flow)


def test_the_record_does_not_change_the_gradients(own_backend):
    options = {"num_layers": 2, "bidirectional": True}
    found = []
    for tracking in (True, "sample"):
        rnn = make(own_backend, track_gradient_flow=tracking, **options)
        run(rnn)
        found.append(gradients_of(rnn))
    assert same(*found)
    plain = make(own_backend, track_gradient_flow=False, **options)
    y, h_n = plain(inputs())
    (y.square().sum() + h_n.sum()).backward()
    for a, w in zip(found[0], gradients_of(plain), strict=True):
        assert (a - w).abs().max() <= 1e-12 * w.abs().max()


def test_it_does_not_depend_on_which_gradients_are_wanted(own_backend):
    rnn = make(own_backend)
    wanted = run(rnn)
    assert same(run(rnn, inputs().requires_grad_()), wanted)
    rnn.requires_grad_(False)
    assert same(run(rnn, inputs().requires_grad_()), wanted)


def test_create_graph_records_as_well(own_backend):
    rnn = make(own_backend, num_layers=2, norm="layer", clip_state_grad=0.5)
    wanted = run(rnn)
    rnn._records = rnn._new_records()
    y, h_n = rnn(inputs())
    loss = y.square().sum() + h_n.sum()
    torch.autograd.grad(loss, list(rnn.parameters()), create_graph=True)
    assert_close(rnn.gradient_flow, wanted, 1e-12)


def test_layers_without_a_gradient_are_nan(own_backend):
    """The record is the last pass's, whatever an earlier one left there."""
    rnn = make(own_backend, num_layers=2, bidirectional=True)
    x = inputs()[:4]
    whole = run(rnn, x)
    assert all(v.isfinite().all() for v in whole.fields().values())
    run(rnn)  # of another T
    y, h_n = rnn(x)
    torch.autograd.grad(y.square().sum() + h_n.sum(), rnn.weight_hh_l1)
    for name, found in rnn.gradient_flow.fields().items():
        wanted = getattr(whole, name)
        assert found.shape == (2, 2, 4), name
        assert found[0].isnan().all(), name
        assert torch.equal(found[1], wanted[1]), name
    assert same(run(rnn, x), whole)


def test_a_pass_that_does_not_come_through_leaves_the_record(own_backend):
    first, second = make(own_backend), make(own_backend, H, H)
    before = run(first)
    y, _ = first(2 * inputs())
    torch.autograd.grad(second(y)[0].sum(), y)
    assert same(first.gradient_flow, before)
    assert (second.gradient_flow.state_norm > 0).all()


def test_two_modules_have_records_of_their_own(own_backend):
    model = nn.ModuleList([make(own_backend), make(own_backend, H, 5, num_layers=2)])
    y, _ = model[0](inputs())
    y.retain_grad()
    z, _ = model[1](y)
    z.square().sum().backward()
    assert model[0].gradient_flow.state_norm.shape == (1, 1, T)
    assert model[1].gradient_flow.state_norm.shape == (2, 1, T)
    after = model[0].gradient_flow
    alone = make(own_backend)
    alone(inputs())[0].backward(y.grad)
    assert same(after, alone.gradient_flow)


def test_forward_alone_does_not_touch_it(own_backend):
    rnn = make(own_backend)
    wanted = run(rnn)
    with torch.no_grad():
        rnn(2 * inputs())
    with torch.inference_mode():
        rnn(3 * inputs())
    rnn.eval()(4 * inputs())
    rnn.train()(5 * inputs())
    rnn(inputs(2 * records.ROOM, 1, IN))
    assert same(rnn.gradient_flow, wanted)


def test_what_was_read_stays(own_backend):
    rnn = make(own_backend)
    flow = run(rnn)
    kept = copy.deepcopy(flow)
    run(rnn, 2 * inputs())
    assert same(flow, kept)


def test_accumulated_gradients(own_backend):
    """The record is of the second pass alone."""
    rnn = make(own_backend)
    run(rnn)
    first = gradients_of(rnn)
    flow = run(rnn, 2 * inputs())
    both = gradients_of(rnn)
    alone = make(own_backend)
    assert same(flow, run(alone, 2 * inputs()))
    for a, b, c in zip(first, gradients_of(alone), both, strict=True):
        assert torch.equal(a + b, c)


@pytest.mark.parametrize("room", [2, records.ROOM])
@pytest.mark.parametrize(("T_first", "T_second"), [(4, 4), (4, 6), (6, 4)])
def test_twice_in_one_loss(T_first, T_second, room, own_backend, monkeypatch):
    """Autograd goes back through the second call first: the first one's is the last."""
    monkeypatch.setattr(records, "ROOM", room)
    x = inputs()
    wanted = run(make(own_backend), x[:T_first])
    rnn = make(own_backend)
    results = rnn(x[:T_first]), rnn(3 * x[:T_second])
    sum(y.square().sum() + h_n.sum() for y, h_n in results).backward()
    assert same(rnn.gradient_flow, wanted)


@pytest.mark.parametrize("tracking", [True, "sample"])
def test_more_and_fewer_steps_than_there_is_room_for(tracking, own_backend, monkeypatch):
    wanted = [
        run(make(own_backend, track_gradient_flow=tracking, num_layers=2), inputs(steps, B, IN))
        for steps in (3, 6, 7, 40, 2)
    ]
    monkeypatch.setattr(records, "ROOM", 4)
    rnn = make(own_backend, track_gradient_flow=tracking, num_layers=2)
    for flow in wanted:
        assert same(run(rnn, inputs(flow.state_norm.shape[2], B, IN)), flow)


def test_a_pass_that_began_before_there_was_more_room(own_backend, monkeypatch):
    monkeypatch.setattr(records, "ROOM", 4)
    rnn = make(own_backend)
    wanted = run(rnn, inputs()[:3])
    y, h_n = rnn(inputs()[:3])
    run(rnn, inputs(20, B, IN))
    (y.square().sum() + h_n.sum()).backward()
    assert same(rnn.gradient_flow, wanted)


def test_the_record_keeps_its_address(own_backend):
    """While there is room, as CUDA graphs need."""
    rnn = make(own_backend, num_layers=2)
    before = [made[-1].data_ptr() for made in rnn._records]
    for steps in (6, 3, 50):
        run(rnn, inputs(steps, B, IN))
    assert [made[-1].data_ptr() for made in rnn._records] == before


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant, own_backend):
    rnn = make(own_backend, num_layers=2)
    x = inputs().requires_grad_()
    wanted = run(rnn, x)
    rnn._records = rnn._new_records()
    found = run(rnn, x, lambda x: checkpoint(rnn, x, use_reentrant=reentrant))
    assert same(found, wanted)


# ------------------------------------------------------------------------------ shapes of inputs


def test_unbatched_and_batch_first(own_backend):
    wanted = run(make(own_backend))
    x = inputs().transpose(0, 1)
    assert_close(run(make(own_backend, batch_first=True), x), wanted, 1e-12)
    one = run(make(own_backend), inputs()[:, :1])
    assert_close(run(make(own_backend), inputs()[:, 0]), one, 1e-12)


@pytest.mark.parametrize("tracking", [True, "sample"])
def test_packed_sequences_in_the_order_of_the_samples(tracking, own_backend):
    rnn = make(own_backend, bidirectional=True, track_gradient_flow=tracking)
    lengths, x = [2, 6, 3], inputs()
    grad = inputs(2, B, H, seed=4)
    packed = pack_sequence([x[:n, b] for b, n in enumerate(lengths)], enforce_sorted=False)
    y, h_n = rnn(packed)
    (h_n * grad).sum().add(y.data.square().sum()).backward()
    found = rnn.gradient_flow
    y, h_n = rnn(x, lengths=lengths)
    (h_n * grad).sum().add(y.square().sum()).backward()
    assert_close(found, rnn.gradient_flow, 1e-12)
    if tracking == "sample":
        there = (found.state_norm[0, 0] > 0).sum(0)
        assert there.tolist() == lengths


def test_samples_add_up_to_the_batch(own_backend):
    """Norms in squares, counts as they are, the largest as the largest."""
    options = {"bidirectional": True, "num_heads": 2, "clip_state_grad": 0.5}
    whole = run(make(own_backend, **options))
    each = run(make(own_backend, track_gradient_flow="sample", **options))
    fields = each.fields()
    together = {name: fields[name].square().sum(-1).sqrt() for name in NORMS}
    together |= {"state_max": each.state_max.amax(-1), "gain": each.gain.mean(-1)}
    together |= {name: fields[name].sum(-1) for name in fields.keys() - together.keys()}
    assert_close(whole, GradientFlow(**together), 1e-12)
    assert_close(whole, each.pooled(), 1e-12)


# ------------------------------------------------------------------------------- the surroundings


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_cast_module_goes_on(dtype, own_backend):
    """Its record is no number of the module: no cast turns it into another."""
    rnn = make(own_backend, dtype=torch.float32)
    before = run(rnn, inputs(dtype=torch.float32))
    rnn.to(dtype)
    assert same(rnn.gradient_flow, before)
    rnn.zero_grad()
    found = run(rnn, inputs(dtype=dtype))
    fresh = make(own_backend, dtype=torch.float32).to(dtype)
    assert same(found, run(fresh, inputs(dtype=dtype)))
    assert found.state_norm.dtype == torch.float64
    assert (found.state_norm > 0).all()


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_has_a_record_of_its_own(way, own_backend):
    rnn = make(own_backend, num_layers=2)
    before = run(rnn)
    twin = copy.deepcopy(rnn) if way == "deepcopy" else pickle.loads(pickle.dumps(rnn))
    with pytest.raises(RuntimeError, match="no backward pass has come through"):
        _ = twin.gradient_flow
    run(twin, 2 * inputs())
    assert same(rnn.gradient_flow, before)
    assert not same(twin.gradient_flow, before)
    assert same(run(twin), before)


def test_nothing_of_it_is_saved(own_backend):
    rnn, plain = make(own_backend), make(own_backend, track_gradient_flow=False)
    run(rnn)
    assert rnn.state_dict().keys() == plain.state_dict().keys()
    assert not list(rnn.buffers())
    rnn.load_state_dict(plain.state_dict())
    plain.load_state_dict(rnn.state_dict())
    rnn.zero_grad()
    assert len(pickle.dumps(rnn)) < 8 * record.numbers(1, records.ROOM, 1)


def test_autocast_records_as_a_module_in_that_dtype(own_backend):
    rnn = make(own_backend, dtype=torch.float32, num_layers=2)
    x, grad = inputs(dtype=torch.float32), inputs(T, B, H, dtype=torch.bfloat16, seed=3)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = rnn(x)
    assert y.dtype == torch.bfloat16
    y.backward(grad)
    narrow = copy.deepcopy(rnn).bfloat16()
    narrow(x.bfloat16())[0].backward(grad)
    assert same(rnn.gradient_flow, narrow.gradient_flow)


@pytest.mark.parametrize("limit", [None, 0.5])
def test_grad_scaler(limit, own_backend):
    """The record is of the scaled loss; so is what clip_state_grad compares with. A power of two
    leaves all bits."""
    scale, x = 2.0**10, inputs(dtype=torch.float32)
    rnn = make(own_backend, dtype=torch.float32, clip_state_grad=limit)
    # In the unscaled pass the limit that has the same effect.
    plain = make(own_backend, dtype=torch.float32, clip_state_grad=limit and limit / scale)
    plain(x)[0].square().sum().backward()
    wanted = plain.gradient_flow
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    optimizer = torch.optim.SGD(rnn.parameters(), lr=0.1)
    scaler.scale(rnn(x)[0].square().sum()).backward()
    scaler.unscale_(optimizer)
    assert same(gradients_of(rnn), gradients_of(plain))
    flow = rnn.gradient_flow
    for name in (*NORMS, "state_max"):
        assert torch.equal(getattr(flow, name), scale * getattr(wanted, name)), name
    for name in ("gain", "nonfinite_grad", "nonfinite_state"):
        assert torch.equal(getattr(flow, name), getattr(wanted, name)), name
    if limit:
        assert (flow.clipped_norm < flow.state_norm).any()
        assert (flow.clipped_norm <= math.sqrt(B) * limit * (1 + 1e-5)).all()


LENGTHS = [6, 6, 4, 4]  # the first two samples on one rank, the others on the second


def shard(rank: int) -> Tensor:
    return inputs(6, 4, IN)[: LENGTHS[2 * rank], 2 * rank : 2 * rank + 2]


def train_on_a_rank(rank: int, backend: str, folder: str) -> None:
    meet(rank, folder)
    rnn = make(backend, num_layers=2, bidirectional=True)
    run(rnn, shard(rank), nn.parallel.DistributedDataParallel(rnn))
    flow = rnn.gradient_flow
    torch.save((gradients_of(rnn), flow.fields(), flow.reduce().fields()), f"{folder}/{rank}")
    leave()


@pytest.mark.proof
def test_distributed_data_parallel(own_backend, tmp_path):
    """Gradients are those of the whole batch; each rank has the record of its own part, whose T
    differs, and reduce() that of the whole."""
    spawn(train_on_a_rank, own_backend, str(tmp_path))
    rnn = make(own_backend, num_layers=2, bidirectional=True)
    y, h_n = rnn(inputs(6, 4, IN), lengths=LENGTHS)
    ((y.square().sum() + h_n.sum()) / 2).backward()
    for rank in range(2):
        grads, flow, reduced = torch.load(tmp_path / str(rank))
        assert_close(GradientFlow(**reduced), rnn.gradient_flow, 1e-12)
        for a, w in zip(grads, gradients_of(rnn), strict=True):
            assert (a - w).abs().max() <= 1e-12 * w.abs().max()
        alone = make(own_backend, num_layers=2, bidirectional=True)
        assert_close(GradientFlow(**flow), run(alone, shard(rank)), 1e-12)


# --------------------------------------------------------------------------------- when it is off


@pytest.mark.parametrize("tracking", [False, True])
def test_when_it_is_off_there_is_nothing_of_it(tracking, own_backend, monkeypatch):
    """No buffer, and no backend is asked to fill one."""
    backend, records = BACKENDS[own_backend], []
    backward = backend.backward

    def watched(*args, **more):
        records.append(args[2])
        return backward(*args, **more)

    monkeypatch.setattr(backend, "backward", watched)
    rnn = make(own_backend, num_layers=2, track_gradient_flow=tracking)
    y, h_n = rnn(inputs())
    (y.square().sum() + h_n.sum()).backward()
    assert len(rnn._records) == (2 if tracking else 0)
    if tracking:
        assert [r.shape for r in records] == [(1, T, 1, len(record.FIELDS))] * 2
    elif own_backend == "reference":
        assert records == []  # PyTorch itself differentiates it
    else:
        assert records == [None, None]


def test_without_gradients_there_is_nothing_of_it(own_backend, monkeypatch):
    monkeypatch.setattr(records, "ROOM", 1)
    rnn = make(own_backend)
    before = rnn._records[0][-1]
    with torch.no_grad():
        rnn(inputs())
    assert [made[-1] is before for made in rnn._records] == [True]
    assert len(rnn._records[0]) == 1


def test_what_lists_all_attributes_does_not_stumble_over_it(own_backend):
    """As torch.jit.trace does."""
    rnn = rnnfast.RNN(2, 3, backend=own_backend, track_gradient_flow=True)
    for module in (rnnfast.RNN(2, 3), rnn):
        assert "gradient_flow" not in dir(module)
        assert all(hasattr(module, name) for name in dir(module))
    rnn(torch.randn(4, 1, 2))[0].sum().backward()
    assert "gradient_flow" in dir(rnn)

"""A module that records, where its weights, its device or its batch are not as usual."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from flows import IN, B, H, T, inputs, make, same
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import rnnfast
from rnnfast import values
from rnnfast.gradient_flow import sums
from rnnfast.modules import records
from rnnfast.recurrence import record


def trained(rnn: rnnfast.RNN, x=None) -> rnnfast.RNN:
    rnn(inputs() if x is None else x)[0].square().sum().backward()
    return rnn


def stripped(rnn: nn.RNNBase) -> nn.RNNBase:
    """With a plain tensor in the place of each parameter, as in a hypernetwork."""
    for name, p in list(rnn.named_parameters()):
        del rnn._parameters[name]
        setattr(rnn, name, p.detach().clone())
    return rnn


# ------------------------------------------------------------------------------ no parameters left

MOVES = {
    "to": lambda m: m.to("cpu"),
    "to meta": lambda m: m.to("meta"),
    "double": lambda m: m.double(),
    "half": lambda m: m.half(),
    "cpu": lambda m: m.cpu(),
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "share_memory": lambda m: m.share_memory(),
    "requires_grad_": lambda m: m.requires_grad_(False),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("without", ["plain tensors", "nothing"])
@pytest.mark.parametrize("tracking", [False, True])
@pytest.mark.parametrize("move", MOVES)
def test_a_module_without_parameters_is_moved_as_torchs(move, tracking, without):
    """Plain tensors stay as they are, in nn.RNN, too."""
    options = {"dtype": torch.float64}
    for rnn in (nn.RNN(IN, H, **options), make("auto", track_gradient_flow=tracking, **options)):
        stripped(rnn)
        if without == "nothing":
            for name in rnn._flat_weights_names:
                delattr(rnn, name)
        moved = MOVES[move](rnn)
        if without == "plain tensors":
            assert moved.weight_hh_l0.dtype == torch.float64
            assert moved.weight_hh_l0.device.type == "cpu"
    if without == "plain tensors":
        x = inputs().requires_grad_()
        moved(x)[0].sum().backward()
        assert x.grad.isfinite().all()
        assert hasattr(moved, "gradient_flow") == tracking


def test_what_cannot_be_swapped_without_parameters_is_kept_and_said():
    said = []
    for convert, kind in ((rnnfast.replace, nn.RNN), (rnnfast.to_torch, rnnfast.RNN)):
        model = nn.Sequential(stripped(kind(IN, H)))
        convert(model, report=said.append)
        assert type(model[0]) is kind
    assert all(line.startswith("kept 0: ") for line in said)


def test_a_probe_of_a_module_without_parameters():
    rnn = make("auto")
    wanted = rnnfast.probe(rnn, inputs()).norm
    assert torch.equal(rnnfast.probe(stripped(rnn), inputs()).norm, wanted)


# ------------------------------------------------------------------------------------ meta and fake


def assign(rnn: rnnfast.RNN, source: rnnfast.RNN, way: str) -> None:
    if way == "load_state_dict":
        rnn.load_state_dict(source.state_dict(), assign=True)
    else:
        for name, p in source.named_parameters():
            setattr(rnn, name, nn.Parameter(p.detach()))


@pytest.mark.parametrize("tracking", [True, "sample"])
@pytest.mark.parametrize("way", ["load_state_dict", "setattr"])
def test_a_module_built_on_meta_records_once_its_weights_are_assigned(way, tracking):
    whole = make("auto", num_layers=2, track_gradient_flow=tracking)
    wanted = trained(copy.deepcopy(whole)).gradient_flow
    rnn = make("auto", num_layers=2, track_gradient_flow=tracking, device="meta")
    assert "gradient_flow" not in dir(rnn)
    assert not hasattr(rnn, "gradient_flow")
    assign(rnn, whole, way)
    for use in (lambda m: m, copy.deepcopy, lambda m: m.to("cpu")):
        assert same(trained(use(rnn)).gradient_flow, wanted)
    with rnnfast.GradientMonitor(rnn) as monitor:
        trained(rnn)
        monitor.step()
    assert len(monitor.rows()) == 2
    assert "gradient_flow" in dir(rnn)


def test_a_module_on_meta_has_nothing_to_read():
    rnn = make("auto", device="meta")
    trained(rnn, inputs().to("meta"))
    assert getattr(rnn, "gradient_flow", None) is None
    assert "gradient_flow" not in dir(rnn)


def test_attributes_can_be_listed_under_fake_tensors():
    real = trained(make("auto"))
    with FakeTensorMode() as mode:
        made = make("auto")
        for rnn in (made, real):
            assert "gradient_flow" not in dir(rnn)
            assert getattr(rnn, "gradient_flow", None) is None
        with pytest.raises(AttributeError, match="cannot be read under FakeTensorMode"):
            _ = real.gradient_flow
        trained(made, mode.from_tensor(inputs()))
    for rnn, there in ((made, False), (real, True)):
        assert hasattr(rnn, "gradient_flow") == there
        assert ("gradient_flow" in dir(rnn)) == there


# ------------------------------------------------------------------------------ nothing to be read


def test_a_record_that_is_not_there_is_a_missing_attribute():
    """With the words that say why, and for those who catch a RuntimeError as before."""
    for rnn, why in (
        (rnnfast.RNN(IN, H), "this RNN does not record it"),
        (make("auto"), "no backward pass has come through this RNN yet"),
    ):
        assert not hasattr(rnn, "gradient_flow")
        assert getattr(rnn, "gradient_flow", 3) == 3
        for kind in (AttributeError, RuntimeError):
            with pytest.raises(kind, match=why):
                _ = rnn.gradient_flow
        with pytest.raises(AttributeError, match="'RNN' object has no attribute 'gradient_flaw'"):
            _ = rnn.gradient_flaw


# ----------------------------------------------------------------------------------- DataParallel


def replica(rnn: rnnfast.RNN, device: str) -> rnnfast.RNN:
    """The replicas of nn.DataParallel; a second device is "meta" where there is no other."""
    made = rnn._replicate_for_data_parallel()
    for name, p in rnn.named_parameters():
        setattr(made, name, p * 1 if device == "cpu" else p.detach().to(device).requires_grad_())
    return made


@pytest.mark.parametrize("later", [False, True])
def test_records_of_replicas_do_not_grow(later, monkeypatch):
    monkeypatch.setattr(records, "ROOM", 2)
    rnn = make("auto", num_layers=2, track_gradient_flow=not later)
    rnn.track_gradient_flow = True
    sizes = []
    for steps in (6, 6, 7, 3):
        for device in ("cpu", "meta"):
            trained(replica(rnn, device), inputs(steps, B, IN).to(device))
        sizes.append([sum(b.numel() for b in made) for made in rnn._records])
    assert sizes[0] == sizes[1]
    assert all(x <= 4 * y for x, y in zip(sizes[3], sizes[0]))
    alone = trained(make("auto", num_layers=2), inputs(3, B, IN))
    assert same(rnn.gradient_flow, alone.gradient_flow)


@pytest.mark.parametrize("tracking", [True, "sample"])
def test_records_of_replicas_are_those_of_the_whole_batch(tracking, monkeypatch):
    """Each device has a part of the batch; they go back in one pass. Here one device plays two."""
    whole = trained(make("auto", num_layers=2, track_gradient_flow=tracking)).gradient_flow
    rnn = make("auto", num_layers=2, track_gradient_flow=tracking)
    parts = [copy.copy(rnn) for _ in range(2)]
    for part in parts:
        part._records = rnn._new_records()
    outputs = (p(x)[0] for p, x in zip(parts, inputs().split([B - 1, 1], 1)))
    torch.cat(list(outputs), 1).square().sum().backward()
    monkeypatch.setattr(sums, "by_device", lambda _: [part._records for part in parts])
    found = rnn.gradient_flow
    assert found.state_norm.shape == whole.state_norm.shape
    for name, value in whole.fields().items():
        torch.testing.assert_close(found.fields()[name], value, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------ empty batches


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tracking", [True, "sample"])
def test_a_record_of_an_empty_batch_says_that_nothing_is_known(tracking, packed, own_backend):
    options = {"num_layers": 2, "bidirectional": True, "norm": "layer", "clip_state_grad": 1.0}
    rnn = make(own_backend, track_gradient_flow=tracking, **options)
    lengths = {"lengths": []} if packed else {}
    rnn(inputs()[:, :0], **lengths)[0].sum().backward()
    flow = rnn.gradient_flow
    shape = (2, 2, T, 0) if tracking == "sample" else (2, 2, T)
    assert flow.entries.shape == shape
    assert (flow.entries == 0).all()
    assert (flow.pooled().state_norm == 0).all()
    for value in (flow.half_life, flow.horizon, flow.log_growth):
        assert value.shape == shape[:2] + shape[3:]
        assert value.isnan().all()
    assert {verdict.word for layer in flow.verdicts for verdict in layer} == {"unknown"}
    assert flow.first_nonfinite is None
    assert flow.advice == ()
    assert "no gradient came to this layer" in repr(flow)
    json.dumps(flow.to_dict(), allow_nan=False)
    pytest.importorskip("matplotlib")
    flow.plot()


@pytest.mark.parametrize("tracking", [True, "sample"])
def test_an_empty_batch_among_others_is_watched(tracking, own_backend):
    """In an accumulated step, and as a step of its own."""
    rnn = make(own_backend, track_gradient_flow=tracking)
    step = torch.optim.SGD(rnn.parameters(), 0.0)
    with rnnfast.GradientMonitor(rnn, step) as monitor:
        for sizes in ((B,), (0,), (B, 0), (0, 1)):
            step.zero_grad()
            for size in sizes:
                trained(rnn, inputs()[:, :size])
            step.step()
    rows = monitor.rows()
    assert [row.passes for row in rows] == [1, 1, 2, 2]
    assert [row.time_steps for row in rows] == [T, 0, T, T]
    assert rows[1].verdict == "unknown"
    assert rows[2].log_growth == rows[0].log_growth
    pytest.importorskip("matplotlib")
    monitor.plot()


def test_a_probe_of_an_empty_batch_says_so(own_backend):
    with pytest.raises(ValueError, match="no sample has a step to begin at: the batch is empty"):
        rnnfast.probe(make(own_backend), inputs()[:, :0])


def test_an_empty_part_does_not_change_what_the_ranks_have_together():
    from rnnfast.gradient_flow.flow import combine_ranks

    rnn = make("auto", track_gradient_flow="sample")
    parts = [trained(rnn, inputs()[:, :size]).gradient_flow.fields() for size in (B, 0)]
    of = trained(rnn).gradient_flow
    both = combine_ranks(parts, of)
    torch.testing.assert_close(both.state_norm, of.pooled().state_norm / 2)
    torch.testing.assert_close(both.log_growth, of.pooled().log_growth)
    nothing = combine_ranks([parts[1], parts[1]], of)
    assert nothing.verdict.word == "unknown"


def test_a_buffer_without_values_is_not_read():
    assert values.has_values(record.make(9, torch.device("cpu")))
    assert not values.has_values(record.make(9, torch.device("meta")))
    assert sums.newest([[record.make(9, torch.device("meta"))], []]) == record.NEVER
    assert sums.take([[record.make(9, torch.device("meta"))]]) is None


# -------------------------------------------------------------------------------------------- FSDP


@pytest.fixture
def one_process():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # torch warns of FullyShardedDataParallel, in many ways
@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_a_module_in_fully_sharded_data_parallel_is_moved(use_orig_params, norm, one_process):
    """Whoever holds the parameters meanwhile; the record stays where it is."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    rnn = make("auto", norm=norm)
    wanted = trained(copy.deepcopy(rnn)).gradient_flow
    cpu = torch.device("cpu")
    whole = FullyShardedDataParallel(rnn, device_id=cpu, use_orig_params=use_orig_params)
    for _ in range(2):
        whole(inputs())[0].square().sum().backward()
        whole.to("cpu")
        assert same(rnn.gradient_flow, wanted)

"""GradientMonitor where a model is compiled, parallel, sharded, or trained by Lightning."""

from __future__ import annotations

import inspect
import sys
import types
from pathlib import Path

import pytest
import torch
from flows import IN, T, inputs, make
from monitored import Two, loss_of, sgd, train
from ranks import leave, meet, spawn
from torch import nn

import rnnfast
from rnnfast.diagnose.monitor import tracked_rnns

# torch 2.13 raises these itself; any other warning fails.
pytestmark = [
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]
Monitor = rnnfast.GradientMonitor


# ------------------------------------------------------------------------------------------- names


def test_names_are_those_of_the_model():
    """Not of wrappers; a module that stands in two places has its first name."""
    assert list(tracked_rnns(make("auto"))) == ["model"]
    model = Two()
    assert list(tracked_rnns(model)) == ["encoder", "decoder"]
    assert list(tracked_rnns(torch.compile(model))) == ["encoder", "decoder"]
    assert list(tracked_rnns(nn.DataParallel(model))) == ["encoder", "decoder"]
    model.again = model.decoder
    model.encoder = torch.compile(model.encoder)
    inner = nn.Module()
    inner.module = model  # a name like any other
    outer = nn.ModuleDict({"a": nn.DataParallel(inner), "b": make("auto")})
    assert list(tracked_rnns(outer)) == ["a.module.encoder", "a.module.decoder", "b"]


# ----------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("compiled_before", [True, False])
def test_compiled(compiled_before):
    """The same rows, all passes seen, without a break in the graph."""
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Two()
        optimizer = sgd(model)
        called = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        if compiled_before:
            train(called, optimizer)
        with Monitor(called, optimizer) as monitor:
            if not compiled_before:
                train(called, optimizer)
            optimizer.zero_grad()
            for seed in (5, 6):
                called(inputs(seed=seed)).square().sum().backward()
            optimizer.step()
        found.append(monitor.rows())
    eager, compiled = found
    assert [row.passes for row in compiled][-5:] == [2] * 5
    assert [row[:7] for row in compiled] == [row[:7] for row in eager]
    for a, w in zip(compiled, eager, strict=True):
        assert a.log_growth == pytest.approx(w.log_growth, rel=1e-9)
        assert a.state_norm_first == pytest.approx(w.state_norm_first, rel=1e-9)


# ------------------------------------------------------------------------------------ two processes


LENGTHS = [6, 6, 4, 4]  # the first two samples on one rank, the others on the second


def train_in_parallel(rank: int, folder: str) -> None:
    """A step, one of two passes, another, and one that the scaler leaves out; then one to which
    the first rank alone has a pass, and one without any."""
    meet(rank, folder)
    rnn = make("auto")
    parallel = nn.parallel.DistributedDataParallel(rnn, find_unused_parameters=True)
    optimizer = sgd(rnn, 0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    mine = slice(2 * rank, 2 * rank + 2)
    x = inputs(6, 4, IN)[: LENGTHS[2 * rank], mine]
    world = torch.distributed.group.WORLD
    out = Path(folder) / "out"
    with Monitor(parallel, optimizer, scaler, group=world, out=out) as monitor:
        for step in range(4):
            optimizer.zero_grad()
            if step == 1:
                with parallel.no_sync():
                    scaler.scale(loss_of(parallel, x)).backward()
            scaler.scale((float("inf") if step == 3 else 1.0) * loss_of(parallel, x)).backward()
            scaler.step(optimizer)
            scaler.update()
        with Monitor(rnn, group=world) as alone:
            if rank == 0:
                loss_of(rnn, x).backward()
            alone.step()
            alone.step()
    reports = [list(map(tuple, one.rows())) for one in (monitor, alone)]
    torch.save((reports, monitor.norms("state_norm"), monitor.out is None), f"{folder}/{rank}")
    leave()


@pytest.mark.proof
def test_ranks_are_combined(tmp_path):
    """The report is one process's over the whole batch; all have it, the first one writes."""
    spawn(train_in_parallel, str(tmp_path))
    (reports, norms, silent), (reports_second, norms_second, silent_second) = (
        torch.load(tmp_path / str(rank)) for rank in range(2)
    )
    assert repr(reports) == repr(reports_second)
    assert (silent, silent_second) == (False, True)
    rows, alone = reports
    assert [(row[0], row[4], row[5]) for row in rows] == [
        (1, 1, False),
        (2, 2, False),
        (3, 1, False),
        (4, 1, True),
    ]
    rnn, x = make("auto"), inputs(6, 4, IN)
    (loss_of(rnn, x, lengths=LENGTHS) / 2).backward()
    whole = rnn.gradient_flow
    for step, wanted in ((0, 1.0), (1, 2**0.5), (2, 1.0)):
        found = norms["model", 0, 0][1][step].double()
        assert torch.allclose(found, wanted * whole.state_norm[0, 0], rtol=1e-6)
        assert torch.equal(norms_second["model", 0, 0][1][step].double(), found)
        assert rows[step][9] == pytest.approx(whole.log_growth.item())
    assert norms["model", 0, 0][1][3].isinf().any()
    # One rank had a pass, for a loss that is half of the mean.
    rnn = make("auto")
    loss_of(rnn, x[:, :2]).backward()
    assert len(alone) == 1
    assert alone[0][11] == pytest.approx(rnn.gradient_flow.state_norm[0, 0, 0].item() / 2)
    assert (tmp_path / "out" / "gradient_flow.csv").read_text().count("\n") == 5


def train_sharded(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    meet(rank, folder)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    model = Two()
    fully_shard(model.encoder, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = sgd(model)
    world = torch.distributed.group.WORLD
    with Monitor(model, optimizer, group=world) as monitor:
        for step in range(3):
            optimizer.zero_grad()
            for micro in range(2 if step == 1 else 1):
                model(inputs(seed=10 * step + 2 * micro + rank)).square().sum().backward()
            optimizer.step()
    rows = list(map(tuple, monitor.rows()))
    flows = [rnn.gradient_flow.fields() for rnn in monitor.rnns.values()]
    torch.save((rows, flows), f"{folder}/{rank}")
    leave()


@pytest.mark.proof
def test_fully_shard(tmp_path):
    """An RNN inside trains as one that is whole, and its record is the same."""
    spawn(train_sharded, str(tmp_path))
    rows, _ = torch.load(tmp_path / "0")
    torch.manual_seed(0)
    model = Two()
    optimizer = sgd(model)
    with Monitor(model, optimizer) as monitor:
        for step in range(3):
            optimizer.zero_grad()
            for micro in range(2 if step == 1 else 1):
                x = torch.cat([inputs(seed=10 * step + 2 * micro + rank) for rank in range(2)], 1)
                (model(x).square().sum() / 2).backward()
            optimizer.step()
    wanted = monitor.rows()
    assert len(rows) == len(wanted) == 15
    for a, w in zip(rows, wanted):
        assert a[:7] == tuple(w)[:7]
        assert a[9:13] == pytest.approx(tuple(w)[9:13], rel=1e-9)
    for rank in range(2):
        _, flows = torch.load(tmp_path / str(rank))
        assert [fields["gain"].shape for fields in flows] == [(2, 2, T), (1, 1, T)]
        assert all(fields["state_norm"].isfinite().all() for fields in flows)


# ------------------------------------------------------------------------------ wrapped optimizers


class ByName(torch.optim.Optimizer):
    """Calls another optimizer, and no constructor of Optimizer's, as accelerate's wrapper does."""

    def __init__(self, *inner):
        self.optimizer, self.rest = inner[0], inner[1:]
        self.second = inner[-1]

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)

    def step(self, closure=None):
        for one in (self.optimizer, *self.rest):
            one.step(closure)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)


class Schedule:
    """No Optimizer at all: a user's own learning rate schedule around one."""

    __slots__ = ("_inner",)

    def __init__(self, inner):
        self._inner = inner

    optimizer = property(lambda self: self._inner)

    def step(self):
        self._inner.step()

    def zero_grad(self):
        self._inner.zero_grad()


class Delegating(ByName):
    def __getattr__(self, name):
        return getattr(self.__dict__["optimizer"], name)


class Constructed(torch.optim.Optimizer):
    def __init__(self, inner):
        super().__init__(inner.param_groups, inner.defaults)
        self.inner = inner

    def step(self):
        self.inner.step()


WRAPPERS = {
    "by name": ByName,
    "twice": lambda inner: ByName(ByName(inner)),
    "schedule": Schedule,
    "delegating": Delegating,
    "constructed": Constructed,
}


def hooks_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    of_steps = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    of_tensors = (p._post_accumulate_grad_hooks or () for p in model.parameters())
    return sum(map(len, (*of_steps, *of_tensors)))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_steps_of_a_wrapped_optimizer_are_counted(wrapper):
    rows = []
    for wrap in (lambda inner: inner, WRAPPERS[wrapper]):
        torch.manual_seed(0)
        model = Two()
        inner = sgd(model)
        optimizer = wrap(inner)
        with Monitor(model, optimizer) as monitor:
            for seed in range(3):
                optimizer.zero_grad()
                model(inputs(seed=seed)).square().sum().backward()
                optimizer.step()
        assert hooks_of(model, inner) == 0
        rows.append(monitor.rows())
    assert [row.step for row in rows[0]] == [1] * 5 + [2] * 5 + [3] * 5
    assert repr(rows[1]) == repr(rows[0])


def test_a_wrapper_around_no_optimizer_or_two_is_refused_before_anything_is_hooked(tmp_path):
    model = Two()
    first, second = sgd(model), sgd(model)
    without = ByName(first)
    without.optimizer = without.second = None
    for optimizer, held in ((ByName(first, second), 2), (without, 0)):
        match = rf"optimizer: given ByName, .* holds {held} optimizers, .* a call of step\(\)"
        with pytest.raises(TypeError, match=match):
            Monitor(model, optimizer, out=tmp_path / "out")
    assert hooks_of(model, first) == hooks_of(model, second) == 0
    assert not (tmp_path / "out").exists()


def test_hooks_that_are_refused_leave_none_behind(monkeypatch):
    model = Two()
    optimizer = sgd(model)
    monitor = Monitor(model, optimizer)

    def refuse(hook):
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(model.decoder.weight_ih_l0, "register_post_accumulate_grad_hook", refuse)
        with pytest.raises(ZeroDivisionError):
            monitor.__enter__()
    assert hooks_of(model, optimizer) == 0
    with monitor:  # another time
        train(model, optimizer)
    assert len(monitor.rows()) == 5


def test_steps_of_frozen_rnns_are_counted_without_an_optimizer():
    rnn = make("auto").requires_grad_(False)
    with Monitor(rnn) as monitor:
        with pytest.raises(RuntimeError, match="the context is entered already"):
            monitor.__enter__()
        rnn(inputs().requires_grad_())[0].sum().backward()
        monitor.step()
    assert len(monitor.rows()) == 1


# --------------------------------------------------------------------------------------- Lightning


@pytest.fixture
def callback_class(monkeypatch):
    """With a stand-in where Lightning is not installed."""
    try:
        import lightning.pytorch  # noqa: F401
    except ModuleNotFoundError:
        stand_in = types.ModuleType("lightning.pytorch")
        stand_in.Callback = type("Callback", (), {})
        monkeypatch.setitem(sys.modules, "lightning", types.ModuleType("lightning"))
        monkeypatch.setitem(sys.modules, "lightning.pytorch", stand_in)
    from rnnfast.diagnose.lightning import GradientMonitorCallback

    yield GradientMonitorCallback
    del sys.modules["rnnfast.diagnose.lightning"]


class Trainer:
    """The attributes that the callback reads of Lightning's, and the order of its calls."""

    def __init__(self, callback, optimizers: list, scaler=None) -> None:
        self.callback, self.optimizers, self.global_step = callback, optimizers, 7
        self.precision_plugin = types.SimpleNamespace(**({"scaler": scaler} if scaler else {}))

    def fit(self, model: nn.Module, steps: int, fails: bool = False) -> None:
        self.callback.on_train_start(self, model)
        try:
            for _ in range(steps):

                def closure():
                    self.optimizers[0].zero_grad()
                    model(inputs()).square().sum().backward()

                self.optimizers[0].step(closure)
            if fails:
                raise KeyboardInterrupt
        except BaseException as error:
            self.callback.on_exception(self, model, error)
        else:
            self.callback.on_train_end(self, model)


@pytest.mark.parametrize("fails", [False, True])
def test_callback_of_lightning(fails, callback_class, tmp_path):
    model = Two()
    callback = callback_class(out=tmp_path)
    trainer = Trainer(callback, [sgd(model)], torch.amp.GradScaler("cpu", init_scale=4.0))
    trainer.fit(model, 2, fails)
    assert [row.step for row in callback.monitor.rows()] == [8] * 5 + [9] * 5
    norms = callback.monitor.norms("state_norm")["decoder", 0, 0][1]
    wanted = model.decoder.gradient_flow.state_norm[0, 0] / 4
    assert torch.allclose(norms[-1].double(), wanted, rtol=1e-6)
    assert (tmp_path / "gradient_flow.csv").exists()
    train(model, trainer.optimizers[0])
    assert len(callback.monitor.rows()) == 10


def test_callback_takes_the_arguments_of_the_monitor(callback_class):
    wanted = inspect.signature(Monitor).parameters
    taken = inspect.signature(callback_class).parameters
    given = {"model", "optimizer", "grad_scaler"}  # by the trainer
    assert set(taken) == set(wanted) - given
    for name in taken.keys() - {"start"}:
        assert taken[name].default == wanted[name].default, name
    model = Two()
    trainer = Trainer(callback_class(every=2, start=3), [sgd(model)])
    trainer.fit(model, 3)
    assert sorted({row.step for row in trainer.callback.monitor.rows()}) == [4, 6]


def test_callback_wants_one_optimizer(callback_class):
    model = Two()
    trainer = Trainer(callback_class(), [sgd(model), sgd(model)])
    with pytest.raises(ValueError, match="trainer: given 2 optimizers, wanted one"):
        trainer.fit(model, 1)
    trainer.callback.on_exception(trainer, model, KeyboardInterrupt())  # nothing has begun

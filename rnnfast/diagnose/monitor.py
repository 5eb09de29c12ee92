"""Records of the gradient in every RNN of a model, at each step of a training."""

from __future__ import annotations

import csv
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from ..convert import TWINS
from ..extras import need
from ..gradient_flow.sums import Pass, newest
from ..gradient_flow.text import name_of, number_of_steps
from ..modules.stack import Stack
from ..recurrence import record
from .history import MAPS, Entry, Field, History, Row

if TYPE_CHECKING:
    from ..drawing import Picture

# Names that wrappers put into those of the model.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
SCALARS = (
    "half_life",
    "horizon",
    "log_growth",
    "gain",
    "state_norm_first",
    "state_norm_last",
    "nonfinite_grad",
    "nonfinite_state",
)


class _Attempt(NamedTuple):
    """The backward passes before a step of the optimizer, for each RNN that has any."""

    skipped: bool  # the GradScaler left the step out
    passes: dict[str, list[Pass]]


class GradientMonitor:
    """Records the gradient in every RNN, LSTM and GRU of rnnfast in a model, at each step of a
    training.

        with rnnfast.GradientMonitor(model, optimizer, out="flow") as monitor:
            train(model, optimizer)  # your training, unchanged
        monitor.plot().savefig("heat_map.png")

    Backward passes between two steps of the optimizer are parts of one batch (gradient
    accumulation): norms are sqrt(sum of squares), counts are sums. The monitor notices a pass by
    the gradients that it leaves in ``.grad``. Some passes leave none: torch.autograd.grad, frozen
    RNNs, FSDP's set_requires_gradient_sync(False). Then the last pass before the step counts. If
    the optimizer calls a closure several times (LBFGS), its last call counts.

    Args:
        model: all its RNNs record (track_gradient_flow). It may be in DistributedDataParallel,
            fully_shard or torch.compile.
        optimizer: the one whose steps are counted. It may be a wrapper that holds one
            torch.optim.Optimizer, as accelerate's does. None: call :meth:`step` after each step.
        grad_scaler: gradients are divided by its scale. If it leaves a step out, because a
            gradient is inf or NaN, that step is recorded as ``skipped``, under the number of the
            next step.
        every: record the first of so many steps; the other steps cost nothing.
        keep: columns of a heat map, at most. A longer training keeps every second column, every
            fourth, and so on. For each layer and direction a column takes 4 T bytes, and the
            numbers of a step take about 100.
        start: the number of steps before this training, if it continues another.
        group: a process group (torch.distributed.group.WORLD for all) whose ranks are combined as
            in :meth:`GradientFlow.reduce`. All ranks make the same steps. None: each rank for
            itself.
        writer: a TensorBoard SummaryWriter, or an object with its add_scalar. It gets the finite
            numbers of each step. Rank 0 writes.
        out: a folder for gradient_flow.csv and gradient_flow.png, written at the end. Rank 0
            writes.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value, the model has no RNN, LSTM
            or GRU of rnnfast, or one of them does not record.
        ModuleNotFoundError: ``out`` needs matplotlib (``pip install rnnfast[plots]``).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        grad_scaler=None,
        *,
        every: int = 1,
        keep: int = 1000,
        start: int = 0,
        group=None,
        writer=None,
        out: str | Path | None = None,
    ) -> None:
        self._counted = None if optimizer is None else _that_calls_hooks(optimizer)
        if grad_scaler is not None and not hasattr(grad_scaler, "get_scale"):
            kind = type(grad_scaler).__name__
            raise TypeError(f"grad_scaler: given {kind}, wanted a torch.amp.GradScaler or None")
        for name, value, least in (("every", every, 1), ("keep", keep, 2), ("start", start, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}: given {value!r}, wanted an int of at least {least}")
        if group is not None and not (dist.is_available() and dist.is_initialized()):
            raise ValueError("group: torch.distributed is not initialized in this process")
        ranks = dist.is_available() and dist.is_initialized()
        rank = dist.get_rank(group) if ranks else 0
        if rank < 0:
            raise ValueError("group: given a group that this process is not in")
        self.rnns = tracked_rnns(model)
        self.optimizer, self.grad_scaler = optimizer, grad_scaler
        self.every, self.start, self.group = every, start, group
        self.writer, self.out = (writer, out) if rank == 0 else (None, None)
        if self.writer is not None:
            self._check_writer()
        if self.out is not None:
            need("matplotlib", "plots", "out")  # raises before the training, not after it
            self.out = Path(self.out)
            self.out.mkdir(parents=True, exist_ok=True)
        self.steps = start
        self._histories = {
            name: History(name, rnn._network(), start + 1, every, keep)
            for name, rnn in self.rnns.items()
        }
        self._entered = False
        self._handles: list = []  # they remove the hooks of the context

    # ------------------------------------------------------------------------------ as a context

    def __enter__(self) -> GradientMonitor:
        if self._entered:
            raise RuntimeError("GradientMonitor: the context is entered already")
        self._forget()
        self._backward = None  # the number of the running backward pass
        try:
            self._hook()
        except BaseException:
            self._unhook()
            raise
        self._entered = True
        return self

    def _hook(self) -> None:
        hook, handles = self._on_gradient, self._handles
        if self._counted is not None:
            handles.append(self._counted.register_step_pre_hook(self._before_step))
            handles.append(self._counted.register_step_post_hook(self._after_step))
        for rnn in self.rnns.values():  # a hook on one parameter is enough, and costs least
            for p in [p for p in rnn.parameters() if p.requires_grad and p.is_leaf][:1]:
                handles.append(p.register_post_accumulate_grad_hook(hook))

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __exit__(self, kind, error, trace) -> None:
        self._unhook()
        self._entered = False
        if kind is None:  # after an error this would wait for ranks that never come
            last = [self._attempt(skipped=True)] if self._was_skipped() else []
            self._record([*self._attempts, *last])
        elif self.writer is not None and _is_closed(self.writer):
            self.writer = None  # its error would hide the one that ended the context
        for name in self.rnns:
            self._read(name)
        if self.out is not None:
            self.to_csv(self.out / "gradient_flow.csv")
            if any(history.maps for history in self._histories.values()):
                self.plot().savefig(self.out / "gradient_flow.png")

    # -------------------------------------------------------------------------- passes and steps

    def _forget(self) -> None:
        """Drops all passes so far: they belong to no step."""
        self._passes: dict[str, list[Pass]] = {name: [] for name in self.rnns}
        self._before: dict[str, int] | None = None  # passes when optimizer.step() began
        self._scale = None  # the GradScaler's, at the last pass
        self._attempts: list[_Attempt] = []  # skipped steps, not yet recorded
        self._seen = {name: newest(rnn._records) for name, rnn in self.rnns.items()}

    def _due(self) -> bool:
        """Whether the next step is recorded."""
        return (self.steps - self.start) % self.every == 0

    def _on_gradient(self, parameter: Tensor) -> None:
        """Queues a look at the records for the end of this backward pass, once in each pass."""
        number = torch._C._current_graph_task_id()
        if number != self._backward and self._due():
            self._backward = number
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(partial(self._collect, number))

    def _collect(self, backward: int | None) -> None:
        """Copies the records of backward pass number ``backward``. None: the last record of each
        RNN that has no pass in this step, while all other passes count as seen."""
        new = []
        for name, rnn in self.rnns.items():
            number = newest(rnn._records)
            wanted = not self._passes[name] if backward is None else number == backward
            if wanted and number not in (self._seen[name], record.NEVER):
                new.append(name)
            if wanted or backward is None:
                self._seen[name] = number
        if not new:
            return
        if self._was_skipped():
            self._attempts.append(self._attempt(skipped=True))
        self._scale = 1.0 if self.grad_scaler is None else self.grad_scaler.get_scale()
        for name in new:
            passes = self._passes[name]
            if self._before is not None:
                del passes[self._before[name] :]  # an earlier call of the closure made them
            passes.append(Pass.of(self.rnns[name]._records, self._scale))

    def _was_skipped(self) -> bool:
        """Whether passes wait for a step that the scaler left out. It lowers its scale then."""
        return (
            self.optimizer is not None
            and self.grad_scaler is not None
            and any(self._passes.values())
            and self.grad_scaler.get_scale() < self._scale
        )

    def _attempt(self, skipped: bool) -> _Attempt:
        """Takes the passes so far out of ``_passes``."""
        taken = {name: passes for name, passes in self._passes.items() if passes}
        self._passes = {name: [] for name in self.rnns}
        return _Attempt(skipped, taken)

    def _before_step(self, *_) -> None:
        self._before = {name: len(passes) for name, passes in self._passes.items()}

    def _after_step(self, *_) -> None:
        due = self._due()
        if due:
            self._collect(None)
            self._before = None
            attempts, self._attempts = [*self._attempts, self._attempt(skipped=False)], []
            self._record(attempts)
        self.steps += 1
        if self._due() and not due:
            self._forget()

    def step(self) -> None:
        """Ends a training step. For a monitor without optimizer.

        Raises:
            RuntimeError: the monitor has an optimizer, or its context is not entered.
        """
        if self.optimizer is not None:
            raise RuntimeError("step: the monitor's optimizer counts the steps")
        if not self._entered:
            raise RuntimeError("step: wanted inside of `with monitor:`")
        self._after_step()

    def _record(self, attempts: list[_Attempt]) -> None:
        ranks = [attempts] if self.group is None else _gathered(attempts, self.group)
        # A rank may have no record, or may not know of a skipped step. All ranks agree on the last
        # attempt.
        longest = max(map(len, ranks))
        aligned = zip(*([_Attempt(False, {})] * (longest - len(rank)) + rank for rank in ranks))
        for attempts in aligned:
            skipped = any(attempt.skipped for attempt in attempts)
            for name in self.rnns:
                there = [one.passes[name] for one in attempts if name in one.passes]
                if not there:
                    continue
                # The loss is the mean over the ranks, so each part is divided by their number.
                parts = [p._replace(scale=p.scale * len(ranks)) for passes in there for p in passes]
                entry = Entry(self.steps + 1, max(map(len, there)), skipped, parts)
                self._histories[name].add(entry)
                if self.writer is not None:
                    self._read(name)

    # ----------------------------------------------------------------------------------- results

    def rows(self) -> list[Row]:
        """A row for each recorded training step, layer and direction."""
        found = [row for history in self._histories.values() for row in history.rows()]
        return sorted(found, key=lambda row: row.step)  # stable: a step keeps the model's order

    def norms(
        self, field: Field = "carry_norm"
    ) -> dict[tuple[str, int, int], tuple[list[int], Tensor]]:
        """For each RNN, layer and direction the training steps [S], and their norms [S, T].

        The norms are float32: inf where a value is not finite, NaN where a row has no step.

        Args:
            field: "carry_norm", the part that came back through time, or "state_norm".
        """
        if field not in MAPS:
            raise ValueError(f"field: given {field!r}, wanted one of {MAPS}")
        found = {}
        for name, history in self._histories.items():
            history.read()
            steps, maps = list(history.maps), list(history.maps.values())
            if not maps:
                continue
            T = max(x.shape[3] for x in maps)
            padded = [nn.functional.pad(x, (0, T - x.shape[3]), value=math.nan) for x in maps]
            which = torch.stack(padded)[:, MAPS.index(field)]  # [S, L, D, T]
            for layer in range(which.shape[1]):
                for d in range(which.shape[2]):
                    found[name, layer, d] = steps, which[:, layer, d]
        return found

    def to_csv(self, path: str | Path) -> None:
        """Writes the rows. The first line names the columns: the fields of :class:`Row`."""
        with open(path, "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(Row._fields)
            table.writerows(self.rows())

    def plot(self, field: Field = "carry_norm") -> Picture:
        """A matplotlib.figure.Figure: for each RNN, layer and direction the norm over time step and
        training step. A notebook shows it; savefig(path) writes a file.

        Raises:
            ModuleNotFoundError: matplotlib is not installed (``pip install rnnfast[plots]``).
            RuntimeError: nothing is recorded yet.
        """
        norms = self.norms(field)
        if not norms:
            raise RuntimeError("plot: no step has been recorded in which a gradient came to an RNN")
        need("matplotlib", "plots", "plot()")
        from .heat_map import HeatMap, draw

        half_lives: dict[tuple[str, int, int], list[str]] = {key: [] for key in norms}
        for row in self.rows():
            half_lives[row.rnn, row.layer, row.direction].append(number_of_steps(row.half_life))
        panels = []
        for (name, layer, d), (steps, values) in norms.items():
            history, seen = self._histories[name], half_lives[name, layer, d]
            title = f"{name}, layer {name_of(layer, d)}"
            below = f"half-life in time steps: {seen[0]} at first, {seen[-1]} at last"
            where = history.first, history.width, steps
            panels.append(HeatMap(title, below, *where, values.numpy(), history.nonfinite))
        part = ", the part that came back through time" if field == "carry_norm" else ""
        heading = "The gradient at each time step, as training goes on"
        states = max((self._histories[name].cell.states for name, _, _ in norms), key=len)
        each = " and ".join(f"$dL/d{state}_t$" for state in states)
        return draw(panels, heading, f"norm of {each}{part}")

    def _read(self, name: str) -> None:
        rows = self._histories[name].read()
        if self.writer is None:
            return
        self._check_writer()
        for row in rows:
            place = f"{name}.l{row.layer}{'_reverse' if row.direction else ''}"
            for column in SCALARS:
                value = getattr(row, column)
                if math.isfinite(value):
                    self.writer.add_scalar(f"gradient_{column}/{place}", value, row.step)

    def _check_writer(self) -> None:
        if not callable(getattr(self.writer, "add_scalar", None)):
            kind = type(self.writer).__name__
            raise TypeError(f"writer: given {kind}, wanted a SummaryWriter (with add_scalar)")
        if _is_closed(self.writer):
            raise ValueError("writer: given a closed one, wanted an open SummaryWriter")


def _that_calls_hooks(optimizer) -> Optimizer:
    """``optimizer`` if it takes hooks, else the one torch.optim.Optimizer that it holds. (A wrapper
    may inherit from Optimizer and never run its constructor.)

    Raises:
        TypeError: it holds no such optimizer, or several.
    """
    why = _why_no_hooks(optimizer)
    if not why:
        return optimizer
    named = getattr(optimizer, "optimizer", None)  # may be a property
    held = {id(one): one for one in (named, *getattr(optimizer, "__dict__", {}).values())}
    held = [one for one in held.values() if isinstance(one, Optimizer)]
    if len(held) == 1 and held[0] is not optimizer:
        return _that_calls_hooks(held[0])
    kind = type(optimizer).__name__
    wanted = "wanted a torch.optim.Optimizer or None"
    if not isinstance(optimizer, Optimizer) and not held:
        raise TypeError(f"optimizer: given {kind}, {wanted}")
    raise TypeError(
        f"optimizer: given {kind}, which takes no hooks ({why}) and holds {len(held)} optimizers, "
        f"{wanted} and a call of step() after each step"
    )


def _why_no_hooks(optimizer) -> str:
    """The reason why the optimizer takes no hooks; "" where it does."""
    try:
        optimizer.register_step_pre_hook(_nothing).remove()
        optimizer.register_step_post_hook(_nothing).remove()
    except AttributeError as error:
        return str(error)
    return ""


def _nothing(*_) -> None:
    """A hook to try."""


def _is_closed(writer) -> bool:
    """Whether a SummaryWriter is closed. Its add_scalar would begin another file."""
    return getattr(writer, "file_writer", writer) is None


def tracked_rnns(model: nn.Module) -> dict[str, Stack]:
    """Every RNN, LSTM and GRU of rnnfast in a model, once, by its first name there without the
    names of wrappers.

    Raises:
        TypeError: the model is no module.
        ValueError: it has none of them, or one that does not record.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: given {type(model).__name__}, wanted a torch.nn.Module")
    parallel = DistributedDataParallel, DataParallel
    around = {path for path, module in model.named_modules() if isinstance(module, parallel)}
    modules = model.named_modules()
    found = {_plain_name(path, around): m for path, m in modules if isinstance(m, Stack)}
    if not found:
        hint = ""
        theirs = [type(m).__name__ for m in model.modules() if isinstance(m, tuple(TWINS))]
        if theirs:
            converted = "rnnfast.replace(model, track_gradient_flow=True)"
            hint = f"; {converted} makes one of its nn.{theirs[0]}"
        raise ValueError(f"model: given one without any RNN, LSTM or GRU of rnnfast{hint}")
    silent = [name for name, rnn in found.items() if not rnn.track_gradient_flow]
    if silent:
        raise ValueError(
            f"model: {', '.join(silent)} does not record its gradient; make it with "
            "track_gradient_flow=True, or set that attribute to True before the training"
        )
    return found


def _plain_name(path: str, around: set[str]) -> str:
    """``path`` without the names of wrappers.

    Args:
        around: paths of the wrappers that call their model "module".
    """
    parts = path.split(".")
    own = [
        part
        for i, part in enumerate(parts)
        if part not in WRAPPERS and not (part == "module" and ".".join(parts[:i]) in around)
    ]
    return ".".join(own) or "model"


def _gathered(own: list[_Attempt], group) -> list[list[_Attempt]]:
    """The attempts of each rank."""
    ranks: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(ranks, own, group=group)
    return ranks

"""A layer, or its recurrence alone, as two opaque ops and one autograd.Function around them.

torch.compile sees ``rnnfast::rnn`` and ``rnnfast::rnn_backward``, never the kernels. torch.export
and torch.jit.trace record ``rnnfast::rnn`` alone, which brings the Function with it. Second
derivatives, forward mode and torch.func transforms, which no kernel defines, take the formulas
of the reference, which PyTorch differentiates.

The input projection is inside: as operations of their own it and its gradients take longer to call
than a short sequence takes to compute.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from .backends import BACKENDS, reference
from .cells import CELLS
from .graph import flops, onnx
from .graph.registry import Ops
from .recurrence import precision, record
from .recurrence.checks import check_backward
from .recurrence.clipping import in_transform
from .recurrence.groups import (
    Gradients,
    Kept,
    Options,
    OutputGradients,
    Results,
    Rows,
    Saved,
    States,
    Wanted,
    Weights,
)
from .recurrence.tensors import empty_gradients, empty_results
from .tracing import makes_program

# ------------------------------------------------------------------- groups, and the ops' tensors
#
# An op takes loose tensors: torch.jit.trace and vmap refuse lists of optional ones. The order is
# that of the groups and their fields, written down here alone.

LAYER = Weights, States, Rows  # after x
KEPT = Weights, States, Rows, Saved  # after x and y
PLACEHOLDERS = {"h": "h_0", "c": "c_0"}  # names of a first state among an op's arguments


def _fields(*groups: type, prefix: str = "") -> Iterator[str]:
    """The arguments of an op's schema."""
    for group in groups:
        for name, annotation in group.__annotations__.items():
            kind = "Tensor?" if "None" in str(annotation) else "Tensor"
            yield f"{kind} {prefix}{PLACEHOLDERS.get(name, name) if not prefix else name}"


def _taker(first: int, *groups: type) -> Callable[[Sequence], list]:
    """Takes groups out of tensors, of which theirs begin at ``first``. As ``group._make``, which
    takes three times as long, and a small call has microseconds."""
    ends = itertools.accumulate((len(group._fields) for group in groups), initial=first)
    parts = [(group, slice(*span)) for group, span in zip(groups, itertools.pairwise(ends))]
    new = tuple.__new__

    def take(tensors: Sequence) -> list:
        return [new(group, tensors[part]) for group, part in parts]

    return take


_library = Ops("rnnfast")
_OPTIONS = (
    "str cell, int directions, int heads, float norm_eps, int? bptt_window, float? clip_state_grad,"
    " bool per_sample, bool saves, bool all_cells, str backend"
)
# An empty tensor stands for a result that does not exist, or is not wanted. Forward passes the
# record on to its backward and does not write it.
_RESULTS = ", ".join(["Tensor"] * (2 + len(States._fields) + len(Saved._fields)))
_library.define(
    f"rnn(Tensor x, {', '.join(_fields(*LAYER))}, Tensor? record, {_OPTIONS}) -> ({_RESULTS})"
)
# Two ops, because vmap refuses an op that writes an argument.
_GRADIENTS = ", ".join(["Tensor"] * (1 + len(Weights._fields) + len(States._fields)))
for _name, _record in (("rnn_backward", ""), ("rnn_backward_recorded", " Tensor(a!) record,")):
    _library.define(
        f"{_name}(Tensor? grad_y, {', '.join(_fields(States, prefix='grad_'))},"
        " Tensor? grad_cells, Tensor? x,"
        f" Tensor y, {', '.join(_fields(*KEPT))},{_record} bool dx_wanted, bool dw_wanted,"
        f" {_OPTIONS}) -> ({_GRADIENTS})"
    )


_take_layer = _taker(1, *LAYER)  # x comes first
_LAYER_END = 1 + sum(len(group._fields) for group in LAYER)
_X = 2 + len(States._fields)  # in backward: after the gradients of y, of states and of cells
_take_gradients = _taker(1, States)
_take_kept = _taker(_X + 2, *KEPT)
_KEPT_END = _X + 2 + sum(len(group._fields) for group in KEPT)
_take_results = _taker(1, States, Saved)
_take_found = _taker(1, Weights, States)


def _backward_inputs(inputs: Sequence) -> tuple[OutputGradients, Kept]:
    """Groups the arguments of the backward op."""
    given = OutputGradients(inputs[0], *_take_gradients(inputs), inputs[_X - 1])
    return given, Kept(*inputs[_X : _X + 2], *_take_kept(inputs))


def _flat(found: Results | Gradients) -> tuple[Tensor | None, ...]:
    first, second, third, *cells = found
    return first, *second, *third, *cells


def _flat_kept(given: OutputGradients, kept: Kept) -> tuple[Tensor | None, ...]:
    groups = itertools.chain(kept.weights, kept.states, kept.rows, kept.saved)
    return given.y, *given.states, given.cells, kept.x, kept.y, *groups


# --------------------------------------------------------------------------------------- the ops


def _rnn(*inputs):
    x, weights, states, rows = inputs[0], *_take_layer(inputs)
    *settings, backend = inputs[_LAYER_END + 1 :]
    options = Options(*settings)
    if x.shape[0] == 0:  # a program that was made for other sizes
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    with torch._C._DisableAutocast():  # it leaks into op bodies
        found = _flat(BACKENDS[backend].forward(x, weights, states, rows, options))
    if backend == "reference":
        found = _laid_out(found, _flat(empty_results(x, weights, options)))
    return _with_empty(x, found)


def _rnn_backward(*inputs):
    return _rnn_backward_recorded(*inputs[:_KEPT_END], None, *inputs[_KEPT_END:])


def _rnn_backward_recorded(*inputs):
    given, kept = _backward_inputs(inputs)
    buffer, dx_wanted, dw_wanted, *settings, backend = inputs[_KEPT_END:]
    _check_devices_of_saved(given, kept, buffer)
    wanted = Wanted(dx_wanted, dw_wanted)
    with torch._C._DisableAutocast():
        found = _backward(BACKENDS[backend], given, kept, buffer, wanted, Options(*settings))
    found = _flat(found)
    if backend == "reference":
        found = _laid_out(found, _flat(empty_gradients(kept, wanted, Options(*settings))))
    return _with_empty(kept.y, found)


def eager_forward(*inputs) -> tuple[Tensor, ...]:
    """As the op ``rnn``, in torch's own ops."""
    options = Options(*inputs[_LAYER_END + 1 : -1])
    found = reference.forward(inputs[0], *_take_layer(inputs), options)
    return _with_empty(inputs[0], _flat(found))


def eager_backward(*inputs) -> tuple[Tensor, ...]:
    """As the op ``rnn_backward``, in torch's own ops."""
    given, kept = _backward_inputs(inputs)
    dx_wanted, dw_wanted, *settings = inputs[_KEPT_END:-1]
    wanted, options = Wanted(dx_wanted, dw_wanted), Options(*settings)
    return _with_empty(kept.y, _flat(reference.backward(given, kept, None, wanted, options)))


def _rnn_shapes(*inputs):
    x, options = inputs[0], Options(*inputs[_LAYER_END + 1 : -1])
    weights, *_ = _take_layer(inputs)
    return _with_empty(x, _flat(empty_results(x, weights, options)))


def _rnn_backward_shapes(*inputs):
    return _rnn_backward_recorded_shapes(*inputs[:_KEPT_END], None, *inputs[_KEPT_END:])


def _rnn_backward_recorded_shapes(*inputs):
    given, kept = _backward_inputs(inputs)
    buffer, dx_wanted, dw_wanted, *settings = inputs[_KEPT_END:-1]
    _check_devices_of_saved(given, kept, buffer)
    wanted = Wanted(dx_wanted, dw_wanted)
    return _with_empty(kept.y, _flat(empty_gradients(kept, wanted, Options(*settings))))


def _laid_out(
    found: tuple[Tensor | None, ...], promised: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The results with the strides that a graph was built on."""
    pairs = zip(found, promised, strict=True)
    return tuple(x if e is None or x.stride() == e.stride() else e.copy_(x) for x, e in pairs)


def _with_empty(like: Tensor, found: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if x is None else x for x in found)


for _name, _body, _shapes in (
    ("rnn", _rnn, _rnn_shapes),
    ("rnn_backward", _rnn_backward, _rnn_backward_shapes),
    ("rnn_backward_recorded", _rnn_backward_recorded, _rnn_backward_recorded_shapes),
):
    _library.impl(_name, _body, "CompositeExplicitAutograd")
    _library.register_fake(_name, _shapes)
flops.register()

_TYPES = {Tensor, nn.Parameter}
# Dispatch keys of a plain tensor on the CPU: no wrapper of a transform, no pending negation, no
# zeros without memory.
with torch.inference_mode():
    _KEYS = {torch._C._dispatch_keys(torch.empty(0)).raw_repr()}
_KEYS.add(torch._C._dispatch_keys(torch.empty(0)).raw_repr())


def _direct(*tensors: Tensor | None) -> bool:
    """Whether the dispatcher has nothing to do: then the backend is called without it, which saves
    a quarter of a small call. A profiler learns the names of ops from the dispatcher."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
    ):
        return False
    keys = torch._C._dispatch_keys
    for x in tensors:
        if x is not None and (type(x) not in _TYPES or keys(x).raw_repr() not in _KEYS):
            return False
    return True


def _backward(
    backend,
    given: OutputGradients,
    kept: Kept,
    buffer: Tensor | None,
    wanted: Wanted,
    options: Options,
    **more,
) -> Gradients:
    """A backend's backward, with the part of the record's buffer that it fills.

    Raises:
        RuntimeError: tensors that do not fit together, whose memory a kernel would read past.
    """
    check_backward(given, kept, options)
    if buffer is not None:
        T, B, _ = kept.y.shape
        N = B if options.per_sample else 1
        buffer = record.begin(buffer, options.directions, T, N, kept.y.dtype)
    return backend.backward(given, kept, buffer, wanted, options, **more)


_BATCHED = torch._C._parse_dispatch_key("Batched")


def _mapped(*gradients: Tensor | None) -> bool:
    """Whether autograd sends many gradients back at a time (is_grads_batched): it has a rule of its
    own, older than torch.func.vmap, for operations that write nothing."""
    if torch.compiler.is_compiling():
        return False
    keys = torch._C._dispatch_keys
    return any(x is not None and keys(x).has(_BATCHED) for x in gradients)


_STATES, _WEIGHTS = len(States._fields), len(Weights._fields)
_OF_WEIGHTS = slice(1, 1 + _WEIGHTS)  # among the inputs of the Function
_take_saved = _taker(2, *KEPT)  # x and y come first
_NOTHING = Saved()
# In the place of gradients of Rows, of the record's buffer, of Options, and of where to compute.
_NO_MORE = (None,) * (len(Rows._fields) + 4)


class _Layer(torch.autograd.Function):
    """Inputs: x, Weights, States and Rows as loose tensors, the record's buffer, Options, and where
    to compute. ahat and rstd are outputs, so that a second derivative finds the way through them.
    """

    @staticmethod
    def forward(ctx, *inputs):
        x, weights, states, rows = inputs[0], *_take_layer(inputs)
        buffer, options, backend, direct = inputs[_LAYER_END:]
        call = BACKENDS[backend].forward if direct else functools.partial(_op, backend)
        y, states_n, saved, cells = call(x, weights, states, rows, options)
        if weights.w_ih is None or True not in ctx.needs_input_grad[_OF_WEIGHTS]:
            x = None
        w_ih, _, _, *own = weights  # backward does not read the biases
        ctx.save_for_backward(x, y, w_ih, None, None, *own, *states, *rows, *saved)
        # The buffer is not saved, because every backward pass writes it.
        ctx.call = buffer, options, backend, (y.shape, weights.w_hh.shape)
        ctx.set_materialize_grads(False)
        results = y, *states_n, cells
        return (*results, *saved) if _any(saved) else results

    @staticmethod
    def backward(ctx, grad_y, *grads):
        """grads: of the states, of cells, and of Saved where forward returned it."""
        of_states, grad_cells, *of_saved = States(*grads[:_STATES]), *grads[_STATES:]
        grad_saved = Saved(*of_saved) if _any(of_saved) else _NOTHING
        needs = ctx.needs_input_grad
        if grad_y is None and not _any(grads):
            return (None,) * len(needs)
        if torch.compiler.is_compiling():  # it has zeros for them, no second derivatives
            grad_saved = _NOTHING
        tensors = ctx.saved_tensors  # once: checkpointing allows no second look
        x, y, weights, states, rows, saved = *tensors[:2], *_take_saved(tensors)
        *_, shapes = ctx.call
        if (y.shape, weights.w_hh.shape) != shapes:  # check_backward compares others with these
            raise RuntimeError(
                f"saved output and weight_hh: given shapes {tuple(y.shape)} and "
                f"{tuple(weights.w_hh.shape)}, wanted {tuple(map(tuple, shapes))}"
            )
        given = OutputGradients(grad_y, of_states, grad_cells)
        kept = Kept(x, y, weights, states, rows, saved)
        wanted = Wanted(needs[0], True in needs[_OF_WEIGHTS])
        direct = _direct(grad_y, *of_states, grad_cells, *tensors)
        dx, of_weights, of_states = _gradients(ctx, given, kept, wanted, direct, grad_saved)
        gradients = (dx, *of_weights, *of_states)
        found = [g if need else None for g, need in zip(gradients, needs)]
        return *found, *_NO_MORE


def _any(values: Sequence[Tensor | None]) -> bool:
    return any(value is not None for value in values)


def _gradients(
    ctx,
    given: OutputGradients,
    kept: Kept,
    wanted: Wanted,
    direct: bool,
    grad_saved: Saved,
) -> Gradients:
    """By the way that fits: the eager formula where it will be differentiated again, the kernel
    where the dispatcher has nothing to do, an op otherwise."""
    buffer, options, backend, _ = ctx.call
    transformed = in_transform()
    if buffer is not None and (transformed or _mapped(given.y, *given.states, given.cells)):
        buffer = None
    if grad_saved is not _NOTHING or torch.is_grad_enabled() or transformed:
        with precision.no_autocast(kept.y.device.type):
            more = {"grad_saved": grad_saved}
            return _backward(reference, given, kept, buffer, wanted, options, **more)
    if direct:
        return _backward(BACKENDS[backend], given, kept, buffer, wanted, options)
    tensors = _flat_kept(given, kept)
    if buffer is None:
        found = torch.ops.rnnfast.rnn_backward(*tensors, *wanted, *options, backend)
    else:
        op = torch.ops.rnnfast.rnn_backward_recorded
        found = op(*tensors, buffer, *wanted, *options, backend)
    return Gradients(found[0], *_take_found(found))


def _op(
    backend: str, x: Tensor, weights: Weights, states: States, rows: Rows, options: Options
) -> Results:
    """A backend's forward, through the dispatcher."""
    found = torch.ops.rnnfast.rnn(x, *weights, *states, *rows, None, *options, backend)
    return _results(found, weights, options)


def _results(found: Sequence[Tensor], weights: Weights, options: Options) -> Results:
    """The results of the op, without the empty tensors that stand for none."""
    cell = CELLS[options.cell]
    states, (values, ahat, rstd) = _take_results(found)
    states = States(*(s if n in cell.states else None for n, s in zip(States._fields, states)))
    saved = Saved(values if cell.saved and options.saves else None)
    if weights.gamma is not None:
        saved = saved._replace(ahat=ahat, rstd=rstd)
    return Results(found[0], states, saved, found[-1] if options.all_cells else None)


def _differentiable(*inputs):
    """The op where autograd sees it: in a program, inside transforms of it, too."""
    x, weights, states, rows = inputs[0], *_take_layer(inputs)
    buffer, *settings, backend = inputs[_LAYER_END:]
    options = Options(*settings)
    if onnx.is_exporting():
        y, *last = onnx.node(x, weights, states, rows, options)
        found = y, *last, *[None] * (1 + _STATES - len(last) + len(Saved._fields))
    elif in_transform():
        with precision.no_autocast(x.device.type):
            found = _flat(reference.forward(x, weights, states, rows, options))
    elif torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
        found = _Layer.apply(*inputs[:_LAYER_END], buffer, options, backend, False)
        y, states, cells, *saved = found[0], found[1 : 1 + _STATES], *found[1 + _STATES :]
        found = y, *states, *(saved or _NOTHING), cells
    else:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.rnnfast.rnn(*inputs)
    return _with_empty(x, found)


_library.impl("rnn", _differentiable, "Autograd")

# torch.autograd.Function.apply also unwraps what a finished transform has left behind, and looks
# for a setup_context; that takes longer than the call itself.
_apply = super(torch.autograd.Function, _Layer).apply


def layer(
    x: Tensor,
    weights: Weights,
    states: States,
    rows: Rows,
    buffer: Tensor | None,
    options: Options,
    backend: str,
) -> tuple[Tensor, States, Tensor | None]:
    """y [T, B, D * H], the last states, and with ``options.all_cells`` c of all steps, of one
    layer, all its directions.

    Args:
        x: [T, B, I], or with ``weights.w_ih`` None the input projection p [T, B, D * G * H].
        buffer: of :mod:`rnnfast.recurrence.record`, large enough, for each backward pass to
            fill; or None. Transforms leave it as it is.
    """
    direct = _direct(x, *weights, *states, *rows)
    program = not direct and makes_program()
    unrolled = backend == "reference" and buffer is None and not program
    if unrolled or in_transform():
        with precision.no_autocast(x.device.type):
            y, last, _, cells = reference.forward(x, weights, states, rows, options)
            return y, last, cells
    if not direct:
        _check_devices(x, *weights, *states)
    if program:
        onnx.refuse_old_exporter()
        inputs = x, *weights, *states, *rows, buffer
        found = torch.ops.rnnfast.rnn(*inputs, *options, backend)
        y, last, _, cells = _results(found, weights, options)
        return y, last, cells
    if not torch.is_grad_enabled():
        if CELLS[options.cell].saved:
            options = options._replace(saves=False)
        call = BACKENDS[backend].forward if direct else functools.partial(_op, backend)
        y, last, _, cells = call(x, weights, states, rows, options)
        return y, last, cells
    apply = _apply if direct else _Layer.apply
    y, *found = apply(x, *weights, *states, *rows, buffer, options, backend, direct)
    return y, States(*found[:_STATES]), found[_STATES]


# Names in messages.
_NAMES = {
    "w_ih": "weight_ih", "b_ih": "bias_ih", "b_hh": "bias_hh", "w_hh": "weight_hh",
    "gamma": "norm_weight", "beta": "norm_bias", "h": "h_0", "c": "c_0",
}  # fmt: skip
_OF_STATES = ["gradient of h_n", "gradient of c_n"]


def _check_devices_of_saved(given: OutputGradients, kept: Kept, buffer: Tensor | None) -> None:
    """Hooks on saved tensors may move them. (A call without the dispatcher has all on the CPU.)

    Raises:
        RuntimeError: tensors on different devices.
    """
    groups = kept.weights, kept.states, kept.rows, kept.saved
    named = [
        ("gradient of output", given.y),
        *zip(_OF_STATES, given.states),
        ("gradient of the cell states", given.cells),
        ("saved output", kept.y),
        ("saved input", kept.x),
        *((f"saved {_NAMES.get(n, n)}", x) for group in groups for n, x in group._asdict().items()),
        ("record", buffer),
    ]
    there = [(name, x.device) for name, x in named if x is not None]
    wanted = there[0][1]
    for name, device in there:
        if device != wanted:
            raise RuntimeError(
                f"{name}: given a tensor on {device}, wanted {wanted} as the {there[0][0]} is"
            )


def _check_devices(x: Tensor, *others: Tensor | None) -> None:
    """The dispatcher would take a "meta" weight for a call without values."""
    for value in others:
        if value is not None and value.device != x.device:
            raise RuntimeError(
                "Input and parameter tensors are not at the same device, found input tensor at "
                f"{x.device} and parameter tensor at {value.device}"
            )

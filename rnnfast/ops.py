"""A layer, or its recurrence alone, as two opaque ops and one autograd.Function around them.

torch.compile sees ``rnnfast::rnn`` and ``rnnfast::rnn_backward``, never the kernels. torch.export
and torch.jit.trace record ``rnnfast::rnn`` alone, which brings the Function with it. What a kernel
does not define (second derivatives, forward mode, torch.func transforms) takes the formulas of
the reference, which PyTorch differentiates.

The input projection is inside: as operations of their own it and its gradients take longer to call
than a short sequence takes to compute.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .backends import BACKENDS, reference
from .cells.rnn import Options, directions, in_transform
from .compiler import makes_program
from .graph import flops, onnx
from .graph.registry import Ops
from .recurrence import precision, record
from .recurrence.tensors import check_backward, empty_gradients, empty_results

_library = Ops("rnnfast")
_OPTIONS = (
    "str nonlinearity, int heads, float norm_eps, int? bptt_window, float? clip_state_grad,"
    " bool per_sample, str backend"
)
# An empty tensor in the place of a result that is not there, or not wanted. Forward leaves the
# record as it is, for its backward to write.
_library.define(
    "rnn(Tensor x, Tensor? w_ih, Tensor? b_ih, Tensor? b_hh, Tensor w_hh, Tensor? gamma,"
    f" Tensor? beta, Tensor? h_0, Tensor? lengths, Tensor? reset, Tensor? record, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
# Two of them: an op that writes an argument is one that vmap refuses.
for _name, _record in (("rnn_backward", ""), ("rnn_backward_recorded", " Tensor(a!) record,")):
    _library.define(
        f"{_name}(Tensor? grad_y, Tensor? grad_h_n, Tensor y, Tensor? x, Tensor? w_ih, Tensor w_hh,"
        " Tensor? gamma, Tensor? beta, Tensor? ahat, Tensor? rstd, Tensor? h_0, Tensor? lengths,"
        f" Tensor? reset,{_record} bool dx_wanted, bool dw_wanted, {_OPTIONS})"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    )


def _rnn(*inputs):
    *tensors, backend = inputs
    if tensors[0].shape[0] == 0:  # a program that was made for other sizes
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    with torch._C._DisableAutocast():  # it leaks into op bodies
        found = BACKENDS[backend].forward(*tensors[:10], Options(*tensors[11:]))
    if backend == "reference":
        x, w_hh, gamma, heads = (tensors[i] for i in (0, 4, 5, 12))
        found = _laid_out(found, empty_results(x, w_hh, gamma, heads))
    return _with_empty(tensors[0], found)


def _rnn_backward(*inputs):
    return _rnn_backward_recorded(*inputs[:13], None, *inputs[13:])


def _rnn_backward_recorded(*inputs):
    *tensors, backend = inputs
    _check_devices_of_saved(*tensors[:14])
    with torch._C._DisableAutocast():
        gradients = _backward(BACKENDS[backend], *tensors[:16], Options(*tensors[16:]))
    if backend == "reference":
        y, w_ih, w_hh, gamma, h_0, *wanted = (tensors[i] for i in (2, 4, 5, 6, 10, 14, 15))
        gradients = _laid_out(gradients, empty_gradients(y, w_ih, w_hh, gamma, h_0, *wanted))
    return _with_empty(tensors[2], gradients)


def eager_forward(*inputs) -> tuple[Tensor, ...]:
    """As the op ``rnn``, in torch's own ops."""
    return _with_empty(inputs[0], reference.forward(*inputs[:10], Options(*inputs[11:-1])))


def eager_backward(*inputs) -> tuple[Tensor, ...]:
    """As the op ``rnn_backward``, in torch's own ops."""
    options = Options(*inputs[15:-1])
    return _with_empty(inputs[2], reference.backward(*inputs[:13], None, *inputs[13:15], options))


def _rnn_shapes(x, w_ih, b_ih, b_hh, w_hh, gamma, beta, h_0, lengths, reset, record, *options):
    return _with_empty(x, empty_results(x, w_hh, gamma, options[1]))


def _rnn_backward_shapes(*inputs):
    return _rnn_backward_recorded_shapes(*inputs[:13], None, *inputs[13:])


def _rnn_backward_recorded_shapes(
    grad_y, grad_h_n, y, x, w_ih, w_hh, gamma, beta, ahat, rstd, h_0, lengths, reset, record, *rest
):
    saved = x, w_ih, w_hh, gamma, beta, ahat, rstd, h_0, lengths, reset, record
    _check_devices_of_saved(grad_y, grad_h_n, y, *saved)
    return _with_empty(y, empty_gradients(y, w_ih, w_hh, gamma, h_0, *rest[:2]))


def _laid_out(
    found: tuple[Tensor | None, ...], promised: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """What was found, with the strides that a graph was built on."""
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
# What a tensor is, as the dispatcher sees it: memory on the CPU and nothing more. No wrapper of a
# transform, no pending negation, no zeros without memory.
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


def _backward(backend, *inputs, **more) -> tuple[Tensor | None, ...]:
    """A backend's, which gets the part of the record's buffer that it fills.

    Raises:
        RuntimeError: tensors that do not fit together, whose memory a kernel would read past.
    """
    *before, buffer, dx_wanted, dw_wanted, options = inputs
    check_backward(*before, options.heads)
    if buffer is not None:
        y, w_hh = inputs[2], inputs[5]
        T, B, _ = y.shape
        N = B if options.per_sample else 1
        buffer = record.begin(buffer, directions(w_hh), T, N, y.dtype)
    return backend.backward(*before, buffer, dx_wanted, dw_wanted, options, **more)


_BATCHED = torch._C._parse_dispatch_key("Batched")


def _mapped(*gradients: Tensor | None) -> bool:
    """Whether autograd sends many gradients back at a time (is_grads_batched): it has a rule of its
    own, older than torch.func.vmap, for operations that write nothing."""
    if torch.compiler.is_compiling():
        return False
    keys = torch._C._dispatch_keys
    return any(x is not None and keys(x).has(_BATCHED) for x in gradients)


class _Layer(torch.autograd.Function):
    """Inputs: eight that have gradients, lengths, reset, the record's buffer, Options, and where
    to compute. ahat and rstd are outputs, so that a second derivative finds the way through them.
    """

    @staticmethod
    def forward(ctx, *inputs):
        *tensors, buffer, options, backend, direct = inputs
        y, h_n, ahat, rstd = _call(tensors, options, backend, direct)
        x, w_ih, _, _, w_hh, gamma, beta, h_0, lengths, reset = tensors
        kept = x if w_ih is not None and any(ctx.needs_input_grad[1:7]) else None
        saved = (y, kept, w_ih, w_hh, gamma, beta, ahat, rstd, h_0, lengths, reset)
        ctx.save_for_backward(*saved)
        ctx.buffer = buffer  # not saved: it is there to be written, by each backward anew
        ctx.options, ctx.backend = options, backend
        ctx.shapes = y.shape, w_hh.shape
        ctx.set_materialize_grads(False)
        return (y, h_n) if gamma is None else (y, h_n, ahat, rstd)

    @staticmethod
    def backward(ctx, grad_y, grad_h_n, grad_ahat=None, grad_rstd=None):
        second = grad_ahat is not None or grad_rstd is not None
        if grad_y is None and grad_h_n is None and not second:
            return (None,) * 14
        if second and torch.compiler.is_compiling():  # it has zeros for them, no second derivatives
            grad_ahat, grad_rstd, second = None, None, False
        saved = ctx.saved_tensors  # once: checkpointing allows no second look
        if (saved[0].shape, saved[3].shape) != ctx.shapes:  # all else is compared with these
            raise RuntimeError(
                f"saved output and weight_hh: given shapes {tuple(saved[0].shape)} and "
                f"{tuple(saved[3].shape)}, wanted {tuple(map(tuple, ctx.shapes))}"
            )
        needs = ctx.needs_input_grad
        buffer = ctx.buffer
        if buffer is not None and (in_transform() or _mapped(grad_y, grad_h_n)):
            buffer = None
        inputs = (grad_y, grad_h_n, *saved, buffer, needs[0], any(needs[1:7]))
        if second or torch.is_grad_enabled() or in_transform():
            with precision.no_autocast(saved[0].device.type):
                more = {"grad_ahat": grad_ahat, "grad_rstd": grad_rstd}
                gradients = _backward(reference, *inputs, ctx.options, **more)
        elif _direct(grad_y, grad_h_n, *saved):
            gradients = _backward(BACKENDS[ctx.backend], *inputs, ctx.options)
        elif buffer is None:
            inputs = (*inputs[:13], *inputs[14:])
            gradients = torch.ops.rnnfast.rnn_backward(*inputs, *ctx.options, ctx.backend)
        else:
            gradients = torch.ops.rnnfast.rnn_backward_recorded(*inputs, *ctx.options, ctx.backend)
        wanted = [g if need else None for g, need in zip(gradients, needs)]
        return *wanted, None, None, None, None, None, None


def _call(
    inputs: tuple, options: Options, backend: str, direct: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    if direct:
        return BACKENDS[backend].forward(*inputs, options)
    y, h_n, ahat, rstd = torch.ops.rnnfast.rnn(*inputs, None, *options, backend)
    return (y, h_n, None, None) if inputs[5] is None else (y, h_n, ahat, rstd)


def _differentiable(*inputs):
    """The op where autograd sees it: in a program, inside transforms of it, too."""
    *tensors, backend = inputs
    if onnx.is_exporting():
        *layer_inputs, _, h_0, lengths, reset = tensors[:10]
        found = (*onnx.node(*layer_inputs, h_0, lengths, reset, Options(*tensors[11:])), None, None)
    elif in_transform():
        with precision.no_autocast(inputs[0].device.type):
            found = reference.forward(*tensors[:10], Options(*tensors[11:]))
    elif torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
        found = _Layer.apply(*tensors[:11], Options(*tensors[11:]), backend, False)
        found = (*found, None, None)[:4]
    else:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.rnnfast.rnn(*inputs)
    return _with_empty(inputs[0], found)


_library.impl("rnn", _differentiable, "Autograd")

# torch.autograd.Function.apply also unwraps what a finished transform has left behind, and looks
# for a setup_context; that takes longer than the call itself.
_apply = super(torch.autograd.Function, _Layer).apply


def layer(
    x: Tensor,
    w_ih: Tensor | None,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hh: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    h_0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    buffer: Tensor | None,
    options: Options,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """y [T, B, D * H] and h_n [D, B, H] of one layer, all its directions.

    Args:
        x: [T, B, I], or with w_ih None the input projection p [T, B, D * H].
        w_ih: [D * H, I] or None.
        b_ih, b_hh: [D * H] or both None.
        w_hh: [D, H, H / heads]; or [H, H / heads], D = 1.
        gamma, beta: [D * H], float32 for dtypes narrower than that; or None.
        h_0: [D, B, H] or None for zeros.
        lengths: [B] int64 or None.
        reset: [T, B] bool or None.
        buffer: of :mod:`rnnfast.recurrence.record`, large enough, for each backward pass to
            fill; or None. Transforms leave it as it is.
    """
    inputs = (x, w_ih, b_ih, b_hh, w_hh, gamma, beta, h_0, lengths, reset)
    unrolled = backend == "reference" and buffer is None and not makes_program()
    if unrolled or in_transform():
        with precision.no_autocast(x.device.type):
            return reference.forward(*inputs, options)[:2]
    direct = _direct(*inputs)
    if not direct:
        _check_devices(*inputs[:8])
        if makes_program():
            onnx.refuse_old_exporter()
            return torch.ops.rnnfast.rnn(*inputs, buffer, *options, backend)[:2]
    if not torch.is_grad_enabled():
        return _call(inputs, options, backend, direct)[:2]
    apply = _apply if direct else _Layer.apply
    return apply(*inputs, buffer, options, backend, direct)[:2]


_GIVEN_BACK = (
    *("gradient of output", "gradient of h_n", "saved output", "saved input", "saved weight_ih"),
    *("saved weight_hh", "saved norm_weight", "saved norm_bias", "saved ahat", "saved rstd"),
    *("saved h_0", "saved lengths", "saved reset", "record"),
)


def _check_devices_of_saved(*given: Tensor | None) -> None:
    """Hooks on saved tensors may move them. (Where the dispatcher is passed by, all are on the
    CPU.)"""
    there = [(name, x.device) for name, x in zip(_GIVEN_BACK, given) if x is not None]
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

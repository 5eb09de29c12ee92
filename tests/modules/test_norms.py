"""The module's side of norm, num_heads, reset, bptt_window and clip_state_grad."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from twins import assert_same, assert_same_results, results

import rnnfast

# torch 2.13 raises these itself as it compiles; any other warning fails.
pytestmark = [
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]
NORMS = ["layer", "batch"]
OPTIONS = {  # more than nn.RNN has, each by itself and all at once
    "layer norm": {"norm": "layer"},
    "layer norm, no bias": {"norm": "layer", "bias": False},
    "batch norm": {"norm": "batch"},
    "heads": {"num_heads": 2},
    "window": {"bptt_window": 2},
    "clip": {"clip_state_grad": 0.5},
    "all": {"norm": "layer", "num_heads": 2, "bptt_window": 2, "clip_state_grad": 0.5},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
T, B, IN, H = 5, 3, 3, 4


def layer(backend: str = "auto", seed: int = 0, dtype=torch.float64, **options) -> rnnfast.RNN:
    """With a norm that does something."""
    torch.manual_seed(seed)
    rnn = rnnfast.RNN(IN, H, backend=backend, dtype=dtype, **options)
    with torch.no_grad():
        for name, x in rnn.named_parameters():
            if name.startswith("norm"):
                x.add_(torch.randn_like(x))
    return rnn


def normal(*shape: int, seed: int = 1, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def some_reset(T: int = T, B: int = B) -> Tensor:
    return torch.rand(T, B, generator=torch.Generator().manual_seed(2)) < 0.3


# ------------------------------------------------------------------- parameters and their life


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_parameters_of_a_norm(norm, bias, bidirectional):
    options = {"num_layers": 2, "bias": bias, "bidirectional": bidirectional}
    rnn = rnnfast.RNN(IN, H, norm=norm, **options)
    plain = nn.RNN(IN, H, **options)
    suffixes = [f"l{i}{d}" for i in range(2) for d in ["", "_reverse"][: 1 + bidirectional]]
    kinds = ["weight", "bias"][: 1 + bias]
    added = {f"norm_{kind}_{suffix}" for kind in kinds for suffix in suffixes}
    found = dict(rnn.named_parameters())
    assert set(found) == set(dict(plain.named_parameters())) | added
    for name in added:
        assert found[name].shape == (H,)
        assert torch.equal(found[name], torch.full((H,), float("weight" in name)))
    assert [[p.shape for p in w] for w in rnn.all_weights] == [
        [p.shape for p in w] for w in plain.all_weights
    ]
    listed = {id(p) for weights in rnn.all_weights for p in weights}
    assert not listed & {id(found[name]) for name in added}
    buffers = dict(rnn.named_buffers())
    kinds = ["running_mean", "running_var", "num_batches_tracked"] if norm == "batch" else []
    assert set(buffers) == {f"norm_{kind}_{suffix}" for kind in kinds for suffix in suffixes}
    for name, x in buffers.items():
        wanted = {"norm_running_mean": torch.zeros(H), "norm_running_var": torch.ones(H)}
        assert torch.equal(x, wanted.get(name.rpartition("_l")[0], torch.tensor(0)))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("init", ["torch", "orthogonal", "identity", "glorot", "he"])
def test_a_norm_draws_nothing(norm, init):
    torch.manual_seed(5)
    plain = rnnfast.RNN(IN, H, 2, bidirectional=True, init=init)
    after = torch.rand(3)
    torch.manual_seed(5)
    rnn = rnnfast.RNN(IN, H, 2, bidirectional=True, init=init, norm=norm)
    assert torch.equal(torch.rand(3), after)
    for name, x in plain.named_parameters():
        assert torch.equal(getattr(rnn, name), x)
    if init == "torch":
        torch.manual_seed(5)
        for name, x in nn.RNN(IN, H, 2, bidirectional=True).named_parameters():
            assert torch.equal(getattr(rnn, name), x)


@pytest.mark.parametrize("norm", NORMS)
def test_reset_parameters_starts_a_norm_again(own_backend, norm):
    rnn = layer(own_backend, norm=norm, bidirectional=True)
    rnn(normal(T, B, IN))
    fresh = rnnfast.RNN(IN, H, norm=norm, bidirectional=True, dtype=torch.float64)
    state = rnn.state_dict()
    assert not torch.equal(rnn.norm_weight_l0_reverse, fresh.norm_weight_l0_reverse)
    if norm == "batch":
        assert rnn.norm_num_batches_tracked_l0 == 1
    for seed, module in ((3, rnn), (3, fresh)):
        torch.manual_seed(seed)
        module.reset_parameters()
    for name, x in fresh.state_dict().items():
        assert torch.equal(state[name], x), name  # state shares the memory of rnn


@every_option
def test_what_a_module_is_survives_copies_and_casts(own_backend, options):
    rnn = layer(own_backend, num_layers=2, bidirectional=True, **options)
    rnn(normal(T, B, IN))  # running statistics are no longer what they were
    x, reset = normal(T, B, IN), some_reset()
    rnn.eval()
    wanted = results(rnn, x, reset=reset)
    loaded = layer(own_backend, seed=7, num_layers=2, bidirectional=True, **options).eval()
    assert not torch.equal(loaded(x, reset=reset)[0], wanted["output"])
    loaded.load_state_dict(rnn.state_dict())
    for twin in (loaded, copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))):
        assert all(torch.equal(v, wanted[n]) for n, v in results(twin, x, reset=reset).items())
        assert twin.state_dict().keys() == rnn.state_dict().keys()
        assert repr(twin) == repr(rnn)
    rnn.float()
    assert {v.dtype for v in rnn.state_dict().values()} <= {torch.float32, torch.int64}
    y, _ = rnn(x.float(), reset=reset)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in rnn.parameters())
    assert {v.dtype for v in rnn.to(torch.bfloat16).parameters()} == {torch.bfloat16}


def test_state_of_a_plain_module_lacks_the_norm():
    with pytest.raises(RuntimeError, match=r"Missing key.*norm_weight_l0"):
        rnnfast.RNN(IN, H, norm="layer").load_state_dict(rnnfast.RNN(IN, H).state_dict())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "3, 4"),
        ({"norm": "layer"}, "3, 4, norm='layer'"),
        ({"norm": "batch", "norm_eps": 1e-3}, "3, 4, norm='batch', norm_eps=0.001"),
        ({"num_heads": 2, "init": "identity"}, "3, 4, init='identity', num_heads=2"),
        (
            {"bptt_window": 5, "clip_state_grad": 0.5, "track_gradient_flow": "sample"},
            "3, 4, track_gradient_flow='sample', clip_state_grad=0.5, bptt_window=5",
        ),
    ],
)
def test_extra_repr(options, text):
    assert rnnfast.RNN(3, 4, **options).extra_repr() == text


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"norm": "layer"}, "norm"),
        ({"norm": "batch"}, "norm"),
        ({"num_heads": 2}, "num_heads"),
        ({"bptt_window": 2}, "bptt_window"),
        ({"clip_state_grad": 1.0}, "clip_state_grad"),
        ({"track_gradient_flow": True}, "track_gradient_flow"),
        ({"residual": True, "num_layers": 3}, "residual"),
    ],
)
def test_to_torch_refuses_what_torch_has_not(options, name):
    model = nn.ModuleDict({"plain": rnnfast.RNN(IN, H), "odd": rnnfast.RNN(IN, H, **options)})
    with pytest.raises(ValueError, match=f"^odd: nn.RNN has no {name}$"):
        rnnfast.to_torch(model, report=None)
    assert type(model["plain"]) is rnnfast.RNN, "nothing was changed"


# ----------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_shapes_of_heads(n, bidirectional):
    rnn = rnnfast.RNN(IN, H, 2, bidirectional=bidirectional, num_heads=n)
    plain = nn.RNN(IN, H, 2, bidirectional=bidirectional)
    for name, x in plain.named_parameters():
        shape = (H, H // n) if name.startswith("weight_hh") else x.shape
        assert getattr(rnn, name).shape == shape
    assert [n for n, _ in rnn.named_parameters()] == [n for n, _ in plain.named_parameters()]


def head_blocks(init: str, nonlinearity: str = "tanh") -> Tensor:
    """W_hh of 40 heads of 8 units: [40, 8, 8]."""
    rnn = rnnfast.RNN(IN, 320, num_heads=40, init=init, nonlinearity=nonlinearity)
    return rnn.weight_hh_l0.detach().view(40, 8, 8)


def test_init_of_each_head():
    eye = torch.eye(8)
    blocks = head_blocks("orthogonal").double()
    eps = torch.finfo(torch.float32).eps
    assert (blocks @ blocks.mT - eye).abs().max() <= 8 * eps
    assert torch.equal(head_blocks("identity"), eye.expand(40, 8, 8))
    # uniform within +-bound: of 64 draws, each head's largest is above 0.8 bound but once in 1e6
    for init, bound in (("glorot", (6 / 16) ** 0.5), ("torch", 320**-0.5)):
        largest = head_blocks(init).abs().amax((1, 2))
        assert (largest <= bound).all()
        assert (largest > 0.8 * bound).all()
    # normal: the sum of squares over the variance is chi-square of 2560, 5 deviations from the mean
    for f, gain in (("relu", 2**0.5), ("tanh", 5 / 3), ("sigmoid", 1.0), ("softplus", 2**0.5)):
        squares = head_blocks("he", f).square().sum() * 8 / gain**2
        assert abs(squares - 2560) <= 5 * (2 * 2560) ** 0.5


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("norm", [None, "layer"])
def test_heads_are_independent_recurrences_side_by_side(own_backend, norm, bidirectional):
    n, S = 3, 4
    options = {"norm": norm, "bidirectional": bidirectional, "backend": own_backend}
    options |= {"clip_state_grad": 0.5, "bptt_window": 2, "dtype": torch.float64}
    whole = rnnfast.RNN(IN, n * S, num_heads=n, **options)
    D = 2 if bidirectional else 1
    x, hx, reset = normal(T, B, IN), normal(D, B, n * S, seed=2), some_reset()
    grad_y, grad_h_n = normal(T, B, D, n, S, seed=3), normal(D, B, n, S, seed=4)
    lengths = [5, 0, 3]
    y, h_n = whole(x, hx, reset=reset, lengths=lengths)
    torch.autograd.backward([y, h_n], [grad_y.flatten(2), grad_h_n.flatten(2)])
    for k in range(n):
        one = rnnfast.RNN(IN, S, **options)
        rows = slice(k * S, (k + 1) * S)
        with torch.no_grad():
            for name, p in one.named_parameters():
                p.copy_(getattr(whole, name)[rows])
        y_k, h_k = one(x, hx[..., rows], reset=reset, lengths=lengths)
        torch.autograd.backward([y_k, h_k], [grad_y[..., k, :].flatten(2), grad_h_n[:, :, k]])
        assert_same(y.view(T, B, D, n, S)[..., k, :].flatten(2), y_k)
        assert_same(h_n[..., rows], h_k)
        for name, p in one.named_parameters():
            assert_same(getattr(whole, name).grad[rows], p.grad, name)


# ------------------------------------------------------------------------------- kinds of input


@every_option
def test_batch_first_unbatched_and_packed_agree(own_backend, options):
    rnn = layer(own_backend, bidirectional=True, num_layers=2, **options)
    first = layer(own_backend, bidirectional=True, num_layers=2, batch_first=True, **options)
    if options.get("norm") == "batch":  # its training depends on the whole batch
        rnn.eval(), first.eval()
    x, hx, reset = normal(T, B, IN), normal(4, B, H, seed=2), some_reset()
    y, h_n = rnn(x, hx, reset=reset)
    assert not torch.equal(y, rnn(x, hx)[0]), "reset does nothing"
    y_first, h_first = first(x.transpose(0, 1), hx, reset=reset.T)
    assert_same(y_first.transpose(0, 1), y)
    assert_same(h_first, h_n)
    for b in range(B):
        y_b, h_b = rnn(x[:, b], hx[:, b], reset=reset[:, b])
        assert_same(y_b, y[:, b])
        assert_same(h_b, h_n[:, b])
        assert_same(first(x[:, b], hx[:, b], reset=reset[:, b])[0], y_b)


@every_option
@pytest.mark.parametrize("lengths", [[5, 4, 2], [2, 5, 3]])
def test_a_packed_sequence_is_the_padded_one_with_lengths(own_backend, options, lengths):
    """reset goes by the samples as they were given, in whatever order they are packed."""
    rnn = layer(own_backend, bidirectional=True, num_layers=2, **options)
    twin = copy.deepcopy(rnn)
    x, hx, reset = normal(T, B, IN), normal(4, B, H, seed=2), some_reset()
    in_order = lengths == sorted(lengths, reverse=True)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=in_order)
    grads = normal(T, B, 2 * H, seed=3), normal(4, B, H, seed=4)
    out, h_packed = rnn(packed, hx, reset=reset)
    assert isinstance(out, PackedSequence)
    y_packed, _ = pad_packed_sequence(out)
    y, h_n = twin(x, hx, reset=reset, lengths=lengths)
    for pair in ((y_packed, h_packed), (y, h_n)):
        torch.autograd.backward(pair, grads)
    assert_same(y_packed, y)
    assert_same(h_packed, h_n)
    for (name, p), q in zip(rnn.named_parameters(), twin.parameters()):
        assert_same(p.grad, q.grad, name)
    for a, b in zip(rnn.buffers(), twin.buffers()):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_layers_residual_dropout_and_options_together(own_backend):
    """The same by hand, with functional.rnn."""
    options = {"norm": "layer", "num_heads": 2, "clip_state_grad": 0.5, "bptt_window": 2}
    rnn = layer(own_backend, num_layers=3, dropout=0.5, residual=True, **options)
    x, hx, reset = normal(T, B, IN), normal(3, B, H, seed=2), some_reset()
    lengths = [5, 0, 3]
    weights = dict(rnn.named_parameters())

    def by_hand(x: Tensor, hx: Tensor) -> tuple[Tensor, Tensor]:
        u, h_n = x, []
        for i in range(3):
            p = F.linear(u, weights[f"weight_ih_l{i}"], weights[f"bias_ih_l{i}"])
            y, h = rnnfast.functional.rnn(
                p + weights[f"bias_hh_l{i}"],
                weights[f"weight_hh_l{i}"],
                hx[i],
                lengths=lengths,
                reset=reset,
                num_heads=2,
                norm_weight=weights[f"norm_weight_l{i}"],
                norm_bias=weights[f"norm_bias_l{i}"],
                clip_state_grad=0.5,
                bptt_window=2,
                backend="reference",
            )
            h_n.append(h)
            dropped = F.dropout(y, 0.5)
            u = dropped + u if i else dropped  # the widths of layer 0 differ
        return y, torch.stack(h_n)

    found = []
    for call in (lambda x, hx: rnn(x, hx, lengths=lengths, reset=reset), by_hand):
        leaves = x.clone().requires_grad_(), hx.clone().requires_grad_()
        torch.manual_seed(11)
        y, h_n = call(*leaves)
        loss = (y * normal(T, B, H, seed=3)).sum() + h_n.square().sum()
        gradients = torch.autograd.grad(loss, [*leaves, *weights.values()])
        names = ["x", "hx", *weights]
        found.append({"y": y.detach(), "h_n": h_n.detach()} | dict(zip(names, gradients)))
    assert_same_results(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_in_16_bits_is_read_in_32(own_backend, dtype):
    """The same bits as with parameters of the same values in float32; their gradients rounded."""
    narrow = layer(own_backend, dtype=dtype, norm="layer")
    wide = copy.deepcopy(narrow)
    for name in ("norm_weight_l0", "norm_bias_l0"):
        setattr(wide, name, nn.Parameter(getattr(narrow, name).detach().float()))
    found = [results(rnn, normal(T, B, IN, dtype=dtype)) for rnn in (narrow, wide)]
    for name, value in found[0].items():
        assert value.dtype == dtype, name
        assert torch.equal(value, found[1][name].to(dtype)), name
    assert found[1]["d norm_weight_l0"].dtype == torch.float32
    p, w_hh = normal(T, B, H, dtype=dtype), narrow.weight_hh_l0.detach()
    norm = {"norm_weight": narrow.norm_weight_l0, "norm_bias": narrow.norm_bias_l0}
    call = rnnfast.functional.rnn
    y, _ = call(p, w_hh, **norm, backend=own_backend)
    wide_norm = {name: x.float() for name, x in norm.items()}
    assert torch.equal(y, call(p, w_hh, **wide_norm, backend=own_backend)[0])
    rounded = {name: x.float().round() for name, x in norm.items()}
    assert not torch.equal(y, call(p, w_hh, **rounded, backend=own_backend)[0])


@pytest.mark.parametrize("track", [False, True])
def test_layer_norm_and_the_other_options_compile_in_one_graph(own_backend, track):
    torch._dynamo.reset()
    options = {"num_heads": 2, "clip_state_grad": 0.5, "bptt_window": 2, "norm": "layer"}
    rnn = layer(own_backend, bidirectional=True, track_gradient_flow=track, **options)
    x, reset, lengths = normal(3, B, IN), some_reset(3), torch.tensor([3, 1, 2])
    wanted = results(rnn, x, reset=reset, lengths=lengths)
    call = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    y, h_n = call(x, reset=reset, lengths=lengths)
    generator = torch.Generator().manual_seed(7)
    grads = [torch.randn(v.shape, generator=generator, dtype=torch.float64) for v in (y, h_n)]
    names, parameters = zip(*rnn.named_parameters())
    found = torch.autograd.grad((y, h_n), parameters, grads)
    assert_same(y, wanted["output"])
    for name, gradient in zip(names, found):
        assert_same(gradient, wanted[f"d {name}"], name)
    torch._dynamo.reset()


def test_options_are_taken_in_every_combination(own_backend):
    """That none of them needs another, or is in its way."""
    x = normal(T, 2, IN)
    kinds = [None, "layer", "batch"], [1, 2], [None, 2], [None, 0.5], [False, True, "sample"]
    for norm, heads, window, clip, track in itertools.product(*kinds):
        rnn = layer(
            own_backend,
            norm=norm,
            num_heads=heads,
            bptt_window=window,
            clip_state_grad=clip,
            track_gradient_flow=track,
        )
        y, _ = rnn(x, reset=some_reset(T, 2))
        y.square().sum().backward()
        assert all(p.grad.count_nonzero() > 0 for p in rnn.parameters())
        if track:
            shape = (1, 1, T, 2) if track == "sample" else (1, 1, T)
            assert rnn.gradient_flow.state_norm.shape == shape

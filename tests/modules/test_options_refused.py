"""Options that cannot be: each is named, with what was given and what is wanted."""

from __future__ import annotations

import pytest
import torch

import rnnfast
from rnnfast.backends import BackendError

NOT_A_RESET = {
    "shape": (torch.zeros(3, 4, dtype=torch.bool), ValueError, r"\(3, 4\)"),
    "transposed": (torch.zeros(2, 4, dtype=torch.bool), ValueError, r"\(2, 4\)"),
    "one axis": (torch.zeros(4, dtype=torch.bool), ValueError, r"\(4,\)"),
    "int64": (torch.zeros(4, 2, dtype=torch.int64), ValueError, "torch.int64"),
    "float": (torch.zeros(4, 2), ValueError, "torch.float32"),
    "a list": ([[False, False]] * 4, TypeError, "list"),
    "a bool": (True, TypeError, "bool"),
}


@pytest.mark.parametrize("case", NOT_A_RESET)
def test_a_wrong_reset_is_refused(case, own_backend):
    reset, kind, given_ = NOT_A_RESET[case]
    wanted = (
        rf"reset: given {given_}.* wanted .*bool.* \[T, B\]"
        if kind is TypeError
        else (rf"reset: given .*{given_}.*, wanted torch.bool of shape \[T, B\] = \(4, 2\)")
    )
    rnn = rnnfast.RNN(3, 5, backend=own_backend)
    with pytest.raises(kind, match=wanted):
        rnn(torch.randn(4, 2, 3), reset=reset)
    with pytest.raises(kind, match=wanted):
        rnnfast.functional.rnn(
            torch.randn(4, 2, 5), torch.randn(5, 5), reset=reset, backend=own_backend
        )


def test_a_reset_is_shaped_like_the_input():
    x = torch.randn(4, 2, 3)
    first = rnnfast.RNN(3, 5, batch_first=True)
    with pytest.raises(ValueError, match=r"wanted torch.bool of shape \[B, T\] = \(4, 2\)"):
        first(x, reset=torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"wanted torch.bool of shape \[T\] = \(4,\)"):
        first(x[:, 0], reset=torch.zeros(4, 1, dtype=torch.bool))
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, [4, 2])
    with pytest.raises(ValueError, match=r"wanted torch.bool of shape \[T, B\] = \(4, 2\)"):
        rnnfast.RNN(3, 5)(packed, reset=torch.zeros(6, dtype=torch.bool))


NUMBERS = [
    ("bptt_window", 0, ValueError, "given 0, wanted 1 or more"),
    ("bptt_window", -1, ValueError, "given -1, wanted 1 or more"),
    ("bptt_window", 1.5, TypeError, "given 1.5, wanted an int"),
    ("bptt_window", True, TypeError, "given True, wanted an int"),
    ("bptt_window", "3", TypeError, "given '3', wanted an int"),
    ("clip_state_grad", 0, ValueError, "given 0, wanted a number above 0"),
    ("clip_state_grad", -1, ValueError, "given -1, wanted a number above 0"),
    ("clip_state_grad", 1e-31, ValueError, "given 1e-31, wanted 1e-30 or more"),
    ("clip_state_grad", float("nan"), ValueError, "given nan, wanted a number above 0"),
    ("clip_state_grad", "x", TypeError, "given 'x', wanted a float"),
    ("clip_state_grad", True, TypeError, "given True, wanted a float"),
    ("num_heads", 0, ValueError, "given 0, wanted 1 or more"),
    ("num_heads", -2, ValueError, "given -2, wanted 1 or more"),
    ("num_heads", 3, ValueError, "given 3, wanted a divisor of hidden_size = 4"),
    ("num_heads", True, TypeError, "given True, wanted an int"),
    ("num_heads", 2.0, TypeError, "given 2.0, wanted an int"),
    ("num_heads", None, TypeError, "given None, wanted an int"),
    ("norm_eps", 0, ValueError, "given 0, wanted a number above 0"),
    ("norm_eps", float("nan"), ValueError, "given nan, wanted a number above 0"),
    ("norm_eps", None, TypeError, "given None, wanted a float"),
]


@pytest.mark.parametrize(("name", "value", "kind", "text"), NUMBERS)
def test_a_number_that_cannot_be_is_refused(name, value, kind, text):
    with pytest.raises(kind, match=f"{name}: {text}"):
        rnnfast.RNN(3, 4, **{name: value})
    with pytest.raises(kind, match=f"{name}: {text}"):
        rnnfast.functional.rnn(torch.randn(4, 2, 4), torch.randn(4, 4), **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("norm", "group", ValueError),
        ("norm", True, ValueError),
        ("norm", ["layer"], ValueError),
        ("track_gradient_flow", "yes", ValueError),
        ("track_gradient_flow", 1, ValueError),
        ("track_gradient_flow", None, ValueError),
    ],
)
def test_a_choice_that_is_none_is_refused(name, value, kind):
    with pytest.raises(
        kind, match=rf"{name}: given {value!r}, wanted one of \[".replace("['", ".'")
    ):
        rnnfast.RNN(3, 4, **{name: value})


def test_layer_norm_of_one_unit_is_refused():
    text = "norm='layer': given 1 unit per head, wanted 2 or more"
    for options in ({"hidden_size": 1}, {"hidden_size": 4, "num_heads": 4}):
        with pytest.raises(ValueError, match=text):
            rnnfast.RNN(3, norm="layer", **options)
    p, w_hh, ones = torch.randn(4, 2, 3), torch.randn(3, 1), torch.ones(3)
    with pytest.raises(ValueError, match=text):
        rnnfast.functional.rnn(p, w_hh, num_heads=3, norm_weight=ones)
    rnnfast.RNN(3, 1, norm="batch")


def test_wrong_weights_of_a_recurrence_are_refused(own_backend):
    p, w_hh, ones = torch.randn(4, 2, 6), torch.randn(6, 3), torch.ones(6)

    def call(**options):
        rnnfast.functional.rnn(p, w_hh, num_heads=2, backend=own_backend, **options)

    call(norm_weight=ones, norm_bias=ones)
    with pytest.raises(ValueError, match="norm_bias: given without norm_weight"):
        call(norm_bias=ones)
    for name in ("norm_weight", "norm_bias"):
        options = {"norm_weight": ones}
        with pytest.raises(ValueError, match=rf"{name}: given shape \(3,\), wanted \(6,\)"):
            call(**options | {name: ones[:3]})
        with pytest.raises(ValueError, match=f"{name}: given torch.float64, wanted torch.float32"):
            call(**options | {name: ones.double()})
    with pytest.raises(ValueError, match=r"w_hh: given shape \(1, 6, 6\), wanted \(1, 6, 3\)"):
        rnnfast.functional.rnn(p, torch.randn(6, 6), num_heads=2)
    with pytest.raises(ValueError, match=r"w_hh: given shape \(1, 6, 3\), wanted \(1, 6, 6\)"):
        rnnfast.functional.rnn(p, w_hh)


def test_gradient_flow_that_is_not_there_says_why():
    with pytest.raises(RuntimeError, match="make it with track_gradient_flow=True"):
        rnnfast.RNN(3, 4).gradient_flow  # noqa: B018
    rnn = rnnfast.RNN(3, 4, track_gradient_flow=True, backend="reference")
    rnn(torch.randn(5, 2, 3))
    with pytest.raises(RuntimeError, match="no backward pass has come through"):
        rnn.gradient_flow  # noqa: B018
    rnn(torch.randn(5, 2, 3))[0].sum().backward()
    assert rnn.gradient_flow.state_norm.shape == (1, 1, 5)


BEYOND_TORCH = {
    "norm": {"norm": "layer"},
    "norm batch": {"norm": "batch"},
    "num_heads": {"num_heads": 2},
    "bptt_window": {"bptt_window": 3},
    "clip_state_grad": {"clip_state_grad": 1.0},
    "track_gradient_flow": {"track_gradient_flow": True},
    "residual": {"residual": True, "num_layers": 3},
}


@pytest.mark.parametrize("case", BEYOND_TORCH)
def test_the_torch_backend_says_what_it_has_not(case):
    name = case.split()[0]
    rnn = rnnfast.RNN(3, 4, backend="torch", **BEYOND_TORCH[case])
    with pytest.raises(BackendError, match=f"backend 'torch' cannot run this call: .*no {name}$"):
        rnn(torch.randn(5, 2, 3))


def test_the_torch_backend_has_no_reset():
    reset = torch.zeros(5, 2, dtype=torch.bool)
    rnn = rnnfast.RNN(3, 4, backend="torch")
    rnn(torch.randn(5, 2, 3))
    with pytest.raises(BackendError, match=r"backend 'torch' cannot run this call: .*no reset$"):
        rnn(torch.randn(5, 2, 3), reset=reset)
    packed = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(5, 2, 3), [5, 2])
    with pytest.raises(BackendError, match=r"backend 'torch' cannot run this call: .*no reset$"):
        rnn(packed, reset=reset)

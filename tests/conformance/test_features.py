"""Every option of every module, and random pairs of them, on the native CPU kernels."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from cases import needs_cpu
from torch.nn.utils.rnn import pack_padded_sequence
from twins import assert_same, results, start

from bench.features import FEATURES, KINDS, Feature, computes, go_together, make
from rnnfast import BackendError
from rnnfast.backends import BACKENDS

pytestmark = [needs_cpu, pytest.mark.usefixtures("one_torch_thread")]

T, B, SIZE = 6, 3, 8
LENGTHS = [4, 6, 0]
SINGLES = [(kind, f) for f in FEATURES for kind in f.kinds]
OURS = [(kind, f) for kind, f in SINGLES if f.ours]


def pairs(number: int) -> list[tuple[str, Feature, Feature]]:
    draw, found = random.Random(25), []
    while len(found) < number:
        (kind, a), (other, b) = draw.sample(OURS, 2)
        if kind == other and go_together(a, b):
            found.append((kind, a, b))
    return found


def call(module: torch.nn.RNNBase, way: str) -> dict[str, torch.Tensor]:
    """Results, gradients and the record of one call."""
    torch.manual_seed(1)
    x = torch.randn(T, B, SIZE, dtype=module.weight_ih_l0.dtype)
    layers = module.num_layers * (2 if module.bidirectional else 1)
    hx, options = None, {}
    if way == "unbatched":
        x = x[:, 0]
    elif way == "packed":
        x = pack_padded_sequence(x, torch.tensor([4, 6, 1]), enforce_sorted=False)
    elif way == "lengths":
        options["lengths"] = LENGTHS
    elif way == "state":
        hx = start(type(module).__name__, x.new_empty(layers, B, SIZE).normal_())
    elif way == "reset":
        options["reset"] = torch.rand(T, B) < 0.3
    if module.batch_first and way not in ("packed", "unbatched"):
        x = x.transpose(0, 1)
        options |= {"reset": options["reset"].T} if way == "reset" else {}
    found = results(module, x, hx, **options)
    if module.track_gradient_flow:
        fields = module.gradient_flow.fields()  # NaN: the gain of a step that no row has
        found |= {name: values.nan_to_num(-1.0) for name, values in fields.items()}
    return found


def assert_cpu_is_reference(kind: str, *features: Feature) -> None:
    """In float64, to rounding: both compute the same sums in another order."""
    way = "".join(feature.call for feature in features)
    ours = make(kind, *features, backend="cpu", dtype=torch.float64)
    eager = copy.deepcopy(ours)
    eager.backend = "reference"
    found, wanted = call(ours, way), call(eager, way)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert_same(found[name], wanted[name], name)


def named(*parts: object) -> str:
    return " ".join(getattr(part, "name", str(part)).replace("`", "") for part in parts)


@pytest.mark.parametrize(("kind", "feature"), OURS, ids=lambda part: named(part))
def test_the_native_kernels_compute_every_option(kind, feature):
    assert_cpu_is_reference(kind, feature)


@pytest.mark.parametrize(("kind", "first", "second"), pairs(200), ids=lambda part: named(part))
def test_the_native_kernels_compute_pairs_of_options(kind, first, second):
    assert_cpu_is_reference(kind, first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_native_kernels_refuse_no_option_in_a_dtype(dtype):
    for kind, feature in OURS:
        found = call(make(kind, feature, backend="cpu", dtype=dtype), feature.call)
        for name, value in found.items():
            assert value.isfinite().all(), f"{kind} {feature.name}: {name}"


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_the_table_of_features_is_true(backend):
    """A backend refuses what the table does not give it, and runs the rest."""
    for kind, feature in SINGLES:
        module = make(kind, feature, backend=backend)
        if computes(backend, kind, feature):
            assert all(v.isfinite().all() for v in call(module, feature.call).values())
        else:
            with pytest.raises(BackendError, match=f"backend '{backend}' cannot run"):
                call(module, feature.call)


def test_every_argument_of_a_constructor_is_a_feature():
    """A new option fails here until it is listed, and so run."""
    given = {name for feature in FEATURES for name in feature.options}
    for kind, cls in KINDS.items():
        own = {*cls._defaults, "bias", "num_layers", "batch_first", "dropout", "bidirectional"}
        own -= {"backend", "norm_eps"} | ({"norm"} if kind != "RNN" else set())
        assert own <= given, f"{kind}: {own - given}"
    assert set(BACKENDS) == {"cpu", "cuda", "triton", "torch", "reference"}

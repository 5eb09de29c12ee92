"""Every backend and every cell, step by step against float64, wherever the backend computes.

Deterministic mode fills what torch allocates with NaN: an element that no kernel wrote fails.
"""

from __future__ import annotations

import pytest
import torch
from cases import Case, assert_good, make_case, run, run_functional
from hypothesis import HealthCheck, given, settings
from places import HERE, Place, case_of, every_cell, every_place, of_each

import rnnfast
from rnnfast.validate.sequences import compare_layers, compare_loops, judged

pytestmark = pytest.mark.usefixtures("outputs_start_as_nan", "one_torch_thread", "cores_enough")


def judge(place: Place, case: Case) -> dict:
    """One pass forward and one back of the backend, each within its budget."""
    found = run(case, place.backend, recorded=case.options.per_sample)
    assert_good(case, found, **place.rounding(case.p.dtype))
    return found


@pytest.fixture(autouse=True)
def there_is_a_kernel(request):
    asked = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if "cell" in asked and asked["cell"] not in asked["place"].cells:
        pytest.skip(f"the backend has no kernel for {asked['cell']}")


@pytest.mark.parametrize(("place", "dtype", "H"), of_each(lambda place: place.sizes))
@every_cell
def test_every_step_is_within_its_budget(place, dtype, H, cell):
    for arguments in place.problems(H):
        if arguments["cell"] == cell:
            judge(place, case_of(H=H, dtype=dtype, **arguments))


@pytest.mark.parametrize(("place", "dtype"), of_each(lambda place: [(d,) for d in place.dtypes]))
def test_a_long_sequence_is_within_its_budget_at_every_step(place, dtype):
    T, B = place.long
    judge(place, make_case(T, B, 17, 2, dtype, lengths=True))


@pytest.mark.parametrize("place", [p for p in HERE if p.values[0].examples])
@every_cell
def test_options_in_any_combination(place, cell):
    @settings(max_examples=-(-place.examples // 3), suppress_health_check=list(HealthCheck))
    @given(place.combinations([cell]))
    def check(arguments):
        case = case_of(**arguments)
        found = judge(place, case)
        for name, value in run_functional(case, place.backend).items():
            if value is not None:
                assert torch.equal(value, found[name]), name

    check()


@every_place
@every_cell
@pytest.mark.parametrize("norm", [False, True])
def test_no_parameter_but_what_is_asked_for(place, cell, norm):
    """No h_0, no bias of the norm, one gradient of the two."""
    case = case_of(cell, T=4, B=3, H=9, D=2, norm=norm)
    for changed in (
        {"h_0": None},
        {"beta": None},
        {"grad_h_n": None},
        {"grad_y": None},
        {"h_0": None, "grad_y": None},
    ):
        judge(place, case._replace(**changed))


@every_place
@pytest.mark.parametrize("norm", [None, "layer"])
def test_no_rows_at_all(place, norm):
    rnn = rnnfast.RNN(3, 4, bidirectional=True, norm=norm, backend=place.backend)
    y, h_n = rnn(torch.zeros(5, 0, 3, requires_grad=True))
    (y.sum() + h_n.sum()).backward()
    assert all((p.grad == 0).all() and p.grad.shape == p.shape for p in rnn.parameters())


@pytest.mark.parametrize("place", [p for p in HERE if p.values[0].backend != "reference"])
@every_cell
def test_row_without_steps_counts_for_nothing(place, cell):
    case = case_of(cell, T=4, B=3, H=9, D=2)._replace(lengths=torch.tensor([4, 0, 2]))
    wanted = run(case, place.backend)["dw_hh"]
    case.h_0[:, 1] = torch.inf
    assert torch.equal(run(case, place.backend)["dw_hh"], wanted)


@every_place
@every_cell
@pytest.mark.parametrize("H", [33, 128])
def test_offset_of_the_norm_costs_no_digits(place, cell, H):
    """|mean| / std = 1000."""
    case = case_of(cell, T=4, B=3, H=H, norm=True)
    judge(place, case._replace(p=case.p + 1000))


@pytest.mark.parametrize(("place", "dtype"), of_each(lambda place: [(d,) for d in place.dtypes]))
def test_an_infinite_state_stays_what_it_is(place, dtype):
    """In ReLU, with padded units beside it and, in float32, split into parts of which two are 0."""
    case = case_of("rnn_relu", T=3, B=2, H=5, dtype=dtype)
    w_hh = torch.eye(5, dtype=dtype)[None]
    w_hh[0, 1, 0] = 1.0
    h_0 = torch.zeros_like(case.h_0)
    h_0[0, 0, 0] = torch.inf
    case = case._replace(w_hh=w_hh, h_0=h_0, p=torch.zeros_like(case.p))
    found, wanted = run(case, place.backend)["y"], run(case, "reference")["y"]
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.isinf(), wanted.isinf())
    assert found.isinf().any()


sequences = pytest.mark.parametrize(
    ("place", "dtype"), of_each(lambda place: [(dtype,) for dtype in place.sequences])
)


def no_worse(found: dict) -> None:
    """dW_hh is one product of torch's over all steps, which on a CPU errs more than the sum of
    nn.RNN's products of a step."""
    assert not [str(f) for name, f in found.items() if name != "dw_hh" and not f.good]


@sequences
@every_cell
def test_whole_sequences_err_no_more_than_torch(place, dtype, cell):
    """Summed over five seeds; where nn.RNN lacks the cell, the peer is the eager loop."""
    cases = [case_of(cell, T=12, B=16, H=33, dtype=dtype, seed=seed) for seed in range(5)]
    found = judged(compare_layers(cases, place.backend), cases)
    assert "y" in found
    no_worse(found)


@sequences
def test_whole_sequences_under_layer_norm_err_no_more_than_the_eager_loop(place, dtype):
    cases = [make_case(12, 16, 33, 1, dtype, seed=seed, norm=True) for seed in range(5)]
    no_worse(judged(compare_loops(cases, place.backend), cases))

"""norm="batch" against nn.BatchNorm1d over the valid points."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from twins import assert_same, assert_same_results, results

import rnnfast
from rnnfast.modules.batch_norm import batch_norm
from rnnfast.testing import error_ratio, worst_step

# torch 2.13 raises these itself as it compiles; any other warning fails.
pytestmark = [
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]
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


class ByBatchNorm1d(nn.Module):
    """One layer: nn.BatchNorm1d of the valid points of x W_ih^T, then the plain recurrence."""

    def __init__(self, rnn: rnnfast.RNN) -> None:
        super().__init__()
        self.suffixes = ["l0", "l0_reverse"] if rnn.bidirectional else ["l0"]
        self.norms = nn.ModuleList()
        for name, p in rnn.named_parameters():
            if not name.startswith("norm"):
                self.register_parameter(name, nn.Parameter(p.detach().clone()))
        for suffix in self.suffixes:
            norm = nn.BatchNorm1d(H, rnn.norm_eps, dtype=rnn.weight_hh_l0.dtype)
            with torch.no_grad():
                norm.weight.copy_(getattr(rnn, f"norm_weight_{suffix}"))
                if rnn.bias:
                    norm.bias.copy_(getattr(rnn, f"norm_bias_{suffix}"))
            norm.bias.requires_grad_(rnn.bias)
            self.norms.append(norm)

    def forward(self, x, hx=None, lengths=None, reset=None):
        n = torch.full((x.shape[1],), x.shape[0]) if lengths is None else torch.tensor(lengths)
        valid = torch.arange(x.shape[0]).unsqueeze(1) < n
        ps = []
        for suffix, norm in zip(self.suffixes, self.norms):
            u = norm(F.linear(x, getattr(self, f"weight_ih_{suffix}"))[valid])
            if hasattr(self, f"bias_ih_{suffix}"):
                u = u + getattr(self, f"bias_ih_{suffix}") + getattr(self, f"bias_hh_{suffix}")
            ps.append(
                torch.zeros(*x.shape[:2], H, dtype=x.dtype).masked_scatter(valid[..., None], u)
            )
        w_hh = torch.stack([getattr(self, f"weight_hh_{suffix}") for suffix in self.suffixes])
        return rnnfast.functional.rnn(
            torch.cat(ps, -1), w_hh, hx, lengths=lengths, reset=reset, backend="reference"
        )

    def as_named(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """With the names of rnnfast.RNN."""
        for d, suffix in enumerate(self.suffixes):
            for kind in ("weight", "bias"):
                if f"d norms.{d}.{kind}" in found:
                    found[f"d norm_{kind}_{suffix}"] = found.pop(f"d norms.{d}.{kind}")
        return found


def assert_same_statistics(rnn: rnnfast.RNN, twin: ByBatchNorm1d, steps: int) -> None:
    for suffix, norm in zip(twin.suffixes, twin.norms):
        assert_same(getattr(rnn, f"norm_running_mean_{suffix}"), norm.running_mean)
        assert_same(getattr(rnn, f"norm_running_var_{suffix}"), norm.running_var)
        batches = getattr(rnn, f"norm_num_batches_tracked_{suffix}")
        assert batches == norm.num_batches_tracked == steps
        assert batches.dtype == torch.int64


@pytest.mark.parametrize("lengths", [None, [5, 0, 3]])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_is_that_of_torch_over_the_valid_points(
    own_backend, lengths, bidirectional, bias
):
    """In training, step after step, and in evaluation."""
    options = {"bidirectional": bidirectional, "bias": bias, "norm_eps": 1e-3}
    rnn = layer(own_backend, norm="batch", **options)
    twin = ByBatchNorm1d(rnn)
    given = {"lengths": lengths, "reset": some_reset()}
    hx = normal(2 if bidirectional else 1, B, H, seed=2)
    for step in range(3):
        x = 2 * normal(T, B, IN, seed=10 + step) + 1
        found, wanted = (results(module, x, hx, **given) for module in (rnn, twin))
        assert_same_results(found, twin.as_named(wanted))
        assert_same_statistics(rnn, twin, step + 1)
    rnn.eval(), twin.eval()
    found, wanted = (results(module, x, hx, **given) for module in (rnn, twin))
    assert_same_results(found, twin.as_named(wanted))
    assert_same_statistics(rnn, twin, 3)


@pytest.mark.parametrize("training", [True, False])
def test_padding_does_not_reach_batch_norm(own_backend, training):
    x, lengths = normal(T, B, IN), [5, 0, 3]
    beyond = torch.arange(T).unsqueeze(1) >= torch.tensor(lengths)
    found = []
    for value in (0, 1e6, torch.nan):
        rnn = layer(own_backend, norm="batch", bidirectional=True).train(training)
        filled = x.masked_fill(beyond.unsqueeze(2), value)
        found.append(results(rnn, filled, lengths=lengths) | dict(rnn.named_buffers()))
    for name, wanted in found[0].items():
        for other in found[1:]:
            assert torch.equal(other[name], wanted), name
    assert found[0]["d input"][beyond].count_nonzero() == 0


def test_batch_norm_of_two_layers_has_statistics_of_each(own_backend):
    rnn = layer(own_backend, norm="batch", num_layers=2)
    inner = copy.deepcopy(rnn)
    x = normal(T, B, IN)
    y, _ = rnn(x)
    one = layer(own_backend, norm="batch")
    two = rnnfast.RNN(H, H, norm="batch", backend=own_backend, dtype=torch.float64)
    for module, index in ((one, 0), (two, 1)):
        state = inner.state_dict()
        module.load_state_dict(
            {n: state[n.replace("l0", f"l{index}")] for n in module.state_dict()}
        )
    assert_same(two(one(x)[0])[0], y)
    for module, index in ((one, 0), (two, 1)):
        for name, value in module.named_buffers():
            assert torch.equal(value, getattr(rnn, name.replace("l0", f"l{index}")))


@pytest.mark.parametrize(
    ("shape", "lengths"), [((1, 1), None), ((4, 3), [0, 1, 0]), ((4, 3), [0, 0, 0])]
)
def test_training_on_a_single_point_raises(own_backend, shape, lengths):
    rnn = layer(own_backend, norm="batch")
    before = copy.deepcopy(rnn.state_dict())
    x = normal(*shape, IN)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        rnn(x, lengths=lengths)
    for name, value in rnn.state_dict().items():
        assert torch.equal(value, before[name]), name
    rnn.eval()
    assert rnn(x, lengths=lengths)[0].isfinite().all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_batch_norm_errs_no_more_than_torch(dtype, training):
    """Errors of outputs, input gradients and statistics, pooled over 5 seeds."""
    points, features = (50, 16), 33
    runs: dict[str, list] = {"ours": [], "torch": []}
    for seed in range(5):
        u = (2 * normal(*points, features, seed=seed) + 3).to(dtype)
        grad = normal(*points, features, seed=seed + 5).to(dtype)
        weight, bias = normal(features, seed=20).float(), normal(features, seed=21).float()
        mean, var = (
            normal(features, seed=22).float(),
            (normal(features, seed=23).square() + 0.5).float(),
        )

        def ours(u, weight, bias, mean, var):
            running = mean, var, torch.zeros((), dtype=torch.int64)
            return batch_norm(u, None, weight, bias, running, training, 1e-5)

        def torchs(u, weight, bias, mean, var):
            y = F.batch_norm(u.flatten(0, 1), mean, var, weight, bias, training)
            return y.view_as(u)

        def call(function, grad, *given):
            u, *given = (x.clone() for x in given)
            y = function(u.requires_grad_(), *given)
            (du,) = torch.autograd.grad(y, u, grad.to(y.dtype))
            return {"y": y.detach(), "du": du, "mean": given[2][None], "var": given[3][None]}

        inputs = u, weight, bias, mean, var
        exact = call(torchs, grad, *(x.double() for x in inputs))
        for kind, function in (("ours", ours), ("torch", torchs)):
            runs[kind].append(
                {n: (v.double(), exact[n]) for n, v in call(function, grad, *inputs).items()}
            )
    for name in ("y", "du", "mean", "var") if training else ("y", "du"):
        worst = [worst_step([found[name] for found in runs[kind]]) for kind in ("ours", "torch")]
        assert error_ratio(*worst) <= 1.25, (name, worst)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_with_batch_norm_in_another_dtype(own_backend, dtype):
    rnn = layer(own_backend, norm="batch", dtype=dtype)
    x = normal(T, B, IN, dtype=dtype)
    y, h_n = rnn(x, lengths=[5, 0, 3])
    (y.sum() + h_n.sum()).backward()
    assert y.dtype == h_n.dtype == dtype
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in rnn.parameters())
    for name, value in rnn.named_buffers():
        assert value.dtype == (torch.int64 if "batches" in name else dtype)
    u = F.linear(x, rnn.weight_ih_l0.detach())[torch.arange(T)[:, None] < torch.tensor([5, 0, 3])]
    # one step of the running mean, which is stored rounded
    wanted = 0.1 * u.double().mean(0)
    assert (
        (rnn.norm_running_mean_l0 - wanted).abs() <= torch.finfo(dtype).eps * u.abs().max()
    ).all()


@pytest.mark.proof
@pytest.mark.parametrize("lengths", [None, [3, 1, 2]])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_compiles_in_one_graph(own_backend, lengths, training):
    torch._dynamo.reset()
    rnn = layer(own_backend, norm="batch", bidirectional=True).train(training)
    twin = copy.deepcopy(rnn)
    call = torch.compile(twin, fullgraph=True, backend="aot_eager")
    given = {"lengths": None if lengths is None else torch.tensor(lengths)}
    for seed in range(2):
        x = normal(3, B, IN, seed=seed)
        found = []
        for module, function in ((twin, call), (rnn, rnn)):
            module.zero_grad()
            y, h_n = function(x, **given)
            (y.square().sum() + h_n.sum()).backward()
            gradients = {f"d {name}": p.grad for name, p in module.named_parameters()}
            found.append({"y": y.detach(), "h_n": h_n.detach()} | gradients)
        assert_same_results(*found)
    for (name, a), b in zip(twin.named_buffers(), rnn.buffers()):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0, msg=name)
    assert rnn.norm_num_batches_tracked_l0 == (2 if training else 0)
    torch._dynamo.reset()


# ------------------------------------------------------------------- whatever looks for batch norms


def batches(n: int = 4) -> list[Tensor]:
    return [3 * normal(T, B, IN, seed=20 + i) + 1 for i in range(n)]


def statistics(rnn: rnnfast.RNN) -> dict[str, Tensor]:
    return {name: x.double() + 0 for name, x in rnn.named_buffers()}


def test_update_bn_averages_the_statistics_of_all_batches(own_backend):
    """As it does for nn.BatchNorm1d, in every layer and direction; momentum and mode come back."""
    rnn = layer(own_backend, norm="batch", bidirectional=True)
    twin = ByBatchNorm1d(rnn)
    rnn(9 * normal(T, B, IN) + 5)  # statistics of other data
    model = torch.optim.swa_utils.AveragedModel(nn.Sequential(rnn)).eval()
    for module, data in ((model, batches()), (twin, batches())):
        torch.optim.swa_utils.update_bn(data, module)
    averaged = model.module[0]
    assert_same_statistics(averaged, twin, 4)
    assert not averaged.training
    assert [m.momentum for m in averaged.children()] == [0.1, 0.1]
    assert rnn.norm_num_batches_tracked_l0 == 1  # the copy has statistics of its own
    two = layer(own_backend, norm="batch", num_layers=2)
    torch.optim.swa_utils.update_bn(batches(), two)
    assert two.norm_num_batches_tracked_l1 == 4


def test_a_compiled_module_averages_statistics_too():
    rnn = layer(norm="batch")
    wanted = copy.deepcopy(rnn)
    compiled = torch.compile(rnn, backend="aot_eager", fullgraph=True)
    compiled(batches()[0])
    for module in (compiled, wanted):
        torch.optim.swa_utils.update_bn(batches(), module)
    assert_same_results(statistics(rnn), statistics(wanted))


def test_convert_sync_batchnorm_is_refused(own_backend):
    rnn = layer(own_backend, norm="batch")
    before = str(rnn)
    with pytest.raises(TypeError, match=r"batch_norm_l0: given SyncBatchNorm, wanted .*processes"):
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(rnn))
    for wrong in (nn.SyncBatchNorm(H), nn.GroupNorm(1, H), nn.Identity(), None):
        with pytest.raises(TypeError, match="batch_norm_l0: given"):
            rnn.add_module("batch_norm_l0", wrong)
    with pytest.raises(TypeError, match="batch_norm_l0: given GroupNorm"):
        rnn.batch_norm_l0 = nn.GroupNorm(1, H)
    assert str(rnn) == before
    rnn(normal(T, B, IN))
    plain = nn.Sequential(layer(own_backend, norm="layer"))
    assert nn.SyncBatchNorm.convert_sync_batchnorm(plain) is plain


def test_a_batch_norm_in_evaluation_mode_is_frozen(own_backend):
    rnn = layer(own_backend, norm="batch")
    rnn(batches()[0])
    before = statistics(rnn)
    wanted = copy.deepcopy(rnn).eval()(batches()[1])[0]
    for module in rnn.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    assert rnn.training
    assert torch.equal(rnn(batches()[1])[0], wanted)
    assert_same_results(statistics(rnn), before)


def test_momentum_and_eps_of_a_batch_norm_are_heard(own_backend):
    rnn = layer(own_backend, norm="batch")
    twin = ByBatchNorm1d(rnn)
    rnn.norm_eps = 1e-2
    for norm in (rnn.batch_norm_l0, twin.norms[0]):
        norm.momentum, norm.eps = 0.5, 1e-2
    for x in batches(2):
        assert_same(rnn(x)[0], twin(x)[0])
    assert_same_statistics(rnn, twin, 2)


def test_statistics_can_be_read_and_replaced_by_the_names_of_torch(own_backend):
    """As Lightning's weight averaging does."""
    rnn = layer(own_backend, norm="batch")
    rnn(batches()[0])
    norm = rnn.batch_norm_l0
    assert norm.running_mean is rnn.norm_running_mean_l0
    norm.running_mean = torch.zeros_like(norm.running_mean)
    norm.running_var = torch.ones_like(norm.running_var)
    norm.num_batches_tracked *= 0
    norm.momentum = None
    for x in batches():
        rnn(x)
    wanted = layer(own_backend, norm="batch")
    torch.optim.swa_utils.update_bn(batches(), wanted)
    assert_same_results(statistics(rnn), statistics(wanted))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_without_running_statistics_it_is_that_of_the_batch_in_either_mode(own_backend):
    """As torch.func.replace_all_batch_norm_modules_ asks for."""
    rnn = layer(own_backend, norm="batch")
    x = batches()[0]
    wanted = copy.deepcopy(rnn)(x)[0]
    torch.func.replace_all_batch_norm_modules_(rnn)
    assert_same(rnn(x)[0], wanted)
    assert_same(rnn.eval()(x)[0], wanted)
    rnn.reset_parameters()


def test_keys_of_a_state_dict_are_those_of_the_rnn(own_backend):
    rnn = layer(own_backend, norm="batch")
    state = rnn.state_dict()
    assert [name for name in state if name.startswith("norm")] == [
        "norm_weight_l0",
        "norm_bias_l0",
        "norm_running_mean_l0",
        "norm_running_var_l0",
        "norm_num_batches_tracked_l0",
    ]
    assert not [name for name in state if name.startswith("batch_norm")]
    fresh = rnnfast.RNN(IN, H, norm="batch", dtype=torch.float64)
    fresh.load_state_dict(dict(state))  # without the versions that torch keeps beside
    assert_same_results(statistics(fresh), statistics(rnn))


def test_copies_and_casts_have_batch_norms_of_their_own(own_backend):
    rnn = layer(own_backend, norm="batch").float()
    for twin in (copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))):
        assert twin.batch_norm_l0.running_mean is twin.norm_running_mean_l0
        twin.double()
        twin.batch_norm_l0.reset_running_stats()
        twin(batches()[0])
        assert twin.batch_norm_l0.running_mean is twin.norm_running_mean_l0
        assert twin.norm_num_batches_tracked_l0 == 1
    assert rnn.norm_num_batches_tracked_l0 == 0


def test_a_probe_leaves_the_statistics(own_backend):
    rnn = layer(own_backend, norm="batch")
    rnn(batches()[0])
    before = statistics(rnn)
    rnnfast.probe(rnn, batches()[1])
    assert_same_results(statistics(rnn), before)


def test_a_batch_norm_is_not_called_by_itself():
    with pytest.raises(RuntimeError, match=r"this is part of an rnnfast\.RNN"):
        layer(norm="batch").batch_norm_l0(torch.zeros(2, H))

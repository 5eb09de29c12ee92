"""The native CPU kernels against one step in float64, restarted from the kernel's own values."""

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch

from rnnfast.backends import cpu

_C = pytest.importorskip("rnnfast._C")
pytestmark = pytest.mark.usefixtures("one_torch_thread", "cores_enough")

NONLINEARITIES = ("tanh", "relu", "sigmoid", "softplus")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
VALUE = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "softplus": lambda a: a.clamp(min=0) + torch.log1p(torch.exp(-a.abs())),
}
SLOPE = {
    "tanh": lambda h: 1 - h * h,
    "relu": lambda h: (h > 0).to(h.dtype),
    "sigmoid": lambda h: h * (1 - h),
    "softplus": lambda h: -torch.expm1(-h),
}


NO_SIZES = {"threads": 1, "input_size": 0, "heads": 1, "directions": 1, "norm_recurrent": False}
TENSORS = "lengths reset x w_ih w_hh h_0 gamma beta y saved ahat rstd parameters"
OF_FORWARD = "p b_ih b_hh c_0 cells h_n c_n"
OF_BACKWARD = (
    "grad_y grad_h_n grad_c_n grad_cells dp du dx dw_ih db_ih db_hh dw_hh dgamma dbeta dparameters"
    " dh_0 dc_0 record"
)
FORWARD = NO_SIZES | {"norm_eps": 1e-5} | dict.fromkeys(f"{TENSORS} {OF_FORWARD}".split())
BACKWARD = NO_SIZES | {"window": 0, "clip": math.inf, "per_sample": False}
BACKWARD |= dict.fromkeys(f"{TENSORS} {OF_BACKWARD}".split())


def rnn_forward(**given):
    _C.rnn_forward(**FORWARD | given)


@pytest.fixture(params=_C.simd_levels())
def level(request):
    before = _C.simd_level()
    _C.set_simd_level(request.param)
    yield request.param
    _C.set_simd_level(before)


def address(tensor):
    return None if tensor is None else tensor.data_ptr()


def strided(tensor):
    return None if tensor is None else (tensor.data_ptr(), *tensor.stride()[:2])


def name(dtype):
    return str(dtype).removeprefix("torch.")


class Case:
    """Inputs of one call; every output starts as NaN."""

    def __init__(self, shape, dtype, nonlinearity, *, lengths=None, absent=(), batch_major=False):
        self.T, self.B, self.S, self.D, self.heads = shape
        self.dtype, self.nonlinearity, self.batch_major = dtype, nonlinearity, batch_major
        T, B, S, groups = self.T, self.B, self.S, self.D * self.heads
        generator = torch.Generator().manual_seed(T + 31 * B + 1009 * S + groups)

        def random(*size, scale=1.0):
            values = torch.randn(*size, generator=generator, dtype=torch.float64) * scale
            return values.to(dtype)

        self.lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int64)
        self.p = self.sequence(random(T, B, groups * S))
        self.w = random(groups, S, S, scale=0.9 / math.sqrt(S))
        self.h0 = None if "h0" in absent else random(self.D, B, self.heads * S)
        self.grad_y = None if "grad_y" in absent else self.sequence(random(T, B, groups * S))
        self.grad_h_n = None if "grad_h_n" in absent else random(self.D, B, self.heads * S)

    def sequence(self, values):
        """[T, B, N], stored [B, T, N] if batch-major."""
        return values.transpose(0, 1).contiguous().transpose(0, 1) if self.batch_major else values

    def empty(self, *size):
        return self.sequence(torch.full(size, math.nan, dtype=self.dtype))

    def common(self, threads):
        return {
            "cell": f"rnn_{self.nonlinearity}",
            "dtype": name(self.dtype),
            "steps": self.T,
            "batch": self.B,
            "size": self.S,
            "directions": self.D,
            "heads": self.heads,
            "threads": threads,
            "w_hh": address(self.w),
            "h_0": address(self.h0),
            "lengths": address(self.lengths),
        }

    def forward(self, threads):
        y = self.empty(self.T, self.B, self.D * self.heads * self.S)
        h_n = torch.full((self.D, self.B, self.heads * self.S), math.nan, dtype=self.dtype)
        rnn_forward(**self.common(threads), p=strided(self.p), y=strided(y), h_n=address(h_n))
        return y, h_n

    def backward(self, y, threads, want_dh0=True):
        da = self.empty(self.T, self.B, self.D * self.heads * self.S)
        dh0 = torch.full((self.D, self.B, self.heads * self.S), math.nan, dtype=self.dtype)
        given = self.common(threads) | {
            "grad_y": strided(self.grad_y),
            "grad_h_n": address(self.grad_h_n),
            "y": strided(y),
            "dp": strided(da),
            "dh_0": address(dh0) if want_dh0 else None,
        }
        _C.rnn_backward(**BACKWARD | given)
        return da, dh0


def grouped(tensor, case, leading):
    """[..., groups * S] or [D, B, heads * S] as float64 [groups, ..., B, S]."""
    if leading == "time":
        shape = (case.T, case.B, case.D * case.heads, case.S)
        return tensor.double().reshape(shape).permute(2, 0, 1, 3)
    shape = (case.D, case.B, case.heads, case.S)
    return tensor.double().reshape(shape).permute(0, 2, 1, 3).flatten(0, 1)


def states(tensor, case):
    if tensor is None:
        return torch.zeros(case.D * case.heads, case.B, case.S, dtype=torch.float64)
    return grouped(tensor, case, "state")


def assert_within(actual, expected, scale, case):
    """|err| <= 2 u_store |result| + 4 sqrt(S) u_operand (|p| + |h||W|), subnormals by spacing."""
    u_store = torch.finfo(case.dtype).eps / 2
    u_operand = torch.finfo(torch.float32).eps / 2 if u_store > 1e-10 else u_store
    spacing = torch.finfo(case.dtype).smallest_normal * 2 * u_store
    bound = 2 * u_store * expected.abs() + 4 * math.sqrt(case.S) * u_operand * scale + spacing
    error = (actual - expected).abs()
    assert not torch.isnan(actual).any()
    worst = (error / bound).max().item() if error.numel() else 0.0
    assert worst <= 1, worst


def valid_steps(case):
    steps = torch.arange(case.T)[:, None]
    lengths = torch.full((case.B,), case.T) if case.lengths is None else case.lengths
    return steps < lengths, lengths


def neighbours(sequence, start, case, towards_start):
    """The values one step away, in each group's own time; `start` where the row begins there."""
    _, lengths = valid_steps(case)
    moved = torch.empty_like(sequence)
    rows = torch.arange(case.B)
    for group in range(sequence.shape[0]):
        forward_in_time = (group < case.heads) == towards_start
        if forward_in_time:
            moved[group, 1:] = sequence[group, :-1]
            moved[group, 0] = start[group]
        else:
            moved[group, :-1] = sequence[group, 1:]
            has = lengths > 0
            moved[group, (lengths[has] - 1), rows[has]] = start[group][has]
            moved[group, -1, lengths == case.T] = start[group][lengths == case.T]
    return moved


def check_forward(case, y, h_n):
    valid, lengths = valid_steps(case)
    out, last, first = grouped(y, case, "time"), states(h_n, case), states(case.h0, case)
    p, w = grouped(case.p, case, "time"), case.w.double()
    h_prev = neighbours(out, first, case, True)
    expected = VALUE[case.nonlinearity](p + torch.einsum("gtbk,gnk->gtbn", h_prev, w))
    scale = p.abs() + torch.einsum("gtbk,gnk->gtbn", h_prev.abs(), w.abs())
    assert_within(out[:, valid], expected[:, valid], scale[:, valid], case)
    assert (out[:, ~valid] == 0).all()
    for group, b in itertools.product(range(out.shape[0]), range(case.B)):
        end = lengths[b] - 1 if group < case.heads else 0
        assert torch.equal(last[group, b], out[group, end, b] if lengths[b] else first[group, b])


def check_backward(case, y, da, dh0):
    valid, lengths = valid_steps(case)
    out, grad = grouped(y, case, "time"), grouped(da, case, "time")
    w, entering = case.w.double(), states(case.grad_h_n, case)
    grad_y = torch.zeros_like(out) if case.grad_y is None else grouped(case.grad_y, case, "time")
    # A product of zero with the entering gradient as its bias: one formula for every step.
    da_next = neighbours(grad, torch.zeros_like(entering), case, False)
    enters = torch.zeros_like(grad)
    for group, b in itertools.product(range(grad.shape[0]), range(case.B)):
        if lengths[b]:
            enters[group, lengths[b] - 1 if group < case.heads else 0, b] = entering[group, b]
    dh = grad_y + enters + torch.einsum("gtbk,gkn->gtbn", da_next, w)
    scale = grad_y.abs() + enters.abs() + torch.einsum("gtbk,gkn->gtbn", da_next.abs(), w.abs())
    slope = SLOPE[case.nonlinearity](out)
    assert_within(grad[:, valid], (dh * slope)[:, valid], scale[:, valid], case)
    assert (grad[:, ~valid] == 0).all()
    leaving = torch.zeros_like(entering)
    for group, b in itertools.product(range(grad.shape[0]), range(case.B)):
        leaving[group, b] = grad[group, 0 if group < case.heads else lengths[b] - 1, b]
    expected = torch.einsum("gbk,gkn->gbn", leaving, w)
    scale = torch.einsum("gbk,gkn->gbn", leaving.abs(), w.abs())
    empty = (lengths == 0)[None, :, None]
    expected = torch.where(empty, entering, expected)
    assert_within(states(dh0, case), expected, torch.where(empty, entering.abs(), scale), case)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def check(case):
    y, h_n = case.forward(1)
    check_forward(case, y, h_n)
    da, dh0 = case.backward(y, 1)
    check_backward(case, y, da, dh0)
    for threads in (2, 3):
        again = (*case.forward(threads), *case.backward(y, threads))
        for one, other in zip((y, h_n, da, dh0), again, strict=True):
            assert torch.equal(bits(one), bits(other)), threads


SIZES = (1, 3, 17, 33, 100, 129)
BATCHES = (0, 1, 3, 7, 13)


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_every_step_is_within_the_rounding_budget(level, dtype, nonlinearity):
    for i, (S, B, T) in enumerate(itertools.product(SIZES, BATCHES, (1, 2, 9))):
        D, heads = 1 + i % 2, 1 + 2 * (i // 2 % 2)
        lengths = [(5 * b + i) % (T + 1) for b in range(B)] if i % 3 == 0 else None
        if lengths and B > 1:
            lengths[:2] = [0, T]
        absent = [(), ("h0",), ("grad_y",), ("grad_h_n",), ("grad_y", "grad_h_n")][i % 5]
        shape = (T, B, S, D, heads)
        check(Case(shape, dtype, nonlinearity, lengths=lengths, absent=absent,
                   batch_major=i % 4 == 1))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_a_large_odd_size_is_within_the_rounding_budget(level, dtype):
    check(Case((3, 13, 650, 2, 1), dtype, "tanh", lengths=[3, 0, 1] + [2] * 10))


def test_an_unwanted_initial_gradient_is_not_written(level):
    case = Case((4, 3, 17, 1, 1), torch.float32, "tanh")
    y, _ = case.forward(1)
    da, _ = case.backward(y, 1)
    da_alone, untouched = case.backward(y, 1, want_dh0=False)
    assert torch.equal(da, da_alone)
    assert torch.isnan(untouched).all()


def test_padding_is_never_read(level):
    case = Case((5, 3, 33, 2, 1), torch.float32, "tanh", lengths=[5, 2, 0])
    valid, _ = valid_steps(case)
    case.p[~valid] = math.nan
    case.grad_y[~valid] = math.nan
    check_values = (*case.forward(1), *case.backward(case.forward(1)[0], 1))
    assert not any(torch.isnan(value).any() for value in check_values)


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_nan_reaches_only_its_own_row(level, dtype, nonlinearity):
    case = Case((4, 3, 17, 1, 1), dtype, nonlinearity)
    case.p[1, 1, 4] = math.nan
    y, _ = case.forward(1)
    assert torch.isnan(y[1, 1, 4])
    assert torch.isnan(y[2:, 1]).all()
    assert not torch.isnan(y[:, [0, 2]]).any()


def one_step(nonlinearity, p, w, h_0=None):
    """f(p + w h_0): one step of as many rows as p has numbers."""
    n = p.numel()
    y, h_n = torch.full_like(p, math.nan), torch.full_like(p, math.nan)
    rnn_forward(
        cell=f"rnn_{nonlinearity}", dtype=name(p.dtype), steps=1, batch=n, size=1,
        p=(address(p), n, 1), w_hh=address(w), h_0=address(h_0), y=(address(y), n, 1),
        h_n=address(h_n),
    )  # fmt: skip
    return y


def pointwise(nonlinearity, a):
    """f(a) through the kernel: one step without recurrence."""
    return one_step(nonlinearity, a, torch.zeros(1, dtype=a.dtype))


def surroundings(centres, dtype, count):
    """`count` numbers on either side of each centre, of both signs."""
    integer = {np.float32: np.int32, np.float64: np.int64}[dtype]
    bits = np.abs(np.asarray(centres, dtype)).view(integer)[:, None] + np.arange(-count, count)
    near = (bits & np.iinfo(integer).max).astype(integer).view(dtype).ravel()
    return np.concatenate([near, -near])


# Limits of the kernels, ends of the ranges of their results, special values.
SEAMS = [
    0.0,
    0.5625,
    1e-38,
    1e-308,
    9.01,
    10.0,
    18.0,
    19.06,
    20.0,
    36.7,
    38.0,
    87.3,
    88.7,
    103.97,
    104.0,
]
SEAMS += [708.4, 709.8, 745.13, 746.0, np.inf]
HALF_STEPS = (np.arange(2200) + 0.5) * np.log(2) / 2  # seams of the argument reduction


def sweep_float32():
    everywhere = np.arange(0, 2**32, 4099, dtype=np.uint64).astype(np.uint32).view(np.float32)
    near = [surroundings(SEAMS, np.float32, 3000), surroundings(HALF_STEPS, np.float32, 20)]
    return np.concatenate([everywhere, *near, np.linspace(-12, 12, 400_001, dtype=np.float32)])


def sweep_float64():
    """Fewer: the judge computes with mpmath."""
    random = np.random.default_rng(0)
    everywhere = random.integers(0, 2**64, 2000, dtype=np.uint64).view(np.float64)
    middle = [random.uniform(-limit, limit, 2000) for limit in (1, 4, 20, 40, 760)]
    near = [surroundings(SEAMS, np.float64, 10), surroundings(HALF_STEPS[::5], np.float64, 1)]
    return np.concatenate([everywhere, *near, *middle])


def exact_float32(nonlinearity, a):
    """float64, and zero."""
    wide = a.astype(np.float64)
    with np.errstate(all="ignore"):
        if nonlinearity == "tanh":
            exact = np.tanh(wide)
        elif nonlinearity == "sigmoid":
            exact = np.exp(-np.logaddexp(0, -wide))
        else:
            exact = np.maximum(wide, 0) + np.log1p(np.exp(-np.abs(wide)))
    return exact, 0.0


def exact_float64(nonlinearity, a):
    """The nearest float64, and what is missing: the exact value is their sum."""

    def exact(x):
        if nonlinearity == "tanh":
            return mpmath.tanh(x)
        if math.isinf(x):
            return mpmath.mpf(max(x, 0) if nonlinearity == "softplus" else x > 0)
        rest = mpmath.exp(-abs(x))
        if nonlinearity == "softplus":
            return max(x, 0) + mpmath.log1p(rest)
        return 1 / (1 + mpmath.exp(-x))

    with mpmath.workdps(40):
        values = [exact(x) for x in a.tolist()]
        nearest = np.array([float(v) for v in values])
        missing = [float(v - n) for v, n in zip(values, nearest.tolist())]
    return nearest, np.array(missing)


@pytest.mark.parametrize("nonlinearity", ["tanh", "sigmoid", "softplus"])
@pytest.mark.parametrize(
    ("sweep", "judge"),
    [(sweep_float32, exact_float32), (sweep_float64, exact_float64)],
    ids=["float32", "float64"],
)
def test_nonlinearities_are_within_two_ulp(level, nonlinearity, sweep, judge):
    a = sweep()
    actual = pointwise(nonlinearity, torch.from_numpy(a)).numpy()
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(a))
    a, actual = a[~np.isnan(a)], actual[~np.isnan(a)]
    if nonlinearity == "softplus":  # infinity and the largest number have no ulp
        far = np.abs(a) > 1e30
        np.testing.assert_array_equal(actual[far], np.maximum(a[far], 0))
        a, actual = a[~far], actual[~far]
    nearest, missing = judge(nonlinearity, a)
    ulp = np.spacing(np.abs(nearest).astype(a.dtype)).astype(np.float64)
    worst = (np.abs((actual - nearest) - missing) / ulp).max()
    assert worst <= 2, worst
    if nonlinearity == "tanh":  # but for -0, which p + u loses before f sees it
        np.testing.assert_array_equal(np.signbit(actual[a != 0]), np.signbit(a[a != 0]))
        assert (np.abs(actual[np.abs(a) >= 20]) == 1).all()
    if nonlinearity != "softplus":
        assert np.abs(actual).max() <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
def test_storage_conversions_are_those_of_torch(level, dtype):
    """relu with W = 0 copies, so every pattern goes in and out; an h0 that W scales is rounded."""
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    copied = pointwise("relu", patterns)
    expected = torch.relu(patterns)
    same = (copied == expected) | (torch.isnan(copied) & torch.isnan(expected))
    assert same.all()
    p = patterns[~torch.isnan(patterns)]
    for factor in (0.75, 1.0625, 2.0**-7):
        w, zero = torch.tensor([factor], dtype=dtype), torch.zeros_like(p)
        y = one_step("relu", zero, w, p)
        expected = torch.relu(p.float() * factor).to(dtype)
        both_nan = torch.isnan(y) & torch.isnan(expected)
        assert ((y == expected) | both_nan).all()


def test_openmp_and_own_threads_give_the_same_bits(level):
    """The library is left on torch's libgomp, as the package itself sets it."""
    pool = cpu.openmp()
    if not any(pool):
        pytest.skip("this torch runs without libgomp")
    case = Case((20, 13, 100, 2, 1), torch.float32, "tanh")
    outputs = []
    for addresses in ((0, 0, 0, 0), pool):
        _C.set_openmp(*addresses)
        y, h_n = case.forward(3)
        outputs.append((y, h_n, *case.backward(y, 3)))
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(*outputs, strict=True))


def test_unknown_names_are_value_errors():
    given = Case((1, 1, 1, 1, 1), torch.float32, "tanh").common(1)
    with pytest.raises(ValueError, match=r"swish.*rnn_tanh, rnn_relu, rnn_sigmoid, rnn_softplus"):
        rnn_forward(**given | {"cell": "swish"})
    with pytest.raises(ValueError, match=r"float8.*float32"):
        rnn_forward(**given | {"dtype": "float8"})
    with pytest.raises(ValueError, match="swish"):
        _C.rnn_plan("swish", "float32", 1, 1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"sse9.*" + _C.simd_levels()[0]):
        _C.set_simd_level("sse9")


def test_arguments_are_named_and_all_are_given():
    case = Case((1, 1, 1, 1, 1), torch.float32, "tanh")
    forward = FORWARD | case.common(1)
    backward = BACKWARD | case.common(1)
    for kernel, given in ((_C.rnn_forward, forward), (_C.rnn_backward, backward)):
        for absent in given:
            with pytest.raises(TypeError, match=f"lacks the argument '{absent}'"):
                kernel(**{field: value for field, value in given.items() if field != absent})
        with pytest.raises(TypeError, match="has no argument 'gama'"):
            kernel(**given, gama=None)
        with pytest.raises(TypeError, match="takes keyword arguments only"):
            kernel(*given.values())


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("p", 16, r"None or \(address, stride_t, stride_b\)"),
        ("p", (16, 1), "None or"),
        ("p", (16, 1, None), "None or"),
        ("p", (16, 1, 1.5), "None or"),
        ("w_hh", "16", "None or an address"),
        ("w_hh", 2**64, "None or an address"),
        ("steps", None, "an integer"),
        ("steps", 2**63, "an integer"),
        ("norm_eps", "small", "a number"),
        ("cell", None, "a name"),
        ("dtype", torch.float32, "a name"),
    ],
)
def test_arguments_of_another_type_are_refused(field, value, wanted):
    given = FORWARD | Case((1, 1, 1, 1, 1), torch.float32, "tanh").common(1) | {field: value}
    with pytest.raises(TypeError, match=rf"wants {wanted}.* as '{field}', and got"):
        _C.rnn_forward(**given)


def test_arguments_come_in_any_order():
    """Names that are equal but not the same object, too."""
    case = Case((3, 2, 5, 1, 1), torch.float32, "tanh")
    expected, _ = case.forward(1)
    y, h_n = torch.full_like(expected, math.nan), torch.empty_like(case.h0)
    given = FORWARD | case.common(1)
    given |= {"p": strided(case.p), "y": strided(y), "h_n": address(h_n)}
    copies = {"".join(list(field)): value for field, value in reversed(given.items())}
    _C.rnn_forward(**copies)
    assert torch.equal(y, expected)

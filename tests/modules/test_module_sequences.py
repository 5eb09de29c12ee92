"""Sequences of several lengths: PackedSequence and ``lengths=``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)
from twins import (
    EXACT,
    assert_same,
    assert_same_results,
    for_kind,
    leaf,
    mapped,
    results,
    start,
    tensors,
    twins,
)

import rnnfast

T, B, I, H = 7, 5, 3, 4  # noqa: E741
SORTED = [7, 5, 5, 2, 1]
UNSORTED = [2, 7, 1, 5, 5]
ALL_SHORT = [2, 1, 2, 1, 1]

VARIANTS = {
    "plain": {},
    "relu": {"nonlinearity": "relu"},
    "both ways": {"bidirectional": True},
    "deep, both ways, no bias": {"num_layers": 2, "bidirectional": True, "bias": False},
    "deep, batch first": {"num_layers": 3, "batch_first": True},
}


def directions(options):
    return 2 if options.get("bidirectional") else 1


def states(options, kind):
    rows = options.get("num_layers", 1) * directions(options)
    return start(kind, torch.randn(rows, B, H, dtype=EXACT))


# PackedSequence


@pytest.mark.parametrize("case", VARIANTS)
@pytest.mark.parametrize("lengths", [SORTED, UNSORTED])
@pytest.mark.parametrize("with_hx", [False, True])
def test_packed_values_and_gradients_are_torchs(case, lengths, with_hx, backend, kind):
    old, new = twins(backend, I, H, **for_kind(kind, VARIANTS[case]), kind=kind)
    x = torch.randn(T, B, I, dtype=EXACT)
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=lengths is SORTED)
    hx = states(VARIANTS[case], kind) if with_hx else None
    assert_same_results(results(new, packed, hx), results(old, packed, hx))


@pytest.mark.parametrize("lengths", [SORTED, UNSORTED])
def test_packed_output_has_the_same_order_objects(lengths, backend, kind):
    _, new = twins(backend, I, H, kind=kind)
    x = torch.randn(T, B, I, dtype=EXACT)
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=lengths is SORTED)
    output, _ = new(packed)
    assert type(output) is PackedSequence
    assert output.batch_sizes is packed.batch_sizes
    assert output.sorted_indices is packed.sorted_indices
    assert output.unsorted_indices is packed.unsorted_indices


def test_packed_states_are_in_the_users_order(backend, kind):
    """Each sequence alone, from its own row of hx, ends in its own row of h_n."""
    options = {"num_layers": 2, "bidirectional": True}
    _, new = twins(backend, I, H, **for_kind(kind, options), kind=kind)
    sequences = [torch.randn(n, I, dtype=EXACT) for n in UNSORTED]
    hx = states(options, kind)
    output, h_n = new(pack_sequence(sequences, enforce_sorted=False), hx)
    padded, _ = pad_packed_sequence(output)
    for b, x in enumerate(sequences):
        alone, alone_h_n = new(x, mapped(lambda h, b=b: h[:, b], hx))
        assert_same(padded[: len(x), b], alone)
        mapped(lambda all_, one, b=b: assert_same(all_[:, b], one), h_n, alone_h_n)


@pytest.mark.parametrize("lengths", [[3], [1, 1], [7] * 5])
def test_packed_edge_cases(lengths, backend, kind):
    old, new = twins(backend, I, H, bidirectional=True, kind=kind)
    x = torch.randn(max(lengths), len(lengths), I, dtype=EXACT)
    packed = pack_padded_sequence(x, torch.tensor(lengths))
    assert_same_results(results(new, packed), results(old, packed))


def test_dropout_acts_on_packed_data(backend, kind):
    _, new = twins(backend, I, H, num_layers=2, dropout=0.5, kind=kind)
    packed = pack_padded_sequence(torch.randn(T, B, I).to(EXACT), torch.tensor(SORTED))
    torch.manual_seed(1)
    first, second = new(packed)[0].data, new(packed)[0].data
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(new(packed)[0].data, first)
    new.eval()
    assert torch.equal(new(packed)[0].data, new(packed)[0].data)


BAD_PACKED = {
    "dtype": (torch.float16, I, None),
    "dtype before features": (torch.float16, I + 1, None),
    "features": (EXACT, I + 1, None),
    "hx layers": (EXACT, I, (2, B, H)),
    "hx batch too small": (EXACT, I, (1, B - 1, H)),
    "hx batch too large": (EXACT, I, (1, B + 1, H)),
    "hx width": (EXACT, I, (1, B, H + 1)),
}


@pytest.mark.parametrize("case", BAD_PACKED)
def test_packed_input_is_refused_as_torch_does(case, backend, kind):
    dtype, features, hx_shape = BAD_PACKED[case]
    old, new = twins(backend, I, H, kind=kind)
    packed = pack_padded_sequence(torch.zeros(T, B, features, dtype=dtype), torch.tensor(SORTED))
    hx = None if hx_shape is None else start(kind, torch.zeros(hx_shape, dtype=EXACT))
    if kind == "LSTM":  # nn.LSTM does not check packed input; nn.RNN does
        old, _ = twins("torch", I, H)
    with pytest.raises((RuntimeError, ValueError)) as wanted:
        old(packed, None if hx is None else tensors(hx)[0])
    with pytest.raises(wanted.type) as got:
        new(packed, hx)
    assert got.type is wanted.type
    assert str(got.value).replace("hidden[0]", "hidden") == str(wanted.value)


def test_unsorted_packing_refuses_an_hx_of_another_batch(backend, kind):
    """nn.RNN takes one that is too large, and silently leaves rows out."""
    _, new = twins(backend, I, H, kind=kind)
    x = torch.zeros(T, B, I, dtype=EXACT)
    packed = pack_padded_sequence(x, torch.tensor(UNSORTED), enforce_sorted=False)
    for batch in (B - 1, B + 1):
        with pytest.raises(RuntimeError, match=r"Expected hidden(\[0\])? size"):
            new(packed, start(kind, torch.zeros(1, batch, H, dtype=EXACT)))


@pytest.mark.parametrize("lengths", [SORTED, UNSORTED])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
@pytest.mark.parametrize("kind", ["LSTM"])
def test_packed_cell_states_are_those_of_padded_input(kind, lengths, options, own_backend):
    """c of all steps, packed like the output, and its gradients."""
    _, new = twins(own_backend, I, H, kind=kind, **options)
    new.return_cell_states = True
    x, hx = torch.randn(T, B, I, dtype=EXACT), states(options, "LSTM")
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=lengths is SORTED)
    output, _, cells = new(packed, hx)
    assert type(cells) is PackedSequence
    assert cells.batch_sizes is packed.batch_sizes
    assert cells.unsorted_indices is packed.unsorted_indices
    wanted, _, wanted_cells = new(x, hx, lengths=lengths)
    assert_same(pad_packed_sequence(output)[0], wanted)
    assert_same(pad_packed_sequence(cells)[0], wanted_cells)
    parameters = list(new.parameters())
    weight = torch.randn(wanted_cells.shape).to(EXACT)
    found = torch.autograd.grad((pad_packed_sequence(cells)[0] * weight).sum(), parameters)
    right = torch.autograd.grad((wanted_cells * weight).sum(), parameters)
    for a, b in zip(found, right):
        assert_same(a, b)


# lengths=


def padded(x, batch_first):
    return x.transpose(0, 1) if batch_first else x


@pytest.mark.parametrize("case", VARIANTS)
@pytest.mark.parametrize("lengths", [SORTED, UNSORTED, ALL_SHORT])
def test_lengths_are_what_packing_is(case, lengths, backend, kind):
    options = VARIANTS[case]
    first = options.get("batch_first", False)
    old, new = twins(backend, I, H, **for_kind(kind, options), kind=kind)
    x, hx = torch.randn(T, B, I, dtype=EXACT), states(options, kind)

    class Packing(nn.Module):
        """nn.RNN on packed data, from padded input to output padded to all T steps."""

        named_parameters = old.named_parameters

        def forward(self, x, hx):
            packed = pack_padded_sequence(
                padded(x, first), torch.tensor(lengths), enforce_sorted=False
            )
            output, h_n = old(packed, hx)
            return padded(pad_packed_sequence(output, total_length=T)[0], first), h_n

    found = results(new, padded(x, first), hx, lengths=lengths)
    assert_same_results(found, results(Packing(), padded(x, first), hx))


@pytest.mark.parametrize("case", VARIANTS)
@pytest.mark.parametrize("lengths", [[0, 7, 3, 0, 6], [0] * 5, [7] * 5])
def test_lengths_are_what_each_sample_alone_gives(case, lengths, backend, kind):
    options = VARIANTS[case]
    first = options.get("batch_first", False)
    _, new = twins(backend, I, H, **for_kind(kind, options), kind=kind)
    x, hx = torch.randn(T, B, I, dtype=EXACT), states(options, kind)

    class Alone(nn.Module):
        named_parameters = new.named_parameters

        def forward(self, x, hx):
            x = padded(x, first)
            output, h_n = x.new_zeros(T, B, directions(options) * H), []
            for b, n in enumerate(lengths):
                h = mapped(lambda h, b=b: h[:, b], hx)
                if n:
                    y, h = new(x[:n, b], h)
                    rows = torch.nn.functional.pad(y, (0, 0, 0, T - n)).unsqueeze(1)
                    output = output.index_add(1, torch.tensor([b]), rows)
                h_n.append(h)
            used = sum(p.sum() for p in (x, *new.parameters())) * 0  # lengths of 0 use none
            last = mapped(lambda *of_rows: torch.stack(of_rows, 1), *h_n)
            return padded(output, first) + used, last

    found = results(new, padded(x, first), hx, lengths=lengths)
    assert_same_results(found, results(Alone(), padded(x, first), hx))


@pytest.mark.parametrize("batch_first", [False, True])
def test_padding_is_never_looked_at(batch_first, backend, kind):
    """Not even a NaN in it reaches an output, a state or a gradient."""
    options = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first}
    _, new = twins(backend, I, H, **for_kind(kind, options), kind=kind)
    lengths = [0, 7, 3, 1, 6]
    x = torch.randn(T, B, I, dtype=EXACT)

    def found(x: Tensor) -> dict[str, Tensor]:
        return results(new, x.transpose(0, 1) if batch_first else x, lengths=lengths)

    wanted = found(x)
    for filling in (1e3, torch.nan, torch.inf):
        spoiled = x.clone()
        for b, n in enumerate(lengths):
            spoiled[n:, b] = filling
        assert_same_results(found(spoiled), wanted)
    for name in ("output", "d input"):
        steps = wanted[name].transpose(0, 1) if batch_first else wanted[name]
        for b, n in enumerate(lengths):
            assert (steps[n:, b] == 0).all()


def test_lengths_of_zero_give_hx_back(backend, kind):
    options = {"num_layers": 2, "bidirectional": True}
    _, new = twins(backend, I, H, **for_kind(kind, options), kind=kind)
    hx = states(options, kind)
    output, h_n = new(torch.randn(T, B, I, dtype=EXACT), hx, lengths=[0] * B)
    assert all(map(torch.equal, tensors(h_n), tensors(hx)))
    assert (output == 0).all()


def test_lengths_as_list_tuple_and_tensor(backend, kind):
    _, new = twins(backend, I, H, bidirectional=True, kind=kind)
    x, hx = torch.randn(T, B, I, dtype=EXACT), states({"bidirectional": True}, kind)
    wanted = results(new, x, hx, lengths=UNSORTED)
    given = torch.tensor(UNSORTED)
    for lengths in (tuple(UNSORTED), given, given.repeat_interleave(2)[::2]):
        found = results(new, x, hx, lengths=lengths)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert given.tolist() == UNSORTED
    found = results(new, x, hx, lengths=torch.tensor([3]).expand(B))
    assert_same_results(found, results(new, x, hx, lengths=[3] * B))


def test_lengths_of_any_integer_dtype(backend, kind):
    """Exactly: 200 is beyond what int8 holds, and more than T = 7 in each that holds it."""
    _, new = twins(backend, I, H, kind=kind)
    x = torch.randn(T, B, I, dtype=EXACT)
    wanted = new(x, lengths=UNSORTED)
    for dtype in rnnfast.functional.INTEGERS:
        found = new(x, lengths=torch.tensor(UNSORTED).to(dtype))
        assert torch.equal(found[0], wanted[0])
        assert all(map(torch.equal, tensors(found[1]), tensors(wanted[1])))
        if torch.iinfo(dtype).max > 200:
            with pytest.raises(ValueError, match="lengths: given 200, wanted 0 to T = 7"):
                new(x, lengths=torch.full((B,), 200).to(dtype))


def test_lengths_of_another_library(backend, kind):
    numpy = pytest.importorskip("numpy")
    _, new = twins(backend, I, H, kind=kind)
    x = torch.randn(T, B, I, dtype=EXACT)
    wanted = new(x, lengths=UNSORTED)
    for dtype in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", ">i4"):
        array = numpy.array(UNSORTED, dtype)
        array.flags.writeable = False
        for lengths in (array, list(array), tuple(array)):
            assert torch.equal(new(x, lengths=lengths)[0], wanted[0])
    for lengths in (
        numpy.array(UNSORTED, float),
        list(numpy.array(UNSORTED, float)),
        numpy.array(UNSORTED) > 3,
        list(numpy.array(UNSORTED) > 3),
        numpy.array([UNSORTED]),
        numpy.array(3),
        numpy.int64(3),
    ):
        with pytest.raises(ValueError, match=r"lengths: given .*, wanted integers"):
            new(x, lengths=lengths)
    with pytest.raises(ValueError, match="lengths: given 8, wanted 0 to T = 7"):
        new(x, lengths=numpy.full(B, 8))


def test_lengths_that_cannot_be_looked_at_are_clamped(monkeypatch):
    """In torch.compile a look would break the graph; a kernel must still not read past T."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    lengths = rnnfast.functional.check_lengths(torch.tensor([9, -3, 2]), 5, 3, torch.device("cpu"))
    assert lengths.tolist() == [5, 0, 2]


@pytest.mark.parametrize("lengths", [None, [0, 7, 3, 1, 6]])
def test_gradients_to_be_differentiated_again_are_the_same(lengths, backend, kind):
    """With create_graph=True the formula of the cell takes the kernel's place."""
    _, new = twins(backend, I, H, num_layers=2, bidirectional=True, kind=kind)
    x, hx = torch.randn(T, B, I, dtype=EXACT), states({"num_layers": 2, "bidirectional": 1}, kind)
    hx = leaf(hx)
    leaves = [x.requires_grad_(), *tensors(hx), *new.parameters()]
    output, h_n = new(x, hx, lengths=lengths)
    loss = (output**2).sum() + sum((h**3).sum() for h in tensors(h_n))
    plain = torch.autograd.grad(loss, leaves, retain_graph=True)
    for a, b in zip(torch.autograd.grad(loss, leaves, create_graph=True), plain):
        assert_same(a.detach(), b)


def test_full_lengths_change_nothing(backend, kind):
    _, new = twins(backend, I, H, num_layers=2, bidirectional=True, kind=kind)
    x = torch.randn(T, B, I, dtype=EXACT)
    assert_same_results(results(new, x, lengths=[T] * B), results(new, x))


def test_lengths_of_an_empty_batch(backend, kind):
    _, new = twins(backend, I, H, kind=kind)
    output, h_n = new(torch.zeros(T, 0, I, dtype=EXACT), lengths=[])
    assert output.shape == (T, 0, H)
    assert all(h.shape == (1, 0, H) for h in tensors(h_n))


BAD_LENGTHS = {
    "below 0": ([7, 5, -1, 2, 1], "lengths: given -1, wanted 0 to T = 7"),
    "above T": ([7, 8, 5, 2, 1], "lengths: given 8, wanted 0 to T = 7"),
    "too few": ([7, 5], r"lengths: given torch.int64 of shape \(2,\), wanted .* \(5,\)"),
    "too many": ([7] * 6, r"lengths: given torch.int64 of shape \(6,\)"),
    "tensor below 0": (torch.tensor([7, 5, -1, 2, 1]), "lengths: given -1"),
    "tensor above T": (torch.tensor([7, 8, 5, 2, 1]), "lengths: given 8"),
    "bool": (torch.tensor(SORTED) > 5, "lengths: given torch.bool"),
    "float": (torch.tensor(SORTED, dtype=torch.float32), "lengths: given torch.float32"),
    "two axes": (torch.tensor([SORTED]), r"lengths: given torch.int64 of shape \(1, 5\)"),
    "scalar": (torch.tensor(5), r"lengths: given torch.int64 of shape \(\)"),
    "floats in a list": ([7.0, 5.0, 5.0, 2.0, 1.0], "lengths: given .*, wanted integers"),
    "bools in a list": ([True] * 5, "lengths: given .*, wanted integers"),
    "text": ("abcde", "lengths: given 'abcde', wanted integers"),
    "bytes": (b"abcde", "lengths: given b'abcde', wanted integers"),
    "bools in tensors": ([torch.tensor(True)] * 5, "lengths: given .*, wanted integers"),
    "beyond int64": ([2**70, 1, 1, 1, 1], f"lengths: given {2**70}, wanted 0 to T = 7"),
    "on meta": (torch.tensor(SORTED, device="meta"), "lengths: given a tensor on meta"),
}


@pytest.mark.parametrize("case", BAD_LENGTHS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_bad_lengths_are_refused(case, batch_first, backend, kind):
    _, new = twins(backend, I, H, batch_first=batch_first, kind=kind)
    lengths, text = BAD_LENGTHS[case]
    x = torch.zeros(*((B, T) if batch_first else (T, B)), I, dtype=EXACT)
    with pytest.raises(ValueError, match=text):
        new(x, lengths=lengths)


def test_one_number_is_no_list_of_lengths(backend, kind):
    _, new = twins(backend, I, H, kind=kind)
    with pytest.raises((TypeError, ValueError), match="lengths"):
        new(torch.zeros(T, B, I, dtype=EXACT), lengths=3)


def test_lengths_do_not_go_with_unbatched_or_packed_input(backend, kind):
    _, new = twins(backend, I, H, kind=kind)
    x = torch.zeros(T, B, I, dtype=EXACT)
    with pytest.raises(ValueError, match="lengths: unbatched input has one length"):
        new(x[:, 0], lengths=[3])
    with pytest.raises(ValueError, match="lengths: a PackedSequence has its own"):
        new(pack_padded_sequence(x, torch.tensor(SORTED)), lengths=SORTED)


def test_lengths_are_checked_after_what_torch_checks(backend, kind):
    _, new = twins(backend, I, H, kind=kind)
    hx = start(kind, torch.zeros(3, B, H).to(EXACT))
    with pytest.raises(RuntimeError, match=r"Expected hidden(\[0\])? size"):
        new(torch.zeros(T, B, I).to(EXACT), hx, lengths=[99] * B)


def test_residual_connections_respect_lengths(own_backend, kind):
    rnn = getattr(rnnfast, kind)(H, H, 3, residual=True, dtype=EXACT, backend=own_backend)
    lengths = [0, 7, 3, 1, 6]
    x, hx = torch.randn(T, B, H, dtype=EXACT), states({"num_layers": 3}, kind)
    output, h_n = rnn(x, hx, lengths=lengths)
    for b, n in enumerate(lengths):
        assert (output[n:, b] == 0).all()
        if n:
            alone, alone_h_n = rnn(x[:n, b], mapped(lambda h, b=b: h[:, b], hx))
            assert_same(output[:n, b], alone)
            mapped(lambda all_, one, b=b: assert_same(all_[:, b], one), h_n, alone_h_n)


def test_packed_residual_and_sigmoid(own_backend, kind):
    own = for_kind(kind, {"nonlinearity": "sigmoid"})
    options = {"residual": True, "dtype": EXACT, "backend": own_backend}
    rnn = getattr(rnnfast, kind)(H, H, 2, **own, **options)
    x = torch.randn(T, B, H, dtype=EXACT)
    packed = pack_padded_sequence(x, torch.tensor(UNSORTED), enforce_sorted=False)
    output, h_n = rnn(packed)
    wanted, wanted_h_n = rnn(x, lengths=UNSORTED)
    assert_same(pad_packed_sequence(output)[0], wanted)
    mapped(assert_same, h_n, wanted_h_n)

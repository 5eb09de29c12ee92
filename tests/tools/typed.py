"""A user's script, for type checkers: it is not run. ``type: ignore`` and ``pyright: ignore`` mark
what they must refuse; both checkers report an ignore that they do not need."""

import logging

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from typing_extensions import assert_type

import rnnfast


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.rnn(x)[0]
        return y


x = torch.randn(5, 2, 8)

# The model keeps its type; an nn.RNN alone becomes another module.
net = Net()
net = rnnfast.replace(net)
assert_type(rnnfast.replace(net, report=None, track_gradient_flow=True, backend="cpu"), Net)
assert_type(rnnfast.to_torch(net), Net)
assert_type(rnnfast.replace(nn.Sequential(net)), nn.Sequential)
assert_type(rnnfast.replace(nn.RNN(8, 16)), rnnfast.RNN)
assert_type(rnnfast.to_torch(rnnfast.RNN(8, 16)), nn.RNN)
rnnfast.replace(net, init="he")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
rnnfast.replace(net, norm="")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]

# forward, as that of nn.RNN.
rnn = rnnfast.RNN(8, 16, 2, "relu", True, False, 0.1, True, "cpu", torch.float32)
output, h_n = rnn.forward(x)
assert_type(output, Tensor)
assert_type(h_n, Tensor)
last: Tensor = output[-1]
packed, h_n = rnn.forward(pack_sequence([x[:, 0]]), h_n)
assert_type(packed, PackedSequence)
output, _ = rnn.forward(x, lengths=[5, 3], reset=torch.zeros(5, 2, dtype=torch.bool))
output, _ = rnn(x, h_n, lengths=torch.tensor([5, 3]))
weight: Tensor = rnn.weight_hh_l0.detach() if isinstance(rnn.weight_hh_l0, Tensor) else last
nn.Sequential(rnn).to("cpu").train()

# Options.
rnnfast.RNN(8, 16, norm="layer", init="orthogonal", track_gradient_flow="sample", num_heads=2)
rnnfast.RNN(8, 16, norm="group")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
rnnfast.RNN(8, 16, "tanh")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
rnnfast.RNN(8, 16, hiden_size=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
rnnfast.RNN(8, 16, backend="gpu")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
y, h_n = rnnfast.functional.rnn(x, h_n[0], nonlinearity="sigmoid", backend="cpu")
rnnfast.functional.rnn(x, x, backend="")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

# LSTM and GRU. return_cell_states adds a third value.
lstm = rnnfast.LSTM(8, 16, 2, batch_first=True, forget_bias=1.0, num_heads=2)
y, (h_n, c_n) = lstm.forward(x)
assert_type(y, Tensor)
assert_type(c_n, Tensor)
packed, (h_n, c_n) = lstm.forward(pack_sequence([x[:, 0]]), (h_n, c_n))
assert_type(packed, PackedSequence)
with_cells = rnnfast.LSTM(8, 16, return_cell_states=True, chrono_steps=100)
y, (h_n, c_n), cells = with_cells.forward(x, lengths=[5, 3])
assert_type(cells, Tensor)
packed, (h_n, c_n), packed_cells = with_cells.forward(pack_sequence([x[:, 0]]))
assert_type(packed_cells, PackedSequence)
y, _, _ = lstm.forward(x)  # type: ignore[misc]  # pyright: ignore[reportAssignmentType]
any_cells = rnnfast.LSTM(8, 16, return_cell_states=bool(len(x)))
found_by_any = any_cells.forward(x)[0]
rnnfast.LSTM(8, 16, init="he")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
assert_type(rnnfast.replace(nn.LSTM(8, 16)), rnnfast.LSTM)
assert_type(rnnfast.to_torch(lstm), nn.LSTM)
assert_type(rnnfast.to_torch(with_cells), nn.LSTM)
gru = rnnfast.GRU(8, 16, init="orthogonal", chrono_steps=10)
y, h_n = gru.forward(x, reset=torch.zeros(5, 2, dtype=torch.bool))
assert_type(h_n, Tensor)
rnnfast.GRU(8, 16, forget_bias=1.0)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
assert_type(rnnfast.to_torch(gru), nn.GRU)
y, (h_n, c_n) = rnnfast.functional.lstm(x, h_n, (h_n, c_n))
y, (h_n, c_n), cells = rnnfast.functional.lstm(x, h_n, return_cell_states=True)
y, h_n = rnnfast.functional.gru(x, h_n, b_hn=h_n, lengths=[5, 3])

# Results.
text: str = rnnfast.info() + rnnfast.explain(net, x) + rnnfast.explain(rnn, x, lengths=[5, 3])
flow = rnn.gradient_flow
assert_type(flow, rnnfast.GradientFlow)
flow.plot().savefig("flow.png")
advice: tuple[str, ...] = flow.advice
half_life: Tensor = flow.half_life
word: str = flow.verdict.word
found = rnnfast.probe(rnn, x, lengths=[5, 3], seed=1)
found.plot().show()
assert_type(found, rnnfast.GradientProbe)
with rnnfast.GradientMonitor(net, torch.optim.SGD(net.parameters(), 0.1), every=2) as monitor:
    assert_type(monitor, rnnfast.GradientMonitor)
monitor.plot("state_norm").savefig("map.png")
monitor.plot("gain")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
steps: list[int] = [row.step for row in monitor.rows()]
try:
    rnnfast.RNN(8, 16, backend="cuda")(x)
except rnnfast.BackendError as error:
    text += str(error)


# Where a user's code has them.
class Tagger(nn.Module):
    def __init__(self, inner: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnnfast.RNN(8, 16, batch_first=True)
        self.inner = inner

    def forward(self, x: Tensor, lengths: list[int]) -> Tensor:
        y, _ = self.rnn.forward(x, lengths=lengths)
        return y


def swapped(model: nn.Module) -> nn.Module:
    return rnnfast.replace(model, report=logging.info)


tagger = nn.DataParallel(Tagger(inner=rnnfast.RNN(8, 16)))
swapped(tagger)
lines: list[str] = []
rnnfast.to_torch(tagger, report=lines.append)
rnn.nonlinearity = "relu"
rnn.track_gradient_flow = True
rnn.bptt_window, rnn.clip_state_grad, rnn.backend = 5, 1.0, "torch"
rnn.flatten_parameters()
scaler, world = torch.amp.GradScaler("cpu"), torch.distributed.group.WORLD
rnnfast.GradientMonitor(net, grad_scaler=scaler, group=world, writer=None, out="flow")
flow.reduce(world).pooled().to_dict()

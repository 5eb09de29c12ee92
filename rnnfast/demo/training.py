"""Several networks learn the same task on the same batches; times and gradients are recorded."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import rnnfast
from rnnfast.gradient_flow import GradientFlow

from .tasks import COLUMNS, Task

HIDDEN_SIZE = 128
BATCH_SIZE = 32
LEARNING_RATE = 1e-3  # at the start; a cosine takes it to 0
GRAD_NORM = 1.0
COMPARED = 20  # the training steps that nn.RNN takes

TORCH = "torch.nn.RNN"
PLAIN = "tanh"  # the network of TORCH, from the same weights
CURES = {  # the nonlinearity is tanh unless an option says otherwise
    PLAIN: {},
    "orthogonal": {"init": "orthogonal"},
    "ReLU, identity": {"nonlinearity": "relu", "init": "identity"},
    "layer norm": {"norm": "layer"},
    "clipping": {"clip_state_grad": 1.0},
    "residual, 2 layers": {"num_layers": 2, "residual": True},
}


class Classifier(nn.Module):
    """An RNN and a linear layer that reads one of ten digits from its last state. With several
    layers another linear layer comes first, which gives the input the width that residual
    connections need."""

    def __init__(self, make: Callable[..., nn.Module], dtype=torch.float32, **options) -> None:
        super().__init__()
        wide = options.get("num_layers", 1) > 1
        self.embed = nn.Linear(COLUMNS, HIDDEN_SIZE, dtype=dtype) if wide else nn.Identity()
        width = HIDDEN_SIZE if wide else COLUMNS
        self.rnn = make(width, HIDDEN_SIZE, batch_first=True, dtype=dtype, **options)
        self.head = nn.Linear(HIDDEN_SIZE, 10, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 8] -> [B, 10]
        output, _ = self.rnn(self.embed(x))
        return self.head(output[:, -1])


def networks(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Classifier]:
    """nn.RNN, and an rnnfast.RNN for each of the CURES, which records its gradient."""
    torch.manual_seed(seed)
    made = {TORCH: Classifier(nn.RNN, dtype)}
    for name, options in CURES.items():
        torch.manual_seed(seed)
        made[name] = Classifier(rnnfast.RNN, dtype, track_gradient_flow=True, **options)
    return made


@dataclass
class Curve:
    """The training of one network."""

    losses: list[float] = field(default_factory=list)  # one for each step
    seconds: list[float] = field(default_factory=list)  # one for each step
    accuracies: list[float] = field(default_factory=list)  # one for each epoch
    # For the first and the last epoch the records of its steps; nn.RNN has none.
    flows: list[list[GradientFlow]] = field(default_factory=list)

    def epoch_losses(self) -> list[float]:
        size = len(self.losses) // len(self.accuracies)
        return [
            statistics.fmean(self.losses[i : i + size]) for i in range(0, len(self.losses), size)
        ]


def train(task: Task, models: dict[str, Classifier], seed: int) -> dict[str, Curve]:
    """Every model learns from every batch; nn.RNN from the first COMPARED batches, to compare.

    The order of the models is reversed after each step, so that no model always finds the caches
    and the clock speed that the same other model leaves behind. The time of a step includes taking
    the record, not reading it.
    """
    curves = {name: Curve() for name in models}
    x, labels = task.train
    batches = len(labels) // BATCH_SIZE
    total = task.epochs * batches
    optimizers = {n: torch.optim.Adam(m.parameters(), LEARNING_RATE) for n, m in models.items()}
    schedules = {
        n: torch.optim.lr_scheduler.CosineAnnealingLR(o, total) for n, o in optimizers.items()
    }
    generator = torch.Generator().manual_seed(seed)
    order = list(models)
    with tqdm(total=total, desc=task.name, unit="step", disable=None) as progress:
        for epoch in range(task.epochs):
            flows: dict[str, list[GradientFlow]] = {name: [] for name in models}
            shuffled = torch.randperm(len(labels), generator=generator)
            for step, index in enumerate(shuffled.split(BATCH_SIZE)[:batches]):
                if epoch == 0 and step == COMPARED:
                    order.remove(TORCH)
                for name in order:
                    start = time.perf_counter()
                    loss = training_step(models[name], optimizers[name], x[index], labels[index])
                    curves[name].seconds.append(time.perf_counter() - start)
                    curves[name].losses.append(loss.item())
                    schedules[name].step()
                    if isinstance(models[name].rnn, rnnfast.RNN):
                        flows[name].append(models[name].rnn.gradient_flow)
                order.reverse()
                progress.update()
            for name in order:
                curves[name].accuracies.append(accuracy(models[name], *task.test))
                if epoch in (0, task.epochs - 1):
                    curves[name].flows.append(flows[name])
            progress.set_postfix_str(f"epoch {epoch + 1} of {task.epochs}")
    return curves


def training_step(
    model: Classifier, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor
) -> Tensor:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), labels)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), GRAD_NORM)
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def accuracy(model: Classifier, x: Tensor, labels: Tensor) -> float:
    return (model(x).argmax(dim=1) == labels).double().mean().item()


def largest_difference(a: Curve, b: Curve) -> float:
    """The largest difference between the losses of a step, over the steps that both took."""
    return max(abs(x - y) for x, y in zip(a.losses, b.losses, strict=False))

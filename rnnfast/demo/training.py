"""Several networks learn the same task from the same weights and batches, and are timed."""

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

from .tasks import Task

HIDDEN_SIZE = 128
BATCH_SIZE = 32
LEARNING_RATE = 1e-3  # at the start; a cosine takes it to 0
GRAD_NORM = 1.0

TORCH, NUDGED, RNNFAST = "torch.nn.RNN", "torch.nn.RNN, nudged", "rnnfast.RNN"


class Classifier(nn.Module):
    """An RNN whose last state, through a linear layer, names one of ten digits."""

    def __init__(self, rnn_class: Callable[..., nn.Module], dtype: torch.dtype) -> None:
        super().__init__()
        self.rnn = rnn_class(1, HIDDEN_SIZE, batch_first=True, dtype=dtype)
        self.head = nn.Linear(HIDDEN_SIZE, 10, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 1] -> [B, 10]
        _, h_n = self.rnn(x)
        return self.head(h_n[-1])


@dataclass
class Curve:
    """What one network did: a loss and a time for each step, an accuracy for each epoch."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)

    def milliseconds(self) -> float:
        """The median training step."""
        return 1e3 * statistics.median(self.seconds)

    def epoch_losses(self) -> list[float]:
        size = len(self.losses) // len(self.accuracies)
        return [
            statistics.fmean(self.losses[i : i + size]) for i in range(0, len(self.losses), size)
        ]


def contestants(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Classifier]:
    """nn.RNN; rnnfast.RNN with its weights; and, to judge their difference by, a nudged nn.RNN.

    Training an RNN makes small differences grow, whatever their cause. The nudged one has every
    weight moved by one unit in the last place: it shows how far nn.RNN gets from itself.
    """
    torch.manual_seed(seed)
    models = {
        TORCH: Classifier(nn.RNN, dtype),
        NUDGED: Classifier(nn.RNN, dtype),
        RNNFAST: Classifier(rnnfast.RNN, dtype),
    }
    for model in models.values():
        model.load_state_dict(models[TORCH].state_dict())
    with torch.no_grad():
        for weight in models[NUDGED].parameters():
            weight.copy_(torch.nextafter(weight, torch.full_like(weight, torch.inf)))
    return models


def train(task: Task, models: dict[str, Classifier], seed: int) -> dict[str, Curve]:
    """Every batch goes through every model. Their order turns around from one step to the next:
    none has always the caches and the clock speed that another one left behind."""
    curves = {name: Curve() for name in models}
    x, labels = task.train
    batches_per_epoch = len(labels) // BATCH_SIZE
    total = task.epochs * batches_per_epoch
    optimizers = {n: torch.optim.Adam(m.parameters(), LEARNING_RATE) for n, m in models.items()}
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, total) for o in optimizers.values()]
    generator = torch.Generator().manual_seed(seed)
    order = list(models)
    with tqdm(total=total, desc=task.name, unit="step", disable=None) as progress:
        for epoch in range(task.epochs):
            shuffled = torch.randperm(len(labels), generator=generator)
            for index in shuffled.split(BATCH_SIZE)[:batches_per_epoch]:
                batch = x[index], labels[index]
                for name in order:
                    start = time.perf_counter()
                    loss = training_step(models[name], optimizers[name], *batch)
                    curves[name].seconds.append(time.perf_counter() - start)
                    curves[name].losses.append(loss.item())
                order.reverse()
                for schedule in schedules:
                    schedule.step()
                progress.update()
            for name, model in models.items():
                curves[name].accuracies.append(accuracy(model, *task.test))
            progress.set_postfix_str(f"accuracy {curves[order[0]].accuracies[epoch]:.1%}")
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


def largest_difference(a: Curve, b: Curve, steps: int | None = None) -> float:
    """Of the losses of one step, over the first ``steps`` or all."""
    return max(abs(x - y) for x, y in zip(a.losses[:steps], b.losses[:steps]))

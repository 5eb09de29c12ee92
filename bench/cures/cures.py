"""The networks and optimizers; trains one of them and reads its gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rnnfast
from rnnfast.demo.tasks import Task
from rnnfast.demo.training import BATCH_SIZE, Classifier, accuracy, training_step

CHRONO = {"chrono_steps": 108}  # the steps of the task
LAYER_NORM, IDENTITY = {"norm": "layer"}, {"nonlinearity": "relu", "init": "identity"}
OPTIMIZERS = {
    "Adam": lambda weights: torch.optim.Adam(weights, 1e-3),
    "SGD": lambda weights: torch.optim.SGD(weights, 0.1, momentum=0.9),
    "RMSprop": lambda weights: torch.optim.RMSprop(weights, 1e-3),
}


@dataclass(frozen=True, eq=False)
class Cure:
    """One line of the table."""

    kind: str
    name: str
    options: dict
    optimizer: str = "Adam"
    make: Callable[..., nn.Module] = rnnfast.RNN


CURES = (
    Cure("none", "tanh, torch's init", {}),
    Cure("init", "tanh, Glorot", {"init": "glorot"}),
    Cure("init", "tanh, He", {"init": "he"}),
    Cure("init", "tanh, orthogonal", {"init": "orthogonal"}),
    Cure("init", "tanh, identity", {"init": "identity"}),
    Cure("ReLU", "ReLU, torch's init", {"nonlinearity": "relu"}),
    Cure("ReLU", "ReLU, orthogonal", {"nonlinearity": "relu", "init": "orthogonal"}),
    Cure("ReLU", "ReLU, identity", IDENTITY),
    Cure("norm", "tanh, layer norm", LAYER_NORM),
    Cure("norm", "tanh, orthogonal, layer norm", {"init": "orthogonal"} | LAYER_NORM),
    Cure("norm", "ReLU, identity, layer norm", IDENTITY | LAYER_NORM),
    Cure("norm", "tanh, batch norm", {"norm": "batch"}),
    Cure("clipping", "tanh, clip_state_grad=1", {"clip_state_grad": 1.0}),
    Cure("clipping", "ReLU, identity, clip_state_grad=1", IDENTITY | {"clip_state_grad": 1.0}),
    Cure("skip", "tanh, 2 layers", {"num_layers": 2}),
    Cure("skip", "tanh, 2 layers, residual", {"num_layers": 2, "residual": True}),
    Cure("optimizer", "tanh, layer norm, SGD", LAYER_NORM, "SGD"),
    Cure("optimizer", "tanh, layer norm, RMSprop", LAYER_NORM, "RMSprop"),
    Cure("optimizer", "tanh, SGD", {}, "SGD"),
    Cure("optimizer", "tanh, RMSprop", {}, "RMSprop"),
    Cure("gating", "GRU, torch's init", {}, make=rnnfast.GRU),
    Cure("gating", "GRU, orthogonal", {"init": "orthogonal"}, make=rnnfast.GRU),
    Cure("gating", "GRU, chrono_steps=108", CHRONO, make=rnnfast.GRU),
    Cure("gating", "LSTM, torch's init", {}, make=rnnfast.LSTM),
    Cure("gating", "LSTM, orthogonal", {"init": "orthogonal"}, make=rnnfast.LSTM),
    Cure("gating", "LSTM, forget_bias=1", {"forget_bias": 1.0}, make=rnnfast.LSTM),
    Cure("gating", "LSTM, forget_bias=3", {"forget_bias": 3.0}, make=rnnfast.LSTM),
    Cure("gating", "LSTM, chrono_steps=108", CHRONO, make=rnnfast.LSTM),
)


@dataclass(frozen=True)
class Outcome:
    accuracy: float  # on digits not trained on, after the last epoch
    first: float  # log growth of the gradient per step, before training
    last: float  # after training


def run(cure: Cure, task: Task, seed: int) -> Outcome:
    torch.manual_seed(seed)
    model = Classifier(cure.make, track_gradient_flow=True, **cure.options)
    x, labels = task.train
    optimizer = OPTIMIZERS[cure.optimizer](model.parameters())
    batches = len(labels) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.epochs * batches)
    generator = torch.Generator().manual_seed(seed)
    first = log_growth(model, x[:BATCH_SIZE], labels[:BATCH_SIZE])
    for _ in range(task.epochs):
        shuffled = torch.randperm(len(labels), generator=generator)
        for index in shuffled.split(BATCH_SIZE)[:batches]:
            training_step(model, optimizer, x[index], labels[index])
            schedule.step()
    last = log_growth(model, x[:BATCH_SIZE], labels[:BATCH_SIZE])
    model.eval()  # batch norm
    return Outcome(accuracy(model, *task.test), first, last)


def log_growth(model: Classifier, x: Tensor, labels: Tensor) -> float:
    """Mean logarithm of the factor of the loss's gradient per step back. With several layers, that
    of the layer where it lasts longest."""
    F.cross_entropy(model(x), labels).backward()
    model.zero_grad()
    return model.rnn.gradient_flow.log_growth[:, 0].max().item()


def outcomes(cures: tuple[Cure, ...], task: Task, seeds: int) -> Iterator[tuple[Cure, Outcome]]:
    for seed in range(seeds):
        for cure in cures:
            yield cure, run(cure, task, seed)

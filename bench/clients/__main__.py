"""``python -m bench.clients``: trains other libraries' models before and after rnnfast.replace."""

from __future__ import annotations

import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import skorch
import torch
from darts import TimeSeries
from darts.models import BlockRNNModel, RNNModel
from neuralforecast import NeuralForecast
from neuralforecast import models as forecasters
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.data import DataLoader, TensorDataset

import rnnfast
from rnnfast.report import machine

PAGE = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- made by python -m bench.clients -->", "<!-- end -->"
OFF = ("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar")
TRAINER = {"accelerator": "cpu"} | dict.fromkeys(OFF, False)
BOUND = 1e-10  # in float64. A bias that is wrong by a factor of 1 + 1e-6 exceeds it in each run
FITS = 3  # timed before and after replace, in turns
Prepare = Callable[[nn.Module], object]  # changes a model at the start of its training
Fit = Callable[[], Sequence[float]]  # trains, and returns the loss of each training step


class AtStart(pl.Callback):
    """Prepares a model of Lightning, and keeps the losses of its training."""

    def __init__(self, prepare: Prepare) -> None:
        self.prepare, self.losses = prepare, []

    def on_fit_start(self, trainer, pl_module) -> None:
        self.prepare(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(outputs["loss"]))

    def __deepcopy__(self, memo: dict) -> AtStart:
        return self  # neuralforecast trains a deep copy of the model


class Classifier(nn.Module):
    """Two classes, from the last states of a recurrent network."""

    def __init__(self, cell: str, **options: object) -> None:
        super().__init__()
        self.rnn = getattr(nn, cell)(8, batch_first=True, **options)
        self.directions = 1 + self.rnn.bidirectional
        self.out = nn.Linear(self.rnn.hidden_size * self.directions, 2)

    def forward(self, x: Tensor | PackedSequence) -> Tensor:
        h = self.rnn(x)[1]
        h = h[0] if isinstance(h, tuple) else h
        return self.out(torch.cat([*h[-self.directions :]], 1))


class LitClassifier(pl.LightningModule):
    def __init__(self, cell: str) -> None:
        super().__init__()
        options = {"num_layers": 2, "bidirectional": True, "dropout": 0.2}
        self.model = Classifier(cell, hidden_size=128, **options)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        x, labels, lengths = batch
        x = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return nn.functional.cross_entropy(self.model(x), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def sums(rows: int, T: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, T, 8)
    return x, (x[:, T // 2 :].sum((1, 2)) > 0).long()


def waves(rows: int, T: int) -> np.ndarray:
    """An hourly series in each row: a daily wave with noise."""
    draw, t = np.random.default_rng(0), np.arange(T)
    y = np.sin(2 * np.pi * t / 24 + draw.uniform(0, 6, (rows, 1)))
    return y + 0.2 * draw.standard_normal((rows, T))


def lightning(cell: str, prepare: Prepare, dtype: torch.dtype) -> Fit:
    pl.seed_everything(0, verbose=False)
    data = TensorDataset(*sums(512, 100), torch.randint(50, 101, (512,)))
    loader = DataLoader(data, batch_size=64, shuffle=True)
    model, start = LitClassifier(cell), AtStart(prepare)
    options = {"max_epochs": 3, "precision": f"{torch.finfo(dtype).bits}-true"}
    trainer = pl.Trainer(callbacks=[start], **options, **TRAINER)
    return lambda: trainer.fit(model, loader) or start.losses


def skorch_classifier(cell: str, prepare: Prepare, dtype: torch.dtype) -> Fit:
    torch.manual_seed(0)
    x, labels = sums(1024, 50)
    module = {"module": Classifier, "module__cell": cell, "module__hidden_size": 64}
    training = {"criterion": nn.CrossEntropyLoss, "optimizer": torch.optim.Adam, "max_epochs": 4}
    net = skorch.NeuralNetClassifier(batch_size=64, verbose=0, **module, **training)
    prepare(net.initialize().module_.to(dtype))
    losses = slice(None), "batches", slice(None), "train_loss"  # of each batch of each epoch
    return lambda: np.ravel(net.partial_fit(x.to(dtype), labels).history[losses])


def darts(kind: type, cell: str, prepare: Prepare, dtype: torch.dtype) -> Fit:
    start = AtStart(prepare)
    options = {"input_chunk_length": 72, "hidden_dim": 64, "n_rnn_layers": 2, "dropout": 0.1}
    options |= {"output_chunk_length": 24} if kind is BlockRNNModel else {"training_length": 96}
    options |= {"pl_trainer_kwargs": TRAINER | {"callbacks": [start]}, "n_epochs": 3}
    model = kind(model=cell, batch_size=32, random_state=0, **options)
    y = waves(2, 400).astype("f4" if dtype == torch.float32 else "f8")  # the dtype of the model
    series = [TimeSeries.from_values(row) for row in y]
    return lambda: model.fit(series) and start.losses


def neuralforecast(cell: str, recurrent: bool, prepare: Prepare, dtype: torch.dtype) -> Fit:
    start, y = AtStart(prepare), waves(32, 400)
    hours = pd.date_range("2026-01-01", periods=y.shape[1], freq="h")
    frames = [pd.DataFrame({"unique_id": i, "ds": hours, "y": y[i]}) for i in range(len(y))]
    options = {"max_steps": 40, "precision": f"{torch.finfo(dtype).bits}-true"} | TRAINER
    options |= {"windows_batch_size": 64, "recurrent": recurrent, "callbacks": [start]}
    forecast = NeuralForecast([getattr(forecasters, cell)(24, 72, **options)], freq="h")
    return lambda: forecast.fit(pd.concat(frames)) or start.losses


RUNS: dict[tuple[str, str], Callable[[Prepare, torch.dtype], Fit]] = {
    ("pytorch-lightning", "nn.LSTM, bidirectional, packed"): partial(lightning, "LSTM"),
    ("pytorch-lightning", "nn.GRU, bidirectional, packed"): partial(lightning, "GRU"),
    ("skorch", "nn.LSTM"): partial(skorch_classifier, "LSTM"),
    ("skorch", "nn.GRU"): partial(skorch_classifier, "GRU"),
    ("darts", "RNNModel LSTM"): partial(darts, RNNModel, "LSTM"),
    ("darts", "RNNModel GRU"): partial(darts, RNNModel, "GRU"),
    ("darts", "BlockRNNModel LSTM"): partial(darts, BlockRNNModel, "LSTM"),
    ("neuralforecast", "LSTM"): partial(neuralforecast, "LSTM", False),
    ("neuralforecast", "LSTM, recurrent"): partial(neuralforecast, "LSTM", True),
    ("neuralforecast", "GRU"): partial(neuralforecast, "GRU", False),
}


def difference(losses: Sequence[float], others: Sequence[float]) -> float:
    """The largest relative difference at a training step; NaN if a loss is NaN."""
    return float(np.max(np.abs(np.subtract(losses, others) / losses)))


def measure(build: Callable[[Prepare, torch.dtype], Fit]) -> tuple[bool, str]:
    """Trains the model as it is and after replace. Returns the verdict, and cells of the table."""
    lines: list[str] = []
    changes = {"before": lambda _: None, "after": partial(rnnfast.replace, report=lines.append)}
    exact = difference(*(build(change, torch.float64)() for change in changes.values()))
    swapped = sum(line.startswith("swapped") for line in lines)
    losses, seconds = {}, {name: [] for name in changes}
    for turn in range(FITS):
        for name in sorted(changes, reverse=turn % 2 == 0):
            fit = build(changes[name], torch.float32)
            start = time.perf_counter()
            losses[name] = fit()
            seconds[name].append(time.perf_counter() - start)
    before, after = map(statistics.median, seconds.values())
    ratio = statistics.median(x / y for x, y in zip(seconds["before"], seconds["after"]))
    single = difference(losses["before"], losses["after"])
    cells = f"{swapped} | {len(losses['after'])} | {exact:.1e} | {single:.1e}"
    times = f"{before:.2f} | {after:.2f} | {ratio:.2f}x"
    return swapped > 0 and exact <= BOUND, f"{cells} | {times}"


def main() -> int:
    warnings.simplefilter("ignore")  # advice of the libraries about their own data loaders
    logging.disable(logging.WARNING)
    names = "library", "model", "swapped modules", "training steps", "difference in float64"
    names += "in float32", "seconds before", "seconds after", "speed-up"
    lines, wrong = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"], []
    for (client, model), build in RUNS.items():
        same, cells = measure(build)
        lines.append(f"| {client} {version(client)} | {model} | {cells} |")
        print(lines[-1], flush=True)
        wrong += [] if same else [f"{client} {model}"]
    facts = {"threads": torch.get_num_threads()} | machine()
    lines += ["", ", ".join(f"{name} {fact}" for name, fact in facts.items())]
    head, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text("\n".join([f"{head}{BEGIN}\n", *lines, f"\n{END}{rest.partition(END)[2]}"]))
    print(f"other losses: {', '.join(wrong)}" if wrong else "the same losses")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

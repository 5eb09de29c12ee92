"""``python -m bench.clients``: trains models of other libraries before and after rnnfast.replace.

Each library trains its own model. A callback of the library swaps the recurrent modules at the
start of the training.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
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
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast
from rnnfast.report import machine

HERE = Path(__file__).parent
BEGIN, END = "<!-- made by python -m bench.clients -->", "<!-- end -->"
QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "accelerator": "cpu",
}
PRECISION = {torch.float32: "32-true", torch.float64: "64-true"}
BOUND = 1e-9  # for float64, far below the rounding of float32
Prepare = Callable[[nn.Module], object]  # changes a model at the start of its training
Fit = Callable[[], list[float]]  # trains, and returns the loss of each training step


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
    """The sign of a long sum, from the last states of a recurrent network."""

    def __init__(self, cell: str, **options: object) -> None:
        super().__init__()
        self.rnn = getattr(nn, cell)(8, batch_first=True, **options)
        self.out = nn.Linear(self.rnn.hidden_size * (1 + self.rnn.bidirectional), 2)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if lengths is not None:
            x = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        state = self.rnn(x)[1]
        h = state[0] if isinstance(state, tuple) else state
        return self.out(torch.cat([*h[-1 - self.rnn.bidirectional :]], 1))


class LitClassifier(pl.LightningModule):
    def __init__(self, cell: str) -> None:
        super().__init__()
        options = {"num_layers": 2, "bidirectional": True, "dropout": 0.2}
        self.model = Classifier(cell, hidden_size=128, **options)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        x, lengths, labels = batch
        return nn.functional.cross_entropy(self.model(x, lengths.cpu()), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)


def sums(rows: int, T: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, T, 8)
    return x, (x[:, T // 2 :].sum((1, 2)) > 0).long()


def waves(rows: int, T: int) -> np.ndarray:
    """Noisy daily waves of an hourly series in each row."""
    draw = np.random.default_rng(0)
    phase, t = draw.uniform(0, 6, (rows, 1)), np.arange(T)
    y = np.sin(2 * np.pi * t / 24 + phase) + 0.2 * draw.standard_normal((rows, T))
    return y


def lightning(cell: str, prepare: Prepare, dtype: torch.dtype) -> Fit:
    pl.seed_everything(0, verbose=False)
    (x, labels), lengths = sums(512, 100), torch.randint(50, 101, (512,))
    data = torch.utils.data.TensorDataset(x, lengths, labels)
    loader = torch.utils.data.DataLoader(data, batch_size=64, shuffle=True)
    model, start = LitClassifier(cell), AtStart(prepare)
    trainer = pl.Trainer(max_epochs=3, precision=PRECISION[dtype], callbacks=[start], **QUIET)
    return lambda: trainer.fit(model, loader) or start.losses


def skorch_classifier(cell: str, prepare: Prepare, dtype: torch.dtype) -> Fit:
    class Start(skorch.callbacks.Callback):
        def on_train_begin(self, net: skorch.NeuralNet, **_: object) -> None:
            prepare(net.module_.to(dtype))

    torch.manual_seed(0)
    x, labels = sums(1024, 50)
    net = skorch.NeuralNetClassifier(
        Classifier,
        criterion=nn.CrossEntropyLoss,
        module__cell=cell,
        module__hidden_size=64,
        optimizer=torch.optim.Adam,
        max_epochs=4,
        batch_size=64,
        callbacks=[Start()],
        verbose=0,
    )

    def fit() -> list[float]:
        history = net.fit(x.to(dtype), labels).history[:, "batches", :, "train_loss"]
        return [loss for epoch in history for loss in epoch]

    return fit


def darts(kind: type, cell: str, prepare: Prepare, dtype: torch.dtype) -> Fit:
    start = AtStart(prepare)
    trainer = {**QUIET, "callbacks": [start]}
    options = {"output_chunk_length": 24} if kind is BlockRNNModel else {"training_length": 96}
    model = kind(
        model=cell,
        input_chunk_length=72,
        hidden_dim=64,
        n_rnn_layers=2,
        dropout=0.1,
        batch_size=32,
        n_epochs=3,
        random_state=0,
        pl_trainer_kwargs=trainer,
        **options,
    )
    y = waves(2, 400).astype("f4" if dtype == torch.float32 else "f8")  # the dtype of the model
    series = [TimeSeries.from_values(row) for row in y]
    return lambda: model.fit(series, dataloader_kwargs={"num_workers": 0}) and start.losses


def neuralforecast(cell: str, recurrent: bool, prepare: Prepare, dtype: torch.dtype) -> Fit:
    start, y = AtStart(prepare), waves(32, 400)
    hours = pd.date_range("2026-01-01", periods=y.shape[1], freq="h")
    frames = [pd.DataFrame({"unique_id": i, "ds": hours, "y": y[i]}) for i in range(len(y))]
    options = {"max_steps": 40, "windows_batch_size": 64, "recurrent": recurrent}
    options["precision"] = PRECISION[dtype]
    model = getattr(forecasters, cell)(24, 72, callbacks=[start], **options, **QUIET)
    forecast = NeuralForecast([model], freq="h")
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


def difference(losses: list[float], others: list[float]) -> float:
    assert len(losses) == len(others) > 1
    return max(abs(x - y) / abs(x) for x, y in zip(losses, others))


def measure(build: Callable[[Prepare, torch.dtype], Fit], fits: int) -> dict[str, float]:
    """Trains in turns: the model as it is, and after replace."""
    lines: list[str] = []
    changes = {"before": lambda _: None, "after": partial(rnnfast.replace, report=lines.append)}
    exact = difference(*(build(change, torch.float64)() for change in changes.values()))
    swapped = sum(line.startswith("swapped") for line in lines)
    losses: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in changes}
    for turn in range(fits):
        for name in sorted(changes, reverse=turn % 2 == 0):
            fit = build(changes[name], torch.float32)
            start = time.perf_counter()
            losses[name] = fit()
            seconds[name].append(time.perf_counter() - start)
    before, after = (statistics.median(seconds[name]) for name in changes)
    ratio = statistics.median(x / y for x, y in zip(seconds["before"], seconds["after"]))
    counts = {"swapped": swapped, "steps": len(losses["after"]), "float64": exact}
    single = difference(losses["before"], losses["after"])
    return counts | {"float32": single, "before": before, "after": after, "ratio": ratio}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.clients", description=__doc__)
    parser.add_argument("--fits", type=int, default=3, help="timed fits before and after replace")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # advice of the libraries about their own data loaders
    logging.disable(logging.WARNING)
    lines = [
        "| library | model | swapped modules | training steps | difference in float64 "
        "| in float32 | seconds before | seconds after | speed-up |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    wrong = []
    for (client, model), build in RUNS.items():
        row = measure(build, options.fits)
        cells = "{swapped} | {steps} | {float64:.1e} | {float32:.1e}".format(**row)
        times = "{before:.2f} | {after:.2f} | {ratio:.2f}x".format(**row)
        lines.append(f"| {client} {version(client)} | {model} | {cells} | {times} |")
        print(lines[-1], flush=True)
        if not (row["float64"] <= BOUND and row["swapped"]):
            wrong.append(f"{client} {model}")
    facts = "torch {torch}, {processor}, SIMD level {simd}, commit {commit}, {date}"
    lines += ["", f"{torch.get_num_threads()} threads, {facts.format(**machine())}."]
    page = HERE / "README.md"
    head, _, rest = page.read_text().partition(BEGIN)
    page.write_text("\n".join([f"{head}{BEGIN}\n", *lines, f"\n{END}{rest.partition(END)[2]}"]))
    print(f"other losses: {', '.join(wrong)}" if wrong else "the same losses")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

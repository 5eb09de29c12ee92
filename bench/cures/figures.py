"""``python -m bench.cures.figures`` draws the pictures of docs/gradient_flow.md."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rnnfast
from rnnfast.demo.tasks import digits_then_noise
from rnnfast.demo.training import BATCH_SIZE, GRAD_NORM, LEARNING_RATE, Classifier

EPOCHS = 8  # as in the demo


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cures.figures", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/gradient_flow"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rnn, x = untrained()
    at_every_step(rnn, x).plot().savefig(options.out / "flow.png")
    rnn, x = one_that_remembers()
    at_every_step(rnn, x, ignored=1).plot().savefig(options.out / "record.png")
    rnnfast.probe(rnn, x).plot().savefig(options.out / "probe.png")
    training().plot("state_norm").savefig(options.out / "heat_map.png")


def untrained() -> tuple[rnnfast.RNN, Tensor]:
    torch.manual_seed(0)
    return rnnfast.RNN(8, 64, track_gradient_flow=True), torch.randn(100, 32, 8)


def one_that_remembers() -> tuple[rnnfast.RNN, Tensor]:
    """A network whose unit 0 keeps its value, which nothing reads. The others forget."""
    rnn, x = untrained()
    with torch.no_grad():
        rnn.weight_hh_l0[0] = rnn.weight_hh_l0[:, 0] = 0
        rnn.weight_hh_l0[0, 0] = 1
        for weight in (rnn.weight_ih_l0, rnn.bias_ih_l0, rnn.bias_hh_l0):
            weight[0] = 0
    return rnn, x


def at_every_step(rnn: rnnfast.RNN, x: Tensor, ignored: int = 0) -> rnnfast.GradientFlow:
    """The record under a loss at every step that ignores the first units."""
    rnn(x)[0][..., ignored:].square().mean().backward()
    return rnn.gradient_flow


def training() -> rnnfast.GradientMonitor:
    """Trains two networks on the demo's task in one model, so that they share a colour scale."""
    task = digits_then_noise(100, seed=0, epochs=EPOCHS)
    pair = nn.ModuleDict()
    for name, options in {"tanh": {}, "layer norm": {"norm": "layer"}}.items():
        torch.manual_seed(0)
        pair[name] = Classifier(rnnfast.RNN, track_gradient_flow=True, **options)
    x, labels = task.train
    optimizer = torch.optim.Adam(pair.parameters(), LEARNING_RATE)
    batches = len(labels) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * batches)
    generator = torch.Generator().manual_seed(0)
    with rnnfast.GradientMonitor(pair, optimizer) as monitor:
        for _ in range(EPOCHS):
            shuffled = torch.randperm(len(labels), generator=generator)
            for index in shuffled.split(BATCH_SIZE)[:batches]:
                optimizer.zero_grad()
                for model in pair.values():
                    F.cross_entropy(model(x[index]), labels[index]).backward()
                    nn.utils.clip_grad_norm_(model.parameters(), GRAD_NORM)
                optimizer.step()
                schedule.step()
    return monitor


if __name__ == "__main__":
    main()

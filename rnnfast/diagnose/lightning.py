"""The monitor as a callback of Lightning."""

from __future__ import annotations

from pathlib import Path

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:
    try:
        from pytorch_lightning import Callback
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "GradientMonitorCallback needs Lightning: pip install lightning", name=error.name
        ) from error

from .monitor import GradientMonitor


class GradientMonitorCallback(Callback):
    """Runs a :class:`rnnfast.GradientMonitor` from the beginning of ``fit`` to its end. The
    attribute ``monitor`` holds it.

    Args:
        every, keep, group, writer, out: as in the monitor. The model, its optimizer and the
            GradScaler are the trainer's.
        start: as in the monitor; None: the steps that the trainer has made.

    Raises:
        ValueError: at the start of the training, if it has more than one optimizer.
    """

    def __init__(
        self,
        *,
        every: int = 1,
        keep: int = 1000,
        start: int | None = None,
        group=None,
        writer=None,
        out: str | Path | None = None,
    ) -> None:
        self.options = {"every": every, "keep": keep, "group": group, "writer": writer, "out": out}
        self.start = start
        self.monitor: GradientMonitor | None = None

    def on_train_start(self, trainer, pl_module) -> None:
        if len(trainer.optimizers) != 1:
            raise ValueError(f"trainer: given {len(trainer.optimizers)} optimizers, wanted one")
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        start = trainer.global_step if self.start is None else self.start
        self.monitor = GradientMonitor(
            pl_module, trainer.optimizers[0], scaler, start=start, **self.options
        )
        self.monitor.__enter__()

    def on_train_end(self, trainer, pl_module) -> None:
        self.monitor.__exit__(None, None, None)

    def on_exception(self, trainer, pl_module, exception) -> None:
        if self.monitor is not None:
            self.monitor.__exit__(type(exception), exception, exception.__traceback__)

"""The files, pictures and errors of GradientMonitor."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
from flows import inputs, make
from matplotlib import colormaps
from matplotlib.colors import to_hex, to_rgb
from monitored import Two, loss_of, sgd, train
from torch import nn

import rnnfast
from rnnfast.diagnose import heat_map as heat_maps
from rnnfast.diagnose.history import Row

Monitor = rnnfast.GradientMonitor

# ---------------------------------------------------------------------------------- what is written


def test_csv(tmp_path):
    model = Two()
    optimizer = sgd(model)
    with Monitor(model, optimizer) as monitor:
        train(model, optimizer, 2)
    monitor.to_csv(tmp_path / "table.csv")
    with open(tmp_path / "table.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 10
    for written, row in zip(table, monitor.rows()):
        assert tuple(written) == Row._fields
        for name, value in zip(Row._fields, row):
            read = written[name] if isinstance(value, (str, bool)) else type(value)(written[name])
            assert read == str(value) if isinstance(value, bool) else read == value, name


@pytest.mark.parametrize("fails", [False, True])
def test_a_folder_gets_table_and_picture(fails, tmp_path):
    model, out = make("auto"), tmp_path / "a" / "b"
    optimizer = sgd(model)
    try:
        with Monitor(model, optimizer, out=out):
            loss_of(model, inputs()).backward()
            optimizer.step()
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert (out / "gradient_flow.csv").read_text().count("\n") == 2
    assert (out / "gradient_flow.png").read_bytes().startswith(b"\x89PNG")


class Writer:
    """The methods of a SummaryWriter that the monitor calls."""

    def __init__(self) -> None:
        self.file_writer = object()
        self.written: dict[tuple[str, int], float] = {}

    def close(self) -> None:
        self.file_writer = None

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        assert (tag, step) not in self.written
        self.written[tag, step] = value


def test_scalars_are_written_at_each_step():
    """The finite ones."""
    model, writer = Two(), Writer()
    optimizer = sgd(model)
    with Monitor(model, optimizer, writer=writer) as monitor:
        train(model, optimizer)
        assert writer.written
        (math.nan * model(inputs()).sum()).backward()
        optimizer.step()
    for row in monitor.rows():
        place = f"{row.rnn}.l{row.layer}" + "_reverse" * row.direction
        for name in ("half_life", "horizon", "gain", "state_norm_last", "nonfinite_grad"):
            value = getattr(row, name)
            found = writer.written.get((f"gradient_{name}/{place}", row.step))
            assert found == (value if math.isfinite(value) else None)
    assert writer.written["gradient_nonfinite_grad/decoder.l0", 2] > 0


@pytest.mark.proof  # it needs tensorboard
def test_tensorboard_reads_it(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    rnn = make("auto")
    optimizer, writer = sgd(rnn), SummaryWriter(tmp_path)
    with Monitor(rnn, optimizer, writer=writer) as monitor:
        for _ in range(3):
            loss_of(rnn, inputs()).backward()
            optimizer.step()
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    found = events.Scalars("gradient_log_growth/model.l0")
    assert [event.step for event in found] == [1, 2, 3]
    wanted = [row.log_growth for row in monitor.rows()]
    assert [event.value for event in found] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    "kind", [pytest.param("SummaryWriter", marks=pytest.mark.proof), "another"]
)
def test_a_closed_writer_is_refused(kind, tmp_path):
    """add_scalar of a SummaryWriter would begin a new file."""
    rnn, writer = make("auto"), Writer()
    if kind == "SummaryWriter":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(tmp_path)
    optimizer = sgd(rnn)
    with Monitor(rnn, optimizer, writer=writer) as monitor:
        writer.close()
        loss_of(rnn, inputs()).backward()
        with pytest.raises(ValueError, match="writer: given a closed one"):
            optimizer.step()
        assert len(monitor.rows()) == 1
        monitor.writer = None
    with pytest.raises(ValueError, match="writer: given a closed one"):
        Monitor(rnn, writer=writer)
    assert len(list(tmp_path.iterdir())) == (kind == "SummaryWriter")


def test_an_error_is_not_hidden_by_a_closed_writer():
    writer = Writer()

    def train() -> None:
        with Monitor(make("auto"), writer=writer):
            writer.close()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()


# ------------------------------------------------------------------------------------- bad input


def test_models_that_cannot_be_watched():
    with pytest.raises(TypeError, match=r"model: given str, wanted a torch\.nn\.Module"):
        Monitor("model")
    with pytest.raises(ValueError, match=r"model: given one .* RNN, LSTM or GRU of rnnfast$"):
        Monitor(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"LSTM or GRU of rnnfast; rnnfast\.replace"):
        Monitor(nn.Sequential(nn.RNN(2, 2)))
    model = Two()
    model.encoder.track_gradient_flow = False
    with pytest.raises(ValueError, match=r"model: encoder does not record .*track_gradient_flow"):
        Monitor(model)
    model.encoder.track_gradient_flow = True
    with Monitor(model, sgd(model)) as monitor:  # as the error says
        train(model, monitor.optimizer)
    assert len(monitor.rows()) == 5


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"optimizer": 3}, TypeError, r"optimizer: given int, wanted a torch\.optim\.Optimizer"),
        ({"grad_scaler": 2.0}, TypeError, r"grad_scaler: given float, wanted a .*GradScaler"),
        ({"every": 0}, ValueError, "every: given 0, wanted an int of at least 1"),
        ({"every": True}, ValueError, "every: given True"),
        ({"keep": 1}, ValueError, "keep: given 1, wanted an int of at least 2"),
        ({"start": -1}, ValueError, "start: given -1, wanted an int of at least 0"),
        ({"writer": "runs"}, TypeError, "writer: given str, wanted a SummaryWriter"),
        ({"group": object()}, ValueError, "group: torch.distributed is not initialized"),
    ],
)
def test_bad_arguments_are_named(options, error, match):
    with pytest.raises(error, match=match):
        Monitor(make("auto"), **options)


def test_other_mistakes():
    rnn = make("auto")
    with Monitor(rnn, sgd(rnn)) as monitor:
        with pytest.raises(RuntimeError, match="step: the monitor's optimizer counts"):
            monitor.step()
        with pytest.raises(ValueError, match="field: given 'gain', wanted one of"):
            monitor.norms("gain")
        with pytest.raises(RuntimeError, match="plot: no step has been recorded"):
            monitor.plot()
    assert monitor.rows() == []


# ---------------------------------------------------------------------------------- the picture


def heat_map(norms, steps=None, first=1, width=1, nonfinite=()):
    norms = np.array(norms, dtype=np.float32)
    steps = list(range(first, first + len(norms))) if steps is None else steps
    return heat_maps.HeatMap("rnn, layer 0", "half-life", first, width, steps, norms, nonfinite)


def colours(axes) -> np.ndarray:
    """[T, columns] of the colours that are seen, "#rrggbb"."""
    (image,) = axes.images
    return np.vectorize(to_hex, signature="(n)->()")(image.to_rgba(image.get_array()))


def test_colours_of_numbers_and_of_what_is_none():
    panel = heat_map([[1e-40, 1e-20], [0, 1], [math.inf, math.nan]], nonfinite=[3])
    figure = heat_maps.draw([panel], "heading", "norm")
    found = colours(figure.axes[0])
    assert found.shape == (2, 3)
    assert found[:, 1].tolist() == [heat_maps.SMALL.lower(), to_hex(heat_maps.COLOURS(1.0))]
    assert found[:, 2].tolist() == [heat_maps.NONFINITE.lower(), heat_maps.NOTHING.lower()]
    assert found[0, 0] == heat_maps.SMALL.lower()  # below the range that is drawn
    middle = colormaps["cividis"](1 - 20 / heat_maps.DECADES)  # logarithmic
    assert np.abs(np.array(to_rgb(found[1, 0])) - middle[:3]).max() < 0.02
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["inf or NaN", "0, or below 1e-35", "nothing to record"]
    (marks,) = figure.axes[0].lines
    assert list(marks.get_xdata()) == [3]


def test_a_legend_of_what_there_is():
    assert not heat_maps.draw([heat_map([[1, 2], [3, 4]])], "heading", "norm").legends


def test_columns_stand_at_their_training_steps():
    """Also where steps are missing between them."""
    panel = heat_map([[1, 1], [2, 2], [3, 3]], [11, 15, 23], first=11, width=4)
    assert panel.cells()[0].tolist() == pytest.approx([1, 2, math.nan, 3], nan_ok=True)
    axes = heat_maps.draw([panel], "heading", "norm").axes[0]
    assert axes.get_xlim() == (10.5, 26.5)
    assert axes.images[0].get_extent() == [10.5, 26.5, -0.5, 1.5]
    assert axes.get_ylim() == (-0.5, 1.5)  # time goes up


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan, 1.0])
def test_maps_without_a_range(value):
    """Nothing between which colours could lie; no warning, no error."""
    figure = heat_maps.draw([heat_map([[value]])], "heading", "norm")
    figure.canvas.draw()
    low, high = figure.axes[0].images[0].get_clim()
    assert 0 < low < high < math.inf


def test_a_panel_for_each_layer_and_direction():
    """On one scale."""
    model = Two()
    optimizer = sgd(model)
    with Monitor(model, optimizer) as monitor:
        train(model, optimizer, 3)
    for field in ("carry_norm", "state_norm"):
        figure = monitor.plot(field)
        *panels, bar = figure.axes
        assert [axes.get_title("left") for axes in panels] == [
            "encoder, layer 0",
            "encoder, layer 0, reverse",
            "encoder, layer 1",
            "encoder, layer 1, reverse",
            "decoder, layer 0",
        ]
        assert {(axes.get_xlabel(), axes.get_ylabel()) for axes in panels} == {
            ("training step", "time step t")
        }
        assert len({axes.images[0].get_clim() for axes in panels}) == 1
        assert bar.get_ylabel().startswith("norm of $dL/dh_t$")
        for axes, (_, norms) in zip(panels, monitor.norms(field).values()):
            shown = axes.images[0].get_array()
            assert np.allclose(shown.filled(np.nan).T, norms, equal_nan=True)
    first, last = monitor.rows()[0], monitor.rows()[-5]
    lives = f"{first.half_life:.3g} at first, {last.half_life:.3g} at last"
    assert panels[0].texts[0].get_text() == f"half-life in time steps: {lives}"


@pytest.mark.parametrize("number", [1, 3, 8, 24])
def test_nothing_overlaps_or_leaves_the_picture(number):
    panels = [heat_map([[1e-9, 1], [0, math.inf], [1, math.nan]], nonfinite=[2])] * number
    figure = heat_maps.draw(panels, "The gradient at each time step, as training goes on", "norm")
    figure.canvas.draw()
    *maps, bar = figure.axes
    boxes = [axes.get_tightbbox() for axes in maps]
    boxes += [bar.get_tightbbox(), figure.legends[0].get_window_extent()]
    boxes += [figure.texts[0].get_window_extent()]
    for i, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:i])

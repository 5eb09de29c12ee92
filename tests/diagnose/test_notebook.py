"""Results in a notebook show themselves; a missing package has the name of its extra."""

from __future__ import annotations

import copy
import pickle
import sys
import types

import pytest
import torch
from flows import inputs, make
from monitored import sgd

import rnnfast

PNG = b"\x89PNG"


def recorded() -> rnnfast.RNN:
    rnn = make("auto")
    rnn(inputs())[0].sum().backward()
    return rnn


def monitored() -> rnnfast.GradientMonitor:
    rnn = make("auto")
    optimizer = sgd(rnn)
    with rnnfast.GradientMonitor(rnn, optimizer) as monitor:
        rnn(inputs())[0].sum().backward()
        optimizer.step()
    return monitor


FIGURES = {
    "record": lambda: recorded().gradient_flow,
    "probe": lambda: rnnfast.probe(make("auto"), inputs()),
    "monitor": monitored,
}


@pytest.fixture(params=FIGURES)
def drawn(request):
    return FIGURES[request.param]()


def test_a_figure_shows_itself_in_a_notebook(drawn):
    pytest.importorskip("matplotlib")
    figure = drawn.plot()
    assert figure._repr_png_().startswith(PNG)
    assert copy.deepcopy(figure)._repr_png_().startswith(PNG)
    assert pickle.loads(pickle.dumps(figure))._repr_png_().startswith(PNG)


def test_show_displays_in_a_notebook_and_says_elsewhere_what_to_do(monkeypatch):
    pytest.importorskip("matplotlib")
    figure, shown = recorded().gradient_flow.plot(), []
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    with pytest.raises(AttributeError, match=r"show: .* savefig\(path\) writes a file"):
        figure.show()
    ipython, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    ipython.get_ipython, display.display = object, shown.append
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    figure.show()
    assert shown == [figure]
    ipython.get_ipython = lambda: None  # imported, and no notebook runs
    with pytest.raises(AttributeError, match="show: "):
        figure.show()


def test_a_plot_without_matplotlib_names_the_extra(drawn, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"plot\(\) .*pip install rnnfast\[plots\]") as e:
        drawn.plot()
    assert e.value.name == "matplotlib"


def test_a_monitors_folder_without_matplotlib_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"out needs .*pip install rnnfast\[plots\]"):
        rnnfast.GradientMonitor(make("auto"), out=tmp_path)


def test_the_callback_without_lightning_says_what_to_install(monkeypatch):
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match="Callback needs Lightning: pip install lightn"):
        import rnnfast.diagnose.lightning  # noqa: F401


def test_a_package_that_lacks_another_names_that_one(monkeypatch):
    """A matplotlib without numpy is not a missing matplotlib."""
    from rnnfast import extras

    def broken(name):
        raise ModuleNotFoundError("No module named 'numpy'", name="numpy")

    monkeypatch.setattr(extras, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'numpy'$"):
        recorded().gradient_flow.plot()


# ------------------------------------------------------------------------------- info, explain


@pytest.mark.parametrize(
    "make_text",
    [rnnfast.info, lambda: rnnfast.explain(rnnfast.RNN(3, 4), torch.zeros(5, 2, 3))],
    ids=["info", "explain"],
)
def test_a_report_shows_its_lines_where_it_is_a_value(make_text):
    """A notebook and Python's own prompt show the repr."""
    text = make_text()
    assert isinstance(text, str)
    assert repr(text) == str(text)
    assert "\n" in repr(text)
    again = pickle.loads(pickle.dumps(text))
    assert again == text
    assert type(again) is type(text)

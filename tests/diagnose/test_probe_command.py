"""``python -m rnnfast probe``, as a user meets it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from commands import blocked, command
from torch import nn

import rnnfast
from rnnfast.__main__ import PROBE_IMPORTS, main

pytestmark = [
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in PROBE_IMPORTS),
        reason="the extras of the probe are not installed",
    ),
    pytest.mark.usefixtures("one_torch_thread"),
]
MODELS = """
import torch, rnnfast
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_padded_sequence


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.RNN(8, 16, 2, batch_first=True, dropout=0.5)
        self.decoder = rnnfast.RNN(16, 12, nonlinearity="relu", init="identity")
        self.unused = nn.RNN(3, 5)

    def forward(self, x, lengths):
        assert not (self.training or self.encoder.training or torch.is_grad_enabled())
        y, h = self.encoder(pack_padded_sequence(x, lengths, batch_first=True))
        y, _ = nn.utils.rnn.pad_packed_sequence(y)
        self.decoder(y[:1])
        return self.decoder(input=y, lengths=lengths)


NET = Net()
def net(): return NET
def plain(): return nn.RNN(6, 20)
def half(): return rnnfast.RNN(6, 20, dtype=torch.bfloat16, batch_first=True)
def batch(): return torch.randn(4, 40, 8), torch.tensor([40, 30, 20, 10])
def noise(): return torch.randn(40, 4, 6)
def double(): return torch.ones(40, 4, 6, dtype=torch.float64)
def wrong(): return torch.randn(40, 4, 7)
def cell(): return nn.Sequential(nn.Linear(3, 3), nn.LSTMCell(3, 4))
class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LSTM(6, 8), rnnfast.GRU(8, 5)
    def forward(self, x, c):
        y, _ = self.first(x, (torch.zeros_like(c), c))
        return self.second(y)
def with_state(): return torch.randn(40, 4, 6), torch.ones(1, 4, 8)
def mlp(): return nn.Sequential(nn.Linear(3, 3), nn.ReLU())
def weights(): return plain().state_dict()
def pruned():
    rnn = plain()
    prune.l1_unstructured(rnn, "weight_hh_l0", 0.5)
    return rnn
class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = plain()
    def forward(self, x):
        return x
NUMBER = 3
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the models in it, and nothing of it left afterwards."""
    (tmp_path / "probed_models.py").write_text(MODELS)
    (tmp_path / "probed_broken.py").write_text("import absent_module")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "probed_models", raising=False)
    monkeypatch.setenv("COLUMNS", "100")


def report(*arguments: str) -> dict:
    assert main(["probe", *arguments]) == 0
    return json.loads(Path("rnnfast-probe/probe.json").read_text())


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that it ends with."""
    assert main(["probe", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("rnnfast: ")
    assert err.count("\n") == 1
    return err.removeprefix("rnnfast: ").rstrip()


# ------------------------------------------------------------------------------------- a factory


def test_the_report_on_a_network(capsys):
    result = report("probed_models:plain", "--steps", "60", "--batch", "4", "--seed", "7")
    text = " ".join(capsys.readouterr().out.split())
    assert Path("rnnfast-probe/probe.png").read_bytes().startswith(b"\x89PNG")
    (found,) = result["rnns"]
    assert (result["source"], result["seed"]) == ("probed_models:plain", 7)
    assert (found["name"], found["module"]) == ("", "RNN(6, 20)")
    assert found["verdicts"][0][0]["word"] == "vanishing"
    assert found["samples"] == [[4] * 60]
    torch.manual_seed(7)
    rnn = nn.RNN(6, 20)
    wanted = rnnfast.probe(rnn, torch.randn(60, 4, 6), seed=7)
    assert found["norm"] == wanted.to_dict()["norm"]
    assert wanted.summary in text
    assert "a thousand times less" in wanted.summary
    for advice in wanted.advice:
        assert f"try: {advice}" in text
    assert "Gradient probe over 60 steps, 4 samples" in text
    assert "Wrote rnnfast-probe/probe.png and rnnfast-probe/probe.json" in text


def test_the_default_input_is_of_the_rnns_dtype_and_layout():
    (found,) = report("probed_models:half", "--out", "rnnfast-probe")["rnns"]
    assert found["samples"] == [[32] * 250]


def test_seeds_decide_all():
    first, again, other = (report("probed_models:plain", "--seed", s)["rnns"] for s in "112")
    assert first == again
    assert first[0]["norm"] != other[0]["norm"]


def test_data_goes_through_the_model(capsys):
    """Each RNN is probed with what it gets from the layers before it."""
    result = report("probed_models:net", "--data", "probed_models:batch")
    encoder, decoder = result["rnns"]
    assert (encoder["name"], decoder["name"]) == ("encoder", "decoder")
    samples = [[sum(n > lag for n in (40, 30, 20, 10)) for lag in range(40)]]
    assert encoder["samples"] == decoder["samples"] == samples
    net = sys.modules["probed_models"].NET
    assert net.training
    assert net.encoder.training
    assert type(net.encoder) is nn.RNN
    assert not net.encoder._forward_pre_hooks
    assert not net.decoder._forward_pre_hooks
    torch.manual_seed(0)
    x, lengths = sys.modules["probed_models"].batch()
    x = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
    assert encoder["norm"] == rnnfast.probe(net.encoder, x).to_dict()["norm"]
    text = capsys.readouterr().out
    assert "unused: not called, so not probed" in text
    assert "encoder: RNN(8, 16, num_layers=2, batch_first=True, dropout=0.5)" in text


def test_without_data_every_rnn_of_the_model_is_probed():
    result = report("probed_models:net", "--steps", "20")
    assert [found["name"] for found in result["rnns"]] == ["encoder", "decoder", "unused"]


def test_as_a_command(tmp_path: Path):
    """From the folder that the module is in."""
    there = f"import os; os.chdir({str(tmp_path)!r})"
    done = command("probe", "probed_models:plain", "--steps", "9", prelude=there)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Gradient probe over 9 steps" in done.stdout
    written = {path.name for path in (tmp_path / "rnnfast-probe").iterdir()}
    assert written == {"probe.png", "probe.json"}


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (
            ["models"],
            "SOURCE: given 'models', wanted module:function or a checkpoint (*.pt, *.pth)",
        ),
        (["absent:f"], "SOURCE: there is no module absent, here or among those installed"),
        (["probed_models.sub:f"], "SOURCE: there is no module probed_models.sub, here"),
        (["probed_models:absent"], "SOURCE: module probed_models has no absent"),
        (["probed_models:NUMBER"], "probed_models:NUMBER is a int, wanted a function"),
        (["probed_models:NET"], "probed_models:NET is a Net, wanted a function"),
        (["torch.nn:Linear"], "torch.nn:Linear cannot be called without arguments: missing"),
        (["probed_models:weights"], "it returned a OrderedDict, wanted a torch.nn.Module"),
        (
            ["probed_models:cell"],
            "no RNN, LSTM or GRU in it, but LSTMCell (1); rnnfast has no cell module or subclass",
        ),
        (["probed_models:mlp"], "in it, but ReLU (1), Linear (0), Sequential (the model itself)"),
        (["probed_models:pruned"], "model: rnn: pruning, weight_norm or the like changed"),
        (["probed_models:plain", "--hidden-size", "3"], "--hidden-size: for a checkpoint, and"),
        (["probed_models:plain", "--no-bias", "--key", "k"], "--no-bias, --key: for a checkpoint"),
        (["probed_models:plain", "--data", "x"], "--data: given 'x', wanted module:function"),
        (["probed_models:plain", "--data", "absent:f"], "--data: there is no module absent"),
        (
            ["probed_models:plain", "--data", "probed_models:noise", "--steps", "3"],
            "--steps, --batch: for random input, and --data brings its own",
        ),
        (
            ["probed_models:plain", "--data", "probed_models:wrong"],
            "the model, called with (40, 4, 7) from probed_models:wrong, raises RuntimeError: ",
        ),
        (
            ["probed_models:Idle", "--data", "probed_models:noise"],
            "the model calls none of its RNNs",
        ),
    ],
)
def test_what_cannot_be_probed(arguments, wanted, capsys):
    assert wanted in complaint(capsys, *arguments)


def test_what_the_users_module_lacks_is_not_hidden():
    with pytest.raises(ModuleNotFoundError, match="absent_module"):
        main(["probe", "probed_broken:f"])


@pytest.mark.parametrize("missing", sorted(PROBE_IMPORTS))
def test_a_missing_extra_is_named(missing: str):
    done = command("probe", "m:f", prelude=blocked(missing))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"rnnfast: the probe needs {missing}: pip install rnnfast[cli,plots]\n"


def test_a_folder_that_cannot_be_written(capsys):
    Path("file").touch()
    found = complaint(capsys, "probed_models:plain", "--out", "file")
    assert found == "--out: cannot write to file: File exists"


# ----------------------------------------------------------------------------------- a checkpoint

FLAGS = ["--input-size", "6", "--hidden-size", "20"]


def test_a_checkpoint_is_probed_as_its_network():
    rnn = rnnfast.RNN(6, 20, 2, "relu", bidirectional=True, bias=False, norm="layer", num_heads=2)
    state = {f"net.rnn.{name}": x for name, x in rnn.state_dict().items()}
    torch.save({"epoch": 3, "model": state}, "a.pt")
    flags = (
        "--num-layers 2 --nonlinearity relu --bidirectional --no-bias --norm layer --num-heads 2 "
        "--key model --prefix net.rnn --steps 30"
    )
    (found,) = report("a.pt", *FLAGS, *flags.split())["rnns"]
    x = torch.randn(30, 32, 6, generator=torch.Generator().manual_seed(0))
    assert found["norm"] == rnnfast.probe(rnn, x).to_dict()["norm"]


@pytest.mark.parametrize("made", [nn.LSTM, nn.GRU])
def test_a_checkpoint_says_which_gates_it_has(made):
    rnn = made(6, 20, bidirectional=True)
    torch.save(rnn.state_dict(), "a.pt")
    (found,) = report("a.pt", *FLAGS, "--bidirectional", "--steps", "30")["rnns"]
    assert found["module"] == f"{made.__name__}(6, 20, bidirectional=True)"
    x = torch.randn(30, 32, 6, generator=torch.Generator().manual_seed(0))
    assert found["norm"] == rnnfast.probe(rnn, x).to_dict()["norm"]


def test_a_model_with_gated_cells(capsys):
    found = report("probed_models:Gated", "--data", "probed_models:with_state")["rnns"]
    assert [rnn["name"] for rnn in found] == ["first", "second"]
    assert [rnn["verdicts"][0][0]["word"] for rnn in found] == ["vanishing"] * 2
    said = " ".join(capsys.readouterr().out.split())
    assert "mean f" in said
    assert "mean z" in said
    assert said.count("try: chrono_steps=T") == 2


def test_a_checkpoint_of_another_dtype_and_suffix():
    rnn = nn.RNN(6, 20, dtype=torch.float64)
    torch.save(rnn.state_dict(), "a.ckpt")
    (found,) = report("a.ckpt", *FLAGS, "--data", "probed_models:double")["rnns"]
    wanted = rnnfast.probe(rnn, sys.modules["probed_models"].double())
    assert found["norm"] == wanted.to_dict()["norm"]


@pytest.mark.parametrize(
    ("made", "arguments", "wanted"),
    [
        (nn.RNN(6, 20), [], "its RNN needs --input-size and --hidden-size, at least"),
        (
            nn.RNN(6, 20, 2),
            FLAGS,
            "a.pt does not fit the flags: unexpected: bias_hh_l1, bias_ih_l1, weight_hh_l1, "
            "weight_ih_l1",
        ),
        (
            nn.RNN(6, 20),
            [*FLAGS, "--bidirectional"],
            "fit the flags: missing: bias_hh_l0_reverse, bias_ih_l0_reverse, weight_hh_l0_reverse, "
            "weight_ih_l0_reverse",
        ),
        (
            nn.RNN(6, 21, bias=False),
            [*FLAGS, "--no-bias"],
            "fit the flags: weight_hh_l0: (21, 21) in the file, (20, 20) by the flags; "
            "weight_ih_l0: (21, 6) in the file, (20, 6) by the flags",
        ),
        (nn.LSTM(6, 20), [*FLAGS, "--norm", "layer"], "LSTM.__init__() got an unexpected keyword"),
        (nn.GRU(6, 20, 2), FLAGS, "unexpected: bias_hh_l1, bias_ih_l1"),
        (nn.RNN(6, 20), [*FLAGS, "--num-heads", "3"], "num_heads: given 3, wanted a divisor of"),
        (
            nn.ModuleDict({"a": nn.RNN(6, 20), "b": nn.RNN(6, 20)}),
            FLAGS,
            "no weight_ih_l0 in it, but there is one under --prefix a or b",
        ),
        (
            nn.RNN(6, 20),
            [*FLAGS, "--prefix", "c"],
            "no c.weight_ih_l0 in it; it holds weight_ih_l0",
        ),
        (nn.RNN(6, 20), [*FLAGS, "--key", "c"], "--key: no 'c' in it; it holds weight_ih_l0"),
    ],
)
def test_a_checkpoint_that_does_not_fit(made, arguments, wanted, capsys):
    torch.save(made.state_dict(), "a.pt")
    assert wanted in complaint(capsys, "a.pt", *arguments)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ({"model": {}, "epoch": 3}, "a dict without tensors; it holds model, epoch; --key says"),
        ([1.0], "a list without tensors"),
        (nn.RNN(6, 20), "torch.load(weights_only=True) cannot read it; save the state_dict()"),
        ({"weight_ih_l0": torch.ones(20, 6, dtype=torch.int8)}, "missing: bias_hh_l0"),
    ],
)
def test_a_file_that_holds_no_weights(content, wanted, capsys):
    torch.save(content, "a.pt")
    assert wanted in complaint(capsys, "a.pt", *FLAGS)


def test_a_file_that_is_none(capsys):
    assert complaint(capsys, "b.pt", *FLAGS) == "b.pt: No such file or directory"
    Path("a.pt").write_text("not a checkpoint")
    assert "cannot read it" in complaint(capsys, "a.pt", *FLAGS)
    state = {n: x.to(torch.int8) for n, x in nn.RNN(6, 20).state_dict().items()}
    torch.save(state, "a.pt")
    wanted = "a.pt: weight_ih_l0 is torch.int8, wanted a floating-point dtype"
    assert complaint(capsys, "a.pt", *FLAGS) == wanted


@pytest.mark.parametrize(
    "arguments",
    [[], ["m:f", "--steps", "0"], ["m:f", "--norm", "none"], ["a.pt", "--hidden-size", "-1"]],
)
def test_bad_arguments_end_with_status_2(arguments):
    with pytest.raises(SystemExit) as end:
        main(["probe", *arguments])
    assert end.value.code == 2

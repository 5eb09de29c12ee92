"""The package imported again in one process, as after an edit in a notebook."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import rnnfast

pytestmark = pytest.mark.proof

# torch 2.13 warns about torch.autograd.Function as it traces.
BEGIN = """
import gc, sys, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "rnnfast has no compiled kernels")
warnings.filterwarnings("ignore", "<class 'torch.autograd.function.Function'> should not be")
import torch

def forget():
    for name in [name for name in sys.modules if name.split(".")[0] == "rnnfast"]:
        del sys.modules[name]

def train(rnn, x):
    rnn.zero_grad()
    compiled = torch.compile(rnn, backend="aot_eager", fullgraph=True)
    grads = []
    for call in (rnn, compiled):
        call(x)[0].sum().backward()
        grads.append(rnn.weight_hh_l0.grad.clone())
        rnn.zero_grad()
    assert torch.allclose(*grads)
    return grads[0]

x = torch.randn(5, 2, 3)
import rnnfast
old = rnnfast.RNN(3, 4)
before = train(old, x)
forget()
"""


def run(code: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", BEGIN + code]
    root = Path(rnnfast.__file__).parents[1]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=root)


def test_an_import_again_computes_beside_the_first():
    done = run("""
import rnnfast
new = rnnfast.RNN(3, 4)
assert type(new) is not type(old)
new.load_state_dict(old.state_dict())
assert torch.equal(train(new, x), before)
assert torch.equal(train(old, x), before)
recorded = rnnfast.RNN(3, 4, track_gradient_flow=True)
train(recorded, x)
assert recorded.gradient_flow.state_norm.shape == (1, 1, 5)
""")
    assert done.returncode == 0, done.stderr


def test_an_import_again_computes_after_the_first_is_gone():
    done = run("""
weights = {name: p.detach() for name, p in old.named_parameters()}
del old, rnnfast
torch._dynamo.reset()
gc.collect()
import rnnfast
new = rnnfast.RNN(3, 4)
new.load_state_dict(weights)
assert torch.equal(train(new, x), before)
""")
    assert done.returncode == 0, done.stderr


def test_an_op_calls_the_newest_import():
    """An edited kernel takes part where torch.compile calls the op, too."""
    done = run("""
import rnnfast
from rnnfast import ops as autograd
from rnnfast.recurrence.groups import Options, Rows, States, Weights
autograd.BACKENDS["reference"].forward = None
try:
    inputs = x, *Weights(None, None, None, torch.eye(3)), *States(), *Rows(), None
    torch.ops.rnnfast.rnn(*inputs, *Options(), "reference")
except TypeError as error:
    print(error)
""")
    assert done.returncode == 0, done.stderr
    assert "'NoneType' object is not callable" in done.stdout


def test_another_schema_of_an_op_is_refused():
    done = run("""
from rnnfast.graph.registry import Ops
try:
    Ops("rnnfast").define("rnn(Tensor x) -> Tensor")
except ImportError as error:
    print(error)
""")
    assert done.returncode == 0, done.stderr
    assert "rnnfast::rnn: another version of the package has registered it" in done.stdout

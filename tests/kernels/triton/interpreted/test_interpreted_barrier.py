"""Programs of a team, which wait for one another: in all orders of a model, and in the kernels
themselves, whose programs the interpreter runs in turns here, changed at every access to memory."""

from __future__ import annotations

import functools
import inspect
import random
import threading

import numpy as np
import pytest
import torch
import triton.language as tl  # noqa: F401  (the interpreter looks for it in these globals)
from cases import assert_good, judge, make_case, run
from rnnfast.triton_kernels import backward, forward, plan, steps
from triton.runtime import interpreter

from rnnfast.backends import triton as backend

# ------------------------------------------------------------------------ a model of the protocol

PROGRAMS, STEPS = 3, 3


def explore(norm: bool, fault: str = "") -> tuple[int, set[str]]:
    """Every order in which three programs can take their turns: how many states there are, and what
    went wrong in any of them.

    A program stores its part of a step, adds 1 to the counter, waits for its turn of it, and reads
    all parts. With norm it does so with its moments first, in memory that every step uses again.
    """
    script = []  # of a program: what it does one after the other
    arrived = 0
    for step in range(STEPS):
        rounds = ["moments", "state"] if norm else ["state"]
        for what in rounds:
            if what == "state" and step > 0:
                script.append(("read", "state", step - 1))
            script.append(("store", what, step))
            if fault == "no barrier after the state" and what == "state":
                continue
            arrived += PROGRAMS - (1 if fault == "one too few" else 0)
            script += [("add", "", 0), ("wait", "", arrived)]
            if what == "moments":
                script.append(("read", "moments", step))
    empty = tuple(("moments", None) for _ in range(PROGRAMS)) + tuple(
        (f"state {s}", None) for s in range(STEPS) for _ in range(PROGRAMS)
    )
    start = ((0,) * PROGRAMS, 0, tuple(v for _, v in empty))
    seen, ahead, wrong = {start}, [start], set()

    def place(what: str, step: int, program: int) -> int:
        return program if what == "moments" else PROGRAMS * (1 + step) + program

    while ahead:
        at, counter, memory = ahead.pop()
        moved = False
        for program in range(PROGRAMS):
            if at[program] == len(script):
                continue
            action, what, number = script[at[program]]
            if action == "wait" and counter < number:
                continue
            moved = True
            after, cells = counter, list(memory)
            if action == "add":
                after += 1
            elif action == "store":
                cells[place(what, number, program)] = number
            elif action == "read":
                found = {cells[place(what, number, p)] for p in range(PROGRAMS)}
                if found != {number}:
                    wrong.add(f"{what} of step {number}: read {found}")
            state = (
                tuple(p + (i == program) for i, p in enumerate(at)),
                after,
                tuple(cells),
            )
            if state not in seen:
                seen.add(state)
                ahead.append(state)
        if not moved and any(p < len(script) for p in at):
            wrong.add(f"nobody can go on at {at}")
    return len(seen), wrong


@pytest.mark.parametrize("norm", [False, True])
def test_no_order_of_three_programs_breaks_the_protocol(norm):
    states, wrong = explore(norm)
    assert states > 200
    assert not wrong


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("fault", ["no barrier after the state", "one too few"])
def test_the_model_finds_a_fault(norm, fault):
    assert explore(norm, fault)[1]


# ------------------------------------------------------------------------- the kernels themselves


class Turns:
    """Programs as threads of which one runs at a time; who is next is drawn at each access."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.condition = threading.Condition()
        self.alive: list[tuple[int, int, int]] = []
        self.now: tuple[int, int, int] | None = None
        self.failed: list[BaseException] = []

    def draw(self) -> None:
        self.now = self.random.choice(self.alive) if self.alive else None
        self.condition.notify_all()

    def next(self) -> None:
        """Called by the program that runs: another may."""
        mine = threading.current_thread().name
        with self.condition:
            self.draw()
            self.wait(mine)

    def wait(self, mine: str) -> None:
        self.condition.wait_for(lambda: self.failed or str(self.now) == mine)
        if self.failed:
            raise SystemExit
        interpreter.interpreter_builder.grid_idx = self.now

    def run(self, body, grid: tuple[int, ...]) -> None:
        def program(index: tuple[int, int, int]) -> None:
            try:
                with np.errstate(all="ignore"):
                    with self.condition:
                        self.wait(str(index))
                    body()
            except SystemExit:
                return
            except BaseException as error:
                self.failed.append(error)
            with self.condition:
                self.alive.remove(index)
                self.draw()

        self.alive = [tuple(map(int, i)) for i in np.ndindex(*grid)]
        threads = [
            threading.Thread(target=program, args=(i,), name=str(i), daemon=True)
            for i in self.alive
        ]
        for thread in threads:
            thread.start()
        with self.condition:
            self.draw()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive(), "the programs wait for one another"
        if self.failed:
            raise self.failed[0]


@pytest.fixture
def side_by_side(monkeypatch) -> list[int]:
    """All programs of a launch at once; the list holds the seed of their turns."""
    seed = [0]
    turns: list[Turns] = []
    builder = interpreter.interpreter_builder
    for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw"):
        original = getattr(builder, name)

        def access(*args, original=original):
            if turns:
                turns[-1].next()
            return original(*args)

        monkeypatch.setattr(builder, name, access)

    class Executor(interpreter.GridExecutor):
        def __init__(self, fn, arg_names, grid, *rest):
            super().__init__(fn, arg_names, grid, *rest)
            started = []

            @functools.wraps(fn)
            def all_programs(**arguments):
                if not started:  # by the first; the others are there already
                    started.append(True)
                    turns.append(Turns(seed[0]))
                    try:
                        turns[-1].run(lambda: fn(**arguments), (*grid, *(1,) * (3 - len(grid))))
                    finally:
                        turns.pop()

            all_programs.__signature__ = inspect.signature(fn)
            self.fn = all_programs

    monkeypatch.setattr(interpreter, "GridExecutor", Executor)
    monkeypatch.setattr(plan, "RESIDENT_UNITS", {2: 0, 4: 0})
    monkeypatch.setattr(plan, "TILES", ((16, 16, 4), (16, 16, 4)))
    monkeypatch.setattr(plan, "KEPT_TILE", (16, 16, 4))
    six = plan.Device("six multiprocessors", (8, 0), 6, 100 << 10)
    monkeypatch.setattr(backend, "_device", lambda *_: six)
    return seed


ALL = {"norm": True, "clip_state_grad": 1.0, "reset": True, "lengths": True}


def case_of_two_teams(seed: int, **options):
    """Three programs a team, four sets of rows and directions, two for each team."""
    return make_case(3, 20, 41, 2, seed=seed, **options)


@pytest.mark.parametrize("kept", [False, True])
def test_programs_may_take_any_turns(kept, side_by_side, monkeypatch):
    monkeypatch.setattr(plan, "KEPT_UNITS", {8: {"tf32x3": 64 if kept else 0}})
    torch.use_deterministic_algorithms(True)  # memory that nobody wrote is NaN
    try:
        wanted = None
        for seed in range(3):
            side_by_side[0] = seed
            case = case_of_two_teams(0, **ALL)
            found = run(case, "triton")
            if wanted is None:
                wanted = found
                assert_good(case, found)
            assert all(v is None or torch.equal(v, wanted[name]) for name, v in found.items())
    finally:
        torch.use_deterministic_algorithms(False)


def _no_wait(p_counter, arrived):
    pass


def _one_too_few(p_counter, arrived):
    steps.arrive_and_wait(p_counter, arrived - 1)


@pytest.mark.parametrize(("fault", "options"), [(_no_wait, {}), (_one_too_few, ALL)])
def test_turns_find_a_barrier_that_is_none(fault, options, side_by_side, monkeypatch):
    for module in (forward, backward):
        monkeypatch.setattr(module, "arrive_and_wait", fault)
    torch.use_deterministic_algorithms(True)
    try:
        bad = 0
        for seed in range(4):
            side_by_side[0] = seed
            case = case_of_two_teams(seed, **options)
            bad += any(not verdict.good for verdict in judge(case, run(case, "triton")))
        assert bad
    finally:
        torch.use_deterministic_algorithms(False)

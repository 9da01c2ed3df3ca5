"""run.py: flags and presets, evaluation, phases, what a run says and when it stops."""

import csv
import importlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from harness import board
from harness.tasks import Task
from short_runs import (
    ROOT,
    SCRIPTS,
    assert_same_run,
    at,
    checkpoint,
    flags,
    folder,
    outcome,
    rows,
    run_main,
    same,
    start,
    stop_by,
    write_log,
)
from torch import nn

import run as page
from common import (
    Adam,
    BatchSize,
    Count,
    InputError,
    NonNegative,
    Positive,
    Range,
    RunArgs,
    Seed,
    Share,
    number_type,
    sample,
)
from run import Run, evaluate, main, parse

TD3_BC = ROOT / "algorithms" / "td3_bc.py"

# ---- the command line ------------------------------------------------------------------------


@dataclass
class Args(RunArgs):
    phases: ClassVar = {"clone": "bc_steps", "rows": None, "train": "steps"}
    env: str = "hopper-medium"
    """dataset"""
    seed: Seed = 0
    """random seed"""
    steps: Count = 1000
    """gradient steps"""
    batch_size: BatchSize = 256
    """rows"""
    alpha: NonNegative = 2.5
    """weight of Q"""
    lr: Positive = 1e-3
    """Adam's learning rate"""
    share: Share | None = None
    """a share, or None"""
    free: float = 1.0
    """any number"""
    whole: int = 1
    """any whole number"""
    widths: tuple[Count, ...] = (8, 8)
    """hidden units of each layer"""
    bc_steps: Count = 2000
    """gradient steps of the clone"""

    def resolve(self):
        self.share = 0.5 if self.share is None else self.share


PRESETS = {
    "hopper-*": dict(steps=20, batch_size=32),
    "hopper-medium*": dict(steps=30, bc_steps=60),
    "ant[12]": dict(alpha=9.0),
    "*.npz": dict(alpha=7.0),
}


def parsed(line=""):
    return parse(Args, PRESETS, line.split())[0]


def test_presets_match_by_pattern_and_later_rows_win():
    def values(line):
        args = parsed(line)
        return args.steps, args.batch_size, args.alpha

    assert values("") == (30, 32, 2.5)  # the default --env has presets too
    assert values("--env hopper-expert") == (20, 32, 2.5)
    assert values("--env=ant2") == (1000, 256, 9.0)
    assert values("--env ant3") == (1000, 256, 2.5)
    assert parse(Args, {}, [])[1] == {} and parsed().share == 0.5
    args, preset = parse(Args, PRESETS, ["--env", "ant2"])
    assert preset == dict(alpha=9.0) and args.env == "ant2"
    for path in ("logs.npz", "ant1.hdf5", "hopper-logs.NPZ", "hopper-medium/x.h5"):
        assert parse(Args, PRESETS, ["--env", path])[1] == {}, "a file's name says nothing"


@pytest.mark.parametrize(
    ("env", "steps"),
    [("antmaze-umaze-v2", 1), ("antmaze-navigate-singletask-v0", 2), ("maze-singletask-v0", None)],
)
def test_rows_for_d4rl_do_not_match_ogbench(env, steps):
    presets = {"*maze-*": dict(steps=1), "antmaze-*-singletask*": dict(steps=2)}
    assert parse(Args, presets, ["--env", env])[1].get("steps") == steps


def test_short_adds_the_rows_that_are_named_so():
    presets = {"cube-singletask*": dict(alpha=9.0), "short *-singletask*": dict(steps=7)}

    def values(line):
        args = parse(Args, presets, line.split())[0]
        return args.steps, args.alpha, args.short

    assert values("--env cube-singletask-v0") == (1000, 9.0, False)
    assert values("--env cube-singletask-v0 --short") == (7, 9.0, True)
    assert values("--env cube-singletask-v0 --short --steps 8") == (8, 9.0, True)
    with pytest.raises(InputError, match="--short: there are no such settings for ant2: use"):
        values("--env ant2 --short")


def test_typed_flag_wins_even_at_its_default():
    args = parsed("--steps 1000 --alpha 2.5 --batch-size 256")
    assert (args.steps, args.alpha, args.batch_size) == (1000, 2.5, 256)
    assert parsed("--batch_size 256").batch_size == 256  # the other spelling
    assert parsed("--resume").resume and not parsed("").resume


def test_the_preset_that_is_named_is_the_one_in_force():
    """What a typed flag replaces is no longer named."""
    assert parse(Args, PRESETS, [])[1] == dict(steps=30, batch_size=32, bc_steps=60)
    line = "--batch-size 8 --steps 40".split()
    assert parse(Args, PRESETS, line)[1] == {}
    line = "--batch-size 8 --steps 90".split()
    assert parse(Args, PRESETS, line)[1] == dict(bc_steps=60)


@pytest.mark.parametrize(
    ("line", "bc_steps"),
    [
        ("", 60),
        ("--steps 40", 40),
        ("--steps 100", 60),
        ("--steps 40 --bc-steps 500", 500),
        ("--env x --steps 300", 300),
        ("--env x --steps 3000", 2000),
        ("--env x", 2000),
    ],
)
def test_an_earlier_phase_is_at_most_as_long_as_typed_steps(line, bc_steps):
    assert parsed(line).bc_steps == bc_steps


@pytest.mark.parametrize(
    ("line", "steps", "batch_size"),
    [
        ("--steps 1e5", 100_000, 32),
        ("--steps 2.5e3 --batch-size=1e3", 2500, 1000),
        ("--steps=1E+2 --batch_size 64", 100, 64),
        ("--steps 123456789012", 123456789012, 32),
    ],
)
def test_whole_numbers_as_powers_of_ten(line, steps, batch_size):
    args = parsed(line)
    assert (args.steps, args.batch_size) == (steps, batch_size)
    assert type(args.steps) is type(args.batch_size) is int


def test_only_whole_numbers_are_rewritten():
    assert parsed("--alpha 1e5").alpha == 1e5
    assert parsed("--env 1e5").env == "1e5"
    assert parsed("--free=-1e-1").free == -0.1 and parsed("--free inf").free == math.inf
    assert parsed("--env a=b").env == parsed("--env=a=b").env == "a=b"
    assert parsed("--share None").share == 0.5 and parsed("--share 0.25").share == 0.25


WHOLE, SEED = "a whole number from 1 to 1e12", "a whole number from 0 to 2147483647"
ROWS, ABOVE = "a whole number from 1 to 1e6", "a finite number above 0"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--batch-size 0", f"--batch-size is 0: use {ROWS}"),
        ("--batch-size 1e12", f"--batch-size is 1e12: use {ROWS}"),
        ("--steps -5", f"--steps is -5: use {WHOLE}"),
        ("--steps 1.5", f"--steps is 1.5: use {WHOLE}"),
        ("--steps=1.5e0", f"--steps is 1.5e0: use {WHOLE}"),
        ("--steps many", f"--steps is many: use {WHOLE}"),
        ("--steps --seed 1", f"--steps is --seed: use {WHOLE}"),
        ("--seed -1", f"--seed is -1: use {SEED}"),
        ("--seed 1e30", f"--seed is 1e30: use {SEED}"),
        ("--seed 1e400", f"--seed is 1e400: use {SEED}"),
        (f"--seed {'9' * 9999}", f"--seed is {'9' * 40}: use {SEED}"),
        ("--seed nan", f"--seed is nan: use {SEED}"),
        ("--seed inf", f"--seed is inf: use {SEED}"),
        ("--lr nan", f"--lr is nan: use {ABOVE}"),
        ("--lr inf", f"--lr is inf: use {ABOVE}"),
        ("--lr=-inf", f"--lr is -inf: use {ABOVE}"),
        ("--lr 0", f"--lr is 0: use {ABOVE}"),
        ("--share 1.5", "--share is 1.5: use a number from 0 to 1"),
        ("--share none", "--share is none: use a number from 0 to 1"),
        ("--free x", "--free is x: use a number"),
        ("--whole 1.5", "--whole is 1.5: use a whole number"),
        ("--widths x", f"--widths is x: use {WHOLE} for each of its values"),
        ("--widths 8 1e2 2.5 8", f"--widths is 2.5: use {WHOLE} for each of its values"),
        ("--eval-episodes 1e9", "--eval-episodes is 1e9: use a whole number from 1 to 10,000"),
    ],
)
def test_numbers_that_cannot_be_are_one_line(line, says):
    with pytest.raises(InputError) as caught:
        parsed(line)
    assert isinstance(caught.value, SystemExit)
    assert str(caught.value) == says


def test_a_preset_out_of_range_is_one_line():
    with pytest.raises(InputError, match="--widths is -1: use a whole number from 1"):
        parse(Args, {"*": dict(widths=(8, -1))}, [])
    with pytest.raises(InputError, match="--alpha is nan: use a finite number of 0 or more"):
        parse(Args, {"*": dict(alpha=math.nan)}, [])


def test_types_of_numbers_are_found_in_every_annotation():
    allowed = Range(0, 1, "x")
    assert number_type(int) == (int, None) and number_type(str) == (None, None)
    assert number_type(float | None) == (float, None)
    assert number_type(Annotated[int, allowed]) == (int, allowed)
    assert number_type(Annotated[float, allowed] | None) == (float, allowed)
    assert number_type(tuple[Annotated[int, allowed], ...]) == (int, allowed)


def test_help_begins_with_the_papers_flags_and_shows_the_values_of_the_env(capsys):
    with pytest.raises(SystemExit) as caught:
        parsed("--env ant1 --help")
    out = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0 and "flags and presets" in out
    assert "weight of Q (default: 9.0)" in out
    assert "a share, or None (default: 0.5)" in out, "a field that is filled in shows its value"
    assert out.index("--bc-steps") < out.index("--device") < out.index("--track")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--nonsense 3", "there is no --nonsense: use --help"),
        ("--alpa 3", "there is no --alpa: use --alpha"),
        ("--batchsize=3", "there is no --batchsize: use --batch-size"),
        ("--max-timesteps 3", "there is no --max-timesteps: use --steps"),
        (
            "--eval-env None",
            "--eval-env is None: use none for no task, or leave the flag out for the task of the "
            "data",
        ),
        ("--n_episodes 3", "there is no --n-episodes: use --eval-episodes"),
        (f"--{'x' * 99}", f"there is no --{'x' * 40}: use --help"),
    ],
)
def test_an_unknown_flag_is_answered_with_the_one_that_is_meant(line, says):
    with pytest.raises(InputError) as caught:
        parsed(line)
    assert str(caught.value) == says


@pytest.mark.parametrize("word", ["--run", "--runs"])
def test_what_is_typed_without_a_flag_is_no_flag(word):
    """The folder of evaluate.py."""
    with pytest.raises(InputError, match=f"^there is no {word}: use --help$"):
        parse(importlib.import_module("tools.evaluate").Args, {}, [word, "runs/x"])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--precision half", "invalid choice 'half' for argument '--precision'"),
        ("--env", "Missing value for argument '--env'"),
        ("--resume 3", "Unrecognized options: 3"),
        ("-steps 3", "Unrecognized options: -steps, 3"),
        ("word", "Unrecognized options: word"),
    ],
)
def test_flags_that_cannot_be_read_are_one_line(line, says, capsys):
    with pytest.raises(InputError, match=f"{says}.*; --help lists the flags$") as caught:
        parsed(line)
    assert "\n" not in str(caught.value) and "---" not in str(caught.value)
    assert capsys.readouterr() == ("", "")


# ---- seeds and evaluation --------------------------------------------------------------------


class FakeEnv:
    """Pays (seed, then twice that ...) for `length` steps; checks what it is given."""

    spec = None

    def __init__(self, length, terminal):
        self.length, self.terminal, self.seeds, self.actions = length, terminal, [], []

    def reset(self, seed):
        self.seeds.append(seed)
        self.t = 0
        return np.array([seed, 0], np.float32), {}

    def step(self, action):
        assert self.t < self.length, "stepped after its episode ended"
        self.t += 1
        self.actions.append(action)
        over = self.t == self.length
        obs = np.array([self.seeds[-1], self.t], np.float32)
        return obs, self.seeds[-1] * self.t, over and self.terminal, over and not self.terminal, {}


def test_evaluate_runs_one_episode_in_each_environment():
    envs = [FakeEnv(3, True), FakeEnv(1, False), FakeEnv(5, False)]
    torch.manual_seed(0)
    state = torch.get_rng_state()

    def act(obs):
        assert obs.shape == (3, 2) and obs.dtype == torch.float32
        return obs * 10 + torch.rand(3, 2)

    returns = evaluate(act, envs, 50, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    assert [env.seeds for env in envs] == [[50], [51], [52]]
    assert returns.tolist() == [50 * 6, 51, 52 * 15]  # undiscounted, 1 + 2 + ... + length
    assert [len(env.actions) for env in envs] == [3, 1, 5]
    for i, env in enumerate(envs):
        due = [[10 * (50 + i), 10 * t] for t in range(env.length)]
        noise = np.array(env.actions) - due
        assert (noise > -1e-4).all() and (noise < 1 + 1e-4).all()

    again = [FakeEnv(3, True), FakeEnv(1, False), FakeEnv(5, False)]
    torch.manual_seed(123)
    evaluate(act, again, 50, torch.device("cpu"))
    assert np.array_equal(again[2].actions, envs[2].actions)  # its own random stream


@pytest.mark.parametrize("count", [1, 3, 4, 7, 9])
def test_environments_are_used_again_for_further_episodes(count):
    def act(obs):
        assert obs.shape == (7, 2)
        return obs * 10 + torch.rand(7, 2)

    lengths = [3, 1, 5, 2, 2, 6, 1]
    plain = [FakeEnv(length, True) for length in lengths]
    due = evaluate(act, plain, 50, torch.device("cpu"))
    few = [Turns(lengths[i::count]) for i in range(count)]
    assert np.array_equal(evaluate(act, few, 50, torch.device("cpu"), 7), due)
    assert [env.seeds for env in few] == [[*range(50, 57)][i::count] for i in range(count)]
    for i, env in enumerate(plain):
        turn = few[i % count].turns[i // count]
        assert np.array_equal(turn.actions, env.actions), "noise and all"


class Turns:
    """A FakeEnv of another length at every reset."""

    spec = None

    def __init__(self, lengths):
        self.turns, self.seeds = [FakeEnv(length, False) for length in lengths], []

    def reset(self, seed):
        self.now = self.turns[len(self.seeds)]
        self.seeds.append(seed)
        return self.now.reset(seed)

    def step(self, action):
        return self.now.step(action)


class Seen(gymnasium.Wrapper):
    """Adds all that was observed to the return, which then tells every step of an episode."""

    def step(self, action):
        obs, reward, *rest = self.env.step(action)
        return obs, reward + obs.sum(dtype=np.float64), *rest


MAZE = dict(max_episode_steps=60, continuing_task=False)


@pytest.mark.parametrize("episodes", [10, 20])
@pytest.mark.parametrize(
    "task", [Task("Hopper-v5"), Task("PointMaze_Medium-v3", kwargs=MAZE)], ids=lambda x: x.id
)
def test_few_environments_return_the_bits_of_many(task, episodes):
    """The plain way makes an environment for each episode. The policy is a network that draws
    noise, so that a return depends on the size of the batch, on the stream and on the seed."""
    pytest.importorskip("gymnasium_robotics")
    envs = [Seen(task.make()) for _ in range(episodes)]
    size, actions = envs[0].observation_space.shape[0], envs[0].action_space.shape[0]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(size, 256), nn.Tanh(), nn.Linear(256, actions), nn.Tanh())

    def act(obs):
        return (net(obs) + 0.1 * torch.randn(len(obs), actions)).clamp(-1, 1)

    due = evaluate(act, envs, 100, torch.device("cpu"))
    assert len(set(due)) == episodes, "no two episodes are alike"
    for count in (episodes, 7):  # used a second time, and fewer
        found = evaluate(act, envs[:count], 100, torch.device("cpu"), episodes)
        assert np.array_equal(found, due)


def test_a_run_makes_as_many_environments_as_its_task_says(here):
    made = []

    def loaded(run):
        load = run.load

        def few():
            data, own = load(), run.task["make"]
            run.task |= {"most_envs": 2, "make": lambda: made.append(own()) or made[-1]}
            return data

        run.load = few

    values = dict(eval_env=None, eval_every=10, eval_episodes=5)
    start("bc", out="many", **values)
    start("bc", out="few", prepare=loaded, **values)
    assert len(made) == 2
    one, two = (rows(folder("bc", out) / "eval.csv") for out in ("many", "few"))
    assert one == two and "episode_4" in one[0]


def test_evaluate_needs_no_gradient():
    net = nn.Linear(2, 2)
    assert evaluate(net, [FakeEnv(1, True)], 1, torch.device("cpu")).tolist() == [1]


class Paying(gymnasium.Env):
    """Episodes of three steps. The k-th of all returns (40 - k)^3, which is the sum of its rewards
    and neither the first nor the last."""

    observation_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-2, 2, (1,), np.float32)
    seeds: ClassVar = []  # of all episodes

    def reset(self, *, seed=None, options=None):
        self.rewards = [7.0, (40.0 - len(self.seeds)) ** 3 - 12, 5.0]
        self.seeds.append(seed)
        return np.zeros(3, np.float32), {}

    def step(self, action):
        reward = self.rewards.pop(0)
        return np.zeros(3, np.float32), reward, not self.rewards, False, {}


gymnasium.register("Paying-v0", Paying)


@pytest.mark.parametrize(("log", "last"), [("log.npz", 10), ("log-singletask-v0.npz", 3)])
def test_scores_are_means_of_as_many_as_they_say(here, monkeypatch, capsys, log, last):
    """Of an evaluation's episodes, and of the last evaluations: returns are so skewed that no
    median, and no other number of them, gives the same. The dataset's name decides how many."""
    monkeypatch.setattr(Paying, "seeds", [])
    write_log(log)
    values = dict(eval_env="Paying-v0", eval_every=1, eval_episodes=3, steps=12)
    final, run = start("bc", env=log, **values)
    returns = (40.0 - np.arange(36).reshape(12, 3)) ** 3
    table = rows(run.folder / "eval.csv")
    assert [int(row["step"]) for row in table] == list(range(1, 13))
    episodes = [[float(x) for key, x in row.items() if "episode_" in key] for row in table]
    assert episodes == returns.tolist()
    means = returns.mean(1)
    for key in ("return", "score"):
        np.testing.assert_allclose([float(row[key]) for row in table], means)
    summary = json.loads((run.folder / "summary.json").read_text())
    assert final == summary["score"] == pytest.approx(means[-last:].mean())
    assert (summary["averaged"], summary["evaluations"]) == (last, 12)
    assert (summary["last"], summary["best"]) == pytest.approx((means[-1], means[0]))
    assert f"bc return {final:.1f} | " in capsys.readouterr().out.splitlines()[-1]


def test_fewer_evaluations_than_a_score_averages(here, monkeypatch):
    monkeypatch.setattr(Paying, "seeds", [])
    final, _ = start("bc", eval_env="Paying-v0", eval_every=10, eval_episodes=1)
    assert final == np.mean([40**3, 39**3])


def test_evaluations_of_a_run_share_their_starts_and_runs_of_other_seeds_do_not(here, monkeypatch):
    starts = {}
    for seed in (3, 4):
        monkeypatch.setattr(Paying, "seeds", [])
        start("bc", eval_env="Paying-v0", eval_every=5, eval_episodes=3, seed=seed)
        starts[seed] = Paying.seeds[:3]
        assert Paying.seeds == 4 * starts[seed]
    assert len({*starts[3], *starts[4]}) == 6


# ---- tasks that fail -------------------------------------------------------------------------


class Faulty(gymnasium.Env):
    """Episodes of three steps, without a time limit. From the third on, `fault` may change what a
    step gives."""

    observation_space = gymnasium.spaces.Box(-9, 9, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-2, 2, (1,), np.float32)
    fault: ClassVar = None
    episodes: ClassVar = 0

    def reset(self, *, seed=None, options=None):
        Faulty.episodes += 1
        self.t = 0
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.t += 1
        gives = np.full(3, self.t, np.float32), float(action[0]), self.t == 3, False, {}
        return Faulty.fault(*gives) if Faulty.fault and Faulty.episodes >= 3 else gives


gymnasium.register("Faulty-v0", Faulty)

# name: (what a step gives instead, what the line says)
FAULTS = {
    "raises": (lambda *_: 1 / 0, "raised ZeroDivisionError: division by zero; repair it"),
    "leaves": (lambda *_: sys.exit(0), "raised SystemExit: 0; repair it"),
    "four": (lambda obs, r, end, *_: (obs, r, end, {}), "raised ValueError: not enough values"),
    "shape": (lambda obs, *rest: (obs[:2], *rest), "raised ValueError: cannot reshape"),
    "no reward": (lambda obs, r, *rest: (obs, None, *rest), "raised TypeError: "),
    "nan": (lambda obs, r, *rest: (obs, math.nan, *rest), "a reward is nan; repair it"),
    "huge": (lambda obs, r, *rest: (obs, 3e38, *rest), r"a reward is 3e\+38; repair it"),
    "sum": (lambda obs, r, *rest: (obs, 9e29, *rest), r"a return, or the score, is 2\.7e\+30: "),
    "blind": (lambda obs, *rest: (obs * math.nan, *rest), "the policy's actions are not finite: "),
    "endless": (lambda obs, r, *_: (obs, r, False, False, {}), "has not ended after 50 steps: "),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_task_that_fails_is_named_and_loses_one_step(here, monkeypatch, capsys, case):
    """The third evaluation is at step 18. Once the task is repaired, the run goes on to the bit."""
    fault, says = FAULTS[case]
    monkeypatch.setattr(page, "LONGEST", 50)
    monkeypatch.setattr(Faulty, "fault", None)
    start("td3_bc", out="whole", eval_env="Faulty-v0")
    assert "note: Faulty-v0 has no time limit: " in capsys.readouterr().out
    monkeypatch.setattr(Faulty, "episodes", 0)
    monkeypatch.setattr(Faulty, "fault", fault)
    with pytest.raises(InputError, match=rf"Faulty-v0\b.*{says}") as error:
        start("td3_bc", out="parts", eval_env="Faulty-v0")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert checkpoint("td3_bc", "parts")["step"] == 17
    monkeypatch.setattr(Faulty, "fault", None)
    start("td3_bc", out="parts", eval_env="Faulty-v0", resume=True)
    assert_same_run("td3_bc", "whole", "parts")


def test_an_odd_task_is_judged_right(here, monkeypatch):
    """Whatever its rewards' type is, and whatever is observed after the end; and long episodes.
    The second of two ends after 4,500 steps, the first one after 13,500."""
    steps = itertools.count(1)

    def odd(*_):
        end = next(steps) % 9_000 == 0
        return np.full(3, math.nan if end else 0.5), np.float16(0.25), end, end, {}

    monkeypatch.setattr(Faulty, "fault", odd)
    monkeypatch.setattr(Faulty, "episodes", 3)
    start("bc", eval_env="Faulty-v0", eval_every=20, eval_episodes=2)
    (row,) = rows(folder("bc") / "eval.csv")
    assert [float(row[f"episode_{i}"]) for i in range(2)] == [13_500 / 4, 4_500 / 4]


def test_a_task_that_can_be_made_once_is_one_line(here, monkeypatch):
    made = []

    def init(self):
        made.append(self)
        if len(made) > 2:
            raise OSError("its port is in use")

    monkeypatch.setattr(Faulty, "fault", None)
    monkeypatch.setattr(Faulty, "__init__", init)
    start("bc", eval_env="Faulty-v0", name="one")
    made.clear()
    with pytest.raises(
        InputError, match="Faulty-v0 raised OSError: its port is in use; .*episodes 1"
    ):
        start("bc", eval_env="Faulty-v0", eval_episodes=2)


@pytest.mark.parametrize("case", ["nan", "huge", "blind", "endless"])
def test_a_copy_without_harness_refuses_a_task_without_a_return(here, monkeypatch, case):
    monkeypatch.setattr(page, "HERE", here)
    monkeypatch.setattr(page, "LONGEST", 50)
    monkeypatch.setattr(Faulty, "fault", FAULTS[case][0])
    monkeypatch.setattr(Faulty, "episodes", 0)
    with pytest.raises(InputError, match="Faulty-v0"):
        start("bc", eval_env="Faulty-v0")
    assert not (folder("bc") / "summary.json").exists()


def test_data_whose_return_is_no_number_is_refused(here):
    write_log("log.npz", scale=1e32)
    with pytest.raises(InputError, match=r"^the data: a return, or the score, is .*e\+3"):
        start("bc")


def drawn(seed, name, first_steps):
    """What the two phases of a run draw in their first two steps, and the weights it begins with:
    (phase, step, what) -> numbers. `first_steps` is the length of the first phase."""
    import fisher_brc

    draws = {}

    def train(run, data, args):
        nets = nn.Linear(3, 4)
        draws["start", 0, "weights"] = nets.weight.flatten().tolist()
        run.start(nets, SimpleNamespace(adam=Adam(nets.parameters(), 1e-3)))
        for phase, steps in {"behavior": first_steps, "train": 2}.items():
            for t in run.loop(steps, phase):
                new = {"batch": sample(data, 8, ["reward"])[0], "noise": torch.randn(8)}
                if t <= 2:
                    draws.update({(phase, t, key): x.tolist() for key, x in new.items()})
                run.after(t, {"loss": torch.zeros(())})

    words = flags(ROOT / "algorithms" / "fisher_brc.py", seed=seed, name=name, eval_env="none")
    main(fisher_brc.Args, {}, train, words)
    return draws


def test_batches_and_noise_are_those_of_the_seed_and_the_phase(here):
    """They repeat when the same seed and phase come again, after an earlier phase of another length
    too, and no two of them are alike."""
    one, again, other = drawn(3, "one", 2), drawn(3, "again", 5), drawn(4, "other", 2)
    assert one == again
    different = [tuple(x) for x in (*one.values(), *other.values())]
    assert len(set(different)) == len(different) == 2 * (1 + 2 * 2 * 2)


def test_evaluation_leaves_the_random_stream_alone(here):
    start("td3_bc", out="none")
    start("td3_bc", out="some", eval_env="Pendulum-v1", eval_every=3, eval_episodes=2)
    assert same(checkpoint("td3_bc", "none")["nets"], checkpoint("td3_bc", "some")["nets"])


# ---- lengths and lines -----------------------------------------------------------------------


def test_the_first_lines_name_every_phase_and_its_length(here, capsys):
    words = ["--env", "log.npz", "--eval-env", "none", "--batch-size", 4]
    for more, says in (("", "behavior 3, train 3"), ("--bc-steps 5", "behavior 5, train 3")):
        run_main("fisher_brc", *words, "--steps", 3, "--overwrite", *more.split())
        assert f"steps:      {says}; seed 0\n" in capsys.readouterr().out
    run_main("bc", *words, "--steps", 3)
    lines = capsys.readouterr().out.splitlines()[:5]
    assert lines[0].startswith("data:       log.npz, 120 transitions, 4 episodes, return ")
    assert lines[1:3] == ["steps:      train 3; seed 0", "preset:     none"]
    assert lines[3] == "folder:     runs/log__bc__0"
    assert re.fullmatch(r"arithmetic: \w+, threads: 1, fp32 products: highest, eager", lines[4])


def test_the_printed_preset_is_what_is_in_force(here, capsys):
    import td3_bc

    presets = {"hopper-replay-demo": dict(steps=4, alpha=1.5, policy_freq=3)}
    words = "--env hopper-replay-demo --eval-env none --batch-size 4 --policy-freq 1".split()
    main(td3_bc.Args, presets, td3_bc.train, words)
    assert "preset:     steps=4, alpha=1.5\n" in capsys.readouterr().out
    config = json.loads(Path("runs/hopper-replay-demo__td3_bc__0/config.json").read_text())
    assert config["preset"] == dict(steps=4, alpha=1.5) and config["args"]["policy_freq"] == 1


@pytest.mark.parametrize(
    ("env", "line"),
    [
        ("cube-single-play-singletask-v0", "none"),  # its row is replaced by typed flags
        ("cube-single-noisy-singletask-v0", "no published settings for this data: defaults of the"),
        ("ant-medium-v2", "none"),
    ],
)
def test_data_of_ogbench_without_published_settings_is_named(env, line):
    import fql

    args, preset = parse(fql.Args, fql.PRESETS, ["--env", env, "--alpha", "7"])
    run = SimpleNamespace(args=args, preset=preset, data=SimpleNamespace(name=env))
    run.data.obs = run.data.episode_return = []
    run.unit, run.references, run.folder, run.device = "score", {"data": 0.0}, "runs", "cpu"
    text = board.Guest.first_lines(SimpleNamespace(run=run))[2]
    assert text.startswith(f"preset:     {line}")


def test_every_phase_says_how_far_it_is_also_on_a_pipe(here, capsys, monkeypatch):
    """The first line after seconds, then every half minute."""
    assert board.Guest.first_line_after <= 10 and board.Guest.line_every <= 60
    start("bc")
    assert "1/20" not in capsys.readouterr().out
    for name in ("first_line_after", "line_every"):
        monkeypatch.setattr(board.Guest, name, 0)
    start("fisher_brc", log_every=1000)
    out = capsys.readouterr().out
    assert re.search(r"^behavior 1/10 \d+/s, \d+ s left$", out, re.M), out
    assert re.search(r"^train 0/20$", out, re.M), "a phase whose first step is long says so"
    assert re.search(r"^train 19/20 \d+/s, \d+ s left$", out, re.M), out


def test_names_of_folders():
    def path(**values):
        return Run(Args(device="cpu", **values)).folder.as_posix()

    name = Path(__file__).stem
    assert path(env="hopper-medium-v2", seed=4) == f"runs/hopper-medium-v2__{name}__4"
    due = f"runs/mujoco-hopper-medium-v0__{name}-x.1__0"
    assert path(env="mujoco/hopper/medium-v0", name="x.1") == due
    assert path(env="a/b/log.HDF5", out="o") == f"o/log__{name}__0"


# ---- values ----------------------------------------------------------------------------------


def nan_metrics(run, metrics):
    return {**metrics, next(iter(metrics)): torch.tensor(math.nan)}


@pytest.mark.parametrize("phase", ["train", "behavior"])
def test_loss_that_is_not_finite_stops_the_run(here, phase):
    with pytest.raises(InputError) as error:
        start("fisher_brc", at(phase, 8, nan_metrics), log_every=2, save_every=3)
    line = str(error.value)
    assert re.search(rf"{phase} step 8: \w+ is nan; training diverged", line)
    assert f"the last good checkpoint is {folder('fisher_brc') / 'checkpoint.pt'}" in line
    assert "\n" not in line
    saved = checkpoint("fisher_brc")
    assert (saved["phase"], saved["step"]) == (phase, 6)
    assert all(x.isfinite().all() for x in saved["nets"].values())


@pytest.mark.parametrize("stopped", [False, True])
def test_diverged_weights_are_never_saved(here, stopped):
    """Between two rows of train.csv a checkpoint, or a stop, must not replace the good one."""

    def action(run, metrics):
        with torch.no_grad():
            run.nets.actor.weights[0].fill_(math.nan)
        if stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        return nan_metrics(run, metrics)

    with pytest.raises(SystemExit):
        start("bc", at("train", 13, action), log_every=10, save_every=2)
    saved = checkpoint("bc")
    assert all(x.isfinite().all() for x in saved["nets"].values()), saved["step"]
    assert 10 <= saved["step"] <= 12


def test_weights_that_the_metrics_do_not_show_yet_are_never_saved(here):
    """The update that breaks them measured its loss before."""

    def action(run, metrics):
        with torch.no_grad():
            run.nets.actor.weights[0][0, 0] = math.inf

    with pytest.raises(InputError, match=r"train step 14: the weight actor\.\S+ is nan; training "):
        start("bc", at("train", 14, action), save_every=2)
    saved = checkpoint("bc")
    assert saved["step"] == 12 and all(x.isfinite().all() for x in saved["nets"].values())


def test_divergence_before_any_checkpoint(here):
    with pytest.raises(InputError, match=r"step 4: pi_loss is nan.*no checkpoint was due yet"):
        start("bc", at("train", 4, nan_metrics))


@pytest.mark.parametrize(("scale", "said"), [(1.0, 0), (1e6, 1), (1e-6, 1), (0.0, 1)])
def test_scale_of_rewards_is_named_where_it_matters(here, capsys, scale, said):
    write_log("log.npz", scale=scale)
    start("td3_bc")
    out = capsys.readouterr().out
    with np.load("log.npz") as log:
        size = np.abs(log["rewards"]).mean()
    assert out.count(f"note: rewards are {size:.2g} in size") == said, out
    assert out.count("note: rewards are") == said and "Q runs away" not in out
    start("bc")
    assert "note: rewards" not in capsys.readouterr().out, "BC reads none"


def with_q(values):
    values = iter(values)
    return lambda run, t, metrics: metrics | {"q_mean": torch.tensor(next(values))}


@pytest.mark.parametrize(("value", "said"), [(1e4, True), (-1e4, True), (1.0, False)])
def test_q_beyond_any_return_is_said_once(here, capsys, value, said):
    """The log's rewards are below 4, so no return is above 400 at discount 0.99."""
    start("td3_bc", with_q([1.0] * 10 + [value] * 10))
    out = capsys.readouterr().out
    assert out.count("Q runs away") == said and ("no policy can reach more than" in out) == said


def test_two_values_beyond_any_return_are_one_note(here, capsys):
    """BRAC watches two means of Q, which run away together."""

    def both(run, t, metrics):
        value = torch.tensor(1.0 if run.phase != "train" or t < 10 else 1e6)
        return metrics | dict.fromkeys(run.largest, value)

    _, run = start("brac", both)
    assert run.calls[-1] == ("train", 20)
    assert capsys.readouterr().out.count("Q runs away") == 1


def test_the_reward_shift_counts_as_reward(here, capsys):
    start("td3_bc", with_q(np.linspace(1, 1e4, 20).tolist()), reward_shift=-100.0)
    assert "Q runs away" not in capsys.readouterr().out


# ---- bad input -------------------------------------------------------------------------------


class CarBox(gymnasium.Env):
    """Sizes of the log, other bounds."""

    observation_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        return np.zeros(3, np.float32), {}

    def step(self, action):
        return np.zeros(3, np.float32), 0.0, True, False, {}


gymnasium.register("CarBox-v0", CarBox)

# name: (flags after those of a good run, what the line says)
BAD = {
    "unknown-env": ("--env hopper-medum-v2", r"unknown dataset .*hopper-medium-v2"),
    "missing-file": ("--env lag.npz", r"no file lag\.npz.*did you mean log\.npz"),
    "truncated-file": ("--env half.npz", r"half\.npz is not a complete npz file"),
    "task-of-the-data": ("--env car.npz", r"\(3, 1\).*MountainCarContinuous-v0 \(2, 1\)"),
    "task-of-the-flag": ("--eval-env MountainCarContinuous-v0", r"\(3, 1\).*\(2, 1\).*--eval-env"),
    "other-bounds": ("--eval-env CarBox-v0", r"action bounds \[-2.\] to \[2.\], CarBox-v0 \[-1.\]"),
    "unknown-task": ("--eval-env Pendulun-v1", r"no task Pendulun-v1.*Pendulum-v1"),
    "both": ("--resume --overwrite", r"--resume .*--overwrite .*use one"),
    "device": ("--device gpu7", r"--device gpu7: .*use cpu, cuda or auto"),
    "no-device": ("--device meta", r"--device meta: .*use cpu, cuda or auto"),
    "batch": ("--batch-size 0", r"--batch-size is 0: use a whole number from 1 to 1e6"),
    "out-is-a-file": ("--out log.npz", r"log\.npz/log.*: Not a directory; use another --out"),
    "name": ("--name a/b", r"--name is 'a/b': use letters, digits"),
}
ONE = [x if x.stem == "td3_bc" else pytest.param(x, marks=pytest.mark.soak) for x in SCRIPTS]


@pytest.mark.parametrize("path", ONE, ids=lambda p: p.stem)
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(path, case, here):
    Path("half.npz").write_bytes(Path("log.npz").read_bytes()[:2000])
    write_log("car.npz", {"env_id": "MountainCarContinuous-v0"})
    argv, says = BAD[case]
    lines, status = outcome(path, [*flags(path), *argv.split()])
    assert status == 1 and len(lines) == 1, lines
    assert re.search(says, lines[0]), lines[0]
    files = {p.name for p in here.rglob("*")}
    assert files == {"log.npz", "half.npz", "car.npz"}, "written before the input was checked"


@pytest.mark.parametrize("values", [{"name": "x" * 300}, {"out": "log.npz"}])
def test_a_bad_folder_is_refused_before_the_data_are_read(here, monkeypatch, values):
    monkeypatch.setattr(page, "load", lambda *_: pytest.fail("the data were read"))
    with pytest.raises(InputError, match="; use another --out or --name$"):
        start("bc", **values)


def test_networks_beyond_the_memory_are_one_line(here):
    """Four petabytes: more than a process can address."""
    lines, status = outcome(TD3_BC, flags(TD3_BC, critics=10**12, eval_env="none"))
    assert status == 1 and len(lines) == 1, lines
    assert lines[0].startswith("out of memory (") and "use a --batch-size below 8" in lines[0]


FULL = {
    "cpu": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB.\nGPU 0 has"),
    "numpy": MemoryError("Unable to allocate 9 TiB"),
    "size": RuntimeError("Storage size calculation overflowed with sizes=[99]"),
}


@pytest.mark.parametrize("case", FULL)
def test_a_lack_of_memory_is_one_line_that_names_the_batch(here, case):
    import bc

    def train(run, data, args):
        raise FULL[case]

    with pytest.raises(InputError, match="^out of memory .*--batch-size below 8") as error:
        main(bc.Args, bc.PRESETS, train, flags(ROOT / "algorithms" / "bc.py"))
    assert "\n" not in str(error.value)


def test_a_mistake_in_the_code_keeps_its_traceback(here):
    import bc

    def train(run, data, args):
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        main(bc.Args, bc.PRESETS, train, flags(ROOT / "algorithms" / "bc.py"))


# ---- stopping --------------------------------------------------------------------------------


def test_the_printed_command_continues_the_run(here, monkeypatch, capsys):
    """--overwrite beside --resume would be refused."""
    import td3_bc

    start("td3_bc", out="whole")

    def train(run, data, args):
        after = run.after

        def stopping(t, metrics, act=None):
            if t == 7:
                os.kill(os.getpid(), signal.SIGINT)
            after(t, metrics, act)

        run.after = stopping
        td3_bc.train(run, data, args)

    words = flags(TD3_BC, eval_env="none", eval_every=6, eval_episodes=1, save_every=7)
    monkeypatch.setattr(sys, "argv", [str(TD3_BC), *words, "--overwrite", "--no-resume"])
    with pytest.raises(SystemExit) as stopped:
        main(td3_bc.Args, td3_bc.PRESETS, train)
    assert stopped.value.code == 130
    command = re.search("continue with: (.*)", capsys.readouterr().out)[1]
    assert "overwrite" not in command and command.endswith(" --resume")
    python, script, *words = shlex.split(command)
    assert shutil.which(python) and outcome(script, words) == ([], 0)
    assert same(checkpoint("td3_bc")["nets"], checkpoint("td3_bc", "whole")["nets"])


def test_second_signal_does_not_wait(here):
    twice = lambda run, metrics: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)] and None
    with pytest.raises(SystemExit):
        start("bc", at("train", 5, twice))
    assert not (folder("bc") / "checkpoint.pt").exists()


@pytest.mark.parametrize("saved", [False, True])
def test_ctrl_c_outside_the_loop_says_what_is_saved(here, capsys, saved):
    import bc

    def train(run, data, args):
        if saved:
            bc.train(run, data, args)
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        main(bc.Args, bc.PRESETS, train, flags(ROOT / "algorithms" / "bc.py"))
    last = capsys.readouterr().out.splitlines()[-1]
    assert stopped.value.code == 130
    assert last.startswith("stopped; continue with: ") == saved
    assert saved or last == "stopped before anything was saved"


def test_a_reader_that_leaves_is_no_error(here):
    """`python algorithms/bc.py | head -1`"""
    command = [sys.executable, str(ROOT / "algorithms" / "bc.py")]
    command += flags(command[1], eval_env="none", log_every=1, steps=3000)
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    job.stdout.readline()
    job.stdout.close()
    assert job.wait(60) in (0, 1)
    assert "Traceback" not in job.stderr.read()


def test_time_is_counted_once(here, monkeypatch, capsys):
    """By a clock on which a step takes a second and an evaluation seven, also after --resume."""
    now = [100.0]

    def wait(seconds, result=None):
        now[0] += seconds
        return result

    monkeypatch.setattr(page, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(page, "evaluate", lambda *_: wait(7.0, np.zeros(1)))

    def step(run, t, metrics):
        wait(1.0)
        if t == 15:
            stop_by(signal.SIGTERM)(run, metrics)

    with pytest.raises(SystemExit):
        start("bc", step, eval_env=None, log_every=5)
    wait(1000.0)
    _, run = start("bc", lambda *_: wait(1.0), eval_env=None, log_every=5, resume=True)
    assert (run.train_seconds, run.eval_seconds) == (20, 28)  # after steps 6, 12, 18 and 20
    with open(run.folder / "train.csv") as f:
        assert [float(row["seconds"]) for row in csv.DictReader(f)] == [5, 10, 15, 20]
    assert " | 48 s | " in capsys.readouterr().out.splitlines()[-1]


def test_stop_before_the_first_step_of_a_later_phase(here):
    """The last step of phase one is saved with its phase."""
    with pytest.raises(SystemExit):
        start("fisher_brc", at("behavior", 10, stop_by(signal.SIGTERM)))
    saved = checkpoint("fisher_brc")
    assert (saved["phase"], saved["step"]) == ("behavior", 10)

"""collect.py on Pendulum-v1 (200 steps, no terminals) and a small task that does terminate."""

import contextlib
import errno
import importlib
import io
import json
import os
import runpy
import signal
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

import collect
from common import parse
from datasets import InputError, load_dataset
from experiment import load_tensors

ROOT = Path(__file__).resolve().parents[1]
AGENT = "--env Walk-v0 --steps 50 --train-steps 60 --medium-return -1000"


class Walk(gymnasium.Env):
    """obs (step, position); ends at |position| > 1, or after 7 steps by a time limit."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Box(np.float32([-0.5]), np.float32([1.5]))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.x = 0, self.np_random.uniform(-0.1, 0.1)
        return np.array([self.t, self.x]), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.t, self.x = self.t + 1, self.x + float(action[0]) - 0.5
        return np.array([self.t, self.x]), self.x, abs(self.x) > 1, False, {}


gymnasium.register("Walk-v0", f"{__name__}:Walk", max_episode_steps=7)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))  # where Gymnasium finds Walk
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setattr(sys, "argv", ["collect.py"])
    monkeypatch.setattr(collect, "EVAL_EVERY", 20)
    monkeypatch.setattr(collect, "EVAL_EPISODES", 2)
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for s, handler in before.items():
        signal.signal(s, handler)


def run(line):
    """collect.py with the words of `line` as its flags."""
    words = "--device cpu --random-steps 20 --seed 3 " + line
    collect.collect(parse(collect.Args, {}, words.split()))


def arrays(path):
    with np.load(path, allow_pickle=False) as file:
        return {k: file[k] for k in file.files}


def by_hand(seed, steps):
    """What "random" must hold for Walk-v0: every row with its true next observation."""
    env, rows = gymnasium.make("Walk-v0"), []
    torch.manual_seed(seed)
    collect.Nets(2, 1)  # the agent draws its weights first
    obs = None
    for i in range(steps):
        if obs is None:
            obs = env.reset(seed=seed if i == 0 else None)[0]
        action = 2 * torch.rand(1) - 1
        raw = (action + 1).numpy() - np.float32(0.5)
        next_obs, reward, terminal, timeout, _ = env.step(raw)
        rows.append((obs, raw, reward, next_obs, terminal, timeout and not terminal))
        obs = None if terminal or timeout else next_obs
    obs, action, reward, next_obs, terminal, timeout = map(np.array, zip(*rows))
    timeout[-1] |= not terminal[-1]
    return obs, action, reward, next_obs, terminal, timeout


def test_random_level_row_by_row(capsys):
    run("--env Walk-v0 --level random --steps 300 --flat walk.npz")
    assert not list(Path().glob("*.partial.pt")) and not list(Path().glob("*.tmp"))
    obs, action, reward, next_obs, terminal, timeout = by_hand(3, 300)
    ends = terminal | timeout
    assert terminal.sum() > 2 and timeout.sum() > 2, "the walk must end in both ways"
    assert terminal[obs[:, 0] == 6].any(), "and in both at once, which is a terminal"
    file = arrays("walk.npz")
    for key, want in dict(observations=obs, actions=action, rewards=reward, terminals=terminal,
                          timeouts=timeout, final_observations=next_obs[ends]).items():  # fmt: skip
        assert file[key].shape == want.shape
        np.testing.assert_allclose(file[key], want, rtol=1e-6, atol=1e-6, err_msg=key)
    assert file["observations"].dtype == file["actions"].dtype == np.float32
    assert file["terminals"].dtype == file["timeouts"].dtype == bool
    assert not (file["terminals"] & file["timeouts"]).any()
    meta = json.loads(str(file["metadata"]))
    assert (meta["env_id"], meta["level"], meta["seed"]) == ("Walk-v0", "random", 3)
    assert meta["ref_min_score"] is None and meta["versions"]["torch"] == torch.__version__

    data, task = load_dataset("walk.npz")
    assert task.id == "Walk-v0" and len(data.obs) == 300
    assert len(data.episode_return) == ends.sum() and "dropped" not in capsys.readouterr().out
    np.testing.assert_allclose(data.next_obs, next_obs, rtol=1e-6, atol=1e-6)  # time limits too
    np.testing.assert_array_equal(data.terminal, terminal)  # so that every time limit bootstraps
    np.testing.assert_allclose(data.action, action - 0.5, atol=1e-6)  # bounds to [-1, 1]
    returns = [r.sum() for r in np.split(reward, np.flatnonzero(ends)[:-1] + 1)]
    np.testing.assert_allclose(data.episode_return, returns, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("level", ["random", "expert"])
def test_saving_on_the_way_changes_nothing(monkeypatch, level):
    """Progress is saved in the middle of an episode, which goes on afterwards."""
    flags = f"{AGENT} --steps 100 --level {level}"
    run(f"{flags} --flat rare.npz")
    monkeypatch.setattr(collect, "SAVE_EVERY", 1)
    run(f"{flags} --flat often.npz")
    a, b = arrays("rare.npz"), arrays("often.npz")
    for key in ("observations", "actions", "rewards", "terminals", "timeouts"):
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_replay_saved_on_the_way(monkeypatch):
    flags = "--env Pendulum-v1 --level medium-replay --medium-return -9999 --train-steps 60"
    monkeypatch.setattr(collect, "SAVE_EVERY", 7)
    run(f"{flags} --flat pendulum.npz")
    timeouts = arrays("pendulum.npz")["timeouts"]
    assert np.flatnonzero(timeouts).tolist() == [len(timeouts) - 1], "one episode, cut at the end"


def test_file_trains_without_its_task():
    """Bounds other than [-1, 1] must come with the file, as --eval-env none builds no task."""
    run("--env Walk-v0 --level random --steps 40 --flat walk.npz")
    data, task = load_dataset("walk.npz", eval_env="none")
    assert task is None and data.action.abs().max() <= 1
    assert torch.equal(data.action, load_dataset("walk.npz")[0].action)


def test_pendulum_has_time_limits_only():
    run("--env Pendulum-v1 --level random --steps 450 --flat pendulum.npz")
    data, task = load_dataset("pendulum.npz")
    assert (len(data.obs), len(data.episode_return), task.id) == (450, 3, "Pendulum-v1")
    assert not data.terminal.any() and data.episode.bincount().tolist() == [200, 200, 50]
    for i in (199, 399, 449):  # one step of the pendulum's own equation, through the time limit
        cos, sin, speed = data.obs[i].tolist()
        torque = np.clip(2 * data.action[i].item(), -2, 2)
        speed = np.clip(speed + (15 * sin + 3 * torque) * 0.05, -8, 8)
        angle = np.arctan2(sin, cos) + speed * 0.05
        want = [np.cos(angle), np.sin(angle), speed]
        np.testing.assert_allclose(data.next_obs[i], want, atol=1e-4)


def test_minari_has_the_rows_of_the_flat_file():
    flags = "--env Walk-v0 --level random --steps 60"
    run(f"{flags} --flat walk.npz")
    run(f"{flags} --dataset-id walk/random-v0")
    (a, task_a), (b, task_b) = load_dataset("walk.npz"), load_dataset("walk/random-v0")
    for name in ("obs", "action", "reward", "next_obs", "terminal", "episode", "episode_return",
                 "action_low", "action_high"):  # fmt: skip
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.digest == b.digest and task_a.id == task_b.id == "Walk-v0"


LEVELS = {"medium-replay": None, "medium": 50, "expert": 50, "medium-expert": 100}


@pytest.mark.parametrize("level", LEVELS)
def test_levels(level):
    """Any return is medium here, so the agent is medium at its first evaluation, step 20."""
    run(f"{AGENT} --level {level} --flat walk.npz")
    file = arrays("walk.npz")
    returns = json.loads(str(file["metadata"]))["agent_returns"]
    assert [t for t, _ in returns] == ([20, 40, 60] if "expert" in level else [20])
    assert len(file["rewards"]) == (LEVELS[level] or 20)
    ends = file["terminals"] | file["timeouts"]
    assert ends[-1] and len(file["final_observations"]) == ends.sum()
    if level == "medium-expert":
        assert ends[49], "the halves are two episodes"
        assert file["observations"][50, 0] == 0
    assert len(load_dataset("walk.npz")[0].obs) == len(file["rewards"])


def stop_at(monkeypatch, call, number):
    """Send a signal inside the call-th environment step."""
    step, calls = Walk.step, []

    def stopping(self, action):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return step(self, action)

    monkeypatch.setattr(Walk, "step", stopping)
    return calls


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_rollout_continues(monkeypatch, capsys, number):
    flags = "--env Walk-v0 --level random --steps 60 --flat walk.npz"
    obs, action, _, _, terminal, timeout = by_hand(3, 60)
    n = next(i for i in range(25, 60) if obs[i, 0] > 0)  # stop in the middle of an episode
    with monkeypatch.context() as patch:
        stop_at(patch, n, number)
        with pytest.raises(SystemExit) as left:
            run(flags)
    assert left.value.code == 130 and "the same command continues" in capsys.readouterr().out
    assert not Path("walk.npz").exists() and Path("walk.npz.partial.pt").exists()
    with monkeypatch.context() as patch:
        calls = stop_at(patch, 0, number)
        run(flags)
    assert len(calls) == 60 - n and f"continuing after {n} steps" in capsys.readouterr().out
    assert not Path("walk.npz.partial.pt").exists()
    file = arrays("walk.npz")
    np.testing.assert_allclose(file["observations"][:n], obs[:n], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(file["actions"], action)  # one random stream, not the same again
    assert file["timeouts"][n - 1] and not timeout[n - 1], "the interrupted episode is a cut one"
    assert file["observations"][n, 0] == 0, "a new episode follows"
    data, _ = load_dataset("walk.npz")
    assert len(data.obs) == 60 and (data.next_obs[:, 0] == data.obs[:, 0] + 1).all()


def test_interrupted_training_continues(monkeypatch, capsys):
    flags = f"{AGENT} --level expert --flat walk.npz"
    updates, update = [], collect.update
    count = lambda *args: updates.append(1) or update(*args)
    monkeypatch.setattr(collect, "update", count)
    with monkeypatch.context() as patch:
        stop_at(patch, 38, signal.SIGTERM)  # some of them are the evaluation's
        with pytest.raises(SystemExit) as left:
            run(flags)
    assert left.value.code == 130
    partial = load_tensors(Path("walk.npz.partial.pt"))
    assert 0 < len(updates) == len(partial["replay"]["obs"]) - 20 < 40
    assert partial["opt"][0][-2] == len(updates), "Adam's count of the critics"
    run(flags)
    assert "continuing after" in capsys.readouterr().out
    assert len(updates) == 40, "60 steps, the first 20 without an update"
    assert len(arrays("walk.npz")["rewards"]) == 50


def test_partial_file_of_another_command(monkeypatch):
    flags = "--env Walk-v0 --level random --steps 60 --flat walk.npz"
    with monkeypatch.context() as patch:
        stop_at(patch, 25, signal.SIGTERM)
        with pytest.raises(SystemExit):
            run(flags)
    with pytest.raises(InputError, match="another command's progress"):
        run(flags + " --seed 4")
    with pytest.raises(InputError, match="25 steps are collected already"):
        run(flags + " --steps 10")
    Path("walk.npz.partial.pt").write_bytes(b"damaged")
    with pytest.raises(InputError, match="walk.npz.partial.pt cannot be read"):
        run(flags)
    run(flags + " --no-resume")
    assert len(arrays("walk.npz")["rewards"]) == 60


def test_dataset_is_not_replaced_unasked():
    flags = "--env Walk-v0 --level random --steps 20"
    for target in ("--flat walk.npz", "--dataset-id walk/random-v0"):
        run(f"{flags} {target}")
        with pytest.raises(InputError, match="exists: add --overwrite"):
            run(f"{flags} {target}")
        run(f"{flags} {target} --overwrite --steps 30")
    assert len(load_dataset("walk.npz")[0].obs) == 30
    assert len(load_dataset("walk/random-v0")[0].obs) == 30


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("level", ["random", "medium-replay", "medium-expert"])
def test_full_disk_at_the_end_loses_nothing(monkeypatch, level):
    flags = f"{AGENT} --level {level}"
    run(f"{flags} --flat whole.npz")
    with monkeypatch.context() as patch:
        patch.setattr(collect, "write_atomic", full)
        with pytest.raises(InputError, match="x.npz not written .No space.* from x.npz.partial"):
            run(f"{flags} --flat x.npz")
    calls = stop_at(monkeypatch, 0, 0)
    run(f"{flags} --flat x.npz")
    assert not calls, "the same steps again"
    a, b = arrays("whole.npz"), arrays("x.npz")
    for key in ("observations", "actions", "rewards", "terminals", "timeouts"):
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_full_disk_on_the_way(monkeypatch, capsys):
    """Progress that cannot be saved is said; the work goes on."""
    monkeypatch.setattr(collect, "save_tensors", full)
    run("--env Walk-v0 --level random --steps 40 --flat x.npz")
    assert "x.npz.partial.pt not saved (No space left on device)" in capsys.readouterr().err
    assert len(arrays("x.npz")["rewards"]) == 40


BAD = {
    "discrete": ("--env CartPole-v1 --level random --flat x.npz", "CartPole-v1 has Discrete"),
    "unknown-module": ("--env foo:bar-v1 --level random --flat x.npz", "No module named 'foo'"),
    "unknown-task": ("--env Hoper-v5 --level random --flat x.npz", "--env Hoper-v5: .*Hoper"),
    "level": ("--env Walk-v0 --level best --flat x.npz", "--level is 'best': give one of random, "),
    "no-target": ("--env Walk-v0 --level random", "give --flat FILE.npz or --dataset-id"),
    "two-targets": ("--env Walk-v0 --flat x.npz --dataset-id a/b-v0", "one of the two"),
    "no-reference": (
        "--env Walk-v0 --level medium --flat x.npz",
        "no reference score: give --medium",
    ),
    "steps": ("--env Walk-v0 --level random --steps 0 --flat x.npz", "--steps is 0"),
    "device": ("--env Walk-v0 --level random --flat x.npz --device tpu9", "--device tpu9: "),
    "folder": ("--env Walk-v0 --level random --steps 9 --flat file/x.npz", "file"),
    "dataset-id": ("--env Walk-v0 --level random --steps 9 --dataset-id walk", "--dataset-id|-v0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, monkeypatch, here):
    words, says = BAD[case]
    (here / "file").touch()
    steps, error = stop_at(monkeypatch, 0, 0), io.StringIO()
    monkeypatch.setattr(sys, "argv", ["collect.py", *words.split()])
    with contextlib.redirect_stderr(error), pytest.raises(InputError, match=says) as left:
        runpy.run_path(str(ROOT / "collect.py"), run_name="__main__")
    assert error.getvalue() == "" and "\n" not in left.value.code
    assert not steps, "found out after the work"


def test_level_that_is_never_reached():
    with pytest.raises(
        InputError, match=r"no policy reached a return of 1000 .*raise --train-steps"
    ):
        run(f"{AGENT} --level medium --medium-return 1000 --flat walk.npz")
    run(f"{AGENT} --level medium --medium-return -1000 --flat walk.npz")  # the same agent's
    assert len(arrays("walk.npz")["rewards"]) == 50


def test_help():
    assert importlib.import_module("collect").__doc__
    with pytest.raises(SystemExit) as left, contextlib.redirect_stdout(io.StringIO()) as out:
        parse(collect.Args, {}, ["--help"])
    assert left.value.code == 0 and "--medium-return" in out.getvalue()

"""Every script of algorithms/ as its user starts it: 20 steps, a tiny log, another directory."""

import contextlib
import csv
import dataclasses
import fnmatch
import importlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from common import parse

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "algorithms").glob("*.py"))
FLAGS = dict(steps=20, batch_size=8, eval_every=10, eval_episodes=2, log_every=5, save_every=10)
META = {"env_id": "Pendulum-v1", "action_low": -2, "action_high": 2}

script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)


def write_log(path, metadata=META):
    """Four episodes of 30 steps with the spaces of Pendulum-v1."""
    rng = np.random.default_rng(0)
    n = 120
    ends = np.arange(n) % 30 == 29
    np.savez(
        path,
        observations=rng.normal(size=(n, 3)).astype(np.float32),
        actions=rng.uniform(-2, 2, (n, 1)).astype(np.float32),
        rewards=rng.normal(size=n).astype(np.float32),
        terminals=ends & (np.arange(n) < 60),
        timeouts=ends & (np.arange(n) >= 60),
        final_observations=rng.normal(size=(4, 3)).astype(np.float32),
        metadata=np.array(json.dumps(metadata)),
    )


def flags(path, **more):
    """Command line of a short run; what a paper sets in thousands of steps becomes 10."""
    module = importlib.import_module(path.stem)
    own = {f.name: 10 for f in dataclasses.fields(module.Args)
           if f.name not in FLAGS and f.type is int and f.default >= 1000}  # fmt: skip
    values = {"env": "log.npz", "device": "cpu", "seed": 3} | FLAGS | own | more
    return [part for k, v in values.items() for part in (f"--{k.replace('_', '-')}", str(v))]


def rows(path):
    """A CSV file without its column of seconds."""
    with open(path, newline="") as f:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(f)]


def same(a, b):
    """Nested tensors equal to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def saved(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_log("log.npz")
    return tmp_path


@script
def test_run(path, here, monkeypatch):
    """A subprocess, then the same in this process, then with another eval_every."""
    command = [sys.executable, str(path), *flags(path, out="one")]
    done = subprocess.run(command, capture_output=True, text=True, env={
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "a run without a terminal has nothing to say on stderr"
    lines = done.stdout.splitlines()
    assert re.match(rf"{path.stem} on log\.npz: 120 transitions, 4 episodes, return", lines[1])
    assert lines[-1].startswith(f"{path.stem} return -") and "| data " in lines[-1]
    one = Path("one") / f"log__{path.stem}__3"
    files = {p.name for p in one.iterdir()}
    assert {"config.json", "eval.csv", "train.csv", "checkpoint.pt", "summary.json"} <= files
    assert not [x for x in files if x.endswith(".tmp")]
    assert (one / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert any(p.stat().st_size > 100 for p in one.glob("events.out.tfevents.*"))

    config = json.loads((one / "config.json").read_text())
    assert config["algorithm"] == path.stem and config["args"]["seed"] == 3
    assert config["args"]["env"] == "log.npz" and config["args"]["batch_size"] == 8
    assert config["versions"]["torch"] == torch.__version__ and re.fullmatch(
        "[0-9a-f]{16}", config["dataset_sha256"]
    )
    table = rows(one / "eval.csv")
    assert [row["step"] for row in table] == ["10", "20"]
    for row in table:
        mean = (float(row["episode_0"]) + float(row["episode_1"])) / 2
        assert np.isclose(float(row["return"]), mean) and -2000 < mean < 0
    steps = [row["step"] for row in rows(one / "train.csv")]
    assert steps == ["5", "10", "15", "20"]
    values = [float(v) for row in rows(one / "train.csv") for v in row.values()]
    assert len(values) > 4 and np.isfinite(values).all()
    summary = json.loads((one / "summary.json").read_text())
    scores = [float(row["score"]) for row in table]
    assert summary["score"] == np.mean(scores) and summary["last"] == scores[-1]
    assert (saved(one)["phase"], saved(one)["step"]) == ("train", 20)

    module = importlib.import_module(path.stem)
    monkeypatch.setattr(sys, "argv", [str(path)])
    final = module.train(parse(module.Args, module.PRESETS, flags(path, out="two")))
    two = Path("two") / one.name
    assert final == summary["score"]
    for file in one.glob("*.csv"):
        assert rows(file) == rows(two / file.name), f"same seed, other {file.name}"
    for key in ("nets", "opt", "rng", "rows"):
        assert key == "rows" or same(saved(one)[key], saved(two)[key]), f"same seed, other {key}"

    rare = flags(path, out="rare", eval_every=7, eval_episodes=1)
    module.train(parse(module.Args, module.PRESETS, rare))
    rare = Path("rare") / one.name
    assert [row["step"] for row in rows(rare / "eval.csv")] == ["7", "14", "20"]
    assert same(saved(one)["nets"], saved(rare)["nets"]), "eval_every changed the weights"

    other = flags(path, out="other", seed=4, eval_env="none")
    assert module.train(parse(module.Args, module.PRESETS, other)) is None
    other = Path("other") / f"log__{path.stem}__4"
    assert not same(saved(one)["nets"], saved(other)["nets"]), "the seed changes nothing"
    assert not (other / "eval.csv").exists() and not (other / "curve.png").exists()
    assert json.loads((other / "summary.json").read_text())["score"] is None


@script
def test_policy(path, here):
    """policy(nets, obs, args): raw observations in, deterministic actions in the bounds out."""
    from datasets import load_dataset

    module = importlib.import_module(path.stem)
    args = parse(module.Args, module.PRESETS, flags(path))
    data, _ = load_dataset("log.npz", "cpu", "none")
    torch.manual_seed(0)
    nets = module.Nets(data, args)
    with torch.no_grad():
        obs = 100 * torch.randn(50, 3)
        a = module.policy(nets, obs, args)
        assert a.shape == (50, 1) and a.abs().max() <= 2
        assert torch.equal(a, module.policy(nets, obs, args))
        assert torch.allclose(a[7:8], module.policy(nets, obs[7:8], args), atol=1e-5)


SHIFTED = [path for path in SCRIPTS if "    reward_shift: " in path.read_text()]


@pytest.mark.parametrize("path", SHIFTED, ids=lambda p: p.stem)
def test_reward_shift_is_in_the_data_that_is_trained_on(path, here, monkeypatch):
    """Once, before the run starts: its bound of attainable returns knows it."""
    module, seen = importlib.import_module(path.stem), []

    class Started(Exception):
        pass

    class Run(module.Run):
        def start(self, data, *_):
            seen.append(data.reward.clone())
            raise Started

    monkeypatch.setattr(module, "Run", Run)
    for shift in ("0", "-3"):
        with pytest.raises(Started):
            module.train(parse(module.Args, module.PRESETS, flags(path, reward_shift=shift)))
    torch.testing.assert_close(seen[1], seen[0] - 3)


@script
def test_help_names_every_flag(path, capsys):
    module = importlib.import_module(path.stem)
    with pytest.raises(SystemExit) as left:
        parse(module.Args, module.PRESETS, ["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(module.Args):
        assert f"--{field.name.replace('_', '-')}" in text, field.name
    assert module.__doc__.splitlines()[0].split(" (")[0] in text


@script
def test_flags_and_presets(path):
    """A flag that is typed wins over the preset, also where it repeats the default."""
    module = importlib.import_module(path.stem)
    default = module.Args()
    for env in sorted({"log.npz", default.env, "antmaze-umaze-v2"}):
        rows = [v for pattern, v in module.PRESETS.items() if fnmatch.fnmatch(env, pattern)]
        preset = parse(module.Args, module.PRESETS, ["--env", env]).preset
        assert preset == dict(item for row in rows for item in row.items()), "later rows win"
        for name, value in preset.items():
            assert getattr(parse(module.Args, module.PRESETS, ["--env", env]), name) == value
            if isinstance(value, int | float) and not isinstance(value, bool):
                flag = f"--{name.replace('_', '-')}={getattr(default, name)}"
                typed = parse(module.Args, module.PRESETS, ["--env", env, flag])
                assert getattr(typed, name) == getattr(default, name), name
    bundled = parse(module.Args, module.PRESETS, [])
    assert bundled.steps < default.steps, "the bundled data's preset shortens the run"
    with pytest.raises(SystemExit) as left, contextlib.redirect_stderr(io.StringIO()):
        parse(module.Args, module.PRESETS, ["--no-such-flag", "1"])
    assert left.value.code not in (0, None)


IMPORT = """
import os, random, signal, sys, threading
import numpy, torch
sys.argv = ["x", "--garbage", "--steps", "nonsense", "--help"]
sys.path[:0] = [ROOT, ROOT + "/algorithms"]
def state():
    handlers = [signal.getsignal(s) for s in (2, 15)]
    random_state = random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()
    flags = torch.get_float32_matmul_precision(), torch.get_default_dtype(), torch.get_num_threads()
    process = dict(os.environ), os.listdir(), threading.active_count(), torch.cuda.is_initialized()
    return handlers, random_state, flags, process
before = state()
for name in NAMES:
    __import__(name)
assert state() == before, "an import changed the state of the process"
slow = {"gymnasium", "mujoco", "minari", "tyro", "matplotlib", "tensorboard", "wandb"}
assert not slow & sys.modules.keys(), slow & sys.modules.keys()
"""


def test_importing_does_no_work(tmp_path):
    names = [p.stem for p in [*SCRIPTS, ROOT / "collect.py"]]
    code = IMPORT.replace("ROOT", repr(str(ROOT))).replace("NAMES", repr(names))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- bad input -------------------------------------------------------------------------------


# name: (flags after those of a good run, what the line says)
BAD = {
    "unknown-env": ("--env hopper-medum-v2", r"unknown dataset .*hopper-medium-v2"),
    "missing-file": ("--env lag.npz", r"no file lag\.npz.*did you mean log\.npz"),
    "truncated-file": ("--env half.npz", r"half\.npz is not a complete npz file"),
    "task-of-the-data": ("--env car.npz", r"\(3, 1\).*MountainCarContinuous-v0 \(2, 1\)"),
    "task-of-the-flag": ("--eval-env MountainCarContinuous-v0", r"\(3, 1\).*\(2, 1\).*--eval-env"),
    "other-bounds": ("--eval-env CarBox-v0", r"action bounds \[-2.\] to \[2.\], CarBox-v0 \[-1.\]"),
    "unknown-task": ("--eval-env Pendulun-v1", r"no task Pendulun-v1.*Pendulum-v1"),
    "both": ("--resume --overwrite", r"--resume .*--overwrite .*give one"),
    "device": ("--device gpu7", r"--device gpu7: .*give cpu, cuda or auto"),
    "no-such-device": ("--device cuda:99", r"--device cuda:99: "),
    "batch": ("--batch-size 0", r"--batch-size is 0: give a whole number, 1 or above"),
    "steps": ("--steps -5", r"--steps is -5"),
    "seed": ("--seed -1", r"--seed is -1"),
    "precision": ("--precision half", r"--precision is 'half': give auto"),
    "out-is-a-file": ("--out log.npz", r"log\.npz"),
}


class CarBox(gymnasium.Env):
    """Sizes of the log, other bounds."""

    observation_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        return np.zeros(3, np.float32), {}

    def step(self, action):
        return np.zeros(3, np.float32), 0.0, True, False, {}


gymnasium.register("CarBox-v0", CarBox)


def outcome(path, argv):
    """(lines on stderr, exit status) of the script, run as __main__ in this process."""
    error, old = io.StringIO(), sys.argv
    sys.argv = [str(path), *argv]
    try:
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(str(path), run_name="__main__")
    except SystemExit as left:
        if isinstance(left.code, str):  # what the interpreter does with it
            print(left.code, file=error)
            return error.getvalue().splitlines(), 1
        return error.getvalue().splitlines(), left.code or 0
    finally:
        sys.argv = old
    return error.getvalue().splitlines(), 0


@script
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


@script
def test_existing_run_is_refused(path, here):
    folder = here / "runs" / f"log__{path.stem}__3"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    lines, status = outcome(path, flags(path))
    assert status == 1 and len(lines) == 1
    assert lines[0].endswith("exists: add --resume, --overwrite, or a new --name")
    assert [p.name for p in folder.iterdir()] == ["config.json"]


def test_bad_input_in_a_process_of_its_own(here):
    """The interpreter's own exit: one line, no traceback, status 1."""
    command = [sys.executable, str(SCRIPTS[0]), "--env", "hopper-medum-v2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and not Path("runs").exists()
    assert len(done.stderr.splitlines()) == 1 and "hopper-medium-v2" in done.stderr

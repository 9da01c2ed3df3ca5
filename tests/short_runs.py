"""Short runs on a tiny log, for the tests of run.py and of what every file must satisfy."""

import contextlib
import csv
import dataclasses
import importlib
import io
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import conftest
import numpy as np
import torch

from run import Run, load_tensors, main

ROOT = Path(__file__).resolve().parents[1]
META = {"env_id": "Pendulum-v1", "action_low": -2, "action_high": 2}
SHORT = dict(steps=20, batch_size=8, eval_every=10, eval_episodes=2, log_every=5, save_every=10)
SMALL = dict(width=16, n=3, k=2, sample_steps=3)  # what takes long in arq.py


def tracked(folder: str, root: Path | None = None) -> list[Path]:
    """The Python files of a folder; those that git does not track are a user's own, and only the
    ones that -k names count."""
    root = root or Path(__file__).resolve().parents[1]
    found = sorted((root / folder).glob("*.py"))
    line = ["git", "-C", str(root), "ls-files", folder]
    with contextlib.suppress(OSError):  # no git
        listed = subprocess.run(line, capture_output=True, text=True).stdout.split()
        known = {Path(x).stem for x in listed}
        found = [path for path in found if not known or path.stem in known | conftest.named]
    return found


SCRIPTS = tracked("algorithms")


def write_log(path, metadata=META, seed=0, scale=1.0) -> str:
    """Four episodes of 30 steps with the spaces of Pendulum-v1."""
    rng = np.random.default_rng(seed)
    n = 120
    ends = np.arange(n) % 30 == 29
    np.savez(
        path,
        observations=rng.normal(size=(n, 3)).astype(np.float32),
        actions=rng.uniform(-2, 2, (n, 1)).astype(np.float32),
        rewards=scale * rng.normal(size=n).astype(np.float32),
        terminals=ends & (np.arange(n) < 60),
        timeouts=ends & (np.arange(n) >= 60),
        final_observations=rng.normal(size=(4, 3)).astype(np.float32),
        metadata=np.array(json.dumps(metadata)),
    )
    return str(path)


def number_type(annotation):
    """int, float or None: the numbers of a flag of this type; and a function that tells which of
    them are in its range, or None where all are."""
    for part in (annotation, *typing.get_args(annotation)):
        kind, *notes = typing.get_args(part) or (part,)
        spec = next((x for x in notes if hasattr(x, "instance_from_str")), None)
        if kind in (int, float) and (spec or part is kind):
            return kind, spec and (lambda x: in_range(spec, x))
    return None, None


def in_range(spec, x) -> bool:
    try:
        return spec.instance_from_str([str(x)]) == x
    except ValueError:
        return False


def short(Args) -> dict:
    """Values of a short run: what a paper sets in thousands of steps becomes tens."""
    fields = {field.name: field for field in dataclasses.fields(Args)}
    own = {
        name: 10
        for name, field in fields.items()
        if number_type(field.type)[0] is int and (field.default or 0) >= 1000
    }
    if "sample_steps" in fields:
        own |= {name: value for name, value in SMALL.items() if name in fields}
    return own | SHORT | dict(env="log.npz", device="cpu", precision="highest", seed=3)


def flags(path, **more) -> list[str]:
    """The command line of a short run of a file."""
    values = short(importlib.import_module(Path(path).stem).Args) | more
    return [part for k, v in values.items() for part in (f"--{k.replace('_', '-')}", str(v))]


class Watched(Run):
    """A run that remembers its steps and calls `hook(run, t, metrics)` in each of them; what the
    hook returns replaces the metrics."""

    def __init__(self, args, hook=None, words=("algorithm.py",)):
        super().__init__(args, {}, list(words))
        self.hook, self.calls = hook, []

    def after(self, t, metrics, act=None):
        self.calls.append((self.phase, t))
        metrics = (self.hook and self.hook(self, t, metrics)) or metrics
        super().after(t, metrics, act)

    def count(self, phase) -> int:
        return sum(name == phase for name, _ in self.calls)


def start(name, /, hook=None, prepare=None, **values):
    """Train algorithms/`name`.py in the current folder, without evaluation unless asked for;
    returns (mean score or None, the run). `prepare(run)` may change the run before it starts."""
    module = importlib.import_module(name)
    rare = dict(eval_env="none", eval_every=6, eval_episodes=1, log_every=4, save_every=7)
    values = short(module.Args) | rare | values
    run = Watched(module.Args(**values), hook)
    if prepare:
        prepare(run)
    return run.whole(module.train), run


def at(phase, step, action):
    """A hook that calls action(run, metrics) at one step of one phase."""
    return lambda run, t, metrics: action(run, metrics) if (run.phase, t) == (phase, step) else None


def stop_by(number):
    return lambda run, metrics: os.kill(os.getpid(), number)


@contextlib.contextmanager
def no_stray_signal():
    """Ctrl-C and SIGTERM mean after a test what they meant before it: a run keeps them."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def folder(name, out="runs", seed=3) -> Path:
    return Path(out) / f"log__{name}__{seed}"


def checkpoint(name, out="runs"):
    return load_tensors(folder(name, out) / "checkpoint.pt")


class Bomb:
    """A pickle that makes a folder when it is read."""

    def __reduce__(self):
        return os.mkdir, ("bomb",)


def rows(path) -> list[dict]:
    """A CSV file without its column of seconds."""
    with open(path, newline="") as f:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(f)]


def same(a, b) -> bool:
    """Nested tensors equal to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_run(name, a, b):
    one, two = checkpoint(name, a), checkpoint(name, b)
    for key in ("phase", "step", "nets", "opt", "rng", "references"):
        assert same(one[key], two[key]), f"{key} differs"
    files = sorted(p.name for p in folder(name, a).glob("*.csv"))
    assert files == sorted(p.name for p in folder(name, b).glob("*.csv")) and "train.csv" in files
    for file in files:
        assert rows(folder(name, a) / file) == rows(folder(name, b) / file), file


def outcome(path, argv) -> tuple[list[str], int]:
    """(lines on stderr, exit status) of a file, run as __main__ in this process."""
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


def run_main(name, *argv):
    """What `python algorithms/name.py ARGV` returns, in this process."""
    module = importlib.import_module(name)
    return main(module.Args, module.PRESETS, module.train, [str(word) for word in argv])


def killed_at_random(name, kills):
    """SIGKILL at `kills` moments, wherever they fall, while a file is being written too, each time
    continued with --resume; then the run must be the same as one that was left alone."""
    values = dict(save_every=2, log_every=2)
    began = time.time()
    start(name, out="alone", **values)
    seconds, draw = time.time() - began, random.Random(f"{name} {kills}")

    def child(*, killed):
        pid = os.fork()
        if pid == 0:
            try:
                start(name, out="killed", resume=True, **values)
                os._exit(0)
            except SystemExit as finished:
                os._exit(finished.code if isinstance(finished.code, int) else 1)
            finally:
                os._exit(2)
        if killed:
            time.sleep(draw.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    for _ in range(kills):
        assert child(killed=True) in (-signal.SIGKILL, 0)
    assert child(killed=False) == 0
    assert_same_run(name, "alone", "killed")

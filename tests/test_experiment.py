"""experiment.py: exact resume, shared caches, full disks, damaged files."""

import csv
import dataclasses
import errno
import importlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import experiment
from datasets import InputError
from experiment import load_tensors, save_tensors, write_atomic

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(p.stem for p in (ROOT / "algorithms").glob("*.py"))
SHARED = ("steps", "batch_size", "eval_every", "eval_episodes", "log_every", "save_every")
META = {"env_id": "Pendulum-v1", "action_low": -2, "action_high": 2}


def phases(name):
    """The names of a script's update functions."""
    text = (ROOT / "algorithms" / f"{name}.py").read_text()
    return re.findall(r"^def (update\w*)\(", text, re.MULTILINE)


PHASES = [
    pytest.param(name, phase, id=f"{name}-{phase}") for name in SCRIPTS for phase in phases(name)
]


def write_log(path, seed=0):
    """Four episodes of 30 steps with the spaces of Pendulum-v1."""
    rng = np.random.default_rng(seed)
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
        metadata=np.array(json.dumps(META)),
    )
    return str(path)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(name, **flags): train(args) of algorithms/name.py, on a tiny log, no evaluation."""
    log = write_log(tmp_path / "log.npz")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["algorithm.py"])
    arrived = []  # a signal that the run does not take must not end the tests
    before = {s: signal.signal(s, lambda *a: arrived.append(a)) for s in (2, 15)}

    def start(name, /, **flags):
        module = importlib.import_module(name)
        # a schedule as short as the test: what counts in thousands of steps counts in tens
        own = {f.name: 10 for f in dataclasses.fields(module.Args)
               if f.name not in SHARED and f.type is int and f.default >= 1000}  # fmt: skip
        own |= dict(zip(SHARED, (20, 8, 6, 1, 4, 7)))
        own |= dict(env=log, device="cpu", eval_env="none", seed=3)
        return module.train(module.Args(**(own | flags)))

    yield start
    assert not arrived, "a signal went past the run"
    for s, handler in before.items():
        signal.signal(s, handler)


def folder(name, out="runs"):
    return Path(out) / f"log__{name}__3"


def checkpoint(name, out="runs"):
    return load_tensors(folder(name, out) / "checkpoint.pt")


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


def assert_same_run(name, a, b):
    one, two = checkpoint(name, a), checkpoint(name, b)
    for key in ("phase", "step", "nets", "opt", "rng", "references"):
        assert same(one[key], two[key]), f"{key} differs"
    files = sorted(p.name for p in folder(name, a).glob("*.csv"))
    assert files == sorted(p.name for p in folder(name, b).glob("*.csv")) and "train.csv" in files
    for file in files:
        assert rows(folder(name, a) / file) == rows(folder(name, b) / file), file


def interrupt(monkeypatch, name, phase, call, action):
    """Call `action` inside the call-th update of a phase."""
    module, calls = importlib.import_module(name), []
    update = getattr(module, phase)

    def wrapped(*args):
        calls.append(1)
        metrics = update(*args)
        if len(calls) == call:
            metrics = action(args[0], metrics) or metrics
        return metrics

    monkeypatch.setattr(module, phase, wrapped)
    return calls


def stop_by(number):
    return lambda *_: os.kill(os.getpid(), number)


# ---- stop and continue -----------------------------------------------------------------------


@pytest.mark.parametrize(("name", "phase"), PHASES)
def test_resume_continues_to_the_bit(start, monkeypatch, capsys, name, phase):
    episodes = dict(eval_env=None) if phase == "update" else {}
    start(name, out="whole", **episodes)
    rng = random.Random(f"{name} {phase}")
    call, number = rng.randint(2, 9), rng.choice([signal.SIGINT, signal.SIGTERM])
    with monkeypatch.context() as patch:
        interrupt(patch, name, phase, call, stop_by(number))
        handler = signal.getsignal(number)
        with pytest.raises(SystemExit) as stopped:
            start(name, out="parts", **episodes)
        assert signal.getsignal(number) is handler, "the run kept its signal handler"
    assert stopped.value.code == 130
    at = checkpoint(name, "parts")["phase"], checkpoint(name, "parts")["step"]
    assert at == ("train" if phase == "update" else phase.removeprefix("update_"), call)
    assert not (folder(name, "parts") / "summary.json").exists()
    assert f"saved at {at[0]} step {call}; continue with: python algorithm.py --resume" in (
        capsys.readouterr().out
    )
    with monkeypatch.context() as patch:
        calls = interrupt(patch, name, "update", 0, None)
        start(name, out="parts", resume=True, **episodes)
    assert len(calls) == 20 - (call if phase == "update" else 0), "steps were repeated or lost"
    assert f"resumed after {at[0]} step {call}" in capsys.readouterr().out
    assert_same_run(name, "whole", "parts")
    if episodes:
        assert len(rows(folder(name, "parts") / "eval.csv")) == 4  # steps 6, 12, 18, 20


@pytest.mark.parametrize("name", [name for name in SCRIPTS if "update_behavior" in phases(name)])
def test_stop_at_the_last_step_of_phase_one(start, monkeypatch, name):
    start(name, out="whole")
    with monkeypatch.context() as patch:
        interrupt(patch, name, "update_behavior", 10, stop_by(signal.SIGTERM))
        with pytest.raises(SystemExit):
            start(name, out="parts")
    assert checkpoint(name, "parts")["step"] == 10
    with monkeypatch.context() as patch:
        calls = interrupt(patch, name, "update_behavior", 0, None)
        start(name, out="parts", resume=True)
    assert not calls
    assert_same_run(name, "whole", "parts")


@pytest.mark.parametrize("name", SCRIPTS)
def test_resume_twice_and_at_the_last_step(start, monkeypatch, name):
    start(name, out="whole")
    for resume, call in ((False, 1), (True, 3), (True, 16)):  # after steps 1, 4 and 20
        with monkeypatch.context() as patch:
            interrupt(patch, name, "update", call, stop_by(signal.SIGTERM))
            with pytest.raises(SystemExit):
                start(name, out="parts", resume=resume)
    start(name, out="parts", resume=True)
    assert (folder(name, "parts") / "summary.json").exists()
    assert_same_run(name, "whole", "parts")


def test_resume_keeps_metrics_of_earlier_steps(start, monkeypatch):
    """TD3+BC's actor moves on every second step; row 3 holds its loss of step 2, resumed or not."""
    start("td3_bc", out="whole", log_every=1)
    with monkeypatch.context() as patch:
        interrupt(patch, "td3_bc", "update", 4, stop_by(signal.SIGTERM))
        with pytest.raises(SystemExit):
            start("td3_bc", out="parts", log_every=1)
    start("td3_bc", out="parts", log_every=1, resume=True)
    assert_same_run("td3_bc", "whole", "parts")


def test_killed_run_continues_from_its_last_checkpoint(start, monkeypatch):
    """No signal handler runs: the steps after the checkpoint at 14 are done again."""
    start("bc", out="whole")
    with monkeypatch.context() as patch:
        interrupt(patch, "bc", "update", 17, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            start("bc", out="parts")
    assert checkpoint("bc", "parts")["step"] == 14
    start("bc", out="parts", resume=True)
    assert_same_run("bc", "whole", "parts")


def test_second_signal_does_not_wait(start, monkeypatch):
    twice = lambda *_: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]
    interrupt(monkeypatch, "bc", "update", 5, twice)
    with pytest.raises(KeyboardInterrupt):
        start("bc")


def test_finished_run_says_so(start, capsys):
    start("bc")
    before = {p: p.stat().st_mtime_ns for p in folder("bc").iterdir()}
    with pytest.raises(SystemExit) as left:
        start("bc", resume=True)
    assert left.value.code == 0 and "is finished: nothing to resume" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"is finished, with steps=20, not 30: add --overwrite"):
        start("bc", resume=True, steps=30)
    assert before == {p: p.stat().st_mtime_ns for p in folder("bc").iterdir()}
    config = folder("bc") / "config.json"
    config.write_bytes(config.read_bytes()[:50])
    with pytest.raises(InputError, match=r"config.json is damaged"):
        start("bc", resume=True)


def test_existing_run(start):
    """Refused; replaced with --overwrite; --resume starts afresh where there is nothing."""
    start("bc", resume=True)
    assert checkpoint("bc")["step"] == 20
    with pytest.raises(InputError, match=r"exists: add --resume, --overwrite, or a new --name"):
        start("bc", steps=6)
    assert checkpoint("bc")["step"] == 20
    (folder("bc") / "stale.csv").touch()
    start("bc", overwrite=True, steps=6)
    assert checkpoint("bc")["step"] == 6 and not (folder("bc") / "stale.csv").exists()
    start("bc", name="other")
    assert (Path("runs") / "log__bc-other__3" / "summary.json").exists()


def test_resume_with_another_setting_is_refused(start, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        interrupt(patch, "td3_bc", "update", 9, stop_by(signal.SIGTERM))
        with pytest.raises(SystemExit):
            start("td3_bc")
    before = (folder("td3_bc") / "checkpoint.pt").read_bytes()
    for key, value in (("alpha", 9.0), ("steps", 30), ("batch_size", 4), ("eval_every", 5)):
        with pytest.raises(InputError, match=rf"checkpoint\.pt was made with {key}=.*{value}"):
            start("td3_bc", resume=True, **{key: value})
    write_log(tmp_path / "log.npz", seed=1)  # the same name, other rows
    with pytest.raises(InputError, match=r"was made with data="):
        start("td3_bc", resume=True)
    write_log(tmp_path / "log.npz")
    for key, value in (("code", "0"), ("torch", "1.0"), ("momentum", 0.9)):  # other versions
        saved = checkpoint("td3_bc")
        saved["settings"] = json.dumps(json.loads(saved["settings"]) | {key: value})
        save_tensors(folder("td3_bc") / "checkpoint.pt", saved)
        with pytest.raises(InputError, match=rf"was made with {key}={value}, not "):
            start("td3_bc", resume=True)
        (folder("td3_bc") / "checkpoint.pt").write_bytes(before)
    assert (folder("td3_bc") / "checkpoint.pt").read_bytes() == before
    start("td3_bc", resume=True, save_every=3)  # no setting of the result
    assert checkpoint("td3_bc")["step"] == 20


# ---- what a run leaves -----------------------------------------------------------------------


def test_summary_is_the_mean_of_the_last_ten(start, monkeypatch):
    values = iter(range(1, 100))
    monkeypatch.setattr(experiment.Run, "evaluate", lambda *_: np.full(2, float(next(values))))
    final = start("bc", eval_env=None, eval_every=1, steps=12)
    summary = json.loads((folder("bc") / "summary.json").read_text())
    assert final == summary["score"] == np.mean(range(3, 13)) == 7.5
    assert (summary["last"], summary["best"], summary["evaluations"]) == (12, 12, 12)
    table = rows(folder("bc") / "eval.csv")
    assert [float(row["score"]) for row in table] == list(range(1, 13))
    assert [int(row["step"]) for row in table] == list(range(1, 13))
    assert {"return", "episode_0", "episode_1"} <= table[0].keys()


def test_evaluation_leaves_the_random_stream_alone(start):
    start("td3_bc", out="none")
    start("td3_bc", out="some", eval_env="Pendulum-v1", eval_every=3, eval_episodes=2)
    assert same(checkpoint("td3_bc", "none")["rng"], checkpoint("td3_bc", "some")["rng"])
    assert same(checkpoint("td3_bc", "none")["nets"], checkpoint("td3_bc", "some")["nets"])


# ---- the shared cache ------------------------------------------------------------------------


def final_nets(name):
    """Weights, less the clone's entropy weight: phase one alone uses it, so it is not cached."""
    nets = load_tensors(Path("runs") / f"log__fisher_brc-{name}__3" / "checkpoint.pt")["nets"]
    return {k: v for k, v in nets.items() if k != "log_bc_weight"}


def test_cached_clone_changes_nothing(start, monkeypatch, capsys):
    start("fisher_brc", name="first")
    cache = list(Path("runs/cache").iterdir())
    assert len(cache) == 1
    with monkeypatch.context() as patch:
        calls = interrupt(patch, "fisher_brc", "update_behavior", 0, None)
        start("fisher_brc", name="second")
        assert not calls and "clone: read from" in capsys.readouterr().out
        assert same(final_nets("first"), final_nets("second"))
        for key, value in (("bc_lr", 5e-4), ("bc_steps", 5), ("batch_size", 6), ("seed", 4)):
            start("fisher_brc", name=key, **{key: value})
            assert calls, f"another {key} read the cached clone"
            calls.clear()
    start("fisher_brc", name="lam", lam=9.0)
    assert len(list(Path("runs/cache").iterdir())) == 5 and not same(
        final_nets("first"), final_nets("lam")
    )
    cache[0].write_bytes(b"damaged")
    with pytest.raises(InputError, match=rf"{cache[0].name} cannot be read .*delete it"):
        start("fisher_brc", name="third")


def test_two_processes_share_one_cache(start, tmp_path):
    flags = (
        "--bc-steps 10 --steps 5 --batch-size 8 --seed 3 --eval-env none --device cpu --out runs"
    )
    command = [sys.executable, str(ROOT / "algorithms" / "fisher_brc.py"), "--env", "log.npz"]
    jobs = [subprocess.Popen([*command, *flags.split(), "--name", name], stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True) for name in "ab"]  # fmt: skip
    # Meanwhile both files of a cache are read and written as fast as this process can.
    path, reads = tmp_path / "shared.pt", 0
    writer = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport torch\n"
    writer += "from experiment import save_tensors\nfrom pathlib import Path\n"
    writer += f"for i in range(300): save_tensors(Path({str(path)!r}), torch.full((5000,), i))"
    jobs.append(subprocess.Popen([sys.executable, "-c", writer]))
    while any(job.poll() is None for job in jobs):
        if path.exists():
            tensor = load_tensors(path)  # never half a file
            assert (tensor == tensor[0]).all()
            reads += 1
    assert [job.wait() for job in jobs] == [0, 0, 0], [job.stdout.read() for job in jobs[:2]]
    assert reads > 10
    assert same(final_nets("a"), final_nets("b"))
    assert len(list((tmp_path / "runs/cache").iterdir())) == 1  # and no temporary file


# ---- disks, divergence and damaged files -----------------------------------------------------


@pytest.mark.parametrize("midway", ["write", "rename"])
def test_write_that_fails_midway_keeps_the_old_file(tmp_path, monkeypatch, midway):
    path = tmp_path / "x.bin"
    write_atomic(path, b"old")

    def fail(self, *_):
        if midway == "write":
            with open(self, "wb") as f:
                f.write(b"ha")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if midway == "write":
        monkeypatch.setattr(Path, "write_bytes", fail)
    else:
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def full_disk(monkeypatch, is_full):
    real = write_atomic

    def write(path, content):
        if is_full():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, content)

    monkeypatch.setattr(experiment, "write_atomic", write)


@pytest.mark.parametrize("name", SCRIPTS)
def test_full_disk_is_said_once_and_training_goes_on(start, monkeypatch, capsys, name):
    full_disk(monkeypatch, lambda: True)
    calls = interrupt(monkeypatch, name, "update", 0, None)
    with pytest.raises(InputError, match=r"could not be saved: free some space") as error:
        start(name)
    assert len(calls) == 20, "training stopped"
    assert not (folder(name) / "summary.json").exists(), "it would count as finished"
    assert "\n" not in str(error.value)
    said = capsys.readouterr().err.splitlines()
    for file in ("config.json", "train.csv", "checkpoint.pt"):
        lines = [x for x in said if x.startswith(str(folder(name) / file))]
        assert len(lines) == 1 and "No space left on device" in lines[0], said
    assert len(said) == len(set(said)), "said twice"


def test_disk_that_is_full_for_a_while_changes_nothing(start, monkeypatch, capsys):
    start("td3_bc", out="whole")
    calls = interrupt(monkeypatch, "td3_bc", "update", 0, None)
    full_disk(monkeypatch, lambda: 5 <= len(calls) <= 15)
    start("td3_bc", out="parts")
    assert "not saved (No space left on device)" in capsys.readouterr().err
    assert (folder("td3_bc", "parts") / "summary.json").exists()
    assert_same_run("td3_bc", "whole", "parts")


def test_disk_that_is_full_at_the_end_loses_nothing(start, monkeypatch):
    start("td3_bc", out="whole")
    calls = interrupt(monkeypatch, "td3_bc", "update", 0, None)
    full_disk(monkeypatch, lambda: len(calls) > 15)
    with pytest.raises(InputError, match=r"checkpoint.*repeat the command with --resume"):
        start("td3_bc", out="parts")
    monkeypatch.setattr(experiment, "write_atomic", write_atomic)
    start("td3_bc", out="parts", resume=True)
    assert (folder("td3_bc", "parts") / "summary.json").exists()
    assert_same_run("td3_bc", "whole", "parts")


def test_space_that_is_freed_before_the_end_is_enough(start, monkeypatch):
    calls = interrupt(monkeypatch, "td3_bc", "update", 0, None)
    curve = experiment.Run._board
    full_disk(monkeypatch, lambda: len(calls) == 20 and not freed)
    freed = []
    monkeypatch.setattr(
        experiment.Run, "_board", lambda self, x, t: x or freed.append(1) or curve(self, x, t)
    )
    start("td3_bc")
    assert freed and {"checkpoint.pt", "train.csv", "summary.json"} <= {
        path.name for path in folder("td3_bc").iterdir()
    }


@pytest.mark.parametrize("size", [0, 20_000])
def test_files_cannot_grow(tmp_path, size):
    """A real limit, TensorBoard's events included: training goes on, lines without a traceback,
    and an exit code, because the weights (all files, where size is 0) are lost."""
    write_log(tmp_path / "log.npz")
    limit = "import resource, runpy, sys\n"
    limit += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
    limit += "runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    script = str(ROOT / "algorithms" / "bc.py")
    flags = "--env log.npz --eval-env none --steps 400 --batch-size 8 --log-every 1 --device cpu"
    done = subprocess.run([sys.executable, "-c", limit, script, *flags.split()], cwd=tmp_path,
                          capture_output=True, text=True)  # fmt: skip
    said = done.stderr.splitlines()
    assert "Traceback" not in done.stderr and len(said) == len(set(said)) < 8
    assert "train 400/400" in done.stdout
    assert "checkpoint.pt not saved (File too large)" in done.stderr
    assert done.returncode == 1 and "could not be saved: free some space" in said[-1]


def nan_metrics(nets, metrics):
    return {**metrics, next(iter(metrics)): torch.tensor(math.nan)}


def nan_weights(nets, metrics):
    with torch.no_grad():
        nets.actor.weights[0].fill_(math.nan)


@pytest.mark.parametrize("phase", ["update", "update_behavior"])
def test_loss_that_is_not_finite_stops_the_run(start, monkeypatch, phase):
    interrupt(monkeypatch, "fisher_brc", phase, 8, nan_metrics)
    with pytest.raises(InputError) as error:
        start("fisher_brc", log_every=2, save_every=3)
    scalar, label = ("td_loss", "train") if phase == "update" else ("nll", "behavior")
    assert f"{label} step 8: {scalar} is nan; training diverged" in str(error.value)
    assert f"the last good checkpoint is {folder('fisher_brc') / 'checkpoint.pt'}" in str(
        error.value
    )
    assert "\n" not in str(error.value)
    saved = checkpoint("fisher_brc")
    assert (saved["phase"], saved["step"]) == (label, 6)
    assert all(x.isfinite().all() for x in saved["nets"].values())


@pytest.mark.parametrize("stopped", [False, True])
def test_diverged_weights_are_never_saved(start, monkeypatch, stopped):
    """Between two rows of train.csv a checkpoint, or a stop, must not replace the good one."""

    def action(nets, metrics):
        nan_weights(nets, metrics)
        stopped and os.kill(os.getpid(), signal.SIGTERM)
        return {"actor_loss": torch.tensor(math.nan)}

    interrupt(monkeypatch, "bc", "update", 13, action)
    with pytest.raises(SystemExit):
        start("bc", log_every=10, save_every=2)
    saved = checkpoint("bc")
    assert all(x.isfinite().all() for x in saved["nets"].values()), saved["step"]
    assert 10 <= saved["step"] <= 12


def test_divergence_before_any_checkpoint(start, monkeypatch):
    interrupt(monkeypatch, "bc", "update", 4, nan_metrics)
    with pytest.raises(InputError, match=r"step 4: actor_loss is nan.*no checkpoint was due yet"):
        start("bc")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb",)


def damage(path, kind):
    content = path.read_bytes()
    if kind == "half":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "bomb":
        saved = load_tensors(path)
        torch.save({**saved, "references": Bomb()}, path)
    elif kind == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes(64) + content[middle + 64 :])
    elif kind == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        path.write_bytes({"empty": b"", "text": b"hello\nworld\n"}[kind])


@pytest.mark.parametrize("kind", ["half", "empty", "text", "flipped", "foreign", "bomb"])
def test_damaged_checkpoint_is_one_line(start, monkeypatch, kind):
    with monkeypatch.context() as patch:
        interrupt(patch, "bc", "update", 9, stop_by(signal.SIGTERM))
        with pytest.raises(SystemExit):
            start("bc")
    path = folder("bc") / "checkpoint.pt"
    damage(path, kind)
    left, calls = path.read_bytes(), interrupt(monkeypatch, "bc", "update", 0, None)
    with pytest.raises(InputError) as error:
        start("bc", resume=True)
    assert "checkpoint.pt" in str(error.value) and "\n" not in str(error.value)
    assert not calls and path.read_bytes() == left
    assert not Path("bomb").exists(), "the checkpoint was unpickled"


def test_the_bomb_is_a_bomb(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Bomb()}, "bomb.pt")
    with pytest.raises(InputError, match=r"bomb\.pt cannot be read"):
        load_tensors(Path("bomb.pt"))
    assert not Path("bomb").exists()
    torch.load("bomb.pt", weights_only=False)
    assert Path("bomb").exists()


def test_tensors_survive_a_round_trip(tmp_path):
    state = {"a": [torch.arange(3), torch.tensor(math.inf)], "b": "text", "n": 3}
    save_tensors(tmp_path / "x.pt", state)
    assert same(load_tensors(tmp_path / "x.pt"), state)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize(("scale", "said"), [(1.0, 0), (1e6, 1), (1e-6, 1), (0.0, 1)])
def test_scale_of_rewards_is_named_where_it_matters(start, tmp_path, capsys, scale, said):
    with np.load("log.npz") as log:
        np.savez("log.npz", **{**log, "rewards": scale * log["rewards"]})
    start("td3_bc")
    out = capsys.readouterr().out
    with np.load("log.npz") as log:
        size = np.abs(log["rewards"]).mean()
    assert out.count(f"note: rewards are {size:.2g} in size") == said, out
    assert out.count("note: rewards are") == said and "Q runs away" not in out
    start("bc")
    assert "note: rewards" not in capsys.readouterr().out, "BC reads none"


@pytest.mark.parametrize(("value", "said"), [(1e4, True), (-1e4, True), (1.0, False)])
def test_q_beyond_any_return_is_said_once(start, monkeypatch, capsys, value, said):
    """The log's rewards are below 4, so no return is above 400 at discount 0.99."""
    import td3_bc

    update = td3_bc.update
    grows = iter(torch.cat([torch.ones(10), torch.full((10,), value)]))
    monkeypatch.setattr(td3_bc, "update", lambda *args: update(*args) | {"q_mean": next(grows)})
    start("td3_bc")
    out = capsys.readouterr().out
    assert out.count("Q runs away") == said and ("no policy can reach more than" in out) == said


def test_the_bonus_and_the_shift_count_as_reward(start, monkeypatch, capsys):
    import td3_bc

    update = td3_bc.update
    grows = iter(torch.linspace(1, 1e4, 20))
    monkeypatch.setattr(td3_bc, "update", lambda *args: update(*args) | {"q_mean": next(grows)})
    start("td3_bc", reward_shift=-100.0)
    assert "Q runs away" not in capsys.readouterr().out


def test_a_folder_is_trained_by_one_process(start, monkeypatch):
    lines = []

    def second(*_):
        script = [sys.executable, ROOT / "algorithms" / "td3_bc.py", "--env", "log.npz"]
        flags = ["--seed", "3", "--device", "cpu", "--eval-env", "none", "--overwrite"]
        found = subprocess.run([*script, *flags], capture_output=True, text=True)
        assert found.returncode == 1
        lines.append(found.stderr.strip())

    interrupt(monkeypatch, "td3_bc", "update", 3, second)
    start("td3_bc")
    assert lines == ["runs/log__td3_bc__3 is being trained by another process"]
    assert (folder("td3_bc") / "summary.json").exists()


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", SCRIPTS)
def test_kill_at_random_moments_changes_nothing(start, name, kills):
    """SIGKILL, wherever it falls, while a file is being written too; then --resume, to the bit."""
    flags = dict(save_every=2, log_every=2)
    began = time.time()
    start(name, out="alone", **flags)
    seconds, draw = time.time() - began, random.Random(f"{name} {kills}")

    def child(*, killed):
        pid = os.fork()
        if pid == 0:
            try:
                start(name, out="killed", resume=True, **flags)
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

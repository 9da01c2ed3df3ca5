"""Checkpoints, --resume, --clone and the folder of a run: it goes on to the bit, or is refused."""

import errno
import importlib
import json
import multiprocessing
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
import torch
from short_runs import (
    ROOT,
    SCRIPTS,
    Bomb,
    assert_same_run,
    at,
    checkpoint,
    flags,
    folder,
    killed_at_random,
    rows,
    run_main,
    same,
    start,
    stop_by,
    write_log,
)

import run as page
from common import InputError

META = {"env_id": "Pendulum-v1", "action_low": -2, "action_high": 2}


def refused(name="bc", **values) -> str:
    """The message of a run that does not start."""
    with pytest.raises(InputError) as caught:
        start(name, **values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def stopped(name, phase="train", step=9, number=signal.SIGTERM, **values):
    with pytest.raises(SystemExit) as left:
        start(name, at(phase, step, stop_by(number)), **values)
    assert left.value.code == 130


# ---- going on --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("phase", ["behavior", "train"])
def test_a_stopped_run_goes_on_to_the_bit(here, capsys, phase, number):
    values = dict(eval_env="Pendulum-v1", log_every=2)
    start("fisher_brc", out="whole", **values)
    stopped("fisher_brc", phase, 9, number, out="parts", **values)
    assert f"stopped at {phase} step 9: --resume continues" in capsys.readouterr().out
    _, run = start("fisher_brc", out="parts", resume=True, **values)
    assert run.calls[0] == (phase, 10)
    assert_same_run("fisher_brc", "whole", "parts")


SOAK = [pytest.param(name, 4, marks=pytest.mark.soak) for name in ("iql", "fql", "fisher_brc")]


@pytest.mark.parametrize(("name", "kills"), [("arq", 2), ("brac_plus_acml", 2), *SOAK])
def test_a_run_that_is_killed_anywhere_goes_on_to_the_bit(here, name, kills):
    killed_at_random(name, kills)


def test_a_finished_run_is_done_and_one_with_an_empty_summary_is_not(here, capsys):
    _, run = start("bc")
    with pytest.raises(SystemExit) as left:
        start("bc", resume=True)
    assert left.value.code == 0 and "is finished: there is nothing" in capsys.readouterr().out
    summary = run.folder / "summary.json"
    content = summary.read_text()
    summary.write_text("")
    start("bc", resume=True)
    assert json.loads(summary.read_text()).keys() == json.loads(content).keys()


def test_a_checkpoint_comes_before_every_evaluation(here, monkeypatch):
    """A task that fails at step 18 loses one step."""
    start("td3_bc", out="whole", eval_env="Pendulum-v1")
    judge, count = page.evaluate, iter(range(9))
    fail = lambda *x: judge(*x) if next(count) < 2 else 1 / 0
    with monkeypatch.context() as patch:
        patch.setattr(page, "evaluate", fail)
        with pytest.raises(ZeroDivisionError):
            start("td3_bc", out="parts", eval_env="Pendulum-v1")
    assert checkpoint("td3_bc", "parts")["step"] == 17
    start("td3_bc", out="parts", eval_env="Pendulum-v1", resume=True)
    assert_same_run("td3_bc", "whole", "parts")


# ---- the folder ------------------------------------------------------------------------------


def test_a_run_that_exists_is_refused_or_replaced(here):
    start("bc")
    assert refused() == f"{folder('bc')} exists: add --resume, --overwrite, or a new --name"
    (folder("bc") / "stale.csv").touch()
    start("bc", overwrite=True)
    assert not (folder("bc") / "stale.csv").exists()
    for path in folder("bc").glob("*.csv"):
        path.unlink()
    assert refused()
    (folder("bc") / "checkpoint.pt").unlink()  # nothing was computed there
    start("bc")


def test_a_folder_is_trained_by_one_process(here):
    lines = [sys.executable, str(ROOT / "algorithms" / "bc.py"), *flags("bc", steps=10**6)]
    lines += ["--overwrite", "--eval-env", "none"]
    first = subprocess.Popen(lines, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        while not list(Path("runs").rglob("train.csv")):
            time.sleep(0.1)
        second = subprocess.run(lines, capture_output=True, text=True)
        assert first.poll() is None, "the first one trains on"
    finally:
        first.send_signal(signal.SIGTERM)
        assert first.wait() == 130
    assert second.returncode == 1 and "Traceback" not in second.stderr
    assert second.stderr.endswith(f"{folder('bc')} is being trained by another process\n")


@pytest.mark.parametrize("error", [OSError(errno.ENOSYS, "no locks"), NotImplementedError()])
def test_without_locks_a_run_goes_on_with_a_note(here, monkeypatch, capsys, error):
    def acquire(self, *_, **__):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    start("bc")
    assert f"note: {folder('bc')} cannot be locked (" in capsys.readouterr().out


def test_a_full_disk_is_one_message_and_the_run_goes_on_later(here):
    """Files cannot grow beyond 20,000 bytes; a checkpoint is larger."""
    start("bc", out="whole")
    lines = [sys.executable, str(ROOT / "algorithms" / "bc.py")]
    lines += flags("bc", out="parts", eval_env="none", eval_every=6, log_every=4, save_every=7)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    done = subprocess.run(lines, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "File too large; repair that and use --resume" in done.stderr
    start("bc", out="parts", resume=True)
    assert_same_run("bc", "whole", "parts")


# ---- identity --------------------------------------------------------------------------------


OTHER = {  # flags; what else changes; what the message names
    "flag": (dict(lr=1e-4), None, "lr 0.0003, not 0.0001"),
    "task": (dict(eval_env="Pendulum-v1", seed=3), None, "eval_env none, not Pendulum-v1"),
    "data": ({}, lambda patch: write_log("log.npz", META, seed=1), "data "),
    "code": ({}, lambda patch: patch.setattr(page, "HERE", Path.cwd()), "code of common "),
    "version": (
        {},
        lambda patch: patch.setattr(page.importlib.metadata, "version", lambda _: "9.9"),
        "version of torch ",
    ),
}
REFERENCES = {"ref_min_score": -1000, "ref_max_score": 0}


@pytest.mark.parametrize("case", OTHER)
@pytest.mark.parametrize("finished", [False, True])
def test_resume_names_what_differs(here, monkeypatch, case, finished):
    values, change, says = OTHER[case]
    for name in ("common.py", "run.py"):
        text = (ROOT / name).read_text()
        Path(name).write_text(f"{text}# a comment counts\n")
    start("bc") if finished else stopped("bc")
    if change:
        change(monkeypatch)
    line = refused(resume=True, **values)
    assert f"was made with {says}" in line and "--overwrite or a new --name" in line


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (REFERENCES, "task's ref_min_score None, not -1000"),
        ({"env_kwargs": {"g": 9.81}}, "task's env_kwargs None, not {'g': 9.81}"),
    ],
)
def test_a_corrected_task_is_another_run(here, changes, says):
    stopped("bc", eval_env=None)
    write_log("log.npz", META | changes)
    assert says in refused(resume=True, eval_env=None)


def broken(kind):
    content, middle = (folder("bc") / "checkpoint.pt").read_bytes(), 4000
    cut = {"half": content[:middle], "empty": b"", "text": b"hello"}
    cut["flipped"] = content[:middle] + bytes(64) + content[middle + 64 :]
    saved = torch.load(folder("bc") / "checkpoint.pt")
    other = {"foreign": [1, 2], "bomb": {"nets": Bomb()}, "less": saved | {"nets": {}}}
    other["more"] = saved | {"opt": saved["opt"][1:]}
    if kind in other:
        torch.save(other[kind], folder("bc") / "checkpoint.pt")
    else:
        (folder("bc") / "checkpoint.pt").write_bytes(cut[kind])


@pytest.mark.parametrize("kind", "half empty text flipped foreign bomb less more".split())
def test_a_damaged_checkpoint_is_one_message(here, kind):
    stopped("bc")
    broken(kind)
    assert str(folder("bc") / "checkpoint.pt") in refused(resume=True)
    assert not Path("bomb").exists()


# ---- clones ----------------------------------------------------------------------------------

CLONES = {  # the network that is read, and what such a run does not train
    "brac": ("behavior", "bc_weight"),
    "brac_plus": ("behavior", ()),
    "brac_plus_acml": ("behavior", ()),
    "fisher_brc": ("behavior", "log_bc_weight"),
    "itrpo": ("behavior", "log_bc_weight"),
    "arq": ("score_ema", "score"),
}


@pytest.mark.parametrize("name", CLONES)
def test_a_read_clone_gives_the_numbers_of_the_run_that_trained_it(here, name):
    values = dict(eval_env=None, normalize_obs=True)
    start(name, out="one", **values)
    path = folder(name, "one") / "checkpoint.pt"
    _, run = start(name, out="two", clone=str(path), **values)
    assert not run.count(next(iter(run.args.phases)))
    part, unused = CLONES[name]
    one, two = checkpoint(name, "one"), checkpoint(name, "two")
    for key in one["nets"]:
        if not key.startswith(unused) or key.startswith(part):
            assert same(one["nets"][key], two["nets"][key]), key
    assert same(one["references"], two["references"]) and same(one["rng"], two["rng"])
    for table in ("train.csv", "eval.csv"):
        assert rows(folder(name, "one") / table) == rows(folder(name, "two") / table) != []


def test_every_file_with_a_clone_is_tested():
    modules = [importlib.import_module(path.stem) for path in SCRIPTS]
    assert {m.__name__ for m in modules if "clone" in m.Args.__dataclass_fields__} == {*CLONES}


def test_a_clone_that_does_not_fit_is_one_message(here):
    start("fisher_brc", out="first")
    first = folder("fisher_brc", "first") / "checkpoint.pt"
    read = lambda clone, **values: refused("fisher_brc", clone=clone, overwrite=True, **values)
    write_log("other.npz", seed=1)
    assert "was made with data " in read(first, env="other.npz")
    assert "was made with normalize_obs False, not True" in read(first, normalize_obs=True)
    assert "No such file or directory: 'no.pt'" in read("no.pt")
    saved = torch.load(first)
    weights = {k: x[..., :-1] if k.startswith("behavior.") else x for k, x in saved["nets"].items()}
    for change, says in (
        ({"nets": weights}, "size mismatch for "),
        ({"nets": {"actor": torch.zeros(3)}}, "Missing key"),
        ({"settings": "nothing"}, "other.pt cannot be used"),
        ({"phase": "behavior", "step": 3}, "its clone is not finished"),
    ):
        torch.save(saved | change, "other.pt")
        assert says in " ".join(read("other.pt").split())
    with pytest.raises(InputError, match="--clone reads a clone, and .*bc_steps"):
        run_main("fisher_brc", *flags("fisher_brc", clone=str(first), out="x"))


def test_a_run_with_a_clone_resumes_with_that_clone_alone(here):
    start("fisher_brc", out="first")
    first = str(folder("fisher_brc", "first") / "checkpoint.pt")
    start("fisher_brc", out="whole", clone=first)
    stopped("fisher_brc", out="parts", clone=first)
    moved = str(shutil.copy(first, "moved.pt"))
    start("fisher_brc", out="parts", clone=moved, resume=True)
    assert_same_run("fisher_brc", "whole", "parts")
    torch.save(torch.load(first) | {"step": 1}, moved)
    assert "code of clone" in refused("fisher_brc", out="parts", clone=moved, resume=True)


# ---- the kept table --------------------------------------------------------------------------


def graded(monkeypatch, hook=None, **values):
    """Train ARQ; the sizes of the chunks whose likelihoods were computed."""
    import arq

    sizes, grade = [], arq.grade
    note = lambda nets, s, x, *rest: sizes.append(len(s)) or grade(nets, s, x, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(arq, "grade", note)
        start("arq", hook, filter=True, threshold=-7.0, **values)
    return sizes


def test_likelihoods_that_were_computed_before_a_kill_are_kept(here, monkeypatch):
    """120 rows are two chunks, and about half of the samples are in the support."""
    kill = at("grade", 1, stop_by(signal.SIGKILL))
    assert graded(monkeypatch, out="whole") == [64, 56]
    fork = multiprocessing.get_context("fork")
    job = fork.Process(target=lambda: graded(monkeypatch, kill, out="parts"))
    job.start()
    job.join()
    assert job.exitcode == -signal.SIGKILL and checkpoint("arq", "parts")["phase"] == "sample"
    shutil.copytree("parts", "again")
    kept = folder("arq", "parts") / "kept-grade-0.pt"
    assert kept.exists()
    assert graded(monkeypatch, out="parts", resume=True) == [56]
    assert_same_run("arq", "whole", "parts")
    assert not kept.exists(), "a finished run needs it no more"
    assert graded(monkeypatch, out="again", overwrite=True) == [64, 56], "another run's"


# ---- other systems ---------------------------------------------------------------------------

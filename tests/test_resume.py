"""harness/resume.py: what is written whole or not at all, what is read back, what is refused."""

import contextlib
import errno
import importlib
import io
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import resume
from harness.resume import (
    code_hash,
    code_hashes,
    git_state,
    load_tensors,
    to_bytes,
    versions,
    write_atomic,
)
from short_runs import (
    ROOT,
    SCRIPTS,
    Bomb,
    assert_same_run,
    at,
    checkpoint,
    flags,
    folder,
    outcome,
    same,
    start,
    stop_by,
    write_log,
)

from common import InputError

TD3_BC = ROOT / "algorithms" / "td3_bc.py"
STOP = at("train", 9, stop_by(signal.SIGTERM))

# ---- files -----------------------------------------------------------------------------------


def test_a_write_that_fails_midway_keeps_the_old_file(tmp_path):
    """A file that may not grow beyond two bytes, as on a disk that fills up meanwhile."""
    path = tmp_path / "x.bin"
    write_atomic(path, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2, limits[1]))
    try:
        with pytest.raises(OSError):
            write_atomic(path, b"new content")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_rename_that_fails_leaves_no_temporary_file(tmp_path):
    (tmp_path / "x.bin").mkdir()
    with pytest.raises(OSError):
        write_atomic(tmp_path / "x.bin", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]


def test_tensors_survive_a_round_trip(tmp_path):
    state = {"a": [torch.arange(3), torch.tensor(math.inf)], "b": "text", "n": 3}
    write_atomic(tmp_path / "x.pt", to_bytes(state))
    assert same(load_tensors(tmp_path / "x.pt"), state)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_the_bomb_is_a_bomb(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Bomb()}, "bomb.pt")
    with pytest.raises(InputError, match=r"bomb\.pt cannot be read"):
        load_tensors(Path("bomb.pt"))
    assert not Path("bomb").exists()
    torch.load("bomb.pt", weights_only=False)
    assert Path("bomb").exists()


# ---- stop, kill, continue --------------------------------------------------------------------


def test_resume_keeps_metrics_of_earlier_steps(here):
    """TD3+BC's actor moves on every second step; row 3 holds its loss of step 2, resumed or not."""
    start("td3_bc", out="whole", log_every=1)
    with pytest.raises(SystemExit):
        start("td3_bc", at("train", 4, stop_by(signal.SIGTERM)), out="parts", log_every=1)
    start("td3_bc", out="parts", log_every=1, resume=True)
    assert_same_run("td3_bc", "whole", "parts")


def test_killed_run_continues_from_its_last_checkpoint(here, capsys):
    """No signal handler runs: the steps after the checkpoint at 14 are done again."""
    start("bc", out="whole")
    with pytest.raises(ZeroDivisionError):
        start("bc", at("train", 17, lambda *_: 1 / 0), out="parts")
    assert checkpoint("bc", "parts")["step"] == 14
    assert "resumed:" not in capsys.readouterr().out
    start("bc", out="parts", resume=True)
    assert "resumed:    after train step 14\n" in capsys.readouterr().out
    assert_same_run("bc", "whole", "parts")


def test_finished_run_says_so(here, capsys):
    start("bc")
    before = {p: p.stat().st_mtime_ns for p in folder("bc").iterdir()}
    with pytest.raises(SystemExit) as left:
        start("bc", resume=True)
    assert left.value.code == 0
    assert "is finished: there is nothing to resume" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"is finished, with steps 20, not 30: .*--overwrite"):
        start("bc", resume=True, steps=30)
    assert before == {p: p.stat().st_mtime_ns for p in folder("bc").iterdir()}


DAMAGED = [b'{"args": ', b'{"args":' * 99_999, b"[" * 99_999, bytes(range(256)), b"[]"]
DAMAGED += [b'{"args": ' + b"9" * 9999 + b"}", b'{"args": 3}', b'{"args": {}, "settings": 3}', None]


def test_damaged_config_of_a_finished_run_is_one_line(here):
    start("bc")
    path = folder("bc") / "config.json"
    for content in DAMAGED:
        path.unlink()
        path.write_bytes(content) if content else os.mkfifo(path)
        with pytest.raises(InputError, match=r"config.json is damaged: add --overwrite or a new"):
            start("bc", resume=True)


def test_existing_run(here):
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


@pytest.mark.parametrize(
    ("name", "how"), [("odd.csv", "overwrite"), ("x.tmp", "resume"), ("kept-x.pt", "resume")]
)
def test_what_cannot_be_removed_is_one_line(here, name, how):
    with contextlib.suppress(SystemExit):
        start("bc", STOP)
    (folder("bc") / name).mkdir()
    with pytest.raises(InputError, match=f"{name} cannot be removed .*remove it or use a new --n"):
        start("bc", **{how: True})


def test_a_run_that_an_equal_command_has_finished_meanwhile_is_not_wiped(here):
    """Both saw an empty folder; the second one was still reading its data."""

    def prepare(run):
        load = run.load

        def late():
            data = load()
            start("bc")
            return data

        run.load = late

    with pytest.raises(InputError, match="exists: add --resume, --overwrite, or a new --name"):
        start("bc", prepare=prepare)
    assert (folder("bc") / "summary.json").exists()


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("name", [".lock", "train.csv.tmp", "train.csv", "checkpoint.pt.tmp"])
def test_no_link_in_the_folder_is_written_through(here, link, name):
    victim = here / "victim"
    victim.write_text("precious")
    folder("bc").mkdir(parents=True)
    link(victim, folder("bc") / name)
    start("bc")
    assert victim.read_text() == "precious"
    assert (folder("bc") / "summary.json").exists()


def test_temporary_files_of_a_killed_save_are_removed(here):
    folder("bc").mkdir(parents=True)
    (folder("bc") / "kept-grade-0.pt.tmp").touch()
    start("bc")
    assert not list(folder("bc").glob("*.tmp"))


def test_a_folder_is_trained_by_one_process(here):
    def second():
        lines, status = outcome(TD3_BC, flags(TD3_BC, eval_env="none") + ["--overwrite"])
        Path("said").write_text("\n".join([str(status), *lines]))

    def meanwhile(run, metrics):
        job = multiprocessing.get_context("fork").Process(target=second)
        job.start(), job.join()

    _, run = start("td3_bc", at("train", 3, meanwhile))
    said = "1\nruns/log__td3_bc__3 is being trained by another process"
    assert Path("said").read_text() == said
    assert (folder("td3_bc") / "summary.json").exists()
    assert not run.guests[0].lock.is_locked, "a finished run keeps its folder from others"


# ---- identity --------------------------------------------------------------------------------


@pytest.fixture
def own(here, monkeypatch):
    """own(name): a copy of an algorithm file that a test may edit, imported as my_NAME."""
    monkeypatch.syspath_prepend(here)

    def make(name):
        path = here / f"my_{name}.py"
        shutil.copy(ROOT / "algorithms" / f"{name}.py", path)
        importlib.invalidate_caches()
        importlib.import_module(path.stem)
        return path

    yield make
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


def edit(path, old, new):
    text = path.read_text()
    assert text.count(old) >= 1, old
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("finished", [False, True])
def test_resume_with_other_settings_data_or_code_is_refused(own, finished):
    path = own("td3_bc")
    name = path.stem
    hook = None if finished else STOP
    try:
        start(name, hook)
    except SystemExit as stopped:
        assert stopped.code == 130 and not finished
    kept = checkpoint(name), (folder(name) / "checkpoint.pt").read_bytes()
    made = "is finished, with" if finished else r"checkpoint\.pt was made with"
    for key, value in (("alpha", 9.0), ("steps", 30), ("batch_size", 4), ("eval_every", 5)):
        with pytest.raises(InputError, match=rf"{made} {key} .*, not {value}: "):
            start(name, resume=True, **{key: value})
    write_log("log.npz", seed=1)  # the same name, other rows
    with pytest.raises(InputError, match=rf"{made} data "):
        start(name, resume=True)
    write_log("log.npz")
    edit(path, "q2 = nets.q_target(s2, a2).amin(0)", "q2 = nets.q_target(s2, a2).amax(0)")
    with pytest.raises(InputError, match=rf"{made} code of algorithm \w+, not \w+"):
        start(name, resume=True)
    edit(path, "q2 = nets.q_target(s2, a2).amax(0)", "q2 = nets.q_target(s2, a2).amin(0)  # (B,)")
    assert (folder(name) / "checkpoint.pt").read_bytes() == kept[1]
    with pytest.raises(SystemExit if finished else RecursionError) as left:  # a comment is no code
        start(name, resume=True, save_every=3)
        raise RecursionError
    assert finished is (getattr(left.value, "code", None) == 0)
    assert checkpoint(name)["step"] == 20


def test_a_checkpoint_of_other_versions_is_refused(here, stopped_run):
    for key, value in (("code of run", "0"), ("version of torch", "1.0"), ("momentum", 0.9)):
        shutil.copytree(stopped_run, "runs", dirs_exist_ok=True)
        saved = checkpoint("bc")
        saved["settings"] = json.dumps(json.loads(saved["settings"]) | {key: value})
        write_atomic(folder("bc") / "checkpoint.pt", to_bytes(saved))
        with pytest.raises(InputError, match=rf"was made with {key} {value}, not "):
            start("bc", resume=True)


def test_code_is_hashed_without_its_text(tmp_path):
    """Docstrings, comments, layout and PRESETS change no number; everything else may."""
    text = '"""Doc."""\n\nPRESETS = {}\n\n\ndef f(x):\n    """Doc."""\n    return x + 1\n'
    path = tmp_path / "x.py"

    def hashed(text):
        path.write_text(text)
        return code_hash(path)

    first = hashed(text)
    assert len(first) == 12
    assert hashed(text.replace("Doc.", "Other.")) == first
    assert hashed(text.replace("x + 1", "(x +  1)  # one")) == first
    assert hashed(text.replace("{}", "{'a': dict(lr=1)}")) == first
    assert hashed(text.replace("x + 1", "x + 2")) != first
    assert hashed(text.replace("def f", "def g")) != first
    assert hashed(text + "y = 1\n") != first
    assert hashed(text.replace("PRESETS", "DEPARTURES")) == hashed(text.replace("PRESETS = {}", ""))
    assert hashed(text.replace("PRESETS", "TABLE")) != hashed(text.replace("PRESETS = {}", ""))
    assert code_hash(path, path) != code_hash(path)


def test_config_holds_the_identity_of_code_and_data(here):
    _, run = start("bc")
    config = json.loads((folder("bc") / "config.json").read_text())
    settings, bc = config["settings"], ROOT / "algorithms" / "bc.py"
    assert config["code"] == code_hashes(bc, readers=True)
    assert config["dataset_sha256"] == run.data.digest == settings["data"]
    assert re.fullmatch("[0-9a-f]{16}", run.data.digest)
    torch_release = torch.__version__.split("+")[0]  # a build such as +cu132 has no name of its own
    assert config["versions"] == versions() and versions()["torch"].split("+")[0] == torch_release
    assert {"torch", "numpy", "gymnasium", "mujoco"} <= versions().keys()
    for name in versions().keys() - {"python"}:
        assert settings[f"version of {name}"] == versions()[name]
    assert settings["precision"] == "highest" and settings["compile"] is False
    assert {key: config[key] for key in ("commit", "dirty")} == git_state()
    assert config["command"] == "algorithm.py" and config["task"] is None


def test_dirty_is_what_git_sees(tmp_path):
    def git(*words):
        me = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
        subprocess.run(["git", "-C", str(tmp_path), *me, *words], check=True)

    assert git_state(tmp_path) == {"commit": None, "dirty": None}
    git("init", "-q")
    (tmp_path / "x.py").write_text("1")
    git("add", "x.py"), git("commit", "-q", "-m", "x")
    (tmp_path / "mine.py").touch()
    state = git_state(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", state["commit"]) and state["dirty"] is False
    (tmp_path / "x.py").write_text("2")
    assert git_state(tmp_path) == state | {"dirty": True}


# ---- full disks ------------------------------------------------------------------------------


def start_on(is_full, name, hook=None, **values):
    """start() on a disk on which nothing can be written while is_full(run)."""

    def prepare(run):
        def write(path, content):
            if is_full(run):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write_atomic(path, content)

        patch.setattr(resume, "write_atomic", write)

    with pytest.MonkeyPatch.context() as patch:
        return start(name, hook, prepare, **values)


@pytest.mark.parametrize(
    "name",
    [x.stem if x.stem == "bc" else pytest.param(x.stem, marks=pytest.mark.soak) for x in SCRIPTS],
)
def test_full_disk_is_said_once_and_training_goes_on(here, capsys, name):
    runs = []
    with pytest.raises(InputError, match=r"could not be saved: free some space") as error:
        start_on(lambda run: runs.append(run) or True, name)
    assert runs[-1].count("train") == 20, "training stopped"
    assert not (folder(name) / "summary.json").exists(), "it would count as finished"
    assert "\n" not in str(error.value)
    said = capsys.readouterr().err.splitlines()
    for file in ("config.json", "train.csv", "checkpoint.pt"):
        lines = [x for x in said if x.startswith(str(folder(name) / file))]
        assert len(lines) == 1 and "No space left on device" in lines[0], said
    assert len(said) == len(set(said)), "said twice"


def test_disk_that_is_full_for_a_while_changes_nothing(here, capsys):
    start("td3_bc", out="whole")
    start_on(lambda run: 5 <= len(run.calls) <= 15, "td3_bc", out="parts")
    assert "not saved (No space left on device)" in capsys.readouterr().err
    assert (folder("td3_bc", "parts") / "summary.json").exists()
    assert_same_run("td3_bc", "whole", "parts")


def test_disk_that_is_full_at_the_end_loses_nothing(here):
    start("td3_bc", out="whole")
    with pytest.raises(InputError, match=r"checkpoint.*repeat the command with --resume"):
        start_on(lambda run: len(run.calls) > 15, "td3_bc", out="parts")
    start("td3_bc", out="parts", resume=True)
    assert (folder("td3_bc", "parts") / "summary.json").exists()
    assert_same_run("td3_bc", "whole", "parts")


def test_space_that_is_freed_before_the_end_is_enough(here):
    tries = []

    def is_full(run):  # both writes of the last step fail; then somebody makes room
        late = len(run.calls) == 20
        tries.append(late)
        return late and sum(tries) <= 2

    start_on(is_full, "td3_bc")
    assert sum(tries) > 2 and {"checkpoint.pt", "train.csv", "summary.json"} <= {
        path.name for path in folder("td3_bc").iterdir()
    }


def test_a_stop_on_a_full_disk_says_that_nothing_was_saved(here, capsys):
    with pytest.raises(SystemExit):
        start_on(lambda run: True, "bc", STOP)
    assert "stopped, not saved; continue with: " in capsys.readouterr().out


@pytest.mark.parametrize("size", [0, pytest.param(20_000, marks=pytest.mark.soak)])
def test_files_cannot_grow(here, size):
    """A real limit, TensorBoard's events included: training goes on, lines without a traceback,
    and an exit code, because the weights (all files, where size is 0) are lost."""
    limit = "import resource, runpy, sys\n"
    limit += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
    limit += "runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    script = str(ROOT / "algorithms" / "bc.py")
    words = "--env log.npz --eval-env none --steps 400 --batch-size 8 --log-every 1 --device cpu"
    done = subprocess.run(
        [sys.executable, "-c", limit, script, *words.split()], capture_output=True, text=True
    )
    said = done.stderr.splitlines()
    assert "Traceback" not in done.stderr and len(said) == len(set(said)) < 8
    assert "train 400/400" in done.stdout
    assert "checkpoint.pt not saved (File too large)" in done.stderr
    assert done.returncode == 1 and "could not be saved: free some space" in said[-1]


# ---- damaged checkpoints ---------------------------------------------------------------------


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


def refused_checkpoint(path):
    """The line with which a continuation refuses a checkpoint, which stays as it is."""
    left = path.read_bytes()
    with pytest.raises(InputError) as error:
        start("bc", at("train", 10, lambda *_: pytest.fail("it trained")), resume=True)
    assert "checkpoint.pt" in str(error.value) and "\n" not in str(error.value)
    assert path.read_bytes() == left
    assert not Path("bomb").exists(), "the checkpoint was unpickled"
    return str(error.value)


@pytest.mark.parametrize("kind", ["half", "empty", "text", "flipped", "foreign", "bomb"])
def test_damaged_checkpoint_is_one_line(here, kind):
    with pytest.raises(SystemExit):
        start("bc", STOP)
    damage(folder("bc") / "checkpoint.pt", kind)
    refused_checkpoint(folder("bc") / "checkpoint.pt")


def poison(saved, case):
    """A checkpoint that reads well and fits no run."""
    nets = dict(saved["nets"])
    first = next(iter(nets))
    short = [saved["opt"][0][:-1]]
    wide = [[x.repeat(2) if x.ndim == 1 else x for x in saved["opt"][0]]]
    return (
        saved
        | {
            "phase": {"phase": "nowhere"},
            "step": {"step": "nine"},
            "late step": {"step": -1},
            "settings": {"settings": "[" * 9999},
            "settings number": {"settings": 3},
            "missing weight": {"nets": {k: v for k, v in nets.items() if k != first}},
            "other shape": {"nets": nets | {first: torch.zeros(1, 1)}},
            "text for weights": {"nets": "weights"},
            "optimizer": {"opt": []},
            "optimizer short": {"opt": short},
            "optimizer wide": {"opt": wide},
            "rng": {"rng": [torch.zeros(3)]},
            "rng none": {"rng": []},
            "rows": {"rows": '{"eval": [{"step": 1}]}'},
            "rows text": {"rows": "nothing"},
            "references": {"references": {"data": "high"}},
            "last": {"last": {"pi_loss": "small"}},
            "seconds": {"seconds": [1.0]},
        }[case]
    )


POISON = """phase,step,late step,settings,settings number,missing weight,other shape,
text for weights,optimizer,optimizer short,optimizer wide,rng,rng none,rows,rows text,references,
last,seconds""".replace("\n", "").split(",")


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """The folder of a run that was stopped at step 9."""
    here, root = os.getcwd(), tmp_path_factory.mktemp("stopped")
    os.chdir(root)
    write_log("log.npz")
    try:
        start("bc", at("train", 9, lambda run, _: setattr(run.guests[0], "stopped", True)))
    except SystemExit:
        pass
    os.chdir(here)
    return root / "runs"


@pytest.mark.parametrize("case", POISON)
def test_poisoned_checkpoint_is_one_line(here, stopped_run, case):
    shutil.copytree(stopped_run, "runs")
    path = folder("bc") / "checkpoint.pt"
    write_atomic(path, to_bytes(poison(load_tensors(path), case)))
    line = refused_checkpoint(path)
    assert "add --overwrite or a new --name" in line and len(line) < 400


def test_a_checkpoint_that_is_a_pipe_is_one_line(here):
    folder("bc").mkdir(parents=True)
    os.mkfifo(folder("bc") / "checkpoint.pt")
    with pytest.raises(InputError, match=r"checkpoint\.pt: it is not a file; correct the path"):
        start("bc", resume=True)


@pytest.mark.parametrize(("file", "finished"), [("checkpoint.pt", False), ("config.json", True)])
def test_a_good_file_that_cannot_be_opened_now_is_not_called_damaged(
    here, monkeypatch, file, finished
):
    with contextlib.nullcontext() if finished else pytest.raises(SystemExit):
        start("bc", None if finished else STOP)
    opened = io.open

    def busy(path, *rest, **options):
        if Path(path).name == file:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return opened(path, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(io, "open", busy)
        with pytest.raises(InputError, match=f"{file}.*resource busy.*repeat the command") as error:
            start("bc", resume=True)
    assert not re.search("delete|damaged|overwrite", str(error.value))

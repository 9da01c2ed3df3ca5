"""Who imports whom; three files alone; --clone; systems that lack a module, a home or locks."""

import ast
import errno
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from harness import resume
from harness.resume import to_bytes
from short_runs import (
    META,
    ROOT,
    SCRIPTS,
    Bomb,
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

import run as page
from common import InputError, RunArgs, parse

BC = ROOT / "algorithms" / "bc.py"

# ---- who imports whom ------------------------------------------------------------------------


def module_name(path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


FOLDERS = ("harness", "harness/readers", "tools", "data/make", "peers", "figures")
FILES = [ROOT / "common.py", ROOT / "run.py"]
FILES += [path for name in FOLDERS for path in sorted((ROOT / name).glob("*.py"))]
MODULES = {module_name(path): ast.parse(path.read_text()) for path in FILES}


def imports(tree) -> list[tuple[str, str]]:
    """(module of the project, name as it is bound) of every import, those in functions too."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(x.name, x.asname or x.name) for x in node.names]
        elif isinstance(node, ast.ImportFrom):
            for x in node.names:
                inner = f"{node.module}.{x.name}"
                found.append((inner if inner in MODULES else node.module, x.asname or x.name))
    return [pair for pair in found if pair[0] in MODULES]


def test_above_its_functions_the_page_imports_common_and_packages_only():
    tree = MODULES["run"]
    first = next(i for i, node in enumerate(tree.body) if isinstance(node, ast.FunctionDef))
    top = ast.Module([x for x in tree.body if not isinstance(x, ast.FunctionDef | ast.ClassDef)])
    assert {name for name, _ in imports(top)} == {"common"}
    assert not {*MODULES} & {x.name for node in tree.body[:first] if isinstance(node, ast.Import)
                             for x in node.names}  # fmt: skip
    assert not imports(MODULES["common"])


def test_no_module_imports_itself_through_others():
    """What the page imports by name counts too: every guest."""
    house = {name for name in MODULES if name in ("common", "run") or name.startswith("harness")}
    graph = {name: {x for x, _ in imports(MODULES[name])} & house for name in house}
    graph["run"] |= {name for name in house if name.startswith("harness")} - {"harness"}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("name", MODULES)
def test_no_module_takes_what_another_keeps_to_itself(name):
    tree = MODULES[name]
    private = re.compile(r"_[^_]")
    bound = {alias for module, alias in imports(tree)}
    taken = [alias for alias in bound if private.match(alias)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in bound and private.match(node.attr):
                taken.append(f"{node.value.id}.{node.attr}")
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            taken += [x.name for x in node.names if private.match(x.name)]
    assert not taken


# ---- three files and a dataset ---------------------------------------------------------------

ALONE = """
import runpy, sys, time, torch
torch.set_num_threads(1)
first = list(sys.path)
for line in LINES:
    path, *sys.argv[1:] = line.split()
    for name in [x for x in sys.modules if x.split(".")[0] in ("common", "run", "harness")]:
        del sys.modules[name]
    sys.path, sys.argv[0] = [path.rpartition("/")[0], *first], path
    runpy.run_path(path, run_name="__main__")
"""
SHORT = "--steps 5 --eval-every 4 --eval-episodes 2 --log-every 2 --device cpu"
DEFAULT = "hopper-medium-expert-demo.npz"
MISSING = "no harness/ beside run.py: no checkpoints, no --resume, no curve"


def copies(place, path) -> Path:
    """A folder with an algorithm file and what it needs, and nothing else."""
    place.mkdir(parents=True)
    for file in (path, ROOT / "common.py", ROOT / "run.py"):
        shutil.copy(file, place)
    return place / path.name


def test_three_files_and_a_dataset_give_the_numbers_of_a_clone(here):
    """For every file, `python NAME.py` in a folder that holds it, common.py, run.py and the data
    that it names by default; and for one the path of a file, which a clone checks first."""
    shutil.copytree(ROOT / "harness", "clone/harness")
    shutil.copytree(ROOT / "data", "clone/data", ignore=shutil.ignore_patterns("*.npz"))
    write_log(f"clone/data/{DEFAULT}")
    copied, cloned = [], []
    for path in SCRIPTS:
        file = copies(here / "copy" / path.stem, path)
        shutil.copy(f"clone/data/{DEFAULT}", file.parent)
        copied.append(f"{file} {SHORT} --out copied")
        cloned.append(f"clone/algorithms/{path.name} {SHORT} --out cloned")
    shutil.copytree(ROOT / "algorithms", "clone/algorithms")
    for name in ("common.py", "run.py"):
        shutil.copy(ROOT / name, "clone")
    log = "--env log.npz --name log"
    bc = SCRIPTS.index(BC)
    lines = [*copied, f"{copied[bc]} {log}", *cloned, f"{cloned[bc]} {log}"]
    code = ALONE.replace("LINES", repr(lines))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines().count(MISSING) == len(copied) + 1
    assert len([*Path("copied").iterdir()]) == len([*Path("cloned").iterdir()]) == len(SCRIPTS) + 1
    for one in Path("copied").iterdir():
        two = Path("cloned", one.name)
        tables = {path.name for path in one.glob("*.csv")}
        assert {path.name for path in one.iterdir()} == {*tables, "summary.json"}
        assert {"train.csv", "eval.csv"} <= tables == {path.name for path in two.glob("*.csv")}
        for table in tables:
            assert rows(one / table) == rows(two / table) != [], f"{one}/{table}"
        first, second = (json.loads((x / "summary.json").read_text()) for x in (one, two))
        for key in first.keys() - {"train_seconds", "eval_seconds"}:
            assert first[key] == second[key], f"{one}: {key}"
        if "__fisher_brc__" in one.name:
            preset = json.loads((two / "config.json").read_text())["preset"]
            assert preset == dict(normalize_obs=True, polyak=0.02, lam=1.0)


@pytest.fixture
def alone(here, monkeypatch):
    """The page as in a copy without harness/."""
    monkeypatch.setattr(page, "HERE", here)
    return here


def refused(call, *words, **values) -> str:
    """The one line of an InputError."""
    with pytest.raises(InputError) as caught:
        call(*words, **values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_copy_without_harness_refuses_pickles(alone):
    bomb = np.array([Bomb()], dtype=object)
    with np.load("log.npz") as file:
        np.savez("bomb.npz", **{**file, "rewards": bomb})
    assert "bomb.npz: Object arrays cannot be loaded" in refused(page.load, "bomb.npz")
    bomb.dump("pickle.npz")
    assert refused(page.load, "pickle.npz").startswith("pickle.npz: ")
    assert not Path("bomb").exists()
    np.load("bomb.npz", allow_pickle=True)["rewards"]
    assert Path("bomb").exists(), "it was none"


@pytest.mark.parametrize(
    "task",
    [
        {"env_id": "os:Pendulum-v1"},
        {"env_kwargs": {"entry_point": "os:mkdir"}},
        {"env_kwargs": {"a": [{"b": "os:mkdir"}]}},
        {"env_kwargs": {"os:mkdir": 1}},
    ],
)
def test_a_copy_without_harness_refuses_a_recorded_task_with_a_colon(alone, task):
    write_log("log.npz", META | task)
    assert "records a task with a colon: remove it" in refused(page.load, "log.npz")
    write_log("log.npz", META | {"env_kwargs": {"g": 9.81}})
    assert page.load("log.npz")[1]["env_kwargs"] == {"g": 9.81}


def test_bad_input_in_a_copy_without_harness_is_one_line(alone):
    Path("half.npz").write_bytes(Path("log.npz").read_bytes()[:2000])
    Path("empty.npz").touch()
    cases = {"lag": "No such file", "half.npz": "not a zip", "empty.npz": "No data"}
    for name, says in cases.items():
        line = refused(page.load, name)
        assert line.startswith(f"{name}: ") and says in line and line.endswith("use another file")
    for flag in ({"resume": True}, {"clone": "runs/x/checkpoint.pt"}):
        assert "need the folder harness/ beside run.py" in refused(start, "fisher_brc", **flag)
    for values in ({"name": "x" * 300}, {"out": "log.npz"}):
        assert refused(start, "bc", **values).endswith("; use another --out or --name")


def test_a_copy_without_harness_writes_through_no_link(alone):
    Path("victim").write_text("precious")
    folder("bc").mkdir(parents=True)
    (folder("bc") / "train.csv.tmp").symlink_to(alone / "victim")
    start("bc")
    assert Path("victim").read_text() == "precious"


@pytest.mark.parametrize("case", ["ends", "cuts"])
def test_readers_are_a_command_whose_file_gives_the_same_data(here, monkeypatch, capsys, case):
    """Also where a row lacks what followed it, and with bounds of actions."""
    if case == "cuts":
        with np.load("log.npz") as file:
            np.savez("log.npz", **{k: file[k] for k in file if k != "final_observations"})
    monkeypatch.setattr(sys, "argv", ["readers", "log.npz", "out.npz"])
    runpy.run_module("harness.readers", run_name="__main__")
    out = capsys.readouterr().out
    assert re.search(r"^observations +\(120, 3\) +float32$", out, re.M)
    assert json.loads(out.splitlines()[-1])["env_id"] == "Pendulum-v1"
    with np.load("log.npz") as file, np.load("out.npz") as written:
        assert written["timeouts"].tolist() == file["timeouts"].tolist() and "ends" not in written
    one, two = (page.load(name)[0] for name in ("log.npz", "out.npz"))
    assert len(one.obs) == (120 if case == "ends" else 118)
    assert one.digest == two.digest
    monkeypatch.setattr(page, "HERE", here)
    assert page.load("out.npz")[0].digest == one.digest, "the page reads it as the readers do"


# ---- what a number depends on ----------------------------------------------------------------


def test_readers_and_tasks_count_where_they_decide_rows_or_scores(here):
    for env, task, used in (
        ("log.npz", "none", True),
        ("hopper-replay-demo", "none", False),
        ("pointmaze-stitch-demo", "PointMaze_Medium-v3", True),
    ):
        _, run = start("bc", env=env, eval_env=task, steps=1, name=f"{used}")
        config = json.loads((run.folder / "config.json").read_text())
        assert ("code of readers and tasks" in config["settings"]) is used
        assert ("readers and tasks" in config["code"]) is used
        assert {"code of algorithm", "code of common", "code of run"} <= config["settings"].keys()


def test_every_file_of_the_readers_and_the_tasks_counts(here, monkeypatch):
    shutil.copytree(ROOT / "harness", "harness", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("common.py", "run.py"):
        shutil.copy(ROOT / name, here)
    monkeypatch.setattr(resume, "ROOT", here)
    first = resume.code_hashes(BC, True)
    for path in (*sorted(Path("harness/readers").glob("*.py")), Path("harness/tasks.py")):
        before = path.read_text()
        path.write_text(f"{before}\nx = 1\n")
        changed = resume.code_hashes(BC, True)
        assert [x for x in first if first[x] != changed[x]] == ["readers and tasks"], path
        path.write_text(before)


def test_a_new_flag_of_a_copied_file_trains_a_new_clone(here, monkeypatch):
    """Nothing of an earlier run in the same --out is found by itself."""
    text = (ROOT / "algorithms" / "fisher_brc.py").read_text()
    for old, new in (
        ("    lam: ", '    scale: float = 1.0\n    """of the likelihood"""\n    lam: '),
        ("loss = nll - bc_weight", "loss = args.scale * nll - bc_weight"),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    (here / "my_fisher.py").write_text(text)
    monkeypatch.syspath_prepend(here)
    try:
        clones = []
        for scale in (1.0, 2.0, 1.0):
            _, run = start("my_fisher", name=f"{len(clones)}", scale=scale)
            assert run.count("behavior") == 10
            clones.append(run.nets.behavior.state_dict())
    finally:
        del sys.modules["my_fisher"]
    assert not same(clones[0], clones[1]) and same(clones[0], clones[2])
    assert {path.name for path in Path("runs").iterdir()} == {
        f"log__my_fisher-{i}__3" for i in range(3)
    }


# ---- --clone ---------------------------------------------------------------------------------

# The part of Nets that --clone reads, and the parts that phase one alone uses.
CLONES = {
    "fisher_brc": ("behavior", "log_bc_weight"),
    "brac": ("behavior", "bc_weight"),
    "brac_plus": ("behavior", ()),
    "brac_plus_acml": ("behavior", ()),
    "itrpo": ("behavior", "log_bc_weight"),
    "arq": ("score_ema", "score"),
}


def test_every_file_with_a_clone_is_tested():
    modules = [importlib.import_module(path.stem) for path in SCRIPTS]
    assert {m.__name__ for m in modules if "clone" in m.Args.__dataclass_fields__} == set(CLONES)


@pytest.mark.parametrize("name", CLONES)
def test_a_read_clone_gives_the_numbers_of_the_run_that_trained_it(here, capsys, name):
    values = dict(eval_env=None, normalize_obs=True)
    start(name, out="one", **values)
    capsys.readouterr()
    path = folder(name, "one") / "checkpoint.pt"
    _, run = start(name, out="two", clone=str(path), **values)
    phase = next(iter(run.args.phases))
    assert not run.count(phase) and f"clone: read from {path}\n" in capsys.readouterr().out
    settings = json.loads((run.folder / "config.json").read_text())["settings"]
    assert settings["clone"] == hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    part, unused = CLONES[name]
    one, two = checkpoint(name, "one"), checkpoint(name, "two")
    assert any(key.startswith(f"{part}.") for key in one["nets"])
    for key in one["nets"]:
        if not key.startswith(unused) or key.startswith(part):
            assert same(one["nets"][key], two["nets"][key]), key
    assert same(one["references"], two["references"]) and same(one["rng"], two["rng"])
    for table in ("train.csv", "eval.csv"):
        assert rows(folder(name, "one") / table) == rows(folder(name, "two") / table) != []


@pytest.mark.parametrize("name", CLONES)
def test_flags_that_train_a_clone_change_nothing_beside_one_that_is_read(here, name):
    start(name)
    clone, other = str(folder(name) / "checkpoint.pt"), {"int": 7, "float": 0.5}
    start(name, clone=clone, out="plain")
    module = importlib.import_module(name)
    for flag in module.Args.clone_flags:
        value = other[type(getattr(module.Args, flag)).__name__]
        start(name, clone=clone, out=flag, **{flag: value})
        one, two = (rows(folder(name, out) / "train.csv") for out in ("plain", flag))
        assert one == two != [], flag
        line = refused(run_main, name, *flags(f"{name}.py", clone=clone, out="x", **{flag: value}))
        typed = f"--{flag.replace('_', '-')}"
        assert line == f"{typed} trains a clone, and --clone reads one: use one of them"


@pytest.fixture
def first(here):
    """The checkpoint of a run that trained a clone."""
    start("fisher_brc", out="first")
    return folder("fisher_brc", "first") / "checkpoint.pt"


def read(clone, hook=None, **values):
    return start("fisher_brc", hook, clone=str(clone), overwrite=True, **values)


def test_a_clone_that_does_not_fit_is_one_line(first):
    write_log("other.npz", seed=1)
    line = refused(read, first, env="other.npz")
    assert re.search("its clone was trained with data .*: use a clone of equal data", line)
    line = refused(read, first, normalize_obs=True)
    assert "its clone was trained with normalize_obs False, not True" in line
    saved, other = torch.load(first), Path("other.pt")
    weights = {k: x[..., :-1] if k.startswith("behavior.") else x for k, x in saved["nets"].items()}
    for change, says in (
        ({"nets": weights}, "its clone has other shapes (size mismatch for "),
        ({"nets": {"actor": torch.zeros(3)}}, "its clone has other shapes ("),
        ({"nets": 3}, "is not a checkpoint"),
        ({"settings": "nothing"}, "is not a checkpoint"),
        ({"phase": "behavior", "ended": False}, "its clone is not finished"),
    ):
        other.write_bytes(to_bytes(saved | change))
        line = refused(read, other)
        assert line.startswith("other.pt") and says in line, line
    content = first.read_bytes()
    middle = len(content) // 2
    for damaged in (b"", content[:middle], content[:middle] + bytes(64) + content[middle + 64 :]):
        other.write_bytes(damaged)
        assert refused(read, other).startswith("other.pt cannot be read (")
    torch.save({"nets": Bomb()}, other)
    assert "cannot be read" in refused(read, other) and not Path("bomb").exists()
    assert "it is not a file" in refused(read, "missing.pt")
    assert not list(Path("runs").rglob("*.csv"))


def test_a_clone_of_another_networks_shape_and_one_that_is_not_finished_are_refused(here):
    start("arq", out="first")
    path = folder("arq", "first") / "checkpoint.pt"
    line = refused(start, "arq", clone=str(path), width=8, overwrite=True)
    assert "its clone has other shapes (size mismatch" in line
    start("arq", clone=str(path), overwrite=True)
    with pytest.raises(SystemExit):
        start("arq", at("score", 5, stop_by(signal.SIGTERM)), out="half")
    path = folder("arq", "half") / "checkpoint.pt"
    assert "finish that run with --resume" in refused(start, "arq", clone=str(path), overwrite=True)


def test_a_run_with_a_clone_resumes_to_the_bit(first):
    read(first, out="whole")
    with pytest.raises(SystemExit):
        read(first, at("train", 9, stop_by(signal.SIGTERM)), out="parts")
    moved = shutil.copy(first, "moved.pt")
    _, run = start("fisher_brc", clone=moved, out="parts", resume=True)
    assert run.calls[0] == ("train", 10)
    assert_same_run("fisher_brc", "whole", "parts")
    Path(moved).write_bytes(to_bytes(torch.load(first) | {"step": 1}))
    line = refused(start, "fisher_brc", clone=moved, out="parts", resume=True)
    assert re.search("is finished, with clone [0-9a-f]{16}, not [0-9a-f]{16}", line)


# ---- likelihoods -----------------------------------------------------------------------------


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

    def killed():
        graded(monkeypatch, kill, out="parts")

    assert graded(monkeypatch, out="whole") == [64, 56]
    job = multiprocessing.get_context("fork").Process(target=killed)
    job.start()
    job.join()
    assert job.exitcode == -signal.SIGKILL and checkpoint("arq", "parts")["phase"] == "sample"
    shutil.copytree("parts", "again")
    kept = folder("arq", "parts") / "kept-grade-0.pt"
    assert kept.exists()
    assert graded(monkeypatch, out="parts", resume=True) == [56]
    assert_same_run("arq", "whole", "parts")
    support = [float(row["in_support"]) for row in rows(folder("arq", "parts") / "grade.csv")]
    assert support and all(0.1 < x < 0.9 for x in support)
    assert not kept.exists(), "a finished run needs it no more"
    assert graded(monkeypatch, out="again", overwrite=True) == [64, 56], "another run's"


def test_a_damaged_likelihood_is_computed_again(here, monkeypatch, capsys):
    graded(monkeypatch, out="whole")
    with pytest.raises(ZeroDivisionError):
        graded(monkeypatch, at("grade", 2, lambda *_: 1 / 0), out="parts")
    paths = [folder("arq", "parts") / f"kept-grade-{i}.pt" for i in range(2)]
    content = paths[0].read_bytes()
    middle = len(content) // 2
    paths[0].write_bytes(content[:middle] + bytes(64) + content[middle + 64 :])
    torch.save({"x": torch.zeros(3)}, paths[1])
    assert graded(monkeypatch, out="parts", resume=True) == [64, 56]
    said = capsys.readouterr().err
    assert all(f"{path} is damaged, and computed again\n" in said for path in paths)
    assert_same_run("arq", "whole", "parts")


# ---- other systems ---------------------------------------------------------------------------

ELSEWHERE = """
import importlib, os, runpy, sys
sys.modules.update(dict.fromkeys(("fcntl", "resource", "pwd", "grp", "termios")))
del os.sysconf
sys.argv = WORDS
sys.path.insert(0, ROOT)
for name in MODULES:
    importlib.import_module(name)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_training_works_without_what_windows_lacks(here):
    words = [str(BC), *flags(BC, out="elsewhere", eval_env="Pendulum-v1")]
    names = [name for name in MODULES if name.startswith("harness")]
    code = ELSEWHERE.replace("WORDS", repr(words)).replace("MODULES", repr(names))
    code = code.replace("ROOT", repr(str(ROOT)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    run_main("bc", *flags(BC, out="here", eval_env="Pendulum-v1"))
    assert_same_run("bc", "elsewhere", "here")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSYS, "Function not implemented"), NotImplementedError("no flock")]
)
def test_without_locks_a_run_goes_on_with_a_note(here, monkeypatch, capsys, error):
    def acquire(self, *_, **__):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    start("bc")
    assert re.search(r"^note: runs/log__bc__3 cannot be locked \(", capsys.readouterr().out, re.M)
    assert (folder("bc") / "summary.json").exists()


def test_a_checkpoint_is_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    calls = []

    def note(name, which):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *x: calls.append((name, which(*x))) or call(*x))

    note("fsync", lambda file: (os.fstat(file).st_ino, os.fstat(file).st_size))
    note("replace", lambda old, new: (os.stat(old).st_ino, os.stat(old).st_size))
    resume.write_atomic(tmp_path / "checkpoint.pt", b"weights")
    assert [name for name, _ in calls] == ["fsync", "replace"]
    assert calls[0][1] == calls[1][1] and calls[0][1][1] == len(b"weights")


@pytest.mark.parametrize("home", ["/dev/null/x", "~"])
def test_a_home_that_cannot_be_read_changes_nothing(here, monkeypatch, home):
    """It would hold D4RL's and Minari's data."""
    for variable in ("MINARI_DATASETS_PATH", "D4RL_DATASET_DIR", "OGBENCH_DATASET_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", home)
    lines, status = outcome(BC, flags(BC))
    assert (lines, status) == ([], 0) and (folder("bc") / "summary.json").exists()
    lines, status = outcome(BC, flags(BC, env="hopper-medum-v2"))
    assert status == 1 and len(lines) == 1 and "hopper-medium-v2" in lines[0]


def test_names_that_are_too_long_or_no_text(here):
    lines, status = outcome(BC, flags(BC, name="x" * 300))
    assert status == 1 and len(lines) == 1
    assert lines[0].endswith("File name too long; use another --out or --name")
    write_log(os.fsdecode(b"l\xffg.npz"))
    for name, due in ((b"l\xffg.npz", 0), (b"l\xfeg.npz", 1)):
        command = [sys.executable, str(BC), *flags(BC, env=os.fsdecode(name))]
        strict = os.environ | {"PYTHONIOENCODING": "utf-8"}
        done = subprocess.run(command, capture_output=True, env=strict)
        assert done.returncode == due and done.stderr.count(b"\n") == due, done.stderr
    assert Path("runs/l-g__bc__3/curve.png").exists()


# ---- --help ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_help_is_as_wide_as_the_terminal_and_begins_with_the_paper(monkeypatch, capsys, path):
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.setattr(sys, "argv", [path.name])
    module = importlib.import_module(path.stem)
    with pytest.raises(SystemExit):
        parse(module.Args, module.PRESETS, ["--help"])
    text = capsys.readouterr().out
    described, options = text.split("options", 1)
    equations = {line.strip() for block in re.split(r"\n\n", module.__doc__)
                 if block.startswith("    ") for line in block.splitlines()}  # fmt: skip
    for line in described.splitlines():
        assert len(line) <= 70 or line.strip() in equations, line
    names = re.findall(r"^\W*--([a-z0-9-]+)", options, re.M)
    plumbing = {field.replace("_", "-") for field in RunArgs.__dataclass_fields__}
    first = min(i for i, name in enumerate(names) if name.removeprefix("no-") in plumbing)
    assert first > 4 and not set(names[:first]) & plumbing
    assert {name for name in names[first:]} <= plumbing

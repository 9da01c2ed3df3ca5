"""Damaged bytes, odd flags and poisoned folders end in one clear line or a good result: no
traceback, no hang, nothing executed. One case of each kind by default, all with --soak; then
`python -m pytest tests/test_fuzz.py --soak -s -n 0` prints the counts and ten refusals."""

import contextlib
import importlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from short_runs import META, ROOT, folder, outcome, short, start, write_log

from common import InputError
from run import load as load_dataset
from run import load_tensors

CPU = torch.device("cpu")
SECONDS = 30  # in which every case must end
LINES = random.Random(0), []  # refusals, of which some are printed
CANARY = "executed"  # a file that a payload would leave behind


@pytest.fixture(scope="module")
def cases(request):
    """cases(n): n with --soak, else one in ten of them."""
    return lambda n: range(n if request.config.getoption("--soak") else max(n // 10, 6))


@pytest.fixture(autouse=True, scope="module")
def report(request):
    yield
    draw, lines = LINES
    if request.config.getoption("--soak"):
        print(f"\n{len(lines)} refusals; ten of them:")
        kinds = list({re.sub(r"\d+", "", line)[:40]: line for line in sorted(lines)}.values())
        for line in draw.sample(kinds, min(10, len(kinds))):
            print(f"  {line}")


@pytest.fixture(autouse=True)
def nothing_was_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("MINARI_REMOTE", "nowhere://x")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / CANARY)!r}, 'w')\nTask = open")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    assert not (tmp_path / CANARY).exists(), "a file ran code"


class Bomb:
    """Unpickled, it leaves the canary."""

    def __reduce__(self):
        return open, (CANARY, "w")


def damage(content: bytes, draw: random.Random) -> bytes:
    """One to three accidents: flipped bytes, a cut, a hole, a repeated or a foreign block."""
    content = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        n = max(len(content), 1)
        i, length = draw.randrange(n), draw.choice([1, 4, 64, 512])
        kind = draw.choice(["flip", "flip", "cut", "hole", "repeat", "foreign"])
        if kind == "flip":
            for j in range(i, min(i + draw.choice([1, 8]), len(content))):
                content[j] ^= draw.randint(1, 255)
        elif kind == "cut":
            del content[i:]
        elif kind == "hole":
            content[i : i + length] = bytes(len(content[i : i + length]))
        elif kind == "repeat":
            content[i:i] = content[i : i + length]
        else:
            content[i : i + length] = draw.randbytes(length)
    return bytes(content)


@contextlib.contextmanager
def in_time(label):
    def late(*_):
        pytest.fail(f"{label} hangs")

    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def one_case(label, read, check=None) -> str:
    """ "good", "left" (with status 0) or "refused" with one line; anything else is an error."""
    try:
        with in_time(label), contextlib.redirect_stdout(io.StringIO()):
            found = read()
        if check:
            check(found)
        return "good"
    except InputError as error:
        line = str(error)
        assert line and "\n" not in line and len(line) < 700, line
        LINES[1].append(line)
        return "refused"
    except SystemExit as left:
        assert left.code == 0, left
        return "left"
    except Exception as error:
        error.add_note(label)
        raise


def every_case(path: Path, cases, read, check=None):
    """`read` each damaged form of a file, then the whole one: nothing was left that harms it."""
    original = path.read_bytes()
    try:
        found = []
        for case in cases:
            path.write_bytes(damage(original, random.Random(case)))
            found.append(one_case(f"{path.name}, case {case}", read, check))
    finally:
        path.write_bytes(original)
    assert found.count("refused") > len(found) / 10, found
    assert one_case(f"{path.name}, whole", read, check) == "good"
    print(f"\n{path.name}: {dict(Counter(found))}")


def finite(loaded):
    """What was let through is a dataset: equal lengths, finite, actions within their bounds."""
    data, _ = loaded
    for key in ("obs", "action", "reward", "next_obs", "terminal"):
        value = getattr(data, key)
        assert len(value) == len(data.obs) and value.isfinite().all(), key
    assert data.action.abs().max() <= 1 and (data.episode.diff() >= 0).all()


# ---- data ------------------------------------------------------------------------------------


def test_npz(cases):
    path = Path(write_log("log.npz"))
    every_case(path, cases(120), lambda: load_dataset(str(path), CPU, "none"), finite)


def test_hdf5(cases):
    arrays, path = np.load(write_log("log.npz")), Path("log.hdf5")
    with h5py.File(path, "w") as f:
        for key in ("observations", "actions", "rewards", "terminals", "timeouts"):
            f[key] = arrays[key] / 2 if key == "actions" else arrays[key]
    every_case(path, cases(120), lambda: load_dataset(str(path), CPU, "none"), finite)


def test_metadata_of_a_file(cases):
    """The JSON text inside, damaged before it is packed; or hostile."""
    arrays = dict(np.load(write_log("log.npz")))
    text, draw = json.dumps(META).encode(), random.Random(0)
    hostile = [
        {"env_id": "evil:X-v0"},
        {"env_id": "Pendulum-v1", "env_kwargs": {"x": "evil:X"}},
        {"env_id": "Pendulum-v1", "env_kwargs": {"g": [1] * 99}},
        {"env_id": "GymV21Environment-v0", "env_kwargs": {"env_id": "evil:X-v0"}},
        {"action_low": 1e29, "action_high": -1},
        {"max_episode_steps": 1e29},
        [[[[]]]],
        Bomb(),
    ]
    found = []
    for i in cases(60):
        if i < len(hostile):
            meta = hostile[i]
            arrays["metadata"] = np.array(meta if isinstance(meta, Bomb) else json.dumps(meta))
        else:
            arrays["metadata"] = np.array(damage(text, draw).decode("latin-1"))
        np.savez("log.npz", **arrays)
        eval_env = None if i % 2 else "none"
        found.append(one_case(f"metadata {i}", lambda: load_dataset("log.npz", CPU, eval_env)))
    print(f"\nmetadata of an npz: {dict(Counter(found))}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["metadata.json", "main_data.hdf5"])
def test_minari(cases, name):
    import minari
    from minari.data_collector import EpisodeBuffer

    box = gymnasium.spaces.Box(-9, 9, (3,), np.float32)
    episode = dict(
        observations=np.zeros((31, 3), np.float32),
        actions=np.zeros((30, 1), np.float32),
        rewards=np.ones(30),
        terminations=np.arange(30) == 29,
        truncations=np.zeros(30, bool),
    )
    minari.create_dataset_from_buffers(
        "test/log-v0",
        [EpisodeBuffer(id=i, **episode) for i in range(2)],
        observation_space=box,
        action_space=gymnasium.spaces.Box(-2, 2, (1,), np.float32),
        env="Pendulum-v1",
    )
    path = Path("minari/test/log-v0/data") / name
    if name == "metadata.json":  # whole, but hostile
        content = path.read_text()
        meta = json.loads(content)
        spec = json.loads(meta["env_spec"]) | {"entry_point": "evil:Task"}
        for change in ({}, {"id": "Foo-v0"}, {"id": "evil:Foo-v0"}, {"kwargs": {"x": "evil:X"}}):
            for gone in ("", "action_space", "observation_space"):
                new = {k: v for k, v in meta.items() if k != gone}
                path.write_text(json.dumps(new | {"env_spec": json.dumps(spec | change)}))
                one_case(f"{change} {gone}", lambda: load_dataset("test/log-v0", CPU))
        path.write_text(content)
    every_case(path, cases(50), lambda: load_dataset("test/log-v0", CPU), finite)


# ---- a run's files ---------------------------------------------------------------------------


def test_tensors(cases):
    """A checkpoint is read as it was written, or refused: a wrong number is never let through."""
    path = Path("checkpoint.pt")
    tensors = {"nets": {"w": torch.randn(50, 50)}, "step": 3, "rows": "[]"}
    torch.save(tensors, path)

    def same(found):
        assert found["step"] == 3 and torch.equal(found["nets"]["w"], tensors["nets"]["w"])

    every_case(path, cases(100), lambda: load_tensors(path), same)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a finished run, one that was stopped, and the log they were trained on."""
    here, root = os.getcwd(), tmp_path_factory.mktemp("fuzz")
    os.chdir(root)
    write_log("log.npz")
    start("bc", eval_env="Pendulum-v1", eval_every=10)
    with contextlib.suppress(SystemExit):
        start("bc", lambda run, t, _: setattr(run, "stopped", t == 9), name="stopped")
    os.chdir(here)
    return root


READERS = [("evaluate", "config.json", "load_run")]
READERS += [("report", name, "read_run") for name in ("config.json", "eval.csv", "summary.json")]


@pytest.mark.parametrize(("tool", "name", "function"), READERS)
def test_files_that_the_tools_read(cases, trained, tool, name, function):
    read = getattr(importlib.import_module(f"tools.{tool}"), function)
    shutil.copytree(trained, ".", dirs_exist_ok=True)
    path = folder("bc") / name
    every_case(path, cases(50), lambda: read(folder("bc")))


def test_a_module_that_a_run_names_is_imported_only_if_it_is_typed(trained, tmp_path):
    """A folder may come from anybody, its config.json too."""
    load_run = importlib.import_module("tools.evaluate").load_run
    shutil.copytree(trained, ".", dirs_exist_ok=True)
    path = folder("bc") / "config.json"
    config = json.loads(path.read_text())
    config["args"]["eval_env"] = "evil:X-v0"
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match="evil:X-v0, a module that would be imported: add --eval"):
        load_run(folder("bc"))
    assert load_run(folder("bc"), eval_env="none").task is None
    assert load_run(folder("bc"), eval_env="Pendulum-v1").task["env_id"] == "Pendulum-v1"
    assert not (tmp_path / CANARY).exists() and "evil" not in sys.modules


VALUES = [None, True, -1, 0, 1e400, 10**40, "x", "evil:X-v0", [], {}, [[]], {"a": {}}, "..", "\0"]
DEEP = ["[" * 99_999, '{"a":' * 99_999]


def poisoned(path: Path, draw: random.Random):
    """Replace a file of a run by something that reads well, or nearly so, and is wrong."""
    kind = draw.choice(["value", "value", "value", "value", "deep", "gone", "pipe", "folder"])
    if kind == "value" and path.suffix == ".json":
        content = json.loads(path.read_text())
        inner = draw.choice([content, *(x for x in content.values() if x and type(x) is dict)])
        inner[draw.choice(list(inner))] = draw.choice(VALUES)
        path.write_text(json.dumps(content))
    elif kind == "value" and path.suffix == ".pt":
        content = load_tensors(path)
        key = draw.choice(list(content))
        content[key] = draw.choice([*VALUES, Bomb(), torch.zeros(3), {"w": torch.zeros(1)}])
        torch.save(content, path)
    elif kind in ("value", "deep"):
        path.write_text(draw.choice(DEEP))
    else:
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
    return kind


def test_poisoned_folders(cases, trained):
    """--resume of a finished run and of a stopped one, after one or two files were replaced."""
    found = Counter()
    for case in cases(60):
        draw = random.Random(case)
        shutil.rmtree("runs", ignore_errors=True)
        shutil.copytree(trained, ".", dirs_exist_ok=True)
        name = draw.choice(["", "stopped"])
        path = folder(f"bc-{name}" if name else "bc")
        files = ["config.json", "checkpoint.pt", "summary.json", "eval.csv", "train.csv"]
        kinds = []
        for file in draw.sample([x for x in files if (path / x).exists()], draw.choice([1, 1, 2])):
            kinds.append((file, poisoned(path / file, draw)))
        values = dict(eval_env="none") if name else dict(eval_env="Pendulum-v1", eval_every=10)
        label = f"folder {case}: {kinds}"
        found[one_case(label, lambda: start("bc", name=name, resume=True, **values))] += 1
    print(f"\npoisoned folders: {dict(found)}")
    assert found["refused"]


# ---- flags -----------------------------------------------------------------------------------

ODD = (
    """0 -1 1 2 3 1e1 1e30 1e400 -inf inf nan None none auto True x evil:X-v0 log.npz ../..
0.5 1.5 -0.5 1e-300 9999999999999999999999999999999""".split()
    + ["", " ", "ü", "a b", "\n", "--"]
)


def test_combinations_of_flags(cases):
    """Two to five flags of a random file, with values that suit other flags."""
    write_log("log.npz")
    found, began = Counter(), time.time()
    names = ["bc", "td3_bc", "iql", "cql", "fisher_brc", "awr"]
    for case in cases(150):
        draw = random.Random(case)
        path = ROOT / "algorithms" / f"{draw.choice(names)}.py"
        Args = importlib.import_module(path.stem).Args
        values = short(Args) | dict(steps=2, eval_env="none", batch_size=4, out=f"runs{case}")
        words = [part for k, v in values.items() for part in (f"--{k.replace('_', '-')}", str(v))]
        for _ in range(draw.randint(1, 4)):
            name = draw.choice([k for k in vars(Args()) if k not in ("compile", "track")])
            flag = f"--{name.replace('_', '-')}"
            kind = type(getattr(Args(), name))
            if kind is bool:
                words.append(draw.choice([flag, f"--no-{flag[2:]}"]))
            elif draw.random() < 0.2:
                words.append(f"{flag}={draw.choice(ODD)}")
            else:
                words += [flag, draw.choice(ODD)]
        with in_time(" ".join(words)):
            lines, status = outcome(path, words)
        text = "\n".join(lines)
        assert "Traceback" not in text, (words, text)
        if status == 1:
            assert 0 < len(lines) < 30, (words, lines)
            LINES[1].append(lines[0])
        found[status] += 1
    print(f"\nflags, by exit status: {dict(found)} in {time.time() - began:.0f} s")
    assert found[1] and found[0]

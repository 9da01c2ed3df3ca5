"""What every file of algorithms/ must satisfy, whatever it computes."""

import dataclasses
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from short_runs import (
    ROOT,
    SCRIPTS,
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
    tracked,
)
from stand_in import PlainRun

from common import RunArgs
from harness import load_dataset, parse
from harness.run import preset_of

NAMES = [path.stem for path in SCRIPTS]
FILES = {path.stem: path for path in SCRIPTS}
EARLIER = [name for name in NAMES if re.search(r"^    phases\b", FILES[name].read_text(), re.M)]

algorithm = pytest.mark.parametrize("name", NAMES)


def some(*names):
    """These by default, all files with --soak."""
    return [x if x in names else pytest.param(x, marks=pytest.mark.soak) for x in NAMES]


def module(name):
    return importlib.import_module(name)


# ---- a whole run -----------------------------------------------------------------------------


@algorithm
def test_a_run_writes_its_folder_and_follows_its_seed(name, here):
    """The same seed gives the same numbers, however often they are evaluated; another one, other
    weights."""
    score = run_main(name, *flags(FILES[name], out="one"))
    one = folder(name, "one")
    assert {"config.json", "eval.csv", "train.csv", "checkpoint.pt", "summary.json"} <= {
        path.name for path in one.iterdir()
    }
    assert not list(one.glob("*.tmp"))
    assert (one / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert any(path.stat().st_size > 100 for path in one.glob("events.out.tfevents.*"))
    config = json.loads((one / "config.json").read_text())
    assert config["algorithm"] == name and config["args"]["seed"] == 3
    assert config["args"]["env"] == "log.npz" and config["args"]["batch_size"] == 8
    table = rows(one / "eval.csv")
    assert [row["step"] for row in table] == ["10", "20"]
    for row in table:
        mean = (float(row["episode_0"]) + float(row["episode_1"])) / 2
        assert np.isclose(float(row["return"]), mean) and -2000 < mean < 0
    assert [row["step"] for row in rows(one / "train.csv")] == ["5", "10", "15", "20"]
    values = [float(v) for row in rows(one / "train.csv") for v in row.values()]
    assert len(values) > 4 and np.isfinite(values).all()
    summary = json.loads((one / "summary.json").read_text())
    scores = [float(row["score"]) for row in table]
    assert score == summary["score"] == np.mean(scores) and summary["last"] == scores[-1]
    last = checkpoint(name, "one")
    assert (last["phase"], last["step"]) == ("train", 20)

    run_main(name, *flags(FILES[name], out="rare", eval_every=7))
    rare = folder(name, "rare")
    assert [row["step"] for row in rows(rare / "eval.csv")] == ["7", "14", "20"]
    assert rows(rare / "eval.csv")[-1] == table[-1] and last["step"] == 20
    for file in {path.name for path in one.glob("*.csv")} - {"eval.csv"}:
        assert rows(rare / file) == rows(one / file), f"the same seed gave another {file}"
    for key in ("nets", "opt", "rng"):
        assert same(last[key], checkpoint(name, "rare")[key]), f"eval_every changed {key}"
    assert run_main(name, *flags(FILES[name], out="other", seed=4, eval_env="none")) is None
    other = folder(name, "other", seed=4)
    nets = torch.load(other / "checkpoint.pt", weights_only=True)["nets"]
    assert not same(last["nets"], nets), "the seed changes nothing"
    assert not (other / "eval.csv").exists() and not (other / "curve.png").exists()


@algorithm
def test_phases_are_those_of_the_loop_in_order(name, here, whole):
    _, run = whole(name)
    ran = list(dict.fromkeys(phase for phase, _ in run.calls))
    declared = type(run.args).phases
    assert [phase for phase in declared if phase in ran] == ran, "Args.phases lists every phase"
    for phase, field in declared.items():
        if field and phase in ran:
            assert run.count(phase) == getattr(run.args, field), phase


@algorithm
def test_policy_is_within_the_bounds_and_looks_at_one_row_at_a_time(name, here):
    """policy(nets, obs, args): raw observations in, actions in the task's bounds out."""
    args, _ = parse(module(name).Args, module(name).PRESETS, flags(FILES[name]))
    data, _ = load_dataset("log.npz", "cpu", "none")
    torch.manual_seed(0)
    nets = module(name).Nets(data, args)

    def act(obs, seed=1):
        torch.manual_seed(seed)
        return module(name).policy(nets, obs, args)

    with torch.no_grad():
        obs = 100 * torch.randn(50, 3)
        a = act(obs)
        assert a.shape == (50, 1) and a.abs().max() <= 2
        assert torch.equal(a, act(obs))
        if torch.equal(a, act(obs, seed=2)):  # it acts without noise
            torch.testing.assert_close(a[7:8], act(obs[7:8]), atol=1e-5, rtol=1e-5)


SHIFTED = [name for name in NAMES if "    reward_shift: " in FILES[name].read_text()]


@pytest.mark.parametrize("name", SHIFTED)
def test_reward_shift_is_in_the_data_that_is_trained_on(name, here):
    shifted = []
    for shift in (0.0, -3.0):
        args, _ = parse(module(name).Args, {}, flags(FILES[name], reward_shift=shift))
        data, _ = load_dataset("log.npz", "cpu", "none")
        module(name).train(PlainRun(limit=1), data, args)
        shifted.append(data.reward)
    torch.testing.assert_close(shifted[1], shifted[0] - 3)


# ---- stop and continue -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(name): the folder of an uninterrupted run with evaluations, and the run; done once."""
    root, done = tmp_path_factory.mktemp("whole"), {}

    def make(name):
        if name not in done:
            _, done[name] = start(name, out=str(root), eval_env=None)
        return str(root), done[name]

    return make


@algorithm
def test_resume_continues_to_the_bit_in_every_phase(name, here, whole, capsys):
    """Stopped by a signal in the middle of each phase, and at the last step of the first one."""
    uncut, _ = whole(name)
    run_phases = [
        row for row in module(name).Args.phases if (folder(name, uncut) / f"{row}.csv").exists()
    ]
    draw = random.Random(name)
    for phase in run_phases:
        steps = (
            20 if phase == "train" else int(rows(folder(name, uncut) / f"{phase}.csv")[-1]["step"])
        )
        stops = [draw.randint(1, steps - 1) if steps > 1 else 1]
        stops += [steps] if phase == run_phases[0] != "train" else []
        for step in dict.fromkeys(stops):
            shutil.rmtree("parts", ignore_errors=True)
            number = draw.choice([signal.SIGINT, signal.SIGTERM])
            handler = signal.getsignal(number)
            with pytest.raises(SystemExit) as stopped:
                start(name, at(phase, step, stop_by(number)), out="parts", eval_env=None)
            assert signal.getsignal(number) is handler, "the run kept its signal handler"
            assert stopped.value.code == 130
            saved = checkpoint(name, "parts")
            assert (saved["phase"], saved["step"]) == (phase, step)
            assert not (folder(name, "parts") / "summary.json").exists()
            said = f"saved at {phase} step {step}; continue with: "
            assert said in capsys.readouterr().out
            _, run = start(name, out="parts", eval_env=None, resume=True)
            assert run.count(phase) == steps - step, "steps were repeated or lost"
            assert f"resumed after {phase} step {step}" in capsys.readouterr().out
            assert_same_run(name, uncut, "parts")


@pytest.mark.parametrize("name", some("td3_bc", "fisher_brc", "arq"))
def test_resume_twice_and_at_the_last_step(name, here, whole):
    for resume, step in ((False, 1), (True, 4), (True, 20)):
        with pytest.raises(SystemExit):
            hook = at("train", step, stop_by(signal.SIGTERM))
            start(name, hook, out="parts", eval_env=None, resume=resume)
    start(name, out="parts", eval_env=None, resume=True)
    assert (folder(name, "parts") / "summary.json").exists()
    assert_same_run(name, whole(name)[0], "parts")


@pytest.mark.parametrize("name", some("td3_bc"))
def test_kill_at_random_moments_changes_nothing(name, here, request):
    killed_at_random(name, kills=10 if request.config.getoption("--soak") else 2)


@pytest.mark.parametrize("name", EARLIER)
def test_shared_stages_are_keyed_by_their_length(name, here):
    """An earlier phase that a typed --steps shortens is another stage than the whole one."""
    fields = {field for field in module(name).Args.phases.values() if field not in ("steps", None)}
    words = flags(FILES[name], eval_env="none")
    for flag in {f"--{field.replace('_', '-')}" for field in fields} & set(words):
        i = words.index(flag)
        del words[i : i + 2]
    i = words.index("--steps")
    for n in (3, 4):
        run_main(name, *words[:i], "--steps", n, *words[i + 2 :], "--name", n)
    made = {}
    for path in Path("runs/cache").iterdir():
        made.setdefault(path.name.split("__")[1], []).append(path)
    assert made and all(len(paths) == 2 for paths in made.values()), made


# ---- flags -----------------------------------------------------------------------------------


@algorithm
def test_help_names_every_flag(name, capsys):
    with pytest.raises(SystemExit) as left:
        parse(module(name).Args, module(name).PRESETS, ["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(module(name).Args):
        assert f"--{field.name.replace('_', '-')}" in text, field.name
    assert module(name).__doc__.splitlines()[0].split(" (")[0] in text


@algorithm
def test_a_typed_flag_wins_over_the_preset_also_at_its_default(name):
    Args, presets = module(name).Args, module(name).PRESETS
    default = Args()
    for env in sorted({"log.npz", default.env, "antmaze-umaze-v2", "D4RL/pen/human-v2"}):
        args, preset = parse(Args, presets, ["--env", env])
        assert preset.items() <= preset_of(presets, env).items()
        for key, value in preset_of(presets, env).items():
            assert getattr(args, key) == value
            if isinstance(value, int | float) and not isinstance(value, bool):
                if getattr(default, key) is not None:
                    flag = f"--{key.replace('_', '-')}={getattr(default, key)}"
                    typed, _ = parse(Args, presets, ["--env", env, flag])
                    assert getattr(typed, key) == getattr(default, key), key


@algorithm
def test_presets_name_fields_and_match_the_path_of_no_file(name):
    Args, presets = module(name).Args, module(name).PRESETS
    assert parse(Args, presets, ["--env", "hopper-medium-v2.hdf5"])[1] == {}
    known = {field.name for field in dataclasses.fields(Args)}
    for pattern, values in presets.items():
        assert values and values.keys() <= known, pattern
        assert not {"env", "seed"} & values.keys(), pattern
        assert not values.keys() & {f.name for f in dataclasses.fields(RunArgs)} - {"eval_episodes"}
        assert pattern != "*", "what holds for all data is the default of a field"
        for suffix in (".npz", ".hdf5", ".h5", ".NPZ"):
            path = pattern.replace("*", "x") + suffix
            assert preset_of(presets, path) == {}, path
        if "/" in pattern:
            assert pattern.startswith(("D4RL/", "mujoco/")), f"{pattern}: nobody can get that data"


@algorithm
def test_the_bare_command_is_short(name):
    """Without flags a file trains on bundled data, with a preset that shortens the run."""
    Args, presets = module(name).Args, module(name).PRESETS
    assert (ROOT / "data" / f"{Args().env}.npz").exists()
    assert parse(Args, presets, [])[0].steps < Args().steps


@algorithm
def test_resolving_twice_is_resolving_once(name):
    for env in ("hopper-medium-v2", "antmaze-umaze-v2", "log.npz"):
        args, _ = parse(module(name).Args, module(name).PRESETS, ["--env", env])
        once = dict(vars(args))
        args.resolve()
        assert vars(args) == once


# ---- a file on its own -----------------------------------------------------------------------

ALONE = """
import sys, torch
from pathlib import Path
import stand_in
from common import Data
names = NAMES
for name in names:
    module = __import__(name)
    torch.manual_seed(0)
    obs, action = torch.randn(61, 3), torch.rand(60, 2) * 1.8 - 0.9
    data = Data(obs[:-1], action, torch.randn(60), obs[1:], (torch.arange(60) % 20 == 19).float())
    args = module.Args(batch_size=8)
    run = stand_in.PlainRun(limit=3)
    module.train(run, data, args)
    assert len(run.phases["train"]) == 3 and run.nets, name
    if run.act:
        assert run.act(torch.randn(4, 3)).shape == (4, 2), name
found = {m.split(".")[0] for m in sys.modules} & {"harness", "gymnasium", "tyro", "h5py", "minari"}
assert not found, found
"""


def test_files_train_alone_beside_common_py_and_a_stand_in(tmp_path):
    """Copied into an empty folder, without the harness."""
    (tmp_path / "algorithms").mkdir()
    for path in SCRIPTS:
        shutil.copy(path, tmp_path / "algorithms")
    for path in (ROOT / "common.py", ROOT / "tests" / "stand_in.py"):
        shutil.copy(path, tmp_path)
    code = ALONE.replace("NAMES", repr(NAMES))
    place = {"PYTHONPATH": f"{tmp_path}:{tmp_path / 'algorithms'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | place,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


IMPORT = """
import importlib, os, random, signal, sys, threading
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
    importlib.import_module(name)
slow = {"gymnasium", "mujoco", "minari", "tyro", "matplotlib", "tensorboard", "wandb", "h5py"}
assert not slow & sys.modules.keys(), slow & sys.modules.keys()
for name in TOOLS:
    importlib.import_module(name)
assert state() == before, "an import changed the state of the process"
"""


def test_importing_does_no_work(tmp_path):
    """The commands in tools/ may import what they need; nothing else imports a simulator."""
    tools = [f"tools.{path.stem}" for path in tracked("tools")]
    code = IMPORT.replace("ROOT", repr(str(ROOT))).replace("TOOLS", repr(tools))
    code = code.replace("NAMES", repr([*NAMES, "harness"]))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", some("td3_bc"))
def test_a_file_runs_as_its_user_starts_it(name, here):
    """A process of its own, in another folder: nothing on stderr, the same numbers as here."""
    command = [sys.executable, str(FILES[name]), *flags(FILES[name], out="one")]
    place = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=place)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line for line in done.stdout.splitlines() if not line.startswith("note: ")]
    assert lines[0].startswith(f"{name} on log.npz: 120 transitions, 4 episodes, return ")
    assert "; seed 3, cpu, precision highest (as typed)" in lines[0]
    assert lines[-1].startswith(f"{name} return -") and "| data " in lines[-1]
    run_main(name, *flags(FILES[name], out="two"))
    assert_same_run(name, "one", "two")


def test_a_users_own_file_is_not_tested(tmp_path):
    """Files that git does not track are left out; without git, all files count."""
    (tmp_path / "algorithms").mkdir()
    for name in ("mine", "ours"):
        (tmp_path / "algorithms" / f"{name}.py").touch()
    assert [path.stem for path in tracked("algorithms", tmp_path)] == ["mine", "ours"]
    for line in ("init -q", "add algorithms/ours.py"):
        subprocess.run(["git", "-C", str(tmp_path), *line.split()], check=True)
    assert [path.stem for path in tracked("algorithms", tmp_path)] == ["ours"]
    assert {"bc", "td3_bc", "fisher_brc"} <= set(NAMES)

"""run.py: flags and presets, files and tasks, evaluation, what a run says and when it stops."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from short_runs import (
    ROOT,
    SCRIPTS,
    Bomb,
    at,
    flags,
    folder,
    outcome,
    rows,
    run_main,
    start,
    write_log,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import run as page
from common import Adam, BatchSize, Count, InputError, NonNegative, RunArgs, Seed, Share, sample
from run import evaluate, flat, load, main, make, parse, prepare_device, score

CPU = torch.device("cpu")
BC = ROOT / "algorithms" / "bc.py"
META = {"env_id": "Pendulum-v1", "action_low": -2, "action_high": 2}

# ---- the command line ------------------------------------------------------------------------


@dataclass
class Args(RunArgs):
    phases: ClassVar = {"clone": "bc_steps", "rows": None, "train": "steps"}
    clone_flags: ClassVar = ("bc_steps",)
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
    share: Share | None = None
    """a share, or None"""
    widths: tuple[Count, ...] = (8, 8)
    """hidden units of each layer"""
    bc_steps: Count = 2000
    """gradient steps of the clone"""
    clone: str | None = None
    """a checkpoint"""

    def resolve(self):
        self.share = 0.5 if self.share is None else self.share


PRESETS = {
    "hopper-*": dict(steps=20, batch_size=32),
    "hopper-medium*": dict(steps=30, bc_steps=60),
    "short hopper-*": dict(steps=5),
    "ant[12]": dict(alpha=9.0),
    "*-singletask-*": dict(alpha=8.0),
    "*.npz": dict(alpha=7.0),
    "cube-*": dict(alpha=6.0),
}
READ = {  # what is typed: what it means
    "": dict(steps=30, batch_size=32, bc_steps=60, alpha=2.5, share=0.5),
    "--env hopper-random": dict(steps=20, bc_steps=2000),
    "--env=hopper-random-made": dict(steps=20),
    "--env ant1 --alpha 2.5": dict(alpha=2.5),
    "--env ant1": dict(alpha=9.0, steps=1000),
    "--env hopper-medium.npz": dict(alpha=2.5, steps=1000),
    "--env cube-singletask-v0": dict(alpha=8.0),
    "--env cube-v0": dict(alpha=6.0),
    "--short": dict(steps=5, bc_steps=60),
    "--steps 30": dict(steps=30, bc_steps=30),
    "--steps 3 --bc-steps 50": dict(steps=3, bc_steps=50),
    "--steps 1e2 --batch_size 1e3": dict(steps=100, batch_size=1000, bc_steps=60),
    "--share 1 --widths 7 1e1": dict(share=1.0, widths=(7, 10)),
}


@pytest.mark.parametrize("line", READ)
def test_flags_and_presets(line):
    args, preset = parse(Args, PRESETS, line.split())
    for name, value in READ[line].items():
        assert getattr(args, name) == value and type(getattr(args, name)) is type(value)
    assert all(getattr(args, name) == value for name, value in preset.items())
    assert ("alpha" in preset) == (args.alpha > 2.5)


REFUSED = (
    "--steps 0|--steps 1.5|--steps nan|--steps 1e13|--batch-size 1e7|--alpha -1|--alpha inf|"
    "--share 1.1|--widths 0|--seed -1|--stps 3|--dataset x|--precision half|--env|word|"
    "--steps ten|--clone x --bc-steps 3"
).split("|")


@pytest.mark.parametrize("line", REFUSED)
def test_flags_that_cannot_be_are_refused_with_status_1(line, capsys):
    with pytest.raises(SystemExit) as left:
        parse(Args, PRESETS, line.split())
    text = left.value.code if isinstance(left.value, InputError) else capsys.readouterr().err
    assert isinstance(left.value, InputError) or left.value.code == 1
    assert line.split()[0].strip("-")[:4] in text.replace("_", "-") and "Traceback" not in text


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_help_is_title_idea_command_and_flags(path):
    done = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True)
    text = " ".join(done.stdout.split())
    title, idea = (" ".join(x.split()) for x in path.read_text().strip('"').split("\n\n")[:2])
    assert done.returncode == 0 and title[:60] in text and idea[:40] in text
    assert f"python algorithms/{path.name}" in text.split("options")[0]
    assert text.index("options") < text.index("--seed") and "DEPARTURES" not in text


@pytest.mark.parametrize("name", ["nonsense", "cuda:99", ""])
def test_a_bad_device_is_refused(name):
    with pytest.raises(InputError, match="use cpu, cuda or auto$"):
        prepare_device(name, "highest")


def test_every_cpu_thread_flushes_subnormals():
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); from run import prepare_device;"
        "torch.set_num_threads(2); prepare_device('cpu', 'highest');"
        "print(int((torch.full((4_000_000,), 1e-38) * 0.1).count_nonzero()))"
    )
    assert subprocess.check_output([sys.executable, "-c", code, str(ROOT)]) == b"0\n"


# ---- files and tasks -------------------------------------------------------------------------


def rewrite(change, meta=META, seed=0):
    """log.npz with other columns or another task."""
    write_log("log.npz", meta, seed)
    with np.load("log.npz") as file:
        np.savez("log.npz", **{**file, **change})


def half():
    Path("log.npz").write_bytes(Path("log.npz").read_bytes()[:2000])


def bomb():
    rewrite({"rewards": np.array([Bomb()] * 120, object)})


def huge():
    """Zeros of a terabyte are a small file, as far as its directory says."""
    import zipfile

    with zipfile.ZipFile("log.npz", "w") as file:
        file.writestr("observations.npy", b"")
        file.filelist[0].file_size = 1 << 46


BAD = {  # what is done to log.npz, or its metadata; --eval-env; what the message says
    "half": (half, None, "BadZipFile"),
    "empty": (lambda: Path("log.npz").write_bytes(b""), None, "log.npz"),
    "text": (lambda: Path("log.npz").write_text("hello"), None, "log.npz"),
    "pickle": (bomb, None, "Object arrays cannot be loaded"),
    "no json": (lambda: rewrite({"metadata": np.array("{")}), None, "JSON"),
    "list": (lambda: rewrite({"metadata": np.array("[1]")}), None, "log.npz"),
    "unknown task": (META | {"env_id": "Pendulm-v1"}, None, "Pendul"),
    "number": (META | {"env_id": 3}, None, "log.npz"),
    "module": (META | {"env_id": "os:Pendulum-v1"}, None, "has a colon"),
    "module in kwargs": (META | {"env_kwargs": {"a": [{"b": "os:mkdir"}]}}, None, "has a colon"),
    "kwargs": (META | {"env_kwargs": {"nonsense": 1}}, None, "nonsense"),
    "no kwargs": (META | {"env_kwargs": [1]}, None, "log.npz"),
    "references": (META | {"ref_min_score": "a", "ref_max_score": "b"}, None, "log.npz"),
    "equal references": (META | {"ref_min_score": 1, "ref_max_score": 1}, None, "no score"),
    "bounds": (META | {"action_low": -3}, None, "is not of the task Pendulum-v1"),
    "many bounds": (META | {"action_low": [-2, -2]}, None, "log.npz"),
    "typed task": ({}, "Pendulm-v1", "Pendul"),
    "typed module": ({}, "nonsense:Pendulum-v1", "nonsense"),
    "other sizes": (META, "Wide-v0", "is not of the task Wide-v0: their (observation size"),
    "other bounds": ({}, "MountainCarContinuous-v0", "beyond the bounds [-1.] to [1.]"),
    "discrete": ({}, "CartPole-v1", "not floats"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("copy", [False, True], ids=["", "copy"])
def test_bad_files_and_tasks_are_one_message(here, monkeypatch, case, copy):
    change, eval_env, says = BAD[case]
    if copy:
        monkeypatch.setattr(page, "HERE", here)
    change() if callable(change) else write_log("log.npz", change)
    with pytest.raises(InputError) as caught:
        load("log.npz", "cpu", eval_env)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not Path("bomb").exists()


def test_arrays_beyond_the_memory_are_one_message(here):
    shutil.copy(BC, here)
    huge()
    lines, status = outcome(BC, flags(BC))
    assert status == 1 and "out of memory" in lines[-1] and "Traceback" not in "".join(lines)


@pytest.mark.parametrize("name", ["missing.npz", "log.hdf5", "hopper-medium-v2"])
def test_a_copy_refuses_public_names(here, monkeypatch, name):
    monkeypatch.setattr(page, "HERE", here)
    with pytest.raises(InputError, match="without the folder readers/"):
        load(name)


def test_bounds_limit_and_references_are_those_of_the_task_or_of_the_file(here):
    references = {"ref_min_score": -1000, "ref_max_score": 0}
    rewrite({}, {"env_id": "Pendulum-v1"} | references)
    data, task = load("log.npz")
    assert data.action_high.tolist() == [2] and score(task, [-500, 0]) == 75
    rewrite({}, META | {"env_id": "Pendulum-v0"} | references)
    for eval_env, due in (("Pendulum-v1", 75), ("Other-v0", -250)):
        assert score(load("log.npz", "cpu", eval_env)[1], [-500, 0]) == due
    assert load("log.npz", "cpu", "none")[1] is None
    with np.load("log.npz") as file:
        kept = {key: file[key] for key in file if key not in ("timeouts", "final_observations")}
    kept["terminals"] = np.zeros(120)
    np.savez("log.npz", **kept | {"metadata": np.array(json.dumps({"max_episode_steps": 30}))})
    assert load("log.npz", "cpu", "Pendulum-v1")[0].episode[-1] == 3, "the file's own limit"
    np.savez("log.npz", **kept | {"metadata": np.array("{}")})
    assert load("log.npz", "cpu", "Limited-v0")[0].episode[-1] == 2, "the task's"


@pytest.mark.parametrize(
    ("task", "returns", "due"),
    [
        ({}, [1, 3], 2),
        ({"ref_min_score": 1, "ref_max_score": 5}, [1, 2, 9], 75),
        ({"env_kwargs": {"continuing_task": False}}, [0, 3], 50),
        ({"success": True, "ref_min_score": 0, "ref_max_score": 1}, [0.1, 0, 7, 7], 75),
        ({"success": False, "env_kwargs": {"continuing_task": False}}, [4], 4),
    ],
)
def test_score(task, returns, due):
    assert score(task, returns) == due


@pytest.mark.parametrize("x", [math.nan, math.inf, 1e31])
def test_a_return_that_is_no_number_has_no_score(x):
    with pytest.raises(InputError):
        score({}, [1, x])


def test_a_policy_sees_the_mazes_parts_in_the_order_of_the_data():
    """The position, the goal, and the position again with the speed."""
    data, task = load("pointmaze-stitch-demo", "cpu")
    env = make(task)
    obs = flat(env.reset(seed=0)[0])
    place, goal = env.unwrapped.point_env.data.qpos, env.unwrapped.goal
    assert np.allclose(obs[:6], [*place, *goal, *place])
    assert torch.equal(data.obs[:, :2], data.obs[:, 4:6])


# ---- evaluation ------------------------------------------------------------------------------


class Paying(gymnasium.Env):
    """The k-th episode pays k steps of its seed, and ends after them."""

    observation_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-2, 2, (1,), np.float32)
    seeds: ClassVar = []  # of all episodes
    length: ClassVar = 3

    def reset(self, *, seed=None, options=None):
        self.seed, self.t, self.actions = seed, 0, []
        self.seeds.append(seed)
        return np.full(3, seed % 7, np.float32), {}

    def step(self, action):
        assert self.t < self.length, "stepped after its episode ended"
        self.t += 1
        self.actions.append(float(action[0]))
        return np.full(3, self.t, np.float32), float(self.seed), self.t == self.length, False, {}


class Wide(Paying):
    def reset(self, *, seed=None, options=None):
        return np.zeros(4, np.float32), {}


gymnasium.register("Paying-v0", Paying)
gymnasium.register("Wide-v0", Wide)
gymnasium.register("Other-v0", Paying)
gymnasium.register("Limited-v0", Paying, max_episode_steps=40)


class Acting(gymnasium.Wrapper):
    """Pays what is done and seen, so that a return tells every step."""

    def step(self, action):
        obs, _, *rest = self.env.step(action)
        return obs, float(action.sum() + obs.sum(dtype=float)), *rest


def noisy(obs):
    return obs[:, :1] / 9 + 0.1 * torch.randn(len(obs), 1)


def test_environments_are_used_again_and_training_keeps_its_random_stream():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    make = lambda: Acting(gymnasium.make("Pendulum-v1", max_episode_steps=9))
    due = evaluate(noisy, [make() for _ in range(7)], 50, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert len({*due}) == 7
    for count in (1, 3, 7):
        found = evaluate(noisy, [make() for _ in range(count)], 50, CPU, 7)
        assert np.array_equal(found, due)


def test_returns_are_undiscounted_sums_from_fixed_starts(monkeypatch):
    monkeypatch.setattr(Paying, "seeds", [])
    envs = [Paying() for _ in range(3)]
    assert evaluate(noisy, envs, 50, CPU).tolist() == [150, 153, 156]
    assert Paying.seeds == [50, 51, 52]


@pytest.mark.parametrize("case", ["endless", "nan"])
def test_an_evaluation_that_cannot_end_well_is_one_message(monkeypatch, case):
    monkeypatch.setattr(page, "LONGEST", 50)
    monkeypatch.setattr(Paying, "length", 10**9 if case == "endless" else 3)
    act = noisy if case == "endless" else lambda obs: noisy(obs) * math.nan
    with pytest.raises(InputError, match="no time limit, or actions are not finite"):
        evaluate(act, [Paying()], 1, CPU)


@pytest.mark.parametrize(
    ("log", "last"), [("log.npz", 10), ("antmaze-v2.npz", 1), ("log-singletask-v0.npz", 3)]
)
def test_the_score_is_the_mean_of_the_last_evaluations(here, monkeypatch, capsys, log, last):
    monkeypatch.setattr(Paying, "seeds", [])
    counts = iter(range(100))
    monkeypatch.setattr(page, "evaluate", lambda *_: np.array([next(counts) ** 3.0, 1.0]))
    write_log(log)
    final, run = start(
        "bc", env=log, eval_env="Paying-v0", eval_every=1, eval_episodes=2, steps=12
    )
    means = [(k**3 + 1) / 2 for k in range(12)]
    assert final == pytest.approx(np.mean(means[-last:]))
    summary = json.loads((run.folder / "summary.json").read_text())
    assert (summary["score"], summary["last"]) == (pytest.approx(final), means[-1])
    assert f"bc return {final:.1f} | data " in capsys.readouterr().out.splitlines()[-1]
    table = rows(run.folder / "eval.csv")
    assert [float(row["return"]) for row in table] == means and "episode_1" in table[0]
    assert (run.folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(run.folder)).Reload()
    assert [x.value for x in events.Scalars("charts/score")] == pytest.approx(means)


def test_runs_of_other_seeds_have_other_starts_and_few_environments_do(here, monkeypatch):
    starts, made = {}, []
    for seed in (3, 4):
        monkeypatch.setattr(Paying, "seeds", [])
        start("bc", eval_env="Paying-v0", eval_every=5, eval_episodes=3, seed=seed)
        seeds = Paying.seeds[1:]  # the first one is that of a look at the task
        starts[seed] = seeds[:3]
        assert seeds == 4 * starts[seed]
    assert len({*starts[3], *starts[4]}) == 6
    task = {"env_id": "Paying-v0", "make": lambda: made.append(1) or Paying(), "most_envs": 2}
    monkeypatch.setattr(page, "load", lambda *x: (load(*x[:2], "none")[0], task))
    start("bc", eval_env="Paying-v0", eval_every=10, eval_episodes=5, out="few")
    assert len(made) == 2


# ---- training --------------------------------------------------------------------------------


def drawn(seed, name, first_steps):
    """What two phases of a run draw in their first two steps, and the weights it begins with."""
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
    one, again, other = drawn(3, "one", 2), drawn(3, "again", 5), drawn(4, "other", 2)
    assert one == again
    different = [tuple(x) for x in (*one.values(), *other.values())]
    assert len(set(different)) == len(different) == 2 * (1 + 2 * 2 * 2)


def test_evaluation_changes_no_training(here):
    start("td3_bc", out="often", eval_env="Pendulum-v1", eval_every=2, eval_episodes=1)
    start("td3_bc", out="never")
    one, two = (rows(folder("td3_bc", out) / "train.csv") for out in ("often", "never"))
    assert one == two != []


def test_the_first_lines_tell_data_preset_and_folder(here, capsys):
    run_main("bc", *flags(BC))
    out = capsys.readouterr().out
    assert "data:   log.npz, 120 transitions, 4 episodes, return " in out
    assert "preset: none\n" in out and f"folder: {folder('bc')}, cpu\n" in out


@pytest.mark.parametrize(("value", "said"), [(1e6, 1), (-1e6, 1), (1.0, 0)])
def test_q_beyond_what_the_rewards_allow_is_named_once(here, capsys, value, said):
    runs_away = lambda run, t, metrics: metrics | {"q_mean": torch.tensor(value)}
    start("td3_bc", runs_away)
    out = capsys.readouterr().out
    assert out.count(f"note: q_mean is {value:.3g} at step 4, but no policy can") == said


@pytest.mark.parametrize("what", ["metric", "weight"])
def test_what_has_diverged_replaces_no_checkpoint(here, what):
    def diverge(run, metrics):
        if what == "weight":
            run.nets.actor.weights[0].data[0, 0] = math.nan
            return None
        return metrics | {"q_loss": torch.tensor(math.inf)}

    with pytest.raises(InputError, match="is not finite, training diverged; lower") as caught:
        start("td3_bc", at("train", 14 if what == "weight" else 12, diverge), save_every=7)
    assert ("weights" if what == "weight" else "q_loss") in str(caught.value)
    assert torch.load(folder("td3_bc") / "checkpoint.pt")["step"] in (7, 11)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce] can't allocate memory")])
def test_a_lack_of_memory_is_one_message(here, error):
    def fail(*_):
        raise error

    with pytest.raises(InputError, match="out of memory .*: use smaller data, a smaller --batch"):
        start("bc", at("train", 2, fail))
    error = RuntimeError("a mistake")
    with pytest.raises(RuntimeError, match="a mistake"):
        start("bc", at("train", 2, fail), overwrite=True)


# ---- three files and a dataset ---------------------------------------------------------------

ALONE = """
import runpy, sys, torch
torch.set_num_threads(1)
first = list(sys.path)
for line in LINES:
    path, *sys.argv[1:] = line.split()
    for name in [x for x in sys.modules if x in ("common", "run")]:
        del sys.modules[name]
    sys.path, sys.argv[0] = [path.rpartition("/")[0], *first], path
    runpy.run_path(path, run_name="__main__")
"""
SHORT = "--steps 5 --eval-every 4 --eval-episodes 2 --log-every 2 --device cpu"
DEFAULT = "hopper-medium-expert-demo.npz"


def test_three_files_and_a_dataset_are_the_whole_program(here):
    """Every file, in a folder that holds it, common.py, run.py and the data that it names by
    default, with a hole: the same files and numbers as in the repository, and --resume."""
    copied, cloned = [], []
    (here / "clone" / "data").mkdir(parents=True)
    with np.load(write_log(f"clone/data/{DEFAULT}")) as file:
        arrays = dict(file)
    arrays["final_observations"] = np.insert(arrays["final_observations"], 0, np.nan, 0)
    step = np.arange(120) + (np.arange(120) > 9)  # a hole after the tenth row
    np.savez(f"clone/data/{DEFAULT}", **arrays, step=step)
    shutil.copytree(ROOT / "algorithms", "clone/algorithms")
    for name in ("common.py", "run.py"):
        shutil.copy(ROOT / name, "clone")
    for path in SCRIPTS:
        place = here / "copy" / path.stem
        place.mkdir(parents=True)
        for file in (path, ROOT / "common.py", ROOT / "run.py", f"clone/data/{DEFAULT}"):
            shutil.copy(file, place)
        copied.append(f"{place / path.name} {SHORT} --out copied")
        cloned.append(f"clone/algorithms/{path.name} {SHORT} --out cloned")
    lines = [*copied, *cloned]
    code = ALONE.replace("LINES", repr(lines))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    assert len([*Path("copied").iterdir()]) == len(SCRIPTS)
    assert done.stdout.count("note: 1 of 120 rows lack a next observation") == len(lines)
    for one in Path("copied").iterdir():
        two = Path("cloned", one.name)
        plain = lambda place: {x.name for x in place.iterdir() if "tfevents" not in x.name}
        tables = {path.name for path in one.glob("*.csv")}
        assert plain(one) == plain(two) >= {"config.json", "checkpoint.pt", "summary.json"}
        for table in tables:
            assert rows(one / table) == rows(two / table) != [], f"{one}/{table}"
    resumed = ALONE.replace("LINES", repr([f"{copied[0]} --resume"]))
    done = subprocess.run([sys.executable, "-c", resumed], capture_output=True, text=True)
    assert (done.returncode, done.stdout.count("is finished")) == (0, 1), done.stderr

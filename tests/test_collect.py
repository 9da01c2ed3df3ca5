"""collect.py on a small task that ends in both ways, on Pendulum-v1, and in a maze."""

import contextlib
import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from short_runs import ROOT, no_stray_signal, outcome

from common import InputError
from harness.resume import load_tensors
from run import load, make, parse
from tools import collect

STEPS = SimpleNamespace(count=0, hook=None)  # of all Walks; the hook is called in each


class Walk(gymnasium.Env):
    """obs (step, position); ends at |position| > 1, or after 7 steps by a time limit."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Box(np.float32([-0.5]), np.float32([1.5]))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.x = 0, self.np_random.uniform(-0.1, 0.1)
        return np.array([self.t, self.x]), {}

    def step(self, action):
        STEPS.count += 1
        if STEPS.hook:
            STEPS.hook(STEPS.count)
        assert self.action_space.contains(action), action
        self.t, self.x = self.t + 1, self.x + float(action[0]) - 0.5
        return np.array([self.t, self.x]), self.x, abs(self.x) > 1, False, {}


gymnasium.register("Walk-v0", f"{__name__}:Walk", max_episode_steps=7)


@contextlib.contextmanager
def hook(function=None):
    """Count the steps of all Walks from 0 on, and call `function` with the count in each."""
    STEPS.count, STEPS.hook = 0, function
    try:
        yield STEPS
    finally:
        STEPS.hook = None


def signal_at(count, number):
    return lambda now: os.kill(os.getpid(), number) if now == count else None


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    with no_stray_signal():
        yield tmp_path


# Uniform actions nearly to the end; any return is medium, so the agent is at its first evaluation.
RANDOM = "--env Walk-v0 --level random --steps 300"
AGENT = "--env Walk-v0 --steps 500 --train-steps 10000 --random-steps 9990 --medium-return -1000"


def flags(line):
    return parse(collect.Args, {}, f"--device cpu --precision highest --seed 3 {line}".split())[0]


def run(line):
    """collect.py with the words of `line` as its flags."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        collect.collect(flags(line))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def arrays(path):
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def agent_returns(path):
    return json.loads(str(arrays(path)["metadata"]))["agent_returns"]


ROWS = ("observations", "actions", "rewards", "terminals", "timeouts", "final_observations")


def assert_same_rows(a, b):
    a, b = arrays(a), arrays(b)
    for key in ROWS:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def assert_whole_walks(path):
    """Each row is the one before it, a step on, or the first of an episode."""
    file = arrays(path)
    age, ends = file["observations"][:, 0], file["terminals"] | file["timeouts"]
    assert age[0] == 0 and ends[-1] and len(file["final_observations"]) == ends.sum()
    np.testing.assert_array_equal(age[1:], np.where(ends[:-1], 0, age[:-1] + 1))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of an agent of 10,000 steps, and of the dataset of all of them."""
    folder = tmp_path_factory.mktemp("agent")
    run(f"{AGENT} --level full-replay --flat {folder}/full.npz --agent {folder}/walk.pt")
    return folder


# ---- what is written -------------------------------------------------------------------------


def by_hand(seed, steps):
    """What "random" must hold for Walk-v0: every row with its true next observation."""
    env, rows = gymnasium.make("Walk-v0"), []
    torch.manual_seed(seed)
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
    run(f"{RANDOM} --flat walk.npz")
    assert [path.name for path in Path().iterdir()] == ["walk.npz"]
    obs, action, reward, next_obs, terminal, timeout = by_hand(3, 300)
    ends = terminal | timeout
    assert terminal.sum() > 2 and timeout.sum() > 2, "the walk must end in both ways"
    assert terminal[obs[:, 0] == 6].any(), "and in both at once, which is a terminal"
    file = arrays("walk.npz")
    for key, want in zip(ROWS, (obs, action, reward, terminal, timeout, next_obs[ends])):
        assert file[key].shape == want.shape
        np.testing.assert_allclose(file[key], want, rtol=1e-6, atol=1e-6, err_msg=key)
    assert file["observations"].dtype == file["actions"].dtype == np.float32
    assert file["terminals"].dtype == file["timeouts"].dtype == bool
    assert not (file["terminals"] & file["timeouts"]).any()
    meta = json.loads(str(file["metadata"]))
    assert (meta["env_id"], meta["level"], meta["seed"]) == ("Walk-v0", "random", 3)
    assert meta["ref_min_score"] is None and meta["versions"]["torch"] == torch.__version__

    data, task = load("walk.npz")
    assert task["env_id"] == "Walk-v0" and len(data.obs) == 300
    assert len(data.episode_return) == ends.sum() and "dropped" not in capsys.readouterr().out
    np.testing.assert_allclose(data.next_obs, next_obs, rtol=1e-6, atol=1e-6)  # time limits too
    np.testing.assert_array_equal(data.terminal, terminal)  # so that every time limit bootstraps
    np.testing.assert_allclose(data.action, action - 0.5, atol=1e-6)  # bounds to [-1, 1]
    returns = [r.sum() for r in np.split(reward, np.flatnonzero(ends)[:-1] + 1)]
    np.testing.assert_allclose(data.episode_return, returns, rtol=1e-4, atol=1e-5)


def test_a_file_trains_without_its_task():
    """Bounds other than [-1, 1] must come with the file, as --eval-env none builds no task."""
    run(f"{RANDOM} --flat walk.npz")
    data, task = load("walk.npz", eval_env="none")
    assert task is None and data.action.abs().max() <= 1
    assert torch.equal(data.action, load("walk.npz")[0].action)


def test_pendulum_has_time_limits_only():
    run("--env Pendulum-v1 --level random --steps 450 --flat pendulum.npz")
    data, task = load("pendulum.npz")
    assert (len(data.obs), len(data.episode_return), task["env_id"]) == (450, 3, "Pendulum-v1")
    assert not data.terminal.any() and data.episode.bincount().tolist() == [200, 200, 50]
    for i in (199, 399, 449):  # one step of the pendulum's own equation, through the time limit
        cos, sin, speed = data.obs[i].tolist()
        torque = np.clip(2 * data.action[i].item(), -2, 2)
        speed = np.clip(speed + (15 * sin + 3 * torque) * 0.05, -8, 8)
        angle = np.arctan2(sin, cos) + speed * 0.05
        want = [np.cos(angle), np.sin(angle), speed]
        np.testing.assert_allclose(data.next_obs[i], want, atol=1e-4)


def test_minari_has_the_rows_of_the_flat_file():
    run(f"{RANDOM} --flat walk.npz")
    run(f"{RANDOM} --dataset-id walk/random-v0")
    (a, task_a), (b, task_b) = load("walk.npz"), load("walk/random-v0")
    for name in ("obs", "action", "reward", "next_obs", "terminal", "episode", "episode_return",
                 "action_low", "action_high"):  # fmt: skip
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.digest == b.digest and task_a["env_id"] == task_b["env_id"] == "Walk-v0"


LEVELS = {
    "medium-replay": 5_000,
    "full-replay": 10_000,
    "medium": 500,
    "expert": 500,
    "medium-expert": 1_000,
}


@pytest.mark.parametrize("level", LEVELS)
def test_levels_are_cut_from_one_agent(level, trained, capsys):
    """--agent keeps it: no other level trains again, and its file stays as it is."""
    shutil.copy(trained / "walk.pt", "walk.pt")
    before = Path("walk.pt").read_bytes()
    with hook() as steps:
        run(f"{AGENT} --level {level} --flat walk.npz --agent walk.pt")
    assert steps.count == (0 if "replay" in level else LEVELS[level]), "it was trained again"
    assert "continuing after 10,000 online steps" in capsys.readouterr().out
    assert Path("walk.pt").read_bytes() == before
    file = arrays("walk.npz")
    assert [t for t, _ in agent_returns("walk.npz")] == [5_000, 10_000]
    assert len(file["rewards"]) == len(load("walk.npz")[0].obs) == LEVELS[level]
    assert_whole_walks("walk.npz")
    if level == "medium-expert":
        assert (file["terminals"] | file["timeouts"])[499], "the halves are of different episodes"
    if level == "medium-replay":
        full = arrays(trained / "full.npz")
        np.testing.assert_array_equal(file["observations"], full["observations"][:5_000])
    if level == "full-replay":
        assert_same_rows("walk.npz", trained / "full.npz")


def test_an_agent_of_its_own_gives_the_same_rows(trained):
    """Without --agent it is trained as far as the level asks, and removed at the end."""
    for level, counts in {"medium": [5_000], "medium-replay": [5_000]}.items():
        run(f"{AGENT} --level {level} --flat {level}.npz")
        assert [t for t, _ in agent_returns(f"{level}.npz")] == counts
        assert not Path(f"{level}.npz.agent.pt").exists()
        run(f"{AGENT} --level {level} --flat cut.npz --agent {trained}/walk.pt --overwrite")
        assert_same_rows(f"{level}.npz", "cut.npz")


def test_medium_and_expert_by_their_steps(trained):
    """--medium-step and --expert-step name other policies of the same agent."""
    kept = f"{AGENT} --agent {trained}/walk.pt"
    run(f"{kept} --level expert --flat expert.npz")
    run(f"{kept} --level medium --medium-step 10000 --flat late.npz")
    run(f"{kept} --level expert --expert-step 5000 --flat early.npz")
    run(f"{kept} --level medium --flat medium.npz")
    assert_same_rows("late.npz", "expert.npz")
    assert_same_rows("early.npz", "medium.npz")
    different = arrays("early.npz")["actions"] != arrays("late.npz")["actions"]
    assert different.any(), "updates changed nothing"


def test_training_that_pauses_for_a_recording_cuts_the_episode(here):
    """medium-expert records between two parts of the training, which goes on in a new episode."""
    run(f"{AGENT} --level medium-expert --flat both.npz --agent walk.pt")
    run(f"{AGENT} --level full-replay --flat full.npz --agent walk.pt")
    assert arrays("full.npz")["timeouts"][4_999]
    assert_whole_walks("full.npz")


# ---- stopping, continuing --------------------------------------------------------------------


class Saving(collect.Collector):
    """Saves the agent all the time."""

    def step(self, recorder, obs, actor):
        if recorder.size % 500 == 7:
            self.save()
        return super().step(recorder, obs, actor)


def test_saving_on_the_way_changes_nothing():
    """The agent is saved in the middle of an episode, which goes on afterwards."""
    args = flags(f"{AGENT} --train-steps 5000 --random-steps 4950 --level expert --flat x.npz")
    states = []
    for kind in (collect.Collector, Saving):
        job = kind(args)
        recorded = collect.record(job, args, goal=None).state()
        Path("x.npz.agent.pt").unlink()
        states.append(recorded | {f"replay {k}": v for k, v in job.replay.state().items()})
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


@pytest.mark.parametrize(("number", "n"), [(signal.SIGTERM, 4_990), (signal.SIGINT, 4_970)])
def test_interrupted_training_continues(number, n, trained, capsys):
    """After its first updates, and before them."""
    line = f"{AGENT} --train-steps 5000 --random-steps 4980 --level expert --flat walk.npz"
    with hook(signal_at(n, number)), pytest.raises(SystemExit) as left:
        run(line)
    assert left.value.code == 130
    out = capsys.readouterr().out
    assert "stopped; saved to walk.npz.agent.pt; the same command continues" in out
    assert [path.name for path in Path().iterdir()] == ["walk.npz.agent.pt"]
    saved = load_tensors(Path("walk.npz.agent.pt"))
    assert len(saved["replay"]["obs"]) == n
    assert saved["opt"][0][-2] == max(0, n - 4_980), "Adam's count of the critics"
    run(f"{line} --agent walk.npz.agent.pt")
    assert f"continuing after {n:,} online steps" in capsys.readouterr().out
    finished = load_tensors(Path("walk.npz.agent.pt"))
    replay = finished["replay"]
    assert len(replay["obs"]) == 5_000 and finished["opt"][0][-2] == 20
    assert torch.equal(replay["obs"][:n], saved["replay"]["obs"])
    assert replay["cut"][n - 1] or replay["terminal"][n - 1], "the episode in progress is cut"
    assert replay["obs"][n, 0] == 0, "a new episode follows"
    drawn = (replay["action"][:4_980] + 1).numpy() - np.float32(0.5)  # one random stream
    np.testing.assert_array_equal(drawn, arrays(trained / "full.npz")["actions"][:4_980])
    assert len(arrays("walk.npz")["rewards"]) == 500


def test_an_interrupted_recording_starts_again(trained, capsys):
    """The agent is not trained again, and nothing else is written."""
    shutil.copy(trained / "walk.pt", "walk.pt")
    kept = f"{AGENT} --level medium --agent walk.pt"
    run(f"{kept} --flat whole.npz")
    for line, steps in ((RANDOM, 300), (kept, 500)):
        with hook(signal_at(100, signal.SIGINT)), pytest.raises(SystemExit) as left:
            run(f"{line} --flat x.npz")
        assert left.value.code == 130 and not Path("x.npz").exists()
        said = "stopped; the recording is lost; the same command starts it again"
        assert said in capsys.readouterr().out
        with hook() as counted:
            run(f"{line} --flat x.npz --overwrite")
        assert counted.count == steps == len(arrays("x.npz")["rewards"])
        Path("last.npz").unlink(missing_ok=True)
        Path("x.npz").rename("last.npz")
    assert_same_rows("last.npz", "whole.npz")


def test_the_agent_of_another_command(trained):
    kept = f"{AGENT} --level medium --flat x.npz --agent {trained}/walk.pt"
    for other in ("--seed 4", "--random-steps 20", "--env Pendulum-v1"):
        with pytest.raises(InputError, match="walk.pt holds another agent .*: repeat its command"):
            run(f"{kept} {other}")
    Path("damaged.pt").write_bytes(b"damaged")
    with pytest.raises(InputError, match="damaged.pt cannot be read"):
        run(f"{AGENT} --level medium --flat x.npz --agent damaged.pt")


def test_a_dataset_is_not_replaced_unasked():
    for target in ("--flat walk.npz", "--dataset-id walk/random-v0"):
        run(f"{RANDOM} {target}")
        with pytest.raises(InputError, match="exists: add --overwrite"):
            run(f"{RANDOM} {target}")
        run(f"{RANDOM} {target} --overwrite --steps 30")
    assert len(load("walk.npz")[0].obs) == 30
    assert len(load("walk/random-v0")[0].obs) == 30


def occupy(path):
    """Put a folder where a file is about to be written, which fails as on a full disk."""

    def now(count):
        if count == 100:
            (Path(path) / "full").mkdir(parents=True)

    return now


def test_a_full_disk_at_the_end_loses_no_agent(trained):
    shutil.copy(trained / "walk.pt", "walk.pt")
    kept = f"{AGENT} --level medium --agent walk.pt"
    run(f"{kept} --flat whole.npz")
    words = "x.npz: Is a directory; free some space and repeat the command"
    with hook(occupy("x.npz")), pytest.raises(InputError, match=words):
        run(f"{kept} --flat x.npz")
    shutil.rmtree("x.npz")
    with hook() as steps:
        run(f"{kept} --flat x.npz")
    assert steps.count == 500, "the agent was trained again"
    assert_same_rows("x.npz", "whole.npz")


def test_a_full_disk_on_the_way(capsys):
    """An agent that cannot be saved is said; the work goes on."""
    line = f"{AGENT} --train-steps 5000 --level expert --flat x.npz --agent walk.pt"
    with hook(occupy("walk.pt")):
        run(line)
    assert "walk.pt not saved (Is a directory): free some space" in capsys.readouterr().err
    assert len(arrays("x.npz")["rewards"]) == 500


# ---- the maze --------------------------------------------------------------------------------

MAZE = "--env PointMaze_Medium-v3 --steps 500 --level homing"


def test_the_mazes_pieces():
    """Each episode is a walk of at most four cells from anywhere; the task is from one cell to
    another, eight cells away, which no episode shows."""
    run(f"{MAZE} --flat maze.npz")
    assert not list(Path().glob("*.agent.pt"))
    file = arrays("maze.npz")
    assert len(file["rewards"]) == 500 and np.abs(file["actions"]).max() < 1
    meta = json.loads(str(file["metadata"]))
    assert meta["algorithm"] == "controller" and meta["agent_returns"] == []
    data, task = load("maze.npz")
    assert task["env_id"] == "PointMaze_Medium-v3" and task["success"]
    maze = make(task).unwrapped.maze
    ends = np.flatnonzero(file["terminals"] | file["timeouts"])
    starts = np.r_[0, ends[:-1] + 1]
    where = file["observations"][:, :2]  # the position comes first: achieved_goal
    cells = [tuple(maze.cell_xy_to_rowcol(xy)) for xy in where]
    assert len({cells[i] for i in starts}) > 3
    for a, b in zip(starts, ends):
        paths = collect.paths_from(maze.maze_map, cells[a])
        assert max(len(paths[cell]) for cell in cells[a : b + 1]) <= 4
    env = make(task)
    obs, _ = env.reset(seed=0)
    start = tuple(env.unwrapped.maze.cell_xy_to_rowcol(obs[:2]))
    goal = tuple(env.unwrapped.maze.cell_xy_to_rowcol(env.unwrapped.goal))
    assert (start, goal) == (collect.START, collect.GOAL)
    assert len(collect.paths_from(maze.maze_map, start)[goal]) == 8
    assert env.spec.max_episode_steps == collect.LIMIT
    run(f"{MAZE} --flat again.npz")
    assert_same_rows("maze.npz", "again.npz")


def test_homing_walks_end_nearer_home():
    env = collect.make_env("PointMaze_Medium-v3", continuing_task=False)
    maze = env.unwrapped.maze
    paths = collect.paths_from(maze.maze_map, collect.START)
    nearer = []
    for homing in (0.0, 1.0):
        walks = collect.drive_maze(env, 3000, 0, lambda: None, homing)
        ends = [walks.obs[[e.start, e.stop - 1], :2].numpy() for e in walks.episodes()]
        cells = [[tuple(maze.cell_xy_to_rowcol(xy)) for xy in pair] for pair in ends]
        nearer.append(np.mean([len(paths[b]) < len(paths[a]) for a, b in cells]))
    assert nearer[0] < 0.7 and nearer[1] > 0.9


def test_paths_are_the_shortest():
    maze = [[1, 1, 1, 1, 1], [1, "r", 0, 0, 1], [1, 0, 1, 0, 1], [1, 0, 0, "g", 1], [1] * 5]
    paths = collect.paths_from(maze, (1, 1))
    assert len(paths) == 8 and paths[1, 1] == []
    assert len(paths[3, 3]) == 4 and paths[1, 3] == [(1, 2), (1, 3)]
    marked = collect.maze_with(maze, [(1, 2), (1, 3)], (3, 1))
    assert marked[1] == [1, 0, "r", "r", 1] and marked[3] == [1, "g", 0, 0, 1]


def test_an_interrupted_controller_stops():
    args = flags(f"{MAZE} --flat maze.npz")
    job = collect.Collector(args)
    job.stopped = True
    with pytest.raises(SystemExit) as left:
        collect.record(job, args, None)
    assert left.value.code == 130


# ---- refusals --------------------------------------------------------------------------------

BAD = {
    "--env CartPole-v1 --level random --flat x.npz": "CartPole-v1 has Discrete",
    "--env foo:bar-v1 --level random --flat x.npz": "No module named 'foo'",
    "--env Nope-v1 --flat x.npz": "--env Nope-v1: Environment `Nope` doesn't exist",
    "--env Hoper-v5 --level random --flat x.npz": "Did you mean: .Hopper.*Use the id",
    "--env Walk-v0 --level random": "use --flat FILE.npz or --dataset-id",
    "--env Walk-v0 --flat x.npz --dataset-id a/b-v0": "one of the two",
    "--env Walk-v0 --level medium --flat x.npz": "no reference score: use --medium-return",
    "--env Walk-v0 --level random --steps 0 --flat x.npz": "--steps is 0: use a whole number",
    "--env Walk-v0 --level expert --train-steps 60 --flat x.npz": "use a multiple of 5,000",
    "--env Walk-v0 --level expert --expert-step 7000 --flat x.npz": "--expert-step is 7000",
    "--env Walk-v0 --level random --flat x.npz --device tpu9": "--device tpu9: ",
    "--env Walk-v0 --level random --flat file/x.npz": "a folder that exists",
    "--env Walk-v0 --level random --flat x.hdf5": "a name ending in .npz",
    "--env Walk-v0 --level random --dataset-id walk": "use one like hopper/medium-replay-v0",
    "--env Walk-v0 --level expert --flat x.npz --agent no/agent.pt": "--agent no/agent.pt: use",
    "--env Walk-v0 --level homing --flat x.npz": "drives PointMaze_Medium-v3, not Walk",
    "--env PointMaze_UMaze-v3 --level homing --flat y.npz": "drives PointMaze_Medium-v3, not",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line(line, here):
    (here / "file").touch()
    with hook() as steps:
        lines, status = outcome(ROOT / "tools" / "collect.py", line.split())
    assert status == 1 and len(lines) == 1, lines
    assert re.search(BAD[line], lines[0]), lines
    assert not steps.count, "found out after the work"
    assert [path.name for path in here.iterdir()] == ["file"]


def test_an_unknown_level_is_refused(here):
    lines, status = outcome(ROOT / "tools" / "collect.py", ["--level", "best", "--flat", "x.npz"])
    assert status and "medium-expert" in " ".join(lines)


def test_a_return_that_is_never_reached(trained):
    kept = f"{AGENT} --level medium --flat walk.npz --agent {trained}/walk.pt"
    with pytest.raises(InputError, match=r"no policy reached a return of 1000 .*--train-steps"):
        run(f"{kept} --medium-return 1000")
    run(kept)  # the same agent's
    assert len(arrays("walk.npz")["rewards"]) == 500


def test_help(capsys):
    with pytest.raises(SystemExit) as left:
        parse(collect.Args, {}, ["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "--medium-return" in text and "the agent's first --train-steps" in text

"""data/make/collect.py on a small task that ends in both ways, on Pendulum-v1, and in a maze."""

import json
import re
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import tyro
from short_runs import ROOT, outcome

from data.make import collect
from run import flat, load, make

STEPS = SimpleNamespace(count=0)  # of all Walks


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
        assert self.action_space.contains(action), action
        self.t, self.x = self.t + 1, self.x + float(action[0]) - 0.5
        return np.array([self.t, self.x]), self.x, abs(self.x) > 1, False, {}


gymnasium.register("Walk-v0", f"{__name__}:Walk", max_episode_steps=7)

# Uniform actions nearly to the end.
ROWS = ("observations", "actions", "rewards", "terminals", "timeouts", "final_observations")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line):
    """collect.py with the words of `line` as its flags; the steps that it took."""
    STEPS.count = 0
    words = f"--seed 3 {line}".split()
    collect.collect(tyro.cli(collect.Args, args=words))
    return STEPS.count


def arrays(path):
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def assert_same_rows(a, b):
    a, b = arrays(a), arrays(b)
    for key in ROWS:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def agent_returns(path):
    return json.loads(str(arrays(path)["metadata"]))["agent_returns"]


# ---- the maze --------------------------------------------------------------------------------


def test_the_mazes_pieces():
    """Each episode is a walk of at most four cells from anywhere; the task is from one cell to
    another, eight cells away, which no episode shows."""
    for name in ("maze", "again"):
        run(f"--env PointMaze_Medium-v3 --steps 3000 --level homing --flat {name}.npz")
    assert_same_rows("maze.npz", "again.npz")
    file, (_, task) = arrays("maze.npz"), load("maze.npz")
    env = make(task)
    obs, _ = env.reset(seed=0)
    maze = env.unwrapped.maze
    cell_of = lambda xy: tuple(maze.cell_xy_to_rowcol(xy))
    ends = np.flatnonzero(file["terminals"] | file["timeouts"])
    starts = np.r_[0, ends[:-1] + 1]
    cells = [cell_of(xy) for xy in file["observations"][:, :2]]
    assert len({cells[i] for i in starts}) > 3
    for a, b in zip(starts, ends):
        paths = collect.paths_from(maze.maze_map, cells[a])
        assert max(len(paths[cell]) for cell in cells[a : b + 1]) <= 4
    start, goal = cell_of(flat(obs)[:2]), cell_of(env.unwrapped.goal)
    assert (start, goal) == (collect.START, collect.GOAL)
    assert len(collect.paths_from(maze.maze_map, start)[goal]) == 8
    assert env.spec.max_episode_steps == collect.LIMIT


# ---- the agent -------------------------------------------------------------------------------


def test_the_agents_rows(monkeypatch):
    """Two rollouts of one agent, the first of an earlier stage; the same command repeats them."""
    monkeypatch.setattr(collect, "EVAL_EVERY", 20)
    monkeypatch.setattr(collect, "RANDOM_STEPS", 10)
    line = "--env Walk-v0 --level medium-expert --medium-step 20 --expert-step 40 --steps 30"
    for name in ("one", "two"):
        run(f"{line} --flat {name}.npz")
    assert_same_rows("one.npz", "two.npz")
    assert len(arrays("one.npz")["actions"]) == 60 and len(agent_returns("one.npz")) == 2
    run(line.replace("medium-expert", "full-replay"))
    rows = arrays("data.npz")
    assert len(rows["actions"]) == 40 and (np.ptp(rows["actions"][10:], 0) > 0.1).all()


# ---- refusals --------------------------------------------------------------------------------

BAD = {
    "--env CartPole-v1 --level homing": "CartPole-v1 has Discrete",
    "--env Walk-v0 --expert-step 60": "use multiples of 5,000",
    "--env Walk-v0 --level homing --flat file/x.npz": "a folder that exists",
    "--env Walk-v0 --level homing --flat x.hdf5": "a name ending in .npz",
    "--env Walk-v0 --level homing --flat there.npz": "exists: move it away",
    "--env PointMaze_UMaze-v3 --level homing": "drives PointMaze_Medium-v3, not",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line(line, here):
    for name in ("file", "there.npz"):
        (here / name).touch()
    STEPS.count = 0
    lines, status = outcome(ROOT / "data" / "make" / "collect.py", line.split())
    assert status == 1 and len(lines) == 1 and re.search(BAD[line], lines[0]), lines
    assert not STEPS.count, "found out after the work"

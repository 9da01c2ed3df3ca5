"""Tasks that need more than gymnasium.make: packages that register them, OGBench's score, the
robots and ant mazes of D4RL's recordings. Beside them, the tables of data/."""

import contextlib
import csv
import difflib
import importlib
import io
import warnings
from functools import partial
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
from gymnasium.wrappers import TransformObservation

from common import InputError

DATA_DIR = Path(__file__).resolve().parents[1] / "data"
ROBOTS = "d4rl_robots.csv"
ROBOTICS = ("AntMaze", "PointMaze", "AdroitHand", "FrankaKitchen", "Fetch", "HandReach")
HEAVY = ("cube", "scene", "puzzle")  # OGBench's: 150 MB and a second to make, each
INSTALL = {
    "ogbench": "pip install ogbench 'mujoco<3.11'",
    "gymnasium_robotics": "pip install 'gymnasium-robotics>=1.4' 'mujoco<3.11'",
}

# ---- any task --------------------------------------------------------------------------------


def task_of(env_id: str, kwargs: dict) -> dict:
    """What run.py's metadata need for tasks that it cannot make or score by itself; {} for all
    others."""
    single = "-singletask" in env_id
    if not single and not env_id.startswith(ROBOTICS):
        return {}
    found = {"make": partial(make, env_id, **kwargs), "success": single or sparse(env_id, kwargs)}
    return found | ({"most_envs": 16} if single and env_id.startswith(HEAVY) else {})


def make(env_id: str, **options):
    """gymnasium.make for the tasks of all packages that are known here."""
    register(env_id)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # -v4 is out of date on purpose: closest to D4RL
        env = gymnasium.make(env_id, **options)
    return Success(env) if "-singletask" in env_id else env


def register(env_id: str) -> None:
    """Import the package of a task. Raises InputError where it is not installed."""
    package = "ogbench" if "-singletask" in env_id else "gymnasium_robotics"
    if package == "gymnasium_robotics" and not env_id.startswith(ROBOTICS):
        return
    # The import prints a notice about Adroit's rewards; a note of ours tells (d4rl_tasks.csv).
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            importlib.import_module(package)
        except ImportError as error:
            line = f"{env_id} needs {package} ({error!s:.100}): {INSTALL[package]}"
            raise InputError(f"{line}, or use --eval-env none") from None
    # The action bounds of OGBench's arms are float64, which Gymnasium says at every reset.
    warnings.filterwarnings("ignore", ".*precision lowered by casting")


def sparse(env_id: str, kwargs: dict) -> bool:
    """Whether a task is a maze whose reward only says that the goal was reached, once."""
    once = env_id.startswith("AntMaze") or kwargs.get("continuing_task") is False
    dense = "Dense" in env_id or kwargs.get("reward_type") == "dense"
    return "Maze" in env_id and once and not dense


class Success(gymnasium.Wrapper):
    """The reward is 1 where the task is solved, which ends the episode, and 0 elsewhere: OGBench's
    score is the share of such episodes.

    OGBench's mazes draw from numpy's global generator, so that a seed for reset alone does not
    repeat an episode; here every environment has a generator of its own in its place."""

    def __init__(self, env):
        super().__init__(env)
        self.state = np.random.RandomState().get_state()

    def own(self, call, *args, **options):
        """call(*args, **options), which draws from this environment's generator."""
        outer = np.random.get_state()
        np.random.set_state(self.state)
        try:
            return call(*args, **options)
        finally:
            self.state = np.random.get_state()
            np.random.set_state(outer)

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.state = np.random.RandomState(seed).get_state()
        return self.own(self.env.reset, seed=seed, options=options)

    def step(self, action):
        obs, _, terminal, timeout, info = self.own(self.env.step, action)
        return obs, float(info["success"]), terminal, timeout, info


# ---- D4RL's tasks ----------------------------------------------------------------------------


def make_d4rl(env_id: str, robot: str = "", **options):
    """A task of D4RL's names: with the robot of its recordings, and observations as they were."""
    env = make(env_id, **options)
    if robot:
        restore(env.unwrapped, robot)
    if env_id.startswith("AntMaze"):
        origin = antmaze(env.unwrapped)
        return observed(env, lambda obs: np.r_[obs["achieved_goal"] - origin, obs["observation"]])
    if env_id == "Ant-v4":  # MuJoCo 2.0 recorded 84 contact forces of the ant, all zero
        return observed(env, lambda obs: np.r_[obs, np.zeros(84)])
    return env


def observed(env, change):
    """The environment whose observations are change(obs) (S,)."""
    size = change(env.observation_space.sample()).size
    return TransformObservation(env, change, gymnasium.spaces.Box(-np.inf, np.inf, (size,)))


def restore(env, robot: str) -> None:
    """Give a MuJoCo environment the robot of D4RL's recordings, in place.

    D4RL recorded with MuJoCo 2.0. MuJoCo 2.1.2 changed the masses and inertias of capsules, and
    MuJoCo 3.5.0 adds the contact margins of two geoms where until then the larger one counted. All
    geoms of these robots and their floor have equal margins, so half of each is the old contact."""
    rows = [row for row in csv.DictReader((DATA_DIR / ROBOTS).open()) if row["robot"] == robot]
    numbers = np.array([list(row.values())[2:] for row in rows], float)  # (bodies, 11)
    model, bodies = env.model, slice(1, len(rows) + 1)  # body 0 is the world
    model.body_mass[bodies] = numbers[:, 0]
    model.body_inertia[bodies] = numbers[:, 1:4]
    model.body_ipos[bodies] = numbers[:, 4:7]
    model.body_iquat[bodies] = numbers[:, 7:]
    model.geom_margin[:] /= 2
    mujoco.mj_setConst(model, env.data)


def antmaze(maze) -> np.ndarray:
    """Turn gymnasium-robotics' maze into D4RL's, in place; returns D4RL's origin, (2,).

    D4RL's ant has a torque of 30 instead of 150, steps of 0.1 s instead of 0.05 and softer
    contacts; it starts within 0.1 of the origin, its start cell; the goal lies up to 1.5 m beyond
    the center of its cell and is reached at 0.5 m."""
    maze.model.opt.timestep = 0.02
    maze.model.actuator_gear[:, 0] = 30
    maze.model.geom_solimp[:, :3] = 0.8, 0.8, 0.01
    maze.ant_env._reset_noise_scale = 0.1
    maze.position_noise_range = 0
    cell = maze.maze.unique_goal_locations[0].copy()
    offset = np.array([[1.0], [0.5]])  # D4RL adds two uniform offsets
    maze.generate_target_goal = lambda: cell + maze.np_random.uniform(0, offset, (2, 2)).sum(0)
    maze.compute_reward = lambda a, g, info: bool(np.linalg.norm(a - g) <= 0.5)
    maze.compute_terminated = maze.compute_reward
    return maze.maze.unique_reset_locations[0].copy()


# ---- tables ----------------------------------------------------------------------------------


def reference_scores(name: str) -> tuple[float, float] | tuple[None, None]:
    """D4RL's (ref_min, ref_max) for a D4RL name or Gymnasium id, else (None, None)."""
    row = find_row("d4rl_ref_scores.csv", name.lower())
    return (float(row["ref_min"]), float(row["ref_max"])) if row else (None, None)


def table(file: str) -> dict[str, dict]:
    """Rows of a table in data/ by their first column."""
    with open(DATA_DIR / file, newline="") as f:
        return {next(iter(row.values())): row for row in csv.DictReader(f)}


def find_row(file: str, name: str) -> dict | None:
    """The row of a table whose first column is the longest to start `name`."""
    rows = table(file)
    return rows.get(max((p for p in rows if name.startswith(p)), key=len, default=None))


def near(name: str, names) -> str:
    """A hint to the names most like `name`, or nothing."""
    similar = difflib.get_close_matches(name, list(names), n=4)
    return f" (did you mean {', '.join(similar)}?)" if similar else ""

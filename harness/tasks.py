"""The task that a policy is evaluated on: how it is made, what it is scored by.

Gymnasium and gymnasium-robotics make the tasks; their observations arrive flat, in the order of
the dataset. D4RL's own ant mazes are rebuilt, because gymnasium-robotics' differ in every respect
that matters to a policy trained on D4RL's data: coordinates, torques, time step and goals.
"""

import contextlib
import csv
import difflib
import importlib.util
import io
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from common import InputError

DATA_DIR = Path(__file__).resolve().parents[1] / "data"
LOCOMOTION = ("halfcheetah", "hopper", "walker2d", "ant")
ROBOTICS = ("AntMaze", "PointMaze", "AdroitHand", "FrankaKitchen", "Fetch", "HandReach")
HEAVY = ("cube", "scene", "puzzle")  # OGBench's: 150 MB and a second to make, each
MOST_HEAVY = 16
INSTALL = "pip install 'gymnasium-robotics>=1.4' 'mujoco<3.11'"
INSTALL_OGBENCH = "pip install ogbench 'mujoco<3.11'"


@dataclass
class Task:
    """The task a policy is evaluated on."""

    id: str  # one of Gymnasium's registered ids; typed by the user, also module:Id-v0
    ref_min: float | None = None  # None: no reference score
    ref_max: float | None = None
    success: bool = False  # the score is 100 x share of episodes with any reward > 0 (sparse mazes)
    kwargs: dict = field(default_factory=dict)  # for gymnasium.make
    d4rl_maze: bool = False  # turn gymnasium-robotics' ant maze into D4RL's, 29 numbers
    pad: int = 0  # zeros appended to the observation (D4RL's ant: contact forces)
    data_score: float | None = None  # what score_data returns, where it is known already
    spaces: SimpleNamespace | None = None  # size S, low and high (A,), limit in steps; from build

    def make(self, **options):
        """A fresh environment whose observations are (S,) float32, ordered as the dataset's.
        `options` go to gymnasium.make."""
        import gymnasium

        register(self.id)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # -v4 is out of date on purpose: closest to D4RL
            env = gymnasium.make(self.id, **self.kwargs, **options)
        if is_singletask(self.id):
            from harness.ogbench import Success

            env = Success(env)
        origin = _d4rl_antmaze(env.unwrapped) if self.d4rl_maze else None

        def flat(obs):
            if self.d4rl_maze:
                obs = (obs["achieved_goal"] - origin, obs["observation"])
            parts = [np.asarray(x, np.float32).reshape(-1) for x in leaves(obs)]
            return np.concatenate([*parts, np.zeros(self.pad, np.float32)])

        size = flat(env.observation_space.sample()).size
        space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        return gymnasium.wrappers.TransformObservation(env, flat, space)

    def envs_for(self, episodes: int) -> int:
        """How many environments play so many episodes: one for each, but at most MOST_HEAVY of
        OGBench's manipulation tasks, then as few as need no more turns."""
        if not (is_singletask(self.id) and self.id.startswith(HEAVY)):
            return episodes
        turns = -(-episodes // MOST_HEAVY)
        return -(-episodes // turns)

    def score(self, returns) -> float:
        """Mean normalized score x 100 of raw episode returns; their mean without references."""
        returns = np.asarray(returns, dtype=np.float64)
        if self.success:
            return float(100 * np.mean(returns > 0))  # no reward is negative in these tasks
        if self.ref_min is None:
            return float(np.mean(returns))
        return float(100 * np.mean((returns - self.ref_min) / (self.ref_max - self.ref_min)))

    def score_data(self, returns) -> float:
        """The dataset's own score, of its raw episode returns. OGBench's rewards do not say whether
        a recording solved its task, so harness.ogbench finds that out and keeps it here."""
        return self.score(returns) if self.data_score is None else self.data_score


def reference_scores(name: str) -> tuple[float, float] | tuple[None, None]:
    """D4RL's (ref_min, ref_max) for a D4RL name or Gymnasium id, else (None, None)."""
    row = find_row("d4rl_ref_scores.csv", name.lower())
    return (float(row["ref_min"]), float(row["ref_max"])) if row else (None, None)


def _d4rl_antmaze(maze) -> np.ndarray:
    """Turn gymnasium-robotics' maze into D4RL's, in place; returns D4RL's origin, (2,).

    D4RL's ant has a torque of 30 instead of 150, steps of 0.1 s instead of 0.05 and softer
    contacts; it starts within 0.1 of the origin, its start cell; the goal lies up to 1.5 m beyond
    the center of its cell and is reached at 0.5 m.
    """
    maze.model.opt.timestep = 0.02
    maze.model.actuator_gear[:, 0] = 30
    maze.model.geom_solimp[:, :3] = 0.8, 0.8, 0.01
    maze.ant_env._reset_noise_scale = 0.1
    maze.position_noise_range = 0
    cell = maze.maze.unique_goal_locations[0].copy()
    offset = np.array([[1.0], [0.5]])  # D4RL adds two uniform offsets
    maze.generate_target_goal = lambda: cell + maze.np_random.uniform(0, offset, (2, 2)).sum(0)
    maze.compute_terminated = lambda a, g, info: bool(np.linalg.norm(a - g) <= 0.5)
    maze.compute_reward = lambda a, g, info: float(np.linalg.norm(a - g) <= 0.5)
    return maze.maze.unique_reset_locations[0].copy()


def is_singletask(task_id: str) -> bool:
    """Whether an environment is one of OGBench's single tasks."""
    return "-singletask" in task_id


def register(task_id: str) -> None:
    """Register the tasks of gymnasium-robotics or OGBench where `task_id` is one of them and the
    package is installed."""
    import gymnasium

    if is_singletask(task_id) and importlib.util.find_spec("ogbench"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("ogbench")
        # Its arms' action bounds are float64, which Gymnasium says at every reset.
        warnings.filterwarnings("ignore", ".*precision lowered by casting")
    if task_id.startswith(ROBOTICS) and importlib.util.find_spec("gymnasium_robotics"):
        # Its import prints a notice about Adroit's dense rewards, which no task here has.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            gymnasium.register_envs(importlib.import_module("gymnasium_robotics"))


def task_of_file(name: str, task_id: str, kwargs=None, limit=None, wrappers=()) -> Task | None:
    """The task that the file of dataset `name` records, or None, and a line that says so.

    Gymnasium imports and calls whatever an id like module:Id-v0, a recorded entry point or a
    recorded wrapper names. A file is not trusted with that: its id is looked up among the
    registered ones, and its arguments must be plain values."""
    import gymnasium

    register(task_id)
    if task_id not in gymnasium.registry and task_id.startswith(ROBOTICS):
        require(
            importlib.util.find_spec("gymnasium_robotics"),
            f"{name} names the task {task_id!r:.60}: {INSTALL}, or use --eval-env none",
        )
    if task_id not in gymnasium.registry:
        cause = f"which is not a registered Gymnasium task{near(task_id, gymnasium.registry)}"
    elif wrappers:
        cause = "inside wrappers, which are code"
    elif not isinstance(kwargs or {}, dict) or not plain(kwargs):
        cause = "with arguments that are not plain values"
    else:
        kwargs = {key: value for key, value in (kwargs or {}).items() if key != "render_mode"}
        if type(limit) is int and limit > 0:
            kwargs["max_episode_steps"] = limit
        return Task(task_id, kwargs=kwargs)
    print(
        f"note: {name} names the task {task_id!r:.60}, {cause}: training goes on without "
        "evaluation; --eval-env chooses a task"
    )
    return None


def plain(value, depth: int = 9) -> bool:
    """Whether a value from a file is a number, a text without a colon (module:name), a bool, None,
    or a list or dict of such values."""
    if isinstance(value, dict | list | tuple):
        values = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        return depth > 0 and all(plain(x, depth - 1) for x in values)
    if isinstance(value, str):
        return ":" not in value
    return value is None or isinstance(value, bool | int | float)


def build(task, own, refs) -> Task:
    """Make the task once and complete it: its spaces, and how it is scored.

    refs hold for the dataset's `own` task; another locomotion task gets D4RL's.
    """
    import gymnasium

    try:
        env = task.make()
        env.close()
    except Exception as e:
        known = task.id in gymnasium.registry
        fix = "repair that" + ("" if known else near(task.id, gymnasium.registry))
        if isinstance(e, ModuleNotFoundError) and ":" in task.id:
            fix = "put the module's folder on PYTHONPATH"
        if task.id.startswith(ROBOTICS) and not known:
            fix = INSTALL
        if is_singletask(task.id) and not importlib.util.find_spec("ogbench"):
            fix = INSTALL_OGBENCH
        raise InputError(f"no task {task.id} ({e!s:.300}); {fix}, or use --eval-env none") from e
    space = env.action_space
    require(hasattr(space, "low"), f"{task.id}: actions are {space}; only Box is supported")
    low, high = (np.array(x, np.float32).reshape(-1) for x in (space.low, space.high))
    task.spaces = SimpleNamespace(size=env.observation_space.shape[0], low=low, high=high)
    task.spaces.limit = env.spec.max_episode_steps
    family, own = (re.split(r"[-_]", x)[0].lower() for x in (task.id, own))
    if sparse(env.spec) or is_singletask(env.spec.id):
        task.success, task.ref_min, task.ref_max = True, 0.0, 1.0
    elif family == own and None not in refs:
        task.ref_min, task.ref_max = map(float, refs)
        require(refs[0] != refs[1], f"{task.id}: both reference scores are {refs[0]}; correct them")
    elif family in LOCOMOTION:
        print(f"note: {task.id} is scored with D4RL's references, which stem from its -v2 task")
        task.ref_min, task.ref_max = reference_scores(task.id)
    return task


def sparse(spec) -> bool:
    """A maze whose reward only says that the goal was reached (point mazes: that ends there)."""
    once = spec.id.startswith("AntMaze") or not spec.kwargs.get("continuing_task", True)
    sparse = spec.kwargs.get("reward_type", "sparse") == "sparse" and "Dense" not in spec.id
    return spec.id.startswith(("AntMaze", "PointMaze")) and once and sparse


def check_spaces(name, task, size, low, high):
    """Raises InputError unless the data's observation size and action bounds are the task's."""
    fix = "use --eval-env with the task of the data, or with none"
    sizes, own = (size, len(low)), (task.spaces.size, len(task.spaces.low))
    require(
        sizes == own, f"{name} has {sizes} observation and action numbers, {task.id} {own}; {fix}"
    )
    same = np.allclose([low, high], [task.spaces.low, task.spaces.high])
    bounds = f"{name} has action bounds {low} to {high}, {task.id} {task.spaces.low} to"
    require(same, f"{bounds} {task.spaces.high}; {fix}")


def leaves(x) -> list:
    """Arrays of a nested observation: dicts in sorted key order, tuples in theirs."""
    if not isinstance(x, dict | tuple):
        return [x]
    parts = [x[k] for k in sorted(x)] if isinstance(x, dict) else x
    return [leaf for part in parts for leaf in leaves(part)]


def require(condition, message):
    """Raises InputError."""
    if not condition:
        raise InputError(message)


def near(name, names) -> str:
    """A hint to the names most like `name`, or nothing."""
    similar = difflib.get_close_matches(name, list(names), n=4)
    return f" (did you mean {', '.join(similar)}?)" if similar else ""


def table(file) -> dict[str, dict]:
    """Rows of a table in data/ by their first column."""
    with open(DATA_DIR / file, newline="") as f:
        return {next(iter(row.values())): row for row in csv.DictReader(f)}


def find_row(file, name) -> dict | None:
    """The row of a table whose first column is the longest to start `name`."""
    rows = table(file)
    return rows.get(max((p for p in rows if name.startswith(p)), key=len, default=None))

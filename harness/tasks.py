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
import json
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import mujoco
import numpy as np

from common import InputError

DATA_DIR = Path(__file__).resolve().parents[1] / "data"
ROBOTS = "d4rl_robots.csv"
LOCOMOTION = ("halfcheetah", "hopper", "walker2d", "ant")
ROBOTICS = ("AntMaze", "PointMaze", "AdroitHand", "FrankaKitchen", "Fetch", "HandReach")
HEAVY = ("cube", "scene", "puzzle")  # OGBench's: 150 MB and a second to make, each
INSTALL = {
    "ogbench": "pip install ogbench 'mujoco<3.11'",
    "gymnasium_robotics": "pip install 'gymnasium-robotics>=1.4' 'mujoco<3.11'",
}


@dataclass
class Task:
    """The task a policy is evaluated on."""

    id: str  # one of Gymnasium's registered ids; typed by the user, also module:Id-v0
    ref_min: float | None = None  # None: no reference score
    ref_max: float | None = None
    success: bool = False  # the score is 100 x share of episodes with any reward > 0 (sparse mazes)
    kwargs: dict = field(default_factory=dict)  # for gymnasium.make
    d4rl_maze: bool = False  # turn gymnasium-robotics' ant maze into D4RL's, 29 numbers
    robot: str = ""  # a robot of data/d4rl_robots.csv, which the task gets
    pad: int = 0  # zeros appended to the observation (D4RL's ant: contact forces)
    spaces: SimpleNamespace | None = None  # size S, low and high (A,), limit in steps; from build

    def make(self, **options):
        """A fresh environment whose observations are (S,) float32, ordered as the dataset's.
        `options` go to gymnasium.make. Raises InputError for whatever the task raises, now or
        later."""
        with named(self.id, "--eval-episodes 1 where only one can be made"):
            return Named(self.open(**options))

    def open(self, **options):
        """The environment of `make`, which raises what the task raises."""
        register(self.id)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # -v4 is out of date on purpose: closest to D4RL
            env = gymnasium.make(self.id, **self.kwargs, **options)
        if "-singletask" in self.id:
            env = Success(env)
        if self.robot:
            restore(env.unwrapped, self.robot)
        origin = _d4rl_antmaze(env.unwrapped) if self.d4rl_maze else None

        def flat(obs):
            if self.d4rl_maze:
                obs = (obs["achieved_goal"] - origin, obs["observation"])
            parts = [np.asarray(x, np.float32).reshape(-1) for x in leaves(obs)]
            return np.concatenate([*parts, np.zeros(self.pad, np.float32)])

        size = flat(env.observation_space.sample()).size
        space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        return gymnasium.wrappers.TransformObservation(env, flat, space)

    def metadata(self) -> dict:
        """The task as run.py takes it."""
        found = {"env_id": self.id, "env_kwargs": self.kwargs, "make": self.make}
        found |= {"ref_min_score": self.ref_min, "ref_max_score": self.ref_max}
        found |= {"success": self.success, "robot": self.robot}
        if "-singletask" in self.id and self.id.startswith(HEAVY):
            found["most_envs"] = 16
        return found


@contextlib.contextmanager
def named(task_id, fix="a run goes on with --resume"):
    """Whatever a task raises is an InputError that names it; also what would end the process as if
    all were well."""
    try:
        yield
    except (Exception, SystemExit) as error:
        text = f"{type(error).__name__}: {error!s:.200}".strip(": ")
        raise InputError(f"the task {task_id} raised {text}; repair it ({fix})") from error


class Named(gymnasium.Wrapper):
    """A task that is named where it fails."""

    def __str__(self):
        return f"the task {self.env.spec.id}"

    def reset(self, **options):
        with named(self.env.spec.id):
            obs, info = self.env.reset(**options)
            return obs.reshape(self.observation_space.shape), info

    def step(self, action):
        with named(self.env.spec.id):
            obs, reward, terminal, timeout, info = self.env.step(action)
            obs = obs.reshape(self.observation_space.shape)
            if terminal or timeout:  # no action follows
                obs = np.nan_to_num(obs, posinf=0, neginf=0)
            reward = float(reward)
        require(abs(reward) < 1e30, f"{self}: a reward is {reward:g}; repair it (a run goes on "
                "with --resume)")  # fmt: skip
        return obs, reward, terminal, timeout, info


class Success(gymnasium.Wrapper):
    """The reward is 1 where the task is solved, which ends the episode, and 0 elsewhere: OGBench's
    score is the share of such episodes.

    OGBench's mazes draw from numpy's global generator, so that a seed for reset alone does not
    repeat an episode; here every environment has a generator of its own in its place."""

    def __init__(self, env):
        super().__init__(env)
        self.state = np.random.RandomState().get_state()
        self.draws = "teleport" in env.spec.id  # a random exit; no other task draws in a step

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
        result = self.own(self.env.step, action) if self.draws else self.env.step(action)
        obs, _, terminal, timeout, info = result
        return obs, float(info["success"]), terminal, timeout, info


def reference_scores(name: str) -> tuple[float, float] | tuple[None, None]:
    """D4RL's (ref_min, ref_max) for a D4RL name or Gymnasium id, else (None, None)."""
    row = find_row("d4rl_ref_scores.csv", name.lower())
    return (float(row["ref_min"]), float(row["ref_max"])) if row else (None, None)


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


def is_ogbench(name: str) -> bool:
    """Whether OGBench has data or images of this name."""
    data = re.sub(r"(-oraclerep)?-v\d+$", "", name)
    return data in table("ogbench_sets.csv") or data.startswith(("visual-", "powderworld-"))


def package_of(task_id: str) -> str:
    """The package that registers a task when it is imported."""
    if "-singletask" in task_id:
        return "ogbench"
    return "gymnasium_robotics" if task_id.startswith(ROBOTICS) else "gymnasium"


def to_install(task_id: str) -> str:
    """The command that installs the package of a task, or nothing where it is installed."""
    package = package_of(task_id)
    return "" if importlib.util.find_spec(package) else INSTALL[package]


def register(task_id: str) -> None:
    """Register the tasks of the package of `task_id`, where it is installed."""
    if to_install(task_id):
        return
    # An import prints a notice about Adroit's dense rewards, which no task here has.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        importlib.import_module(package_of(task_id))
    # The action bounds of OGBench's arms are float64, which Gymnasium says at every reset.
    warnings.filterwarnings("ignore", ".*precision lowered by casting")


def choose(name, eval_env, meta, wrappers=()) -> Task | None:
    """The task of dataset `name`, complete: `eval_env`, or what its metadata records."""
    own, refs = meta.get("env_id"), (meta.get("ref_min_score"), meta.get("ref_max_score"))
    task = None
    if eval_env not in (None, "none"):
        task = Task(eval_env)
    elif eval_env is None and own:
        task = task_of_file(name, own, meta.get("env_kwargs") or {}, wrappers)
    return task and build(task, own or eval_env, refs)


def task_of_file(name: str, task_id: str, kwargs, wrappers=()) -> Task | None:
    """The task that the file of dataset `name` records, or None, and a line that says so.

    Gymnasium imports and calls whatever an id like module:Id-v0, a recorded entry point or a
    recorded wrapper names. A file is not trusted with that: its id is looked up among the
    registered ones, and its arguments must be plain values."""
    register(task_id)
    if task_id not in gymnasium.registry:
        line = to_install(task_id)
        require(not line, f"{name} names the task {task_id!r:.60}: {line}, or use --eval-env none")
        cause = f"which is not a registered Gymnasium task{near(task_id, gymnasium.registry)}"
    elif wrappers:
        cause = "inside wrappers, which are code"
    elif not plain(kwargs):
        cause = "with arguments that are not plain values"
    else:
        kwargs = {key: value for key, value in kwargs.items() if key != "render_mode"}
        return Task(task_id, kwargs=kwargs)
    print(
        f"note: {name} names the task {task_id!r:.60}, {cause}: training goes on without "
        "evaluation; --eval-env chooses a task"
    )
    return None


def plain(values) -> bool:
    """Whether JSON can write the values, and no text among them has a colon (module:name)."""
    try:
        return ":" not in json.dumps(values, separators=",=")
    except (TypeError, ValueError, RecursionError):
        return False


def build(task, own, refs) -> Task:
    """Make the task once and complete it: its spaces, and how it is scored.

    refs hold for the dataset's `own` task; another locomotion task gets D4RL's.
    """
    try:
        env = task.open()
        env.close()
    except Exception as e:
        known = "" if task.id in gymnasium.registry else near(task.id, gymnasium.registry)
        fix = to_install(task.id) or f"repair that{known}"
        if isinstance(e, ModuleNotFoundError) and ":" in task.id:
            fix = "put the module's folder on PYTHONPATH"
        raise InputError(f"no task {task.id} ({e!s:.300}); {fix}, or use --eval-env none") from e
    space = env.action_space
    require(hasattr(space, "low"), f"{task.id}: actions are {space}; only Box is supported")
    low, high = (np.array(x, np.float32).reshape(-1) for x in (space.low, space.high))
    task.spaces = SimpleNamespace(size=env.observation_space.shape[0], low=low, high=high)
    limit = task.spaces.limit = env.spec.max_episode_steps
    if not limit or limit > 10**5:
        limit = f"a time limit of {limit:,} steps" if limit else "no time limit"
        print(f"note: {task.id} has {limit}: an episode that does not end by itself takes long")
    family, own = (re.split(r"[-_]", x)[0].lower() for x in (task.id, own))
    if sparse(env.spec) or "-singletask" in env.spec.id:
        task.success, task.ref_min, task.ref_max = True, 0.0, 1.0
    elif family == own and None not in refs:
        task.ref_min, task.ref_max = map(float, refs)
    elif family in LOCOMOTION:
        print(f"note: {task.id} is scored with D4RL's references, which stem from its -v2 task")
        task.ref_min, task.ref_max = reference_scores(task.id)
    return task


def sparse(spec) -> bool:
    """A maze whose reward only says that the goal was reached (point mazes: that ends there)."""
    once = spec.id.startswith("AntMaze") or not spec.kwargs.get("continuing_task", True)
    sparse = spec.kwargs.get("reward_type", "sparse") == "sparse" and "Dense" not in spec.id
    return spec.id.startswith(("AntMaze", "PointMaze")) and once and sparse


def complete(name, task, meta, size, count) -> dict:
    """Metadata as run.py takes it: the bounds of the actions (A,) and the task. Raises InputError
    unless the data's sizes (S, A) and bounds are the task's."""
    low, high = (np.full(count, x, np.float32) for x in (-1, 1))
    if task and len(task.spaces.low) == count:
        low[:], high[:] = task.spaces.low, task.spaces.high
    low[:], high[:] = meta.get("action_low", low), meta.get("action_high", high)
    found = {"action_low": low, "action_high": high}
    if task is None:
        return found
    fix = "use --eval-env with the task of the data, or with none"
    space, sizes = task.spaces, (size, count)
    own = (space.size, len(space.low))
    require(
        sizes == own, f"{name} has {sizes} observation and action numbers, {task.id} {own}; {fix}"
    )
    require(
        np.allclose([low, high], [space.low, space.high]),
        f"{name} has action bounds {low} to {high}, {task.id} {space.low} to {space.high}; {fix}",
    )
    return task.metadata() | found


def leaves(x) -> list:
    """Arrays of a nested observation: dicts in sorted key order, tuples in theirs."""
    if isinstance(x, dict):
        x = tuple(x[key] for key in sorted(x))
    return [leaf for part in x for leaf in leaves(part)] if isinstance(x, tuple) else [x]


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

"""OGBench's single tasks by name, from its files and in its own environments.

    cube-single-play-singletask-task3-v0     one of the five tasks of the data cube-single-play
    cube-single-play-singletask-v0           its default task (data/ogbench_sets.csv)

The five tasks share one file, {data}-v0.npz in $OGBENCH_DATASET_DIR or ~/.ogbench/data, where the
package ogbench keeps it; it is downloaded when absent. Rewards are OGBench's own, computed here for
every state that was recorded: minus the number of subtasks that it leaves unsolved, and 0 where it
solves the task. There the MDP ends (`terminal`), but recordings run on: an episode is a recording.
The last row of each has no next observation and is no transition, as in OGBench's loader.

This module needs Gymnasium; harness.datasets and harness.tasks import it when a name asks for it.
"""

import contextlib
import importlib
import os
import re
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np

from common import InputError
from harness.datasets import UNREADABLE, _open, _read_columns, _require_regular, download
from harness.tasks import INSTALL_OGBENCH, Task, build, near, require, table

SETS = "ogbench_sets.csv"


def names() -> list[str]:
    """Every name of a single task, those without a number first."""
    numbers = ["", *(f"-task{i}" for i in range(1, 6))]
    return [f"{data}-singletask{number}-v0" for number in numbers for data in table(SETS)]


def split(name: str) -> tuple[str, str]:
    """Name -> (name of the data, name of the environment). Raises InputError for a name that is not
    one of a single task with states as observations."""
    if name.startswith(("visual-", "powderworld-")):
        raise InputError(
            f"{name} has images as observations; only OGBench's states can be read"
            + states_of(name)
        )
    data, _, number = re.sub(r"(-oraclerep)?-v\d+$", "", name).partition("-singletask")
    row = table(SETS).get(data)
    if row is None:
        raise InputError(f"there is no OGBench data '{name}'{near(name, names())}")
    if "-singletask" not in name:
        raise InputError(
            f"{name} has goals and no rewards; use one of its single tasks, "
            f"{data}-singletask-task1-v0 to {data}-singletask-task5-v0, or {data}-singletask-v0, "
            f"which is task {row['default_task']}"
        )
    if not re.fullmatch(re.escape(data) + r"-singletask(-task[1-5])?-v0", name):
        raise InputError(f"{name} is none of the tasks 1 to 5{near(name, names())}")
    return data, f"{data.rpartition('-')[0]}-singletask{number}-v0"


def states_of(name: str) -> str:
    """A hint to the single tasks of the same data with states, where there is such data."""
    data = re.sub(r"(-singletask.*|-oraclerep)?-v\d+$", "", name).removeprefix("visual-")
    if data not in table(SETS):
        other = "; use another task, such as cube-single-play-singletask-v0"
        return near(name.removeprefix("visual-"), names()) or other
    return f"; use {data}-singletask-v0, or {data}-singletask-task1-v0 to -task5-v0"


def load(name: str, eval_env: str | None):
    """What harness.datasets reads of a file, for the single task `name`. Raises InputError."""
    data, env_name = split(name)
    if importlib.util.find_spec("ogbench") is None:
        raise InputError(f"{name} needs OGBench: {INSTALL_OGBENCH}")
    task = build(Task(env_name), env_name, (None, None)) if eval_env is None else None
    env = Task(env_name).make()
    path = fetch(data)
    _require_regular(path)
    again = "delete it and download it again"
    try:
        with _open(path) as (columns, raw):
            kept = [k for k in ("qpos", "button_states", "terminals") if k in columns]
            state = {k: np.concatenate(list(columns[k].blocks)) for k in kept}
            reward, mask = relabel(path, env_name, env, state)
            state = {"rewards": reward, "masks": mask, "terminals": state["terminals"]}
            columns |= {k: column(x) for k, x in state.items()}
            rows = _read_columns(path.name, columns, raw, eval_env, task, None)
    except (*UNREADABLE, IndexError, TypeError) as error:
        raise InputError(f"{path} is not a complete npz file ({error!s:.200}); {again}") from None
    if task:
        task.data_score = solved_share(mask == 0, state["terminals"].astype(bool))
    return rows


def column(x):
    """An array as harness.datasets reads it from a file."""
    return SimpleNamespace(shape=x.shape, dtype=x.dtype, blocks=[x])


def relabel(path, env_name, env, state) -> tuple[np.ndarray, np.ndarray]:
    """OGBench's rewards and masks (N,) of recorded simulator states. Raises InputError."""
    from ogbench.relabel_utils import relabel_dataset

    needed = ["terminals", "qpos"]
    needed += ["button_states"] if env_name.startswith(("scene", "puzzle")) else []
    missing = [k for k in needed if k not in state]
    require(
        not missing,
        f"{path} has no {' and no '.join(missing)}, from which OGBench's rewards are computed; "
        "delete it and download it again",
    )
    relabel_dataset(env_name, env, state)  # adds both
    return state["rewards"], state["masks"]


def solved_share(solved, end) -> float:
    """100 x the share of recordings with a solved state; both (N,) bool."""
    last = end.copy()
    last[-1] = True
    starts = np.flatnonzero(np.r_[True, last[:-1]])
    return 100 * float(np.logical_or.reduceat(solved, starts).mean())


def fetch(data: str) -> Path:
    """The file of the data in OGBench's own folder, downloaded when absent."""
    from ogbench import utils

    folder = Path(os.environ.get("OGBENCH_DATASET_DIR") or utils.DEFAULT_DATASET_DIR).expanduser()
    target = folder / f"{data}-v0.npz"
    mirrors = [*os.environ.get("OGBENCH_MIRRORS", "").split(), utils.DATASET_URL]
    urls = [f"{mirror.rstrip('/')}/{target.name}" for mirror in mirrors]
    return download(f"{data}-v0", target, urls, "OGBENCH_MIRRORS")


# ---- evaluation ------------------------------------------------------------------------------


@contextlib.contextmanager
def own_numpy(state):
    """numpy's global generator is in `state` inside, and as before afterwards; yields a function
    that returns its state."""
    outer = np.random.get_state()
    np.random.set_state(state)
    try:
        yield np.random.get_state
    finally:
        np.random.set_state(outer)


class Success(gymnasium.Wrapper):
    """The reward is 1 where the task is solved, which ends the episode, and 0 elsewhere: OGBench's
    score is the share of such episodes.

    OGBench's mazes draw from numpy's global generator, so that a seed for reset alone does not
    repeat an episode; here every environment has a generator of its own in its place."""

    def __init__(self, env):
        super().__init__(env)
        self.state = np.random.RandomState().get_state()
        self.draws = "teleport" in env.spec.id  # a random exit; no other task draws in a step

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.state = np.random.RandomState(seed).get_state()
        with own_numpy(self.state) as state:
            result = self.env.reset(seed=seed, options=options)
            self.state = state()
        return result

    def step(self, action):
        if self.draws:
            with own_numpy(self.state) as state:
                obs, _, terminal, timeout, info = self.env.step(action)
                self.state = state()
        else:
            obs, _, terminal, timeout, info = self.env.step(action)
        return obs, float(info["success"]), terminal, timeout, info

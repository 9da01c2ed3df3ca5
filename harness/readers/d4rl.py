"""D4RL's names: $D4RL_DATASET_DIR or ~/.d4rl/datasets, downloaded when absent.

A name that ends in -made is a file that data/make/d4rl.py made by D4RL's recipe. It lies in the
same folder under a name of its own, and has the settings and the task of the name without -made."""

import json
import os
from pathlib import Path

from common import InputError
from harness.readers.fetch import download
from harness.readers.files import is_damage, open_hdf5, read_file
from harness.tasks import ROBOTS, Task, build, find_row, near, reference_scores, require, table

# {path} is the column of data/d4rl_files.csv, {file} its last part.
D4RL_MIRRORS = (
    "https://huggingface.co/datasets/imone/D4RL/resolve/main/{file}",
    "https://web.archive.org/web/2025id_/http://rail.eecs.berkeley.edu/datasets/offline_rl/{path}",
    "http://rail.eecs.berkeley.edu/datasets/offline_rl/{path}",
)
MADE = "halfcheetah-random-v2", "hopper-random-v2", "walker2d-random-v2"  # data/make/d4rl.py


def read(name, eval_env):
    """The task is built before anything is downloaded."""
    base = name.removesuffix("-made")
    row, task = find_row("d4rl_tasks.csv", base), None
    if eval_env is None and row["note"]:
        print(f"note: {name}: {row['note']}")
    if eval_env is None and row["env_id"]:
        task = own_task(row)
    elif eval_env not in (None, "none"):
        task = Task(eval_env)
    if task:
        # MuJoCo 2.0 recorded 84 contact forces of the ant, all zero.
        task.pad = 84 * (task.id == "Ant-v4")
        task = build(task, row["env_id"], reference_scores(base))
    path = made_file(base) if base != name else fetch(base)
    return read_file(path, "none", task, row)


def folder() -> Path:
    """D4RL's own folder."""
    return Path(os.path.expanduser(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets"))


def fetch(name) -> Path:
    """The published file, downloaded when absent. Raises InputError."""
    file = table("d4rl_files.csv")[name]
    known = {key: file[key] for key in ("bytes", "sha256")}
    try:
        return download(name, "D4RL", folder(), file["path"], D4RL_MIRRORS, known)
    except InputError as error:
        hint = f", or make a draw of it: python data/make/d4rl.py {name}, then --env {name}-made"
        raise InputError(f"{error}{hint if name in MADE else ''}") from None


def made_file(name) -> Path:
    """The file that data/make/d4rl.py made in the manner of `name`. Raises InputError where there
    is none, or another one."""
    command = f"python data/make/d4rl.py {name}"
    require(name in MADE, f"there is no {name}-made{near(name, MADE)}; {command} cannot make it")
    path = folder() / f"{name}-made.hdf5"
    require(path.is_file(), f"{name}-made is not made yet: {command}")
    try:
        with open_hdf5(path) as file:
            made = dict(json.loads(file.attrs["made_by"]))
            rows = len(file["rewards"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        require(is_damage(error), f"{path} cannot be read now ({error!s:.200}); try it later")
        made, rows = {}, 0
    right = made.get("name") == name and made.get("rows") == rows
    require(right, f"{path} is not a whole file made for {name}; make it again: {command}")
    told = {key: made.get(key) for key in ("episodes", "seed", "versions")}
    print(f"note: {name}-made is not D4RL's file, but made in its manner: {told}")
    return path


def own_task(row) -> Task:
    """The task of a row of d4rl_tasks.csv."""
    kwargs, maze = {"max_episode_steps": int(row["max_episode_steps"])}, row["maze"]
    if maze:  # upside down: D4RL's y grows with the row, gymnasium-robotics' falls
        cells = [[int(c) if c in "01" else c for c in line] for line in maze.split()]
        kwargs |= {"maze_map": cells[::-1], "continuing_task": False}
    robot = "ant" if maze else row["prefix"].strip("-")
    robot = robot if robot in table(ROBOTS) else ""
    if robot:
        print(f"task: {row['env_id']} with the {robot} of D4RL's recordings (data/{ROBOTS}), whose "
              "masses and contacts are not those of Gymnasium's own")  # fmt: skip
    return Task(row["env_id"], kwargs=kwargs, d4rl_maze=bool(maze), robot=robot)

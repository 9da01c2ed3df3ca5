"""D4RL's names: $D4RL_DATASET_DIR or ~/.d4rl/datasets, downloaded when absent.

A name that ends in -made is a file that data/make/d4rl.py made by D4RL's recipe. It lies in the
same folder under a name of its own, and has the task of the name without -made."""

import json
import os
from functools import partial
from pathlib import Path

import numpy as np

from common import InputError, require
from readers import files, maze2d
from readers.fetch import download
from readers.tasks import (
    ROBOTS,
    find_row,
    make_d4rl,
    reference_scores,
    register,
    sparse,
    table,
)

# {path} is the column of data/d4rl_files.csv, {file} its last part.
D4RL_MIRRORS = (
    "https://huggingface.co/datasets/imone/D4RL/resolve/main/{file}",
    "https://web.archive.org/web/2025id_/http://rail.eecs.berkeley.edu/datasets/offline_rl/{path}",
    "http://rail.eecs.berkeley.edu/datasets/offline_rl/{path}",
)
MADE = (  # by data/make/d4rl.py
    "halfcheetah-random-v2 hopper-random-v2 walker2d-random-v2 ant-random-v2 "
    "maze2d-umaze-v1 maze2d-medium-v1 maze2d-large-v1"
).split()
LAW = 1  # of the files made there: one more for every change of a recipe or a robot


def read(name: str, eval_env: str | None) -> tuple[dict, dict]:
    """(columns, metadata). The package of the task is asked for before anything is downloaded."""
    base = name.removesuffix("-made")
    row, meta = find_row("d4rl_tasks.csv", base), {"env_id": None}
    if row["env_id"]:
        meta = task(row)
    if eval_env is None:
        register(row["env_id"])
        for line in filter(None, (row["note"], meta.get("robot"))):
            print(f"note: {name}: {line}")
    columns, _ = files.read(fetch(name) if name == base else made_file(base))
    if row["env_id"].startswith("AntMaze"):  # v0's timeouts are out of step; an ant moves < 1 m
        place = columns["observations"][:, :2].astype(np.float32)
        jump = np.linalg.norm(np.diff(place, axis=0, append=place[-1:]), axis=1) > 1
        columns["timeouts"] = jump | (columns["timeouts"] != 0)
    low, high = reference_scores(base)
    limit = int(row["max_episode_steps"] or 0) or None
    meta |= {"max_episode_steps": limit, "ref_min_score": low, "ref_max_score": high}
    return columns, meta


def task(row: dict) -> dict:
    """Metadata of the task of a row of d4rl_tasks.csv."""
    env_id, maze, limit = row["env_id"], row["maze"], int(row["max_episode_steps"])
    kwargs = {"max_episode_steps": limit}
    if env_id.startswith("maze2d"):
        built = partial(maze2d.make, maze, "dense" in env_id, limit)
        return {"env_id": env_id, "env_kwargs": kwargs, "make": built}
    if maze:  # upside down: D4RL's y grows with the row, gymnasium-robotics' falls
        cells = [[int(c) if c in "01" else c for c in line] for line in maze.split()]
        kwargs |= {"maze_map": cells[::-1], "continuing_task": False}
    robot = "ant" if maze else row["prefix"].strip("-")
    robot = robot if robot in table(ROBOTS) else ""
    found = {"env_id": env_id, "env_kwargs": kwargs, "success": sparse(env_id, kwargs)}
    found["make"] = partial(make_d4rl, env_id, robot, **kwargs)
    if robot:
        found["robot"] = (
            f"the task has the {robot} of D4RL's recordings (data/{ROBOTS}), whose "
            "masses and contacts are not those of Gymnasium's own"
        )
    return found


def folder() -> Path:
    """D4RL's own folder."""
    return Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()


def fetch(name: str) -> Path:
    """The published file, downloaded when absent. Raises InputError."""
    file = table("d4rl_files.csv")[name]
    try:
        return download(name, "D4RL", folder(), file["path"], D4RL_MIRRORS, file)
    except InputError as error:
        hint = f", or make a draw of it: python data/make/d4rl.py {name}, then --env {name}-made"
        raise InputError(f"{error}{hint if name in MADE else ''}") from None


def made_file(name: str) -> Path:
    """The file that data/make/d4rl.py made in the manner of `name`. Raises InputError where there
    is none, or another one."""
    command = f"python data/make/d4rl.py {name}"
    require(name in MADE, f"there is no {name}-made, and {command} cannot make it")
    path = folder() / f"{name}-made.hdf5"
    require(path.is_file(), f"{name}-made is not made yet: {command}")
    with files.open_hdf5(path) as file:
        made = dict(json.loads(file.attrs.get("made_by", "{}")))
        due = {"name": name, "law": LAW, "rows": len(file["rewards"])}
    wrong = [f"{key} {made.get(key)}, not {x}" for key, x in due.items() if made.get(key) != x]
    require(
        not wrong,
        f"{path} is another file, or not whole ({', '.join(wrong)}); make it again: {command} "
        "--overwrite",
    )
    print(f"note: {name}-made is not D4RL's file, but made in its manner: {made}")
    return path

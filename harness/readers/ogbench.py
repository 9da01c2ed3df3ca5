"""OGBench's single tasks by name, from its files and in its own environments.

    cube-single-play-singletask-task3-v0     one of the five tasks of the data cube-single-play
    cube-single-play-singletask-v0           its default task (data/ogbench_sets.csv)

The five tasks share one file, {data}-v0.npz in $OGBENCH_DATASET_DIR or ~/.ogbench/data, where the
package ogbench keeps it; it is downloaded when absent. Rewards are OGBench's own, computed here for
every state that was recorded: minus the number of subtasks that it leaves unsolved, and 0 where it
solves the task. There the MDP ends (`terminal`), but recordings run on: an episode is a recording.
The last row of each has no next observation and is no transition, as in OGBench's loader.
"""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from common import InputError
from harness.readers.fetch import download
from harness.readers.files import read_file
from harness.tasks import HEAVY, Task, build, near, require, table, to_install

SETS = "ogbench_sets.csv"
# A copy that a colleague of OGBench's author keeps, for when the host of the package is down.
HUB = "https://huggingface.co/datasets/zhouzypaul/ogbench_datasets/resolve/main/{file}"
MADE = ("pointmaze", *HEAVY)  # begin the names of data that data/make/ogbench.py can make


def names() -> list[str]:
    """Every name of a single task, those without a number first."""
    numbers = ["", *(f"-task{i}" for i in range(1, 6))]
    return [f"{data}-singletask{number}-v0" for number in numbers for data in table(SETS)]


def split(name: str) -> tuple[str, str]:
    """Name -> (name of the data, name of the environment). Raises InputError for a name that is not
    one of a single task with states as observations."""
    state = name.removeprefix("visual-")  # the same tasks, with states instead of images
    data, _, number = re.sub(r"(-oraclerep)?-v\d+$", "", state).partition("-singletask")
    row, cause = table(SETS).get(data), ""
    if name.startswith(("visual-", "powderworld-")):
        cause = "has images as observations; only OGBench's states can be read"
    elif "-singletask" not in name:
        cause = "has goals and no rewards"
    elif not re.fullmatch(r".*-singletask(-task[1-5])?-v0", name):
        cause = "is none of the tasks 1 to 5"
    if row is None:
        other = near(state, names()) or "; use another task, such as cube-single-play-singletask-v0"
        raise InputError(f"{name} {cause or 'is no data of OGBench'}{other}")
    task = f"{data}-singletask"
    require(
        not cause,
        f"{name} {cause}; use {task}-v0, which is task {row['default_task']}, or {task}-task1-v0 "
        f"to {task}-task5-v0",
    )
    return data, f"{data.rpartition('-')[0]}-singletask{number}-v0"


def read(name: str, eval_env: str | None):
    """(arrays, metadata) for the single task `name`. Raises InputError."""
    data, env_name = split(name)
    line = to_install(env_name)
    require(not line, f"{name} needs OGBench: {line}")
    task, env = Task(env_name), Task(env_name).make()
    task = build(task, env_name, (None, None)) if eval_env is None else None
    path, score = fetch(data), {}

    def derive(columns):
        """OGBench's rewards and masks (N,) of the recorded simulator states."""
        from ogbench.relabel_utils import relabel_dataset

        needed = ["terminals", "qpos"]
        needed += ["button_states"] if env_name.startswith(("scene", "puzzle")) else []
        missing = [key for key in needed if key not in columns]
        require(
            not missing,
            f"{path} has no {' and no '.join(missing)}, from which OGBench's rewards are computed; "
            "delete it and download it again",
        )
        state = {key: columns[key].read() for key in needed}
        relabel_dataset(env_name, env, state)  # adds both
        episode = np.cumsum(state["terminals"]) - state["terminals"]
        solved = np.bincount(episode.astype(int), state["masks"] == 0) > 0  # (E,)
        score["data_score"] = 100 * float(solved.mean())
        return {key: column(state[key]) for key in ("rewards", "masks")}

    arrays, meta = read_file(path, eval_env, task, derive=derive)
    return arrays, meta | (score if task else {})


def data_folder() -> Path:
    """OGBench's own folder."""
    from ogbench.utils import DEFAULT_DATASET_DIR

    return Path(os.path.expanduser(os.environ.get("OGBENCH_DATASET_DIR") or DEFAULT_DATASET_DIR))


def fetch(data: str) -> Path:
    """The file of the data in OGBench's own folder, downloaded when absent. Raises InputError."""
    from ogbench.utils import DATASET_URL

    mirrors, file = [DATASET_URL + "/{file}", HUB], f"{data}-v0.npz"
    known = {key: table(SETS)[data][key] for key in ("bytes", "sha256")}
    try:
        return download(f"{data}-v0", "OGBENCH", data_folder(), file, mirrors, known)
    except InputError as error:
        hint = f", or make another draw of it: python data/make/ogbench.py {data}"
        raise InputError(f"{error}{hint if data.startswith(MADE) else ''}") from None


def column(x):
    """An array as harness.readers.files reads it."""
    return SimpleNamespace(shape=x.shape, dtype=x.dtype, read=lambda: x)

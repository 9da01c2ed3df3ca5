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
import zipfile
from pathlib import Path

import numpy as np

from common import InputError, require
from readers.fetch import download
from readers.tasks import HEAVY, make, near, register, table
from run import in_one_line

SETS = "ogbench_sets.csv"
# A copy that a colleague of OGBench's author keeps, for when the host of the package is down.
HUB = "https://huggingface.co/datasets/zhouzypaul/ogbench_datasets/resolve/main/{file}"
MADE = ("pointmaze", *HEAVY)  # begin the names of data that data/make/ogbench.py can make
IMAGES = ("visual-", "powderworld-")


def is_name(name: str) -> bool:
    """Whether `name` is one of OGBench's, or nearly."""
    data = re.sub(r"(-oraclerep)?-v\d+$", "", name)
    return "-singletask" in name or data in table(SETS) or data.startswith(IMAGES)


def names() -> list[str]:
    """Every name of a single task, those without a number first."""
    numbers = ["", *(f"-task{i}" for i in range(1, 6))]
    return [f"{data}-singletask{number}-v0" for number in numbers for data in table(SETS)]


def split(name: str) -> tuple[str, str]:
    """Name -> (name of the data, name of the environment). Raises InputError for a name that is not
    one of a single task with states as observations."""
    state = name.removeprefix("visual-")  # the same tasks, with states instead of images
    data, _, number = re.sub(r"(-oraclerep)?-v\d+$", "", state).partition("-singletask")
    right = data in table(SETS) and re.fullmatch(r".*-singletask(-task[1-5])?-v0", state)
    hint = near(f"{data}-singletask-v0", names()) or " such as cube-single-play-singletask-v0"
    require(
        right and name == state,
        f"{name} is not one of OGBench's single tasks{hint}; its images, and its data with goals "
        "in place of rewards, cannot be read",
    )
    return data, f"{data.rpartition('-')[0]}-singletask{number}-v0"


def read(name: str) -> tuple[dict, dict]:
    """(columns, metadata) for the single task `name`. Raises InputError."""
    data, env_id = split(name)
    register(env_id)
    path = fetch(data)
    with in_one_line(path, "delete it, so that it is downloaded again"):
        with np.load(path, allow_pickle=False) as file:
            file = {key: file[key] for key in file if key != "qvel"}
        reward, mask = relabeled(env_id, file)
    columns = columns_of(file | {"rewards": reward, "masks": mask})
    episode = np.cumsum(columns["ends"]) - columns["ends"]
    solved = np.bincount(episode, mask == 0) > 0  # (E,)
    return columns, {"env_id": env_id, "data_score": 100 * float(solved.mean())}


def relabeled(env_id: str, file: dict) -> tuple[np.ndarray, np.ndarray]:
    """OGBench's rewards and masks (N,) of the recorded simulator states. Raises KeyError where a
    state is not recorded."""
    from ogbench.relabel_utils import relabel_dataset

    state = {key: file[key] for key in ("terminals", "qpos")}
    if env_id.startswith(("scene", "puzzle")):
        state["button_states"] = file["button_states"]
    relabel_dataset(env_id, make(env_id), state)
    return state["rewards"], state["masks"]


def columns_of(file: dict) -> dict:
    """OGBench's arrays with rewards and masks, also as its loader gives them, under D4RL's keys.
    Its `terminals`, or zeros in its `valids`, end recordings; zeros in its masks end the MDP. The
    last row of a recording without next observations is a state and no transition."""
    end = file["terminals"] != 0
    if "valids" in file:
        end = file["valids"] == 0
    terminal, reward = file["masks"] == 0, file["rewards"]
    if "next_observations" not in file:
        terminal, reward = terminal & ~end, np.where(end, 0, reward)
    keys = ("observations", "actions", "next_observations")
    found = {key: file[key] for key in keys if key in file}
    return found | {"rewards": reward, "terminals": terminal, "ends": end}


def data_folder() -> Path:
    """OGBench's own folder."""
    from ogbench.utils import DEFAULT_DATASET_DIR

    return Path(os.environ.get("OGBENCH_DATASET_DIR") or DEFAULT_DATASET_DIR).expanduser()


def fetch(data: str) -> Path:
    """The file of the data in OGBench's own folder, downloaded when absent. Raises InputError."""
    from ogbench.utils import DATASET_URL

    path, row = data_folder() / f"{data}-v0.npz", table(SETS)[data]
    if is_made(path):
        print(f"note: {path} is not OGBench's file, but made in its manner")
        return path
    mirrors = [DATASET_URL + "/{file}", HUB]
    try:
        return download(f"{data}-v0", "OGBENCH", path.parent, path.name, mirrors, row)
    except InputError as error:
        hint = f", or make another draw of it: python data/make/ogbench.py {data}"
        raise InputError(f"{error}{hint if data.startswith(MADE) else ''}") from None


def is_made(path: Path) -> bool:
    """Whether data/make/ogbench.py wrote the file."""
    return zipfile.is_zipfile(path) and "made_by.npy" in zipfile.ZipFile(path).namelist()

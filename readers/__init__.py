"""Names of public data and HDF5 files, as raw columns and a task; run.py checks the columns.

    hopper-medium-v2           a D4RL name, read from $D4RL_DATASET_DIR or ~/.d4rl/datasets,
                               downloaded when absent (data/d4rl_files.csv)
    mujoco/hopper/medium-v0    a Minari id, local or remote ($MINARI_DATASETS_PATH is respected)
    cube-single-play-singletask-v0   a single task of OGBench ($OGBENCH_DATASET_DIR is respected)
    logs.hdf5, logs.h5         a file with D4RL's key names

Nothing that a file names is run, and nothing is unpickled."""

import re
from pathlib import Path

from common import InputError
from readers import d4rl, files, minari, ogbench
from readers.tasks import DATA_DIR, near, table


def read(name: str, eval_env: str | None = None) -> tuple[dict, dict]:
    """(columns, metadata) of dataset `name`.

    columns: raw arrays under D4RL's keys; where there are `ends` (N,), they alone mark the last row
    of each episode. metadata: what README describes, and what a reader alone knows: make (a
    function that makes the task), success, most_envs, data_score, robot. eval_env: where a
    task is typed, nothing of the data's own is looked for before a download. Raises InputError."""
    known, local = table("d4rl_files.csv"), minari.local_names()
    if re.search(r"\.(hdf5|h5)$", name, re.IGNORECASE):
        columns, meta = files.read(Path(name).expanduser())
    elif name.removesuffix("-made") in known:
        columns, meta = d4rl.read(name, eval_env)
    elif name in local or re.fullmatch(r"[\w.-]+(/[\w.-]+)+-v\d+", name):
        columns, meta = minari.read(name, name not in local)
    elif ogbench.is_name(name):
        columns, meta = ogbench.read(name)
    else:
        bundled = [path.stem for path in DATA_DIR.glob("*.npz")]
        hint = near(name, [*bundled, *known, *local, *ogbench.names()])
        raise InputError(
            f"unknown dataset '{name}'{hint}; use a bundled, D4RL or OGBench name, a Minari id, or "
            "the path of a .hdf5, .h5 or .npz file"
        )
    return columns, meta

"""Every name of --env but the bundled ones, and every file, as one checked set of arrays.

    hopper-medium-v2           a D4RL name, read with h5py from $D4RL_DATASET_DIR or
                               ~/.d4rl/datasets, downloaded when absent (data/d4rl_files.csv)
    mujoco/hopper/medium-v0    a Minari id, local or remote ($MINARI_DATASETS_PATH respected)
    cube-single-play-singletask-v0   a single task of OGBench ($OGBENCH_DATASET_DIR respected)
    logs.hdf5, logs.npz        arrays with D4RL's key names

`python -m harness.readers NAME [OUT.npz]` checks what a name gives, and writes it as a file."""

import os
import re
from pathlib import Path

import numpy as np

from common import InputError
from harness.readers import d4rl, files, minari
from harness.tasks import DATA_DIR, is_ogbench, near, require, table


def read(name: str, eval_env: str | None = None) -> tuple[dict, dict]:
    """(arrays, metadata) of dataset `name` in the README's format: observations (N, S), actions
    (N, A) in the task's bounds, rewards (N,), next_observations (N, S), NaN where nobody knows what
    followed, terminals (N,) and ends (N,): the last row of each episode.

    eval_env: None for the dataset's own task, "none" for no task, else a Gymnasium id whose spaces
    must agree with the data. The task is built once here, before any time is spent. Dict and tuple
    observations are flattened, sorted by key, the same at evaluation. Raises InputError for every
    input that cannot be used."""
    known, local = table("d4rl_files.csv"), minari.local_names()
    bundled = {path.stem: path for path in DATA_DIR.glob("*.npz")}
    try:
        if name in bundled or re.search(r"\.(hdf5|h5|npz)$", name, re.IGNORECASE):
            rows = files.read_file(bundled.get(name) or Path(os.path.expanduser(name)), eval_env)
        elif name.removesuffix("-made") in known:
            rows = d4rl.read(name, eval_env)
        elif name in local or re.fullmatch(r"[\w.-]+(/[\w.-]+)+-v\d+", name):
            rows = minari.read(name, name not in local, eval_env)
        elif "-singletask" in name or is_ogbench(name):
            from harness.readers import ogbench

            rows = ogbench.read(name, eval_env)
        else:
            tasks = [f"{data}-singletask-v0" for data in table("ogbench_sets.csv")]
            hint = near(name, [*bundled, *known, *local, *tasks])
            raise InputError(
                f"unknown dataset '{name}'{hint}; use a bundled, D4RL or OGBench name, a Minari "
                "id, or the path of a .hdf5, .h5 or .npz file"
            )
        return checked(name, *rows)
    except MemoryError as e:
        raise InputError(
            f"{name} does not fit into memory ({e}); use a smaller dataset, or write the file "
            "again if it should be smaller"
        ) from e


def checked(name, arrays, meta) -> tuple[dict, dict]:
    """(arrays, metadata), whose values are finite and in bounds. Raises InputError."""
    if "env_id" in meta and meta["ref_min_score"] is None:
        print(f"note: {meta['env_id']} has no reference score, raw returns are reported")
    unknown = np.isnan(arrays["next_observations"]).all(1)
    for key in files.KEYS:
        odd = ~np.isfinite(arrays[key].reshape(len(unknown), -1)).all(1)
        for row in np.flatnonzero(odd & ~(unknown & (key == "next_observations")))[:1]:
            raise InputError(
                f"{name}: {key} row {row} is NaN or infinite; repair the row, or remove it and set "
                "`timeouts` on the row before it"
            )
    action, low, high = arrays["actions"], meta["action_low"], meta["action_high"]
    require(
        np.isfinite([low, high]).all() and (low < high).all(),
        f"{name}: action bounds {low} to {high} are infinite or crossed; correct them",
    )
    excess = np.maximum(low - action, action - high) / (high - low)
    for row, j in np.argwhere(excess > 1e-5)[:1]:
        raise InputError(
            f"{name}: actions row {row} column {j} is {action[row, j]:g}, not in [{low[j]:g}, "
            f"{high[j]:g}]; rescale or clip the actions, or add metadata action_low and "
            "action_high, or --eval-env"
        )
    if rounded := (excess > 0).sum():
        print(f"note: {name}: {rounded} action values beyond the bounds by rounding set to them")
    lost = unknown & ~arrays["terminals"]
    if lost.any():
        print(f"note: {name}: {lost.sum()} of {len(lost)} rows lack a next observation, dropped")
    require(not lost.all(), f"{name}: no row has a next observation; store next_observations")
    return arrays, meta

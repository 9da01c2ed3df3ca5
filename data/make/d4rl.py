"""Make D4RL's random locomotion data, which need no published file: their actions are uniform.

    python data/make/d4rl.py halfcheetah-random-v2
    python algorithms/td3_bc.py --env halfcheetah-random-v2-made

The recipe is that of D4RL's -v1 and -v2 random sets (Fu et al., arXiv:2004.07219;
scripts/generation/mujoco/collect_data.py --random in its repository): 1,000,000 rows of uniform
actions. An episode ends by the task, or at its 1,000th step, which is then a time limit also where
the task ended there. The last episode is cut after the last row. The robot is the one of D4RL's
recordings (docs/robots.md).

The file is another draw from the same law, and not the published one: it has a name of its own,
NAME-made.hdf5 in D4RL's folder, and its attribute made_by (JSON text) says how it was made.
"""

import json
import os
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import InputError, Seed
from readers import d4rl
from readers.tasks import find_row, near

ROWS, LIMIT = 1_000_000, 1_000
OBSERVATIONS = "observations", "next_observations"
PACKAGES = "mujoco", "gymnasium", "numpy"  # versions that decide the numbers
REAL = {  # of the published file: episodes (None: not known), smallest and largest return
    "halfcheetah-random-v2": (1_000, -525.98, -85.57),
    "hopper-random-v2": (45_240, 2.698, 292.554),
    "walker2d-random-v2": (48_908, -17.006, 75.035),
}


@dataclass
class Args:
    name: tyro.conf.Positional[str] = "halfcheetah-random-v2"
    """the data to make: halfcheetah-, hopper- or walker2d-random-v2"""
    seed: Seed = 0
    """seeds actions and start states; another seed is another draw"""
    overwrite: bool = False
    """replace a file that was made before"""


def record(env, rows: int, seed: int) -> dict:
    """Columns of `rows` steps of uniform actions in an environment without a time limit."""
    n, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
    columns = {key: np.empty((rows, n), np.float32) for key in OBSERVATIONS}
    columns["actions"] = np.empty((rows, act_dim), np.float32)
    columns["rewards"] = np.empty(rows, np.float32)
    columns |= {key: np.zeros(rows, bool) for key in ("terminals", "timeouts")}
    env.action_space.seed(seed)
    obs, steps = env.reset(seed=seed)[0], 0
    for t in tqdm(range(rows), unit=" steps", disable=None):
        action = env.action_space.sample()
        after, reward, terminal, _, _ = env.step(action)
        steps += 1
        limit = steps == LIMIT
        row = (obs, after, action, reward, terminal and not limit, limit)
        for column, value in zip(columns.values(), row, strict=True):
            column[t] = value
        obs = after
        if terminal or limit:
            obs, steps = env.reset()[0], 0
    return columns


def returns_of(columns) -> np.ndarray:
    """Returns of the whole episodes."""
    end = columns["terminals"] | columns["timeouts"]
    episode = np.cumsum(end) - end
    return np.bincount(episode, columns["rewards"].astype(float))[: end.sum()]


def write(path: Path, columns: dict, made_by: dict) -> None:
    """The file, whole or not at all."""
    partial = path.with_suffix(".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with h5py.File(partial, "w") as file:
            for key, x in columns.items():
                file[key] = x
            file.attrs["made_by"] = json.dumps(made_by)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def main(args) -> None:
    name = args.name
    if name not in REAL:
        raise InputError(f"{name} cannot be made{near(name, REAL)}: use one of {', '.join(REAL)}")
    path = d4rl.folder() / f"{name}-made.hdf5"
    if path.exists() and not args.overwrite:
        raise InputError(f"{path} exists: add --overwrite to make it again")
    gymnasium.logger.min_level = gymnasium.logger.ERROR  # -v4 is out of date on purpose
    env = d4rl.own_task(find_row("d4rl_tasks.csv", name)).open().unwrapped
    try:
        columns = record(env, ROWS, args.seed)
        returns = returns_of(columns)
        made_by = {"made_by": "StayClose, data/make/d4rl.py", "name": name, "seed": args.seed}
        made_by |= {"rows": ROWS, "episodes": len(returns)}
        made_by["versions"] = {package: version(package) for package in PACKAGES}
        write(path, columns, made_by)
    except KeyboardInterrupt:
        print("\nstopped, nothing is written", flush=True)
        raise SystemExit(130) from None
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): set D4RL_DATASET_DIR")
    episodes, low, high = REAL[name]
    print(f"episodes: {len(returns):,} here, {episodes:,} in D4RL's file")
    print(f"smallest return: {returns.min():.2f} here, {low:.2f} in D4RL's file")
    print(f"largest return: {returns.max():.2f} here, {high:.2f} in D4RL's file")
    print(f"{path}\npython algorithms/td3_bc.py --env {name}-made")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

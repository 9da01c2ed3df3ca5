"""Make data in the manner of D4RL's where the published files cannot be downloaded.

    python data/make/d4rl.py halfcheetah-random-v2
    python algorithms/td3_bc.py --env halfcheetah-random-v2-made

halfcheetah-, hopper-, walker2d- and ant-random-v2 need no published file, because their actions are
uniform. The recipe is D4RL's (Fu et al., arXiv:2004.07219; in its repository
scripts/generation/mujoco/collect_data.py --random): 1,000,000 rows; an episode ends by the task, or
at its 1,000th step, which is then a time limit also where the task ended there; the last episode is
cut after the last row. The robot is the one of D4RL's recordings (docs/robots.md).

maze2d-umaze-, -medium- and -large-v1 are made by D4RL's controller of mazes (maze2d.py, beside this
file). For umaze, the counts that are printed are near those of D4RL's file. For large they are far
from them, and why is not known.

The file is another draw and not the published one: it has a name of its own, NAME-made.hdf5 in
D4RL's folder, and its attribute made_by (JSON text) says how it was made.
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
import maze2d

from common import InputError, Seed
from readers import d4rl
from readers.tasks import find_row, near

ROWS, LIMIT = 1_000_000, 1_000
OBSERVATIONS = "observations", "next_observations"
PACKAGES = "mujoco", "gymnasium", "numpy"  # versions that decide the numbers
REAL = {  # what is known of the published files
    "halfcheetah-random-v2": "1,000 episodes, returns from -525.98 to -85.57",
    "hopper-random-v2": "45,240 episodes, returns from 2.70 to 292.55",
    "walker2d-random-v2": "48,908 episodes, returns from -17.01 to 75.04",
    "ant-random-v2": "5,822 episodes",
    "maze2d-umaze-v1": "12,459 targets, 1,566 paths of 96 to 3,993 steps",
    "maze2d-medium-v1": "nothing",
    "maze2d-large-v1": "1,062 paths of 67 to 30,470 steps",
}


@dataclass
class Args:
    name: tyro.conf.Positional[str] = "halfcheetah-random-v2"
    """the data to make: one of halfcheetah-, hopper-, walker2d- and ant-random-v2, and of
    maze2d-umaze-, -medium- and -large-v1"""
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
    row = find_row("d4rl_tasks.csv", name)
    env = d4rl.task(row)["make"]().unwrapped
    made_by = {"made_by": "StayClose, data/make/d4rl.py", "name": name, "seed": args.seed}
    made_by |= {"law": d4rl.LAW, "rows": ROWS}
    made_by |= {"versions": {package: version(package) for package in PACKAGES}}
    try:
        if name.startswith("maze2d"):
            columns = maze2d.record(env, ROWS, int(row["max_episode_steps"]), args.seed)
            paths = maze2d.visits(columns)
            found = f"{columns['timeouts'].sum():,} targets, "
            found += f"{len(paths):,} paths of {paths.min():,} to {paths.max():,} steps"
        else:
            columns = record(env, ROWS, args.seed)
            if name.startswith("ant"):  # 84 contact forces, which MuJoCo 2.0 recorded as zeros
                for key in OBSERVATIONS:
                    columns[key] = np.pad(columns[key], [(0, 0), (0, 84)])
            returns = returns_of(columns)
            found = f"{len(returns):,} episodes, "
            found += f"returns from {returns.min():.2f} to {returns.max():.2f}"
        write(path, columns, made_by | {"found": found})
    except KeyboardInterrupt:
        print("\nstopped, nothing is written", flush=True)
        raise SystemExit(130) from None
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): set D4RL_DATASET_DIR")
    print(f"made here:      {found}")
    print(f"D4RL's file:    {REAL[name]}{' is known' * (REAL[name] == 'nothing')}")
    print(f"{path}\npython algorithms/td3_bc.py --env {name}-made")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

"""Replay recorded transitions of mujoco-py on today's robots, and on those of data/d4rl_robots.csv.

    git clone https://github.com/berkeleydeeprlcourse/homework_fall2020
    python figures/robots.py --transitions homework_fall2020/hw1/cs285/expert_data

    python figures/robots.py --runs runs/hopper-medium-expert-demo__td3_bc__0 [...]    # both robots

That repository has no license, so its files are not stored here. They were recorded in 2020 with
mujoco-py on Gym's -v2 robots, on which D4RL's locomotion data were recorded too. An observation
holds the whole state but the position x (for the ant, x and y). The state is set, one action is
taken, and the largest error of a velocity is drawn and printed. Rows whose velocities were clipped
at 10 in the observation (hopper and walker2d) are left out.

With --runs, the policies of finished runs act in 100 episodes on either robot, from the same start
states. The differences of their scores are paired.

The last lines of a replay are about the cheetah's contacts and joint limits. The robot's file has 0
as their solimp[0], which today's MuJoCo raises to 1e-4. The change of a velocity with solimp[0] is
measured between 1e-4 and 2e-4, and solved for the value that fits each row best.
"""

import json
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import matplotlib.pyplot as plt
import mujoco
import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from readers.tasks import reference_scores, restore
from run import evaluate
from tools.evaluate import load_run

ROBOTS = {"Hopper": (6, 1), "Walker2d": (9, 1), "HalfCheetah": (9, 1), "Ant": (15, 2)}
# numbers of qpos, and how many of them no observation has
CLIPPED = {"Hopper", "Walker2d"}
GOOD = 1e-5
EPISODES, SEED = 100, 10_000


@dataclass
class Args:
    transitions: str = ""
    """folder with the files *-v2.pkl of recorded transitions"""
    runs: tuple[str, ...] = ()
    """folders of finished runs, whose policies are scored on both robots"""
    out: str = str(ROOT / "figures" / "robots.png")
    """the picture"""


class Numbers(pickle.Unpickler):
    """Reads arrays and nothing else."""

    def find_class(self, module, name):
        known = ("_reconstruct", "ndarray", "dtype", "scalar")
        if module.split(".")[0] == "numpy" and name in known:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"{module}.{name} is no array")


def recorded(folder, name):
    """Observations, actions and next observations of the rows that were not clipped."""
    file = next(Path(folder).glob(f"*{name}-v2.pkl"))
    keys = "observation", "action", "next_observation"
    paths = Numbers(file.open("rb")).load()
    columns = [np.concatenate([path[key] for path in paths]).astype(float) for key in keys]
    positions = ROBOTS[name][0] - ROBOTS[name][1]
    whole = np.ones(len(columns[0]), bool)
    if name in CLIPPED:
        whole = abs(columns[0][:, positions:]).max(1) < 9.999
    return [x[whole] for x in columns]


def replay(env, name, rows):
    """Velocities (rows, nv) after one step, and those that were recorded."""
    positions, unseen = ROBOTS[name]
    seen = slice(positions - unseen, positions - unseen + env.model.nv)
    found = []
    for obs, action in zip(*rows[:2], strict=True):
        mujoco.mj_resetData(env.model, env.data)
        env.set_state(np.r_[np.zeros(unseen), obs[: seen.start]], obs[seen])
        found.append(env.step(action)[0][seen])
    return np.array(found), rows[2][:, seen]


def robot(name, masses: bool, margins: bool):
    """A fresh environment, with what is asked for as in the recordings."""
    env = gymnasium.make(f"{name}-v4").unwrapped
    env.reset(seed=0)
    if masses:
        restore(env, name.lower())  # margins too: they are halved
        if not margins:
            env.model.geom_margin[:] *= 2
    return env


VERSIONS = {
    "today": (False, False),
    "masses and inertias": (True, False),
    "masses, inertias and margins": (True, True),
}


def explain_cheetah(rows) -> None:
    """Print which solimp[0] would make the error of each bad row vanish."""
    env, found = robot("HalfCheetah", True, True), []
    for value in (1e-4, 2e-4):
        env.model.geom_solimp[:, 0] = env.model.jnt_solimp[:, 0] = value
        velocity, recorded_velocity = replay(env, "HalfCheetah", rows)
        found.append(velocity)
    slope = (found[1] - found[0]) / 1e-4
    error = recorded_velocity - found[0]
    bad = abs(error).max(1) > GOOD
    change = (slope * error).sum(1)[bad] / (slope**2).sum(1)[bad]
    low, middle, high = np.quantile(change, [0.25, 0.5, 0.75])
    print(f"HalfCheetah: {bad.sum()} of {len(bad)} rows are not within {GOOD:.0e}. The change of")
    print(f"solimp[0] from 1e-4 that fits a row best: {middle:.3e} ({low:.3e} to {high:.3e})")
    left = abs(error + 1e-4 * slope).max(1)
    print(f"Extrapolated to 0, {(left < GOOD).mean():.1%} of all rows are within {GOOD:.0e}.")


def compare(folder) -> None:
    """Print the scores of a run's policy on both robots, and their paired difference."""
    run = load_run(folder, with_data=False)
    config = json.loads((Path(folder) / "config.json").read_text())
    task = config.get("task") or config["settings"]["task's env_id"]  # a run before 0.4 has "task"
    family = task.split("-")[0].lower()
    low, high = reference_scores(task)
    scores = []
    for restored in (False, True):
        envs = [gymnasium.make(task) for _ in range(EPISODES)]
        if restored:
            for env in envs:
                restore(env.unwrapped, family)
        returns = evaluate(run.act, envs, SEED, torch.device("cpu"))
        scores.append(100 * (returns - low) / (high - low))
    today, old = scores
    error = (old - today).std(ddof=1) / len(old) ** 0.5
    print(f"{Path(folder).name:45} today {today.mean():6.2f}  restored {old.mean():6.2f}  "
          f"difference {(old - today).mean():+6.2f} ± {error:.3f}", flush=True)  # fmt: skip


def main(args) -> None:
    gymnasium.logger.min_level = gymnasium.logger.ERROR  # -v4 is out of date on purpose
    for folder in args.runs:
        compare(folder)
    if args.transitions:
        draw(args)


def draw(args) -> None:
    """Replay the recordings: print the table and save the picture."""
    print("MuJoCo", mujoco.__version__)
    shared = {"sharex": True, "sharey": True, "layout": "constrained"}
    figure, panels = plt.subplots(1, 4, figsize=(12, 3.8), **shared)
    for panel, name in zip(panels, ROBOTS, strict=True):
        rows = recorded(args.transitions, name)
        for label, restored in VERSIONS.items():
            found, velocity = replay(robot(name, *restored), name, rows)
            error = np.sort(abs(found - velocity).max(1)).clip(1e-8)
            share = 100 * np.arange(1, len(error) + 1) / len(error)
            panel.step(error, share, label=label, lw=2)
            near = (error < GOOD).mean()
            print(f"{name:12} {label:29} rows {len(error):4}  median {np.median(error):.0e}  "
                  f"99% {np.quantile(error, 0.99):.0e}  largest {error[-1]:.0e}  "
                  f"below {GOOD:.0e}: {near:6.1%}")  # fmt: skip
        panel.axvline(GOOD, color="gray", ls=":", lw=1)
        panel.set(xscale="log", title=name, xlabel="largest error of a velocity")
        if name == "HalfCheetah":
            explain_cheetah(rows)
    panels[0].set_ylabel("recorded rows with\nat most this error (%)")
    figure.legend(VERSIONS, loc="outside lower center", ncols=3)
    figure.suptitle(
        "mujoco-py's recorded steps, repeated on today's robots and on the restored ones"
    )
    figure.savefig(args.out, dpi=130)


if __name__ == "__main__":
    main(tyro.cli(Args))

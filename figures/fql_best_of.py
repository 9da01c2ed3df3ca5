"""Why the best of 16 samples of FQL's flow, by Q, is good on one dataset and bad on another.

In every trained run the one-step policy, the flow and the best of 16 samples of the flow act from
the same start states. Above: how far their states are from the nearest one of 20,000 of the data's,
in scaled observations; the dotted line is the mean of this distance for the data's own rows. Below:
Q of the one-step policy's action there. A thin line is a run, a thick one the mean; a line is the
mean over the episodes that have not ended, and ends with the last one. The printed table has the
scores, also where the best of 16 acts for the first steps only, or only after them.

Differs from the paper: it has no such figure, and its FQL acts by the one-step policy alone.

    for env in hopper-replay-demo hopper-medium-expert-demo; do for seed in 0 1 2; do
        python algorithms/fql.py --env $env --seed $seed --compile --precision medium
    done; done
    python figures/fql_best_of.py runs/hopper-{replay,medium-expert}-demo__fql__[0-2]
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import gymnasium
import matplotlib.figure
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import InputError
from run import evaluate, flat, make, score
from tools.evaluate import load_run

ONE_STEP = "one-step policy"
FLOW = "its flow"
BEST = "best of 16"
ACTORS = {ONE_STEP: (0, "tab:blue"), FLOW: (1, "tab:green"), BEST: (16, "tab:red")}  # N, color
HANDOVERS = (40, 150)  # steps


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]]
    """folders of finished runs of fql.py, of one or more datasets"""
    episodes: int = 20
    """episodes per actor"""
    steps: int = 200
    """steps of an episode that are drawn"""
    out: str = "figures/fql_best_of.png"
    """where the picture goes"""


class Traced(gymnasium.Wrapper):
    """Keeps the observations of the last episode."""

    def reset(self, **options):
        obs, info = self.env.reset(**options)
        self.path = [flat(obs)]
        return obs, info

    def step(self, action):
        obs, *rest = self.env.step(action)
        self.path.append(flat(obs))
        return obs, *rest


def by(run, first, then, change):
    """The policy of one actor, and from step `change` on that of another."""
    t = 0

    def act(obs):
        nonlocal t
        number, _ = ACTORS[first if t < change else then]
        t += 1
        return run.module.policy(run.nets, obs, replace(run.args, best_of=number))

    return act


def judged(run, act, episodes):
    """Returns (episodes,), and the observations [(T, S), ...] of the episodes."""
    envs = [Traced(make(run.task)) for _ in range(episodes)]
    start = 1000 * run.args.seed + 100
    returns = evaluate(act, envs, start, torch.device("cpu"))
    return returns, [np.array(env.path) for env in envs]


def nearest(nets, obs, rows):
    """Distance (B,) of observations (B, S) from the nearest one of scaled rows (N, S)."""
    parts = nets.scaling.obs(obs).split(500)
    return torch.cat([torch.cdist(part, rows).min(1).values for part in parts])


@torch.no_grad()
def along(run, paths, rows, steps):
    """Means over the episodes that go on, each (T,), of distance and of Q, for the first steps."""
    act = by(run, ONE_STEP, ONE_STEP, 0)
    found = []
    for t in range(min(steps, max(map(len, paths)))):
        running = [path[t] for path in paths if len(path) > t]
        obs = torch.as_tensor(np.array(running))
        q = run.q(obs, act(obs)).mean()
        distance = nearest(run.nets, obs, rows).mean()
        found.append([distance.item(), q.item()])
    return np.array(found).T


def watch(folder, args):
    """(dataset, {actor: (distance, Q)}, distance of the data's own rows) of one run."""
    run = load_run(folder)
    if run.module.__name__ != "fql":
        raise InputError(f"{folder} is a run of {run.module.__name__}.py: name runs of fql.py")
    plans = {name: (name, name, 0) for name in ACTORS}
    for change in HANDOVERS:
        for first, then in ((BEST, ONE_STEP), (ONE_STEP, BEST)):
            plans[f"{first} for {change} steps, then {then}"] = first, then, change
    every = max(len(run.data.obs) // 20_000, 1)
    rows = run.nets.scaling.obs(run.data.obs[::every])
    print(f"{folder}\n| who acts | score | mean length |\n|---|---|---|")
    curves = {}
    for name, plan in plans.items():
        act = by(run, *plan)
        returns, paths = judged(run, act, args.episodes)
        scored = score(run.task, returns)
        length = np.mean([len(path) - 1 for path in paths])
        print(f"| {name} | {scored:.1f} | {length:.0f} |", flush=True)
        if name in ACTORS:
            curves[name] = along(run, paths, rows, args.steps)
    every = max(len(run.data.obs) // 500, 1)
    others = run.data.obs[1::every]
    own = nearest(run.nets, others, rows).mean()
    return run.args.env, curves, own.item()


def draw(panel, runs, which):
    """One of the curves (0: distance, 1: Q) of every actor and run, and the means of the runs."""
    for name, (_, color) in ACTORS.items():
        own = [curves[name][which] for curves in runs]
        for line in own:
            panel.plot(line, color=color, lw=0.6, alpha=0.6)
        length = max(map(len, own))
        padded = np.full((len(own), length), np.nan)
        for row, line in zip(padded, own):
            row[: len(line)] = line
        mean = np.nanmean(padded, 0)
        panel.plot(mean, color=color, lw=2, label=name)
    panel.tick_params(labelsize=10)


def main(args):
    if not args.runs:
        raise InputError("name the folders of finished runs of fql.py")
    found = {}
    for folder in args.runs:
        env, curves, own = watch(folder, args)
        found.setdefault(env, []).append((curves, own))
    figure = matplotlib.figure.Figure((8, 5.6), layout="constrained")
    panels = figure.subplots(2, len(found), sharex=True, squeeze=False)
    for column, env in zip(panels.T, found):
        curves, owns = zip(*found[env])
        for which, panel in enumerate(column):
            draw(panel, curves, which)
        column[0].axhline(np.mean(owns), color="0.3", ls=":", label="the data's own rows")
        column[0].set_title(env, fontsize=11)
        column[1].set_xlabel("step of the episode", fontsize=11)
    panels[0, 0].set_ylabel("distance from the data", fontsize=11)
    panels[1, 0].set_ylabel("Q of the one-step policy", fontsize=11)
    lines = panels[0, 0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=4, fontsize=10, frameon=False)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

"""Why the mixture ranks stopping times: what cloning does to its two gaits, over training.

bc.py is trained on seven eighths of the episodes of hopper-medium-expert-demo: half of the rows are
the expert's (return above 2,500), half the mid-level agent's, whose gait ends in a fall after about
270 steps. Left: the score from the task's own start states, of clones of all rows, and of clones
which do not see the first 150 steps of the mid-level agent's episodes, or none of the later ones.
Middle: clones of all rows are put into states of the other episodes, at least 60 steps from both
ends, and the share that still walks --ahead steps later is counted. No episode of the mid-level
agent is so long, so to walk on there means to have left its gait. Right: their mean squared error
on the rows of the other episodes. A thin line is a seed, a thick one the mean.

Differs: the method is plain cloning, which has no paper. Settings are those of bc.py's preset, and
seeds are of no reported score.

    python figures/mixture.py
"""

import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import matplotlib.figure
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "algorithms"))
import bc

from common import Data
from run import evaluate, load, make, prepare_device, score

EXPERT = "the expert's"
MEDIUM = "the mid-level agent's"
COLORS = {EXPERT: "tab:blue", MEDIUM: "tab:orange"}
START = 150  # steps
ALL_ROWS = "clone of all rows"
CLONES = {  # name: (the mid-level agent's steps that are left out, from and to, color)
    ALL_ROWS: (0, 0, "k"),
    f"without {MEDIUM} first {START} steps": (0, START, "tab:green"),
    f"without {MEDIUM} later steps": (START, 1_000, "tab:purple"),
}


@dataclass
class Args:
    seeds: tuple[int, ...] = (100, 101)
    """seeds of the clones"""
    looks: tuple[int, ...] = (500, 1000, 2000, 3000, 5000, 8000, 12000, 16000, 20000)
    """gradient steps after which a clone is looked at; the last ends its training"""
    episodes: int = 10
    """episodes of a look from the task's start; from either kind of rows there are twice as many"""
    ahead: int = 600
    """steps after which a policy that was put into a state of the data is to walk still"""
    out: str = "figures/mixture.png"
    """where the picture goes"""


class PutInto(gymnasium.Wrapper):
    """The hopper, in a state of the data: an episode has `ahead` steps at most, its return is the
    number of them."""

    def __init__(self, env, obs, ahead):
        super().__init__(env)
        self.obs = obs
        self.ahead = ahead

    def reset(self, **options):
        self.env.reset(**options)
        position = np.append(0, self.obs[:5])  # the distance is not observed, and changes nothing
        self.env.unwrapped.set_state(position, self.obs[5:])
        self.t = 0
        return self.obs, {}

    def step(self, action):
        obs, _, terminal, _, info = self.env.step(action)
        self.t += 1
        return obs, 1.0, terminal, self.t >= self.ahead, info


def halves(data):
    """{whose rows: (N,) bool}, and the rows (N,) bool of the episodes that are held out."""
    best = data.episode_return[data.episode] > 2_500
    return {EXPERT: best, MEDIUM: ~best}, data.episode % 8 == 0


def part(data, rows):
    """The transitions of some rows, as data of their own."""
    left, episode = data.episode[rows].unique_consecutive(return_inverse=True)
    return Data(
        data.obs[rows],
        data.action[rows],
        data.reward[rows],
        data.next_obs[rows],
        data.terminal[rows],
        episode,
        data.episode_return[left],
    )


def inside(data, rows, count):
    """States (count, S) in the middle of episodes, 60 steps or more from both ends. Velocities at
    the observation's bound of 10 are not taken, because the true ones are larger."""
    same = data.episode[60:] == data.episode[:-60]
    none = torch.zeros(60, dtype=torch.bool)
    middle = torch.cat([none, same]) & torch.cat([same, none])
    exact = (data.obs[:, 5:].abs() < 9.99).all(1)
    found = data.obs[rows & middle & exact].double().numpy()
    chosen = np.linspace(0, len(found) - 1, count)
    return found[chosen.astype(int)]


class Watched:
    """A run that looks at the policy now and then: at its score and, where `halves` has the rows of
    the expert and of the mid-level agent, at what it does there."""

    def __init__(self, data, task, seed, halves, args):
        self.device = prepare_device("cpu", "highest")
        self.data = data
        self.task = task
        self.args = args
        self.seed = seed
        self.halves = halves
        self.seen = defaultdict(list)
        self.envs = {"start": [make(task) for _ in range(args.episodes)]}
        for whose, rows in halves.items():
            states = inside(data, rows, 2 * args.episodes)
            self.envs[whose] = [PutInto(make(task), s, args.ahead) for s in states]

    def start(self, nets, opt):
        pass

    def loop(self, steps):
        torch.manual_seed(self.seed + 1)
        return range(1, steps + 1)

    def after(self, t, metrics, act):
        if t in self.args.looks:
            self.look(act)

    @torch.no_grad()
    def look(self, act):
        first = 1000 * self.seed + 100
        returns = {}
        for kind, envs in self.envs.items():
            returns[kind] = evaluate(act, envs, first, self.device)
        self.seen["score"].append(score(self.task, returns["start"]))
        for whose, rows in self.halves.items():
            action = act(self.data.obs[rows])
            error = (action - self.data.action[rows]).square().mean()
            walks = 100 * np.mean(returns[whose] == self.args.ahead)
            self.seen[f"walks {whose}"].append(walks)
            self.seen[f"error {whose}"].append(error.item())


def watch(name, seed, args):
    """{what: its values at every look} of one clone."""
    data, task = load("hopper-medium-expert-demo")
    kinds, held_out = halves(data)
    step = torch.arange(len(data.obs)) - torch.searchsorted(data.episode, data.episode)
    low, high, _ = CLONES[name]
    left_out = kinds[MEDIUM] & (low <= step) & (step < high)
    probed = {whose: rows & held_out for whose, rows in kinds.items() if name == ALL_ROWS}
    torch.manual_seed(seed)
    run = Watched(data, task, seed, probed, args)
    how = bc.Args(seed=seed, steps=args.looks[-1])
    bc.train(run, part(data, ~held_out & ~left_out), how)
    for what, values in run.seen.items():
        numbers = " ".join(f"{x:.3g}" for x in values)
        print(f"{name}, seed {seed}, {what}: {numbers}", flush=True)
    return run.seen


def draw(panel, t, runs, what, color, label=None):
    lines = np.array([run[what] for run in runs])
    for values in lines:
        panel.plot(t, values, c=color, lw=0.7, alpha=0.5)
    panel.plot(t, lines.mean(0), ".-", c=color, lw=2, label=label)


def main(args):
    runs = {}
    for name in CLONES:
        runs[name] = [watch(name, seed, args) for seed in args.seeds]
    figure = matplotlib.figure.Figure((8, 3.9), layout="constrained")
    panels = figure.subplots(1, 3)
    for name, (_, _, color) in CLONES.items():
        draw(panels[0], args.looks, runs[name], "score", color, name)
    all_rows = runs[ALL_ROWS]
    for whose, color in COLORS.items():
        draw(panels[1], args.looks, all_rows, f"walks {whose}", color)
        draw(panels[2], args.looks, all_rows, f"error {whose}", color, f"in, or on, {whose} rows")
    panels[0].set_title("score from the task's\nown start states", fontsize=10)
    panels[1].set_title(
        f"put into rows of the data:\nwalks {args.ahead} steps later (%)", fontsize=10
    )
    panels[2].set_title("mean squared error\non held-out rows", fontsize=10)
    for panel in panels:
        panel.set_xscale("log")
        panel.set_ylim(bottom=0)
        panel.set_xlabel("gradient step")
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    title = "BC falls on the mixture where it knows the worse gait, and the way into it"
    figure.suptitle(title, fontweight="bold", fontsize=11)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

"""Where policies walk in the bundled maze: recorded walks, then those of trained runs.

No recorded walk leads from the start (cross) to the goal (star), so a policy must stitch pieces of
several walks together. A panel of a run shows the episodes of its last evaluation, in each of which
the goal lies a little beside the star. Above it stands the run's score, the mean of its last ten
evaluations. Of ARQ the implicit policy is shown, which chooses among samples of its clone, and the
score of its only evaluation.

Differs from the papers: their ant mazes are replaced by a point in a smaller maze.

    for file in bc iql fisher_brc arq; do
        python algorithms/$file.py --env pointmaze-stitch-demo --compile --precision medium
    done
    python figures/maze.py runs/pointmaze-stitch-demo__{bc,iql,fisher_brc,arq}__0
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import matplotlib.figure
import matplotlib.patches
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from run import evaluate, flat, load, make
from tools.evaluate import load_run
from tools.report import TITLES, read_run

ENV = "pointmaze-stitch-demo"
IMPLICIT = "implicit policy"
SHOWN = 40  # recorded walks


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]]
    """folders of finished runs on pointmaze-stitch-demo"""
    out: str = "figures/maze.png"
    """where the picture goes"""


class Traced(gymnasium.Wrapper):
    """Keeps the positions of its episode."""

    def reset(self, **options):
        obs, info = self.env.reset(**options)
        self.path = [flat(obs)[:2]]
        return obs, info

    def step(self, action):
        obs, *rest = self.env.step(action)
        self.path.append(flat(obs)[:2])
        return obs, *rest


def cells_of(task):
    """{mark of the maze's map: [(x, y), ...] of such cells}. A cell is 1 wide, row 0 at the top."""
    maze = task["env_kwargs"]["maze_map"]
    height, width, found = len(maze), len(maze[0]), {}
    for row, cells in enumerate(maze):
        for column, mark in enumerate(cells):
            place = column + 0.5 - width / 2, height / 2 - row - 0.5
            found.setdefault(mark, []).append(place)
    return found


def joining(data, start) -> int:
    """How many recorded walks lead from the start's cell to the goal."""
    near = ((data.obs[:, :2] - torch.tensor(start)).abs() < 0.5).all(1)
    starts, ends = data.episode[near], data.episode[data.terminal > 0]
    return len({*starts.tolist()} & {*ends.tolist()})


def walks(run):
    """Paths [(T, 2), ...] of a run's last evaluation."""
    act = run.act
    if hasattr(run.module, "implicit_policy"):
        act = lambda obs: run.module.implicit_policy(run.nets, obs, run.args)
    envs = [Traced(make(run.task)) for _ in range(run.args.eval_episodes)]
    evaluate(act, envs, 1000 * run.args.seed + 100, torch.device("cpu"))
    return [np.array(env.path) for env in envs]


def draw(panel, cells, paths, title):
    """Walls, paths, start and goal of one panel."""
    for x, y in cells[1]:
        wall = matplotlib.patches.Rectangle((x - 0.5, y - 0.5), 1, 1, color="0.85", lw=0)
        panel.add_patch(wall)
    for path in paths:
        panel.plot(*path.T, color="tab:blue", lw=0.8, alpha=0.5)
    for mark, sign in (("r", "X"), ("g", "*")):
        panel.plot(*cells[mark][0], sign, color="tab:red", mec="white", ms=11, zorder=3)
    panel.set_title(title, fontsize=10)
    panel.set_aspect("equal")
    panel.set_axis_off()


def main(args):
    data, task = load(ENV)
    cells = cells_of(task)
    chosen = np.linspace(0, int(data.episode[-1]), SHOWN).astype(int)
    recorded = [data.obs[data.episode == i][:, :2].numpy() for i in chosen]
    count = len(data.episode_return)
    title = f"{SHOWN} recorded walks:\n{joining(data, cells['r'][0])} of {count:,} reach the goal"
    panels = [(recorded, f"{title}\nfrom the start")]
    for folder in args.runs:
        run = load_run(folder)
        known, name = read_run(Path(folder)), TITLES[run.module.__name__]
        score = known["references"].get(IMPLICIT, known["score"])
        if IMPLICIT in known["references"]:
            name += f"'s {IMPLICIT}"
        panels.append((walks(run), f"{name}:\nscore {score:.0f}"))
    size = 2.3 * len(panels), 3.3
    figure = matplotlib.figure.Figure(size, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, (paths, title) in zip(axes, panels):
        draw(panel, cells, paths, title)
    figure.suptitle(
        "No recorded walk joins start and goal; values stitch a way that cloning does not find"
    )
    figure.savefig(args.out, dpi=110)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

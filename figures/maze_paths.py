"""Where policies walk in the bundled maze: the data's paths, then those of trained runs.

No episode of the data leads from the start (cross) to the goal (star), so a policy must stitch
pieces of several episodes together. Every panel shows 20 episodes, and how many of them reach the
goal, which in every episode lies a little beside the star. Differs from the papers: their ant mazes
are replaced by a point in a smaller maze.

    for file in bc iql awac itrpo; do
        python algorithms/$file.py --env pointmaze-stitch-demo --compile --precision medium
    done
    python figures/maze_paths.py runs/pointmaze-stitch-demo__{bc,iql,awac,itrpo}__0
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.figure
import matplotlib.patches
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import InputError
from run import flat, load, make
from tools.evaluate import load_run


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]]
    """folders of finished runs on pointmaze-stitch-demo"""
    episodes: int = 20
    """episodes per panel"""
    out: str = "figures/maze_paths.png"
    """where the picture goes"""


def data_paths(data, episodes):
    """Paths [(T, 2), ...] of the data's episodes, evenly spread, and how many reach the goal."""
    chosen = np.linspace(0, int(data.episode[-1]), episodes).astype(int)
    paths = [data.obs[data.episode == i][:, :2].numpy() for i in chosen]
    return paths, sum(bool(data.terminal[data.episode == i].any()) for i in chosen)


def policy_paths(run, episodes):
    """The same of a policy in the task."""
    env = make(run.task)
    paths = []
    reached = 0
    for seed in range(episodes):
        obs = flat(env.reset(seed=seed)[0])
        ended = False
        path = []
        while not ended:
            path.append(obs[:2].copy())
            action = run.act(torch.as_tensor(obs)[None])[0].numpy()
            state, reward, terminal, timeout, _ = env.step(action)
            obs = flat(state)
            ended = terminal or timeout
        reached += reward > 0
        paths.append(np.array(path))
    return paths, reached


def draw(panel, maze, paths, title):
    """Walls, paths, start and goal of one panel. Cells are 1 wide; row 0 is at the top."""
    height = len(maze)
    width = len(maze[0])
    for row, cells in enumerate(maze):
        for column, cell in enumerate(cells):
            x = column - width / 2
            y = height / 2 - row - 1
            if cell == 1:
                panel.add_patch(matplotlib.patches.Rectangle((x, y), 1, 1, color="0.8", lw=0))
            elif cell in ("r", "g"):
                panel.plot(x + 0.5, y + 0.5, "kX" if cell == "r" else "k*", ms=9, zorder=3)
    for path in paths:
        panel.plot(*path.T, lw=0.8, alpha=0.7)
    panel.set_title(title, fontsize=12)
    panel.set_aspect("equal")
    panel.set_axis_off()


def main(args):
    if not args.runs:
        raise InputError("name the folders of finished runs, runs/pointmaze-stitch-demo__bc__0 say")
    data, task = load("pointmaze-stitch-demo")
    maze = task["env_kwargs"]["maze_map"]
    panels = [("data", *data_paths(data, args.episodes))]
    for folder in args.runs:
        run = load_run(folder)
        panels.append((run.module.__name__, *policy_paths(run, args.episodes)))
    figure = matplotlib.figure.Figure((2.2 * len(panels), 2.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, (name, paths, reached) in zip(axes, panels):
        draw(panel, maze, paths, f"{name}: {reached} of {len(paths)}")
    figure.savefig(args.out, dpi=150)
    print(f"{args.out}: " + ", ".join(f"{name} {reached}" for name, _, reached in panels))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

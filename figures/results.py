"""Learning curves of all methods on the bundled datasets, and CORL's curves over ours.

Lines are means over seeds, and bands are one standard error to both sides. Gray lines show what the
data's own episodes score, their mean and the best of them. Each method trains for as many steps as
its preset says, so the axis is the share of a method's own training: all curves end at the right
edge, with the policy that the tables judge. Differs from the figures of tools/report.py, which show
every variant that was run, against steps and against seconds, with intervals.

    ./benchmark.sh local
    python figures/results.py runs

Without an argument, the folder is results. CORL's runs (tools/corl.py) are drawn where there are
some, in a picture of their own.
"""

import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib.figure
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import InputError
from tools import report

DATASETS = ("hopper-medium-expert-demo", "hopper-replay-demo", "pointmaze-medium-demo")
TITLES = {  # in the legend's order; a method without a title is left out
    "bc": "BC",
    "bc-top10": "10% BC",
    "td3_bc": "TD3+BC",
    "rebrac": "ReBRAC",
    "sac_bc": "SAC+BC",
    "fql": "FQL",
    "awr": "AWR",
    "awac": "AWAC",
    "iql": "IQL",
    "cql": "CQL",
    "brac": "BRAC",
    "brac_plus": "BRAC+",
    "fisher_brc": "Fisher-BRC",
    "itrpo": "iTRPO",
    "arq": "ARQ",
}
PAIRS = {  # of the second picture
    "td3_bc": "TD3+BC",
    "corl_td3_bc": "TD3+BC, CORL's code",
    "iql": "IQL",
    "corl_iql": "IQL, CORL's code",
}
PICTURES = ((TITLES, 4.6, 5), (PAIRS, 3.6, 3))  # methods, height in inches, columns of the legend


@dataclass
class Args:
    folder: tyro.conf.Positional[str] = "results"
    """folder of finished runs, searched at any depth"""
    out: str = "results/curves.png"
    """where the picture of all methods goes"""
    corl: str = "results/corl.png"
    """where the picture of our code and CORL's goes"""


def curve(runs):
    """(share of the training, mean, standard error), each (T,), of runs with equal steps. The error
    is 0 for one seed. Raises InputError where steps differ."""
    steps = runs[0].steps
    for run in runs:
        if not np.array_equal(run.steps, steps):
            raise InputError(f"{run.folder} and {runs[0].folder} have other steps: move one away")
    scores = np.stack([run.scores for run in runs])  # (seeds, T)
    spread = scores.std(0, ddof=1) if len(runs) > 1 else np.zeros(len(steps))
    return steps / steps[-1], scores.mean(0), spread / np.sqrt(len(runs))


def draw(cells, titles, height, columns):
    """One panel a dataset of the methods in `titles`, and one legend of `columns` below. The
    picture is 8 inches wide: where 800 pixels are shown, a letter of size 10 has 14."""
    named = [m for m in titles if any((env, m) in cells for env in DATASETS)]
    styles, handles = report.styles_of(named), {}
    figure = matplotlib.figure.Figure((8, height), layout="constrained")
    panels = figure.subplots(1, len(DATASETS), sharey=True)
    data = report.data_scores([run for runs in cells.values() for run in runs])
    for panel, env in zip(panels, DATASETS):
        for (what, score), dashes in zip(data.get(env, {}).items(), (":", "--")):
            handles[f"data, {what}"] = panel.axhline(score, color="0.4", ls=dashes, lw=1, zorder=1)
        for method in (m for m in named if (env, m) in cells):
            x, mean, error = curve(cells[env, method])
            color, dashes = styles[method]
            (line,) = panel.plot(100 * x, mean, color=color, ls=dashes, lw=1.5)
            panel.fill_between(100 * x, mean - error, mean + error, color=color, alpha=0.15, lw=0)
            handles[titles[method]] = line
        panel.set_title(env.removesuffix("-demo"), fontsize=11)
        panel.set(xlim=(0, 100), xticks=[0, 50, 100])
        panel.tick_params(labelsize=10)
    panels[0].set_ylim(bottom=-3)
    panels[0].set_ylabel("normalized score", fontsize=11)
    panels[1].set_xlabel("share of each method's own training steps, in %", fontsize=11)
    order = [*(titles[m] for m in named), *(name for name in handles if name.startswith("data, "))]
    lines = [handles[name] for name in order]
    place = dict(loc="outside lower center", ncols=columns, columnspacing=1.2)
    figure.legend(lines, order, fontsize=10, frameon=False, handlelength=2, **place)
    return figure


def read_cells(folder):
    """{(dataset, method): finished runs} on the bundled datasets. Raises InputError."""
    cells = defaultdict(list)
    for run in report.read_runs([folder]):
        if run.finished and len(run.steps) and run.env in DATASETS:
            cells[run.env, run.method].append(run)
    for runs in cells.values():
        report.check_cell(runs, mixed=False)
    if not any(method in TITLES for _, method in cells):
        raise InputError(f"no finished run below {folder} is on a bundled dataset")
    return cells


def main(args):
    cells = read_cells(args.folder)
    has_corl = any(method.startswith("corl_") for _, method in cells)
    paths = [args.out, args.corl] if has_corl else [args.out]
    for path, (titles, height, columns) in zip(paths, PICTURES):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        draw(cells, titles, height, columns).savefig(path, dpi=160)
        print(f"written to {path}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

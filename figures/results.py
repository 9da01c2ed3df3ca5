"""Learning curves of all methods on the bundled datasets, and CORL's curves over ours.

In the picture of all methods, a point is the mean of the last ten evaluations up to there, so that
a curve's right end is the score in the tables. The second picture shows single evaluations. Lines
are means over seeds, and bands are one standard error to both sides. Gray lines show what the
data's own episodes score, their mean and the best of them. Each method trains for as many steps as
its preset says, so the axis is the share of a method's own training. Differs from the figures of
tools/report.py, which show every variant that was run, against steps and against seconds, with
intervals.

    ./benchmark.sh local
    python figures/results.py runs

It prints the table of scores, as the README has it, and the commands with their scores, as the
docstrings in algorithms/ have them. Without an argument, the folder is results.
CORL's runs (tools/corl.py) are drawn where there are some, in a picture of their own.
"""

import io
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib.figure
import numpy as np
import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import InputError
from tools import report

DATASETS = ("hopper-medium-expert-demo", "hopper-replay-demo", "pointmaze-medium-demo")
ACTORS = {  # in the legend's order; a method without a title is left out
    "bc": "BC",
    "bc-top10": "10% BC",
    "td3_bc": "TD3+BC",
    "rebrac": "ReBRAC",
    "sac_bc": "SAC+BC",
    "fql": "FQL",
    "awr": "AWR",
    "awac": "AWAC",
    "iql": "IQL",
}
CRITICS = {
    "bc": "BC",
    "cql": "CQL",
    "brac": "BRAC",
    "brac_plus": "BRAC+",
    "fisher_brc": "Fisher-BRC",
    "itrpo": "iTRPO",
    "arq": "ARQ",
}
TITLES = ACTORS | CRITICS
PAIRS = {  # of the second picture
    "td3_bc": "TD3+BC",
    "corl_td3_bc": "TD3+BC, CORL's code",
    "iql": "IQL",
    "corl_iql": "IQL, CORL's code",
}


@dataclass
class Picture:
    """`rows` are (what the methods share, their titles); `last` evaluations make a point."""

    rows: tuple
    last: int
    height: float  # in inches


ALL = Picture(
    (
        ("the actor clones the data's actions", ACTORS),
        ("the policy stays near a learned clone, or Q is kept low outside the data", CRITICS),
    ),
    last=report.LAST,
    height=8,
)
CORL = Picture((("", PAIRS),), last=1, height=3.7)


@dataclass
class Args:
    folder: tyro.conf.Positional[str] = "results"
    """folder of finished runs, searched at any depth"""
    out: str = "results/curves.png"
    """where the picture of all methods goes"""
    corl: str = "results/corl.png"
    """where the picture of our code and CORL's goes"""


def curve(runs, last):
    """(share of the training, mean, standard error), each (T,), of runs with equal steps, where a
    run's score is the mean of `last` evaluations, of fewer at the beginning. The error is 0 for one
    seed. Raises InputError where steps differ."""
    steps = runs[0].steps
    for run in runs:
        if not np.array_equal(run.steps, steps):
            raise InputError(f"{run.folder} and {runs[0].folder} have other steps: move one away")
    means = [
        [x.scores[max(0, t - last) : t].mean() for t in range(1, len(steps) + 1)] for x in runs
    ]
    scores = np.array(means)  # (seeds, T)
    spread = scores.std(0, ddof=1) if len(runs) > 1 else np.zeros(len(steps))
    return steps / steps[-1], scores.mean(0), spread / np.sqrt(len(runs))


def draw(cells, picture):
    """For each row one panel a dataset, and a legend below. The picture is 8 inches wide: where
    800 pixels are shown, a letter of size 10 has 14."""
    figure = matplotlib.figure.Figure((8, picture.height), layout="constrained")
    parts = figure.subfigures(len(picture.rows), 1, squeeze=False)[:, 0]
    data = report.data_scores([run for runs in cells.values() for run in runs])
    for part, (words, titles) in zip(parts, picture.rows):
        named = [m for m in titles if any((env, m) in cells for env in DATASETS)]
        styles, handles = report.styles_of(named), {}
        panels = part.subplots(1, len(DATASETS), sharey=True)
        for panel, env in zip(panels, DATASETS):
            for (what, score), dashes in zip(data.get(env, {}).items(), (":", "--")):
                line = panel.axhline(score, color="0.4", ls=dashes, lw=1, zorder=1)
                handles[f"data, {what}"] = line
            for method in (m for m in named if (env, m) in cells):
                x, mean, error = curve(cells[env, method], picture.last)
                color, dashes = styles[method]
                (line,) = panel.plot(100 * x, mean, color=color, ls=dashes, lw=1.5)
                low, high = mean - error, mean + error
                panel.fill_between(100 * x, low, high, color=color, alpha=0.15, lw=0)
                handles[titles[method]] = line
            panel.set_title(env.removesuffix("-demo"), fontsize=11)
            panel.set(xlim=(0, 100), ylim=(-3, 109), xticks=[0, 50, 100])
            panel.tick_params(labelsize=10)
        panels[0].set_ylabel("normalized score", fontsize=11)
        panels[1].set_xlabel("share of each method's own training steps, in %", fontsize=11)
        part.suptitle(words, fontsize=12)
        order = [*(titles[m] for m in named), *(x for x in handles if x.startswith("data, "))]
        lines = [handles[name] for name in order]
        place = dict(loc="outside lower center", ncols=4, columnspacing=1.2, handlelength=2)
        part.legend(lines, order, fontsize=10, frameon=False, **place)
    return figure


def save(figure, path):
    """A PNG of 256 colors: a third of the bytes, and no difference to the eye."""
    with io.BytesIO() as buffer:
        figure.savefig(buffer, dpi=160)
        Image.open(buffer).convert("RGB").quantize(256, dither=0).save(path, optimize=True)


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


def table(cells) -> str:
    """Markdown: what the data score, then each method's mean ± standard error, and its
    interquartile mean over all three datasets with the interval of tools/report.py. A cell says of
    how many seeds it is, unless it is of three."""
    data = report.data_scores([run for runs in cells.values() for run in runs])
    rows = [["method", *(f"`{env}`" for env in DATASETS), "IQM of all three [95% interval]"]]
    for what in ("mean of its episodes", "best episode"):
        scores = [data.get(env, {}).get(what) for env in DATASETS]
        rows.append([f"the data, {what}", *(report.number(x) or "-" for x in scores), ""])
    for method, title in (TITLES | PAIRS).items():
        if any((env, method) in cells for env in DATASETS):
            scores = [report.cell_scores(cells, env, method) for env in DATASETS]
            means = [report.summary_of(x, report.standard_error) or "-" for x in scores]
            means = [x.removesuffix(f" ({report.ENOUGH})") for x in means]
            rows.append([title, *means, interquartile(scores)])
    return "\n".join(report.markdown(*rows))


def interquartile(scores) -> str:
    """The interquartile mean of the seeds' scores (a list for each dataset) and its 95% interval;
    "-" where a dataset has too few seeds."""
    if min(map(len, scores)) < report.ENOUGH:
        return "-"
    low, high = report.bootstrap(scores, report.iqm, report.Args.resamples)
    return f"{report.iqm(np.concatenate(scores)):.1f} [{low:.1f}, {high:.1f}]"


def command(cells, algorithm: str) -> str:
    """The last line of an algorithm's docstring: the bare command, and the score of its dataset."""
    scores = report.cell_scores(cells, DATASETS[0], algorithm)
    mean = report.summary_of(scores, report.standard_error).rpartition(" (")[0]
    seeds = f"{len(scores)} seed" + "s" * (len(scores) > 1)
    return f"    python algorithms/{algorithm}.py  # scores {mean} on {DATASETS[0]} ({seeds})"


def main(args):
    cells = read_cells(args.folder)
    print(table(cells))
    for algorithm in (m for m in TITLES if (DATASETS[0], m) in cells and "-" not in m):
        print(command(cells, algorithm))
    has_corl = any(method.startswith("corl_") for _, method in cells)
    for path, picture in ((args.out, ALL), (args.corl, CORL))[: 1 + has_corl]:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save(draw(cells, picture), path)
        print(f"written to {path}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

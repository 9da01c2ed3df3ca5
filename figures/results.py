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
CORL's runs (peers/corl.py) are drawn where there are some, in a picture of their own.
"""

import io
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.figure
import pandas as pd
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
    "brac_plus": "BRAC+ (ICLR)",
    "brac_plus_acml": "BRAC+",
    "fisher_brc": "Fisher-BRC",
    "itrpo": "iTRPO",
    "arq": "ARQ",
}
TITLES = ACTORS | CRITICS
DATA = {what: what for what in ("the data, mean of its episodes", "the data, best episode")}
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
    last=10,
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
    first = runs.folder.iloc[0]
    steps = runs.curve.iloc[0].steps
    for folder, one in zip(runs.folder, runs.curve):
        if not one.steps.equals(steps):
            raise InputError(f"{folder} and {first} have other steps: move one away")
    means = [one.score.rolling(last, min_periods=1).mean() for one in runs.curve]
    scores = pd.concat(means, axis=1)  # (T, seeds)
    errors = scores.sem(axis=1).fillna(0)
    return steps / steps.max(), scores.mean(axis=1), errors


def draw(cells, picture):
    """For each row one panel a dataset, and a legend below. The picture is 8 inches wide: where
    800 pixels are shown, a letter of size 10 has 14."""
    figure = matplotlib.figure.Figure((8, picture.height), layout="constrained")
    parts = figure.subfigures(len(picture.rows), 1, squeeze=False)
    data = report.data_scores(pd.concat(cells.values()))
    for part, (words, titles) in zip(parts.flat, picture.rows):
        trained = {method for _, method in cells}
        named = [method for method in titles if method in trained]
        styles, handles = report.styles_of(named), {}
        panels = part.subplots(1, len(DATASETS), sharey=True)
        for panel, env in zip(panels, DATASETS):
            own = data.get(env, {})
            for what, dashes in zip(own, (":", "--")):
                look = dict(color="0.4", ls=dashes, lw=1, zorder=1)
                handles[f"data, {what}"] = panel.axhline(own[what], **look)
            for method in named:
                if (env, method) not in cells:
                    continue
                x, mean, error = curve(cells[env, method], picture.last)
                color, dashes = styles[method]
                (line,) = panel.plot(100 * x, mean, color=color, ls=dashes, lw=1.5)
                low, high = mean - error, mean + error
                panel.fill_between(100 * x, low, high, color=color, alpha=0.15, lw=0)
                handles[titles[method]] = line
            panel.set_title(env.removesuffix("-demo"), fontsize=11)
            panel.set(xlim=(0, 100), ylim=(-3, 109))
            panel.set_xticks([0, 50, 100])
            panel.tick_params(labelsize=10)
        panels[0].set_ylabel("normalized score", fontsize=11)
        panels[1].set_xlabel("share of each method's own training steps, in %", fontsize=11)
        part.suptitle(words, fontsize=12)
        order = [titles[m] for m in named]
        order += [x for x in handles if x.startswith("data, ")]
        lines = [handles[name] for name in order]
        place = dict(loc="outside lower center", ncols=4)
        look = dict(fontsize=10, frameon=False, columnspacing=1.2, handlelength=2)
        part.legend(lines, order, **place, **look)
    return figure


def save(figure, path):
    """A PNG of 256 colors: a third of the bytes, and no difference to the eye."""
    with io.BytesIO() as buffer:
        figure.savefig(buffer, dpi=160)
        image = Image.open(buffer).convert("RGB")
        image.quantize(256, dither=0).save(path, optimize=True)


def read_cells(folder):
    """{(dataset, method): finished runs} on the bundled datasets. Raises InputError."""
    runs = report.read_runs([folder])
    runs = runs[runs.score.notna() & runs.dataset.isin(DATASETS)]
    report.check(runs)
    if not runs.method.isin(TITLES).any():
        raise InputError(f"no finished run below {folder} is on a bundled dataset")
    cells = runs.groupby(["dataset", "method"])
    return dict(list(cells))


def table(cells) -> str:
    """Markdown: what the data score, then each method's mean ± standard error, and its
    interquartile mean over all three datasets with the interval of tools/report.py. A cell says of
    how many seeds it is, unless it is of three."""
    scores = report.score_table(pd.concat(cells.values()))
    rows = {}
    for method, title in (DATA | TITLES | PAIRS).items():
        own = scores[scores.method == method].set_index("dataset")
        own = own.reindex([*DATASETS, report.ALL])
        if own["mean"].isna().all():
            continue
        texts = own[report.SCORE].fillna("-")
        texts = texts.str.removesuffix(f" ({report.ENOUGH})")
        texts[report.ALL] = "" if method in DATA else "-"
        if own["IQM low"].notna().all():
            between = "{IQM:.1f} [{IQM low:.1f}, {IQM high:.1f}]"
            texts[report.ALL] = between.format(**own.loc[report.ALL])
        rows[title] = list(texts)
    columns = [*(f"`{env}`" for env in DATASETS), "IQM of all three [95% interval]"]
    frame = pd.DataFrame.from_dict(rows, "index", columns=columns)
    return report.markdown(frame.rename_axis("method").reset_index())


def command(cells, algorithm: str) -> str:
    """The last line of an algorithm's docstring: the bare command, the steps of its last phase, and
    the score on its dataset."""
    scores = report.score_table(cells[DATASETS[0], algorithm]).iloc[-1]
    mean, seeds = scores[report.SCORE].rstrip(")").split(" (")
    seeds += " seed" if seeds == "1" else " seeds"
    line = f"python algorithms/{algorithm}.py"
    length = f"{int(scores['steps']) / 1000:g}k steps"
    return f"    {line}  # {length}: {mean}, {DATASETS[0]}, {seeds}"


def main(args):
    cells = read_cells(args.folder)
    print(table(cells))
    for algorithm in TITLES:
        if (DATASETS[0], algorithm) in cells and "-" not in algorithm:
            print(command(cells, algorithm))
    has_corl = any(method.startswith("corl_") for _, method in cells)
    pictures = {args.out: ALL} | ({args.corl: CORL} if has_corl else {})
    for path, picture in pictures.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save(draw(cells, picture), path)
        print(f"written to {path}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

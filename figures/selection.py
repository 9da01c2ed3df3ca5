"""How well FQE ranks trained policies: its estimates against the simulator's scores, a panel for
each dataset.

Every point is a run that `python tools/evaluate.py` has judged with a simulator; bars are FQE's 95%
intervals. The gray line shows what FQE gives to the data's own policy. The command prints, for each
dataset, Spearman's rank correlation of FQE with the score, and regret@1: how many points of score
the run that FQE puts first lies below the best run. Differs from the other figures: it needs runs,
and no paper has it.

    python tools/evaluate.py runs/hopper-replay-demo__*
    python figures/selection.py runs
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.figure
import pandas as pd
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import InputError
from harness.resume import read_json
from results import TITLES
from tools import report


@dataclass
class Args:
    folder: tyro.conf.Positional[str] = "runs"
    """folder of runs that tools/evaluate.py has judged"""
    out: str = "figures/selection.png"
    """where the picture goes"""


def read(folder) -> pd.DataFrame:
    """A row for each run that has an FQE and a score. Raises InputError where there is none."""
    rows = []
    for path in sorted(Path(folder).glob("*/evaluation.json")):
        row = read_json(path) | {"data": read_json(path.with_name("config.json"))["args"]["env"]}
        if {"fqe", "score"} <= row.keys():
            rows.append(row)
    if not rows:
        raise InputError(f"{folder} has no run with an FQE and a score: use tools/evaluate.py")
    return pd.DataFrame(rows)


def choice(runs) -> tuple[float, float]:
    """(rank correlation, regret@1 in points of score) of one dataset's runs."""
    correlation = runs["fqe"].corr(runs["score"], method="spearman")
    chosen = runs.loc[runs["fqe"].idxmax(), "score"]
    return correlation, runs["score"].max() - chosen


def method_of(run: str) -> str:
    """The method in the name of a run's folder."""
    return Path(run).name.split("__")[1]


def draw(ax, runs, looks) -> dict:
    """The panel of one dataset: {name: what is drawn}; `looks` are report.styles_of the methods. A
    method with dashes in other figures has white points here."""
    points = {}
    for run in runs.itertuples():
        method = method_of(run.run)
        color, dashes = looks[method]
        face = color if dashes == "-" else "white"
        low, high = run.fqe_interval
        bar = [[run.fqe - low], [high - run.fqe]]
        look = dict(fmt="o", color=color, mfc=face, capsize=3)
        points[method] = ax.errorbar(run.score, run.fqe, bar, **look)
    line = ax.axhline(runs["data_fqe"].mean(), color="gray", linestyle="--")
    ax.set_xlabel("score in the simulator")
    return points | {"the data's own policy": line}


def row(name, runs) -> str:
    """The table's row of one dataset."""
    correlation, regret = choice(runs)
    cells = [name, str(len(runs)), f"{correlation:.2f}", f"{regret:.1f}"]
    for x in ("fqe", "score"):
        cells.append(Path(runs.loc[runs[x].idxmax(), "run"]).name)
    return f"| {' | '.join(cells)} |"


def main(args):
    every = read(args.folder)
    groups, points = list(every.groupby("data")), {}
    looks = report.styles_of(every["run"].map(method_of))
    figure = matplotlib.figure.Figure(figsize=(3 * len(groups), 3.6), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    print(
        "| data | runs | rank correlation | regret@1 | chosen | best |\n|---|---|---|---|---|---|"
    )
    for ax, (name, runs) in zip(panels, groups):
        print(row(name, runs))
        points |= draw(ax, runs, looks)
        ax.set_title(name, fontsize=11)
    panels[0].set_ylabel("FQE: estimated discounted return")
    named = {TITLES.get(method, method): points[method] for method in sorted(points)}
    place = dict(loc="outside lower center", ncols=2 * len(groups), frameon=False)
    figure.legend(named.values(), named, **place)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

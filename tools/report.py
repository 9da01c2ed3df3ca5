"""A table and one picture of runs: yours alone, beside ours, or beside a paper's.

    python tools/report.py                        # every run below runs/
    python tools/report.py results runs           # yours in red, above the runs that we stored
    python tools/report.py results runs --datasets hopper-replay-demo --methods brac awr
    python tools/report.py runs --table fisher_brc_table1      # beside the numbers of a paper

Three files are written to --out, and the first is printed too: the page runs.md, its numbers
runs.csv, and the picture runs.png, in which a dot is a run and a bar a mean. With --table they have
the table's name. A run that has no folder of its own, but lies in the three files of
tools/store.py, is called stored; all others are yours. Stored runs are shown on the datasets that
you have, and of them only those that README's table names, unless --datasets or --methods names
others.

A run's score is the one in its summary.json: the mean of its last evaluations. Where a dataset has
no simulator, the discounted return stands in its place that tools/evaluate.py estimates (FQE). Runs
of one method on one dataset are averaged over their seeds. Runs that differ in arguments, code,
data, task, versions, device or precision are never averaged. A mean over datasets is given where a
method has all datasets of the table. With five runs or more the interquartile mean is given, with
its 95% bootstrap interval.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.figure
import numpy as np
import pandas as pd
import tyro
from matplotlib.lines import Line2D

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
from common import InputError
from tools import store

PAPERS = ROOT / "data" / "paper_tables"
FREE = ("seed", "env", "name")  # may differ between runs that are averaged: rows have a hash
ENOUGH = 5  # runs, from which on an interval is given
MEAN = "mean over the datasets"
CELL = ["dataset", "method", "runs", "mean", "standard error", "IQM", "low", "high"]
YOURS = " (yours)"
FQE = ", FQE"  # ends the name of a dataset whose scores are estimates
PRINTED = dict(color="tab:blue", mfc="white", ls="", zorder=3)
TITLES = {
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
    "brac_plus": "BRAC+ (ICLR)",
    "brac_plus_acml": "BRAC+",
    "fisher_brc": "Fisher-BRC",
    "itrpo": "iTRPO",
    "arq": "ARQ",
}
PEERS = {  # other people's code
    "corl_td3_bc": "TD3+BC, CORL's code",
    "corl_iql": "IQL, CORL's code",
    "iql_authors": "IQL, its authors' code",
    "fql_authors": "FQL, its authors' code",
}


@dataclass
class Args:
    folders: tyro.conf.Positional[tuple[str, ...]] = ("runs",)
    """folders of runs, searched at any depth; results/ has ours"""
    methods: tuple[str, ...] = ()
    """methods to show, named as in a run's folder: iql, bc-top10; none: see above"""
    datasets: tuple[str, ...] = ()
    """datasets to show; none: those of your runs"""
    table: str = ""
    """name of a paper's table in data/paper_tables, whose numbers stand beside the runs"""
    out: str = "report"
    """folder of the page, the numbers and the picture"""


# ---- runs ------------------------------------------------------------------------------------


def identity(config) -> dict:
    """Everything in which runs that are averaged must agree, as text: what --resume compares, the
    task and the device."""
    device = config["machine"].rpartition(", ")[2]  # "x86_64, 2 cores, cpu"
    found = config["settings"] | {"task": config.get("task"), "device": device}
    return {name: str(x) for name, x in found.items() if name not in FREE}


def run_of(folder, config, summary, curve, fqe=None) -> dict:
    """A row of read_runs. `curve` has step and score of each evaluation, and `fqe` is what
    tools/evaluate.py has written."""
    key = store.key_of(config)
    summary = summary or {"unfinished": True}
    run = {
        "folder": str(folder),
        "dataset": key["dataset"],
        "method": "-".join(filter(None, (key["method"], key["variant"]))),
        "seed": int(key["seed"]),
        "finished": "unfinished" not in summary,
        "score": summary.get("score"),
        "references": summary.get("references", {}),
        "curve": curve[["step", "score"]].astype(float),
        "args": config["args"],
        "identity": identity(config),
    }
    if run["score"] is None and fqe and "fqe" in fqe:
        run["dataset"] += FQE
        run["score"] = fqe["fqe"]
        run["references"] = {"data": fqe.get("data_fqe")}
    return run


def read_run(folder: Path) -> dict:
    """A run in a folder of its own. Raises InputError for a damaged file."""
    judged = folder / "evaluation.json"
    try:
        config = json.loads((folder / "config.json").read_text())
        fqe = json.loads(judged.read_text()) if judged.is_file() else None
        curve = pd.DataFrame(columns=["step", "score"])
        if (folder / "eval.csv").is_file():
            curve = pd.read_csv(folder / "eval.csv")
        run = run_of(folder, config, store.summary_of(folder), curve, fqe)
    except Exception as error:  # damaged files can raise nearly anything
        fix = "repeat that run with --overwrite, or move its folder away"
        raise InputError(f"{folder} cannot be read ({error!r:.200}): {fix}") from None
    return run | {"own": True}


def read_stored(folder: Path) -> list[dict]:
    """The runs that tools/store.py has put into a folder."""
    lines, scores, _ = store.stored(folder)
    curves = dict(list(scores.groupby(store.KEY)))
    found = []
    for line in lines:
        key = tuple(store.key_of(line["config"]).values())
        where = f"{folder}: {', '.join(key)}"
        run = run_of(where, line["config"], line["summary"], curves.get(key, scores[:0]))
        found.append(run | {"own": False})
    return found


def read_runs(folders) -> pd.DataFrame:
    """A row for each run below the folders. Raises InputError."""
    own, stored = {}, {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}: use the --out of your runs")
        for path in sorted(folder.rglob("config.json")):
            own[path.resolve()] = path.parent
        for path in folder.rglob("runs.jsonl"):
            stored[path.resolve()] = path.parent
    runs = [read_run(folder) for folder in own.values()]
    for folder in stored.values():
        runs += read_stored(folder)
    if not runs:
        raise InputError(f"no run below {', '.join(map(str, folders))}: train something first")
    runs = pd.DataFrame(runs).astype({"score": float})
    return runs.assign(title=list(map(title_of, runs.method, runs.own)))


def chosen(runs, args) -> pd.DataFrame:
    """The runs that are shown: see the top of this file. Raises InputError where none is left."""
    datasets = args.datasets
    if not datasets:
        datasets = runs.dataset[runs.own] if runs.own.any() else runs.dataset
    methods = args.methods or {*TITLES, *runs.method[runs.own]}
    kept = runs[runs.dataset.isin(datasets) & runs.method.isin(methods)]
    if kept.empty:
        known = ", ".join(sorted(runs.dataset.unique()))
        others = ", ".join(sorted(runs.method.unique()))
        raise InputError(f"no such run: the datasets are {known}; the methods are {others}")
    return kept


def check(runs) -> None:
    """Raises InputError where runs that would be averaged differ, or are one seed twice."""
    for _, cell in runs.groupby(["dataset", "title"]):
        twice = cell.folder[cell.seed.duplicated(keep=False)]
        if len(twice):
            raise InputError(f"{' and '.join(twice[:2])} are the same seed: move one away")
        identities = pd.DataFrame(list(cell.identity), index=cell.folder)
        (first, one), *others = identities.fillna("unknown").iterrows()
        for folder, other in others:
            what = [f"{x} ({one[x]:.60} and {other[x]:.60})" for x in one.index[one != other]]
            if what:
                line = f"{first} and {folder} differ in {', '.join(what)}"
                raise InputError(f"{line}: give one of them a --name, or move it away")


# ---- tables ----------------------------------------------------------------------------------


def title_of(method: str, own: bool = False) -> str:
    """A method's name as a reader knows it."""
    names = TITLES | PEERS
    file, _, variant = method.partition("-")
    name = names.get(file, file)
    if method in names:
        name = names[method]
    elif variant:
        name += f" {variant}"
    return name + YOURS if own else name


def data_scores(runs) -> dict:
    """{dataset: mean score of the data's own episodes}, as the runs on it report it."""
    found = {}
    for run in runs.itertuples():
        known = run.references.get("data")
        if known is not None and run.args.get("top", 1) == 1:  # bc.py --top keeps the best alone
            found.setdefault(run.dataset, known)
    return found


def cells_of(runs) -> pd.DataFrame:
    """A row for each method and dataset: mean, standard error, number of runs, and for ENOUGH runs
    the interquartile mean with its interval."""
    rows = []
    for (dataset, title), cell in runs.dropna(subset="score").groupby(["dataset", "title"]):
        scores = cell.score.to_numpy()
        row = {"dataset": dataset, "method": title, "runs": len(cell)}
        row |= {"mean": scores.mean(), "standard error": cell.score.sem()}
        if len(cell) >= ENOUGH:
            row["IQM"] = iqm(scores)
            row["low"], row["high"] = interval(scores)
        rows.append(row)
    return pd.DataFrame(rows, columns=CELL)


def iqm(x):
    """Interquartile mean (...) of x (..., n): without the lowest and the highest n // 4 values."""
    x = np.sort(x, -1)
    cut = x.shape[-1] // 4
    return x[..., cut : x.shape[-1] - cut].mean(-1)


def interval(scores, resamples: int = 2_000):
    """95% percentile interval (low, high) of the interquartile mean."""
    rng = np.random.default_rng(0)
    drawn = rng.choice(scores, (resamples, len(scores)))
    return np.quantile(iqm(drawn), [0.025, 0.975])


def mean_text(mean, error) -> str:
    return f"{mean:.1f} ± {error:.1f}".removesuffix(" ± nan")


def markdown(frame) -> str:
    """A table without its index."""
    rows = [frame.columns, ["---"] * frame.shape[1], *frame.to_numpy()]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows).replace(" --- ", "---")


def place(title: str) -> tuple:
    """Where a method stands in a table: yours, ours, other people's, all others."""
    known = [*TITLES.values(), *PEERS.values(), title]
    return YOURS not in title, known.index(title), title


def table(runs, more=()) -> str:
    """What the data score, then each method's mean ± standard error. A column's head has the usual
    number of seeds of its cells; a cell of others has its own. `more` are rows above the methods:
    (title, {dataset: score})."""
    cells = cells_of(runs)
    columns, means = {}, {}
    for env, cell in cells.groupby("dataset"):
        usual = cell.runs.mode().max()
        column = columns[f"`{env}`, {usual} seed{'s' if usual > 1 else ''}"] = {}
        for title, scores in (
            ("the data: mean of its episodes, or its FQE", data_scores(runs)),
            *more,
        ):
            column[title] = f"{scores[env]:.1f}" if env in scores else ""
        for x in cell.to_dict("records"):
            count = "" if x["runs"] == usual else f" ({x['runs']})"
            column[x["method"]] = mean_text(x["mean"], x["standard error"]) + count
    for title, own in cells.groupby("method"):
        error = np.linalg.norm(own["standard error"]) / len(own)
        if len(own) == len(columns):
            means[title] = mean_text(own["mean"].mean(), error)
    frame = pd.DataFrame(columns)
    top = [title for title in frame.index if title.startswith("the data")]
    methods = sorted({*cells.method}, key=place)
    complete = means.keys() >= {*methods} - {*PEERS.values()}
    if complete and len(columns) > 1 and not cells.dataset.str.endswith(FQE).any():
        frame[MEAN] = pd.Series(dict.fromkeys(top, "") | means)
    frame = frame.loc[[*top, *methods]].fillna("-")
    return markdown(frame.rename_axis("method").reset_index())


def intervals(cells) -> str:
    """Interquartile means of the cells that have enough runs."""
    enough = cells.dropna(subset="IQM")
    if enough.empty:
        return ""
    enough = enough.sort_values(["dataset", "IQM"], ascending=[True, False])
    enough = enough.drop(columns=["mean", "standard error"])
    return markdown(enough.map(lambda x: f"{x:.1f}" if isinstance(x, float) else x))


# ---- a paper's table -------------------------------------------------------------------------


def paper_table(name: str):
    """A paper's table and its known faults. The first has dataset, method, run ("method",
    "method:reference" for a second policy of the run, or "" where only the paper has it), mean and
    std as they are printed, and the number `last` of evaluations that the paper averages, where it
    is not ours. Raises InputError."""
    known = sorted(path.stem for path in PAPERS.glob("*.csv") if path.stem != "faults")
    if name not in known:
        raise InputError(f"there is no table {name}: use one of {', '.join(known)}")
    rows = store.read_csv(PAPERS / f"{name}.csv")
    faults = store.read_csv(PAPERS / "faults.csv")
    return rows.assign(last=rows.get("last", "")), faults[faults.table == name]


def runs_of(paper, runs) -> pd.DataFrame:
    """The runs of a paper's table, each with the score that the paper averages, under the name that
    the paper has for it. Made data stand beside the data that they imitate."""
    made = runs[runs.finished].assign(dataset=runs.dataset.str.removesuffix("-made"))
    rows = paper.assign(source=paper.run.str.split(":").str[0])
    rows = rows.drop(columns=["mean", "std"]).rename(columns={"method": "printed"})
    found = made.merge(rows, left_on=["dataset", "method"], right_on=["dataset", "source"])
    scores = []
    for run in found.itertuples():
        reference = run.run.partition(":")[2]
        if reference:
            scores.append(run.references.get(reference, np.nan))
        elif run.last:
            scores.append(run.curve.score.tail(int(run.last)).mean())
        else:
            scores.append(run.score)
    return found.assign(score=scores, title=found.printed)


def beside(cells, paper) -> str:
    """A row for each number of the paper that a run stands beside."""
    rows = []
    for x in cells.merge(paper, on=["dataset", "method"]).to_dict("records"):
        ours = mean_text(x["mean_x"], x["standard error"])
        printed = f"{x['mean_y']} ± {x['std']}".removesuffix(" ± ")
        row = {"dataset": x["dataset"], "method": x["method"]}
        rows.append(row | {"ours": f"{ours} ({x['runs']})", "paper": printed})
    return markdown(pd.DataFrame(rows))


# ---- the picture -----------------------------------------------------------------------------


def rows_of(runs) -> list[tuple]:
    """[(title, scores, own)] of one dataset: methods from the lowest mean up, yours above them."""
    groups = runs.dropna(subset="score").groupby(["own", "title"]).score
    rows = [(title, scores.to_numpy(), own) for (own, title), scores in groups]
    return sorted(rows, key=lambda row: (row[2], row[1].mean()))


def draw(panel, rows, paper) -> None:
    """One dataset: every run as a dot, every mean as a bar. Below them a paper's mean is a diamond
    with its deviation, and each of its runs, where they are known, a circle."""
    for y, (title, scores, own) in enumerate(rows):
        color = "tab:red" if own else "0.35"
        panel.plot(scores, [y] * len(scores), "o", color=color, ms=5, alpha=0.7, mew=0)
        panel.plot([scores.mean()] * 2, [y - 0.36, y + 0.36], color=color, lw=2)
        for row in paper[paper.method == title].to_dict("records"):
            seeds = [float(x) for x in row.get("seeds", "").split()]
            panel.plot(seeds, [y - 0.25] * len(seeds), "o", ms=4, **PRINTED)
            mean, std = (float(row[x] or "nan") for x in ("mean", "std"))
            panel.errorbar(mean, y - 0.25, xerr=std, fmt="D", ms=6, **PRINTED)
    panel.set_yticks(range(len(rows)), [title for title, _, _ in rows])
    for label, (_, _, own) in zip(panel.get_yticklabels(), rows):
        label.set_color("tab:red" if own else "black")
    panel.set_ylim(-0.7, max(len(rows), 5) - 0.3)


def panels_of(figure, count: int):
    """Panels side by side, at most three in a row."""
    across = min(3, count)
    panels = figure.subplots(-(-count // across), across, squeeze=False).flatten()
    for panel in panels[count:]:
        panel.remove()
    return panels[:count]


def picture(runs, title: str, paper=None):
    """A panel for each dataset; all scores have one axis."""
    known = data_scores(runs)
    groups = {env: rows_of(cell) for env, cell in runs.dropna(subset="score").groupby("dataset")}
    height = 0.23 if paper is None else 0.45
    paper = pd.DataFrame(columns=["dataset", "method"]) if paper is None else paper
    tall = 1.1 + height * max(map(len, groups.values()))
    size = max(3.4 * min(3, len(groups)), 7), -(-len(groups) // 3) * tall + 0.8
    with matplotlib.rc_context({"font.size": 10, "text.parse_math": False}):
        figure = matplotlib.figure.Figure(size, layout="constrained")
        scored = []
        for panel, (env, rows) in zip(panels_of(figure, len(groups)), groups.items()):
            draw(panel, rows, paper[paper.dataset == env])
            if env in known:
                panel.axvline(known[env], color="0.6", ls=":", zorder=0)
            panel.set_title(env, fontsize=10)
            panel.set_xlabel("discounted return" if env.endswith(FQE) else "score")
            scored += [] if env.endswith(FQE) else [panel]
        limits = [x for panel in scored for x in panel.get_xlim()]
        for panel in scored:
            panel.set_xlim(min(limits), max(limits))
        signs = {
            "a run": dict(marker="o"),
            "mean": dict(marker="|", ms=11, mew=2),
            "the data: mean of its episodes, or its FQE": dict(ls=":", color="0.6"),
        }
        if len(paper):
            signs["a paper's mean ± deviation"] = dict(marker="D", **PRINTED)
            signs["a paper's run, where known"] = dict(marker="o", **PRINTED)
        plain = dict(ls="", color="0.35", ms=5)
        lines = [Line2D([], [], **plain | look) for look in signs.values()]
        figure.legend(lines, signs, loc="outside lower center", ncols=3, frameon=False)
        figure.suptitle(title, fontsize=11)
    return figure


# ---- command ---------------------------------------------------------------------------------


def page_of(runs, cells, paper, faults) -> str:
    """The page that is printed."""
    states = {True: "python tools/evaluate.py estimates its return", False: "not finished"}
    missing = runs[runs.score.isna()].itertuples()
    sections = {}
    if len(cells):
        sections["Mean ± standard error over seeds"] = table(runs)
        head = f"Interquartile means, from {ENOUGH} runs on, and 95% intervals"
        sections[head] = intervals(cells)
    if paper is not None:
        sections["Beside the paper's numbers"] = beside(cells, paper)
        notes = [f"- {x.dataset}, {x.method}: {x.note}" for x in faults.itertuples()]
        sections["Known faults of the paper's table"] = "\n".join(notes)
    missing = [f"- {run.folder}: {states[run.finished]}" for run in missing]
    sections["Runs without a score"] = "\n".join(missing)
    return "\n\n".join(f"# {head}\n\n{text}" for head, text in sections.items() if text)


def main(args):
    runs, paper, faults = read_runs(args.folders), None, None
    name, out = args.table or "runs", Path(args.out)
    if args.table:
        paper, faults = paper_table(args.table)
        runs = runs_of(paper, runs)
        if runs.empty:
            raise InputError(f"no run of {args.table} below {', '.join(args.folders)}")
        args.methods = args.methods or tuple(runs.method)
    runs = chosen(runs, args)
    check(runs)
    cells = cells_of(runs)
    page = page_of(runs, cells, paper, faults)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text(f"{page}\n")
    cells.to_csv(out / f"{name}.csv", index=False, float_format="%.1f")
    if len(cells):
        title = "Your runs, in red, above ours" if runs.own.nunique() > 1 else "Every run"
        figure = picture(runs, f"{title}, sorted by the mean", paper)
        figure.savefig(out / f"{name}.png", dpi=110)
    print(f"{page}\n\nwritten to {out}/{name}.*")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

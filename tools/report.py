"""Tables, intervals and learning curves of finished runs, beside the papers' numbers.

    python report.py                                   # every run under runs/
    python report.py runs --table fisher_brc_table1    # the runs of one table, beside the paper's

Writes to --out: {table}.md and {table}.csv (ours: mean, standard deviation and number of seeds of
the mean score of each run's last 10 evaluations; the paper's, labeled; the difference in combined
standard deviations, where both are known), {table}_steps.png and {table}_seconds.png (mean over
seeds and 95% bootstrap interval). Per method: average over datasets, interquartile mean with a 95%
interval (bootstrap stratified by dataset, two seeds or more in each) and the probability of
improvement over each other method, as in Agarwal et al., NeurIPS 2021 (arXiv:2108.13264). The
papers' numbers are data/paper_tables/*.csv.
"""

import csv
import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro

from tasks import DATA_DIR, InputError

PAPERS = DATA_DIR / "paper_tables"
NO_SETTING = ("seed", "device", "compile", "precision", "out", "name", "resume", "overwrite")
NO_SETTING += ("track", "log_every", "save_every", "preset")


@dataclass
class Args:
    folders: tyro.conf.Positional[tuple[str, ...]] = ("runs",)
    """folders of runs, searched at any depth"""
    table: str = ""
    """a table of data/paper_tables; none given: every run found"""
    out: str = "report"
    """folder of the tables and figures"""
    mixed: bool = False
    """average runs of different settings or versions all the same"""
    resamples: int = 2_000
    """bootstrap resamples per interval"""


@dataclass
class Result:
    """One run's folder as report.py sees it; `score` is None without an evaluation."""

    folder: Path
    env: str
    method: str  # algorithm[-name]
    seed: int
    settings: dict
    versions: dict
    finished: bool
    score: float | None
    references: dict
    steps: np.ndarray = field(repr=False)
    seconds: np.ndarray = field(repr=False)
    scores: np.ndarray = field(repr=False)


# ---- runs ------------------------------------------------------------------------------------


def read_run(folder: Path) -> Result:
    """Raises InputError where a file of the run is damaged."""
    finished = (folder / "summary.json").exists()
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        args = dict(config["args"])
        env, seed, name = args["env"], int(args["seed"]), args["name"]
        env = Path(env).stem if env.endswith((".hdf5", ".h5", ".npz")) else env
        method = config["algorithm"] + (f"-{name}" if name else "")
        versions = config["versions"] | {"commit": config["commit"]}
        path = folder / "summary.json"
        summary = json.loads(path.read_text()) if finished else {}
        score = summary.get("score")
        references = {k: float(v) for k, v in summary.get("references", {}).items()}
        if score is not None and not math.isfinite(score):
            raise ValueError(f"the score is {score}")
        path = folder / "eval.csv"
        text = path.read_text() if path.exists() else "step,seconds,score\n"
        rows = list(csv.reader(text.splitlines()))
        if not text.endswith("\n") or any(len(row) != len(rows[0]) for row in rows):
            raise ValueError("it is cut short")
        count = len(rows) - 1
        if finished and (summary.get("evaluations", count), score is None) != (count, not count):
            raise ValueError(f"its {count} evaluations are not those of summary.json")
        columns = [
            [float(row[rows[0].index(k)]) for row in rows[1:]] for k in ("step", "seconds", "score")
        ]
        return Result(
            folder=folder,
            env=env,
            method=method,
            seed=seed,
            settings={k: v for k, v in args.items() if k not in NO_SETTING},
            versions=versions,
            finished=finished,
            score=score,
            references=references,
            steps=np.array(columns[0]),
            seconds=np.array(columns[1]),
            scores=np.array(columns[2]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OSError, csv.Error) as error:
        fix = "repeat that run with --overwrite" if finished else "finish that run with --resume"
        raise InputError(
            f"{path} cannot be read ({type(error).__name__}: {error}): "
            f"{fix}, or move its folder away"
        ) from None


def read_runs(folders) -> list[Result]:
    """Every run below the folders, each once. Raises InputError where there is none."""
    for folder in folders:
        if not Path(folder).is_dir():
            raise InputError(f"no folder {folder}: give the --out of your runs")
    found = {path.parent.resolve() for f in folders for path in Path(f).rglob("config.json")}
    if not found:
        raise InputError(f"no run below {', '.join(map(str, folders))}: train something first")
    return [read_run(folder) for folder in sorted(found)]


def check_cell(runs: list[Result], mixed: bool) -> list[str]:
    """What differs between the runs of one dataset and method; InputError unless `mixed`."""
    seeds = [run.seed for run in runs]
    for run in runs:
        if seeds.count(run.seed) > 1:
            twice = [str(r.folder) for r in runs if r.seed == run.seed]
            raise InputError(f"{' and '.join(twice)} are the same seed: move one away")
    notes = []
    for what in ("settings", "versions"):
        first = getattr(runs[0], what)
        for run in runs[1:]:
            other = getattr(run, what)
            keys = [k for k in first | other if first.get(k) != other.get(k)]
            if keys:
                values = ", ".join(f"{k} {first.get(k)} and {other.get(k)}" for k in keys)
                note = f"{runs[0].folder} and {run.folder} differ in {values}"
                if not mixed:
                    raise InputError(f"{note}: add --mixed to average them, or move one away")
                notes.append(note)
    return notes


# ---- statistics ------------------------------------------------------------------------------


def iqm(x, axis=-1):
    """Interquartile mean: the mean without the lowest and the highest floor(n/4) values."""
    x, cut = np.sort(x, axis), x.shape[axis] // 4
    return np.take(x, np.arange(cut, x.shape[axis] - cut), axis).mean(axis)


def bootstrap(strata, statistic, resamples: int) -> tuple[float, float]:
    """95% percentile interval of `statistic` (..., n) -> (...) of the scores of all strata, each
    stratum (a dataset's runs) resampled on its own."""
    rng = np.random.default_rng(0)
    drawn = [np.asarray(x)[rng.integers(len(x), size=(resamples, len(x)))] for x in strata]
    return tuple(np.quantile(statistic(np.concatenate(drawn, 1)), [0.025, 0.975]))


def improvement(x, y) -> float:
    """Probability that a run of x beats one of y on the same dataset; a tie counts half. x and y
    are lists of scores per dataset."""
    pairs = [np.subtract.outer(np.asarray(a), np.asarray(b)) for a, b in zip(x, y, strict=True)]
    return float(np.mean([(p > 0).mean() + (p == 0).mean() / 2 for p in pairs]))


# ---- tables ----------------------------------------------------------------------------------


def paper_rows(table: str):
    """Rows (dataset, method, run, mean, std) of a paper's table and its known faults."""
    known = sorted(p.stem for p in PAPERS.glob("*.csv") if p.stem != "faults")
    if table not in known:
        raise InputError(
            f"no table {table}: give one of {', '.join(known)}; local, "
            "ablations and everything else are shown without --table"
        )
    with open(PAPERS / f"{table}.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    with open(PAPERS / "faults.csv", newline="") as f:
        return rows, [fault for fault in csv.DictReader(f) if fault["table"] == table]


def cell_scores(cells, env: str, run: str) -> list[float]:
    """Final scores of one dataset and run name, "method" or "method:reference" (a second policy of
    the same run), finished runs only."""
    method, _, reference = run.partition(":")
    runs = [r for r in cells.get((env, method), []) if r.score is not None]
    scores = [r.references.get(reference) if reference else r.score for r in runs]
    return [s for s in scores if s is not None]


def number(x, digits=1):
    return "" if x is None or x == "" or not np.isfinite(x) else f"{x:.{digits}f}"


def build(cells, table: str):
    """The table as (header, rows), the scores per method and dataset, the faults, the missing."""
    if table:
        paper, faults = paper_rows(table)
        envs = list(dict.fromkeys(r["dataset"] for r in paper))
        methods = {r["method"]: r["run"] for r in paper}
        printed = {(r["dataset"], r["method"]): (r["mean"], r["std"]) for r in paper}
    else:
        envs = sorted({env for env, _ in cells})
        methods = {m: m for m in sorted({method for _, method in cells})}
        printed, faults = {}, []
    ours = {m: {e: s for e in envs if (s := cell_scores(cells, e, run))}
            for m, run in methods.items() if run}  # fmt: skip
    header, rows, missing = ["dataset"], [], []
    for m, run in methods.items():
        header += [f"{m}, {x}" for x in ("ours", "std", "seeds")] if run else []
        header += [f"{m}, paper", f"{m}, paper std"] if table else []
        header += [f"{m}, difference / std"] if table and run else []
    for env in envs:
        row = [env]
        for m, run in methods.items():
            scores = ours.get(m, {}).get(env, [])
            mean = np.mean(scores) if scores else None
            std = np.std(scores, ddof=1) if len(scores) > 1 else None
            row += [number(mean), number(std), str(len(scores) or "")] if run else []
            paper_mean, paper_std = printed.get((env, m), ("", ""))
            row += [paper_mean, paper_std] if table else []
            if table and run:
                both = np.hypot(std, float(paper_std)) if std is not None and paper_std else 0
                known = paper_mean and both > 0
                row.append(number((mean - float(paper_mean)) / both) if known else "")
            absent = env.endswith(("total", "average")) or env.startswith("robomimic-")  # never run
            if run and not scores and not absent:
                missing.append(f"{env}: {m}")
        rows.append(row)
    return header, rows, ours, faults, missing


def aggregate(ours, resamples: int):
    """Markdown lines: average, IQM and its interval, probability of improvement per pair."""
    ours = {m: scores for m, scores in ours.items() if scores}
    lines = ["| method | datasets | runs | average | IQM | 95% interval |", "|---" * 6 + "|"]
    for m, scores in ours.items():
        runs = np.concatenate([*scores.values()])
        average = np.mean([np.mean(s) for s in scores.values()])
        interval = "none: a dataset has one seed"
        if min(map(len, scores.values())) > 1:
            interval = "{:.1f} to {:.1f}".format(*bootstrap(scores.values(), iqm, resamples))
        lines.append(
            f"| {m} | {len(scores)} | {len(runs)} | {average:.1f} | {iqm(runs):.1f} | {interval} |"
        )
    if len(ours) < 2:
        return lines
    lines += [
        "",
        "Probability that a run of the row beats one of the column (shared datasets):",
        "",
    ]
    lines += ["| | " + " | ".join(ours) + " |", "|---" * (len(ours) + 1) + "|"]
    for a in ours:
        row = []
        for b in ours:
            both = [e for e in ours[a] if e in ours[b]] if a != b else []
            pair = [ours[a][e] for e in both], [ours[b][e] for e in both]
            row.append(number(improvement(*pair), 2) if both else "")
        lines.append(f"| {a} | " + " | ".join(row) + " |")
    return lines


def markdown(title, header, rows, faults, lists, summary):
    """The page: columns of ours and the paper's joined as mean ± std (seeds)."""
    joined = [x for x in header if not x.endswith((" std", ", seeds")) or x.endswith("/ std")]
    marks = {(f["dataset"], f["method"]): i for i, f in enumerate(faults, 1)}
    out = []
    for row in rows:
        cells = []
        for name, value in zip(header, row, strict=True):
            mark = marks.get((row[0], name.removesuffix(", paper")))
            if name in joined:
                cells.append(value + (f" [{mark}]" if mark and value else ""))
            elif value:
                cells[-1] += f" ({value})" if name.endswith(", seeds") else f" ± {value}"
        out.append("| " + " | ".join(cells) + " |")
    page = [f"# {title}", "", "Ours: mean ± standard deviation (seeds) of the mean score of each "]
    page[-1] += "run's last 10 evaluations. The papers' numbers are labeled."
    page += ["", "| " + " | ".join(joined) + " |", "|---" * len(joined) + "|", *out, "", *summary]
    page += [""] + [f"[{i}] {f['dataset'] or 'whole table'}, {f['method'] or 'all'}: {f['note']}"
                    for i, f in enumerate(faults, 1)]  # fmt: skip
    for label, items in lists.items():
        page += ["", f"{label}:", "", *(f"- {item}" for item in items)] if items else []
    return "\n".join(page) + "\n"


def curves(cells, envs, methods, axis: str, resamples: int):
    """One panel per dataset: mean over seeds against `axis` (steps or seconds), 95% interval."""
    import matplotlib.figure

    width = min(3, len(envs))
    height = -(-len(envs) // width)
    figure = matplotlib.figure.Figure((4.5 * width, 3.4 * height), layout="constrained")
    panels = figure.subplots(height, width, squeeze=False).flat
    for panel, env in zip(panels, envs):
        for i, method in enumerate(methods):
            runs = [r for r in cells.get((env, method), []) if len(r.steps)]
            if not runs:
                continue
            steps = sorted(set.intersection(*({*r.steps} for r in runs)))
            at = [np.searchsorted(r.steps, steps) for r in runs]
            scores = np.stack([r.scores[j] for r, j in zip(runs, at)])  # (seeds, steps)
            x = np.mean([getattr(r, axis)[j] for r, j in zip(runs, at)], 0)
            style = dict(c=f"C{i}", ls="-" if i < 10 else "--", lw=1.5)  # there are ten colors
            panel.plot(x, scores.mean(0), label=f"{method} ({len(runs)})", **style)
            if len(runs) > 1:
                draw = np.random.default_rng(0).integers(len(runs), size=(resamples, len(runs)))
                low, high = np.quantile(scores[draw].mean(1), [0.025, 0.975], axis=0)
                panel.fill_between(x, low, high, color=f"C{i}", alpha=0.2, lw=0)
        panel.set_title(env, fontsize=10)
        panel.set(xlabel="gradient steps" if axis == "steps" else "seconds", ylabel="score")
        if panel.lines:
            beside = dict(loc="upper left", bbox_to_anchor=(1, 1)) if len(envs) == 1 else {}
            panel.legend(fontsize=7, **beside)
    for panel in list(panels):
        panel.set_axis_off()
    return figure


def main(args):
    if args.resamples < 1:
        raise InputError(f"--resamples is {args.resamples}: give a whole number, 1 or above")
    table_name = args.table or "runs"
    paper = paper_rows(args.table)[0] if args.table else []
    wanted = {r["run"].partition(":")[0] for r in paper if r["run"]}
    datasets = {r["dataset"] for r in paper}
    cells = defaultdict(list)
    for run in read_runs(args.folders):
        if not args.table or (run.method in wanted and run.env in datasets):
            cells[run.env, run.method].append(run)
    if not cells:
        raise InputError(f"none of the runs below {', '.join(args.folders)} is in {args.table}")
    notes = [note for runs in cells.values() for note in check_cell(runs, args.mixed)]
    header, rows, ours, faults, missing = build(cells, args.table)
    runs = [run for cell in cells.values() for run in cell]
    lists = {
        "Missing": missing,
        "Unfinished": [f"{r.folder} ({len(r.steps)} evaluations)" for r in runs if not r.finished],
        "Without evaluation": [r.folder for r in runs if r.finished and r.score is None],
        "Mixed": notes,
    }
    summary = aggregate(ours, args.resamples)
    page = markdown(table_name, header, rows, faults, lists, summary)
    envs = [env for env in dict.fromkeys(row[0] for row in rows) if any(e == env for e, _ in cells)]
    methods = sorted({method for _, method in cells})
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{table_name}.md").write_text(page)
        with open(out / f"{table_name}.csv", "w", newline="") as f:
            csv.writer(f).writerows([header, *rows])
        for axis in ("steps", "seconds"):
            figure = curves(cells, envs, methods, axis, min(args.resamples, 500))
            figure.savefig(out / f"{table_name}_{axis}.png", dpi=130)
    except OSError as error:
        line = error.strerror or error
        raise InputError(f"--out {out}: {line}; give another folder") from None
    print(page)
    print(f"written to {out}/{table_name}.md, .csv, _steps.png, _seconds.png")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

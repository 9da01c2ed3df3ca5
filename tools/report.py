"""Tables, intervals and learning curves of runs, beside the papers' numbers.

    python tools/report.py                                  # every run below runs/
    python tools/report.py results runs                     # ours and yours: runs of two folders
    python tools/report.py runs --table fisher_brc_table1   # the runs of one paper's table

Four files are written to --out: the page {table}.md, its numbers {table}.csv, and the learning
curves {table}_steps.png and {table}_seconds.png. Without --table, their name begins with "runs".
The papers' numbers are data/paper_tables/*.csv.

A run's score is the mean of its last 10 evaluations. It is the mean of the last 3 on OGBench, and
of as many as the column `last` of a paper's table says, because those papers average so many.
Runs of one dataset and one method are averaged over their seeds. Runs whose settings, code,
versions or data differ are refused, unless --mixed says that they may be averaged: a run knows the
hashes of its code and of its data, so a new commit that leaves the code as it was changes nothing.

For each method, the page has the average over datasets with its standard error, the interquartile
mean with a 95% interval (a bootstrap over seeds, each dataset on its own), and the probability of
improvement over each other method, as in Agarwal et al., NeurIPS 2021 (arXiv:2108.13264). Two seeds
say nothing about chance, so intervals and probabilities need three on every dataset.

Without --table, each dataset has a table of its own: the mean and the best of the data's episodes,
and below them the methods by their mean, with its standard error, the interquartile mean over
seeds, and its interval. The best episode is known for the bundled datasets. The last table has the
score of each run, and of the other policies that it judged, such as its clone of the data.
"""

import contextlib
import csv
import io
import itertools
import json
import math
import sys
import textwrap
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "algorithms")]
from common import Count, InputError
from harness.datasets import load_dataset
from harness.folder import DATA_FILES, read_json
from harness.run import LAST, LAST_OGBENCH, averaged, parse
from harness.tasks import DATA_DIR

PAPERS = ROOT / "data" / "paper_tables"
NO_SETTING = ("seed", "device", "compile", "precision", "out", "name", "resume", "overwrite")
NO_SETTING += ("track", "log_every", "save_every", "preset")
ENOUGH = 3  # seeds; with fewer, nothing is said about chance

# One color and line style for each method, the same in every figure; kin share their color. The
# runs of tools/corl.py are dotted in the color of ours.
STYLES = {
    "bc": ("C7", "-"),
    "bc-top10": ("C7", "--"),
    "td3_bc": ("C0", "-"),
    "corl_td3_bc": ("C0", ":"),
    "rebrac": ("C0", "--"),
    "sac_bc": ("C9", "-"),
    "fql": ("C9", "--"),
    "fql-fbrac": ("C9", ":"),
    "awr": ("C1", "-"),
    "awac": ("C1", "--"),
    "iql": ("C2", "-"),
    "corl_iql": ("C2", ":"),
    "cql": ("C3", "-"),
    "brac": ("C4", "-"),
    "brac-v": ("C4", "--"),
    "brac-p": ("C4", ":"),
    "brac_plus": ("C6", "-"),
    "brac_plus-acml": ("C6", "--"),
    "fisher_brc": ("C5", "-"),
    "itrpo": ("C8", "-"),
    "arq": ("black", "-"),
    "arq-qbeta": ("black", "--"),
}
COLORS = (*(f"C{i}" for i in range(10)), "black")
LINES = ("-", "--", ":", "-.")


@dataclass
class Args:
    phases: ClassVar[dict] = {}

    folders: tyro.conf.Positional[tuple[str, ...]] = ("runs",)
    """folders of runs, searched at any depth"""
    env: str = ""
    """dataset to show alone; empty: all of them"""
    table: str = ""
    """name of a table in data/paper_tables; empty: every run that is found"""
    out: str = "report"
    """folder of the page and the figures"""
    mixed: bool = False
    """average runs although their settings, code, versions or data differ"""
    resamples: Count = 2_000
    """bootstrap resamples per interval"""
    figures: bool = True
    """draw the learning curves too; without them the page is there at once"""

    def resolve(self):
        pass


@dataclass
class Result:
    """One run's folder as this file sees it; `score` is None without an evaluation."""

    folder: Path
    env: str
    method: str  # algorithm[-name]
    seed: int
    settings: dict  # every value as text
    versions: dict
    code: dict  # algorithm, common, harness -> hash; empty where the run knows none
    data: str  # hash of the dataset
    commit: str
    dirty: bool  # git saw edits in the checkout
    machine: str
    finished: bool = False
    score: float | None = None
    references: dict = field(default_factory=dict)
    steps: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False)
    seconds: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False)
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False)

    def identity(self) -> dict:
        """Everything in which runs that are averaged must agree."""
        known = "hashed" if self.code else f"unknown (commit {self.commit})"
        code = {f"code of {part}": value for part, value in self.code.items()}
        return self.settings | self.versions | {"data": self.data, "code": known} | code


# ---- runs ------------------------------------------------------------------------------------


@contextlib.contextmanager
def reading(path: Path, finished: bool):
    """InputError of one line where what is read inside is damaged."""
    kinds = (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, OSError, csv.Error)
    try:
        yield
    except (*kinds, RecursionError) as error:
        fix = "repeat that run with --overwrite" if finished else "finish that run with --resume"
        why = "nested too deeply" if isinstance(error, RecursionError) else f"{error!s:.200}"
        raise InputError(
            f"{path} cannot be read ({type(error).__name__}: {why}): {fix}, or move its folder away"
        ) from None


def text(value) -> str:
    """A value of a JSON file as one comparable text."""
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def texts(values) -> dict:
    return {key: text(value) for key, value in values.items()}


def finite(value) -> float:
    """The number; ValueError for one that is none."""
    if not math.isfinite(value):
        raise ValueError(f"{value} is no number")
    return float(value)


def read_config(folder: Path) -> Result:
    """What config.json says. Raises what `reading` catches."""
    config = read_json(folder / "config.json")
    args = dict(config["args"])
    env, name = args["env"], args["name"]
    env = Path(env).stem if env.lower().endswith(DATA_FILES) else env
    versions = texts(config["versions"])
    torch = versions.get("torch", "unknown")
    parts = [config.get("machine", "unknown machine")]
    threads = config.get("threads")
    parts += [f"{threads} thread{'s' * (threads != 1)}"] if threads else []
    parts += [f"precision {config['precision']}"] if "precision" in config else []
    return Result(
        folder=folder,
        env=env,
        method=config["algorithm"] + (f"-{name}" if name else ""),
        seed=int(args["seed"]),
        settings=texts({k: v for k, v in args.items() if k not in NO_SETTING}),
        versions=versions,
        code=texts(config.get("code") or {}),
        data=text(config.get("dataset_sha256", "unknown")),
        commit=text(config.get("commit")),
        dirty=bool(config.get("dirty")),
        machine=", ".join([*map(text, parts), f"torch {torch}"]),
    )


def read_evaluations(path: Path) -> np.ndarray:
    """(3, n) steps, seconds and scores of eval.csv; (3, 0) where there is none. Raises what
    `reading` catches."""
    if not path.exists():
        return np.zeros((3, 0))
    if not path.is_file():  # a pipe would be waited for
        raise ValueError("it is not a file")
    content = path.read_text()
    header, *rows = csv.reader(content.splitlines() or [""])
    if not content.endswith("\n") or any(len(row) != len(header) for row in rows):
        raise ValueError("it is cut short")
    places = [header.index(name) for name in ("step", "seconds", "score")]
    columns = np.array([[finite(float(row[i])) for row in rows] for i in places])
    if (np.diff(columns[0]) <= 0).any():
        raise ValueError("its steps do not grow")
    return columns.reshape(3, len(rows))


def read_run(folder: Path) -> Result:
    """Raises InputError where a file of the run is damaged."""
    finished = (folder / "summary.json").exists()
    with reading(folder / "config.json", finished):
        result = read_config(folder)
    with reading(folder / "eval.csv", finished):
        result.steps, result.seconds, result.scores = read_evaluations(folder / "eval.csv")
    if not finished:
        return result
    with reading(folder / "summary.json", finished):
        summary = read_json(folder / "summary.json")
        score, count = summary.get("score"), summary.get("evaluations")
        last = int(summary.get("averaged", LAST))  # older runs averaged so many, and do not say it
        references = summary.get("references", {})
        result.references = {name: finite(value) for name, value in references.items()}
        result.score = None if score is None else finite(score)
    with reading(folder / "eval.csv", finished):
        found = len(result.scores)
        if (found if count is None else count, score is None) != (found, not found):
            raise ValueError(f"its {found} evaluations are not those of summary.json")
        mean = result.scores[-last:].mean() if found else 0
        if found and not math.isclose(mean, score, rel_tol=1e-6, abs_tol=1e-6):
            raise ValueError(f"the last {last} have the mean {mean:.6g}, in summary.json {score}")
    result.finished = True
    return result


def read_runs(folders) -> list[Result]:
    """Every run below the folders, each once. Raises InputError where there is none."""
    for folder in folders:
        if not Path(folder).is_dir():
            raise InputError(f"there is no folder {folder}: use the --out of your runs")
    found = {}
    for folder in folders:
        for path in sorted(Path(folder).rglob("config.json")):
            found.setdefault(path.parent.resolve(), path.parent)
    if not found:
        raise InputError(f"no run below {', '.join(map(str, folders))}: train something first")
    return [read_run(folder) for folder in found.values()]


def best_episode(env: str, digest: str) -> float | None:
    """Score of the best episode of a bundled dataset whose hash is `digest`. None for other data,
    and where its task cannot be made."""
    if not (DATA_DIR / f"{env}.npz").is_file():
        return None
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            data, task = load_dataset(env)
    except InputError:
        return None
    if task is None or data.digest != digest:
        return None
    return task.score([data.episode_return.max().item()])


def data_scores(runs: list[Result]) -> dict:
    """{dataset: {what: score}} of the data's own episodes: their mean, as the runs on it say, and
    the best one where it is known."""
    found = {}
    for run in runs:
        if run.settings.get("top", "1.0") != "1.0":  # bc.py --top: the mean of its best episodes
            continue
        if "data" in run.references and run.env not in found:
            best = best_episode(run.env, run.data)
            found[run.env] = {"mean of its episodes": run.references["data"]}
            found[run.env] |= {} if best is None else {"best episode": best}
    return found


def difference(a: Result, b: Result) -> str:
    """What differs between two runs: names and both values."""
    one, two = a.identity(), b.identity()
    keys = [key for key in one | two if one.get(key) != two.get(key)]
    if bool(a.code) != bool(b.code):  # one of the runs knows no hash: its hashes are no news
        keys = [key for key in keys if not key.startswith("code of ")]
    values = (f"{k} ({one.get(k, 'absent'):.60} and {two.get(k, 'absent'):.60})" for k in keys)
    return ", ".join(values)


def check_cell(runs: list[Result], mixed: bool) -> list[str]:
    """What differs between the runs of one dataset and method; InputError unless `mixed`."""
    for run in runs:
        twice = [str(other.folder) for other in runs if other.seed == run.seed]
        if len(twice) > 1:
            raise InputError(f"{' and '.join(twice)} are the same seed: move one away")
    groups = []
    for run in runs:
        alike = [group for group in groups if group[0].identity() == run.identity()]
        alike[0].append(run) if alike else groups.append([run])

    def name(group):
        others = f" (and {len(group) - 1} more like it)" if len(group) > 1 else ""
        return f"{group[0].folder}{others}"

    first, notes = groups[0], []
    for group in groups[1:]:
        what = difference(first[0], group[0])
        notes.append(f"{name(first)} and {name(group)} differ in {what}")
    if notes and not mixed:
        raise InputError(f"{notes[0]}: add --mixed to average them, or move one away")
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


def deviation(scores) -> float | None:
    """Standard deviation between seeds; None for one seed."""
    return float(np.std(scores, ddof=1)) if len(scores) > 1 else None


def standard_error(scores) -> float | None:
    """Standard error of the mean over seeds; None for one seed."""
    return deviation(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None


def error_of_average(strata) -> float | None:
    """Standard error of the average over datasets, whose seeds are independent; None where a
    dataset has one seed."""
    errors = [standard_error(scores) for scores in strata]
    if None in errors:
        return None
    return math.sqrt(sum(error**2 for error in errors)) / len(errors)


# ---- tables ----------------------------------------------------------------------------------


@dataclass
class Table:
    """Datasets and methods of the page. `printed` and `faults` are empty without a paper."""

    title: str
    envs: list[str]
    runs: dict[str, str]  # method -> run, "method:reference", or "" where only the paper has it
    printed: dict = field(default_factory=dict)  # (dataset, method) -> the paper's (mean, std)
    last: dict = field(default_factory=dict)  # (dataset, method) -> evaluations in a score
    faults: list = field(default_factory=list)

    def scores(self, cells) -> dict:
        """{method: {dataset: final scores}} of the runs that are finished."""
        ours = {}
        for method, run in self.runs.items():
            if not run:
                continue
            ours[method] = {}
            for env in self.envs:
                last = self.last.get((env, method), averaged(env))
                if scores := cell_scores(cells, env, run, last):
                    ours[method][env] = scores
        return ours


def paper_rows(name: str):
    """Rows (dataset, method, run, mean, std, perhaps last) of a paper's table, and its known
    faults. Raises InputError."""
    known = sorted(path.stem for path in PAPERS.glob("*.csv") if path.stem != "faults")
    if name not in known:
        raise InputError(
            f"there is no table {name}: use one of {', '.join(known)}; local, "
            "ablations and everything else are shown without --table"
        )
    with open(PAPERS / f"{name}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    with open(PAPERS / "faults.csv", newline="") as file:
        return rows, [fault for fault in csv.DictReader(file) if fault["table"] == name]


def paper_table(name: str) -> Table:
    """A table of data/paper_tables. Raises InputError."""
    rows, faults = paper_rows(name)
    return Table(
        title=name,
        envs=list(dict.fromkeys(row["dataset"] for row in rows)),
        runs={row["method"]: row["run"] for row in rows},
        printed={(row["dataset"], row["method"]): (row["mean"], row["std"]) for row in rows},
        last={(r["dataset"], r["method"]): int(r["last"]) for r in rows if r.get("last")},
        faults=faults,
    )


def cell_scores(cells, env: str, run: str, last: int = LAST) -> list[float]:
    """Final scores of one dataset and run name, "method" or "method:reference" (a second policy of
    the same run), finished runs only."""
    method, _, reference = run.partition(":")
    runs = [r for r in cells.get((env, method), []) if r.score is not None]
    if reference:
        return [r.references[reference] for r in runs if reference in r.references]
    return [float(r.scores[-last:].mean()) for r in runs]


def number(x, digits=1):
    return "" if x is None or x == "" or not np.isfinite(x) else f"{x:.{digits}f}"


def distance(scores, printed) -> float | None:
    """Our mean minus the paper's, in combined standard deviations, where both are known."""
    mean, std = printed
    if len(scores) < ENOUGH or not mean or not std:
        return None
    both = np.hypot(deviation(scores), float(std))
    return (np.mean(scores) - float(mean)) / both if both > 0 else None


def interval_of(scores, resamples: int):
    """95% interval (low, high) of the IQM over the seeds of one dataset; (None, None) below ENOUGH
    seeds."""
    return bootstrap([scores], iqm, resamples) if len(scores) >= ENOUGH else (None, None)


def numbers(table: Table, ours, resamples: int):
    """Header and rows of the CSV."""
    header = ["dataset"]
    own_columns = ("ours", "std", "standard error", "seeds", "IQM", "IQM low", "IQM high")
    for method, run in table.runs.items():
        own = own_columns if run else ()
        paper = ("paper", "paper std") if table.printed else ()
        both = ("difference / std",) if run and table.printed else ()
        header += [f"{method}, {name}" for name in (*own, *paper, *both)]
    rows = []
    for env in table.envs:
        row = [env]
        for method, run in table.runs.items():
            scores = ours.get(method, {}).get(env, [])
            printed = table.printed.get((env, method), ("", ""))
            if run:
                mean = np.mean(scores) if scores else None
                row += map(number, (mean, deviation(scores), standard_error(scores)))
                row.append(str(len(scores) or ""))
                middle = iqm(np.array(scores)) if scores else None
                row += map(number, (middle, *interval_of(scores, resamples)))
            if table.printed:
                row += printed
            if run and table.printed:
                row.append(number(distance(scores, printed)))
        rows.append(row)
    return header, rows


def grid(table: Table, ours) -> list[str]:
    """The Markdown table: mean ± standard deviation (seeds) beside a paper's numbers, which have
    it too, and mean ± standard error (seeds) without a paper. Methods are rows there if they are
    more than the datasets."""
    spread = deviation if table.printed else standard_error
    marks = {(f["dataset"], f["method"]): i for i, f in enumerate(table.faults, 1)}
    columns = [["dataset", *table.envs]]
    for method, run in table.runs.items():
        own, paper, both = [], [], []
        for env in table.envs:
            scores = ours.get(method, {}).get(env, [])
            mean, std = table.printed.get((env, method), ("", ""))
            mark = f" [{marks[env, method]}]" if (env, method) in marks and mean else ""
            own.append(summary_of(scores, spread))
            paper.append(mean + (f" ± {std}" if std else "") + mark)
            both.append(number(distance(scores, (mean, std))))
        if not table.printed:
            columns.append([method, *own])
            continue
        columns += [[f"{method}, ours", *own]] if run else []
        columns += [[f"{method}, paper", *paper]]
        columns += [[f"{method}, difference / std", *both]] if run else []
    rows = list(zip(*columns, strict=True))
    if not table.printed and len(table.runs) > len(table.envs):
        columns[0][0] = "method"
        rows = columns
    return markdown(*rows)


def summary_of(scores, spread) -> str:
    """The mean, ± what `spread(scores)` says, and the number of seeds."""
    if not scores:
        return ""
    error = f" ± {spread(scores):.1f}" if len(scores) > 1 else ""
    return f"{np.mean(scores):.1f}{error} ({len(scores)})"


def markdown(header, *rows) -> list[str]:
    """Lines of a Markdown table; a "|" inside a cell is escaped."""
    lines = ["| " + " | ".join(x.replace("|", r"\|") for x in row) + " |" for row in rows]
    head = "| " + " | ".join(x.replace("|", r"\|") for x in header) + " |"
    return [head, "|---" * len(header) + "|", *lines]


def dataset_tables(table: Table, ours, data: dict, resamples: int) -> list[str]:
    """Markdown lines: for each dataset what its own episodes score, then every method by its mean
    over seeds."""
    lines = []
    for env in table.envs:
        found = {method: scores[env] for method, scores in ours.items() if env in scores}
        rows = [[f"data, {what}", "", number(x), "", ""] for what, x in data.get(env, {}).items()]
        for method, scores in sorted(found.items(), key=lambda item: -np.mean(item[1])):
            error, (low, high) = standard_error(scores), interval_of(scores, resamples)
            mean = number(np.mean(scores)) + ("" if error is None else f" ± {error:.1f}")
            between = "" if low is None else f"{low:.1f} to {high:.1f}"
            middle = number(iqm(np.array(scores)))
            rows.append([method, str(len(scores)), mean, middle, between])
        header = ["", "seeds", "mean ± standard error", "IQM", "95% interval of the IQM"]
        lines += [f"## {env}", "", *markdown(header, *rows), ""]
    return lines


def every_run(table: Table, cells) -> list[str]:
    """Markdown lines: the score of each finished run, and what its other policies scored."""
    rows = []
    for env, method in itertools.product(table.envs, table.runs):
        for run in sorted(cells.get((env, method), []), key=lambda run: run.seed):
            others = [f"{k} {x:.1f}" for k, x in run.references.items() if k != "data"]
            if run.finished and run.score is not None:
                rows.append([env, method, str(run.seed), number(run.score), ", ".join(others)])
    header = ["dataset", "method", "seed", "score", "other policies of the run, one evaluation"]
    return ["## Every run", "", *markdown(header, *rows)] if rows else []


def counts(strata) -> str:
    """The number of seeds per dataset: "3", or "1 to 3"."""
    low, high = min(map(len, strata)), max(map(len, strata))
    return str(low) if low == high else f"{low} to {high}"


def aggregate(ours, resamples: int) -> list[str]:
    """Markdown lines: for each method the average with its standard error and the IQM with its
    interval; then the probability of improvement for each pair."""
    ours = {method: scores for method, scores in ours.items() if scores}
    rows, fewest = [], math.inf
    for method, scores in ours.items():
        strata = list(scores.values())
        average = f"{np.mean([np.mean(x) for x in strata]):.1f}"
        error = error_of_average(strata)
        average += "" if error is None else f" ± {error:.1f}"
        interval = f"none: fewer than {ENOUGH} seeds on a dataset"
        if min(map(len, strata)) >= ENOUGH:
            interval = "{:.1f} to {:.1f}".format(*bootstrap(strata, iqm, resamples))
            fewest = min(fewest, *map(len, strata))
        middle = f"{iqm(np.concatenate(strata)):.1f}"
        rows.append([method, str(len(strata)), counts(strata), average, middle, interval])
    header = ["method", "datasets", "seeds per dataset", "average ± standard error", "IQM"]
    lines = markdown([*header, "95% interval of the IQM"], *rows)
    if fewest < 5:
        lines += ["", "The intervals are a bootstrap over seeds, which is too narrow for so few: "]
        lines[-1] += f"a dataset has {fewest}."
    return lines + (improvements(ours) if len(ours) > 1 else [])


def improvements(ours) -> list[str]:
    """Markdown lines: the probability of improvement for each pair of methods."""
    rows, fewest, left_out = [], math.inf, False
    for a in ours:
        row = [a]
        for b in ours:
            both = [env for env in ours[a] if env in ours[b]] if a != b else []
            x, y = ([ours[method][env] for env in both] for method in (a, b))
            seeds = min(map(len, x + y), default=0)
            row.append(number(improvement(x, y), 2) if seeds >= ENOUGH else "")
            left_out |= 0 < seeds < ENOUGH
            fewest = min(fewest, seeds) if seeds >= ENOUGH else fewest
        rows.append(row)
    if fewest == math.inf:
        line = "No probability of improvement is shown, because no two methods have "
        return ["", f"{line}{ENOUGH} seeds or more on every dataset that they share."]
    cases = math.comb(2 * fewest, fewest)
    lines = [
        "",
        "Probability that a run of the row beats one of the column on a dataset that both have, "
        "over all pairs of seeds. 1.00 says that every pair agreed, not that the next one will: "
        f"on one dataset, two equal methods with {fewest} seeds each reach it by chance once in "
        f"{cases} times.",
    ]
    if left_out:
        lines[-1] += f" Pairs with fewer than {ENOUGH} seeds on a shared dataset are left out."
    return [*lines, "", *markdown(["", *ours], *rows)]


def missing(table: Table, ours) -> list[str]:
    """Cells without a finished run, one line a dataset; datasets without any run in one line."""
    lines, without = [], []
    for env in table.envs:
        if env.endswith(("total", "average")) or env.startswith("robomimic-"):  # never run
            continue
        wanted = [m for m in ours if not table.printed or (env, m) in table.printed]
        absent = [m for m in wanted if env not in ours[m]]
        if absent == wanted:
            without.append(env)
        elif absent and table.printed:
            lines.append(f"{env}: {', '.join(absent)}")
    return lines + ([f"every method: {', '.join(without)}"] if without else [])


def seeds_by_cell(chosen, runs) -> list[str]:
    """Which of the runs are chosen: one line for each dataset and method, with the seeds."""
    if len(chosen) == len(runs):
        return [f"all {len(runs)} runs"]
    cells = defaultdict(list)
    for run in chosen:
        cells[run.env, run.method].append(run.seed)
    return [
        f"{env}, {method}: seed{'s' * (len(seeds) > 1)} {', '.join(map(str, sorted(seeds)))}"
        for (env, method), seeds in cells.items()
    ]


def lists(table, ours, cells, data, notes) -> dict:
    """What else the page says about its runs: {title: lines}."""
    runs = [run for cell in cells.values() for run in cell]
    own = {env: [f"{what} {x:.1f}" for what, x in found.items()] for env, found in data.items()}
    machines = Counter(run.machine for run in runs)
    return {
        "Score of the data's own episodes": [f"{env}: {', '.join(x)}" for env, x in own.items()],
        "Missing": missing(table, ours),
        "Unfinished": [f"{r.folder} ({len(r.steps)} evaluations)" for r in runs if not r.finished],
        "Without evaluation": [r.folder for r in runs if r.finished and r.score is None],
        "Averaged although they differ": notes,
        "Trained from a checkout with edits, which a commit does not show (the hashes do)": (
            seeds_by_cell([r for r in runs if r.dirty], runs)
        ),
        "Code unknown, because the run kept no hash of it": (
            seeds_by_cell([r for r in runs if not r.code], runs)
        ),
        "Trained on": [f"{name}: {n} run{'s' * (n > 1)}" for name, n in machines.items()],
    }


def page(table, ours, cells, notes, resamples: int) -> str:
    """The Markdown page."""
    data = data_scores([run for cell in cells.values() for run in cell])
    spread = "standard deviation" if table.printed else "standard error"
    first = (
        f"Ours: mean ± {spread} over seeds (number of seeds) of each run's score, which is the "
        f"mean of its last {LAST} evaluations"
    )
    first += f", or of the last {LAST_OGBENCH} on OGBench" * any(
        averaged(env) < LAST for env in table.envs
    )
    first += ", or of as many as the column `last` of the table's file says" * bool(table.last)
    first += ". The papers' numbers are labeled." if table.printed else "."
    lines = [f"# {table.title}", "", first, "", *grid(table, ours), ""]
    if not table.printed:
        lines += dataset_tables(table, ours, data, resamples)
        lines += ["## Over all datasets", ""]
    lines += [*aggregate(ours, resamples), ""]
    for i, fault in enumerate(table.faults, 1):
        where = f"{fault['dataset'] or 'whole table'}, {fault['method'] or 'all'}"
        lines.append(f"- [{i}] {where}: {fault['note']}")
    for title, items in lists(table, ours, cells, data, notes).items():
        lines += ["", f"{title}:", "", *(f"- {item}" for item in items)] if items else []
    if not table.printed:
        lines += ["", *every_run(table, cells)]
    return "\n".join(lines) + "\n"


# ---- figures ---------------------------------------------------------------------------------


def styles_of(methods) -> dict:
    """{method: (color, line style)}, no two alike: that of STYLES, and for other names one that is
    free, nearly always the same one for the same name."""
    unnamed = sorted(method for method in methods if method not in STYLES)
    free = [style for style in itertools.product(COLORS, LINES) if style not in STYLES.values()]
    for dashes in itertools.count(2):  # as many line styles as it takes
        if len(free) >= len(unnamed):
            break
        free += [(color, (0, (6, 2) + (1, 2) * dashes)) for color in COLORS]
    chosen = {method: STYLES[method] for method in methods if method in STYLES}
    for method in unnamed:
        place = zlib.crc32(method.encode()) % len(free)
        chosen[method] = free.pop(place)
    return chosen


def curve(runs, axis: str, resamples: int):
    """(x, mean, low, high) at the steps that all runs have; low and high are None below ENOUGH
    seeds."""
    steps = sorted(set.intersection(*({*run.steps} for run in runs)))
    at = [np.searchsorted(run.steps, steps) for run in runs]
    scores = np.stack([run.scores[i] for run, i in zip(runs, at)])  # (seeds, steps)
    x = np.mean([getattr(run, axis)[i] for run, i in zip(runs, at)], 0)
    if len(runs) < ENOUGH:
        return x, scores.mean(0), None, None
    draw = np.random.default_rng(0).integers(len(runs), size=(resamples, len(runs)))
    low, high = np.quantile(scores[draw].mean(1), [0.025, 0.975], axis=0)
    return x, scores.mean(0), low, high


def plain(name: str) -> str:
    """A name that matplotlib does not take for mathematics."""
    return name.replace("$", r"\$")


def curves(cells, envs, methods, axis: str, resamples: int):
    """One panel per dataset: mean over seeds against `axis` (steps or seconds) and its interval.
    One legend and one line of explanation for the whole figure."""
    import matplotlib.figure
    import matplotlib.ticker

    across = min(3, len(envs))
    down = -(-len(envs) // across)
    width = max(3.0 * across, 5.0)
    longest = max(map(len, methods))
    legend_columns = max(1, int(width / (0.08 * longest + 0.55)))
    legend_rows = -(-len(methods) // legend_columns)
    height = 2.8 * down + 0.2 * legend_rows + 0.6
    figure = matplotlib.figure.Figure((width, height), layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    styles, handles, seeds, banded = styles_of(methods), {}, set(), False
    for panel, env in zip(panels, envs):
        for method in methods:
            runs = [run for run in cells.get((env, method), []) if len(run.steps)]
            if not runs:
                continue
            x, mean, low, high = curve(runs, axis, resamples)
            if not len(x):  # no step that all seeds have
                continue
            color, line = styles[method]
            seeds.add(len(runs))
            often = max(1, len(x) // 10)
            look = dict(color=color, ls=line, lw=1.5, marker="o", ms=3, markevery=often)
            (handles[method],) = panel.plot(x, mean, **look)
            if low is not None:
                panel.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
                banded = True
        panel.set_title(plain(env), fontsize=9)
        panel.set_xlabel("gradient steps" if axis == "steps" else "seconds of training", fontsize=9)
        panel.set_ylabel("score", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        panel.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
        if panel.lines:
            panel.set_xlim(left=0)
    for panel in panels[len(envs) :]:
        panel.set_axis_off()
    if handles:
        note = explanation(seeds, banded)
        figure.suptitle(textwrap.fill(note, int(14 * width)), fontsize=9)
        names = [plain(method) for method in handles]
        lines = list(handles.values())
        place = dict(loc="outside lower center", ncols=legend_columns)
        figure.legend(lines, names, fontsize=9, frameon=False, handlelength=3, **place)
    return figure


def explanation(seeds: set, banded: bool) -> str:
    """The figure's own words: what its lines and bands are."""
    few, many = min(seeds), max(seeds)
    if many == 1:
        return "Each line is one run."
    count = str(few) if few == many else f"{few} to {many}"
    band = " No band: fewer than three seeds say nothing about chance."
    if banded:
        band = " Band: 95% bootstrap interval of that mean"
        band += f", where there are {ENOUGH} seeds or more." if few < ENOUGH else "."
    return f"Line: mean over {count} seeds.{band}"


# ---- command ---------------------------------------------------------------------------------


def collect(args, table: Table | None) -> dict:
    """{(dataset, method): runs} of the folders, of one table or dataset alone where one is asked
    for. Raises InputError."""
    wanted = {run.partition(":")[0] for run in table.runs.values()} if table else None
    cells = defaultdict(list)
    for run in read_runs(args.folders):
        if args.env in ("", run.env) and (not table or run.method in wanted):
            cells[run.env, run.method].append(run)
    if table:
        cells = {(env, method): runs for (env, method), runs in cells.items() if env in table.envs}
    if not cells:
        asked = [f"in {table.title}"] if table else []
        asked += [f"of dataset {args.env}"] if args.env else []
        raise InputError(
            f"none of the runs below {', '.join(args.folders)} is {' and '.join(asked)}"
        )
    return cells


def main(args):
    table = paper_table(args.table) if args.table else None
    cells = collect(args, table)
    notes = [note for runs in cells.values() for note in check_cell(runs, args.mixed)]
    methods = sorted({method for _, method in cells})
    if not table:
        table = Table("runs", sorted({env for env, _ in cells}), {m: m for m in methods})
    if args.env:
        table.envs = [args.env]
    ours = table.scores(cells)
    text = page(table, ours, cells, notes, args.resamples)
    envs = [env for env in table.envs if any(env == other for other, _ in cells)]
    out, name = Path(args.out), table.title
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.md").write_text(text)
        with open(out / f"{name}.csv", "w", newline="") as file:
            header, rows = numbers(table, ours, args.resamples)
            csv.writer(file).writerows([header, *rows])
        for axis in ("steps", "seconds") if args.figures else ():
            figure = curves(cells, envs, methods, axis, min(args.resamples, 500))
            figure.savefig(out / f"{name}_{axis}.png", dpi=160)
    except OSError as error:
        line = error.strerror or error
        raise InputError(f"--out {out}: {line}; use another folder") from None
    print(text)
    drawn = ", _steps.png, _seconds.png" if args.figures else ""
    print(f"written to {out}/{name}.md, .csv{drawn}")


if __name__ == "__main__":
    main(parse(Args, {})[0])

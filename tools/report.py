"""Tables, intervals and learning curves of runs, beside the papers' numbers.

    python tools/report.py                                  # every run below runs/
    python tools/report.py results runs                     # ours and yours: runs of two folders
    python tools/report.py runs --table fisher_brc_table1   # the runs of one paper's table

Four files are written to --out: the page {table}.md, its numbers {table}.csv, and the learning
curves {table}_steps.png and {table}_seconds.png. Without --table, their name begins with "runs".
The papers' numbers are data/paper_tables/*.csv.

A run's score is the one in its summary.json: the mean of its last evaluations, 10 of them, or 3 on
OGBench. Beside a paper's number, as many are averaged as the column `last` of the paper's table
says. Runs of one dataset and one method are averaged over their seeds. They are refused where they
differ in anything that can change a number: flags, among them --precision and --compile, the task,
the hashes of code, data and clone, and versions. What a run does not know, such as a version that
older runs did not keep, is equal only where the other run does not know it either. --mixed averages
such runs, and lists what differs above the tables. A new commit that leaves the code as it was
changes no hash.

The first table sets methods against datasets. The second has for each dataset, and over all
datasets of a method, the best method first: mean, standard error and standard deviation over seeds,
and the interquartile mean with its 95% interval. Both have the steps of training, and the number of
evaluations x that of episodes in each, and both have the mean and the best of the data's own
episodes; the best is known for the bundled datasets. The third has the probability that a run of
one method beats one of another, as in Agarwal et al., NeurIPS 2021 (arXiv:2108.13264). The last has
every run, also those that are not finished, with what the other policies scored that it judged,
such as its clone of the data.

Intervals are a bootstrap over seeds, each dataset on its own, which is too narrow for few seeds.
Two seeds say nothing about chance, so intervals and probabilities need three. With three seeds
each, one of two equal methods wins every pair on a dataset once in ten times.
"""

import contextlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import scipy.stats
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "algorithms")]
from common import Flags, InputError, in_one_line
from run import load, parse, score
from tools import store

PAPERS = ROOT / "data" / "paper_tables"
LENGTHS = ["steps", "evaluations x episodes"]
SCORE = "mean ± standard error (seeds)"
CELL = ["dataset", "method", SCORE, "seeds", "mean", "standard error", "std"]
CELL += ["IQM", "IQM low", "IQM high", *LENGTHS]
RUN = ["dataset", "method", "seed", "score", *LENGTHS]
RUN += ["references", "finished", "commit", "machine"]
ALL = "over its datasets"
ENOUGH = 3  # seeds; with fewer, nothing is said about chance
FIX = "finish that run with --resume, repeat it with --overwrite, or move its folder away"

# Color and line of each method, the same in every figure. The runs of other people's code are
# dotted, or dashed and dotted, in the color of ours.
STYLES = {
    "bc": "C7 -",
    "bc-top10": "C7 --",
    "td3_bc": "C0 -",
    "corl_td3_bc": "C0 :",
    "rebrac": "C0 --",
    "sac_bc": "C9 -",
    "fql": "C9 --",
    "fql_authors": "C9 :",
    "awr": "C1 -",
    "awac": "C1 --",
    "iql": "C2 -",
    "corl_iql": "C2 :",
    "iql_authors": "C2 -.",
    "cql": "C3 -",
    "brac": "C4 -",
    "brac_plus": "C6 --",
    "brac_plus_acml": "C6 -",
    "fisher_brc": "C5 -",
    "itrpo": "C8 -",
    "arq": "black -",
}


@dataclass
class Args(Flags):
    folders: tyro.conf.Positional[tuple[str, ...]] = ("runs",)
    """folders of runs, searched at any depth"""
    table: str = ""
    """name of a table in data/paper_tables; empty: every run that is found"""
    out: str = "report"
    """folder of the page and the figures"""
    mixed: bool = False
    """average runs although their settings, code, versions or data differ, and list what differs"""
    figures: bool = True
    """draw the learning curves too; without them the page is there at once"""


# ---- runs ------------------------------------------------------------------------------------


def read_config(text: str) -> dict:
    """What config.json tells. `identity` is everything in which runs that are averaged must agree,
    as text: what --resume compares, the task, and the precision that was used."""
    config = json.loads(text)
    identity, key = config["settings"], store.key_of(config)
    identity["task"], identity["precision"] = config.get("task"), config.get("precision")
    del identity["seed"]
    variant = f"-{key['variant']}" if key["variant"] else ""
    return {
        "dataset": key["dataset"],
        "method": key["method"] + variant,
        "seed": int(key["seed"]),
        "steps": int(config["args"]["steps"]),
        "identity": {name: str(value) for name, value in identity.items()},
        "commit": f"{config.get('commit')!s:.7}" + " with edits" * bool(config.get("dirty")),
        "machine": f"{config.get('machine')}, threads: {config.get('threads')}",
    }


def read_evaluations(text: str) -> dict:
    """`curve`: a row for each evaluation, with steps, seconds and score."""
    if not text.endswith("\n"):
        raise ValueError("it is cut short")
    curve = pd.read_csv(io.StringIO(text), dtype=str, index_col=False).astype(float)
    curve = curve.rename(columns={"step": "steps"})
    grows = (curve.steps.diff().dropna() > 0).all()
    if not grows or not np.isfinite(curve).all(axis=None):
        raise ValueError("a value is missing or no finite number, or steps do not grow")
    episodes = curve.columns.str.startswith("episode_").sum()
    lengths = {"evaluations x episodes": f"{len(curve)} x {episodes}"}
    return {"curve": curve[["steps", "seconds", "score"]]} | lengths


def read_summary(text: str | None, scores) -> dict:
    """`score`, nan without an evaluation, and `references`, the scores of the data and of other
    policies. An unfinished run has no file: None."""
    if text is None:
        return {"finished": False, "score": np.nan, "references": {}}
    summary = json.loads(text)
    mean = scores.tail(summary.get("averaged", 10)).mean()  # older runs do not say it
    same = np.isclose(mean, np.array(summary["score"], float), equal_nan=True)
    if not same or summary["evaluations"] != len(scores):
        raise ValueError(f"eval.csv has {len(scores)} evaluations, and the score {mean:.6g}")
    references = {name: float(score) for name, score in summary["references"].items()}
    return {"finished": True, "score": mean, "references": references}


def run_of(where: str, files: dict[str, str]) -> dict:
    """One row of read_runs, of the texts of a run's files. Raises InputError where one of them is
    damaged."""
    name = "config.json"
    try:
        run = {"folder": where} | read_config(files[name])
        name = "eval.csv"
        run |= read_evaluations(files.get(name, "step,seconds,score\n"))
        name = "summary.json"
        return run | read_summary(files.get(name), run["curve"].score)
    except Exception as error:  # damaged files can raise nearly anything
        why = f"{type(error).__name__}: {error!s:.200}"
        raise InputError(f"{where}/{name} cannot be read ({why}): {FIX}") from None


def files_of(folder: Path) -> dict[str, str]:
    """The texts of a run's files. Raises InputError for one that cannot be read."""
    found = {}
    for name in ("config.json", "eval.csv", "summary.json"):
        path = folder / name
        with in_one_line(f"{path} cannot be read", FIX):
            if path.exists() and not path.is_file():  # a pipe would be waited for
                raise ValueError("it is not a file")
            if path.exists():
                found[name] = path.read_text()
    return found


def read_run(folder: Path) -> dict:
    """One row of read_runs, of a run's own folder. Raises InputError."""
    return run_of(str(folder), files_of(folder))


def read_runs(folders) -> pd.DataFrame:
    """A row for each run below the folders, with what the readers above return, sorted by dataset,
    method and seed; runs may lie in folders of their own, or together as tools/store.py leaves
    them. Raises InputError."""
    found, together = {}, set()
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}: use the --out of your runs")
        for path in sorted(folder.rglob("config.json")):
            found[path.parent.resolve()] = path.parent
        together |= {path.parent.resolve() for path in folder.rglob("runs.jsonl")}
    runs = [read_run(path) for path in found.values()]
    for folder in sorted(together):
        try:
            stored = store.files_of(folder)
        except Exception as error:  # damaged files can raise nearly anything
            why = f"{type(error).__name__}: {error!s:.200}"
            raise InputError(f"runs in {folder} are damaged ({why}): get them again") from None
        runs += [run_of(*run) for run in stored]
    if not runs:
        raise InputError(f"no run below {', '.join(map(str, folders))}: train something first")
    return pd.DataFrame(runs).sort_values(["dataset", "method", "seed"])


def check(runs, mixed: bool = False) -> list[str]:
    """What differs between runs of one dataset and method. Raises InputError for that unless
    `mixed`, and for a seed that is there twice."""
    notes = []
    for _, cell in runs.groupby(["dataset", "method"]):
        twice = cell[cell.seed.duplicated(keep=False)]
        if len(twice):
            raise InputError(f"{' and '.join(twice.folder[:2])} are the same seed: move one away")
        identities = pd.DataFrame(list(cell.identity), index=cell.folder).fillna("unknown")
        (first, one), *others = identities.drop_duplicates().iterrows()
        for folder, other in others:
            what = [f"{k} ({one[k]:.60} and {other[k]:.60})" for k in one.index[one != other]]
            notes.append(f"{first} and {folder} differ in {', '.join(what)}")
    if notes and not mixed:
        raise InputError(f"{notes[0]}: add --mixed to average them, or move one away")
    return notes


def best_episode(env: str, digest: str) -> float | None:
    """Score of the best episode of a bundled dataset whose hash is `digest`. None for other data,
    and where its task cannot be made."""
    if (ROOT / "data" / f"{env}.npz").is_file():
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(InputError):
            data, task = load(env)
            if task and data.digest == digest:
                return score(task, [data.episode_return.max().item()])


def data_scores(runs) -> dict:
    """{dataset: {what: score}} of the data's own episodes: their mean, as the runs on it say, and
    the best one where it is known."""
    found = {}
    for run in runs.itertuples():
        all_of_them = run.identity.get("top", "1.0") == "1.0"  # bc.py --top clones the best
        if all_of_them and "data" in run.references and run.dataset not in found:
            best = best_episode(run.dataset, run.identity["data"])
            found[run.dataset] = {"mean of its episodes": run.references["data"]}
            if best is not None:
                found[run.dataset]["best episode"] = best
    return found


# ---- statistics ------------------------------------------------------------------------------


def iqm(x):
    """Interquartile mean (...) of x (..., n): without the lowest and the highest n // 4 values."""
    return scipy.stats.trim_mean(x, 0.25, axis=-1)


def bootstrap(strata, statistic=iqm, resamples: int = 2_000):
    """95% percentile interval (low, high) of `statistic` (..., n) -> (...) of the scores of all
    strata, each stratum (a dataset's runs) resampled on its own."""
    rng = np.random.default_rng(0)
    drawn = []
    for scores in map(np.asarray, strata):
        seeds = rng.integers(len(scores), size=(resamples, len(scores)))
        drawn.append(scores[seeds])
    found = statistic(np.concatenate(drawn, 1))
    return np.quantile(found, [0.025, 0.975], axis=0)


def statistics(strata) -> dict:
    """Mean over datasets with its standard error, and interquartile mean with its interval, of the
    scores of one or more datasets, whose seeds are independent. What too few seeds leave open is
    nan."""
    errors = [pd.Series(scores).sem() for scores in strata]  # nan for one seed
    enough = min(map(len, strata)) >= ENOUGH
    low, high = bootstrap(strata) if enough else (np.nan, np.nan)
    return {
        "mean": np.mean([np.mean(scores) for scores in strata]),
        "standard error": np.linalg.norm(errors) / len(errors),
        "IQM": iqm(np.concatenate(strata)),
        "IQM low": low,
        "IQM high": high,
    }


# ---- tables ----------------------------------------------------------------------------------


def paper_table(name: str):
    """A paper's table and its known faults. The first has dataset, method, run ("method",
    "method:reference" for a second policy of the run, or "" where only the paper has it), paper and
    paper std as they are printed, and last, perhaps empty. Raises InputError."""
    known = sorted(path.stem for path in PAPERS.glob("*.csv") if path.stem != "faults")
    if name not in known:
        others = "local, ablations and everything else are shown without --table"
        raise InputError(f"there is no table {name}: use one of {', '.join(known)}; {others}")
    texts = {"dtype": str, "keep_default_na": False}
    rows, faults = (pd.read_csv(PAPERS / f"{x}.csv", **texts) for x in (name, "faults"))
    rows = rows.rename(columns={"mean": "paper", "std": "paper std"})
    return rows.assign(last=rows.get("last", "")), faults[faults.table == name]


def runs_of(paper, runs) -> pd.DataFrame:
    """The runs of a paper's table, under the paper's names of methods, with the scores that the
    paper averages; a run that has two of its policies is there twice."""
    paper = paper.assign(source=paper.run.str.split(":").str[0])
    runs = runs.rename(columns={"method": "source"}).merge(paper)
    scores = []
    for run in runs.itertuples():
        _, second, reference = run.run.partition(":")
        score = run.score
        if second:
            score = run.references.get(reference, np.nan)
        elif run.last:
            score = run.curve.score.tail(int(run.last)).mean()
        scores.append(score)
    return runs.assign(score=np.where(runs.finished, scores, np.nan))


def score_table(runs) -> pd.DataFrame:
    """A row for each dataset and method with the statistics of its finished runs, one for each
    method over all of its datasets, and rows of what the data's own episodes score."""
    rows = []
    for dataset, found in data_scores(runs).items():
        for what, x in found.items():
            row = {"dataset": dataset, "method": f"the data, {what}", "mean": x}
            rows.append(row | {SCORE: text(x)})
    runs = runs.dropna(subset="score").assign(part=runs.dataset)
    every = pd.concat([runs, runs.assign(dataset=ALL)])
    for (dataset, method), own in every.groupby(["dataset", "method"]):
        strata = own.groupby("part").score.agg(list)
        row = {"dataset": dataset, "method": method, "seeds": any_of(strata.map(len))}
        row |= statistics(list(strata)) | {name: any_of(own[name]) for name in LENGTHS}
        score = "{mean:.1f} ± {standard error:.1f} ({seeds})".format(**row)
        rows.append(row | {SCORE: score.replace(" ± nan", "")})
    cells = pd.DataFrame(rows, columns=CELL)
    seeds = pd.to_numeric(cells.seeds, "coerce").where(cells.dataset != ALL)
    return cells.assign(std=cells["standard error"] * seeds**0.5)


def beside(cells, paper) -> pd.DataFrame:
    """The table with a paper's numbers, and our mean minus the paper's in combined standard
    deviations, where both are known."""
    cells = cells.merge(paper.drop(columns=["run", "last"]), how="outer")
    printed, spread = cells[["paper", "paper std"]].apply(pd.to_numeric).to_numpy().T
    both = np.hypot(cells["std"], spread).replace(0, np.nan)
    both = both.where(cells["IQM low"].notna())  # enough seeds
    return cells.assign(**{"difference / std": (cells["mean"] - printed) / both})


def any_of(values) -> str:
    """The values, each once: "20000", or "300 or 20000"."""
    return " or ".join(dict.fromkeys(map(str, values)))


def text(x) -> str:
    """A number, a word or scores by name in a table; a "|" inside is escaped."""
    if isinstance(x, float):
        return "" if np.isnan(x) else f"{x:.1f}"
    if isinstance(x, dict):
        x = ", ".join(f"{name} {score:.1f}" for name, score in x.items())
    return str(x).replace("|", r"\|")


def markdown(frame) -> str:
    """A table without its index."""
    head, *rows = [" | ".join(map(text, row)) for row in (frame, *frame.to_numpy())]
    lines = [f"| {row} |" for row in rows]
    return "\n".join([f"| {head} |", "|---" * frame.shape[1] + "|", *lines])


def bullets(lines) -> str:
    return "\n".join(f"- {line}" for line in lines)


def grid(cells) -> pd.DataFrame:
    """Scores as texts: a row for each method, with its lengths; a column for each dataset."""
    lengths = cells[cells.dataset == ALL].set_index("method")[LENGTHS]
    scores = cells.pivot(index="method", columns="dataset", values=SCORE)
    return scores.join(lengths).astype(object).fillna("")


def improvements(runs) -> pd.DataFrame:
    """Probability, in %, that a run of the row's method beats one of the column's on a dataset that
    both have, over all pairs of runs; a tie counts half. Datasets count alike, and only those on
    which both methods have enough seeds."""
    place = ["method", "dataset"]
    scores = runs.dropna(subset="score")[[*place, "score"]]
    scores = scores[scores.groupby(place).score.transform("size") >= ENOUGH]
    pairs = scores.merge(scores, on="dataset", suffixes=("", " of other"))
    pairs["wins"] = 50 + 50 * np.sign(pairs.score - pairs["score of other"])
    wins = pairs.groupby([*place, "method of other"]).wins.mean().unstack()
    return wins.groupby("method").mean().rename_axis(columns=None).reset_index()


# ---- figures ---------------------------------------------------------------------------------


def styles_of(methods) -> dict:
    """{method: (color, line)}, no two alike: that of STYLES, and for all others, such as variants
    of one method, colors as far apart as they can be."""
    found = {method: tuple(STYLES[method].split()) for method in methods if method in STYLES}
    others = sorted(set(methods) - found.keys())
    colors = matplotlib.colormaps["turbo"](np.linspace(0.1, 0.9, len(others)))
    return found | {method: (tuple(color), "-.") for method, color in zip(others, colors)}


def curve(runs, axis: str):
    """x (T,), a mean over seeds, and scores (seeds, T) at the steps that all runs have."""
    every = [run.set_index("steps", drop=False) for run in runs.curve]
    every = pd.concat(every, axis=1, join="inner")
    scores = every[["score"]].to_numpy().T
    return every[[axis]].mean(axis=1), scores


def draw(panel, runs, axis: str, styles: dict) -> dict:
    """One dataset's mean over seeds against `axis`, with its interval: {method: line}."""
    lines = {}
    for method, own in runs.groupby("method"):
        x, scores = curve(own, axis)
        if x.empty:  # seeds without a common step
            continue
        color, line = styles[method]
        often = max(1, len(x) // 10)
        points = dict(color=color, ls=line, marker="o", ms=3, markevery=often)
        (lines[method],) = panel.plot(x, scores.mean(0), **points)
        if len(own) >= ENOUGH:
            low, high = bootstrap([scores], lambda drawn: drawn.mean(1), 500)
            panel.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
    return lines


def curves(runs, axis: str):
    """One panel per dataset: scores against `axis`, steps or seconds. One legend and one
    explanation for the whole figure."""
    matplotlib.rcParams |= {"font.size": 10, "text.parse_math": False}  # a "$" in a name is a "$"
    datasets, styles, lines = runs.dataset.unique(), styles_of(runs.method), {}
    down = -(-len(datasets) // 3)
    height = max(2.8 * down, 0.22 * len(styles)) + 0.5
    figure = Figure((11, height), layout="constrained")
    across = min(3, len(datasets))
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for panel, dataset in zip(panels, datasets):
        lines |= draw(panel, runs[runs.dataset == dataset], axis, styles)
        panel.set(title=dataset, xlabel=axis, ylabel="score", xlim=(0, None))
        panel.locator_params(axis="x", nbins=4)
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    for panel in panels[len(datasets) :]:
        panel.remove()
    note = f"Line: mean over seeds.\nBand: its 95% bootstrap interval, from {ENOUGH} seeds on."
    figure.suptitle(note, fontsize=10)
    figure.legend(lines.values(), lines, loc="outside right upper")
    return figure


# ---- command ---------------------------------------------------------------------------------


def main(args):
    runs, faults = read_runs(args.folders), pd.DataFrame()
    chosen, title, out = runs, args.table or "runs", Path(args.out)
    if args.table:
        paper, faults = paper_table(args.table)
        chosen = runs_of(paper, runs)
        runs = runs[runs.folder.isin(chosen.folder)]
        if runs.empty:
            raise InputError(f"none of the runs below {', '.join(args.folders)} is in {title}")
    notes = check(chosen, args.mixed)
    cells = score_table(chosen)
    scores = grid(cells)
    if args.table:
        scores, cells = scores.T, beside(cells, paper)
    best = cells.sort_values(["dataset", "mean"], ascending=[True, False])
    pairs = improvements(chosen)
    every = runs.sort_values("finished", kind="stable")[RUN]
    faults = [f"{x.dataset}, {x.method}: {x.note}" for x in faults.itertuples()]
    sections = {
        "Averaged although they differ": bullets(notes),
        f"{title}: {SCORE}": markdown(scores.reset_index()),
        "Known faults of the paper's table": bullets(faults),
        "Every dataset": markdown(best.drop(columns=SCORE)),
        "Probability, in %, that a run of the row beats one of the column": markdown(pairs),
        "Every run": markdown(every),
    }
    text = "\n\n".join(f"# {name}\n\n{part}" for name, part in sections.items() if part)
    with in_one_line(f"--out {out}", "use another folder"):
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{title}.md").write_text(text)
        cells.to_csv(out / f"{title}.csv", index=False, float_format="%.1f")
    for axis in ("steps", "seconds") if args.figures else ():
        figure = curves(runs, axis)
        with in_one_line(f"--out {out}", "use another folder"):
            figure.savefig(out / f"{title}_{axis}.png", dpi=160)
    print(text, f"written to {out}/{title}.*", sep="\n\n")


if __name__ == "__main__":
    main(parse(Args, {}, sys.argv[1:])[0])

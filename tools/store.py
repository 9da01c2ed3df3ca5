"""Keep many runs in three files, instead of a folder for each; maintainers fill results/ with it.

    python tools/store.py runs results     # puts all finished runs below runs/ into results/

    scores.csv       a row for each evaluation: its run, phase, step, seconds, mean return, score,
                     and the return of every episode
    metrics.csv.gz   a row for each logged number: its run, phase, step, seconds, metric and value
    runs.jsonl       a line for each run: its config.json and its summary.json

A run is known by method, variant (its --name), dataset and seed. Numbers stand there as they were
written, to the digit; of absolute paths in commands and flags, only the last part. Runs that come
again replace those that are stored. tools/report.py reads both forms.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
from common import InputError

KEY = ["method", "variant", "dataset", "seed"]
AT = [*KEY, "phase", "step", "seconds"]


@dataclass
class Args:
    runs: tyro.conf.Positional[str] = "runs"
    """folder of runs, searched at any depth"""
    out: tyro.conf.Positional[str] = "results"
    """folder of the three files"""


def key_of(config) -> dict:
    """What tells the run of a config.json from others, as text."""
    args = config["args"]
    path = Path(args["env"])
    is_file = path.suffix in (".npz", ".hdf5", ".h5")
    dataset = path.stem if is_file else args["env"]
    values = config["algorithm"], args["name"], dataset, str(args["seed"])
    return dict(zip(KEY, values))


def portable(word):
    """A word of a command line, or a flag's value, where a path of this machine is cut to its last
    part."""
    if not isinstance(word, str):
        return word
    flag, equals, value = "", "", word
    if word.startswith("--"):
        flag, equals, value = word.rpartition("=")
    if Path(value).is_absolute():
        value = Path(value).name
    return flag + equals + value


def read_csv(source) -> pd.DataFrame:
    """A table whose values are text, as they stand in the file."""
    return pd.read_csv(source, dtype=str, keep_default_na=False)


def summary_of(folder: Path):
    """The summary of a finished run; None where there is none, or an empty file."""
    path = folder / "summary.json"
    text = path.read_text() if path.is_file() else ""
    return json.loads(text) if text.strip() else None


def of_folder(folder: Path):
    """(line of runs.jsonl, rows of scores.csv, rows of metrics.csv.gz) of one run."""
    config = json.loads((folder / "config.json").read_text())
    for name in {"args", "settings"} & config.keys():
        config[name] = {flag: portable(value) for flag, value in config[name].items()}
    words = config.get("command", "").split(" ")
    config["command"] = " ".join(map(portable, words))
    line = {"config": config, "summary": summary_of(folder)}
    scores, metrics = [], []
    for path in sorted(folder.glob("*.csv")):
        table = read_csv(path)
        own = path.stem == "eval"
        where = key_of(config)
        where["phase"] = "train" if own else path.stem
        for i, (name, value) in enumerate(where.items()):
            table.insert(i, name, value)
        if own:
            scores.append(table)
        else:
            metrics.append(table.melt(AT, var_name="metric", value_name="value"))
    return line, scores, metrics


def stored(folder: Path):
    """(lines, scores, metrics) of a folder of the three files; none where there are none."""
    path = folder / "runs.jsonl"
    if not path.is_file():
        empty = pd.DataFrame(columns=[*AT, "metric", "value"])
        return [], empty[AT], empty
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    scores = read_csv(folder / "scores.csv")
    return lines, scores, read_csv(folder / "metrics.csv.gz")


def joined(old, new, keys) -> pd.DataFrame:
    """The old rows, those of the runs `keys` replaced by lists of new tables."""
    again = pd.MultiIndex.from_frame(old[KEY]).isin(keys)
    table = pd.concat([old[~again], *sum(new, [])])
    return table.fillna("").sort_values(KEY, kind="stable")


def main(args):
    found = [path.parent for path in sorted(Path(args.runs).rglob("summary.json"))]
    new = [of_folder(folder) for folder in found if summary_of(folder)]
    if not new:
        raise InputError(f"no finished run below {args.runs}: train something first")
    out = Path(args.out)
    lines, scores, metrics = stored(out)
    added, new_scores, new_metrics = zip(*new)
    key_in = lambda line: tuple(key_of(line["config"]).values())
    keys = set(map(key_in, added))
    lines = {key_in(line): line for line in [*lines, *added]}
    scores = joined(scores, new_scores, keys)
    metrics = joined(metrics, new_metrics, keys)
    out.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{json.dumps(lines[key])}\n" for key in sorted(lines))
    (out / "runs.jsonl").write_text(text)
    scores.to_csv(out / "scores.csv", index=False)
    packing = {"method": "gzip", "mtime": 0}  # equal numbers, equal files
    metrics.to_csv(out / "metrics.csv.gz", index=False, compression=packing)
    print(f"{len(lines)} runs in {out}: {len(scores)} evaluations, {len(metrics)} logged numbers")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

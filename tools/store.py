"""Many runs in three files, instead of a folder for each.

    python tools/store.py runs results     # puts all finished runs below runs/ into results/

    scores.csv       a row for each evaluation: its run, phase, step, seconds, mean return, score,
                     and the return of every episode
    metrics.csv.gz   a row for each logged number: its run, phase, step, seconds, metric and value
    runs.jsonl       a line for each run: its config.json and its summary.json

A run is known by method, variant (its --name), dataset and seed. Numbers stand there as they were
written, to the digit; of absolute paths in commands and flags, only the last part. Runs that come
again replace those that are stored. tools/report.py reads both forms.
"""

import gzip
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "algorithms")]
from common import Flags, InputError, in_one_line
from harness.resume import read_json, write_atomic
from run import FILES, parse

KEY = ["method", "variant", "dataset", "seed"]
AT = [*KEY, "phase", "step", "seconds"]


@dataclass
class Args(Flags):
    runs: tyro.conf.Positional[str] = "runs"
    """folder of runs, searched at any depth"""
    out: tyro.conf.Positional[str] = "results"
    """folder of the three files"""


def key_of(config) -> dict:
    """What tells the run of a config.json from others, as text."""
    args = config["args"]
    is_file = re.search(FILES, args["env"], re.IGNORECASE)
    dataset = Path(args["env"]).stem if is_file else args["env"]
    method = config["algorithm"]
    if args.get("version") == "acml":  # until 0.2 one file had both versions of BRAC+
        method = "brac_plus_acml"
    values = method, args["name"], dataset, str(args["seed"])
    return dict(zip(KEY, values, strict=True))


def key_in(line) -> tuple:
    """The key of a line of runs.jsonl."""
    return tuple(key_of(line["config"]).values())


def read_csv(source) -> pd.DataFrame:
    """A table whose values are text, as they stand in the file."""
    return pd.read_csv(source, dtype=str, keep_default_na=False)


def portable(word):
    """A word of a command line, or a flag's value, where a path of this machine is cut to its last
    part."""
    flag, equals, value = str(word).rpartition("=") if str(word)[:2] == "--" else ("", "", word)
    whole = isinstance(value, str) and Path(value).is_absolute()
    return flag + equals + Path(value).name if whole else word


def of_folder(folder: Path):
    """(line of runs.jsonl, rows of scores.csv, rows of metrics.csv.gz) of one run."""
    config = read_json(folder / "config.json")
    for name in {"args", "settings"} & config.keys():
        config[name] = {flag: portable(value) for flag, value in config[name].items()}
    if "command" in config:
        config["command"] = " ".join(map(portable, config["command"].split(" ")))
    line = {"config": config, "summary": read_json(folder / "summary.json")}
    scores, metrics = [], []
    for path in sorted(folder.glob("*.csv")):
        table = read_csv(path)
        phase = "train" if path.stem == "eval" else path.stem
        where = key_of(config) | {"phase": phase}
        for i, (name, value) in enumerate(where.items()):
            table.insert(i, name, value)
        if path.stem == "eval":
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


def files_of(folder: Path):
    """[(name, {file of a run: its text})] of the stored runs: config.json, summary.json, eval.csv.
    Raises what damaged files raise."""
    lines, scores, _ = stored(folder)
    cells, found = dict(list(scores.groupby(KEY))), []
    for line in lines:
        key = key_of(line["config"])
        files = {f"{name}.json": json.dumps(line[name]) for name in ("config", "summary")}
        rows = cells.get(tuple(key.values()))
        if rows is not None:
            rows = rows.drop(columns=[*KEY, "phase"])
            files["eval.csv"] = rows.loc[:, (rows != "").any()].to_csv(index=False)
        variant = f"-{key['variant']}" if key["variant"] else ""
        name = f"{key['dataset']}__{key['method']}{variant}__{key['seed']}"
        found.append((f"{folder}/{name}", files))
    return found


def main(args):
    folders = [path.parent for path in sorted(Path(args.runs).rglob("summary.json"))]
    if not folders:
        raise InputError(f"no finished run below {args.runs}: train something first")
    out = Path(args.out)
    with in_one_line(out, "repair or move the file that it names"):
        lines, scores, metrics = stored(out)
        new = [of_folder(folder) for folder in folders]
    added, *tables = zip(*new)
    keys = set(map(key_in, added))
    lines = [line for line in lines if key_in(line) not in keys]
    lines = sorted([*lines, *added], key=key_in)
    joined = []
    for old, parts in zip((scores, metrics), tables):
        known = zip(*(old[name] for name in KEY))
        kept = old[[key not in keys for key in known]]
        table = pd.concat([kept, *sum(parts, [])]).fillna("")
        joined.append(table.sort_values(KEY, kind="stable"))
    scores, metrics = joined
    with in_one_line(out, "use another folder"):
        out.mkdir(parents=True, exist_ok=True)
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        write_atomic(out / "runs.jsonl", text.encode())
        write_atomic(out / "scores.csv", scores.to_csv(index=False).encode())
        packed = gzip.compress(metrics.to_csv(index=False).encode(), mtime=0)
        write_atomic(out / "metrics.csv.gz", packed)
    print(f"{len(lines)} runs in {out}: {len(scores)} evaluations, {len(metrics)} logged numbers")


if __name__ == "__main__":
    main(parse(Args, {}, sys.argv[1:])[0])

"""benchmark.sh: every command is one that its script takes; tables run, fail and are reported."""

import csv
import fnmatch
import importlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

import datasets
import report
from common import parse

ROOT = Path(__file__).resolve().parents[1]
TABLES = ["fisher_brc_table1", "brac_plus_table1", "arq_table2", "itrpo_table2", "itrpo_table3"]
TABLES += ["ablations", "local"]


def bash(*args, **env):
    command = ["bash", str(ROOT / "benchmark.sh"), *args]
    here = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | here | env)


def commands(table):
    listed = bash(table, "--print")
    assert listed.returncode == 0, listed.stderr
    return [shlex.split(line) for line in listed.stdout.splitlines()]


def parsed(command):
    """(module, args) of a command line as its script reads it."""
    python, path, *line = command
    assert python == "python" and (ROOT / path).exists()
    module = importlib.import_module(Path(path).stem)
    return module, parse(module.Args, module.PRESETS, line)


@pytest.mark.parametrize("table", TABLES)
def test_every_command_is_understood(table):
    """No two runs share a folder, and the runs are those that report.py looks for."""
    folders, runs = set(), set()
    for command in commands(table):
        module, args = parsed(command)
        assert args.resume and args.out == "runs"
        name = module.__name__ + (f"-{args.name}" if args.name else "")
        folders.add((args.env, name, args.seed))
        runs.add((args.env, name))
    assert len(folders) == len(commands(table)) > 20
    if (report.PAPERS / f"{table}.csv").exists():
        rows = report.paper_rows(table)[0]
        wanted = {(r["dataset"], r["run"].partition(":")[0]) for r in rows if r["run"]}
        wanted = {(e, r) for e, r in wanted if not e.endswith(("total", "average"))}
        wanted = {(e, r) for e, r in wanted if not e.startswith("robomimic")}
        assert wanted <= runs and {e for e, _ in runs} == {e for e, _ in wanted}


def test_seeds_flags_and_folder():
    listed = bash("local", "--print", SEEDS="7", FLAGS="--compile --device cuda", OUT="elsewhere")
    for line in listed.stdout.splitlines():
        _, args = parsed(shlex.split(line))
        assert (args.seed, args.compile, args.device, args.out) == (7, True, "cuda", "elsewhere")


def test_bad_input():
    for args, words in ((["nine"], "no table nine"), (["local", "--prnt"], "--prnt is unknown")):
        found = bash(*args)
        assert found.returncode == 2 and words in found.stderr
    assert "fisher_brc_table1" in bash().stdout and bash().returncode == 2


@pytest.mark.parametrize(
    "env", [dict(SEEDS=""), dict(SEEDS=" "), dict(SEEDS="a"), dict(JOBS="0"), dict(JOBS="x")]
)
def test_bad_variables(env, tmp_path):
    for flags in ((), ("--print",)):
        found = bash("local", *flags, OUT=str(tmp_path / "out"), **env)
        assert found.returncode == 2 and f"{next(iter(env))} is '" in found.stderr
        assert len(found.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()


# ---- runs ------------------------------------------------------------------------------------


def write_d4rl(folder, name):
    """A tiny file of this name: four episodes of 25 steps, two of them ended by the task."""
    rng, n = np.random.default_rng(0), 100
    sizes = {"halfcheetah": (17, 6), "hopper": (11, 3), "walker2d": (17, 6), "antmaze": (29, 8)}
    sizes |= {"pen": (45, 24), "door": (39, 28), "hammer": (46, 26), "relocate": (39, 30)}
    obs_dim, act_dim = (sizes | {"kitchen": (60, 9)})[name.split("-")[0]]
    ends = np.arange(n) % 25 == 24
    path = folder / Path(datasets.table("d4rl_files.csv")[name]["path"]).name
    with h5py.File(path, "w") as f:
        f["observations"] = rng.normal(size=(n, obs_dim)).astype(np.float32)
        f["actions"] = rng.uniform(-0.9, 0.9, (n, act_dim)).astype(np.float32)
        f["rewards"] = rng.normal(size=n).astype(np.float32)
        f["terminals"] = ends & (np.arange(n) < 50)
        f["timeouts"] = ends & (np.arange(n) >= 50)


def shortened(command, **more):
    """The command with every phase and period cut to ten steps."""
    module, args = parsed(command)
    flags = dict(steps=10, eval_every=10, eval_episodes=1, log_every=5, device="cpu") | more
    for field, value in vars(args).items():
        if type(value) is int and value >= 1_000 and field not in flags:
            flags[field] = 10
    flags["batch_size"] = 8
    if module.__name__ == "arq":  # 30 likelihoods in 28 dimensions take minutes
        flags |= dict(n=2, k=1, sample_steps=4)
    return module, parse(module.Args, module.PRESETS, [*command[2:], *(
        part for k, v in flags.items() for part in (f"--{k.replace('_', '-')}", str(v))
    )])  # fmt: skip


def representatives():
    """One command per table, method and preset of its file; the first seed alone."""
    seen = {}
    for table in TABLES[:-1]:
        for command in commands(table):
            module, args = parsed(command)
            rows = tuple(p for p in module.PRESETS if fnmatch.fnmatch(args.env, p))
            seen.setdefault((table, module.__name__, args.name, rows), command)
    return list(seen.values())


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["benchmark"])
    return tmp_path


def run_all(chosen, here):
    for command in chosen:
        env = command[command.index("--env") + 1]
        write_d4rl(here, env)
        module, args = shortened(command, eval_env="none")
        try:
            module.train(args)
        except SystemExit as finished:  # two tables list it
            assert finished.code == 0, command


@pytest.mark.soak
def test_every_method_and_preset_runs_and_reports(here):
    run_all(representatives(), here)
    reported(TABLES[:5])


def test_one_run_of_each_file_runs_and_reports(here):
    """Once per algorithm of the tables; all presets in the soak variant."""
    chosen = {command[1]: command for command in reversed(representatives())}
    run_all(chosen.values(), here)
    reported([t for t in TABLES[:5] if any(c in commands(t) for c in chosen.values())])


def reported(tables):
    assert tables
    for table in tables:
        report.main(report.Args(table=table, mixed=True, resamples=50))
        with open(f"report/{table}.csv", newline="") as f:
            header, *rows = csv.reader(f)
        paper = report.paper_rows(table)[0]
        assert [row[0] for row in rows] == list(dict.fromkeys(r["dataset"] for r in paper))
        assert {len(row) for row in rows} == {len(header)}
        text = Path(f"report/{table}.md").read_text()
        assert "Missing:" in text and text.count("\n| ") > len(rows)


def test_a_failure_stops_no_other_run_and_is_listed(here):
    """--momentum is no flag: each of the twelve runs fails and says so in its log."""
    found = bash("local", SEEDS="0", FLAGS="--momentum 1", OUT=str(here / "runs"), JOBS="2")
    assert found.returncode == 1 and "failed runs:" in found.stdout
    assert found.stdout.count("FAILED") == 2 * 12
    logs = list((here / "runs" / "logs").glob("*.log"))
    assert len(logs) == 12 and "momentum" in logs[0].read_text()


def test_slurm_submits_one_array(here):
    """A stand-in for sbatch records what it is given; its line of the list is one command."""
    sbatch = here / "sbatch"
    sbatch.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > submitted\n')
    sbatch.chmod(0o755)
    path = f"{here}:{os.environ['PATH']}"
    env = {"PATH": path, "SEEDS": "0", "OUT": str(here / "runs"), "JOBS": "3"}
    assert bash("local", "--slurm", SBATCH_FLAGS="--gres=gpu:1", **env).returncode == 0
    given = (ROOT / "submitted").read_text().splitlines()
    (ROOT / "submitted").unlink()
    assert given[0] == "--gres=gpu:1" and given[given.index("--array") + 1] == "1-12%3"
    listed = (here / "runs" / "logs" / "local.txt").read_text().splitlines()
    assert listed == bash("local", "--print", **env).stdout.splitlines()
    assert "--one" in given[-1] and "SLURM_ARRAY_TASK_ID" in given[-1]

"""The README's own words, run: a table becomes a dataset, a run, a policy that only needs torch."""

import importlib
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import iql
import numpy as np
import torch

import evaluate
from common import parse

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def block(start):
    """The indented block of the README that starts with this line."""
    lines = README[README.index(f"    {start}") :].splitlines()
    end = next(i for i, line in enumerate(lines) if line and not line.startswith("    "))
    return "\n".join(line[4:] for line in lines[:end])


def test_own_data_end_to_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    rows = [(e, *rng.normal(size=2), rng.uniform(-2, 2), rng.normal(), e % 2 and t == 9)
            for e in range(6) for t in range(10)]  # fmt: skip
    head = "episode,x,v,u,reward,failed"
    np.savetxt("log.csv", rows, delimiter=",", header=head, comments="")
    subprocess.run([sys.executable, "-c", block("import numpy as np")], check=True)
    with np.load("logs.npz") as saved:
        assert saved["terminals"].sum() == 3 == saved["timeouts"].sum()
        assert saved["observations"].shape == (60, 2) and saved["actions"].shape == (60, 1)
    line = "--env logs.npz --steps 5 --batch-size 8 --device cpu".split()
    iql.train(parse(iql.Args, iql.PRESETS, line))
    evaluate.main(evaluate.Args("runs/logs__iql__0", fqe_steps=3, export="policy.pt2"))
    code = block("import torch") + "\nassert action.shape == (1, 1) and action.abs() <= 2"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_worked_diff_makes_an_algorithm(tmp_path, monkeypatch):
    """CONTRIBUTING.md's diff applies to awr.py as it is; its loss is CRR's; the file runs."""
    diff = re.search(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)[1]
    assert len(diff.splitlines()) <= 40
    (tmp_path / "algorithms").mkdir()
    shutil.copy(ROOT / "algorithms" / "awr.py", tmp_path / "algorithms" / "crr.py")
    (tmp_path / "crr.diff").write_text(diff)
    patch = ["git", "apply", "--unidiff-zero", "crr.diff"]
    subprocess.run(patch, check=True, cwd=tmp_path, env=os.environ | {"GIT_DIR": "none"})
    monkeypatch.syspath_prepend(tmp_path / "algorithms")
    monkeypatch.chdir(tmp_path)
    crr = importlib.import_module("crr")
    pi, a = (torch.zeros(3, 1), torch.zeros(1)), torch.tensor([[0.0], [1.0], [2.0]])
    loss, _ = crr.awr_loss(pi, a, torch.tensor([1.0, -1.0, 5.0]), None)
    assert abs(loss.item() - (2.0 + 2 * 0.5 * math.log(2 * math.pi)) / 3) < 1e-6
    line = "--steps 4 --batch-size 8 --device cpu --eval-env none".split()
    crr.train(parse(crr.Args, crr.PRESETS, line))
    assert (tmp_path / "runs" / "hopper-replay-demo__crr__0" / "summary.json").exists()


def test_every_file_of_the_readme_exists():
    for path in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (ROOT / path).exists(), path
    for path in (ROOT / "algorithms").glob("*.py"):
        assert f"algorithms/{path.name}" in README, path.name


def test_every_command_names_known_flags():
    """`python FILE.py ... --flag`: the file exists, and its Args know the flag."""
    commands = re.findall(r"python ((?:algorithms/)?\w+\.py)([^#`|\n]*)", README)
    assert len(commands) > 6
    for file, rest in commands:
        text = (ROOT / file).read_text()
        for flag in re.findall(r"--([\w-]+)", rest):
            name = flag.removeprefix("no-").replace("-", "_")
            assert name == "help" or re.search(rf"^    {name}: ", text, re.M), (file, flag)

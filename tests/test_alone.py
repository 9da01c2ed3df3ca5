"""td3_bc_alone.py computes the numbers of algorithms/td3_bc.py."""

import csv
import subprocess
import sys

import pytest
from conftest import ROOT

SHORT = "--steps 60 --eval-every 30 --eval-episodes 2 --log-every 20 --device cpu".split()
MAZE = "--alpha 5 --polyak 0.02 --reward-shift -1".split()  # its preset there
TYPED = "--policy-freq 3 --seed 1".split()


def rows(path):
    return [row | {"seconds": ""} for row in csv.DictReader(path.open())]


@pytest.mark.parametrize(
    "env, preset, typed",
    [("hopper-medium-expert-demo", [], []), ("pointmaze-stitch-demo", MAZE, TYPED)],
)
def test_every_number_is_that_of_the_file_in_algorithms(env, preset, typed, tmp_path):
    file = str(ROOT / "data" / f"{env}.npz")
    for command in (
        ["td3_bc_alone.py", "--env", file, *preset],
        ["algorithms/td3_bc.py", "--env", env],
    ):
        line = [sys.executable, ROOT / command[0], *command[1:], *SHORT, *typed]
        subprocess.run([*line, "--out", tmp_path], check=True, capture_output=True, cwd=tmp_path)
    alone, house = sorted(tmp_path.glob("*/"), key=lambda folder: "alone" not in folder.name)
    for name, length in (("train.csv", 3), ("eval.csv", 2)):
        assert rows(alone / name) == rows(house / name)
        assert len(rows(alone / name)) == length

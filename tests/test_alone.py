"""Files that import packages only compute the numbers of the files in algorithms/."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT
from short_runs import SCRIPTS, flags, folder, outcome, rows

from tools.alone import alone

SHORT = "--steps 60 --eval-every 30 --eval-episodes 2 --log-every 20 --device cpu".split()
MAZE = "--alpha 5 --polyak 0.02 --reward-shift -1".split()  # its preset there
TYPED = "--policy-freq 3 --seed 1".split()


@pytest.mark.parametrize(
    "env, preset, typed",
    [("hopper-medium-expert-demo", [], []), ("pointmaze-stitch-demo", MAZE, TYPED)],
)
def test_td3_bc_alone_is_td3_bc(env, preset, typed, tmp_path):
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


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_any_file_can_be_written_as_one(path, here):
    single = here / "empty" / path.name
    single.parent.mkdir()
    single.write_text(alone(path.stem))
    for script, out in ((path, "house"), (single, "alone")):
        assert outcome(script, flags(path, out=out))[1] == 0
    one, two = (folder(path.stem, out) for out in ("house", "alone"))
    tables = sorted(x.name for x in one.glob("*.csv"))
    assert {"train.csv", "eval.csv"} <= {*tables} == {x.name for x in two.glob("*.csv")}
    for name in tables:
        assert rows(one / name) == rows(two / name)
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(single.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None) or node.names[0].name]
    }
    assert "torch" in imported and not imported & {"common", "run", "readers"}


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(SystemExit, match="there is no algorithm td3: use one of arq, awac"):
        alone("td3")

"""figures/*.py: the pictures are those of the pages, and the numbers behind them are right."""

import importlib
import math
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from short_runs import ROOT, tracked
from test_report import cells, pack, write_run, write_seeds

from common import InputError

sys.path.insert(0, str(ROOT / "figures"))
import arq_rare  # noqa: E402
import fisher_brc_actor  # noqa: E402
import maze  # noqa: E402

import results  # noqa: E402
from run import load  # noqa: E402

TINY = {  # figure: settings of a picture that is drawn at once
    "arq_rare": dict(steps=3, rows=40),
    "fisher_brc_actor": dict(steps=2, rows=20, seeds=(0,)),
    "itrpo_trust": dict(bc_steps=2, steps=4, log_every=2, seeds=1),
}
HOPPER, MAZE = "hopper-replay-demo", "pointmaze-stitch-demo"


def test_every_picture_is_on_a_page_and_every_script_draws_one():
    """And no page shows a picture that is not there."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = set()
    for page in pages:
        links = re.findall(r"!\[[^]]*\]\(([^)]+\.(?:png|gif))\)", page.read_text())
        shown |= {(page.parent / link).resolve() for link in links}
    listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "figures", "results"]
    files = subprocess.run(listed, capture_output=True, text=True).stdout.split()
    pictures = {(ROOT / x).resolve() for x in files if x.endswith(("png", "gif"))}
    assert {path for path in pictures if path.exists()} == shown
    for path in tracked("figures"):
        own = ROOT / "figures" / f"{path.stem}.png"
        assert own in shown or path.stem == "results", f"{path.name} draws what no page shows"
        assert f"    python figures/{path.name}" in path.read_text()


def assert_is_png(path):
    png = Path(path).read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">I", png[16:20])[0] > 500


@pytest.mark.parametrize("name", TINY)
def test_draws_a_picture(name, tmp_path):
    module = importlib.import_module(name)
    module.main(module.Args(**TINY[name], out=str(tmp_path / "x.png")))
    assert_is_png(tmp_path / "x.png")


# ---- toys ------------------------------------------------------------------------------------


def test_every_algorithm_is_in_the_tables():
    assert {path.stem for path in tracked("algorithms")} <= results.TITLES.keys()


def test_kl_of_two_squashed_gaussians():
    """log(2) + (1 + 1) / 8 - 1 / 2 for N(0, 0.05) from N(0.05, 0.1); tanh changes nothing."""
    p, q = (
        fisher_brc_actor.squashed(torch.full((67, 1), mean), torch.tensor(std).log())
        for mean, std in ((0.0, 0.05), (0.05, 0.1))
    )
    assert fisher_brc_actor.kl(p, q) == pytest.approx(math.log(2) + 2 / 8 - 0.5, abs=1e-3)


def test_a_clone_finds_no_rare_action():
    """Half of the actions are found by no mean, all of them where all are good."""
    args = arq_rare.Args(share=0.5, steps=200, rows=500)
    good, between = arq_rare.shares("bc", {}, args)
    assert good < 0.1 and between > 0.8
    args.share = 1.0
    assert arq_rare.shares("bc", {}, args) == (1.0, 0.0)


# ---- the maze --------------------------------------------------------------------------------


def test_the_maze_is_drawn_with_walks_of_which_none_joins_start_and_goal(tmp_path):
    flags = f"--env {MAZE} --steps 2 --eval-episodes 2 --seed 0 --out {tmp_path}".split()
    call = [sys.executable, str(ROOT / "algorithms" / "bc.py"), *flags]
    subprocess.run(call, check=True, capture_output=True)
    folder = str(tmp_path / f"{MAZE}__bc__0")
    maze.main(maze.Args(runs=(folder,), out=str(tmp_path / "x.png")))
    assert_is_png(tmp_path / "x.png")
    data, task = load(MAZE)
    places = maze.cells_of(task)
    assert places["r"] == [(1.5, -2.5)] and places["g"] == [(1.5, 1.5)]
    assert maze.joining(data, places["r"][0]) == 0
    rows = np.flatnonzero(data.episode == int(data.episode[data.terminal > 0][0]))
    assert maze.joining(data, tuple(data.obs[rows[0], :2].tolist())) > 0


# ---- the results -----------------------------------------------------------------------------


def test_an_ablation_stands_beside_its_counterpart(tmp_path):
    """A control of another run is compared with that one, and other people's code with ours."""
    flags = lambda setting, alpha: {"args": {"setting": setting, "kl_coef": alpha}}
    write_seeds(tmp_path, (20.0, 35.0), method="itrpo", **flags("code", 1.0))
    write_seeds(tmp_path, (40.0, 50.0), method="itrpo-trust", **flags("trust", 1.0))
    write_seeds(tmp_path, (30.0,), method="itrpo-trust-control", **flags("trust", 1 - 0.9))
    write_seeds(tmp_path, (10.0, 10.0), method="iql")
    write_seeds(tmp_path, (9.0, 9.0), method="corl_iql")
    write_seeds(tmp_path, (11.0, 11.0), method="iql_authors")
    write_seeds(tmp_path, (1.0,), method="fql_authors")  # ours was not run
    found = results.read_cells(str(tmp_path))
    tables = results.tables(found, tmp_path)
    env, itrpo = f"`{HOPPER}` | ", tables["Ablations of iTRPO"]
    rows = [x[2:].rstrip(" |").split(" | ") for x in itrpo.splitlines()[2:]]
    assert [row[1:] for row in rows] == [
        ["iTRPO", "20.0, 35.0", "27.5 ± 7.5"],
        ["iTRPO with `setting` trust, not code", "40.0, 50.0", "45.0 ± 5.0", "+17.5 ± 9.0"],
        ["iTRPO, `trust`, with `kl_coef` 0.1, not 1", "30.0", "30.0", "-15.0"],
    ]
    other = results.beside(found, results.peers(found))
    assert cells(other, f"{env}IQL, CORL")[2:] == ["9.0, 9.0", "9.0 ± 0.0", "-1.0 ± 0.0"]
    assert other.count("| IQL, its") == other.count("| IQL |") == 1 and "FQL" not in other


def test_the_gap_of_fisher_brc_by_hand(tmp_path):
    """Over the second half: 1.5 - 0.25 in every step of 1 / (1 - 0.9); Q(a') is -9 + 0.5 * 2."""
    for name, offset in (("", True), ("-no-offset", False)):
        flags = {"lam": 0.1, "gamma": 0.9, "offset": offset}
        folder = write_run(tmp_path, method=f"fisher_brc{name}", args=flags)
        lines = ["step,seconds,q_data,log_mu_data,log_mu_pi,pi_loss,temperature,entropy"]
        lines += ["10,1,0,9,9,9,9,9", "20,1,-7,1.5,0.25,9,0.5,-2", ""]
        (folder / "train.csv").write_text("\n".join(lines))
    found = results.read_cells(str(tmp_path))
    pack(tmp_path, tmp_path / "out")
    text = results.gaps(found, tmp_path / "out")
    assert cells(text, "`")[1:] == ["0.1", "15.0", "1.50", "0.25", "1.25", "1.00", "-7.0", "5.5"]


def test_the_pictures_of_the_results(tmp_path):
    """Every method on the mixture; other people's programs above ours; a paper's numbers."""
    env, out = "hopper-medium-expert-demo", tmp_path / "out"
    for method in (*results.TITLES, *results.PEERS):
        write_run(tmp_path, env, method, references={"data": 21.0, "its clone (BC)": 9.0})
    write_run(tmp_path, "halfcheetah-random-v2-made", "iql")
    results.main(results.Args(str(tmp_path), str(out)))
    names = {"scores", "clone_to_policy", "stopping", "fisher_brc", "peers", "published"}
    assert {path.stem for path in out.iterdir()} == names
    for path in out.iterdir():
        assert_is_png(path)
    figure = results.curves(results.read_cells(str(tmp_path)))
    assert [x.get_title() for x in figure.axes] == [*results.TITLES.values()]
    assert figure.axes[0].lines[0].get_ydata().tolist() == [10.0, 20.0]
    curve, *others = results.first_run(results.read_cells(str(tmp_path))).axes[0].lines
    assert curve.get_ydata().tolist() == [10.0, 20.0]
    assert [line.get_ydata()[0] for line in others] == [15.0, 21.0, 9.0]
    with pytest.raises(InputError, match="is on a bundled dataset"):
        write_run(tmp_path / "other", "hopper-medium-v2")
        results.main(results.Args(str(tmp_path / "other")))

"""report.py: statistics against scipy and by hand, what is averaged, tables, figures, refusals."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from matplotlib.backends.backend_agg import FigureCanvasAgg
from short_runs import ROOT, SCRIPTS

from harness import resume
from run import load, score
from tools import report
from tools.report import bootstrap, iqm, statistics

CODE = {"code of algorithm": "a" * 12, "code of common": "b" * 12, "code of run": "c" * 12}
OTHERS = {"data": "d" * 16, "version of torch": "2.13", "precision": "highest"}
HOPPER = "hopper-medium-v0"


def write_run(root, env=HOPPER, method="bc", seed=0, scores=(1.0, 2.0), **more):
    """A run's folder as the harness leaves it. In `config`, None removes a key."""
    algorithm, _, name = method.partition("-")
    folder = root / f"{env.replace('/', '-')}__{method}__{seed}"
    folder.mkdir(parents=True)
    args = {"env": env, "seed": seed, "name": name, "steps": 10} | more.get("args", {})
    settings = {key: value for key, value in args.items() if key not in resume.CONTROL}
    config = {
        "algorithm": algorithm,
        "args": args,
        "settings": settings | CODE | OTHERS | more.get("settings", {}),
        "task": "Hopper-v5",
        "commit": "e" * 40,
        "dirty": False,
        "precision": "highest",
        "machine": "x86_64, 2 cores, cpu",
        "threads": 1,
    } | more.get("config", {})
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    every = more.get("every", 10)
    if scores:
        with open(folder / "eval.csv", "w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow(["step", "seconds", "return", "score", "episode_0"])
            writer.writerows([every * (i + 1), i + 0.5, 0, s, 0] for i, s in enumerate(scores))
    if more.get("finished", True):
        last = more.get("averaged", 10)
        summary = {"score": float(np.mean(scores[-last:])) if scores else None, "averaged": last}
        summary |= {"evaluations": len(scores), "references": more.get("references", {})}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_seeds(root, seeds, first=50.0, **more):
    """One run for each seed; every seed scores one more than the one before it."""
    for seed in range(seeds):
        write_run(root, seed=seed, scores=(first + seed,), **more)


def main(**args):
    """What `python tools/report.py` does; without figures, unless they are asked for."""
    report.main(report.Args(**(dict(figures=False) | args)))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def table(name="runs"):
    """{(dataset, method): row} of the CSV; cells are text."""
    with open(f"report/{name}.csv", newline="") as f:
        return {(row["dataset"], row["method"]): row for row in csv.DictReader(f)}


def page(name="runs"):
    return Path(f"report/{name}.md").read_text()


def section(title, name="runs"):
    """The lines of one part of the page."""
    return page(name).split(f"# {title}\n\n")[1].split("\n\n")[0].splitlines()


def refused(*words, **args):
    with pytest.raises(report.InputError) as error:
        main(**args)
    line = str(error.value)
    assert "\n" not in line and len(line) < 700, line
    assert all(word in line for word in words), line


# ---- statistics ------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 11, 40])
def test_iqm_leaves_a_quarter_out_at_both_ends(n):
    x = np.random.default_rng(n).normal(size=(3, n))
    assert np.allclose(iqm(x), np.sort(x)[:, n // 4 : n - n // 4].mean(1))


def test_bootstrap_of_one_stratum_is_scipys():
    x = np.random.default_rng(0).normal(3, 2, 30)
    found = bootstrap([x], lambda v: v.mean(-1), 20_000)
    other = scipy.stats.bootstrap((x,), np.mean, n_resamples=20_000, method="percentile")
    assert found == pytest.approx([*other.confidence_interval], abs=0.03)


def test_bootstrap_resamples_each_dataset_on_its_own():
    """Datasets of constant but different scores have no uncertainty; pooled, they would."""
    assert [*bootstrap([[1.0, 1, 1], [9.0, 9]], lambda v: v.mean(-1), 500)] == [4.2, 4.2]


def wins(scores):
    """{(row, column): probability in %} for {(dataset, method): scores}."""
    rows = [(*key, x) for key, own in scores.items() for x in own]
    frame = report.improvements(pd.DataFrame(rows, columns=["dataset", "method", "score"]))
    return frame.set_index("method").stack().to_dict()


def test_probability_of_improvement():
    rng = np.random.default_rng(1)
    x, y = rng.normal(0.3, 1, 12).round(1), rng.normal(0, 1, 15).round(1)
    share = 100 * scipy.stats.mannwhitneyu(x, y).statistic / (12 * 15)
    first = {("a", "x"): x, ("a", "y"): y}
    assert wins(first)["x", "y"] == pytest.approx(share)
    second = {("b", "x"): [2, 2, 2], ("b", "y"): [1, 1, 1, 1], ("b", "few"): [0, 0]}
    found = wins(first | second)  # datasets count alike, however many seeds they have
    assert found["x", "y"] == pytest.approx((share + 100) / 2) == 100 - found["y", "x"]
    assert not any("few" in pair for pair in found), "two seeds say nothing"


def test_standard_errors():
    x = np.random.default_rng(2).normal(size=7)
    assert statistics([x])["standard error"] == pytest.approx(scipy.stats.sem(x))
    assert np.isnan(statistics([[1.0, 2], [3.0]])["standard error"])
    # two datasets: sqrt(sem^2 + sem^2) / 2, with sem 1 and 2 for these seeds
    found = statistics([[0.0, 2], [0.0, 4]])
    assert found["standard error"] == pytest.approx(np.sqrt(1 + 4) / 2) and found["mean"] == 1.5


# ---- tables ----------------------------------------------------------------------------------


def test_every_run_without_a_table(here):
    """All numbers of two runs; how long they are stands beside them."""
    for seed, final in enumerate((10.0, 14.0)):
        write_run(here, method="fisher_brc-lam1", seed=seed, scores=(0.0, *[final] * 10))
    write_run(here, env="mujoco/hopper/medium-v0", scores=(7.0,), args={"steps": 300})
    main(figures=True)
    row = {name: x for name, x in table()[HOPPER, "fisher_brc-lam1"].items() if x}
    assert [*row.values()][2:] == "12.0 ± 2.0 (2)|2|12.0|2.0|2.8|12.0|10|11 x 1".split("|")
    assert section("runs: mean ± standard error (seeds)")[2:] == [
        "| bc |  | 7.0 (1) | 7.0 (1) | 300 | 1 x 1 |",
        "| fisher_brc-lam1 | 12.0 ± 2.0 (2) |  | 12.0 ± 2.0 (2) | 10 | 11 x 1 |",
    ]
    for axis in ("steps", "seconds"):
        assert Path(f"report/runs_{axis}.png").read_bytes()[:4] == b"\x89PNG"


def test_numbers_stand_under_their_names(here):
    env = "hopper-medium-expert-demo"
    data, task = load(env)
    best = score(task, [data.episode_return.max().item()])
    same = dict(settings={"data": data.digest}, references={"data": 47.2})
    for seed in range(5):
        write_run(here, env=env, method="iql", seed=seed, scores=(70.0 + seed**2,), **same)
    top = dict(args={"top": 0.1}, references={"data": 102.3})  # of the episodes that it clones
    write_run(here, env=env, method="bc-top10", scores=(80.0,), **same | top)
    write_run(here, env="walker2d-medium-v0", references={"data": 11.0})
    main()
    low, high = bootstrap([[70.0, 71, 74, 79, 86]])
    row, found = table()[env, "iql"], table()
    names = ("seeds", "mean", "standard error", "std", "IQM", "IQM low", "IQM high")
    wanted = f"5 76.0 2.9 6.6 74.7 {low:.1f} {high:.1f}"
    assert [row[name] for name in names] == wanted.split()
    assert found[env, "the data, mean of its episodes"]["mean"] == "47.2"
    assert found[env, "the data, best episode"]["mean"] == f"{best:.1f}"
    assert found["walker2d-medium-v0", "the data, mean of its episodes"]["mean"] == "11.0"
    assert ("walker2d-medium-v0", "the data, best episode") not in found, "data is not bundled"
    assert report.best_episode(env, "another hash") is None
    assert found[report.ALL, "iql"]["std"] == "", "no deviation over datasets"
    methods = [line.split(" | ")[1] for line in section("Every dataset")[2:] if f" {env} " in line]
    data = ["the data, best episode", "the data, mean of its episodes"]
    assert methods == [data[0], "bc-top10", "iql", data[1]], "the best first"


def test_every_run_has_its_line(here):
    """The score that the tables average, and what else is known; unfinished runs come first."""
    write_run(here, HOPPER, "iql", 1, (4.0, 8.0), config={"dirty": True})
    clone = {"data": 3.0, "its clone (BC)": 33.25}
    write_run(here, HOPPER, "brac", 2, (1.0,), references=clone)
    write_run(here, HOPPER, "iql", 3, (100.0,), finished=False, config={"commit": None})
    write_run(here, HOPPER, "cql", 0, ())
    main()
    clone, rest = "data 3.0, its clone (BC) 33.2", "| x86_64, 2 cores, cpu, threads: 1 |"
    assert section("Every run")[2:] == [
        f"| {HOPPER} | iql | 3 |  | 10 | 1 x 1 |  | False | None {rest}",
        f"| {HOPPER} | brac | 2 | 1.0 | 10 | 1 x 1 | {clone} | True | eeeeeee {rest}",
        f"| {HOPPER} | cql | 0 |  | 10 | 0 x 0 |  | True | eeeeeee {rest}",
        f"| {HOPPER} | iql | 1 | 6.0 | 10 | 2 x 1 |  | True | eeeeeee with edits {rest}",
    ]
    assert table()[HOPPER, "iql"]["mean"] == "6.0", "an unfinished run is not averaged"


def test_beside_the_paper(here):
    """F-BRC on hopper-medium-v0; the paper's number is read from its table, not from here."""
    paper = {(r["dataset"], r["method"]): r for r in rows_of("fisher_brc_table1")}
    row = paper[HOPPER, "F-BRC"]
    mean, std = float(row["paper"]), float(row["paper std"])
    write_seeds(here, 3, mean - 4, method="fisher_brc")
    write_run(here, method="td3_bc")  # not in the table
    main(table="fisher_brc_table1")
    found, name = table("fisher_brc_table1"), "fisher_brc_table1"
    row = found[HOPPER, "F-BRC"]
    assert float(row["mean"]) == pytest.approx(mean - 3, abs=0.05) and float(row["paper"]) == mean
    expected = -3 / np.hypot(np.std([0, 1, 2], ddof=1), std)
    assert float(row["difference / std"]) == pytest.approx(expected, abs=0.05)
    assert found[HOPPER, "MBOP"]["paper"] and not found[HOPPER, "MBOP"]["mean"]
    assert paper.keys() <= found.keys() and "td3_bc" not in page(name)
    assert section(f"{name}: {report.SCORE}", name)[2:] == [
        f"| {HOPPER} | {mean - 3:.1f} ± 0.6 (3) |",
        f"| {report.ALL} | {mean - 3:.1f} ± 0.6 (3) |",
        "| steps | 10 |",
        "| evaluations x episodes | 1 x 1 |",
    ]


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_no_certainty_from_two_seeds_or_an_unprinted_deviation(here, seeds):
    for method in ("fisher_brc", "bc"):  # the paper prints a deviation for F-BRC only
        write_seeds(here, seeds, method=method)
    main(table="fisher_brc_table1")
    ours, clone = (table("fisher_brc_table1")[HOPPER, method] for method in ("F-BRC", "BC"))
    assert bool(ours["difference / std"]) == bool(ours["IQM low"]) == (seeds == 3)
    assert clone["paper"] and clone["paper std"] == clone["difference / std"] == ""


def test_one_dataset_with_two_seeds_takes_the_interval_of_all(here):
    write_seeds(here, 4)
    write_seeds(here, 2, env="walker2d-medium-v0")
    main()
    row = table()[report.ALL, "bc"]
    names = ("seeds", "mean", "standard error", "std", "IQM", "IQM low", "IQM high")
    assert [row[name] for name in names] == ["4 or 2", "51.0", "0.4", "", "51.0", "", ""]


def test_second_policy_of_a_run(here):
    write_run(here, "antmaze-umaze-v0", "arq", scores=(50.0,), references={"implicit policy": 60.0})
    main(table="arq_table2", figures=True)
    scores = {m: row["mean"] for (_, m), row in table("arq_table2").items() if row["mean"]}
    assert scores == {"ARQ+pi_phi": "50.0", "ARQ+s_psi": "60.0"}
    assert len(section("Every run", "arq_table2")) == 3, "one run"


def test_faults_of_the_papers_are_told(here):
    write_run(here, "antmaze-umaze-v2", "itrpo", scores=(90.0,))
    main(table="itrpo_table3")
    (fault, *_) = section("Known faults of the paper's table", "itrpo_table3")
    assert "434.9" in page("itrpo_table3") and fault.startswith("- ") and "418.5" in fault


@pytest.mark.parametrize(
    "name", sorted(p.stem for p in report.PAPERS.glob("*.csv") if p.stem != "faults")
)
def test_every_table_is_well_formed(name):
    rows, faults = rows_of(name), report.paper_table(name)[1].to_dict("records")
    assert len({(r["dataset"], r["method"]) for r in rows}) == len(rows)
    scripts = {"", *(path.stem for path in SCRIPTS)}
    for row in rows:
        assert all(row[k] == "" or np.isfinite(float(row[k])) for k in ("paper", "paper std"))
        assert row["last"] in ("", "1", "3")
        assert row["run"].partition(":")[0].partition("-")[0] in scripts
    known = {r["dataset"] for r in rows}, {r["method"] for r in rows}
    for fault in faults:
        assert fault["dataset"] in known[0] | {""} and fault["method"] in known[1] | {""}
        assert fault["note"]


@pytest.mark.parametrize("ours, paper", [("ogbench", "fql_table3"), ("modern", "rebrac_tables"),
                                         ("modern", "fql_table3")])  # fmt: skip
def test_tables_of_several_papers_repeat_their_numbers(ours, paper):
    printed = {(r["dataset"], r["method"]): (r["paper"], r["paper std"]) for r in rows_of(paper)}
    shared = [r for r in rows_of(ours) if (r["dataset"], r["method"]) in printed]
    if ours == "modern":  # its other columns are of other papers
        shared = [r for r in shared if r["method"] == {"fql": "FQL", "reb": "ReBRAC"}[paper[:3]]]
    assert len(shared) > 17
    for row in shared:
        assert (row["paper"], row["paper std"]) == printed[row["dataset"], row["method"]], row


def rows_of(name):
    return report.paper_table(name)[0].to_dict("records")


def test_as_many_evaluations_are_averaged_as_the_paper_does(here):
    """Of ten evaluations: as many as the run says, or one of FQL's on D4RL."""
    scores, scene = tuple(float(i) for i in range(1, 11)), "scene-play-singletask-task2-v0"
    write_run(here, env=scene, method="fql", scores=scores, averaged=3)
    write_run(here, env="pen-human-v1", method="fql", scores=scores)
    write_run(here, env="pen-human-v1", method="fql", seed=1, scores=(99.0,), finished=False)
    main()
    means = [table()[env, "fql"]["mean"] for env in ("pen-human-v1", scene)]
    assert means == ["5.5", "9.0"]
    main(table="fql_table3")
    means = [table("fql_table3")[env, "FQL"]["mean"] for env in ("pen-human-v1", scene)]
    assert means == ["10.0", "9.0"]


def test_names_that_markdown_and_matplotlib_read_otherwise(here):
    """Of a run that is still training, which is drawn too."""
    write_run(here, env="a|b$x_{$.npz", scores=(1.0,), finished=False)
    main(figures=True)
    assert r"| a\|b$x_{$ |" in page() and Path("report/runs_steps.png").exists()


# ---- what is averaged ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, words",
    [
        ({"args": {"steps": 20}}, "steps (10 and 20)"),
        ({"args": {"steps": 20, "lr": 1}}, "steps (10 and 20), lr (unknown and 1)"),
        ({"args": {"compile": True}}, "compile (unknown and True)"),
        ({"config": {"precision": "medium"}}, "precision (highest and medium)"),
        ({"config": {"task": "Hopper-v4"}}, "task (Hopper-v5 and Hopper-v4)"),
        ({"settings": {"clone": "f"}, "args": {"clone": "x"}}, "clone (unknown and f)"),
        ({"settings": {"data": "0"}}, f"data ({'d' * 16} and 0)"),
        ({"settings": {"version of torch": "3"}}, "version of torch (2.13 and 3)"),
        ({"settings": {"version of mujoco": "3.3"}}, "version of mujoco (unknown and 3.3)"),
        *[({"settings": {part: "f"}}, f"{part} ({CODE[part]} and f)") for part in CODE],
    ],
)
def test_runs_that_differ_are_refused_or_listed(here, change, words):
    write_run(here, seed=0)
    write_run(here, seed=1)
    write_run(here, seed=2, **change)
    line = f"runs/{HOPPER}__bc__0 and runs/{HOPPER}__bc__2 differ in {words}"
    refused(f"{line}: add --mixed to average them, or move one away")
    main(mixed=True)
    assert section("Averaged although they differ") == [f"- {line}"]
    titles = [x for x in page().splitlines() if x.startswith("# ")]
    assert titles[0] == "# Averaged although they differ", "above the tables"
    assert table()[HOPPER, "bc"]["seeds"] == "3"
    assert table()[HOPPER, "bc"]["steps"] == ("10 or 20" if "steps" in words else "10")


def test_what_may_differ(here):
    """Other methods and datasets; and, between seeds, what changes no number."""
    write_run(here, seed=0, args={"device": "cpu", "log_every": 1, "clone": "here"})
    more = {"commit": "f" * 40, "dirty": True}
    write_run(here, seed=1, args={"device": "cuda", "log_every": 2, "clone": "there"}, config=more)
    write_run(here, method="iql", settings={"code of algorithm": "f" * 12})
    write_run(here, env="other", settings={"data": "0" * 16})
    main()
    assert table()[HOPPER, "bc"]["seeds"] == "2"


def test_a_seed_counts_once_and_a_run_that_is_found_twice_too(here):
    write_run(here / "a")
    write_run(here / "b")
    for mixed in (False, True):
        words = f"runs/a/{HOPPER}__bc__0 and runs/b/{HOPPER}__bc__0 are the same seed"
        refused(words, mixed=mixed)
    write_run(here / "c", seed=1)
    main(folders=("runs/a", "runs/c", "runs/c"))
    assert table()[HOPPER, "bc"]["seeds"] == "2"


# ---- figures ---------------------------------------------------------------------------------


def fake(steps, seeds):
    """Runs of three datasets and fifteen methods."""
    methods = [*list(report.STYLES)[:9], *(f"fisher_brc-lam{i}" for i in range(6))]
    draw, steps = np.random.default_rng(0), np.array(steps, float)

    def curve():
        columns = {"steps": steps, "seconds": steps / 90, "score": draw.normal(size=len(steps))}
        return pd.DataFrame(columns)

    datasets = ("hopper-medium-expert-demo", "hopper-replay-demo", "pointmaze-stitch-demo")
    rows = [(d, m, curve()) for d in datasets for m in methods for _ in range(seeds)]
    return pd.DataFrame(rows, columns=["dataset", "method", "curve"])


def drawn(runs, axis="steps"):
    """(figure, its renderer) with everything in its place."""
    figure = report.curves(runs, axis)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return figure, canvas.get_renderer()


@pytest.mark.parametrize(
    "axis, last",
    [("steps", 1), ("steps", 200_000), ("seconds", 30_000), ("seconds", 1_000_000)],
)
def test_labels_do_not_collide(axis, last):
    figure, renderer = drawn(fake(np.linspace(0, last, 21)[1:], 3), axis)
    ends = []
    for panel in figure.axes:
        low, high = panel.get_xlim()
        ticks = [t for t in panel.xaxis.get_major_ticks() if low <= t.get_loc() <= high]
        boxes = [t.label1.get_window_extent(renderer) for t in ticks]
        assert len(boxes) > 2 and low == 0
        for left, right in zip(boxes, boxes[1:]):
            assert left.x1 + 4 < right.x0, [t.label1.get_text() for t in ticks]
        ends += [boxes[0], boxes[-1]]
        if axis == "steps" and last == 200_000:
            assert "100k" in [t.label1.get_text() for t in ticks]
    for left, right in zip(ends[1::2], ends[2::2]):
        assert left.x1 < right.x0, "labels of neighboring panels"


def test_three_panels_are_legible_at_800_pixels():
    figure, renderer = drawn(fake(range(1, 21), 3))
    texts = [x for x in figure.findobj(lambda x: hasattr(x, "get_fontsize")) if x.get_text()]
    assert len(texts) > 30
    smallest = min(text.get_fontsize() for text in texts)
    assert smallest / 72 * 800 / figure.get_figwidth() > 9.5, "pixels of a letter's height"
    for text in (figure.legends[0], figure._suptitle):
        box = text.get_window_extent(renderer)
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width, "cut at the edge"
    panel = figure.axes[0].get_window_extent(renderer)
    assert not panel.overlaps(figure.legends[0].get_window_extent(renderer))


def test_one_legend_names_every_method_once_and_one_style_is_its_own():
    runs = fake(range(1, 21), 3)
    figure, _ = drawn(runs)
    assert len(figure.legends) == 1 and not any(panel.get_legend() for panel in figure.axes)
    methods, styles = sorted(runs.method.unique()), {}
    assert sorted(text.get_text() for text in figure.legends[0].get_texts()) == methods
    for panel in figure.axes:
        for line, method in zip(panel.lines, methods, strict=True):
            style = (line.get_color(), str(line._dash_pattern))
            assert styles.setdefault(method, style) == style, "the same in every panel"
            assert line.get_marker() == "o", "a single evaluation is visible"
    assert len(set(styles.values())) == len(methods) == 15


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_a_band_needs_three_seeds(seeds):
    runs = fake(range(1, 5), seeds)
    figure, _ = drawn(runs)
    assert "interval, from 3 seeds on" in figure._suptitle.get_text()
    assert bool(figure.axes[0].collections) == (seeds == 3)
    one = runs[(runs.dataset == "hopper-replay-demo") & (runs.method == "awr")]
    scores = np.array([run.score for run in one.curve])  # (seeds, T)
    lines = [line.get_ydata() for line in figure.axes[1].lines]
    assert any(np.allclose(line, scores.mean(0)) for line in lines)
    for band in figure.axes[1].collections:  # the mean of resampled seeds lies between the seeds
        heights = band.get_paths()[0].vertices[:, 1]
        assert len(set(heights)) > 4, "an interval for each step"


def test_no_two_methods_look_alike():
    assert {path.stem for path in SCRIPTS} <= report.STYLES.keys()
    for count in (0, 1, 3, 30, 100):
        variants = [f"iql-alpha{i}" for i in range(count)]
        styles = report.styles_of([*report.STYLES, *variants])
        assert len(set(styles.values())) == len(report.STYLES) + count == len(styles)
        assert len({styles[variant][0] for variant in variants}) == count, "colors, not lines alone"


def test_seeds_without_a_common_step_have_no_curve(here):
    write_run(here, seed=0, every=10)
    write_run(here, seed=1, every=7, finished=False)
    main(figures=True)
    assert not report.curves(report.read_runs(["runs"]), "steps").axes[0].lines


# ---- refusals --------------------------------------------------------------------------------


def test_no_runs_or_no_table(here):
    refused("there is no folder runs")
    here.mkdir()
    refused("no run below runs")
    write_run(here, method="td3_bc")
    refused("none of the runs below runs is in", "fisher_brc_table1", table="fisher_brc_table1")
    hint = "local, ablations and everything else are shown without --table"
    refused("there is no table nine: use one of", "fisher_brc_table1", hint, table="nine")


def test_numbers_are_read_to_the_last_bit(here):
    scores = [0.1 + 0.2, *np.random.default_rng(0).normal(size=50).tolist()]
    write_run(here, scores=scores)
    assert report.read_runs(["runs"]).curve[0].score.tolist() == scores


DEEP = b"[" * 100_000 + b"]" * 100_000
CONTENTS = [b"", b"[]", b"3", b"{}", b"\xff", b'{"score": 1.5}', DEEP, b'{"args": 3}']
CONTENTS += [
    b'{"evaluations": 2, "averaged": 10, "references": %s, "score": %s}' % pair
    for pair in [(b"{}", x) for x in (b'"x"', b"NaN", b"1e999", b"1" + b"0" * 400)]
    + [(x, b"1.5") for x in (b"[]", b'{"a": "x"}', b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}")]
]


@pytest.mark.parametrize(
    "name, old, new, words",
    [
        ("eval.csv", b".+", b"", "cut short"),
        ("eval.csv", b"(?<=^s).+", b"", "cut short"),
        ("eval.csv", rb"..\Z", b"", "cut short"),
        ("eval.csv", b"20,[^\n]*\n", b"", "eval.csv has 1 evaluations"),
        ("eval.csv", b"10,.*", b"", "eval.csv has 0 evaluations"),
        ("eval.csv", b",2.0,", b",7.0,", "eval.csv has 2 evaluations, and the score 4"),
        ("eval.csv", b",2.0,", b",nan,", "no finite number"),
        ("eval.csv", b",2.0,0", b",2.0", "a value is missing"),
        ("eval.csv", b"\r\n20,", b"\r\n10,", "steps do not grow"),
        ("eval.csv", b"\r\n20,", b"\r\ninf,", "no finite number"),
        ("eval.csv", b"score", b"scare", "score"),
        *[(name, b".+", x, name) for name in ("config.json", "summary.json") for x in CONTENTS],
        ("config.json", b'"hopper-medium-v0"', b'["x"]', "config.json"),
        ("config.json", b'"hopper-medium-v0"', b"3", "config.json"),
        ("config.json", b'"seed": 0', b'"seed": null', "config.json"),
        ("config.json", b'"seed": 0', b'"seed": Infinity', "config.json"),
        ("config.json", b'"algorithm": "bc"', b'"algorithm": ["bc"]', "config.json"),
        ("config.json", b'"settings": {[^}]*}', b'"settings": ["x"]', "config.json"),
    ],
)
def test_damaged_files(here, name, old, new, words):
    path = write_run(here) / name
    content, count = re.subn(old, lambda _: new, path.read_bytes(), count=1, flags=re.DOTALL)
    assert count
    path.write_bytes(content)
    refused("cannot be read", words, "--overwrite", "--resume")


def test_settings_nested_as_deeply_as_json_can_be_read(here):
    """json.loads takes this; comparing or printing it must not overflow the stack."""
    for seed in (0, 1):
        path = write_run(here, seed=seed, args={"note": None}) / "config.json"
        deep = "[" * (900 + seed) + "]" * (900 + seed)
        path.write_text(path.read_text().replace("null", deep))
    refused()


def test_a_pipe_is_not_waited_for(here):
    for name in ("eval.csv", "summary.json"):
        path = write_run(here, seed=len(name)) / name
        path.unlink()
        os.mkfifo(path)
        refused(f"{name} cannot be read", "it is not a file")
        path.unlink()
        (path.parent / "config.json").unlink()


def test_out_that_takes_no_file(here):
    write_run(here)
    (here.parent / "report").mkdir()
    for name in ("runs_steps.png", "runs.csv", "runs.md"):
        (here.parent / "report" / name).unlink(missing_ok=True)
        (here.parent / "report" / name).symlink_to("/dev/full")
        words = "--out report: No space left on device; use another folder"
        refused(words, figures=name.endswith("png"))
    refused("use another folder", out="report/runs.md/report")  # below a file


def test_from_another_folder(here):
    write_run(here, env="own", scores=(3.0,))
    command = [sys.executable, str(ROOT / "tools" / "report.py"), "runs", "--no-figures"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stderr == "" and "| 3.0 (1) |" in found.stdout
    assert found.stdout.splitlines()[-1].startswith("written to report/runs.")

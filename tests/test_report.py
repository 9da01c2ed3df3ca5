"""report.py: statistics against scipy and by hand, what is averaged, tables, figures, refusals."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats

from harness import load_dataset
from tools import report
from tools.report import bootstrap, improvement, iqm

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = {"python": "3.11", "torch": "2.13", "numpy": "2.1"}
CODE = {"algorithm": "a" * 12, "common": "b" * 12, "harness": "c" * 12}


def write_run(root, env="hopper-medium-v0", method="bc", seed=0, scores=(1.0, 2.0), **more):
    """A run's folder as the harness leaves it. In `config`, None removes a key."""
    algorithm, _, name = method.partition("-")
    folder = root / f"{env.replace('/', '-')}__{method}__{seed}"
    folder.mkdir(parents=True)
    args = {"env": env, "seed": seed, "name": name, "steps": 10} | more.get("args", {})
    config = {
        "algorithm": algorithm,
        "args": args,
        "dataset_sha256": "d" * 16,
        "code": CODE,
        "commit": "e" * 40,
        "dirty": False,
        "precision": "highest",
        "versions": VERSIONS,
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
        summary = {"score": float(np.mean(scores[-10:])) if scores else None}
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
    with open(f"report/{name}.csv", newline="") as f:
        return list(csv.DictReader(f))


def page(name="runs"):
    with open(f"report/{name}.md") as f:
        return f.read()


def refused(*words, **args):
    with pytest.raises(report.InputError) as error:
        main(**args)
    line = str(error.value)
    assert "\n" not in line and len(line) < 700, line
    assert all(word in line for word in words), line


# ---- statistics ------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 11, 40])
def test_iqm_is_scipys_trimmed_mean(n):
    x = np.random.default_rng(n).normal(size=(3, n))
    assert np.allclose(iqm(x), scipy.stats.trim_mean(x, 0.25, axis=1))


def test_iqm_by_hand():
    assert iqm(np.array([100.0, 1, 2, 3, 4, 5, 6, -50])) == pytest.approx((2 + 3 + 4 + 5) / 4)


def test_bootstrap_of_one_stratum_is_scipys():
    x = np.random.default_rng(0).normal(3, 2, 30)
    low, high = bootstrap([x], lambda v: v.mean(-1), 20_000)
    other = scipy.stats.bootstrap(
        (x,), np.mean, n_resamples=20_000, method="percentile"
    ).confidence_interval
    assert low == pytest.approx(other.low, abs=0.03) and high == pytest.approx(other.high, abs=0.03)


def test_bootstrap_resamples_each_dataset_on_its_own():
    """Datasets of constant but different scores have no uncertainty; pooled, they would."""
    assert bootstrap([[1.0, 1, 1], [9.0, 9]], lambda v: v.mean(-1), 500) == (4.2, 4.2)


def test_probability_of_improvement():
    assert improvement([[3, 4], [1]], [[1, 3.5], [1]]) == pytest.approx((3 / 4 + 1 / 2) / 2)
    rng = np.random.default_rng(1)
    x, y = rng.normal(0.3, 1, 12), rng.normal(0, 1, 15)
    u = scipy.stats.mannwhitneyu(x, y).statistic
    assert improvement([x], [y]) == pytest.approx(u / (12 * 15))


def test_standard_errors():
    x = np.random.default_rng(2).normal(size=7)
    assert report.standard_error(x) == pytest.approx(scipy.stats.sem(x))
    assert report.standard_error([1.0]) is report.error_of_average([[1.0, 2], [3.0]]) is None
    # two datasets: sqrt(sem^2 + sem^2) / 2, with sem 1 and 2 for these seeds
    assert report.error_of_average([[0.0, 2], [0.0, 4]]) == pytest.approx(np.sqrt(1 + 4) / 2)


def test_the_error_of_an_average_is_that_of_repeated_experiments():
    rng = np.random.default_rng(3)
    draws = rng.normal(0, [[1.0], [3.0]], (20_000, 2, 4))  # datasets of 4 seeds
    errors = [report.error_of_average(draw) for draw in draws[:2_000]]
    assert np.mean(np.square(errors)) == pytest.approx(draws.mean((1, 2)).var(), rel=0.05)


# ---- tables ----------------------------------------------------------------------------------


def test_every_run_without_a_table(here):
    for seed, final in enumerate((10.0, 14.0)):
        write_run(here, method="fisher_brc-lam1", seed=seed, scores=(0.0, *[final] * 10))
    write_run(here, env="mujoco/hopper/medium-v0", scores=(7.0,))
    main(figures=True)
    with open("report/runs.csv", newline="") as f:
        header, hopper, minari = list(csv.reader(f))
    names = ("ours", "std", "standard error", "seeds", "IQM", "IQM low", "IQM high")
    ours = [f"{m}, {x}" for m in ("bc", "fisher_brc-lam1") for x in names]
    assert header == ["dataset", *ours]
    two = ["12.0", "2.8", "2.0", "2", "12.0", "", ""]
    assert hopper == ["hopper-medium-v0", *[""] * 7, *two]
    assert minari == ["mujoco/hopper/medium-v0", "7.0", "", "", "1", "7.0", "", "", *[""] * 7]
    assert "| hopper-medium-v0 |  | 12.0 ± 2.0 (2) |" in page()
    for axis in ("steps", "seconds"):
        with open(f"report/runs_{axis}.png", "rb") as f:
            assert f.read(4) == b"\x89PNG"


def test_methods_are_rows_where_they_are_more_than_the_datasets(here):
    for method in ("bc", "iql"):
        write_run(here, method=method)
    main()
    assert "| method | hopper-medium-v0 |" in page() and "| iql | 1.5 (1) |" in page()


def test_each_dataset_has_its_table_with_the_data_first(here):
    """Methods follow by their mean; the best episode is known for bundled data of the same hash."""
    env = "hopper-medium-expert-demo"
    data, task = load_dataset(env)
    best = task.score([data.episode_return.max().item()])
    same = dict(config={"dataset_sha256": data.digest}, references={"data": 47.2})
    for seed in range(5):
        write_run(here, env=env, method="iql", seed=seed, scores=(70.0 + seed**2,), **same)
    top = dict(args={"top": 0.1}, references={"data": 102.3})  # of the episodes that it clones
    write_run(here, env=env, method="bc-top10", scores=(80.0,), **same | top)
    write_run(here, env="walker2d-medium-v0", references={"data": 11.0})
    main()
    section = page().split(f"## {env}\n")[1].split("## ")[0].strip().splitlines()
    low, high = bootstrap([[70.0, 71, 74, 79, 86]], iqm, 2000)
    assert section[2:] == [
        "| data, mean of its episodes |  | 47.2 |  |  |",
        f"| data, best episode |  | {best:.1f} |  |  |",
        "| bc-top10 | 1 | 80.0 | 80.0 |  |",
        f"| iql | 5 | 76.0 ± 2.9 | 74.7 | {low:.1f} to {high:.1f} |",
    ]
    assert float(table()[0]["iql, IQM low"]) == pytest.approx(low, abs=0.05)
    assert f"- {env}: mean of its episodes 47.2, best episode {best:.1f}\n" in page()
    assert page().count("best episode |") == 1, "unknown for data that is not bundled"
    assert report.best_episode(env, "another hash") is None


def test_every_run_has_its_line(here):
    """The score that the tables average, not an evaluation; unfinished runs have none."""
    write_run(here, "hopper-medium-v0", "iql", 1, (4.0, 8.0))
    clone = {"data": 3.0, "its clone (BC)": 33.25}
    write_run(here, "hopper-medium-v0", "brac", 2, (1.0,), references=clone)
    write_run(here, "hopper-medium-v0", "iql", 0, (7.0,))
    write_run(here, "hopper-medium-v0", "iql", 3, (9.0,), finished=False)
    main()
    assert page().split("## Every run\n\n")[1].splitlines()[2:] == [
        "| hopper-medium-v0 | brac | 2 | 1.0 | its clone (BC) 33.2 |",
        "| hopper-medium-v0 | iql | 0 | 7.0 |  |",
        "| hopper-medium-v0 | iql | 1 | 6.0 |  |",
    ]


def test_one_dataset_alone(here):
    write_run(here)
    write_run(here, env="other", method="iql")
    main(env="other")
    assert "| other |" in page() and "hopper" not in page()
    refused("none of the runs below runs is of dataset none", env="none")


def test_beside_the_paper(here):
    """F-BRC on hopper-medium-v0; the paper's number is read from its table, not from here."""
    paper = {(r["dataset"], r["method"]): r for r in report.paper_rows("fisher_brc_table1")[0]}
    row = paper["hopper-medium-v0", "F-BRC"]
    mean, std = float(row["mean"]), float(row["std"])
    for seed, score in enumerate((mean - 4, mean - 3, mean - 2)):
        write_run(here, method="fisher_brc", seed=seed, scores=(score,))
    write_run(here, method="td3_bc")  # not in the table
    main(table="fisher_brc_table1")
    row = {r["dataset"]: r for r in table("fisher_brc_table1")}["hopper-medium-v0"]
    assert float(row["F-BRC, ours"]) == pytest.approx(mean - 3, abs=0.05)
    assert float(row["F-BRC, paper"]) == mean
    expected = -3 / np.hypot(np.std([0, 1, 2], ddof=1), std)
    assert float(row["F-BRC, difference / std"]) == pytest.approx(expected, abs=0.05)
    text = page("fisher_brc_table1")
    assert row["MBOP, paper"] and "MBOP, ours" not in row and "td3_bc" not in text
    assert "- hopper-medium-v0: BC, BRAC-p, BRAC-v, CQL_ours\n" in text
    assert "- every method: halfcheetah-random-v0, hopper-random-v0" in text


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_no_certainty_from_two_seeds_or_an_unprinted_deviation(here, seeds):
    for method in ("fisher_brc", "bc"):  # the paper prints a deviation for F-BRC only
        write_seeds(here, seeds, method=method)
    main(table="fisher_brc_table1")
    row = {r["dataset"]: r for r in table("fisher_brc_table1")}["hopper-medium-v0"]
    assert bool(row["F-BRC, difference / std"]) == (seeds == 3)
    assert row["BC, paper"] and row["BC, paper std"] == row["BC, difference / std"] == ""


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_have_neither_interval_nor_probability(here, seeds):
    write_seeds(here, seeds)
    write_seeds(here, seeds, first=90.0, method="iql")
    main()
    assert page().count("none: fewer than 3 seeds on a dataset |") == 2
    assert "No probability of improvement is shown" in page() and "1.00" not in page()
    assert f"| bc | 1 | {seeds} |" in page()


def test_one_dataset_with_two_seeds_takes_the_interval_of_all(here):
    write_seeds(here, 4)
    write_seeds(here, 2, env="walker2d-medium-v0")
    main()
    assert "| bc | 2 | 2 to 4 | 51.0 ± 0.4 | 51.0 | none: fewer than 3 seeds" in page()


def test_an_interval_and_a_probability_come_with_their_seeds(here):
    write_seeds(here, 3)
    write_seeds(here, 3, first=90.0, method="iql")
    write_seeds(here, 2, first=70.0, method="cql")
    main()
    assert "| bc | 1 | 3 | 51.0 ± 0.6 | 51.0 | 50.0 to 52.0 |" in page()
    assert "too narrow for so few: a dataset has 3" in page()
    assert "| iql | 1.00 |" in page()
    assert "two equal methods with 3 seeds each reach it by chance once in 20 times" in page()
    assert "Pairs with fewer than 3 seeds on a shared dataset are left out" in page()


def test_many_seeds_need_no_word_about_narrow_intervals(here):
    write_seeds(here, 5)
    main()
    assert "95% interval" in page() and "too narrow" not in page()


def test_second_policy_of_a_run(here):
    write_run(here, "antmaze-umaze-v0", "arq", scores=(50.0,), references={"implicit policy": 60.0})
    main(table="arq_table2")
    text = page("arq_table2")
    assert "kitchen-mixed-v0" in text.partition("every method: ")[2].splitlines()[0]
    assert "robomimic" not in text.partition("Missing:")[2], "no reader: not missing"
    row = {r["dataset"]: r for r in table("arq_table2")}["antmaze-umaze-v0"]
    assert (row["ARQ+pi_phi, ours"], row["ARQ+s_psi, ours"]) == ("50.0", "60.0")


def test_faults_of_the_papers_are_footnotes(here):
    write_run(here, "antmaze-umaze-v2", "itrpo", scores=(90.0,))
    main(table="itrpo_table3")
    text = page("itrpo_table3")
    assert "434.9" in text and "418.5 [1]" in text


@pytest.mark.parametrize(
    "name", sorted(p.stem for p in report.PAPERS.glob("*.csv") if p.stem != "faults")
)
def test_every_table_is_well_formed(name):
    rows, faults = report.paper_rows(name)
    assert len({(r["dataset"], r["method"]) for r in rows}) == len(rows)
    for row in rows:
        for key in ("mean", "std"):
            assert row[key] == "" or np.isfinite(float(row[key]))
        assert row.get("last", "") in ("", "1", "3")
        assert row["run"].partition(":")[0].partition("-")[0] in {
            "",
            *(p.stem for p in (ROOT / "algorithms").glob("*.py")),
        }
    known = {r["dataset"] for r in rows}, {r["method"] for r in rows}
    for fault in faults:
        assert fault["dataset"] in known[0] | {""} and fault["method"] in known[1] | {""}
        assert fault["note"]


@pytest.mark.parametrize("ours, paper", [("ogbench", "fql_table3"), ("modern", "rebrac_tables"),
                                         ("modern", "fql_table3")])  # fmt: skip
def test_tables_of_several_papers_repeat_their_numbers(ours, paper):
    printed = {(r["dataset"], r["method"]): (r["mean"], r["std"]) for r in rows_of(paper)}
    shared = [r for r in rows_of(ours) if (r["dataset"], r["method"]) in printed]
    if ours == "modern":  # its other columns are of other papers
        shared = [r for r in shared if r["method"] == {"fql": "FQL", "reb": "ReBRAC"}[paper[:3]]]
    assert len(shared) > 17
    for row in shared:
        assert (row["mean"], row["std"]) == printed[row["dataset"], row["method"]], row


def test_only_what_the_table_has_can_be_missing(here):
    write_run(here, "antmaze-umaze-v2", "iql")
    main(table="modern")
    assert "- antmaze-umaze-v2: ReBRAC, FQL\n" in page("modern"), "TD3+BC's paper has no mazes"


def rows_of(name):
    return report.paper_rows(name)[0]


def test_as_many_evaluations_are_averaged_as_the_paper_does(here):
    """Of ten evaluations: three on OGBench with a table or without, one of FQL's on D4RL."""
    scores = tuple(float(i) for i in range(1, 11))
    for env in ("scene-play-singletask-task2-v0", "pen-human-v1"):
        write_run(here, env=env, method="fql", scores=scores)
    main()
    assert [row["fql, ours"] for row in table()] == ["5.5", "9.0"]
    main(table="fql_table3")
    ours = {r["dataset"]: r["FQL, ours"] for r in table("fql_table3") if r["FQL, ours"]}
    assert ours == {"pen-human-v1": "10.0", "scene-play-singletask-task2-v0": "9.0"}
    assert "or of the last 3 on OGBench" in page() and "`last`" in page("fql_table3")


def test_unfinished_runs_are_listed_and_not_averaged(here):
    write_run(here, seed=0, scores=(5.0,))
    write_run(here, seed=1, scores=(100.0, 200.0), finished=False)
    main()
    assert "5.0 (1)" in page() and "Unfinished:" in page()
    assert "- runs/hopper-medium-v0__bc__1 (2 evaluations)" in page(), "as it was typed"


def test_runs_without_evaluation_are_finished(here):
    write_run(here, env="own", scores=())
    (write_run(here, env="own", seed=1, scores=()) / "summary.json").write_text("{}")
    write_run(here, env="own", seed=2, scores=(), finished=False)
    main()
    unfinished, without = page().partition("Unfinished:")[2].split("Without evaluation:")
    assert unfinished.count("- ") == 1 and "own__bc__2 (0 evaluations)" in unfinished
    assert "own__bc__0" in without and "own__bc__1" in without


def test_the_datas_own_score_and_the_machine_are_told(here):
    write_run(here, references={"data": 11.44})
    main()
    assert "- hopper-medium-v0: mean of its episodes 11.4\n" in page()
    assert "- x86_64, 2 cores, cpu, 1 thread, precision highest, torch 2.13: 1 run\n" in page()


def test_names_that_markdown_and_matplotlib_read_otherwise(here):
    write_run(here, env="a|b$x_{$.npz", scores=(1.0,))
    main(figures=True)
    assert r"| a\|b$x_{$ |" in page()


# ---- what is averaged ------------------------------------------------------------------------


def test_runs_of_other_settings_are_refused(here):
    write_run(here, seed=0)
    write_run(here, seed=1, args={"steps": 20})
    refused("steps (10 and 20)", "bc__0 and runs/hopper-medium-v0__bc__1 differ", "--mixed")
    main(mixed=True)
    assert "Averaged although they differ:" in page() and "steps (10 and 20)" in page()
    assert "(2)" in page()


@pytest.mark.parametrize("part", list(CODE))
def test_runs_of_other_code_are_refused(here, part):
    write_run(here, seed=0)
    write_run(here, seed=1, config={"code": CODE | {part: "f" * 12}})
    refused(f"differ in code of {part} ({CODE[part]} and ffffffffffff):", "--mixed")
    main(mixed=True)
    assert f"code of {part} (" in page()


def test_runs_of_other_data_are_refused(here):
    write_run(here, seed=0)
    write_run(here, seed=1, config={"dataset_sha256": "0" * 16})
    refused("differ in data (dddddddddddddddd and 0000000000000000):", "--mixed")


def test_runs_of_other_versions_are_refused(here):
    write_run(here, seed=0)
    write_run(here, seed=1, config={"versions": VERSIONS | {"torch": "2.15"}})
    refused("torch (2.13 and 2.15)", "--mixed")


def test_all_that_differs_is_said_at_once_and_the_others_counted(here):
    for seed in range(3):
        write_run(here, seed=seed)
    write_run(here, seed=3, args={"steps": 20}, config={"dataset_sha256": "0" * 16})
    refused("bc__0 (and 2 more like it) and", "steps (10 and 20), data (dddd")


def test_runs_of_other_methods_or_datasets_may_differ(here):
    write_run(here)
    write_run(here, method="iql", config={"code": CODE | {"algorithm": "f" * 12}})
    write_run(here, env="other", config={"dataset_sha256": "0" * 16})
    main()


def test_a_new_commit_that_leaves_the_code_alone_is_no_difference(here):
    write_run(here, seed=0)
    write_run(here, seed=1, config={"commit": "f" * 40})
    write_run(here, seed=2, config={"commit": "f" * 40, "dirty": True})
    main()
    assert "(3)" in page()
    assert "with edits" in page() and "- hopper-medium-v0, bc: seed 2\n" in page()


def test_unknown_code_is_never_averaged_with_known_code(here):
    write_run(here, seed=0)
    write_run(here, seed=1, config={"code": None})
    refused(f"differ in code (hashed and unknown (commit {'e' * 40}))", "--mixed")
    main(mixed=True)
    assert "Code unknown" in page() and "- hopper-medium-v0, bc: seed 1\n" in page()


def test_unknown_code_is_known_by_its_commit(here):
    write_run(here, seed=0, config={"code": None})
    write_run(here, seed=1, config={"code": None})
    main()
    assert "(2)" in page() and "- all 2 runs" in page()
    write_run(here, seed=2, config={"code": None, "commit": "f" * 40})
    refused("(and 1 more like it)", "unknown (commit ffff", "--mixed")


def test_settings_that_change_no_result_may_differ(here):
    write_run(here, seed=0, args={"device": "cpu", "log_every": 1})
    write_run(here, seed=1, args={"device": "cuda", "log_every": 2})
    main()
    assert "(2)" in page()


def test_a_seed_counts_once(here):
    write_run(here / "a")
    write_run(here / "b")
    refused("runs/a/hopper-medium-v0__bc__0 and runs/b/", "are the same seed")


# ---- figures ---------------------------------------------------------------------------------


def fake(steps, seeds):
    """{(dataset, method): runs} of three datasets and fifteen methods."""
    methods = [*list(report.STYLES)[:9], *(f"fisher_brc-lam{i}" for i in range(6))]
    draw = np.random.default_rng(0)
    steps = np.array(steps, float)
    return {
        (env, method): [
            SimpleNamespace(steps=steps, seconds=steps / 90, scores=draw.normal(size=len(steps)))
            for _ in range(seeds)
        ]
        for env in ("hopper-medium-expert-demo", "hopper-replay-demo", "pointmaze-medium-demo")
        for method in methods
    }


def drawn(cells, axis="steps"):
    """(figure, its renderer) with everything in its place."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    envs, methods = dict.fromkeys(e for e, _ in cells), dict.fromkeys(m for _, m in cells)
    figure = report.curves(cells, list(envs), list(methods), axis, 50)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return figure, canvas.get_renderer()


@pytest.mark.parametrize("axis", ["steps", "seconds"])
@pytest.mark.parametrize("last", [1, 30_000, 200_000, 1_000_000])
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


def test_one_legend_names_every_method_once():
    cells = fake(range(1, 21), 3)
    figure, _ = drawn(cells)
    assert len(figure.legends) == 1 and not any(panel.get_legend() for panel in figure.axes)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(names) == sorted({method for _, method in cells})


def test_one_evaluation_is_visible():
    figure, _ = drawn(fake([5000], 3))
    for panel in figure.axes:
        for line in panel.lines:
            assert line.get_marker() == "o" and len(line.get_xdata()) == 1


def test_the_figure_explains_its_interval():
    for seeds, words in ((1, "Each line is one run."), (2, "No band"), (3, "Band: 95% bootstrap")):
        figure, _ = drawn(fake(range(1, 5), seeds))
        assert words in figure._suptitle.get_text()
        assert bool(figure.axes[0].collections) == (seeds == 3), "two seeds have no band"
        assert seeds == 1 or f"mean over {seeds} seeds" in figure._suptitle.get_text()


def test_no_two_methods_look_alike():
    assert len(set(report.STYLES.values())) == len(report.STYLES)
    named = {path.stem for path in (ROOT / "algorithms").glob("*.py")} & report.STYLES.keys()
    assert len(named) >= 14, "every algorithm has its own style"
    for count in (3, 13, 30, 100):
        methods = [*report.STYLES, *(f"iql-variant{i}" for i in range(count))]
        styles = report.styles_of(methods)
        assert len(set(styles.values())) == len(methods) == len(styles)


def test_a_method_looks_the_same_in_every_figure():
    all_of_them = report.styles_of([*report.STYLES, "iql-own"])
    for method in (*report.STYLES, "iql-own"):
        assert report.styles_of([method])[method] == all_of_them[method]
    lines = {}
    for cells in (fake(range(1, 5), 3), fake(range(1, 5), 1)):
        for panel in drawn(cells)[0].axes:
            for line, method in zip(panel.lines, dict.fromkeys(m for _, m in cells)):
                style = (line.get_color(), line.get_linestyle(), line._dash_pattern)
                assert lines.setdefault(method, style) == style


def test_seeds_without_a_common_step_have_no_curve(here):
    write_run(here, seed=0, every=10)
    write_run(here, seed=1, every=7, finished=False)
    main(figures=True)
    cells = report.collect(report.Args(), None)
    assert not report.curves(cells, ["hopper-medium-v0"], ["bc"], "steps", 50).axes[0].lines


# ---- refusals --------------------------------------------------------------------------------


def test_unknown_table(here):
    write_run(here)
    for name in ("nine", "local", "ablations"):
        hint = "local, ablations and everything else are shown without --table"
        refused(f"there is no table {name}: use one of", "fisher_brc_table1", hint, table=name)


def test_no_runs(here):
    refused("there is no folder runs")
    here.mkdir()
    refused("no run below runs")


def test_runs_of_another_table(here):
    write_run(here, method="td3_bc")
    refused("none of the runs", "in fisher_brc_table1", table="fisher_brc_table1")


@pytest.mark.parametrize("kept", [0, 1, -2, -3, -6])
@pytest.mark.parametrize("finished", [True, False])
def test_half_written_csv(here, kept, finished):
    path = write_run(here, finished=finished) / "eval.csv"
    path.write_bytes(path.read_bytes()[:kept])
    refused("eval.csv cannot be read", "--overwrite" if finished else "--resume")


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_csv_without_its_last_rows(here, rows):
    """Cut at the end of a line, or lost: an unfinished run may look so, a finished one may not."""
    path = write_run(here) / "eval.csv"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:rows])) if rows else path.unlink()
    refused(
        f"eval.csv cannot be read (ValueError: its {max(rows - 1, 0)} evaluations are not those"
    )


@pytest.mark.parametrize(
    "old, new, words",
    [
        (",2.0,", ",7.0,", "the last 10 have the mean 4, in summary.json 1.5"),
        (",2.0,", ",nan,", "nan is no number"),
        ("\r\n20,", "\r\n10,", "its steps do not grow"),
        ("\r\n20,", "\r\ninf,", "inf is no number"),
        ("score", "scare", "'score' is not in list"),
    ],
)
def test_csv_of_other_numbers(here, old, new, words):
    path = write_run(here) / "eval.csv"
    content = path.read_bytes().decode()
    assert old in content
    path.write_bytes(content.replace(old, new).encode())
    refused("eval.csv cannot be read", words, "--overwrite")


DEEP = b"[" * 100_000 + b"]" * 100_000
NESTED = b'{"references": {"a": ' + b"[" * 900 + b"]" * 900 + b"}}"


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"3", b'{"score": "x"}', b'{"score": NaN}', b'{"score": [1]}', b"\xff"]
    + [b'{"score": 1.5, "references": []}', b'{"score": 1.5, "references": {"a": "x"}}']
    + [b'{"score": 1e999}', b'{"score": 1' + b"0" * 400 + b"}", DEEP, NESTED],
)
def test_damaged_summary(here, content):
    (write_run(here) / "summary.json").write_bytes(content)
    refused("summary.json cannot be read", "--overwrite")


def test_summary_without_the_score_of_its_evaluations(here):
    (write_run(here) / "summary.json").write_text("{}")
    refused("its 2 evaluations are not those of summary.json")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"args": 3}', b'{"args": []}', b"\xff", DEEP, b'{"args": ' + DEEP + b"}"],
)
def test_damaged_config(here, content):
    (write_run(here) / "config.json").write_bytes(content)
    refused("config.json cannot be read")


@pytest.mark.parametrize(
    "change",
    [
        {"args": {"env": ["x"]}},
        {"args": {"env": 3}},
        {"args": {"seed": None}},
        {"args": {"seed": float("inf")}},
        {"config": {"versions": []}},
        {"config": {"versions": ["x"]}},
        {"config": {"code": ["x"]}},
        {"config": {"code": 3}},
        {"config": {"algorithm": ["bc"]}},
    ],
)
def test_config_of_other_types(here, change):
    write_run(here, **change)
    refused("config.json cannot be read", "--overwrite")


def test_settings_nested_as_deeply_as_json_can_be_read(here):
    """json.loads takes this; comparing or printing it must not overflow the stack."""
    for seed in (0, 1):
        path = write_run(here, seed=seed, args={"note": None}) / "config.json"
        path.write_text(path.read_text().replace("null", "[" * (900 + seed) + "]" * (900 + seed)))
    with pytest.raises(report.InputError) as error:
        main()
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


def test_a_pipe_is_not_waited_for(here):
    for name in ("eval.csv", "summary.json"):
        path = write_run(here, seed=len(name)) / name
        path.unlink()
        os.mkfifo(path)
        refused(f"{name} cannot be read", "not a file")
        path.unlink()
        (path.parent / "config.json").unlink()


def test_full_disk(here):
    write_run(here)
    (here.parent / "report").mkdir()
    for name in ("runs_steps.png", "runs.csv", "runs.md"):
        (here.parent / "report" / name).unlink(missing_ok=True)
        (here.parent / "report" / name).symlink_to("/dev/full")
        words = "--out report: No space left on device; use another folder"
        refused(words, figures=name.endswith("png"))


def test_out_below_a_file(here):
    write_run(here)
    (here / "file").write_text("")
    refused("use another folder", out=str(here / "file" / "report"))


# ---- command line ----------------------------------------------------------------------------


def test_from_another_folder(here):
    """Folders in any place, the numbers as people type them; one line for what is wrong."""
    write_run(here, env="own", scores=(3.0,))
    command = [sys.executable, str(ROOT / "tools" / "report.py")]
    found = subprocess.run([*command, "runs", "--resamples", "1e3"], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stderr == "" and "| own | 3.0 (1) |" in found.stdout
    assert found.stdout.splitlines()[-1].startswith("written to report/runs.md")
    for value in ("0", "x", "inf"):
        with pytest.raises(report.InputError, match=f"--resamples is {value}: use a whole number"):
            report.parse(report.Args, {}, ["--resamples", value])

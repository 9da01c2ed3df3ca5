"""report.py: statistics against scipy and by hand, tables, refusals, a thousand runs."""

import csv
import json

import numpy as np
import pytest
import scipy.stats

import report
from report import Args, bootstrap, improvement, iqm, main

VERSIONS = {"python": "3.11", "torch": "2.13"}


def write_run(root, env="hopper-medium-v0", method="bc", seed=0, scores=(1.0, 2.0), **more):
    """A run's folder as experiment.py leaves it."""
    algorithm, _, name = method.partition("-")
    folder = root / f"{env.replace('/', '-')}__{method}__{seed}"
    folder.mkdir(parents=True)
    args = {"env": env, "seed": seed, "name": name, "steps": 10, "preset": {}} | more.get(
        "args", {}
    )
    config = {"algorithm": algorithm, "args": args, "versions": VERSIONS, "commit": "a" * 40}
    (folder / "config.json").write_text(json.dumps(config | more.get("config", {})))
    if scores:
        with open(folder / "eval.csv", "w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow(["step", "seconds", "return", "score", "episode_0"])
            writer.writerows([10 * (i + 1), i + 0.5, 0, s, 0] for i, s in enumerate(scores))
    if more.get("finished", True):
        summary = {"score": float(np.mean(scores[-10:])) if scores else None}
        summary |= {"evaluations": len(scores), "references": more.get("references", {})}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


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


# ---- tables ----------------------------------------------------------------------------------


def test_every_run_without_a_table(here):
    for seed, final in enumerate((10.0, 14.0)):
        write_run(here, method="fisher_brc-lam1", seed=seed, scores=(0.0, *[final] * 10))
    write_run(here, env="mujoco/hopper/medium-v0", scores=(7.0,))
    main(Args())
    with open("report/runs.csv", newline="") as f:
        header, hopper, minari = list(csv.reader(f))
    ours = [f"{m}, {x}" for m in ("bc", "fisher_brc-lam1") for x in ("ours", "std", "seeds")]
    assert header == ["dataset", *ours]
    assert hopper == ["hopper-medium-v0", "", "", "", "12.0", "2.8", "2"]
    assert minari == ["mujoco/hopper/medium-v0", "7.0", "", "1", "", "", ""]
    assert "| hopper-medium-v0 |  | 12.0 ± 2.8 (2) |" in page()
    for axis in ("steps", "seconds"):
        with open(f"report/runs_{axis}.png", "rb") as f:
            assert f.read(4) == b"\x89PNG"


def test_beside_the_paper(here):
    """F-BRC on hopper-medium-v0; the paper's number is read from its table, not from here."""
    paper = {(r["dataset"], r["method"]): r for r in report.paper_rows("fisher_brc_table1")[0]}
    row = paper["hopper-medium-v0", "F-BRC"]
    mean, std = float(row["mean"]), float(row["std"])
    for seed, score in enumerate((mean - 4, mean - 2)):
        write_run(here, method="fisher_brc", seed=seed, scores=(score,))
    write_run(here, method="td3_bc")  # not in the table
    main(Args(table="fisher_brc_table1"))
    row = {r["dataset"]: r for r in table("fisher_brc_table1")}["hopper-medium-v0"]
    assert float(row["F-BRC, ours"]) == pytest.approx(mean - 3, abs=0.05)
    assert float(row["F-BRC, paper"]) == mean
    expected = -3 / np.hypot(np.std([0, 2], ddof=1), std)
    assert float(row["F-BRC, difference / std"]) == pytest.approx(expected, abs=0.05)
    assert (
        row["MBOP, paper"] and "MBOP, ours" not in row and "td3_bc" not in page("fisher_brc_table1")
    )
    assert "- halfcheetah-random-v0: F-BRC" in page("fisher_brc_table1")
    assert "hopper-medium-v0: F-BRC" not in page("fisher_brc_table1")


@pytest.mark.parametrize("seeds", [1, 2])
def test_no_certainty_from_one_seed_or_an_unprinted_deviation(here, seeds):
    for seed in range(seeds):
        for method in ("fisher_brc", "bc"):  # the paper prints a deviation for F-BRC only
            write_run(here, method=method, seed=seed, scores=(50.0 + seed,))
    main(Args(table="fisher_brc_table1"))
    row = {r["dataset"]: r for r in table("fisher_brc_table1")}["hopper-medium-v0"]
    assert bool(row["F-BRC, difference / std"]) == (seeds == 2)
    assert row["BC, paper"] and row["BC, paper std"] == row["BC, difference / std"] == ""


def test_no_interval_where_a_dataset_has_one_seed(here):
    for seed in range(2):
        write_run(here, "hopper-medium-v0", seed=seed, scores=(50.0,))
    write_run(here, "walker2d-medium-v0", scores=(50.0,))
    main(Args())
    assert "| 50.0 | none: a dataset has one seed |" in page()
    write_run(here, "walker2d-medium-v0", seed=1, scores=(50.0,))
    main(Args())
    assert "| 50.0 | 50.0 to 50.0 |" in page()


def test_second_policy_of_a_run(here):
    write_run(here, "antmaze-umaze-v0", "arq", scores=(50.0,), references={"implicit policy": 60.0})
    main(Args(table="arq_table2"))
    assert "- kitchen-mixed-v0: ARQ+pi_phi" in page("arq_table2")
    assert "- robomimic" not in page("arq_table2"), "no reader: not missing"
    row = {r["dataset"]: r for r in table("arq_table2")}["antmaze-umaze-v0"]
    assert (row["ARQ+pi_phi, ours"], row["ARQ+s_psi, ours"]) == ("50.0", "60.0")


def test_faults_of_the_papers_are_footnotes(here):
    write_run(here, "antmaze-umaze-v2", "itrpo", scores=(90.0,))
    main(Args(table="itrpo_table3"))
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
        assert row["run"].partition(":")[0].partition("-")[0] in {
            "",
            *(p.stem for p in (report.DATA_DIR.parent / "algorithms").glob("*.py")),
        }
    known = {r["dataset"] for r in rows}, {r["method"] for r in rows}
    for fault in faults:
        assert fault["dataset"] in known[0] | {""} and fault["method"] in known[1] | {""}
        assert fault["note"]


def test_unfinished_runs_are_listed_and_not_averaged(here):
    write_run(here, seed=0, scores=(5.0,))
    write_run(here, seed=1, scores=(100.0, 200.0), finished=False)
    main(Args())
    assert "5.0 (1)" in page() and "Unfinished:" in page()
    assert "hopper-medium-v0__bc__1 (2 evaluations)" in page()


def test_runs_without_evaluation_are_finished(here):
    write_run(here, env="own", scores=())
    (write_run(here, env="own", seed=1, scores=()) / "summary.json").write_text("{}")
    write_run(here, env="own", seed=2, scores=(), finished=False)
    main(Args())
    unfinished, without = page().partition("Unfinished:")[2].split("Without evaluation:")
    assert unfinished.count("- ") == 1 and "own__bc__2 (0 evaluations)" in unfinished
    assert without.count("- ") == 2 and "own__bc__0" in without and "own__bc__1" in without


# ---- refusals --------------------------------------------------------------------------------


def refused(*words, **args):
    with pytest.raises(report.InputError) as error:
        main(Args(**args))
    line = str(error.value)
    assert "\n" not in line and all(word in line for word in words), line


def test_unknown_table(here):
    write_run(here)
    for name in ("nine", "local", "ablations"):
        hint = "local, ablations and everything else are shown without --table"
        refused(f"no table {name}", "fisher_brc_table1", hint, table=name)


def test_no_runs(here):
    refused("no folder runs")
    here.mkdir()
    refused("no run below runs")


def test_runs_of_another_table(here):
    write_run(here, method="td3_bc")
    refused("none of the runs", "fisher_brc_table1", table="fisher_brc_table1")


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
    "content",
    [b"", b"[]", b"3", b'{"score": "x"}', b'{"score": NaN}', b'{"score": [1]}', b"\xff"]
    + [b'{"score": 1.5, "references": []}', b'{"score": 1.5, "references": {"a": "x"}}'],
)
def test_damaged_summary(here, content):
    (write_run(here) / "summary.json").write_bytes(content)
    refused("summary.json cannot be read", "--overwrite")


def test_summary_without_the_score_of_its_evaluations(here):
    (write_run(here) / "summary.json").write_text("{}")
    refused("its 2 evaluations are not those of summary.json")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"args": 3}', '{"args": []}'])
def test_damaged_config(here, content):
    (write_run(here) / "config.json").write_text(content)
    refused("config.json cannot be read")


@pytest.mark.parametrize(
    "change", [{"args": {"env": ["x"]}}, {"args": {"seed": None}}, {"config": {"versions": []}}]
)
def test_config_of_other_types(here, change):
    write_run(here, **change)
    refused("config.json cannot be read", "--overwrite")


def test_mixed_settings(here):
    write_run(here, seed=0)
    write_run(here, seed=1, args={"steps": 20})
    refused("steps 10 and 20", "--mixed")
    main(Args(mixed=True))
    assert "steps 10 and 20" in page() and "(2)" in page()


def test_mixed_versions(here):
    write_run(here, seed=0)
    write_run(here, seed=1, config={"commit": "b" * 40})
    refused("commit", "--mixed")


def test_settings_that_change_no_result_may_differ(here):
    write_run(here, seed=0, args={"device": "cpu", "log_every": 1})
    write_run(here, seed=1, args={"device": "cuda", "log_every": 2})
    main(Args())
    assert "(2)" in page()


def test_a_seed_counts_once(here):
    write_run(here / "a")
    write_run(here / "b")
    refused("are the same seed")


def test_bad_flags(here):
    write_run(here)
    refused("--resamples is 0", resamples=0)
    (here / "file").write_text("")
    refused("give another folder", out=str(here / "file" / "report"))


@pytest.mark.parametrize("name", ["runs.md", "runs.csv", "runs_steps.png"])
def test_full_disk(here, name):
    write_run(here)
    (here.parent / "report").mkdir()
    (here.parent / "report" / name).symlink_to("/dev/full")
    refused("--out report: No space left on device; give another folder")

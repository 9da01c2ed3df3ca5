"""report.py and store.py: what is averaged and what is refused, tables by hand, the picture."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from short_runs import SCRIPTS, folder, rows, start

from common import InputError
from tools import report, store

HOPPER, MAZE = "hopper-replay-demo", "pointmaze-stitch-demo"


def write_run(root, env=HOPPER, method="bc", seed=0, scores=(10.0, 20.0), **more):
    """A run's folder with a score of `scores`' mean. `config`, `settings` and `args` replace what
    stands in config.json; `references` are those of summary.json, whose text `summary` replaces."""
    algorithm, _, name = method.partition("-")
    folder = Path(root, f"{Path(env).name}__{method}__{seed}")
    folder.mkdir(parents=True)
    args = {"env": env, "seed": seed, "name": name, "steps": 1000} | more.get("args", {})
    settings = args | {"data": "d", "code of run": "a", "version of torch": "2"}
    settings |= {"precision": "highest"} | more.get("settings", {})
    config = {"algorithm": algorithm, "args": args, "machine": "x86_64, 2 cores, cpu"}
    config |= {"settings": settings, "task": "Hopper-v5"} | more.get("config", {})
    (folder / "config.json").write_text(json.dumps(config))
    lines = [f"{more.get('every', 500) * (i + 1)},{i},0,{x},0" for i, x in enumerate(scores)]
    text = "\n".join(["step,seconds,return,score,episode_0", *lines, ""])
    (folder / "eval.csv").write_text(text)
    found = {"score": float(np.mean(scores)) if scores else None, "averaged": 10}
    found |= {"evaluations": len(scores), "references": more.get("references", {"data": 21.0})}
    (folder / "summary.json").write_text(more.get("summary", json.dumps(found)))
    return folder


def write_seeds(root, scores, **more):
    """One run for each score."""
    return [write_run(root, seed=seed, scores=(x,), **more) for seed, x in enumerate(scores)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def page(*folders, **args) -> str:
    """What the command prints."""
    report.main(report.Args(folders=folders or ("runs",), **args))
    return Path("report", f"{args.get('table') or 'runs'}.md").read_text()


def cells(text, start) -> list[str]:
    """The cells of the row of a table that begins so."""
    (line,) = (x for x in text.splitlines() if x.startswith(f"| {start}"))
    return line[2:-2].split(" | ")


def refused(*words, folders=("runs",), **args):
    with pytest.raises(InputError) as error:
        page(*folders, **args)
    line = str(error.value)
    assert "\n" not in line and all(word in line for word in words), line


# ---- statistics ------------------------------------------------------------------------------


def test_the_interquartile_mean_and_its_interval_are_scipys():
    x = np.random.default_rng(0).normal(3, 2, 30)
    assert np.allclose(report.iqm([x, -x]), scipy.stats.trim_mean([x, -x], 0.25, axis=-1))
    trimmed = lambda v, axis: scipy.stats.trim_mean(v, 0.25, axis=axis)
    other = scipy.stats.bootstrap((x,), trimmed, n_resamples=10_000, method="percentile")
    assert report.interval(x, 10_000) == pytest.approx([*other.confidence_interval], abs=0.04)


# ---- tables ----------------------------------------------------------------------------------


def test_the_table_by_hand(here):
    """Seeds that differ from the usual number stand in the cell; the error of a mean over datasets
    is that of independent seeds; bc.py --top does not speak for the whole data."""
    write_seeds("runs", (0.0, 2.0), method="iql", references={"data": 5.0})
    write_seeds("runs", (0.0, 4.0), method="iql", env=MAZE)
    write_seeds("runs", (8.0, 8.0), method="bc-top10", args={"top": 0.1}, references={"data": 99})
    write_seeds("runs", (7.0,), method="bc-top10", env=MAZE, args={"top": 0.1})
    text = page()
    head = cells(text, "method")
    assert head == ["method", f"`{HOPPER}`, 2 seeds", f"`{MAZE}`, 2 seeds", report.MEAN]
    assert cells(text, "the data")[1:3] == ["5.0", "21.0"]
    iql = ["IQL (yours)", "1.0 ± 1.0", "2.0 ± 2.0", f"1.5 ± {5**0.5 / 2:.1f}"]
    assert cells(text, "IQL (yours) ") == iql
    assert cells(text, "10% BC") == ["10% BC (yours)", "8.0 ± 0.0", "7.0 (1)", "7.5"]


def test_a_mean_over_datasets_needs_every_dataset_of_every_method(here):
    write_seeds("runs", (1.0,), method="iql")
    write_seeds("runs", (1.0,), method="iql", env=MAZE)
    assert report.MEAN in page()
    write_seeds("runs", (1.0,), method="awr", env=MAZE)
    text = page()
    assert report.MEAN not in text and cells(text, "AWR") == ["AWR (yours)", "-", "1.0"]


def test_stored_runs_stand_beside_yours_on_your_datasets_alone(here):
    """Of stored methods, those of README's table; what is named is shown."""
    for method in ("iql", "awr", "iql-lam9", "corl_iql"):
        write_run("theirs", method=method)
        write_run("theirs", method=method, env=MAZE)
    pack("theirs")
    write_run("runs", method="iql")
    write_run("runs", method="mine-wide")
    text = page("results", "runs")
    titles = [x.split(" | ")[0][2:] for x in text.splitlines() if x.startswith("| ")]
    assert titles[2:] == ["IQL (yours)", "mine wide (yours)", "AWR", "IQL"], "yours come first"
    assert MAZE not in text
    text = page("results", "runs", datasets=(MAZE,), methods=("corl_iql", "iql-lam9"))
    assert "IQL, CORL's code" in text and "IQL lam9" in text and HOPPER not in text
    assert MAZE in page("results"), "stored runs alone: all of their datasets"
    refused("no such run: the datasets are", HOPPER, "mine-wide", methods=("nothing",))


def test_a_log_without_a_simulator_shows_its_fqe(here):
    judged = {"fqe": 3.5, "fqe_interval": [3, 4], "data_fqe": 1.5}
    for method in ("bc", "iql"):
        folder = write_run("runs", "logs/log.npz", method, scores=(), references={"data": 9.0})
        if method == "iql":
            (folder / "evaluation.json").write_text(json.dumps(judged))
    text = page()
    assert "`log, FQE`, 1 seed" in text and cells(text, "the data")[1] == "1.5"
    assert cells(text, "IQL (yours)")[1] == "3.5" and "| BC" not in text
    assert "runs/log.npz__bc__0: python tools/evaluate.py estimates its return" in text


def test_a_summary_of_no_bytes_is_no_finished_run(here):
    write_run("runs", seed=0)
    write_run("runs", seed=1, summary="")
    text = page()
    assert cells(text, "BC (yours)")[1] == "15.0"
    assert f"- runs/{HOPPER}__bc__1: not finished" in text


# ---- papers ----------------------------------------------------------------------------------


def test_runs_beside_a_papers_numbers(here):
    """Under the paper's names; a second policy of a run; as many evaluations as the paper averages;
    made data beside the data that they imitate."""
    env = "antmaze-umaze-v0"
    write_run("runs", env, "arq", scores=(50.0,), references={"implicit policy": 60.0})
    text = page(table="arq_table2")
    assert cells(text, f"{env} | ARQ+s_psi")[2] == "60.0 (1)"
    assert cells(text, f"{env} | ARQ+pi_phi")[2] == "50.0 (1)"
    write_run("runs", "pen-human-v1", "fql", scores=tuple(map(float, range(1, 11))))
    assert cells(page(table="fql_table3"), "pen-human-v1 | FQL")[2] == "10.0 (1)"
    write_run("runs", "halfcheetah-random-v2-made", "td3_bc", scores=(12.0,))
    row = cells(page(table="random_v2"), "halfcheetah-random-v2 |")
    assert row[1:] == ["TD3+BC", "12.0 (1)", "11.0 ± 1.1"]
    refused("there is no table nine: use one of", "fisher_brc_table1", table="nine")
    refused("no run of itrpo_table3", table="itrpo_table3")


@pytest.mark.parametrize("path", sorted(report.PAPERS.glob("*.csv")), ids=lambda path: path.stem)
def test_every_table_is_well_formed(path):
    if path.stem == "faults":
        return
    table, faults = report.paper_table(path.stem)
    assert not table.duplicated(["dataset", "method"]).any()
    scripts = {"", *(script.stem for script in SCRIPTS)}
    for row in table.itertuples():
        assert all(x == "" or np.isfinite(float(x)) for x in (row.mean, row.std))
        assert row.last in ("", "1", "3")
        assert row.run.partition(":")[0].partition("-")[0] in scripts
    for fault in faults.itertuples():
        assert fault.dataset in {"", *table.dataset} and fault.method in {"", *table.method}
        assert fault.note


# ---- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, words",
    [
        ({"args": {"steps": 20}}, "steps (1000 and 20)"),
        ({"settings": {"code of run": "b"}}, "code of run (a and b)"),
        ({"settings": {"data": "e"}}, "data (d and e)"),
        ({"settings": {"version of torch": "3"}}, "version of torch (2 and 3)"),
        ({"settings": {"version of mujoco": "3"}}, "version of mujoco (unknown and 3)"),
        ({"settings": {"precision": "medium"}}, "precision (highest and medium)"),
        ({"config": {"task": "Hopper-v4"}}, "task (Hopper-v5 and Hopper-v4)"),
        ({"config": {"machine": "x86_64, 2 cores, cuda"}}, "device (cpu and cuda)"),
    ],
)
def test_runs_that_differ_are_not_averaged(here, change, words):
    write_run("runs", seed=0)
    write_run("runs", seed=1, **change)
    names = [f"runs/{HOPPER}__bc__{seed}" for seed in (0, 1)]
    refused(f"{names[0]} and {names[1]} differ in {words}: give one of them a --name")


def test_a_seed_counts_once_and_a_folder_that_is_named_twice_too(here):
    write_run("runs/a")
    assert cells(page("runs/a", "runs"), "BC (yours)")[1] == "15.0"
    write_run("runs/b")
    refused(f"runs/a/{HOPPER}__bc__0 and runs/b/{HOPPER}__bc__0 are the same seed")


@pytest.mark.parametrize("name", ["config.json", "eval.csv", "summary.json", "evaluation.json"])
@pytest.mark.parametrize("content", [b"{", b"3", b"\xff", b"[" * 99_999])
def test_a_damaged_file_is_named_in_one_line(here, name, content):
    (write_run("runs") / name).write_bytes(content)
    if (name, content) != ("evaluation.json", b"3"):
        refused(f"runs/{HOPPER}__bc__0 cannot be read (", "--overwrite")


def test_no_run_is_one_line(here):
    refused("there is no folder runs")
    Path("runs").mkdir()
    refused("no run below runs: train something first")


# ---- the picture -----------------------------------------------------------------------------


def test_the_picture_has_yours_in_red_above_the_others_sorted_by_mean(here):
    for method, scores in {"iql": (1.0, 3.0), "awr": (8.0, 9.0), "bc": (4.0,)}.items():
        write_seeds("theirs", scores, method=method)
        write_seeds("theirs", scores, method=method, env=MAZE)
    pack("theirs")
    write_seeds("runs", (5.0, 6.0), method="iql")
    runs = report.chosen(report.read_runs(["results", "runs"]), report.Args())
    (panel,) = report.picture(runs, "a title").axes
    labels = panel.get_yticklabels()
    assert [x.get_text() for x in labels] == ["IQL", "BC", "AWR", "IQL (yours)"]
    assert [x.get_color() for x in labels] == ["black"] * 3 + ["tab:red"]
    dots = [x for x in panel.lines if x.get_marker() == "o"]
    assert [[*x.get_xdata()] for x in dots] == [[1, 3], [4], [8, 9], [5, 6]]
    assert [x.get_color() for x in dots] == ["0.35"] * 3 + ["tab:red"]
    bars = [x.get_xdata()[0] for x in panel.lines if x.get_lw() == 2]
    assert bars == [2.0, 4.0, 8.5, 5.5]


# ---- stored runs -----------------------------------------------------------------------------


def pack(runs="runs", out="results"):
    store.main(store.Args(runs=str(runs), out=str(out)))


def test_every_value_comes_back_from_the_three_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from short_runs import write_log

    write_log("log.npz")
    for name in ("", "wide"):
        start("fisher_brc", name=name, eval_env=None, eval_every=10)
    pack()
    lines, _, metrics = store.stored(tmp_path / "results")
    stored = report.read_runs(["results"]).set_index("method")
    for line, method in zip(lines, ("fisher_brc", "fisher_brc-wide"), strict=True):
        path = folder(method)
        whole = json.loads((path / "config.json").read_text())
        assert line["config"] == whole | {"command": line["config"]["command"]}
        assert line["summary"] == json.loads((path / "summary.json").read_text())
        own = report.read_run(path)
        curve = stored.loc[method].curve
        assert curve.score.tolist() == own["curve"].score.tolist() and len(curve) == 2
        assert stored.loc[method].identity == own["identity"]
        for phase in ("behavior", "train"):
            found = metrics[(metrics.variant == method[11:]) & (metrics.phase == phase)]
            found = {(x.step, x.metric): x.value for x in found.itertuples()}
            written = {(row["step"], name): x for row in rows(path / f"{phase}.csv")
                       for name, x in row.items() if name != "step"}  # fmt: skip
            assert found == written


def test_a_run_that_comes_again_is_replaced_and_others_stay(here):
    first, second = write_seeds("runs", (1.0, 2.0))
    write_run("runs", seed=2, summary="")
    pack()
    before = [path.read_bytes() for path in sorted(Path("results").iterdir())]
    pack()
    assert [path.read_bytes() for path in sorted(Path("results").iterdir())] == before
    (second / "eval.csv").write_text("step,seconds,return,score\n7,0,0,5.5\n")
    pack(runs=second)
    stored = report.read_runs(["results"]).sort_values("seed")
    assert stored.seed.tolist() == [0, 1], "an unfinished run is not stored"
    assert [x.score.tolist() for x in stored.curve] == [[1.0], [5.5]]
    with pytest.raises(InputError, match="no finished run below none: train something first"):
        pack("none")


def test_no_path_of_the_machine_is_stored(here):
    command = f"{here}/algorithms/x.py --env {here}/log.npz --clone={here}/c.pt --seed 1"
    args = {"out": str(here / "elsewhere"), "env": str(here / "log.npz")}
    write_run("runs", config={"command": command}, args=args)
    pack()
    text = Path("results/runs.jsonl").read_text()
    assert str(here) not in text and '"x.py --env log.npz --clone=c.pt --seed 1"' in text
    assert '"out": "elsewhere"' in text and '"env": "log.npz"' in text

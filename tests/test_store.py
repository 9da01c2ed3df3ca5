"""tools/store.py: many runs in three files, from which every value comes back."""

import csv
import io
import json

import pytest
from short_runs import folder, rows, start

from common import InputError
from tools import report, store


@pytest.fixture
def runs(here):
    """Two finished runs of one method, one of them a variant with phases of its own."""
    for name, seed in (("", 1), ("wide", 2)):
        start("fisher_brc", seed=seed, name=name, eval_env=None, eval_every=10)
    return here / "runs"


def pack(runs="runs", out="results"):
    store.main(store.Args(runs=str(runs), out=str(out)))


def test_every_value_comes_back(runs, here):
    pack()
    lines, scores, metrics = store.stored(here / "results")
    files = {name.rpartition("/")[2]: texts for name, texts in store.files_of(here / "results")}
    assert len(lines) == len(files) == 2
    for path in (folder("fisher_brc", seed=1), folder("fisher_brc-wide", seed=2)):
        texts = files[path.name]
        config, whole = (
            json.loads(x) for x in (texts["config.json"], (path / "config.json").read_text())
        )
        assert config == whole | {"command": config["command"]}
        assert json.loads(texts["summary.json"]) == json.loads((path / "summary.json").read_text())
        assert texts["eval.csv"] == (path / "eval.csv").read_text().replace("\r\n", "\n")
        variant = "wide" if "wide" in path.name else ""
        for phase in ("behavior", "train"):
            found = metrics[(metrics.variant == variant) & (metrics.phase == phase)]
            found = {(x.step, x.metric): x.value for x in found.itertuples()}
            written = {(row["step"], name): x for row in rows(path / f"{phase}.csv")
                       for name, x in row.items() if name != "step"}  # fmt: skip
            assert found == written


def test_no_path_of_the_machine_is_stored(runs, here):
    """The last part stays, as in the names of runs on own files."""
    path = folder("fisher_brc", seed=1) / "config.json"
    config = json.loads(path.read_text())
    config["command"] = f"{here}/algorithms/x.py --env {here}/log.npz --clone={here}/c.pt --seed 1"
    config["args"] |= {"out": str(here / "elsewhere"), "env": str(here / "log.npz")}
    config["settings"]["env"] = str(here / "log.npz")
    path.write_text(json.dumps(config))
    pack()
    text = (here / "results" / "runs.jsonl").read_text()
    assert str(here) not in text and '"x.py --env log.npz --clone=c.pt --seed 1"' in text
    assert '"out": "elsewhere"' in text and '"env": "log.npz"' in text


def test_the_report_of_both_forms_is_the_same(runs, here, capsys):
    pack()
    capsys.readouterr()
    pages = []
    for where in ("runs", "results"):
        report.main(report.Args(folders=(where,), figures=False, out=f"report-{where}"))
        pages.append(capsys.readouterr().out.rpartition("written to")[0])
    assert pages[0] == pages[1] and "fisher_brc-wide" in pages[0]


def test_a_run_that_comes_again_is_replaced_and_others_stay(runs, here):
    pack()
    before = (here / "results" / "scores.csv").read_text()
    pack()
    assert (here / "results" / "scores.csv").read_text() == before
    start("fisher_brc", seed=1, eval_env=None, eval_every=5, overwrite=True)
    pack()
    table = list(csv.DictReader(io.StringIO((here / "results" / "scores.csv").read_text())))
    steps = {seed: [row["step"] for row in table if row["seed"] == seed] for seed in "12"}
    assert steps == {"1": ["5", "10", "15", "20"], "2": ["10", "20"]}


def test_no_run_and_damage_are_one_line(runs, here):
    with pytest.raises(InputError, match="no finished run below none: train something first"):
        pack("none")
    pack()
    (here / "results" / "runs.jsonl").write_text("{")
    with pytest.raises(InputError, match="repair or move"):
        pack()
    with pytest.raises(InputError, match="are damaged .*: get them again"):
        report.read_runs(["results"])

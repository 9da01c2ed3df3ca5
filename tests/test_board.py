"""harness/board.py: what a run shows, and curve.png."""

import re

import pytest
from harness.board import curve
from matplotlib.figure import Figure
from matplotlib.mathtext import MathTextParser
from short_runs import at, rows, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROWS = [{"step": 1, "score": 2.0}, {"step": 2, "score": 3.0}]


@pytest.mark.parametrize(
    "name", ["a$b", "$x$", r"$\frac$", r"\$x$", "$x_{$ {}^", "plain_name^2", "l\udcff"]
)
def test_a_name_is_no_formula(monkeypatch, name):
    """matplotlib reads what stands between two dollars, and fails where it is no formula; nor can
    it write bytes that are no text."""
    read, parse = [], MathTextParser.parse
    keep = lambda self, text, *rest: read.append(text) or parse(self, text, *rest)
    monkeypatch.setattr(MathTextParser, "parse", keep)
    picture = curve("bc", ROWS, {"data": 1.0}, f"{name}.npz, Pendulum-v1", "return")
    assert picture.startswith(b"\x89PNG") and not read


def test_events_are_the_rows_of_the_tables_also_after_a_crash(here):
    """Step 8 is in the events before the crash and after the resume, and is shown once."""

    def crash(run, metrics):
        raise RuntimeError("power cut")

    values = dict(eval_env=None, eval_every=4, log_every=1, save_every=7)
    with pytest.raises(RuntimeError, match="power cut"):
        start("bc", at("train", 9, crash), **values)
    _, run = start("bc", resume=True, **values)
    events = EventAccumulator(str(run.folder)).Reload()
    for table, prefix, steps in (("train", "losses", range(1, 21)), ("eval", "charts", None)):
        lines = rows(run.folder / f"{table}.csv")
        assert [int(row["step"]) for row in lines] == list(steps or range(4, 21, 4))
        for key in lines[0].keys() - {"step", "episode_0"}:
            shown = [(x.step, pytest.approx(x.value)) for x in events.Scalars(f"{prefix}/{key}")]
            assert [(int(row["step"]), float(row[key])) for row in lines] == shown, key
    assert all(x.value > 0 for x in events.Scalars("charts/updates_per_second"))


def test_without_a_task_every_tenth_row_and_the_last_are_shown(here, capsys):
    start("bc", log_every=1, steps=25)
    lines = re.findall(r"^train (\d+)/25 [a-z]\w* [-\d]", capsys.readouterr().out, re.M)
    assert lines == ["10", "20", "25"]


def test_the_curve_shows_scores_over_steps_beside_the_references(monkeypatch):
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda x, *a, **b: drawn.append(x) or save(x, *a, **b))
    curve("bc", ROWS, {"data": 1.5, "clone": 4.0}, "log, Pendulum-v1", "return")
    (axes,) = drawn[0].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("gradient steps", "return")
    assert axes.get_title() == "log, Pendulum-v1"
    scores, *references = [(*line.get_data(),) for line in axes.lines]
    assert [list(x) for x in scores] == [[1, 2], [2, 3]]
    assert [list(y) for _, y in references] == [[1.5, 1.5], [4, 4]]
    names = [x.get_text() for x in axes.get_legend().get_texts()]
    assert names == ["bc", "data 1.5", "clone 4.0"]

"""harness/board.py: what a run shows, and curve.png."""

import pytest
from matplotlib.mathtext import MathTextParser

from harness.board import curve

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

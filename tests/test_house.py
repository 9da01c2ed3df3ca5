"""The size of the page: what stands in common.py and run.py is read by everybody who reads one
algorithm, so it may not grow."""

import ast
import io
import tokenize

import pytest
from short_runs import ROOT, tracked

CAPS = {"common.py": 3_400, "run.py": 6_150, "readers/notes.py": 900}
TOGETHER = 15_000  # common.py, run.py and readers/, without the notes on data
READERS = sorted({*(ROOT / "readers").glob("*.py")} - {ROOT / "readers" / "notes.py"})
PAGE = [ROOT / "common.py", ROOT / "run.py"]
SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}


def lines_of(nodes):
    return {line for node in nodes for line in range(node.lineno, node.end_lineno + 1)}


def measured(text):
    """The number of tokens beside docstrings and comments, and how many a line of a body has."""
    nodes = [*ast.walk(ast.parse(text))]
    functions = [x for x in nodes if isinstance(x, ast.FunctionDef)]
    documented = [x for x in nodes if isinstance(x, ast.Module | ast.ClassDef | ast.FunctionDef)]
    strings = lines_of(x.body[0] for x in documented if ast.get_docstring(x) is not None)
    bodies = lines_of(node for x in functions for node in x.body)
    tokens = [x for x in tokenize.generate_tokens(io.StringIO(text).readline)
              if x.string and x.type not in SILENT and x.start[0] not in strings]  # fmt: skip
    inside = [x.start[0] for x in tokens if x.start[0] in bodies]
    return len(tokens), len(inside) / max(len({*inside}), 1)


def test_what_is_counted():
    text = '"""Text."""\n\n\ndef f(x):\n    """More."""\n    # why\n    y = x + 1\n    return y\n'
    assert measured(text) == (6 + 5 + 2, 3.5)


@pytest.mark.parametrize("name", CAPS)
def test_the_page_is_no_longer_than_it_may_be(name):
    assert measured((ROOT / name).read_text())[0] <= CAPS[name], "leave something out"


def test_the_page_and_the_readers_fit_together():
    assert sum(measured(path.read_text())[0] for path in [*PAGE, *READERS]) <= TOGETHER


@pytest.mark.parametrize("path", [*PAGE, *READERS], ids=lambda path: path.stem)
def test_no_function_is_squeezed(path):
    assert measured(path.read_text())[1] <= 13, "give steps their own lines"


def test_the_flags_of_a_run_are_a_page():
    text = (ROOT / "common.py").read_text()
    assert len(text[text.index("# ---- flags") :].splitlines()) <= 73


@pytest.mark.parametrize("folders, cap", [
    (("tools", "data/make", "peers", "figures"), 36_000),
    (("peers",), 5_000),
    (("tests",), 100_000),
])  # fmt: skip
def test_what_stands_around_the_page_does_not_grow(folders, cap):
    found = [path for folder in folders for path in tracked(folder)]
    assert sum(measured(path.read_text())[0] for path in found) <= cap, "leave something out"

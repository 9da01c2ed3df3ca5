"""STYLE by machine, where that helps the writer: order, density, names, help lines, citations."""

import ast
import dataclasses
import importlib
import io
import re
import tokenize
import typing

import pytest
from short_runs import ROOT, SCRIPTS, number_type, tracked

FOLDERS = ("algorithms", "readers", "tools", "data/make", "peers", "figures")
PAGES = [ROOT / "common.py", ROOT / "run.py"]
PRODUCT = [*PAGES, *(path for folder in FOLDERS for path in tracked(folder))]
PAPERS = ("env", "seed", "steps", "batch_size", "eval_every")  # the first fields of every Args
TEXTS = {"env", "device", "eval_env", "out", "name", "clone"}  # the flags that take any text
BRITISH = (
    r"behaviour|normalis|initialis|optimis|regularis|colour|centre|summaris|recognis|analys(e|ing)"
)
GUARD = """
if __name__ == "__main__":
    from run import main

    main(Args, PRESETS, train)
"""
TOP = "What changes scores (more in DEPARTURES, at the foot of the file):"
LISTS = ("The authors' code, against the paper:", "This file, against the authors' code:")
TOKENS = {tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING}

algorithm = pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
product = pytest.mark.parametrize("path", PRODUCT, ids=lambda p: f"{p.parent.name}-{p.stem}")


def tree(path):
    return ast.parse(path.read_text())


def names(path):
    """(name, node) of what stands at the top level, imports and docstring left out."""
    out = []
    for node in tree(path).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            out.append((node.name, node))
        elif isinstance(node, ast.Assign):
            out.append((ast.unparse(node.targets[0]), node))
        elif isinstance(node, ast.If):
            out.append(("__main__", node))
    return out


def fields(path):
    """[(name, help or None)] of the file's own Args, in order."""
    body = dict(names(path))["Args"].body
    after = [*body[1:], ast.Pass()]
    return [
        (node.target.id, next_.value.value if isinstance(next_, ast.Expr) else None)
        for node, next_ in zip(body, after)
        if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation)
    ]


def comments(text):
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [t.string for t in tokens if t.type == tokenize.COMMENT]


# ---- a file, top to bottom -------------------------------------------------------------------


@algorithm
def test_order_of_sections(path):
    body, order = tree(path).body, [name for name, _ in names(path)]
    assert ast.get_docstring(tree(path)), "the docstring comes first"
    kinds = [type(x) for x in body[1:]]
    first = kinds.index(ast.ClassDef)
    assert set(kinds[:first]) <= {ast.Import, ast.ImportFrom, ast.Expr}, "imports come first"
    assert not {ast.Import, ast.ImportFrom} & set(kinds[first:]), "imports come first"
    lines = [ast.unparse(x) for x in body[1 : first + 1] if isinstance(x, ast.Expr)]
    assert lines == ["sys.path.insert(0, str(Path(__file__).parents[1]))"], "one path line"
    assert order[0] == "Args", "Args follows the imports"
    assert order[-2:] == ["PRESETS", "__main__"], "PRESETS and the guard end the file"
    policy, train = order.index("policy"), order.index("train")
    between = [name for name in order[policy + 1 : train] if not name.startswith("train_")]
    assert policy < train and not between, "train and its phases follow policy"
    assert all(name.isupper() for name in order[train + 1 : -1]), "tables follow train"
    nets, update = order.index("Nets"), order.index("update")
    assert update < order.index("policy"), "update stands before policy"
    for i, name in enumerate(order):
        if re.search(r"_loss$|^update_", name):
            assert nets < i < update, f"{name} stands between Nets and update"
    for name, node in names(path)[1:nets]:
        assert isinstance(node, ast.Assign), f"{name}: only constants stand before Nets"
    assert path.read_text().endswith(f"\n{GUARD}"), "the guard is from run import main"


@algorithm
def test_nothing_of_the_project_is_imported_but_common(path):
    project = {"run", "readers", "tools", "peers", "figures", *(p.stem for p in SCRIPTS)}
    guard = dict(names(path))["__main__"]
    inside = {id(node) for node in ast.walk(guard)}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import | ast.ImportFrom) and node.lineno < guard.lineno:
            assert id(node) not in inside
            modules = [x.name for x in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in modules:
                assert name.split(".")[0] not in project, f"line {node.lineno}: import {name}"


def density(path):
    """Tokens in a line of function bodies, without docstrings and comments."""
    text, lines = path.read_text(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            skipped = 1 if ast.get_docstring(node) and len(node.body) > 1 else 0
            lines |= set(range(node.body[skipped].lineno, node.end_lineno + 1))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    rows = [t.start[0] for t in tokens if t.type in TOKENS and t.start[0] in lines]
    return len(rows) / max(len(set(rows)), 1)


@product
def test_lines_are_not_dense(path):
    found = density(path)
    assert found <= 13, f"{found:.1f} tokens a line in function bodies: give steps their own lines"


def assert_bullets(lines, title):
    bullets = [line for line in lines if line]
    assert bullets and bullets[0].startswith("- "), title
    assert all(line.startswith(("- ", "  ")) for line in bullets), title
    return sum(line.startswith("- ") for line in bullets)


@algorithm
def test_departures_that_change_scores_are_at_the_top_and_all_at_the_foot(path):
    """The docstring has the few that change scores, then the command; DEPARTURES has two lists."""
    lines = ast.get_docstring(tree(path)).splitlines()
    command, _, score = lines[-1].partition("  # ")  # the score: tests/test_readme.py
    assert command == f"    python algorithms/{path.name}", "the bare command ends the docstring"
    assert not score or re.match(r"[\d.]+k steps: ", score), "nothing but steps and score follow it"
    assert TOP in lines, f"the docstring has {TOP!r}"
    few = assert_bullets(lines[lines.index(TOP) + 1 : -1], TOP)
    assert few <= 6, "more than six departures change scores: keep the largest"
    foot = importlib.import_module(path.stem).DEPARTURES.strip().splitlines()
    where = [foot.index(title) if title in foot else None for title in LISTS]
    assert None not in where and where == sorted(where), f"DEPARTURES has two lists, titled {LISTS}"
    for start, end in zip(where, [where[1], len(foot)]):
        assert_bullets(foot[start + 1 : end], foot[start])


@algorithm
def test_every_equation_number_is_cited(path):
    text, body = path.read_text(), tree(path).body
    equations = [x for x in body[0].value.value.splitlines() if x.startswith("    ") and "=" in x]
    numbers = {n for x in equations for n in re.findall(r"\(([A-Z]?\.?\d+[a-z]?)\)\s*$", x)}
    functions = [x for x in ast.walk(ast.Module(body[1:], [])) if isinstance(x, ast.FunctionDef)]
    notes = [ast.get_docstring(f) or "" for f in functions]
    for node in body[1:]:  # comments of functions and networks, not of Args and PRESETS
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name != "Args":
            notes += comments(ast.get_source_segment(text, node) + "\n")
    notes = " ".join(" ".join(notes).split())
    many = r"(?:\(?[A-Z]?\.?\d+[a-z]?\)?(?:, | and |-| to | or ))*"
    for n in numbers:
        cited = re.search(
            rf"Eqs?\. {many}\(?{re.escape(n)}\)?(?![\w.]*\d)|\({re.escape(n)}\)", notes
        )
        assert cited, f"no function's docstring or comment cites Eq. {n}"


# ---- flags -----------------------------------------------------------------------------------


@algorithm
def test_args_begin_with_the_papers_five_fields(path):
    assert tuple(name for name, _ in fields(path)[:5]) == PAPERS
    assert [ast.unparse(base) for base in dict(names(path))["Args"].bases] == ["RunArgs"]


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / "common.py"], ids=lambda p: p.stem)
def test_every_field_has_one_line_of_help_that_stands_alone(path):
    args = "RunArgs" if path.stem == "common" else "Args"
    body = dict(names(path))[args].body
    after = [*body[1:], ast.Pass()]
    for node, next_ in zip(body, after):
        if not isinstance(node, ast.AnnAssign) or "ClassVar" in ast.unparse(node.annotation):
            continue
        text = next_.value.value if isinstance(next_, ast.Expr) else ""
        name = node.target.id
        assert text.strip() and "\n" not in text, f"{name} needs one line of help"
        alone = not re.match(r"(its|their|the same|as above)\b", text, re.I)
        assert alone, f"{name}: {text!r} says nothing in --help, where the lines stand alone"


@algorithm
def test_every_number_has_a_range_and_every_choice_is_a_literal(path):
    module = importlib.import_module(path.stem)
    text = path.read_text()
    for field in dataclasses.fields(module.Args):
        kind, allowed = number_type(field.type)
        options = [field.type, *typing.get_args(field.type)]
        if kind is int:
            assert allowed, f"{field.name} needs Count, CountOrZero, Seed or BatchSize of common.py"
        elif kind is float:  # where infinity makes sense
            checked = allowed or re.search(rf"def resolve.*\bself\.{field.name}\b", text, re.S)
            assert checked, f"{field.name} needs a range of common.py, or a check in resolve"
        elif str in options:
            assert field.name in TEXTS, f"{field.name}: a choice is a Literal"


# ---- every file of the product ---------------------------------------------------------------


@product
def test_lines_fit(path):
    wide = [i for i, x in enumerate(path.read_text().splitlines(), 1) if len(x) > 100]
    assert not wide, f"{path.name}: over 100 columns in lines {wide}"


@product
def test_names(path):
    for node in ast.walk(tree(path)):
        for key in ("id", "arg", "attr", "name"):
            name = getattr(node, key, None)
            assert name not in ("done", "dones", "data2", "x_t"), f"line {node.lineno}: {name}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type, f"line {node.lineno}: bare except"


@product
def test_words(path):
    text = path.read_text()
    for word in (r"\b(TODO|FIXME|XXX)\b", r"/(work|home|root|Users)/", rf"(?i)\b({BRITISH})"):
        found = re.search(word, text)
        assert not found, f"{path.name}: {found}"


def test_no_global_state_at_import():
    """No statement at the top level of a module but definitions, constants and the path line."""
    for path in PRODUCT:
        for node in tree(path).body:
            line = ast.unparse(node)
            if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
                assert line.startswith("sys.path.insert(0, "), f"{path.name}: {line}"
            for call in ast.walk(node) if isinstance(node, ast.Assign) else ():
                if isinstance(call, ast.Call):
                    callee = re.sub("'.*'", "", ast.unparse(call.func))
                    assert not re.search(r"environ|getenv|parse|device|open", callee), line

"""STYLE.md by machine: order, lengths, names and citations of every file in algorithms/."""

import ast
import dataclasses
import importlib
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "algorithms").glob("*.py"))
PRODUCT = [*FILES, *sorted(ROOT.glob("*.py")), *sorted((ROOT / "figures").glob("*.py"))]
SHARED = """env seed steps batch_size device precision compile eval_every eval_episodes eval_env
log_every save_every out name resume overwrite track""".split()
LIMITS = {"common.py": 400, "experiment.py": 480, "datasets.py": 510}
LIMITS |= {"README.md": 150, "benchmark.sh": 150}
BRITISH = (
    r"behaviour|normalis|initialis|optimis|regularis|colour|centre|summaris|recognis|analys(e|ing)"
)

algorithm = pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
product = pytest.mark.parametrize("path", PRODUCT, ids=lambda p: p.stem)


def nodes(path):
    return ast.parse(path.read_text()).body


def names(path):
    """(name, node) of what stands at the top level, imports and docstring left out."""
    out = []
    for node in nodes(path):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            out.append((node.name, node))
        elif isinstance(node, ast.Assign):
            out.append((ast.unparse(node.targets[0]), node))
        elif isinstance(node, ast.If):
            out.append(("__main__", node))
    return out


def span(node):
    first = min([node.lineno, *[d.lineno for d in getattr(node, "decorator_list", [])]])
    return node.end_lineno - first + 1


def fields(path):
    """[(name, help or None)] of Args, in order."""
    body = dict(names(path))["Args"].body
    after = [*body[1:], ast.Pass()]
    return [
        (node.target.id, next_.value.value if isinstance(next_, ast.Expr) else None)
        for node, next_ in zip(body, after)
        if isinstance(node, ast.AnnAssign)
    ]


def shared_block(path):
    """The text of Args from its first field to the help of `track`."""
    body = dict(names(path))["Args"].body
    i = [getattr(getattr(x, "target", None), "id", "") for x in body].index("track")
    lines = path.read_text().splitlines(keepends=True)
    return "".join(lines[body[0].lineno - 1 : body[i + 1].end_lineno])


def comments(text):
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [t.string for t in tokens if t.type == tokenize.COMMENT]


def test_there_are_algorithms():
    assert {"bc", "td3_bc", "fisher_brc"} <= {p.stem for p in FILES}


@algorithm
def test_order_of_sections(path):
    body, order = nodes(path), [name for name, _ in names(path)]
    assert ast.get_docstring(ast.Module(body, []))
    kinds = [type(x) for x in body[1:]]
    first = kinds.index(ast.ClassDef)
    assert set(kinds[:first]) <= {ast.Import, ast.ImportFrom, ast.Expr}, "imports come first"
    assert not {ast.Import, ast.ImportFrom} & set(kinds[first:]), "imports come first"
    lines = [ast.unparse(x) for x in body[1 : first + 1] if isinstance(x, ast.Expr)]
    assert lines == ["sys.path.insert(0, str(Path(__file__).parents[1]))"]
    assert order[:2] == ["Args", "PRESETS"]
    tail = [name for name in order if not name.startswith("train_")][-3:]  # train's own phases
    assert tail == ["policy", "train", "__main__"], "policy, train and the guard end the file"
    nets, update = order.index("Nets"), order.index("update")
    assert update < order.index("policy")
    for i, name in enumerate(order):
        if re.search(r"_loss$|^update_", name):
            assert nets < i < update, f"{name} stands between Nets and update"
    for a, b in zip(order[:nets][2:], names(path)[2:nets]):
        assert isinstance(b[1], ast.Assign), (
            f"only constants stand between PRESETS and Nets, not {a}"
        )


@algorithm
def test_guard_is_two_lines(path):
    assert path.read_text().endswith(
        '\n\nif __name__ == "__main__":\n    train(parse(Args, PRESETS))\n'
    )


@algorithm
def test_lengths(path):
    text, parts = path.read_text(), dict(names(path))
    assert len(nodes(path)[0].value.value.splitlines()) <= 40, "docstring"
    assert span(parts["train"]) <= 40, "train"
    limit = 500 if path.stem == "arq" else 350
    assert len(text.splitlines()) - span(parts["PRESETS"]) <= limit


@pytest.mark.parametrize("name", LIMITS)
def test_lengths_of_shared_files(name):
    if not (ROOT / name).exists():
        pytest.skip(f"no {name}")
    assert len((ROOT / name).read_text().splitlines()) <= LIMITS[name]


@algorithm
def test_shared_block_is_identical(path):
    assert [name for name, _ in fields(path)][: len(SHARED)] == SHARED
    assert shared_block(path) == shared_block(ROOT / "algorithms" / "bc.py")


@algorithm
def test_every_field_has_one_line_of_help(path):
    for name, text in fields(path):
        assert text and text.strip() and "\n" not in text, f"{name} needs one line of help"


@algorithm
def test_every_own_field_is_used(path):
    text = path.read_text()
    for name, _ in fields(path)[len(SHARED) :]:
        assert re.search(rf"\bargs\.{name}\b", text), f"{name} is a flag without effect"


@algorithm
def test_presets_name_fields_of_args(path):
    module = importlib.import_module(path.stem)
    known = {f.name for f in dataclasses.fields(module.Args)}
    for pattern, values in module.PRESETS.items():
        assert values and set(values) <= known, pattern
        assert not {"env", "seed"} & set(values), pattern


@algorithm
def test_every_equation_number_is_cited(path):
    text, body = path.read_text(), nodes(path)
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


@product
def test_lines_fit(path):
    wide = [i for i, x in enumerate(path.read_text().splitlines(), 1) if len(x) > 100]
    assert not wide, f"{path.name}: over 100 columns in lines {wide}"


@product
def test_names(path):
    for node in ast.walk(ast.parse(path.read_text())):
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


@algorithm
def test_no_host_read_inside_an_update(path):
    """update*, and every function of the file that they call."""
    functions = {k: v for k, v in names(path) if isinstance(v, ast.FunctionDef)}
    waiting, seen = [k for k in functions if k.startswith("update")], set()
    assert waiting
    while waiting:
        name = waiting.pop()
        seen.add(name)
        for call in (x for x in ast.walk(functions[name]) if isinstance(x, ast.Call)):
            callee = getattr(call.func, "attr", None) or getattr(call.func, "id", "")
            own = isinstance(call.func, ast.Name)
            assert callee not in ("item", "tolist", "numpy", "cpu") or own, f"{name}: .{callee}()"
            assert not own or callee not in ("print", "float", "bool"), f"{name}: {callee}()"
            if own and callee in functions.keys() - seen:
                waiting.append(callee)


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (x.name.split(".")[0] for x in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from [node.module.split(".")[0], *(x.name for x in node.names)]


@algorithm
def test_no_algorithm_imports_another(path):
    assert not set(imported(path)) & ({p.stem for p in FILES} | {"algorithms"})


def test_arrows_go_one_way():
    """algorithms/* -> experiment.py -> common.py -> datasets.py -> tasks.py"""
    chain, algorithms = ["tasks", "datasets", "common", "experiment"], {p.stem for p in FILES}
    for i, name in enumerate(chain):
        upward = {*chain[i + 1 :], *algorithms, "algorithms", "collect", "report"}
        assert not set(imported(ROOT / f"{name}.py")) & upward, name
    for name in ("collect", "report"):
        if (ROOT / f"{name}.py").exists():
            assert not set(imported(ROOT / f"{name}.py")) & (algorithms | {"algorithms"}), name


def test_no_global_state_at_import():
    """No statement at the top level of a module but definitions, constants and the path line."""
    for path in PRODUCT:
        for node in nodes(path):
            line = ast.unparse(node)
            if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
                assert line.startswith("sys.path.insert(0, "), f"{path.name}: {line}"
            for call in ast.walk(node) if isinstance(node, ast.Assign) else ():
                if isinstance(call, ast.Call):
                    callee = ast.unparse(call.func)
                    assert not re.search(r"environ|getenv|parse|device|open", callee), line

"""Write an algorithm as one file that imports packages only.

    python tools/alone.py fisher_brc > mine.py

The file begins with the algorithm as it stands in algorithms/. Below it follows what it uses of
common.py and run.py, in the order in which it stands there, and nothing else. It gives the same
numbers. Only names of public datasets are missing, because their readers stay here."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("common", "run")  # the modules whose definitions are taken along


class Block:
    """A statement at the top level of a module, with the comments right above it."""

    def __init__(self, node, lines):
        first = min([x.lineno for x in getattr(node, "decorator_list", [])] + [node.lineno]) - 1
        while first and lines[first - 1].startswith("#") and "----" not in lines[first - 1]:
            first -= 1
        self.node, self.text = node, "\n".join(lines[first : node.end_lineno])
        self.first, self.last = first + 1, node.end_lineno  # numbers of its lines in its file

    def needs_first(self) -> set[str]:
        """The names that must exist before the statement itself can run. The annotations need not:
        the file is written with `from __future__ import annotations`."""
        now = [self.node]
        if isinstance(self.node, ast.ClassDef | ast.FunctionDef):
            inside = getattr(self.node, "bases", []) + self.node.decorator_list
            functions = [x for x in ast.walk(self.node) if isinstance(x, ast.FunctionDef)]
            now = [*inside, *(x for function in functions for x in function.args.defaults)]
            now += [x.value for x in self.node.body if isinstance(x, ast.Assign | ast.AnnAssign)]
        return {x.id for part in now for x in names(part)}


def names(node) -> list:
    return [x for x in ast.walk(node) if isinstance(x, ast.Name)] if node else []


def defined(node) -> set[str]:
    """The names that a statement defines."""
    if hasattr(node, "name"):
        return {node.name}
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    return {x.id for target in targets for x in names(target)}


def read(path: Path):
    """The docstring, the imports {name: (module, name there)} and the other blocks of a module."""
    lines = path.read_text().splitlines()
    first, *nodes = ast.parse("\n".join(lines)).body
    imports, blocks = {}, []
    for node in nodes:
        if isinstance(node, ast.Import):
            imports |= {x.asname or x.name.split(".")[0]: (x.name, "") for x in node.names}
        elif isinstance(node, ast.ImportFrom):
            imports |= {x.asname or x.name: (node.module, x.name) for x in node.names}
        elif "sys.path.insert" not in ast.unparse(node):
            blocks.append(Block(node, lines))
    imports = {name: found for name, found in imports.items() if found[0] not in PARTS}
    return "\n".join(lines[: first.end_lineno]), imports, blocks


def flatten(args: Block, base: Block) -> None:
    """Give the class of the flags those of its base class, in place of the base: the fields after
    its own, the methods at the end."""
    own = {name for x in args.node.body for name in defined(x)}
    lines = args.text.replace("(RunArgs)", "").splitlines()
    methods = [x.lineno - args.first for x in args.node.body if isinstance(x, ast.FunctionDef)]
    fields, more, inherited = [], [], base.text.splitlines()
    for x, after in zip(base.node.body[1:], [*base.node.body[2:], None]):
        last = after if isinstance(after, ast.Expr) else x  # the text of a field stands below it
        part = inherited[x.lineno - base.first : last.end_lineno - base.first + 1]
        if isinstance(x, ast.FunctionDef):
            more += [""] + part if not own & defined(x) else []
        elif not isinstance(x, ast.Expr) and not own & defined(x):
            fields += part
    at = methods[0] if methods else len(lines)
    below = [""] + lines[at:] if methods else []
    lines = [*"\n".join(lines[:at]).rstrip().splitlines(), *fields, *below, *more]
    args.text = "\n".join(lines)
    args.node = ast.parse(args.text).body[0]


def alone(name: str) -> str:
    """The text of the file. Raises SystemExit for a name without a file in algorithms/."""
    path = ROOT / "algorithms" / f"{name}.py"
    if not path.is_file():
        known = ", ".join(sorted(x.stem for x in path.parent.glob("*.py")))
        raise SystemExit(f"there is no algorithm {name}: use one of {known}")
    docstring, imports, own = read(path)
    *own, guard = own
    there = {}  # what the algorithm may take along: its block, by name
    for part in PARTS:
        _, more, blocks = read(ROOT / f"{part}.py")
        imports |= more
        there |= {x: block for block in blocks for x in defined(block.node)}
    clash = {x for block in own for x in defined(block.node)} & there.keys()
    if clash:
        raise SystemExit(f"{name}.py and the page both define {', '.join(sorted(clash))}: rename")
    args = next(block for block in own if "Args" in defined(block.node))
    flatten(args, there["RunArgs"])

    wanted, queue = [], [*own, there["main"]]
    used = set()
    while queue:
        block = queue.pop()
        wanted += [block] * (block not in own)
        fresh = {x.id for x in names(block.node)} - used
        used |= fresh
        queue += {id(there[x]): there[x] for x in fresh & there.keys()}.values()
    order = list({id(block): block for block in there.values()}.values())
    taken = [block for block in order if block in wanted]

    written = []

    def write(block):
        if block in written:
            return
        for x in sorted(block.needs_first() & there.keys() - defined(block.node)):
            write(there[x])
        written.append(block)

    for block in [*own, *taken]:
        write(block)
    body = "".join(gap(*pair) + pair[1].text + "\n" for pair in zip([own[0], *written], written))
    main = 'if __name__ == "__main__":\n    main(Args, PRESETS, train)\n'
    lines = import_lines({x: imports[x] for x in sorted(used & imports.keys())})
    return f"{docstring}\n\n{lines}{body}\n\n{main}"


def gap(above, block) -> str:
    """The empty lines between two blocks, as ruff has them."""
    if any(isinstance(x.node, ast.ClassDef | ast.FunctionDef) for x in (above, block)):
        return "\n\n"
    return "" if above.last + 1 == block.first else "\n"


def import_lines(imports: dict) -> str:
    plain, members = set(), {}
    for name, (module, member) in imports.items():
        if not member:
            plain.add(f"import {module}" + (f" as {name}" if name != module.split(".")[0] else ""))
        else:
            word = member if member == name else f"{member} as {name}"
            members.setdefault(module, []).append(word)
    lines = plain | {f"from {module} import {', '.join(x)}" for module, x in members.items()}
    own = {x for x in lines if x.split()[1].split(".")[0] in sys.stdlib_module_names}
    key = lambda x: (x.startswith("from"), x.split()[1].lower())
    parts = [sorted(x, key=key) for x in (own, lines - own)]
    return "\n".join(["from __future__ import annotations\n", *parts[0], "", *parts[1]]) + "\n"


if __name__ == "__main__":
    print(alone(*sys.argv[1:2] or ["td3_bc"]), end="")

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
        decorators = getattr(node, "decorator_list", [])
        first = min(x.lineno for x in (node, *decorators)) - 1
        while first and lines[first - 1].startswith("#") and "----" not in lines[first - 1]:
            first -= 1
        self.node, self.text = node, "\n".join(lines[first : node.end_lineno])
        self.first, self.last = first + 1, node.end_lineno  # numbers of its lines in its file
        self.defined = defined(node)
        self.used = {x.id for x in names(node)}

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
    inherited = base.text.splitlines()
    fields, more = [], []
    for x, after in zip(base.node.body[1:], [*base.node.body[2:], None]):
        last = after if isinstance(after, ast.Expr) else x  # the text of a field stands below it
        begin, end = x.lineno - base.first, last.end_lineno - base.first
        part = inherited[begin : end + 1]
        if isinstance(x, ast.Expr) or own & defined(x):
            continue
        if isinstance(x, ast.FunctionDef):
            more += ["", *part]
        else:
            fields += part
    below = []
    if methods:
        below = ["", *lines[methods[0] :]]
        lines = "\n".join(lines[: methods[0]]).rstrip().splitlines()
    args.text = "\n".join([*lines, *fields, *below, *more])
    args.node = ast.parse(args.text).body[0]
    args.used = {x.id for x in names(args.node)}


def alone(name: str) -> str:
    """The text of the file. Raises SystemExit for a name without a file in algorithms/."""
    path = ROOT / "algorithms" / f"{name}.py"
    if not path.is_file():
        known = sorted(x.stem for x in path.parent.glob("*.py"))
        raise SystemExit(f"there is no algorithm {name}: use one of {', '.join(known)}")
    docstring, imports, own = read(path)
    own.pop()  # the guard
    page = []  # what the algorithm may take along
    for part in PARTS:
        _, more, blocks = read(ROOT / f"{part}.py")
        imports |= more
        page += blocks
    clash = set().union(*(x.defined for x in own)) & set().union(*(x.defined for x in page))
    if clash:
        raise SystemExit(f"{name}.py and the page both define {', '.join(sorted(clash))}: rename")
    flags = next(x for x in own if "Args" in x.defined)
    flatten(flags, next(x for x in page if "RunArgs" in x.defined))
    taken = needed(own, page)
    used = set().union(*(x.used for x in (*own, *taken)))
    lines = import_lines({x: imports[x] for x in sorted(used & imports.keys())})
    blocks = ordered([*own, *taken])
    body = ""
    for above, block in zip([own[0], *blocks], blocks):
        body += gap(above, block) + block.text + "\n"
    main = 'if __name__ == "__main__":\n    main(Args, PRESETS, train)\n'
    return f"{docstring}\n\n{lines}{body}\n\n{main}"


def needed(own: list, page: list) -> list:
    """The blocks of the page that the algorithm and `main` use, directly or not."""
    used, size = {"main"}.union(*(x.used for x in own)), 0
    while len(used) > size:
        size = len(used)
        taken = [block for block in page if block.defined & used]
        used = used.union(*(x.used for x in taken))
    return taken


def ordered(blocks: list) -> list:
    """The blocks, each after those which it needs when it is run itself."""
    written = []

    def write(block):
        if block in written:
            return
        needs = block.needs_first()
        for other in blocks:
            if other.defined & needs and not other.defined & block.defined:
                write(other)
        written.append(block)

    for block in blocks:
        write(block)
    return written


def gap(above, block) -> str:
    """The empty lines between two blocks, as ruff has them."""
    if any(isinstance(x.node, ast.ClassDef | ast.FunctionDef) for x in (above, block)):
        return "\n\n"
    return "" if above.last + 1 == block.first else "\n"


def import_lines(imports: dict) -> str:
    plain, members = set(), {}
    for name, (module, member) in imports.items():
        known = member or module.split(".")[0]
        renamed = "" if known == name else f" as {name}"
        if member:
            members.setdefault(module, []).append(member + renamed)
        else:
            plain.add(f"import {module}{renamed}")
    lines = set(plain)
    for module, words in members.items():
        lines.add(f"from {module} import {', '.join(words)}")
    own = {x for x in lines if x.split()[1].split(".")[0] in sys.stdlib_module_names}
    key = lambda x: (x.startswith("from"), x.split()[1].lower())
    parts = [sorted(x, key=key) for x in (own, lines - own)]
    first = "from __future__ import annotations\n"
    return "\n".join([first, *parts[0], "", *parts[1], ""])


if __name__ == "__main__":
    print(alone(*sys.argv[1:2] or ["td3_bc"]), end="")

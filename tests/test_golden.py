"""Losses, gradients and updates of fourteen files equal those of the authors' code, or of CORL's:
our functions in float64 against the numbers of tests/golden/*.json. `python tests/test_golden.py`
prints the table of docs/fidelity.md; it needs the packages of requirements.txt alone.
"""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
sys.path[:0] = [str(ROOT), str(ROOT / "algorithms"), str(ROOT / "tests")]
NAMES = sorted(path.stem for path in GOLDEN.glob("*.json"))


def differences(name):
    """(module, [(label, relative difference), ...]) of one algorithm."""
    from golden import tools

    module = importlib.import_module(f"golden.{name}")
    record = json.loads((GOLDEN / f"{name}.json").read_text())
    found = [
        (label, tools.relative_difference(ours, recorded))
        for label, ours, recorded in module.values(record)
    ]
    return module, found


def pytest_generate_tests(metafunc):
    """One test for each algorithm, without an import of pytest."""
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", NAMES)


def test_equals_the_authors_code(name):
    module, found = differences(name)
    assert len(found) >= 20, "a comparison of next to nothing"
    for label, difference in found:
        assert difference <= module.TOLERANCE, f"{label}: {difference:.2e}"  # NaN is not <= either


def test_the_command_needs_requirements_alone():
    """A package of tests/requirements.txt cannot be imported in the process that is started."""
    lines = (ROOT / "tests" / "requirements.txt").read_text().split()
    absent = [line.split(">=")[0].replace("pytest-xdist", "xdist") for line in lines]
    code = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({absent!r}))
sys.path.insert(0, {str(GOLDEN.parent)!r})
import test_golden
for name in test_golden.NAMES:
    importlib.import_module("golden." + name)
test_golden.NAMES = ["bc"]
test_golden.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("| bc | CORL"), done.stdout


def main():
    print("| method | reference | compared | values | largest relative difference |")
    print("|---|---|---|---|---|")
    for name in NAMES:
        module, found = differences(name)
        found = [x for label, x in found if "input" not in label]  # inputs are equal by the draw
        worst = max(x if math.isfinite(x) else math.inf for x in found)
        print(f"| {name} | {module.REFERENCE} | {module.COMPARED} | {len(found)} | {worst:.1e} |")


if __name__ == "__main__":
    main()

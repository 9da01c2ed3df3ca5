"""Losses, gradients and updates of ten files equal those of the authors' code, or of CORL's: our
functions in float64 against the numbers of tests/golden/*.json. `python tests/test_golden.py`
prints the table of results/README.md.
"""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_authors_code(name):
    module, found = differences(name)
    assert len(found) >= 20, "a comparison of next to nothing"
    for label, difference in found:
        assert difference <= module.TOLERANCE, f"{label}: {difference:.2e}"  # NaN is not <= either


def main():
    print("| method | reference | compared | values | largest relative difference |")
    print("|---|---|---|---|---|")
    for name in NAMES:
        module, found = differences(name)
        worst = max(x if math.isfinite(x) else math.inf for _, x in found)
        print(f"| {name} | {module.REFERENCE} | {module.COMPARED} | {len(found)} | {worst:.1e} |")


if __name__ == "__main__":
    main()

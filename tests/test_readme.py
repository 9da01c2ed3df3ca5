"""The README's own words, run: a table becomes a dataset, a run, a policy that only needs torch."""

import ast
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from figures import results as pictures
from tools import store

ROOT = Path(__file__).resolve().parents[1]
README, USE = ((ROOT / page).read_text() for page in ("README.md", "docs/use.md"))
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def block(start, page=README):
    """The indented block of a page that starts with this line."""
    lines = page[page.index(f"    {start}") :].splitlines()
    end = next(i for i, line in enumerate(lines) if line and not line.startswith("    "))
    return "\n".join(line[4:] for line in lines[:end])


def call(*words, cwd):
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_own_data_end_to_end(tmp_path):
    rng = np.random.default_rng(0)
    rows = [(e, t, *rng.normal(size=2), rng.uniform(-2, 2), rng.normal(), e % 2 and t == 9)
            for e in range(6) for t in range(10)]  # fmt: skip
    head = "episode,t,x,v,u,reward,failed"
    np.savetxt(tmp_path / "log.csv", rows, delimiter=",", header=head, comments="")
    file, *flags = block("python tools/from_csv.py").splitlines()[0].split()[1:]
    call(ROOT / file, *flags, cwd=tmp_path)
    with np.load(tmp_path / "logs.npz") as saved:
        assert saved["terminals"].sum() == 3 == saved["timeouts"].sum()
        assert saved["observations"].shape == (60, 2) and saved["actions"].shape == (60, 1)
    line = "--env logs.npz --steps 5 --batch-size 8 --device cpu".split()
    call(ROOT / "algorithms" / "iql.py", *line, cwd=tmp_path)
    flags = "runs/logs__iql__0 --fqe-steps 3 --export policy.pt2".split()
    call(ROOT / "tools" / "evaluate.py", *flags, cwd=tmp_path)
    code = block("import torch  ", USE)
    call("-c", code + "\nassert action.shape == (1, 1) and action.abs() <= 2", cwd=tmp_path)
    path = f"import sys, torch; sys.path.insert(0, {str(ROOT)!r})\n"
    check = "\nassert torch.equal(q, run.nets.q(*run.inputs(obs, action))) and q.shape == (2, 5)"
    call("-c", path + block("from tools.evaluate import load_run", USE) + check, cwd=tmp_path)


def test_two_files_alone_train(tmp_path):
    """The stand-in for a run of docs/use.md, in a folder with two files of the repository."""
    shutil.copy(ROOT / "common.py", tmp_path)
    shutil.copy(ROOT / "algorithms" / "fisher_brc.py", tmp_path)
    code = block("import torch\n    from common import Data", USE)
    stand_in = code[code.index("class PlainRun") : code.index("obs, action =")]
    assert len(stand_in.strip().splitlines()) <= 15
    (tmp_path / "mine.py").write_text(code)
    assert call("mine.py", cwd=tmp_path).startswith("tensor([[")


def test_the_worked_diff_makes_an_algorithm(tmp_path):
    """CONTRIBUTING.md's diff applies to awac.py as it is; its loss is CRR's; the file runs."""
    diff = re.search(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)[1]
    assert len(diff.splitlines()) <= 40
    (tmp_path / "algorithms").mkdir()
    shutil.copy(ROOT / "algorithms" / "awac.py", tmp_path / "algorithms" / "crr.py")
    shutil.copy(ROOT / "common.py", tmp_path)
    shutil.copy(ROOT / "run.py", tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    (tmp_path / "crr.diff").write_text(diff)
    patch = ["git", "apply", "--unidiff-zero", "crr.diff"]
    subprocess.run(patch, check=True, cwd=tmp_path, env=os.environ | {"GIT_DIR": "none"})
    by_hand = (2.0 + 2 * 0.5 * math.log(2 * math.pi)) / 3
    code = f"""
import torch, crr
pi, a = (torch.zeros(3, 1), torch.zeros(1)), torch.tensor([[0.0], [1.0], [2.0]])
loss, _ = crr.awr_loss(pi, a, torch.tensor([1.0, -1.0, 5.0]), None)
assert abs(loss.item() - {by_hand}) < 1e-6
"""
    (tmp_path / "algorithms" / "check.py").write_text(code)
    call("algorithms/check.py", cwd=tmp_path)
    line = "--steps 4 --batch-size 8 --device cpu --eval-env none".split()
    call("algorithms/crr.py", *line, cwd=tmp_path)
    assert len([*(tmp_path / "runs").glob("*__crr__0/summary.json")]) == 1


def test_contributings_check_tests_a_new_file(tmp_path, request):
    """Step 3 to the letter, for a copy of awac.py that git does not know; the tests themselves run
    with --soak."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    diff = re.search(r"```diff\n(.*?)```", page, re.S)[1]
    step = re.search(r"^3\. `python (-m pytest .*) -k NAME`", page, re.M)[1].split()
    clone = tmp_path / "clone"
    out = ("data", "results", "runs", ".git", "__pycache__", ".venv")
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(*out))
    (clone / "data").symlink_to(ROOT / "data")
    for line in ("init -q", "add ."):
        subprocess.run(["git", *line.split()], check=True, cwd=clone)
    shutil.copy(clone / "algorithms" / "awac.py", clone / "algorithms" / "crr.py")
    patch = ["git", "apply", "--unidiff-zero", "-"]
    subprocess.run(patch, input=diff.encode(), check=True, cwd=clone)
    soak = request.config.getoption("--soak")
    brief = () if soak else ("-n", "0", "--collect-only")
    said = call(*step, "-k", "crr", *brief, cwd=clone)
    assert int(re.search(r"(\d+)(/\d+ tests collected| passed)", said)[1]) > 20, said


def test_every_file_of_a_page_exists():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for path in re.findall(r"\]\(([\w/.]+)\)", page.read_text()):
            assert (page.parent / path).exists(), (page.name, path)
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files", "algorithms"], capture_output=True)
    for path in tracked.stdout.decode().split():
        assert path in README, path


def test_the_scores_are_those_of_the_runs():
    """Every table, computed from results/; the README has columns of the first one."""
    tables = pictures.tables(pictures.read_cells(str(ROOT / "results")), ROOT / "results")
    pages = "".join((ROOT / "docs" / f"{x}.md").read_text() for x in ("results", "claims", "peers"))
    for heading, table in tables.items():
        assert f"\n\n{table}\n\n" in pages, f"python figures/results.py has another: {heading}"
    shortened = pictures.ogbench(str(ROOT / "results"))
    assert f"\n\n{shortened}\n\n" in (ROOT / "docs" / "ogbench.md").read_text()


def test_the_tests_of_the_pages_are_those_of_the_runs():
    """A difference that a page gives with p has the p of Welch's test on results/."""
    cells = pictures.read_cells(str(ROOT / "results"))
    pages = "".join((ROOT / "docs" / f"{x}.md").read_text() for x in ("results", "claims", "peers"))
    pages, checked = " ".join(pages.split()), 0
    for row in pictures.tests(cells).splitlines()[2:]:
        *_, difference, p = row.strip("| ").split(" | ")
        said = (
            rf"{re.escape(difference[1:])}(?: \||[,;]) (?:Welch's t-test, )?(?:p )?([<=] )?(0\.\d+)"
        )
        for sign, value in re.findall(said, pages):
            assert value == p.split()[1] and sign in ("", p[:2]), row
            checked += 1
    assert checked > 20
    by_hand = pictures.welch([1.0, 2.0, 3.0], [4.0, 6.0, 8.0])
    assert by_hand == {"difference": "+4.0 ± 1.3", "p": "= 0.05"}  # t = 4 / sqrt(5 / 3), 2.94 df


def test_the_published_rows_are_those_of_the_runs():
    """The mean of the last ten evaluations, and the last one, of every seed that is stored."""
    env, page = "halfcheetah-random-v2-made", (ROOT / "docs" / "published.md").read_text()
    cells = pictures.read_cells(str(ROOT / "results"), env)
    for method, title in {"td3_bc": "TD3+BC", "iql": "IQL", "bc": "BC",
                          "rebrac": "ReBRAC, 200,000 steps"}.items():
        runs = cells[env, method]
        lasts = [curve.score.iloc[-1] for curve in runs.curve]
        row = [", ".join(f"{x:.1f}" for x in column) for column in (runs.score, lasts)]
        assert f"| {title} | {' | '.join(row)} |" in page


def test_the_verdict_on_td3_bc_is_welchs():
    """Five seeds of ours, and five that have the mean and the deviation that the paper prints."""
    env = "halfcheetah-random-v2-made"
    ours = pictures.read_cells(str(ROOT / "results"), env)[env, "td3_bc"].score
    paper = 11.0 + 1.1 * scipy.stats.zscore(np.arange(5), ddof=1)
    test = scipy.stats.ttest_ind(ours, paper, equal_var=False)
    low, high = test.confidence_interval(0.95)
    assert len(ours) == 5 and max(-low, high) < 1.7
    said = f"{ours.mean():.1f} ± {ours.std():.1f}"
    page = " ".join((ROOT / "docs" / "published.md").read_text().split())
    assert said in page and said in README
    gap = ours.mean() - 11.0
    assert f"difference is {gap:.1f}, with a 95% interval from {low:.1f} to {high:.1f}" in page


@pytest.mark.parametrize(
    "one, other, end", [("iql", "iql_authors", 40), ("td3_bc", "corl_td3_bc", 35)]
)
def test_fresh_seeds_beside_other_peoples_programs(one, other, end):
    """Seeds from 20 on of both programs: what docs/peers.md says of them."""
    env = "hopper-replay-demo"
    cells = pictures.read_cells(str(pictures.FRESH))
    ours, theirs = (cells[env, method].sort_values("seed") for method in (one, other))
    assert [*ours.seed] == [*theirs.seed] == [*range(20, end)]
    test = scipy.stats.ttest_ind(theirs.score, ours.score, equal_var=False)
    low, high = test.confidence_interval(0.95)
    said = [f"{x.score.mean():.1f} ± {x.score.sem():.1f}" for x in (ours, theirs)]
    said.append(f"a 95% interval from {low:.1f} to {high:.1f}")
    page = " ".join((ROOT / "docs" / "peers.md").read_text().split())
    assert all(words in page for words in said), said


@pytest.mark.parametrize(
    "other, ours, until",
    [
        ("corl_td3_bc", "td3_bc", 1_000_000),
        ("iql_authors", "iql", 150_000),
    ],
)
def test_the_first_steps_of_other_peoples_programs(other, ours, until):
    """Means of ten evaluations beside those of our seeds at equal steps, in docs/published.md."""
    cells = [f"{until:,}"]
    for folder, method in ((pictures.FRESH, other), (ROOT / "results", ours)):
        _, rows, _ = store.stored(folder)
        rows = rows.query("dataset == 'halfcheetah-random-v2-made' and method == @method")
        rows = rows[rows.step.astype(int).between(until - 45_000, until)]
        means = rows.score.astype(float).groupby(rows.seed).mean()
        cells.append(", ".join(f"{x:.1f}" for x in means))
    assert f"| {' | '.join(cells)} |" in (ROOT / "docs" / "published.md").read_text()


def test_the_readme_and_the_docs_are_short():
    """Words of the README do not count code and the bars of tables."""
    prose = [line for line in README.splitlines() if not line.startswith("    ")]
    words = [word for line in prose for word in line.split() if re.search(r"\w", word)]
    assert len(README.splitlines()) <= 110 and len(words) <= 1_000
    assert sum(len(page.read_text().split()) for page in (ROOT / "docs").glob("*.md")) <= 12_000


def test_the_readme_counts_right():
    """Lines of each file, to 5%, and all numbers in the table of docs/fidelity.md."""
    for file, lines in re.findall(r"\(algorithms/(\w+\.py)\) \| (\d+) \|", README):
        found = len((ROOT / "algorithms" / file).read_text().splitlines())
        assert int(lines) == pytest.approx(found, rel=0.05), file
    fidelity = (ROOT / "docs" / "fidelity.md").read_text()
    values = sum(map(int, re.findall(r"\| (\d+) \| [\d.e-]+ \|$", fidelity, re.MULTILINE)))
    said = f"{values:,} numbers"
    assert said in README and said in fidelity


def test_the_runs_name_no_folder_of_a_machine():
    """Anyone can type the command that a run's config.json has."""
    for line in (ROOT / "results/runs.jsonl").read_text().splitlines():
        assert not re.search(r'[" =]/\w', line), line[:200]


def test_a_docstring_ends_with_the_score_of_the_runs():
    cells = pictures.read_cells(str(ROOT / "results"))
    on_it = {method.partition("-")[0] for env, method in cells if env == pictures.MIXTURE}
    for algorithm in on_it - {*pictures.PEERS}:
        text = (ROOT / "algorithms" / f"{algorithm}.py").read_text()
        last = ast.get_docstring(ast.parse(text)).splitlines()[-1]
        assert last == pictures.command(cells, algorithm)


def test_every_command_names_known_flags():
    """`python FILE.py ... --flag`: the file exists, and its Args or RunArgs know the flag."""
    commands = re.findall(r"python ((?:algorithms|tools)/\w+\.py)([^#`|;\n]*)", README + USE)
    assert len(commands) > 15
    common = (ROOT / "common.py").read_text()
    for file, rest in commands:
        text = (ROOT / file).read_text() + common
        for flag in re.findall(r"--([\w-]+)", rest):
            name = flag.removeprefix("no-").replace("-", "_")
            assert name == "help" or re.search(rf"^    {name}: ", text, re.M), (file, flag)


def test_the_readmes_equation_is_the_code():
    text = (ROOT / "algorithms" / "iql.py").read_text()
    assert block("def value_loss(nets, s, q, args):").rstrip() in text


def test_bundled_data_is_what_its_page_says():
    page = (ROOT / "data" / "README.md").read_text()
    for path in (ROOT / "data").glob("*.npz"):
        with np.load(path) as data:
            count = len(data["rewards"])
            ends = int((data["terminals"] | data["timeouts"]).sum())
            at_bound = np.mean(np.abs(data["actions"]) > 0.999)
        assert f"| `{path.name}` | {count:,} | {ends:,} |" in page, path.name
        assert at_bound < 0.01, path.name
    assert torch.get_num_threads() == 1

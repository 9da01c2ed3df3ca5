"""benchmark.sh: its commands are understood; runs stop, continue, fail and are reported."""

import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tyro
from short_runs import SCRIPTS

from peers import train
from run import parse
from tools import report

ROOT = Path(__file__).resolve().parents[1]
PAPERS = ["fisher_brc_table1", "brac_plus_table1", "arq_table2", "itrpo_table2", "itrpo_table3"]
PAPERS += ["modern", "ogbench"]
TABLES = [*PAPERS, "ablations", "local"]
SIGNALS = (
    "import os, signal, sys; "
    "[signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGHUP)]; "
    "os.execvp(sys.argv[1], sys.argv[1:])"
)
LOCAL = 16  # runs per dataset and seed
SEEDS = 5, 3, 3  # of the datasets of local
DEMOS = ["hopper-replay-demo", "pointmaze-stitch-demo", "hopper-medium-expert-demo"]
VARIABLES = ("SEEDS", "DATA", "JOBS", "OUT", "FLAGS", "SBATCH_FLAGS", "OMP_NUM_THREADS")


def environment(**more):
    """The variables of a shell, with this Python's folder on the path."""
    clean = {k: v for k, v in os.environ.items() if k not in VARIABLES and "SLURM" not in k}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return clean | {"PATH": path} | more


def bash(*args, **env):
    command = ["bash", str(ROOT / "benchmark.sh"), *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**env))


def commands(table, **env):
    listed = bash(table, "--print", **({"SEEDS": "0"} | env))
    assert listed.returncode == 0, listed.stderr
    return [shlex.split(line) for line in listed.stdout.splitlines()]


def parsed(command):
    """(module, args) of a command line as its script reads it."""
    python, path, *line = command
    assert python == "python" and (ROOT / path).exists()
    module = importlib.import_module(Path(path).stem)
    return module, parse(module.Args, module.PRESETS, line)[0]


# ---- commands --------------------------------------------------------------------------------


@pytest.mark.parametrize("table", TABLES)
def test_every_command_is_understood(table):
    """No two runs share a folder or are the same run under two names, and the runs are those that
    report.py looks for."""
    folders, settings, runs = set(), set(), set()
    listed = commands(table)
    for command in listed:
        module, args = parsed(command)
        assert args.resume and args.out == "runs"
        run = module.__name__ + (f"-{args.name}" if args.name else "")
        folders.add((args.env, run, args.seed))
        runs.add((args.env, run))
        settings.add(repr([module.__name__, sorted((vars(args) | {"name": ""}).items(), key=str)]))
    assert len(folders) == len(listed) > 20 and len(settings) == len(listed)
    if table in PAPERS:
        rows = report.paper_table(table)[0].to_dict("records")
        wanted = {(r["dataset"], r["run"].partition(":")[0]) for r in rows if r["run"]}
        wanted = {(e, r) for e, r in wanted if not e.endswith(("total", "average"))}
        wanted = {(e, r) for e, r in wanted if not e.startswith("robomimic")}
        assert wanted <= runs and {e for e, _ in runs} == {e for e, _ in wanted}


def test_corl_runs_beside_ours():
    """The commands of the table corl are understood by peers/train.py."""
    listed = commands("corl", CORL="the checkout", FLAGS="--precision high --compile")
    program, known = train.PROGRAMS["corl_td3_bc"], set()
    for command in listed:
        assert command[1] == "peers/train.py"
        args, words = tyro.cli(train.Args, args=command[2:], return_unknown_args=True)
        assert (args.program, args.checkout) == ("corl_td3_bc", "the checkout")
        ours, _ = train.settings(program, words)
        assert (ours.out, ours.precision) == ("runs", "high")
        known.add((ours.env, ours.seed))
    wanted = [
        args for module, args in map(parsed, commands("local")) if module.__name__ == "td3_bc"
    ]
    assert known == {(args.env, args.seed) for args in wanted}


def test_local_runs_every_file_on_every_bundled_dataset():
    listed = [parsed(command) for command in commands("local")]
    assert {args.env for _, args in listed} == {*DEMOS}
    assert {module.__name__ for module, _ in listed} == {path.stem for path in SCRIPTS}
    assert len(listed) == LOCAL * len(DEMOS)
    assert sum(args.name == "top10" and args.top == 0.1 for _, args in listed) == len(DEMOS)


def changed(args, base) -> dict:
    """Flags that differ, but for the name."""
    return {k: v for k, v in vars(args).items() if v != vars(base)[k] and k != "name"}


def test_ablations_are_those_of_the_papers():
    listed = [(module.__name__, args) for module, args in map(parsed, commands("ablations"))]
    fisher = [args for name, args in listed if name == "fisher_brc"]
    assert {args.lam for args in fisher if args.offset} == {0, 0.1, 1}
    assert {args.lam for args in fisher if not args.offset} == {0.1, 1}
    itrpo = [args for name, args in listed if name == "itrpo"]
    plain = {args.env: args for args in itrpo if not args.name}
    table = {row["dataset"] for row in report.paper_table("itrpo_table2")[0].to_dict("records")}
    assert plain.keys() == {env for env in table if "average" not in env}
    assert plain.keys() == {args.env for args in itrpo if args.name == "tau0"}
    flags = {args.name: [*changed(args, plain[args.env])] for args in itrpo}
    assert flags["no-bonus"] == ["bonus"] and flags["no-penalty"] == ["lam"]
    assert flags["no-clip"] == ["ratio_min"] and "control0" not in flags


def test_no_preset_of_d4rl_reaches_ogbench():
    """antmaze-* has a D4RL maze's rewards, discount and evaluations in iql.py and rebrac.py."""
    for module, args in map(parsed, commands("ogbench")):
        assert (args.steps, args.batch_size) == (1_000_000, 256)
        assert (args.eval_every, args.eval_episodes) == (100_000, 50)
        assert getattr(args, "reward_shift", 0) == 0 and getattr(args, "reward_scale", 1) == 1
        far = re.match("antmaze-giant|humanoidmaze|antsoccer", args.env)
        gamma = getattr(args, "gamma", None)
        assert gamma in (None, 0.995 if far else 0.99), (module.__name__, args.env)


def test_usage():
    for args, words in (((), ""), (("nine",), "no table nine"), (("local", "--prnt"), "--prnt is")):
        found = bash(*args)
        assert found.returncode == 2 and words in found.stderr
    text = bash().stdout
    assert all(f"\n  ./benchmark.sh TABLE{x}" in text for x in ("  ", " --print")), text
    assert "fisher_brc_table1" in text and "set -" not in text


# ---- runs by a stand-in for python -----------------------------------------------------------

PYTHON = """#!{python} -IS
# Stands for python: a run writes its words, waits for the file "go" or a signal, counts its
# signals, saves for half a second, and ends with a summary.
import json, os, signal, sys, time
words, state = sys.argv[1:], os.environ["STATE"]
flag = dict(zip(words, words[1:]))
file = words[0].split("/")[1].removesuffix(".py")
file += "-" + flag["--name"] if "--name" in flag else ""
name = "__".join([flag["--env"], file, flag["--seed"]])
path = state + "/" + name
json.dump([words, os.environ["OMP_NUM_THREADS"], os.getpid()], open(path + ".part", "w"))
signals = []
def note(number, _):
    signals.append(number)
    json.dump(signals, open(path + ".signals", "w"))
    if len(signals) > 1:
        os._exit(130)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, note)
os.rename(path + ".part", path + ".started")
while not os.path.exists(state + "/go") and not signals:
    time.sleep(0.01)
if os.environ.get("FAILS", "none") in words[0]:
    sys.exit("a line before\\nit failed")
if signals:
    end = time.time() + float(os.environ.get("SAVES", 0.5))
    while time.time() < end:
        time.sleep(0.01)
    open(path + ".saved", "w").close()
    print("stopped, saved at step 3")
    sys.exit(130)
os.makedirs(flag["--out"] + "/" + name, exist_ok=True)
if os.environ.get("FORGETS", "none") not in words[0]:
    open(flag["--out"] + "/" + name + "/summary.json", "w").close()
print("score 12.3")
"""


class Place:
    """A folder with a stand-in for python; starts benchmark.sh there."""

    def __init__(self, path):
        self.path, self.out, self.script = path, path / "out", None
        (path / "bin").mkdir()
        self.program("python", PYTHON.replace("{python}", sys.executable))

    def program(self, name, text):
        (self.path / "bin" / name).write_text(text)
        (self.path / "bin" / name).chmod(0o755)

    def env(self, **more):
        path = f"{self.path / 'bin'}:{os.environ['PATH']}"
        own = {"PATH": path, "STATE": str(self.path), "OUT": str(self.out), "SEEDS": "0"}
        return environment(**(own | {"DATA": "hopper-replay-demo"} | more))

    def bash(self, *args, **env):
        """benchmark.sh from its start to its end."""
        command = ["bash", str(ROOT / "benchmark.sh"), *args]
        return subprocess.run(
            command, capture_output=True, text=True, env=self.env(**env), timeout=60
        )

    def start(self, *args, runs, **env):
        """benchmark.sh as a terminal starts it, in a process group of its own where Ctrl-C is not
        ignored, until so many runs have started."""
        command = [sys.executable, "-c", SIGNALS, "bash", str(ROOT / "benchmark.sh"), *args]
        with open(self.path / "said", "w") as said:
            self.script = subprocess.Popen(
                command, stdout=said, stderr=said, env=self.env(**env), start_new_session=True
            )
        self.wait_for("*.started", runs)
        return self.script

    def said(self):
        return (self.path / "said").read_text()

    def found(self, pattern):
        return [*self.path.glob(pattern)]

    def wait_for(self, pattern, count):
        end = time.time() + 30
        while len(self.found(pattern)) < count:
            assert time.time() < end, (pattern, self.said())
            time.sleep(0.02)

    def read(self, pattern):
        return [json.loads(path.read_text()) for path in self.found(pattern)]

    def go(self):
        (self.path / "go").touch()


@pytest.fixture
def place(tmp_path):
    place = Place(tmp_path)
    yield place
    place.go()  # what a failed test left behind ends by itself
    if place.script:
        place.script.terminate()
        place.script.wait(30)


def test_progress_logs_and_threads(place):
    place.go()
    found = place.bash("local", JOBS="3")
    assert (found.returncode, found.stderr) == (0, "")
    first, *lines = found.stdout.splitlines()
    assert first == f"{LOCAL} runs, 3 at a time; their output is in {place.out}/logs"
    for i, line in enumerate(lines):
        assert line.startswith(f"{i + 1} of {LOCAL}: finished: hopper-replay-demo__")
    assert any(line.endswith("hopper-replay-demo__bc-top10__0: score 12.3") for line in lines)
    assert len([*(place.out / "logs").glob("*.log")]) == LOCAL
    threads = str(max(1, os.cpu_count() // 3))
    assert {found for _, found, _ in place.read("*.started")} == {threads}


def test_killed_and_failed_runs_end_no_other_and_are_listed(place):
    """A run that the system kills, one that fails, and one that ends without its summary."""
    script = place.start("local", runs=2, JOBS="2", FAILS="iql", FORGETS="cql")
    killed = place.found("*.started")[0]
    os.kill(json.loads(killed.read_text())[2], signal.SIGKILL)
    place.wait_for("*.started", 3)
    place.go()
    assert script.wait(60) == 1
    lines = place.said().splitlines()
    assert len(place.found("*.started")) == LOCAL, "all were started"
    assert sum("finished: " in line for line in lines) == LOCAL - 2
    assert any(f"FAILED (137): {killed.stem}: " in line for line in lines)
    assert any("FAILED (1): hopper-replay-demo__iql__0: it failed" in line for line in lines)
    listed = lines[lines.index("runs without a summary:") + 1 :]
    assert len(listed) == 3 and any(line.startswith("python algorithms/cql.py") for line in listed)
    again = place.bash("local")
    assert again.returncode == 0 and "without" not in again.stdout, "repeated, the list is empty"
    refused = place.bash("local", FAILS="iql")  # by the file itself: finished, with other flags
    assert refused.returncode == 1 and "FAILED (1): hopper-replay-demo__iql__0" in refused.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("everywhere", [True, False])
def test_a_signal_returns_after_the_runs_have_saved(place, number, everywhere):
    """To the whole group, as a terminal sends it, or to the script alone; a run hears it once."""
    script = place.start("local", runs=2, JOBS="2")
    (os.killpg if everywhere else os.kill)(script.pid, number)
    assert script.wait(30) == 130
    assert len(place.found("*.saved")) == 2, "the prompt came first"
    assert [len(signals) for signals in place.read("*.signals")] == [1, 1]
    assert place.said().count("stopped: hopper-") == 2 and "saved at step 3" in place.said()
    time.sleep(0.2)
    assert len(place.found("*.started")) == 2, "another run was started"
    place.go()
    assert place.bash("local").returncode == 0, "the same command continues"


def test_slurm_submits_one_array(place):
    """A stand-in for sbatch records what it is given; a task is one process, its line's run."""
    place.program("sbatch", '#!/bin/sh\nprintf "%s\\0" "$@" > "$STATE/submitted"\n')
    place.out = place.path / "a b"
    flags = "--gres=gpu:1 --no-requeue"
    found = place.bash("local", "--slurm", SBATCH_FLAGS=flags, JOBS="3", FLAGS="--eval-env 'A  B'")
    assert found.returncode == 0, found.stderr
    given = (place.path / "submitted").read_text().split("\0")[:-1]
    assert given[:3] == ["--requeue", "--open-mode=append", "--signal=B:TERM@120"]
    assert given[3:5] == flags.split(), "the last word is the user's"
    assert given[given.index("--array") + 1] == f"1-{LOCAL}%3"
    (one,) = (place.out / "logs").glob("local-*.txt")
    place.go()
    task = dict(SLURM_ARRAY_TASK_ID="2", SLURM_CPUS_PER_TASK="4", OMP_NUM_THREADS="64")
    subprocess.run(["sh", "-c", given[-1]], cwd=ROOT, env=place.env(**task), check=True)
    ((words, threads, _),) = place.read("*.started")
    assert ["python", *words] == shlex.split(one.read_text().splitlines()[1]) and threads == "4"
    assert words[-2:] == ["--eval-env", "A  B"] and len([*place.out.glob("*/summary.json")]) == 1
    place.bash("local", "--slurm", SEEDS="1")
    assert len([*(place.out / "logs").glob("local-*.txt")]) == 2, "a pending job keeps its list"

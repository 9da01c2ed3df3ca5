"""benchmark.sh: its commands are understood; runs stop, continue, fail and are reported."""

import csv
import fnmatch
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

import h5py
import numpy as np
import pytest
from short_runs import SCRIPTS

from harness import main, parse
from harness.tasks import table as data_table
from tools import corl, report

ROOT = Path(__file__).resolve().parents[1]
PAPERS = ["fisher_brc_table1", "brac_plus_table1", "arq_table2", "itrpo_table2", "itrpo_table3"]
PAPERS += ["modern", "ogbench"]
TABLES = [*PAPERS, "ablations", "local"]
SIGNALS = (
    "import os, signal, sys; "
    "[signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGHUP)]; "
    "os.execvp(sys.argv[1], sys.argv[1:])"
)
LOCAL = 15  # runs per dataset and seed
VARIABLES = ("SEEDS", "DATA", "JOBS", "OUT", "FLAGS", "SBATCH_FLAGS", "OMP_NUM_THREADS")


def environment(**more):
    """The variables of a shell, with this Python's folder on the path."""
    clean = {k: v for k, v in os.environ.items() if k not in VARIABLES and "SLURM" not in k}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return clean | {"PATH": path, "FLAGS": "--precision highest"} | more


def bash(*args, **env):
    command = ["bash", str(ROOT / "benchmark.sh"), *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**env))


def commands(table, **env):
    listed = bash(table, "--print", **({"SEEDS": "0"} | env))
    assert listed.returncode == 0, listed.stderr
    return [shlex.split(line) for line in listed.stdout.splitlines()]


def bash_function(name, *args):
    """What one of the script's functions prints."""
    text = (ROOT / "benchmark.sh").read_text()
    start = text.index(f"{name}() {{")
    code = text[start : text.index("\n}\n", start) + 3] + f'{name} "$@"'
    return subprocess.run(
        ["bash", "-c", code, name, *args], capture_output=True, text=True
    ).stdout.strip()


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
        assert args.resume and args.out == "runs" and args.precision == "highest"
        run = module.__name__ + (f"-{args.name}" if args.name else "")
        folders.add((args.env, run, args.seed))
        runs.add((args.env, run))
        settings.add(repr([module.__name__, sorted((vars(args) | {"name": ""}).items(), key=str)]))
    assert len(folders) == len(listed) > 20 and len(settings) == len(listed)
    if table in PAPERS:
        rows = report.paper_rows(table)[0]
        wanted = {(r["dataset"], r["run"].partition(":")[0]) for r in rows if r["run"]}
        wanted = {(e, r) for e, r in wanted if not e.endswith(("total", "average"))}
        wanted = {(e, r) for e, r in wanted if not e.startswith("robomimic")}
        assert wanted <= runs and {e for e, _ in runs} == {e for e, _ in wanted}


def test_corl_runs_beside_our_two_files():
    """The commands of the table corl are understood by tools/corl.py, and so are their folders."""
    listed = commands(
        "corl", SEEDS="0 1", CORL="the checkout", FLAGS="--precision highest --compile"
    )
    runs = [parse(corl.Args, {}, command[2:])[0] for command in listed]
    assert {command[1] for command in listed} == {"tools/corl.py"}
    assert {run.corl for run in runs} == {"the checkout"} and {run.out for run in runs} == {"runs"}
    assert {run.precision for run in runs} == {"highest"}
    local = [parsed(command)[1].env for command in commands("local")]
    wanted = {(e, a, s) for e in local for a in ("td3_bc", "iql") for s in (0, 1)}
    assert len(runs) == 12 and {(run.env, run.algorithm, run.seed) for run in runs} == wanted
    line = shlex.join(listed[0])
    name = bash_function("run_name", line)
    assert name == "hopper-medium-expert-demo__corl_td3_bc__0"


def test_local_runs_every_file_on_every_bundled_dataset():
    listed = [parsed(command) for command in commands("local")]
    bundled = {path.stem for path in (ROOT / "data").glob("*.npz")}
    assert {args.env for _, args in listed} == bundled
    assert {module.__name__ for module, _ in listed} == {path.stem for path in SCRIPTS}
    assert len(listed) == LOCAL * len(bundled)
    assert sum(args.name == "top10" and args.top == 0.1 for _, args in listed) == len(bundled)


def test_local_ablations_change_one_flag_of_a_run_of_local():
    local = {(args.env, module.__name__): args for module, args in map(parsed, commands("local"))}
    found = {}
    for module, args in map(parsed, commands("local_ablations")):
        whole = vars(local[args.env, module.__name__])
        flags = {k: v for k, v in vars(args).items() if v != whole[k] and k not in ("name", "seed")}
        found.setdefault(module.__name__, (flags, []))[-1].append(args.seed)
    assert found == {
        "fisher_brc": ({"offset": False}, [0]),
        "brac": ({"alpha": 0.0}, [0]),
        "itrpo": ({"shape_coef": 0.0}, [0]),
    }


def test_ablations_are_those_of_the_papers():
    listed = [(module.__name__, args) for module, args in map(parsed, commands("ablations"))]
    names = {name: {args.name for other, args in listed if other == name} for name, _ in listed}
    assert "control0" not in names["itrpo"]
    assert {"no-bonus", "no-penalty", "no-clip", "tau0", ""} <= names["itrpo"]
    shaped = {args.env for name, args in listed if name == "itrpo" and args.name == ""}
    plain = {args.env for name, args in listed if name == "itrpo" and args.name == "tau0"}
    table = {row["dataset"] for row in report.paper_rows("itrpo_table2")[0]}
    assert shaped == plain == {env for env in table if "average" not in env} and len(plain) == 15
    fisher = [args for name, args in listed if name == "fisher_brc"]
    assert {args.lam for args in fisher if args.offset} == {0, 0.1, 1}
    assert {args.lam for args in fisher if not args.offset} == {0.1, 1}
    assert any("expert" in args.env for args in fisher)
    for name, changed in (("no-bonus", "bonus"), ("no-penalty", "penalty"), ("no-clip", "ratio_m")):
        (found,) = {
            tuple(k for k, v in vars(args).items() if v != vars(same)[k] and k != "name")
            for other, args in listed
            if other == "itrpo" and args.name == name
            for other, same in listed
            if other == "itrpo" and not same.name and same.env == args.env
        }
        assert len(found) == 1 and found[0].startswith(changed)


def test_no_preset_of_d4rl_reaches_ogbench():
    """antmaze-* has a D4RL maze's rewards, discount and evaluations in iql.py and rebrac.py."""
    for module, args in map(parsed, commands("ogbench")):
        assert (args.steps, args.batch_size) == (1_000_000, 256)
        assert (args.eval_every, args.eval_episodes) == (100_000, 50)
        assert getattr(args, "reward_shift", 0) == 0 and getattr(args, "reward_scale", 1) == 1
        far = re.match("antmaze-giant|humanoidmaze|antsoccer", args.env)
        assert args.gamma == (0.995 if far else 0.99), (module.__name__, args.env)


def test_seeds_flags_and_folder():
    flags = "--compile --device cuda --precision=high --eval-env 'My Env'"
    for out in ("elsewhere", "a b", "it's $HOME; `x`", "ä"):
        listed = commands("local", SEEDS="7 8", FLAGS=flags, OUT=out, DATA="hopper-replay-demo")
        assert len(listed) == 2 * LOCAL
        for seed, command in zip((7, 8), listed):
            _, args = parsed(command)
            assert (args.seed, args.compile, args.device, args.out) == (seed, True, "cuda", out)
            assert (args.env, args.eval_env) == ("hopper-replay-demo", "My Env")


def test_flags_are_no_pattern_of_file_names():
    for command in commands("local", FLAGS="--precision highest --eval-env *"):
        assert command[-2:] == ["--eval-env", "*"]


def test_default_seeds():
    for table, seeds in (("local", 3), ("modern", 5), ("ogbench", 8)):
        listed = bash(table, "--print").stdout.splitlines()
        assert len(listed) == seeds * len(commands(table))


def test_bad_input():
    for args, words in (((), ""), (("nine",), "no table nine"), (("local", "--prnt"), "--prnt is")):
        found = bash(*args)
        assert found.returncode == 2 and words in found.stderr
    assert "fisher_brc_table1" in bash().stdout
    assert "set -" not in bash().stdout and "./benchmark.sh TABLE --print" in bash().stdout


# ---- runs by a stand-in for python -----------------------------------------------------------

PYTHON = """#!{python} -IS
# Stands for python. A run is a folder in the working directory's "state": it starts, waits for the
# file "go", counts its signals, saves for half a second, and continues where it was.
import os, shlex, signal, sys, time
words, state = sys.argv[1:], os.environ["STATE"]
if words[0] == "-c":
    open(state + "/choices", "a").write(".")
    print("a warning\\n" + os.environ.get("CHOICE", "medium"), "cpu-test")
    sys.exit()
flag = dict(zip(words, words[1:]))
name = "-".join([flag["--env"], words[0].split("/")[1], flag.get("--name", ""), flag["--seed"]])
path = state + "/" + name
open(path + ".commands", "a").write(shlex.join(words) + "\\n")
open(path + ".threads", "w").write(os.environ.get("OMP_NUM_THREADS", "unset"))
if os.environ.get("FAILS", "none") in words[0]:
    sys.exit("a line before\\nit failed")
signals = []
def note(number, _):
    signals.append(number)
    open(path + ".signals", "w").write(repr(signals))
    if len(signals) > 1:
        print("left at once")
        os._exit(130)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, note)
open(path + ".started", "w").close()
while not os.path.exists(state + "/go") and not signals:
    time.sleep(0.01)
if signals:
    end = time.time() + float(os.environ.get("SAVES", 0.5))
    while time.time() < end:
        time.sleep(0.01)
    open(path + ".saved", "w").close()
    print("stopped, saved at step 3")
    sys.exit(130)
if os.path.exists(path + ".done"):
    print("is finished: there is nothing to resume")
open(path + ".done", "w").close()
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
        more = {"PATH": path, "STATE": str(self.path), "OUT": str(self.out), "FLAGS": ""} | more
        more |= {"TMPDIR": str(self.path)}
        return environment(**({"SEEDS": "0", "DATA": "hopper-replay-demo"} | more))

    def bash(self, *args, **env):
        command = ["bash", str(ROOT / "benchmark.sh"), *args]
        return subprocess.run(
            command, capture_output=True, text=True, env=self.env(**env), timeout=60
        )

    def start(self, *args, **env):
        """benchmark.sh as a terminal starts it: in a process group of its own, where Ctrl-C and
        a hangup are not ignored, as they are where the tests themselves run in the background."""
        command = [sys.executable, "-c", SIGNALS, "bash", str(ROOT / "benchmark.sh"), *args]
        with open(self.path / "said", "w") as said:
            self.script = subprocess.Popen(
                command, stdout=said, stderr=said, env=self.env(**env), start_new_session=True
            )
        return self.script

    def said(self):
        return (self.path / "said").read_text().splitlines()

    def found(self, pattern):
        return sorted(self.path.glob(pattern))

    def wait_for(self, pattern, count):
        end = time.time() + 30
        while len(self.found(pattern)) < count:
            assert time.time() < end, (pattern, self.said())
            time.sleep(0.02)

    def go(self):
        (self.path / "go").write_text("")


@pytest.fixture
def place(tmp_path):
    place = Place(tmp_path)
    yield place
    place.go()  # what a failed test left behind ends by itself
    if place.script:
        place.script.terminate()
        place.script.wait(30)


@pytest.mark.parametrize(
    "env",
    [dict(SEEDS=""), dict(SEEDS=" "), dict(SEEDS="a"), dict(JOBS="0"), dict(JOBS="x")]
    + [dict(DATA="nine"), dict(OUT="-x"), dict(OUT="a\nb"), dict(FLAGS="--compile\n--x")],
)
def test_bad_variables(place, env):
    place.go()
    for flags in ((), ("--print",), ("--slurm",)):
        found = place.bash("local", *flags, **env)
        name = next(iter(env))
        assert found.returncode == 2 and found.stderr.startswith((f"{name} is '", f"{name} has"))
        assert name in ("OUT", "FLAGS") or len(found.stderr.splitlines()) == 1
        assert not place.out.exists() and not place.found("choices")


def test_an_unknown_dataset_names_those_of_the_table(place):
    found = place.bash("local", "--print", DATA="hopper-replay-demo x").stderr
    assert "local has hopper-medium-expert-demo, hopper-replay-demo, pointmaze-medium-demo" in found


def test_out_below_a_file(place):
    place.go()
    (place.path / "file").write_text("")
    found = place.bash("local", OUT=str(place.path / "file" / "runs"))
    assert found.returncode == 2 and "no folder can be made there" in found.stderr
    assert len(found.stderr.splitlines()) == 1


def test_progress_and_the_last_line_of_every_run(place):
    place.go()
    found = place.bash("local", JOBS="3")
    assert found.returncode == 0 and found.stderr == ""
    first, *lines = found.stdout.splitlines()
    assert first == f"{LOCAL} runs, 3 at a time; their output is in {place.out}/logs"
    numbers = [int(re.match(rf"finished (\d+) of {LOCAL}: ", line)[1]) for line in lines]
    assert sorted(numbers) == list(range(1, LOCAL + 1))
    assert any("hopper-replay-demo__bc-top10__0: score 12.3" in line for line in lines)
    logs = {path.stem for path in (place.out / "logs").glob("*.log")}
    assert len(logs) == LOCAL and "hopper-replay-demo__bc-top10__0" in logs
    assert all(
        path.read_text() == str(max(1, os.cpu_count() // 3)) for path in place.found("*.thr*")
    )
    again = place.bash("local")
    assert again.returncode == 0 and again.stdout.count("is finished") == 0
    assert len(place.found("*.done")) == LOCAL


def test_one_choice_of_precision_for_all_runs(place):
    place.go()
    for choice in ("medium", "highest"):  # a second measurement may come out otherwise
        assert place.bash("local", CHOICE=choice, JOBS="4").returncode == 0
    lines = [line for path in place.found("*.commands") for line in path.read_text().splitlines()]
    assert len(lines) == 2 * LOCAL and all(line.endswith(" --precision medium") for line in lines)
    assert (place.path / "choices").read_text() == "..", "measured once for each call"
    printed = place.bash("local", "--print", CHOICE="highest").stdout.splitlines()
    assert len(printed) == LOCAL and all(x.endswith(" --precision medium") for x in printed)
    assert (place.out / "logs" / "precision-cpu-test").read_text() == "medium\n"


@pytest.mark.parametrize("flags", ["--precision highest", "--compile --precision=highest"])
def test_a_precision_in_the_flags_is_the_only_one(place, flags):
    printed = place.bash("local", "--print", FLAGS=flags).stdout.splitlines()
    assert len(printed) == LOCAL and all(line.endswith(flags) for line in printed)
    assert not place.found("choices") and not place.out.exists()


def test_the_choice_is_measured_on_this_machine(tmp_path):
    """By the harness itself, in a process without the stand-in."""
    listed = bash("local", "--print", FLAGS="--device cpu", OUT=str(tmp_path), SEEDS="0")
    assert listed.returncode == 0, listed.stderr
    (kept,) = (tmp_path / "logs").iterdir()
    assert kept.name.startswith("precision-cpu-")
    assert kept.read_text().strip() in ("highest", "medium")
    assert listed.stdout.count(f" --precision {kept.read_text().strip()}\n") == 3 * LOCAL


def test_a_choice_that_fails_is_one_line(place):
    place.program("python", "#!/bin/sh\necho Traceback >&2; echo 'no torch' >&2; exit 1\n")
    found = place.bash("local")
    assert (found.returncode, found.stderr) == (2, "no run is started: no torch\n")
    place.program("python", "")
    (place.path / "bin" / "python").unlink()
    found = place.bash("local", PATH="/usr/bin:/bin")
    if not Path("/usr/bin/python").exists():
        assert found.stderr == "there is no python: activate an environment\n"


def test_a_failure_stops_no_other_run_and_is_listed(place):
    place.go()
    found = place.bash("local", FAILS="iql", JOBS="2")
    assert found.returncode == 1 and found.stderr == ""
    assert found.stdout.count("finished ") == LOCAL - 1 and found.stdout.count("FAILED (1), ") == 1
    assert re.search(
        rf"FAILED \(1\), \d+ of {LOCAL}: hopper-replay-demo__iql__0: it f", found.stdout
    )
    *_, title, last = found.stdout.splitlines()
    assert title == "failed runs:" and last.startswith("python algorithms/iql.py --env hopper-re")
    assert last.endswith(f"# exit status 1, see {place.out}/logs/hopper-replay-demo__iql__0.log")
    assert place.bash("local").returncode == 0, "repeated, the list is empty"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("everywhere", [True, False])
def test_a_signal_returns_after_the_runs_have_saved(place, number, everywhere):
    """To the whole group, as a terminal sends it, or to the script alone; a run hears it once."""
    script = place.start("local", JOBS="2")
    place.wait_for("*.started", 2)
    began = time.time()
    (os.killpg if everywhere else os.kill)(script.pid, number)
    assert script.wait(30) == 130
    assert time.time() - began > 0.4 and len(place.found("*.saved")) == 2
    for path in place.found("*.signals"):
        assert len(json.loads(path.read_text())) == 1
    time.sleep(0.2)
    assert len(place.found("*.started")) == 2, "no other run was started"
    lines = [line for line in place.said() if line.startswith("stopped: ")]
    assert len(lines) == 2 and all(": stopped, saved at step 3" in line for line in lines)


def test_the_line_after_ctrl_c_continues_with_the_same_variables(place):
    place.out = place.path / "it's here"
    variables = dict(SEEDS="0 1", JOBS="2", FLAGS="--compile --lr 1e-4")
    script = place.start("local", **variables)
    place.wait_for("*.started", 2)
    os.killpg(script.pid, signal.SIGINT)
    assert script.wait(30) == 130
    title, line = place.said()[-1].split(": ", 1)
    assert title == "stopped; continue with"
    for word in ("SEEDS='0 1'", "DATA=hopper-replay-demo", "JOBS=2", "FLAGS='--compile --lr 1e-4'"):
        assert word in line
    assert "OUT=" in line and line.endswith("/benchmark.sh local")
    place.go()
    plain = place.env()
    clean = {k: v for k, v in plain.items() if k not in VARIABLES}
    found = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=clean)
    assert found.returncode == 0, found.stderr
    assert f"finished {2 * LOCAL} of {2 * LOCAL}: " in found.stdout
    for path in place.found("*.commands"):
        assert {"--compile --lr 1e-4 --precision medium" in x for x in path.open()} == {True}
        assert len(set(path.read_text().splitlines())) == 1, "the same command"


def test_variables_that_were_not_set_are_not_named(place):
    script = place.start("local", SEEDS="0", DATA="", FLAGS="", OUT=str(place.out))
    place.wait_for("*.started", 1)
    os.killpg(script.pid, signal.SIGINT)
    assert script.wait(30) == 130
    line = place.said()[-1]
    assert "SEEDS=0 OUT=" in line and "DATA" not in line and "FLAGS" not in line


def test_a_second_ctrl_c_does_not_wait(place):
    script = place.start("local", JOBS="2", SAVES="20")
    place.wait_for("*.started", 2)
    os.killpg(script.pid, signal.SIGINT)
    place.wait_for("*.signals", 2)
    os.killpg(script.pid, signal.SIGINT)
    assert script.wait(10) == 130 and not place.found("*.saved")


def test_a_killed_script_starts_no_other_run(place):
    script = place.start("local", JOBS="2")
    place.wait_for("*.started", 2)
    script.kill()
    script.wait()
    place.go()
    place.wait_for("*.done", 2)
    time.sleep(0.5)
    assert len(place.found("*.started")) == 2


# ---- SLURM -----------------------------------------------------------------------------------


def test_slurm_submits_one_array(place):
    """A stand-in for sbatch records what it is given."""
    place.program("sbatch", '#!/bin/sh\nprintf "%s\\n" "$@" > "$STATE/submitted"\n')
    place.out = place.path / "a b"
    found = place.bash("local", "--slurm", SBATCH_FLAGS="--gres=gpu:1 --no-requeue", JOBS="3")
    assert found.returncode == 0, found.stderr
    given = (place.path / "submitted").read_text().splitlines()
    assert given[:3] == ["--requeue", "--open-mode=append", "--signal=B:TERM@120"]
    assert given[3:5] == ["--gres=gpu:1", "--no-requeue"], "the last word is the user's"
    assert given[given.index("--array") + 1] == f"1-{LOCAL}%3"
    assert not place.found("choices"), "every task chooses on its own machine"
    (one,) = (place.out / "logs").glob("local-*.txt")
    assert shlex.split(given[-1]) == ["exec", "bash", "benchmark.sh", "--task", str(one)]
    place.bash("local", "--slurm", SEEDS="1")
    assert len(list((place.out / "logs").glob("local-*.txt"))) == 2, "a pending job keeps its list"


@pytest.fixture
def submitted(place):
    """The list of an array job and a function that runs one of its tasks."""
    place.program("sbatch", "#!/bin/sh\n")
    place.bash("local", "--slurm")
    (path,) = (place.out / "logs").glob("local-*.txt")

    def task(number, **env):
        env = {"SLURM_ARRAY_TASK_ID": str(number), "OUT": "", "FLAGS": ""} | env
        return place.bash("--task", str(path), **env)

    return path, task


def test_a_task_is_its_line_with_threads_and_precision(place, submitted):
    path, task = submitted
    place.go()
    lines = path.read_text().splitlines()
    for number, env, threads in ((1, {}, "1"), (2, {"SLURM_CPUS_PER_TASK": "4"}, "4")):
        found = task(number, OMP_NUM_THREADS="64", **env)
        assert found.returncode == 0, found.stderr
        command, said = found.stdout.splitlines()
        assert command == f"{lines[number - 1]} --precision medium" and said == "score 12.3"
    assert sorted(x.read_text() for x in place.found("*.threads")) == ["1", "4"]
    assert task(3, CHOICE="highest").stdout.startswith(f"{lines[2]} --precision medium\n")


def test_a_failed_task_fails(place, submitted):
    found = submitted[1](1, FAILS="bc")
    assert found.returncode == 1 and "it failed" in found.stderr
    found = submitted[1](LOCAL + 1)
    assert found.returncode == 2 and f"has no line {LOCAL + 1}" in found.stderr


def test_a_requeued_task_continues(place, submitted):
    """SLURM sends its signal to one process: that process is the run."""
    path, task = submitted
    script = place.start("--task", str(path), SLURM_ARRAY_TASK_ID="1", OUT="", FLAGS="")
    place.wait_for("*.started", 1)
    os.kill(script.pid, signal.SIGTERM)
    assert script.wait(30) == 130 and len(place.found("*.saved")) == 1
    place.go()
    assert task(1).returncode == 0
    (commands,) = place.found("*.commands")
    one, two = commands.read_text().splitlines()
    assert one == two and "--resume" in one


# ---- true runs -------------------------------------------------------------------------------


def write_d4rl(folder, name):
    """A tiny file of this name: four episodes of 25 steps, two of them ended by the task."""
    rng, n = np.random.default_rng(0), 100
    sizes = {"halfcheetah": (17, 6), "hopper": (11, 3), "walker2d": (17, 6), "antmaze": (29, 8)}
    sizes |= {"pen": (45, 24), "door": (39, 28), "hammer": (46, 26), "relocate": (39, 30)}
    obs_dim, act_dim = (sizes | {"kitchen": (60, 9)})[name.split("-")[0]]
    ends = np.arange(n) % 25 == 24
    path = folder / Path(data_table("d4rl_files.csv")[name]["path"]).name
    with h5py.File(path, "w") as f:
        f["observations"] = rng.normal(size=(n, obs_dim)).astype(np.float32)
        f["actions"] = rng.uniform(-0.9, 0.9, (n, act_dim)).astype(np.float32)
        f["rewards"] = rng.normal(size=n).astype(np.float32)
        f["terminals"] = ends & (np.arange(n) < 50)
        f["timeouts"] = ends & (np.arange(n) >= 50)


def shortened(command):
    """(module, flags): the command with every phase and period cut to ten steps."""
    module, args = parsed(command)
    flags = dict(steps=10, eval_every=10, eval_episodes=1, log_every=5, device="cpu")
    for field, value in vars(args).items():
        if type(value) is int and value >= 1_000 and field not in flags:
            flags[field] = 10
    flags |= dict(batch_size=8, eval_env="none")
    if module.__name__ == "arq":  # 30 likelihoods in 28 dimensions take minutes
        flags |= dict(n=2, k=1, sample_steps=4)
    words = [part for k, v in flags.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    return module, [*command[2:], *words]


def representatives():
    """One command per table, method and preset of its file; the first seed alone."""
    seen = {}
    for table in ("ablations", *PAPERS[:-1]):  # OGBench's data are its package's
        for command in commands(table):
            module, args = parsed(command)
            rows = tuple(p for p in module.PRESETS if fnmatch.fnmatch(args.env, p))
            seen.setdefault((table, module.__name__, args.name, rows), command)
    return list(seen.values())


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    return tmp_path


def run_all(chosen, here):
    for command in chosen:
        write_d4rl(here, command[command.index("--env") + 1])
        module, words = shortened(command)
        try:
            main(module.Args, module.PRESETS, module.train, words)
        except SystemExit as finished:  # two tables list it
            assert finished.code == 0, (command, finished)


@pytest.mark.soak
def test_every_method_and_preset_runs_and_reports(here):
    run_all(representatives(), here)
    reported(PAPERS[:-1])


def test_one_run_of_each_file_runs_and_reports(here):
    """The first command of every file; all presets in the soak variant."""
    chosen, tables = {}, []
    for table in PAPERS[:-1]:
        first = {command[1]: command for command in reversed(commands(table))}
        tables += [table] if first.keys() - chosen.keys() else []
        chosen = first | chosen
    quick = [c + ["--no-filter"] if "arq" in c[1] else c for c in chosen.values()]
    run_all(quick, here)
    reported(tables)


def reported(tables):
    assert tables
    for table in tables:
        report.main(report.Args(table=table, mixed=True, resamples=50, figures=False))
        with open(f"report/{table}.csv", newline="") as f:
            header, *rows = csv.reader(f)
        paper = report.paper_rows(table)[0]
        assert [row[0] for row in rows] == list(dict.fromkeys(r["dataset"] for r in paper))
        assert {len(row) for row in rows} == {len(header)}
        text = Path(f"report/{table}.md").read_text()
        assert "Missing:" in text and text.count("\n| ") > len(rows)

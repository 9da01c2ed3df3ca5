"""Measure one training program in this process; peers/speed.py starts one process for each.

    python peers/drive.py corl td3_bc CORL '{"seconds": 5, "precision": "highest"}'

A peer's own main program runs as it lies in its folder, with its default settings, until enough
processor time has passed. Its rows are synthetic; d4rl, gym, wandb and pyrallis are replaced by
modules that hold just what these programs touch, so neither a simulator nor a download is needed.
Each program logs after every few updates, and what stands in wandb's place counts them.

A function of the table PEERS makes a program ready to run: (algorithm, folder, settings) -> the
Meter that counts its updates, versions of its packages, and a function that runs it until the Meter
has measured. One line of JSON is printed. This file imports neither torch nor JAX before it knows
the peer: the Python that runs it may have one of them alone.
"""

import copy
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
import types
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np

ROWS, OBS_DIM, ACT_DIM, EPISODE = 200_000, 17, 6, 1_000


class Measured(BaseException):
    """Leaves the program once there is a result."""


class Meter:
    """Counts updates per second of this process's own processor time, after a warm-up of at least
    three calls. `wait(values)` returns when the updates that `values` come from are over."""

    def __init__(self, seconds: float, wait=lambda values: None):
        self.seconds, self.wait, self.first = seconds, wait, time.process_time()
        self.calls, self.updates, self.start, self.rate = 0, 0, None, None

    def __call__(self, updates: int, values=None):
        now = time.process_time()
        self.calls += 1
        self.updates += updates
        if self.start is None and self.calls > 3 and now - self.first > self.seconds / 3:
            self.wait(values)
            self.start, self.updates = time.process_time(), 0
        elif self.start is not None and now - self.start > self.seconds:
            self.wait(values)
            self.rate = self.updates / (time.process_time() - self.start)
            raise Measured


# ---- what the programs find in place of their packages ---------------------------------------


def rows() -> dict:
    """Random transitions in episodes of 1,000, with D4RL's names."""
    draw, n = np.random.default_rng(0), ROWS
    observations = draw.standard_normal((n, OBS_DIM), np.float32)
    next_observations = np.roll(observations, -1, 0)
    last = np.arange(n) % EPISODE == EPISODE - 1
    next_observations[last] = draw.standard_normal((last.sum(), OBS_DIM), np.float32)
    return {
        "observations": observations,
        "actions": draw.uniform(-0.99, 0.99, (n, ACT_DIM)).astype(np.float32),
        "rewards": draw.standard_normal(n, np.float32),
        "next_observations": next_observations,
        "terminals": last.astype(np.float32),
    }


class Space:
    def __init__(self, size):
        self.shape, self.high = (size,), np.ones(size, np.float32)
        self.low = -self.high

    def seed(self, seed):
        pass

    def sample(self):
        return np.zeros(self.shape, np.float32)


class Task:
    """An environment whose episodes have no step."""

    observation_space = single_observation_space = Space(OBS_DIM)
    action_space = single_action_space = Space(ACT_DIM)
    spec = SimpleNamespace(max_episode_steps=0)

    def __init__(self, *names, **options):
        self.env_fns = [lambda: self]

    def seed(self, seed):
        pass

    def reset(self):
        return np.zeros(OBS_DIM, np.float32)

    def step(self, action):
        return self.reset(), 0.0, True, {}

    def close(self):
        pass


def put(name: str, **content):
    """A module of this name and content, for whoever imports it."""
    module = types.ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module


def put_all(log, make=Task, load=lambda env: rows()) -> None:
    """The modules that all three programs import. `log(values)` is called where they log,
    `make(name)` where they make an environment, and `load(env)` where they read its rows. What
    they wrap around an environment is left out, and the environment remembers it."""

    def nothing(*_, **__):
        pass

    def unwrapped(env, change=None):
        env.change = change
        return env

    wrappers = SimpleNamespace(TransformObservation=unwrapped, TransformReward=unwrapped)
    put("gym", make=make, Env=Task, vector=SimpleNamespace(make=make), wrappers=wrappers)
    put("d4rl", qlearning_dataset=load, get_normalized_score=lambda name, x: x)
    run = SimpleNamespace(save=nothing)
    put("wandb", init=nothing, finish=nothing, run=run, log=lambda values, **_: log(values))


def put_flags(call) -> None:
    """pyrallis: a decorated main function becomes call(function, the class of its flags)."""

    def wrap():
        def decorate(train):
            (Config,) = train.__annotations__.values()
            return lambda: call(train, Config)

        return decorate

    put("pyrallis", wrap=wrap)


def commit(folder) -> str:
    """The commit of a checkout, in short, with "-dirty" where files are changed."""
    line = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=7"]
    try:
        finished = subprocess.run([*line, "--exclude=*"], capture_output=True, text=True)
    except OSError:  # no git
        return "unknown"
    return finished.stdout.strip() or "unknown"


def start(path, *flags) -> None:
    """Run a program as its user does, in an empty folder."""
    os.chdir(tempfile.mkdtemp(dir=os.environ.get("TMPDIR")))
    sys.argv = [str(path), *flags]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(str(path), run_name="__main__")


# ---- the programs ----------------------------------------------------------------------------


def corl(algorithm, folder, settings):
    """CORL logs after every update."""
    import torch

    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(settings["precision"])
    meter = Meter(settings["seconds"])
    put_all(lambda values: meter(1))
    put_flags(lambda train, Config: train(Config(device="cpu", eval_freq=10**12)))
    path = folder / "algorithms" / "offline" / f"{algorithm}.py"
    return meter, {"torch": torch.__version__}, lambda: start(path)


def with_jax(seconds, updates):
    """A Meter for programs that log every `updates` updates, and versions. The devices are made
    here, with one thread, because the programs overwrite XLA_FLAGS."""
    import jax

    jax.devices()
    meter = Meter(seconds, jax.block_until_ready)
    put_all(lambda values: meter(updates, values))
    return meter, {"jax": jax.__version__}


def jax_corl(algorithm, folder, settings):
    """JAX-CORL compiles eight updates into one call."""
    meter, versions = with_jax(settings["seconds"], 8)
    flags = ["eval_interval=1000000000"]
    if algorithm != "cql":  # which logs after every call
        flags.append("log_interval=1")
    path = folder / "algos" / f"{algorithm.replace('_', '')}.py"
    return meter, versions, lambda: start(path, *flags)


def unifloral(algorithm, folder, settings):
    """Unifloral scans over the updates between two evaluations. A step of its TD3+BC has two
    updates of the critics and one of the actor, as two updates of the other programs have."""
    steps = 200
    meter, versions = with_jax(settings["seconds"], 2 * steps if algorithm == "td3_bc" else steps)
    flags = ["--log", "--eval-interval", str(steps), "--num-updates", str(10**9)]
    path = folder / "algorithms" / f"{algorithm}.py"
    return meter, versions, lambda: start(path, *flags)


def put_fql(load, log, evaluate) -> None:
    """What FQL's program finds in place of its modules that read data, log and evaluate: `load()`
    gives its rows, `log(values, step)` is called where it logs, and `evaluate(agent)` where it
    evaluates. Nothing is written."""

    def nothing(*_, **__):
        pass

    def logger(path):
        own = Path(path).name == "train.csv"
        return SimpleNamespace(log=log if own else nothing, close=nothing)

    def judge(agent, **_):
        evaluate(agent)
        return {}, [], []

    put("tqdm", tqdm=lambda steps, **_: steps)
    put("wandb", run=SimpleNamespace(project=""), log=nothing)
    put("envs.env_utils", make_env_and_datasets=lambda *_, **__: (None, None, load(), None))
    put("utils.evaluation", evaluate=judge, flatten=None)
    put(
        "utils.log_utils",
        CsvLogger=logger,
        get_exp_name=str,
        get_flag_dict=dict,
        get_wandb_video=None,
        setup_wandb=nothing,
    )


def fql_flags(folder, **settings) -> list[str]:
    """The words of a command line of FQL's program; "agent__x" is its flag --agent.x."""
    words = [f"--agent={folder / 'agents' / 'fql.py'}", "--log_interval=1", "--buffer_size=1"]
    words.append(f"--save_interval={10**12}")
    return words + [f"--{key.replace('__', '.')}={value}" for key, value in settings.items()]


def fql(algorithm, folder, settings):
    """The program of FQL's authors, which logs after every update."""
    import jax

    jax.devices()
    meter, data = Meter(settings["seconds"], jax.block_until_ready), rows()
    data["masks"] = 1 - data["terminals"]
    put_fql(lambda: data, lambda values, step: meter(1, values), lambda agent: None)
    layers = (settings["hidden"],) * 4
    sizes = dict(agent__actor_hidden_dims=layers, agent__value_hidden_dims=layers)
    flags = fql_flags(folder, save_dir=".", offline_steps=10**9, **sizes)
    return meter, {"jax": jax.__version__}, lambda: start(folder / "main.py", *flags)


def ours(algorithm, folder, settings):
    """This repository's own `train`, with default settings; CQL in two layers where asked for, and
    FQL in layers of the size that is asked for."""
    import torch

    sys.path[:0] = [str(folder), str(folder / "algorithms")]
    from common import MLP, Data, ScalarMLP, prepare_device
    from tools.speed import Stopwatch

    torch.set_num_threads(1)
    device = prepare_device("cpu", settings["precision"])
    module, meter = importlib.import_module(algorithm), Meter(settings["seconds"])
    if algorithm == "cql" and settings["layers"] == 2:  # the file's networks have three

        class Nets(module.Nets):
            def __init__(self, data, args):
                super().__init__(data, args)
                self.actor = MLP(OBS_DIM, 256, 256, 2 * ACT_DIM)
                self.q = ScalarMLP(OBS_DIM + ACT_DIM, 256, 256, members=2)
                self.q_target = copy.deepcopy(self.q).requires_grad_(False)

        module.Nets = Nets

    class Counted(Stopwatch):
        def loop(self, steps, phase="train"):
            for t in count(steps // 2):
                yield t
                meter(1)

    def run():
        data = Data(*(torch.from_numpy(x) for x in rows().values()))
        args = module.Args(compile=settings["compile"])
        if algorithm == "fql":
            args.hidden = settings["hidden"]
        module.train(Counted(device, None), data, args)

    return meter, {"torch": torch.__version__}, run


PEERS = {"corl": corl, "jax_corl": jax_corl, "unifloral": unifloral, "fql": fql, "ours": ours}


def main(peer, algorithm, folder, settings):
    meter, versions, run = PEERS[peer](algorithm, Path(folder).resolve(), json.loads(settings))
    out, sys.stdout = sys.stdout, open(os.devnull, "w")
    try:
        run()
    except Measured:
        pass
    print(json.dumps({"rate": meter.rate, "versions": versions}), file=out)


if __name__ == "__main__":
    main(*sys.argv[1:])

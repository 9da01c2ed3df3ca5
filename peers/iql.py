"""The program of IQL's authors, trained on our rows and judged by our evaluation.

    git clone https://github.com/ikostrikov/implicit_q_learning ../implicit_q_learning
    git -C ../implicit_q_learning checkout 09d7002
    pip install "jax[cpu]" flax optax tfp-nightly ml_collections
    python peers/iql.py --checkout ../implicit_q_learning --env hopper-replay-demo --seed 0
    python algorithms/iql.py --env hopper-replay-demo --seed 0
    python tools/report.py runs

The result is a run's folder like those of our files, under the name iql_authors, so that the report
shows it in the same tables and figures as ours. Flags are those of algorithms/iql.py, with its
presets, and are handed to the authors' program under its own names. A setting that the authors'
code fixes to another value is refused. Three things are ours:

- The rows, which replace d4rl's. They are those of our own loader, with rewards scaled and shifted,
  and observations normalized, as our file does it for the dataset; the authors' program knows
  changes of rewards by the names of D4RL's datasets alone, and no change of observations. The
  authors' loader then clips actions to 1 - 1e-5 in size.
- The evaluation: the same task, start states and number of episodes as for our file, at the same
  steps. The actions are those of the authors' agent at temperature 0, which is its mean.
- The seed of the batches. The authors draw them by numpy's global generator and give it no seed;
  here it has the seed of the run.

Everything else is the authors' program as it lies in its folder (train_offline.py): networks,
initial values, losses, optimizers, schedule, order of updates. It was written for JAX 0.2.27 and
runs here with jax 0.10.2, flax 0.12.8, optax 0.2.8 and tfp-nightly 0.26.0.dev20261027
(tensorflow-probability 0.25 fails with this JAX). Three things that have changed since are supplied
as they were (see `authors_learner`), and the authors' files are not changed.
JAX computes on its own default device; with XLA_FLAGS=--xla_cpu_multi_thread_eigen=false it uses
one thread of a CPU.

A finished run is not repeated. The program cannot continue in the middle, so a run that was stopped
starts from the beginning when the command is repeated.
"""

import importlib
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "algorithms")]
import iql

from common import Scaling, normalize_obs
from peers import drive
from peers.program import AuthorsRun, checked_folder, rows_of
from run import parse

PRESETS = iql.PRESETS
# A field of our Args -> the learner's fields of the same meaning.
NAMES = {"tau": ["expectile"], "beta": ["temperature"], "gamma": ["discount"], "polyak": ["tau"]}
NAMES |= {"lr": ["actor_lr", "value_lr", "critic_lr"]}
# What the authors' code fixes, in the names of our Args.
FIXED = {"extraction": "awr", "max_weight": 100.0, "gelu": False, "critic_ln": False}
CONFIG = "import ml_collections\n\n\ndef get_config():\n    return ml_collections.ConfigDict({})\n"


@dataclass
class Args(iql.Args):
    checkout: str = ""
    """checkout of ikostrikov/implicit_q_learning"""


def settings(args) -> dict:
    """The flags of the authors' program; "config" has what its file of settings holds. The name of
    the environment changes no rewards."""
    config = {theirs: getattr(args, own) for own, names in NAMES.items() for theirs in names}
    config |= {"hidden_dims": (args.hidden,) * args.layers, "dropout_rate": args.dropout or None}
    program = {"env_name": "rows", "seed": args.seed, "batch_size": args.batch_size}
    program |= {"max_steps": args.steps, "eval_interval": args.eval_every}
    return program | {"log_interval": 1, "tqdm": False, "config": config}


def put_all(rows, log, evaluate) -> None:
    """What the authors' program finds in place of gym, d4rl, tensorboardX and its own modules that
    wrap and evaluate: it reads `rows`, calls log(values, step) for every scalar that it logs, and
    evaluate(agent) where it evaluates."""

    def nothing(*_, **__):
        pass

    def same(env):
        return env

    def judge(agent, *_):
        evaluate(agent)
        return {"return": 0.0}

    def write(name, value, step):
        log({name: value}, step)

    env, writer = drive.Task(), SimpleNamespace(add_scalar=write, add_histogram=nothing)
    env.observation_space = drive.Space(rows["observations"].shape[1])
    env.action_space = drive.Space(rows["actions"].shape[1])
    writer.flush = nothing
    put = drive.put
    put("gym", make=lambda name: env, Env=drive.Task, spaces=SimpleNamespace(Box=drive.Space))
    put("d4rl", qlearning_dataset=lambda env: rows)
    put("tensorboardX", SummaryWriter=lambda *_, **__: writer)
    put("wrappers", EpisodeMonitor=same, SinglePrecision=same)
    put("evaluation", evaluate=judge)


def authors_learner() -> None:
    """Import the authors' modules, whose `common` is not ours. Supplies what has changed since they
    were written: JAX has no tree_multimap any more, and refuses to call an argument static that a
    function does not have; Flax returns plain dictionaries unless it is told otherwise."""
    import flax
    import jax

    plain, ours = jax.jit, sys.modules.pop("common")

    def jit(*function, **options):
        if options.get("static_argnames") == ("actor_def", "distribution"):
            options["static_argnames"] = ("actor_def",)
        return plain(*function, **options)

    jax.tree_multimap, jax.jit = jax.tree.map, jit
    flax.config.update("flax_return_frozendict", True)
    try:
        importlib.import_module("learner")
    finally:
        jax.jit, sys.modules["common"] = plain, ours


class IqlRun(AuthorsRun):
    """A run of the program of IQL's authors."""

    title, commit, file, learner = "IQL", "09d7002", "train_offline.py", "learner.py"

    def train(self, data, args) -> None:
        """Run the program until it has made all its steps."""
        iql.scale_rewards(data, args)
        if args.normalize_obs:
            normalize_obs(data, eps=1e-3)
        self.scaling = Scaling(data)
        self.begin()
        put_all(rows_of(data), self.log, self.judge)
        np.random.seed(args.seed)
        flags = dict(self.program["args"])
        with tempfile.TemporaryDirectory() as place:
            config = Path(place) / "settings.py"
            config.write_text(CONFIG.format(flags.pop("config")))
            flags |= {"config": config, "save_dir": place}
            words = [f"--{name}={value}" for name, value in flags.items()]
            self.execute(words, authors_learner)

    def act(self, agent, states) -> np.ndarray:
        """The agent's mean actions (B, A) at scaled states (B, S)."""
        return agent.sample_actions(states, temperature=0.0)


def main(args, preset):
    folder = checked_folder(args, "ikostrikov/implicit_q_learning", "learner.py", FIXED)
    IqlRun(args, preset, folder, settings(args)).whole(IqlRun.train)


if __name__ == "__main__":
    main(*parse(Args, PRESETS, sys.argv[1:]))

"""The program of FQL's authors, trained on our rows and judged by our evaluation.

    git clone https://github.com/seohongpark/fql ../fql
    git -C ../fql checkout 719d044
    pip install "jax[cpu]" flax optax distrax ml_collections
    python peers/fql.py --checkout ../fql --env cube-single-play-singletask-v0 --seed 0
    python algorithms/fql.py --env cube-single-play-singletask-v0 --seed 0
    python tools/report.py runs

The result is a run's folder like those of our files, under the name fql_authors, so that the report
shows it in the same tables and figures as ours. Flags are those of algorithms/fql.py, with its
presets, and are handed to the authors' program under its own names. A setting that the authors'
code fixes to another value is refused. Two things are ours:

- The rows, which replace the authors' loader. They are those of our own loader, with the shift of
  rewards and the normalization of observations that our flags ask for. As in the authors' loader,
  actions are clipped to 1 - 1e-5 in size.
- The evaluation: the same task, start states and number of episodes as for our file, at the same
  steps. The actions are those of the authors' agent, with noise from a key that the evaluation's
  own generator gives. The authors evaluate after the first step too, which is left out.

Everything else is the authors' program as it lies in its folder (main.py): networks, initial
values, losses, optimizer, batches. JAX computes on its own default device; with
XLA_FLAGS=--xla_cpu_multi_thread_eigen=false it uses one thread of a CPU. What stands in for the
program's loader, evaluation and loggers is in peers/drive.py.

A finished run is not repeated. The program cannot continue in the middle here, so a run that was
stopped starts from the beginning when the command is repeated.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "algorithms")]
import fql

from common import Scaling, normalize_obs
from peers import drive
from peers.program import AuthorsRun, checked_folder, rows_of
from run import parse

PRESETS = fql.PRESETS
# A field of our Args -> the agent's field of the same meaning.
NAMES = {name: name for name in ("alpha", "q_agg", "flow_steps", "normalize_q_loss", "lr")}
NAMES |= {"batch_size": "batch_size", "gamma": "discount", "polyak": "tau"}
# What the authors' code fixes, in the names of our Args.
FIXED = {"distill": True, "best_of": 0}


@dataclass
class Args(fql.Args):
    checkout: str = ""
    """checkout of seohongpark/fql"""


def settings(args) -> dict:
    """The flags of the authors' program, as peers/drive.py takes them."""
    layers = (args.hidden,) * 4
    agent = {theirs: getattr(args, own) for own, theirs in NAMES.items()}
    agent |= {"actor_hidden_dims": layers, "value_hidden_dims": layers}
    program = {
        "env_name": args.env,
        "seed": args.seed,
        "offline_steps": args.steps,
        "eval_interval": args.eval_every,
    }
    return program | {f"agent__{name}": value for name, value in agent.items()}


class FqlRun(AuthorsRun):
    """A run of the program of FQL's authors."""

    title, commit, file, learner = "FQL", "719d044", "main.py", "agents/fql.py"

    def train(self, data, args) -> None:
        """Run the program until it has made all its steps."""
        data.reward += args.reward_shift
        if args.normalize_obs:
            normalize_obs(data, eps=1e-3)
        self.scaling = Scaling(data)
        rows = rows_of(data)
        rows["actions"] = rows["actions"].clip(-1 + 1e-5, 1 - 1e-5)
        rows["masks"] = 1 - rows["terminals"]
        self.begin()
        drive.put_fql(lambda: rows, self.log, self.judge)
        with tempfile.TemporaryDirectory() as place:
            flags = drive.fql_flags(self.place, save_dir=place, **self.program["args"])
            self.execute(flags)

    def act(self, agent, states) -> np.ndarray:
        """The agent's actions (B, A) at scaled states (B, S)."""
        key = torch.randint(2**32, (2,)).numpy().astype(np.uint32)
        actions = agent.sample_actions(observations=states, temperature=0, seed=key)
        return np.array(actions)


def main(args, preset):
    folder = checked_folder(args, "seohongpark/fql", "agents/fql.py", FIXED)
    FqlRun(args, preset, folder, settings(args)).whole(FqlRun.train)


if __name__ == "__main__":
    main(*parse(Args, PRESETS, sys.argv[1:]))

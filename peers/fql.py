"""The program of FQL's authors, trained on our rows and judged by our evaluation.

    git clone https://github.com/seohongpark/fql ../fql
    git -C ../fql checkout 719d044
    pip install "jax[cpu]" flax optax distrax ml_collections
    python peers/fql.py --checkout ../fql --env cube-single-play-singletask-v0 --seed 0
    python algorithms/fql.py --env cube-single-play-singletask-v0 --seed 0
    python tools/report.py runs

The result is a run's folder like those of our files, under the name fql_authors, so that the report
shows it in the same tables and figures as ours. Flags are those of algorithms/fql.py, with its
presets, and are handed to the authors' program under its own names. Two things are ours:

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

import runpy
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "algorithms")]
import fql

from common import InputError, Scaling, normalize_obs
from peers import drive
from peers.corl import PeerGuest, PeerRun, checked_commit, portable
from run import parse

PRESETS, COMMIT = fql.PRESETS, "719d044"
OTHER = f"use a checkout of commit {COMMIT}"
# A field of our Args -> the agent's field of the same meaning.
NAMES = {name: name for name in ("alpha", "q_agg", "flow_steps", "normalize_q_loss", "lr")}
NAMES |= {"batch_size": "batch_size", "gamma": "discount", "polyak": "tau"}


@dataclass
class Args(fql.Args):
    checkout: str = ""
    """checkout of seohongpark/fql"""


def check(args) -> Path:
    """The folder of the authors' program. InputError where it is missing, or cannot do what our
    file does."""
    if not args.checkout:
        raise InputError("name a checkout of seohongpark/fql: --checkout PATH")
    folder = Path(args.checkout)
    if not (folder / "agents" / "fql.py").is_file():
        raise InputError(
            f"--checkout {folder}: there is no agents/fql.py; use the folder of a checkout"
        )
    if not args.distill:
        raise InputError("--no-distill: the authors' program has no such method; leave it out")
    if args.steps % args.eval_every:
        raise InputError(
            f"--steps {args.steps} is no multiple of --eval-every {args.eval_every}: the authors' "
            "program would not evaluate the last step; use a multiple"
        )
    return folder.resolve()


def settings(args) -> dict:
    """The flags of the authors' program, as peers/drive.py takes them."""
    layers = (args.hidden,) * 4
    agent = {theirs: getattr(args, own) for own, theirs in NAMES.items()}
    agent |= {"actor_hidden_dims": layers, "value_hidden_dims": layers}
    program = {"env_name": args.env, "seed": args.seed, "offline_steps": args.steps}
    program["eval_interval"] = args.eval_every
    return program | {f"agent__{name}": value for name, value in agent.items()}


class FqlRun(PeerRun):
    """A run of the program of FQL's authors."""

    def __init__(self, args, preset, folder):
        words = [portable(word) for word in sys.argv]
        super().__init__(args, preset, words, "fql_authors")
        self.guests[0], self.place = PeerGuest(self, folder / "agents" / "fql.py"), folder
        self.program = {"name": "FQL", "commit": checked_commit(folder, COMMIT)}
        self.program |= {"file": "main.py", "args": settings(args)}

    def train(self, data, args) -> None:
        """Run the program until it has made all its steps."""
        data.reward += args.reward_shift
        if args.normalize_obs:
            normalize_obs(data, eps=1e-3)
        self.scaling = Scaling(data)
        rows = {
            "observations": data.obs,
            "actions": data.action.clamp(-1 + 1e-5, 1 - 1e-5),
            "rewards": data.reward,
            "next_observations": data.next_obs,
            "masks": 1 - data.terminal,
            "terminals": data.terminal,  # not used in training
        }
        rows = {name: value.cpu().numpy() for name, value in rows.items()}
        self.begin()
        drive.put_fql(lambda: rows, self.log, self.judge)
        with tempfile.TemporaryDirectory() as place:
            flags = drive.fql_flags(self.place, save_dir=place, **self.program["args"])
            sys.argv = [str(self.place / "main.py"), *flags]
            sys.path.insert(0, str(self.place))
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            except ModuleNotFoundError as error:
                raise InputError(
                    f"FQL's program needs {error.name}: install the packages that --help names"
                ) from None
            except SystemExit as left:  # it leaves by 0
                if left.code:
                    raise
        self.end("FQL's program", OTHER)

    def log(self, values: dict, step: int) -> None:
        """Take the losses of step t; those of a step with an evaluation wait for `judge`."""
        own = {name.partition("/")[2]: x for name, x in values.items() if "training/" in name}
        self.metrics = own
        if step > 1 and step % self.args.eval_every:
            self.advance()

    def judge(self, agent) -> None:
        """In place of the authors' evaluation: ours, of the actions of their agent."""

        def act(obs):
            """Raw observations (B, S) to the agent's actions (B, A) in the task's bounds."""
            key = torch.randint(2**32, (2,)).numpy().astype(np.uint32)
            states = self.scaling.obs(obs).cpu().numpy()
            actions = np.array(agent.sample_actions(observations=states, temperature=0, seed=key))
            return self.scaling.action(torch.as_tensor(actions, device=obs.device))

        self.advance(act)


def main(args, preset):
    folder = check(args)
    args.checkout, args.resume = drive.commit(folder), not args.overwrite
    FqlRun(args, preset, folder).whole(FqlRun.train)


if __name__ == "__main__":
    main(*parse(Args, PRESETS, sys.argv[1:]))

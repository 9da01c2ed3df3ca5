"""What the drivers of other people's programs share: the rows that a program trains on, the files
of its run, and its steps, which end in our log and our evaluation."""

import inspect
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from harness import resume

from common import InputError
from peers import drive
from run import Run
from tools.store import portable

ROWS = dict(observations="obs", actions="action", rewards="reward", terminals="terminal")
ROWS |= dict(next_observations="next_obs")


def rows_of(data) -> dict:
    """Our rows as arrays, under D4RL's names."""
    return {name: getattr(data, field).cpu().numpy() for name, field in ROWS.items()}


def checked_folder(args, repository: str, file: str, fixed: dict) -> Path:
    """The folder of the authors' program that --checkout names. `fixed` has what its code fixes, in
    the names of our Args. InputError where it is missing, or cannot do what our file does."""
    if not args.checkout:
        raise InputError(f"name a checkout of {repository}: --checkout PATH")
    folder = Path(args.checkout)
    if not (folder / file).is_file():
        raise InputError(f"--checkout {folder}: there is no {file}; use the folder of a checkout")
    if args.steps % args.eval_every:
        raise InputError(
            f"--steps {args.steps} is no multiple of --eval-every {args.eval_every}: the authors' "
            "program would not evaluate the last step; use a multiple"
        )
    for field, value in fixed.items():
        if getattr(args, field) != value:
            raise InputError(
                f"{field} is {getattr(args, field)} for {args.env}, but the authors' code fixes it "
                f"to {value}: the two cannot be compared there"
            )
    return folder.resolve()


def checked_commit(checkout, made_for: str) -> str:
    """The commit of a checkout, and a line where it is not the one that a tool was made for."""
    commit = drive.commit(checkout)
    if commit != made_for:
        print(f"note: the checkout is {commit}, and this tool was made for {made_for}")
    return commit


class PeerGuest(resume.Guest):
    """The files of a run of another program. It cannot be continued, so nothing but results is
    kept, and a stopped run starts again. `file` is the program's file of the algorithm, and
    run.program describes the program: its name, commit, file and args."""

    def __init__(self, run, file):
        super().__init__(run)
        self.file = file

    def code(self):
        """The hash "algorithm" is of the program's file."""
        tools = {__file__, inspect.getfile(type(self.run)), drive.__file__}
        return super().code() | {"tool": resume.code_hash(*sorted(tools))}

    def config(self):
        config, run = super().config(), self.run
        program = dict(run.program)
        name = program.pop("name")
        return config | {
            "args": config["args"] | {"out": portable(run.args.out), "resume": False},
            "versions": config["versions"] | {name: program["commit"]},
            name.lower(): program,
        }

    def step(self, t):
        if self.stopped:
            print(f"\nstopped at step {t}; repeat the command to start again", flush=True)
            raise SystemExit(130)


class PeerRun(Run):
    """A run whose loop is in another program. That program logs after every update, then evaluates
    where it is due: both end here. `metrics` holds the losses of step t."""

    def begin(self) -> None:
        """Before the program starts."""
        if self.task is None:
            raise InputError(
                f"{self.args.env} has no task to evaluate a policy in: use another dataset"
            )
        self.start(None, SimpleNamespace())
        self.counter = self.loop(self.args.steps)
        self.t = next(self.counter)

    def advance(self, act=None) -> None:
        """Step t is over."""
        self.after(self.t, self.metrics, act)
        self.t = next(self.counter, None)

    def end(self, file: str, fix: str) -> None:
        """After the program has ended. Raises InputError where it has not made all its steps."""
        if self.t is not None or not self.rows["eval"]:
            raise InputError(f"{file} left before its last step: {fix}")


class AuthorsRun(PeerRun):
    """A run of the program of a method's authors, which may log a step in several calls. A
    subclass has `title`, the program's name; `commit`, the one that it is made for; `file`, the
    program; `learner`, the program's file of the algorithm; and `act`."""

    def __init__(self, args, preset, folder, settings):
        words = [portable(word) for word in sys.argv]
        commit = checked_commit(folder, self.commit)
        args.checkout, args.resume = commit, not args.overwrite
        super().__init__(args, preset, words, f"{self.title.lower()}_authors")
        self.guests[0], self.place = PeerGuest(self, folder / self.learner), folder
        self.program = {"name": self.title, "commit": commit, "file": self.file}
        self.program["args"] = settings
        self.metrics = {}

    def execute(self, flags: list[str], prepare=lambda: None) -> None:
        """Run the program, after prepare(), until it has made all its steps."""
        sys.argv = [str(self.place / self.file), *flags]
        sys.path.insert(0, str(self.place))
        try:
            prepare()
            runpy.run_path(sys.argv[0], run_name="__main__")
        except ModuleNotFoundError as error:
            raise InputError(
                f"{self.title}'s program needs {error.name}: install the packages that --help names"
            ) from None
        except SystemExit as left:  # it leaves by 0
            if left.code:
                raise
        self.end(f"{self.title}'s program", f"use a checkout of commit {self.commit}")

    def log(self, values: dict, step: int) -> None:
        """Take losses of a step. The step before is over, if no evaluation has ended it."""
        if self.t and step > self.t:
            self.advance()
        own = {name.partition("/")[2]: x for name, x in values.items() if "training/" in name}
        self.metrics |= own

    def judge(self, agent) -> None:
        """In place of the authors' evaluation: ours, of the actions of their agent."""

        def act(obs):
            """Raw observations (B, S) to the agent's actions (B, A) in the task's bounds."""
            actions = self.act(agent, self.scaling.obs(obs).cpu().numpy())
            return self.scaling.action(torch.as_tensor(actions, device=obs.device))

        self.advance(act)

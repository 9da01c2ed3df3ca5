"""Other people's programs, trained on our rows and judged by our evaluation.

    git clone https://github.com/tinkoff-ai/CORL ../CORL
    git -C ../CORL checkout 6afec90
    python peers/train.py --program corl_td3_bc --checkout ../CORL --env hopper-replay-demo
    python algorithms/td3_bc.py --env hopper-replay-demo

    git clone https://github.com/ikostrikov/implicit_q_learning ../implicit_q_learning
    git -C ../implicit_q_learning checkout 09d7002
    pip install "jax[cpu]" flax optax tfp-nightly ml_collections
    python peers/train.py --program iql_authors --checkout ../implicit_q_learning
    python algorithms/iql.py

The result is a run's folder like those of our files, which tools/report.py reads. Two things are
ours. The rows are those of our own loader, with rewards scaled and shifted as our file does it. For
the program of IQL's authors observations are normalized, too; it then clips actions to 1 - 1e-5 in
size. The evaluation has the task, start states, steps and number of episodes of our file, and
the actions are the program's own. For IQL's authors the seed of numpy's generator, which draws
batches and which they leave open, is the run's.

Everything else is the program as it lies in its folder. Flags and presets are those of our file of
the same method (--env, --seed, --steps, ...), under the program's names; what its code fixes to
another value is refused. Commit cf2dab1 has drivers of CORL's IQL, which differs from its authors'
and ours (peers/corl.py), and of the program of FQL's authors (peers/fql.py).

The program of IQL's authors was written for JAX 0.2.27, and ran here with jax 0.10.2, flax 0.12.8,
optax 0.2.8 and tfp-nightly 0.26.0.dev20261027; what has changed since is supplied as it was (see
`put_jax`). XLA_FLAGS=--xla_cpu_multi_thread_eigen=false keeps JAX to one thread of a CPU. A
finished run is not repeated; one that was stopped starts from the beginning.
"""

import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import runpy
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pandas as pd
import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "algorithms")]
from common import Scaling, normalize_obs, require
from peers import stand_ins
from run import CONTROL, evaluate, load, make, parse, score
from tools.store import summary_of

ROWS = dict(
    observations="obs",
    actions="action",
    rewards="reward",
    terminals="terminal",
    next_observations="next_obs",
)
CONFIG = "import ml_collections\n\n\ndef get_config():\n    return ml_collections.ConfigDict({})\n"


# Our file, the program in its checkout, {a field of our Args: the program's names of it}, and what
# its code fixes, in the names of our Args.
PROGRAMS = {
    "corl_td3_bc": SimpleNamespace(
        ours="td3_bc",
        file="algorithms/offline/td3_bc.py",
        names={
            "env": "env",
            "seed": "seed",
            "steps": "max_timesteps",
            "eval_every": "eval_freq",
            "eval_episodes": "n_episodes",
            "batch_size": "batch_size",
            "gamma": "discount",
            "polyak": "tau",
            "alpha": "alpha",
            "policy_noise": "policy_noise",
            "noise_clip": "noise_clip",
            "policy_freq": "policy_freq",
            "normalize_obs": "normalize",
        },
        fixed={"lr": 3e-4, "critics": 2, "hidden": 256},
    ),
    "iql_authors": SimpleNamespace(
        ours="iql",
        file="train_offline.py",
        names={"tau": "expectile", "beta": "temperature", "gamma": "discount", "polyak": "tau"},
        fixed={"extraction": "awr", "max_weight": 100.0, "gelu": False, "critic_ln": False},
    ),
}


@dataclass
class Args:
    program: Literal["corl_td3_bc", "iql_authors"] = "corl_td3_bc"
    """the program"""
    checkout: str = "../CORL"
    """folder of its checkout"""
    until: int = 0
    """leave after the evaluation at this step, with the schedules of --steps; 0: do not leave"""


def settings(program, words, until=0):
    """Args of our file for the words of a command line, and the program's own. Raises
    InputError."""
    module = importlib.import_module(program.ours)
    ours, _ = parse(module.Args, module.PRESETS, words)
    for name, value in program.fixed.items():
        own = getattr(ours, name)
        line = f"our {program.ours}.py has {name} {own} for {ours.env}, but the program's code"
        require(own == value, f"{line} fixes it to {value}")
    every = ours.eval_every
    fits = until <= ours.steps and ours.steps % every == until % every == 0
    require(fits, f"--until and --steps must be multiples of {every}, --until the smaller")
    return ours, {theirs: getattr(ours, name) for name, theirs in program.names.items()}


def judge_of(ours, task, scaling, found, until):
    """Our evaluation, in place of the program's: judge(act) adds a row to `found`, and ends the
    program at step `until`. `act` maps raw observations (B, S) to actions."""

    def judge(act):
        def bounded(obs):
            return scaling.action(torch.as_tensor(np.array(act(obs))))

        envs = [make(task) for _ in range(ours.eval_episodes)]
        returns = evaluate(bounded, envs, 1000 * ours.seed + 100, torch.device("cpu"))
        row = {"step": ours.eval_every * (len(found) + 1)}
        row |= {"return": returns.mean(), "score": score(task, returns)}
        found.append(row | {f"episode_{i}": x for i, x in enumerate(returns)})
        print(f"step {row['step']:,}: score {row['score']:.1f}", flush=True)
        if row["step"] == until:
            raise SystemExit

    return judge


# ---- the programs ----------------------------------------------------------------------------


def run_corl(path, rows, theirs, judge, ours, scaling):
    """CORL normalizes observations itself, and its rows hold our rewards already."""
    theirs |= {"device": "cpu", "buffer_size": len(rows["rewards"]), "normalize_reward": False}

    def evaluated(env, actor, device, n_episodes, seed):
        def act(obs):
            states = obs.numpy()
            states = env.change(states) if env.change else states
            return [actor.act(state, device) for state in states]

        actor.eval()
        judge(act)
        actor.train()
        return np.zeros(1)

    def call(train, Config):
        train.__globals__.update(eval_actor=evaluated, print=stand_ins.nothing)
        train(Config(**theirs))

    stand_ins.put_all(rows)
    stand_ins.put_flags(call)
    runpy.run_path(str(path), run_name="__main__")


def put_jax() -> None:
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


def run_iql(path, rows, theirs, judge, ours, scaling):
    """The name "rows" of the environment changes no rewards."""

    def evaluated(agent, env, episodes):
        judge(lambda obs: agent.sample_actions(scaling.obs(obs).numpy(), temperature=0.0))
        return {"return": 0.0}

    writer = SimpleNamespace(add_scalar=stand_ins.nothing, flush=stand_ins.nothing)
    stand_ins.put_all(rows)
    stand_ins.put("tensorboardX", SummaryWriter=lambda *_, **__: writer)
    stand_ins.put("wrappers", EpisodeMonitor=lambda env: env, SinglePrecision=lambda env: env)
    stand_ins.put("evaluation", evaluate=evaluated)
    theirs |= dict.fromkeys(("actor_lr", "value_lr", "critic_lr"), ours.lr)
    theirs["hidden_dims"] = (ours.hidden,) * ours.layers
    theirs["dropout_rate"] = ours.dropout or None
    flags = {
        "env_name": "rows",
        "seed": ours.seed,
        "batch_size": ours.batch_size,
        "tqdm": False,
        "max_steps": ours.steps,
        "eval_interval": ours.eval_every,
        "log_interval": ours.steps + 1,
    }
    np.random.seed(ours.seed)
    sys.path.insert(0, str(path.parent))
    put_jax()
    with tempfile.TemporaryDirectory() as place:
        config = Path(place, "settings.py")
        config.write_text(CONFIG.format(theirs))
        flags |= {"config": config, "save_dir": place}
        sys.argv = [str(path), *(f"--{name}={value}" for name, value in flags.items())]
        runpy.run_path(str(path), run_name="__main__")


def described(args, ours, data, task) -> dict:
    """config.json."""
    settings = {"data": data.digest, "program": stand_ins.commit(args.checkout)}
    for x in {"torch", "gymnasium", "mujoco", "jax"} & sys.modules.keys():
        settings[f"version of {x}"] = importlib.metadata.version(x)
    settings["until"] = args.until
    settings["code of train.py"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    settings |= {name: x for name, x in vars(ours).items() if name not in CONTROL}
    return {
        "algorithm": args.program,
        "args": vars(ours),
        "settings": settings,
        "task": task["env_id"],
        "machine": "cpu",
    }


def main(args, words):
    program = PROGRAMS[args.program]
    ours, theirs = settings(program, words, args.until)
    path = Path(args.checkout, program.file).resolve()
    require(path.is_file(), f"--checkout {args.checkout}: there is no {program.file}")
    name = "-".join(filter(None, (args.program, ours.name)))
    folder = Path(ours.out, f"{ours.env.replace('/', '-')}__{name}__{ours.seed}")
    if summary_of(folder) and not ours.overwrite:
        print(f"{folder} is finished: --overwrite trains it again")
        return
    torch.set_float32_matmul_precision(ours.precision)
    torch.set_flush_denormal(True)
    data, task = load(ours.env)
    run = run_corl
    if program.ours == "td3_bc":
        data.reward += ours.reward_shift
    else:
        run = run_iql
        importlib.import_module("iql").scale_rewards(data, ours)
        if ours.normalize_obs:
            normalize_obs(data, eps=1e-3)
    rows = {name: getattr(data, x).numpy() for name, x in ROWS.items()}
    found, scaling = [], Scaling(data)
    until = args.until or ours.steps
    judge = judge_of(ours, task, scaling, found, until)
    with contextlib.suppress(SystemExit):
        run(path, rows, theirs, judge, ours, scaling)
    scores = [row["score"] for row in found]
    require(
        len(scores) == until // ours.eval_every,
        f"{path.name} left before its last step: use the commit of --help",
    )
    folder.mkdir(parents=True, exist_ok=True)
    references = {"data": score(task, data.episode_return.numpy())}
    count = 1 if "antmaze" in ours.env else 10  # as run.py
    summary = {"score": np.mean(scores[-count:]), "references": references}
    config = described(args, ours, data, task)
    pd.DataFrame(found).to_csv(folder / "eval.csv", index=False)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "summary.json").write_text(json.dumps(summary, indent=2))
    print(folder, summary)


if __name__ == "__main__":
    main(*tyro.cli(Args, description=__doc__, return_unknown_args=True))

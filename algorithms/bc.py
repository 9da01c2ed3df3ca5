"""Behavior cloning, BC, and best-X% BC: the baseline of every comparison.

Idea: regress the data's actions on its observations. With --top, only the episodes of highest
return are imitated.

    L_pi = E[ (pi(s) - a)^2 ]                                                (deterministic)
    L_pi = E[ -log N(a; pi(s), sigma) ]                                      (--gaussian)

pi(s) is a network that ends in tanh. The deviation sigma is learned, is the same in every state,
and lies in [exp(-5), exp(2)]. In the first form, the mean is over batch and action dimensions; the
log-density of the second is a sum over dimensions. Both act by pi(s), and neither uses rewards,
next states or terminals.

With --top 0.1 this is 10% BC: episodes are ranked by their undiscounted return, and the best tenth
of them, but at least one episode, is kept whole.

What changes scores (more in DEPARTURES, at the foot of the file):
- There is no paper; the reference is the BC of CORL, a library of offline RL.
- With --top, the episodes that are ranked are the data's own. Those of CORL begin and end some rows
  later, because CORL drops rows before it counts them.
- In AntMaze, --top does not keep whole recordings, because every row at the goal ends an episode.

    python algorithms/bc.py  # 20k steps: 38.6 ± 3.9, hopper-medium-expert-demo, 3 seeds
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import BatchSize, Count, Positive, PositiveShare, Seed
from common import MLP, Adam, RunArgs, Scaling
from common import glorot_, graphed, minimize, normal_log_prob, normalize_obs, sample


@dataclass
class Args(RunArgs):
    env: str = "hopper-medium-expert-demo"
    """dataset: bundled, D4RL or OGBench name, Minari id, or path of an .hdf5 or .npz file"""
    seed: Seed = 0
    """seeds networks, batches and evaluation"""
    steps: Count = 1_000_000
    """gradient steps"""
    batch_size: BatchSize = 256
    """transitions per gradient step"""
    eval_every: Count = 5_000
    """gradient steps between evaluations"""
    top: PositiveShare = 1.0
    """share of the episodes that are cloned, best returns first; 1 is plain BC"""
    gaussian: bool = False
    """maximize a Gaussian's likelihood instead of minimizing the squared error"""
    lr: Positive = 3e-4
    """Adam's learning rate of the actor"""
    hidden: Count = 256
    """hidden units in each layer"""
    layers: Count = 2
    """hidden layers"""
    gelu: bool = False
    """GELU instead of ReLU, and OGBench's initial values instead of PyTorch's"""
    normalize_obs: bool = True
    """shift and scale observations to mean 0 and deviation 1 over the cloned data"""


class Nets(nn.Module):
    """Every network; losses and optimizers live outside."""

    def __init__(self, data, args):
        super().__init__()
        obs_dim, act_dim = data.obs.shape[1], data.action.shape[1]
        self.scaling = Scaling(data)
        hidden, activation = [args.hidden] * args.layers, "gelu" if args.gelu else "relu"
        self.actor = MLP(obs_dim, *hidden, act_dim, activation=activation)
        if args.gelu:
            glorot_(self.actor)
            self.actor.weights[-1].data.mul_(0.1)
        self.log_std = nn.Parameter(torch.zeros(act_dim))


def keep_best(data, top):
    """Keep the max(1, top E) episodes of highest return in `data`, in their order, renumbered."""
    keep = max(1, int(top * len(data.episode_return)))
    ranking = data.episode_return.argsort(descending=True)
    best = ranking[:keep].sort().values
    rows = torch.isin(data.episode, best)
    for name in ("obs", "action", "reward", "next_obs", "terminal", "episode"):
        kept = getattr(data, name)[rows]
        setattr(data, name, kept)
    data.episode = torch.searchsorted(best, data.episode)
    data.episode_return = data.episode_return[best]


def actor_loss(nets, s, a, args):
    """The squared error, or the Gaussian's negative log-likelihood."""
    mean = nets.actor(s).tanh()
    if args.gaussian:
        log_std = nets.log_std.clamp(-5, 2)
        log_prob = normal_log_prob(a, mean, log_std).sum(-1)  # (B,)
        return -log_prob.mean()
    return (mean - a).square().mean()


def update(nets, opt, data, args):
    """One step of the actor."""
    s, a = sample(data, args.batch_size, ("obs", "action"))
    pi_loss = actor_loss(nets, s, a, args)
    minimize(opt.actor, pi_loss)
    return {"pi_loss": pi_loss.detach()}


def policy(nets, obs, args):
    """Raw observations (B, S) to deterministic actions (B, A) in the task's bounds."""
    a = nets.actor(nets.scaling.obs(obs)).tanh()
    return nets.scaling.action(a)


def train(run, data, args):
    """Train on `data`; `run` logs, evaluates and saves."""
    keep_best(data, args.top)
    if args.normalize_obs:
        normalize_obs(data, eps=1e-3)
    nets = Nets(data, args).to(run.device)
    params = list(nets.actor.parameters())
    if args.gaussian:
        params.append(nets.log_std)
    opt = SimpleNamespace(actor=Adam(params, args.lr))
    run.start(nets, opt)
    step = graphed(update, nets, opt, data, args, compile=args.compile)
    for t in run.loop(args.steps):
        metrics = step()
        run.after(t, metrics, lambda obs: policy(nets, obs, args))


DEPARTURES = """
The authors' code, against the paper:
- There is no paper, so the reference is the BC of CORL, a library of offline RL.

This file, against the authors' code:
- Episodes end where the data marks their end. CORL first drops the last row of every episode that a
  time limit ended, and then counts 1,000 rows for such an episode. So its episodes begin one row
  later for every such episode before them, and the unfinished episode at the end of the data is
  lost.
- CORL's BC has no --gaussian. It is the policy of IQL, here without IQL's weights.
- In AntMaze, --top does not keep whole recordings, and neither does CORL's ranking. A recording
  goes on after the goal is reached, and every row at the goal is a terminal row, which ends an
  episode. So each further row at the goal is an episode of one row. Its return of 1 is the best
  there is, and the ranking cannot tell it from the path that led to the goal.
- On OGBench's tasks, which CORL does not have, the networks are those of the other methods in
  FQL's table 3 (4 layers of 512 units, GELU), and observations are not normalized. FQL's repository
  has no BC, so nothing more is known of the settings behind that table's column BC.
"""

OGBENCH = dict(hidden=512, layers=4, gelu=True, normalize_obs=False)
OGBENCH |= dict(eval_every=100_000, eval_episodes=50)

PRESETS = {
    "hopper-medium-expert-demo": dict(steps=20_000, eval_every=1_000),  # shortened
    "hopper-replay-demo": dict(steps=20_000, eval_every=1_000),  # shortened
    "pointmaze-stitch-demo": dict(steps=20_000, eval_every=1_000, eval_episodes=20),  # shortened
    "antmaze-*": dict(eval_every=100_000, eval_episodes=100),
    "D4RL/antmaze/*": dict(eval_every=100_000, eval_episodes=100),
    **dict.fromkeys(  # the names of FQL's table 3, all five tasks of each
        [
            f"{data}-singletask*"
            for data in ("antmaze-large-navigate", "antmaze-giant-navigate")
            + ("humanoidmaze-medium-navigate", "humanoidmaze-large-navigate")
            + ("antsoccer-arena-navigate", "cube-single-play", "cube-double-play", "scene-play")
            + ("puzzle-3x3-play", "puzzle-4x4-play")
        ],
        OGBENCH,
    ),
    "short *-singletask*": dict(steps=100_000, eval_every=20_000, eval_episodes=50, hidden=128),
}

if __name__ == "__main__":
    from run import main

    main(Args, PRESETS, train)

"""ReBRAC (Tarasov, Kurenkov, Nikulin & Kolesnikov, NeurIPS 2023; arXiv:2305.09836).

Idea: TD3+BC with the improvements that later methods brought. Cloning is a penalty not only in the
actor's loss but also in the critics' target, with a weight of its own; networks have one layer
more; critics have layer normalization; batches are larger; gamma is larger where rewards are
sparse.

    y    = r + gamma (1 - terminal) (min_i Q'_i(s', a') - critic_bc |a' - a'_data|^2),  (target)
           a' = clip(pi'(s') + clip(noise, -c, c), -1, 1)
    L_Q  = E[ sum_i (Q_i(s,a) - y)^2 ]                                      (critics)
    L_pi = E[ actor_bc |pi(s) - a|^2 - q_weight min_i Q_i(s, pi(s)) ],      (actor)
           q_weight = 1 / mean |min_i Q_i(s, pi(s))|, detached

The target networks are pi' and Q'_i, and a'_data is the action that the data takes at s'. The noise
is Gaussian with the standard deviation --policy-noise, and c is --noise-clip. Both squared
distances are sums over the A action dimensions. critic_bc is in units of reward; actor_bc is not,
because `q_weight` scales Q to unit size in L_pi. For both, a larger number means more cloning.

The actor and all targets are updated on the first step and on every `policy_freq`-th step after it.
On such a step, the target critics follow the updated critics, and the target actor follows the
actor from before its update.

With --actor-layers 2 --critic-layers 2 --no-critic-ln --critic-bc 0 this is what the paper runs as
TD3+BC. It differs from td3_bc.py in three ways: the actor's loss takes the minimum over the
critics, the initial weights are different, and observations are not normalized. An alpha of
td3_bc.py corresponds to an actor_bc of 1 / (alpha A) here.

What changes scores (more in DEPARTURES, at the foot of the file):
- AntMaze's learning rates, and critic_bc for hopper-medium and hopper-expert, are those of the
  authors' code. The paper's tables have other numbers.
- A row without a next action is dropped unless it is terminal. Where an episode is cut and no flag
  marks it, as in medium-replay, the authors take the first action of the next episode instead.
- The authors publish actor_bc and critic_bc for D4RL's data only. On your own data the default of
  0.01 for both is only a starting point.

    python algorithms/rebrac.py  # 16k steps: 61.7 ± 1.2, hopper-medium-expert-demo, 3 seeds
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import BatchSize, Count, NonNegative, Positive, PositiveShare, Seed, ShareBelow1
from common import MLP, Adam, Data, InputError, RunArgs, ScalarMLP, Scaling
from common import glorot_, graphed, largest_value, minimize, normalize_obs, polyak, sample


@dataclass
class Args(RunArgs):
    env: str = "hopper-medium-expert-demo"
    """dataset: bundled, D4RL or OGBench name, Minari id, or path of an .hdf5 or .npz file"""
    seed: Seed = 0
    """seeds networks, batches and evaluation"""
    steps: Count = 1_000_000
    """gradient steps"""
    batch_size: BatchSize = 1024
    """transitions per gradient step"""
    eval_every: Count = 5_000
    """gradient steps between evaluations"""
    actor_bc: NonNegative = 0.01
    """weight of cloning in the actor's loss: 0 is no cloning, a large number is behavior cloning"""
    critic_bc: NonNegative = 0.01
    """weight of cloning in the critics' target, in units of reward: 0 is TD3's target"""
    gamma: ShareBelow1 = 0.99
    """discount"""
    polyak: PositiveShare = 0.005
    """share of the online networks that targets take over per policy step"""
    actor_lr: Positive = 1e-3
    """Adam's learning rate of the actor"""
    critic_lr: Positive = 1e-3
    """Adam's learning rate of the critics"""
    policy_noise: NonNegative = 0.2
    """standard deviation of the noise that smooths the target action"""
    noise_clip: NonNegative = 0.5
    """bound c to which the noise of the target action is clipped: 0 is no noise"""
    policy_freq: Count = 2
    """critic steps per step of actor and targets; 1 is no delay"""
    hidden: Count = 256
    """hidden units in each layer of every network"""
    actor_layers: Count = 3
    """hidden layers of the actor"""
    critic_layers: Count = 3
    """hidden layers of every critic"""
    gelu: bool = False
    """GELU instead of ReLU, and OGBench's initial values instead of the authors'"""
    critic_ln: bool = True
    """layer normalization in the critics, after the activation of every hidden layer"""
    normalize_obs: bool = False
    """shift and scale observations to mean 0 and deviation 1 over the data"""
    reward_scale: Positive = 1.0
    """multiplies every reward"""


class Nets(nn.Module):
    """Every network and its target; losses and optimizers live outside."""

    def __init__(self, data, args):
        super().__init__()
        obs_dim, act_dim = data.obs.shape[1], data.action.shape[1]
        actor_hidden = [args.hidden] * args.actor_layers
        critic_hidden = [args.hidden] * args.critic_layers
        activation = "gelu" if args.gelu else "relu"
        self.scaling = Scaling(data)
        self.actor = MLP(obs_dim, *actor_hidden, act_dim, activation=activation)
        self.q = ScalarMLP(
            obs_dim + act_dim,
            *critic_hidden,
            members=2,
            activation=activation,
            layer_norm=args.critic_ln,
            norm_eps=1e-6,
        )
        if args.gelu:
            glorot_(self.actor)
            glorot_(self.q)
            self.actor.weights[-1].data.mul_(0.1)
        else:
            initial_values_(self.actor, 1e-3)
            initial_values_(self.q, 3e-3)
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)
        self.q_target = copy.deepcopy(self.q).requires_grad_(False)


@torch.no_grad()
def initial_values_(net, last):
    """The authors' initial values: hidden biases of 0.1, a last layer uniform in [-last, last]."""
    for b in net.biases:
        b.fill_(0.1)
    net.weights[-1].uniform_(-last, last)
    net.biases[-1].uniform_(-last, last)


@dataclass
class Transitions(Data):
    """Rows of the data, each with the action that the data takes next."""

    next_action: Tensor = None  # (N, A), 0 at terminal rows, where y does not depend on it


def with_next_actions(data):
    """The rows of `data` that another row of the same episode follows, each with the action of that
    row, and the terminal rows."""
    known = F.pad(data.episode[1:] == data.episode[:-1], (0, 1))
    action = data.action.roll(-1, 0).masked_fill(~known.unsqueeze(1), 0.0)
    keep = known | (data.terminal == 1)
    dropped = int((~keep).sum())
    if dropped == len(keep):
        raise InputError("no row has a next action: store the rows of an episode one after another")
    if dropped:
        print(f"note: no next action follows {dropped:,} of {len(keep):,} rows, dropped")
    rows = {"next_action": action[keep]}
    for name in ("obs", "action", "reward", "next_obs", "terminal", "episode"):
        rows[name] = getattr(data, name)[keep]
    return Transitions(**(vars(data) | rows))


def critic_loss(nets, s, a, r, s2, terminal, next_a, args):
    """L_Q and its target y: sum over critics of the mean over the batch. Also the mean of Q."""
    with torch.no_grad():
        noise = torch.randn_like(a) * args.policy_noise
        noise = noise.clamp(-args.noise_clip, args.noise_clip)
        a2 = nets.actor_target(s2).tanh() + noise
        a2 = a2.clamp(-1, 1)
        distance = (a2 - next_a).square().sum(-1)  # (B,)
        v2 = nets.q_target(s2, a2).amin(0) - args.critic_bc * distance
        y = r + args.gamma * (1 - terminal) * v2
    q = nets.q(s, a)  # (E, B)
    loss = (q - y).square().mean(1).sum()
    return loss, q.detach().mean()


def actor_loss(nets, s, a, args):
    """L_pi: cloning, and the smaller of both critics, scaled to unit size. Also returns the cloning
    loss, the weight of Q, and the actions."""
    pi = nets.actor(s).tanh()
    q = nets.q(s, pi).amin(0)  # (B,)
    q_weight = 1 / q.detach().abs().mean()
    bc_loss = (pi - a).square().sum(-1).mean()
    loss = args.actor_bc * bc_loss - q_weight * q.mean()
    return loss, bc_loss.detach(), q_weight, pi.detach()


def update(nets, opt, data, args, policy_step):
    """One step of the critics and, when `policy_step` is true, of the actor and all targets."""
    fields = ("obs", "action", "reward", "next_obs", "terminal", "next_action")
    s, a, r, s2, terminal, next_a = sample(data, args.batch_size, fields)
    q_loss, q_mean = critic_loss(nets, s, a, r, s2, terminal, next_a, args)
    minimize(opt.q, q_loss)
    metrics = {"q_loss": q_loss.detach(), "q_mean": q_mean}
    if not policy_step:
        return metrics
    pi_loss, bc_loss, q_weight, pi = actor_loss(nets, s, a, args)
    polyak(nets.q_target, nets.q, args.polyak)
    polyak(nets.actor_target, nets.actor, args.polyak)  # before the actor's step, as the authors do
    minimize(opt.actor, pi_loss)
    return metrics | {
        "pi_loss": pi_loss.detach(),
        "bc_loss": bc_loss,
        "q_weight": q_weight,
        "saturated_actions": (pi.abs() > 0.99).float().mean(),
    }


def q(nets, s, a):
    """The value (2, B) of every critic at scaled states s (B, S), actions a (B, A) in [-1, 1]."""
    return nets.q(s, a)


def policy(nets, obs, args):
    """Raw observations (B, S) to deterministic actions (B, A) in the task's bounds."""
    a = nets.actor(nets.scaling.obs(obs)).tanh()
    return nets.scaling.action(a)


def train(run, data, args):
    """Train on `data`; `run` logs, evaluates and saves."""
    data = with_next_actions(data)
    data.reward *= args.reward_scale
    if args.normalize_obs:
        normalize_obs(data, eps=1e-3)
    nets = Nets(data, args).to(run.device)
    opt = SimpleNamespace(
        q=Adam(nets.q.parameters(), args.critic_lr),
        actor=Adam(nets.actor.parameters(), args.actor_lr),
    )
    # an action number is in [-1, 1], so the square of a difference is at most 4
    largest_penalty = args.critic_bc * 4 * data.action.shape[1]
    run.start(nets, opt, q_mean=largest_value(data, args.gamma, largest_penalty))
    step = graphed(update, nets, opt, data, args, compile=args.compile)
    for t in run.loop(args.steps):
        policy_step = (t - 1) % args.policy_freq == 0
        metrics = step(policy_step)
        run.after(t, metrics, lambda obs: policy(nets, obs, args))


DEPARTURES = """
The authors' code, against the paper:
- On AntMaze the learning rates are 3e-4 for the actor and 5e-5 for the critics; the paper's table
  has 1e-4 for both.
- critic_bc is 0.01 for hopper-medium and 0.1 for hopper-expert; the paper's table has 0.001 for
  both. WEIGHTS below has the values of the code.

This file, against the authors' code:
- A row without a next action is dropped unless it is terminal, as in the authors' code. They drop
  the last row of an episode that a time limit ended, but they read its action first, as the next
  action of the row before it. Where our loader has dropped that last row, its action is unknown, so
  the row before it is dropped, too: one row more in each such episode.
- Where an episode is cut and no flag marks it, as in medium-replay, the authors take the first
  action of the next episode as the next action. Here the row before the cut is dropped. The cut is
  recognized by this row's next observation, which differs from the observation of the following
  row.
- The authors publish actor_bc and critic_bc for D4RL's data only. The defaults, 0.01 and 0.01, are
  the pair that they use most often. The values for Maze2D are CORL's. Minari's datasets take the
  values of the D4RL datasets of the same name, and its point mazes those of Maze2D.
- On OGBench's tasks, the settings are those of FQL's table 3: 4 layers of 512 units, GELU, rates
  of 3e-4. The ReBRAC in FQL's repository differs from this file: one Adam for all networks also
  moves the actor on the steps without L_pi; L_pi and the targets take the critics from before their
  step; the policy is updated on even steps; and the last row of a recording takes the first action
  of the next one. The two weights of antsoccer are those of the paper's table of fine-tuning.
"""

WEIGHTS = {  # (actor_bc, critic_bc) of the authors' configurations, by Minari's namespace
    "mujoco": {
        "halfcheetah-random": (0.001, 0.1),
        "halfcheetah-medium": (0.001, 0.01),
        "halfcheetah-expert": (0.01, 0.01),
        "halfcheetah-medium-expert": (0.01, 0.1),
        "halfcheetah-medium-replay": (0.01, 0.001),
        "halfcheetah-full-replay": (0.001, 0.1),
        "hopper-random": (0.001, 0.01),
        "hopper-medium": (0.01, 0.01),
        "hopper-expert": (0.1, 0.1),
        "hopper-medium-expert": (0.1, 0.01),
        "hopper-medium-replay": (0.05, 0.5),
        "hopper-full-replay": (0.01, 0.01),
        "walker2d-random": (0.01, 0.0),
        "walker2d-medium": (0.05, 0.1),
        "walker2d-expert": (0.01, 0.5),
        "walker2d-medium-expert": (0.01, 0.01),
        "walker2d-medium-replay": (0.05, 0.01),
        "walker2d-full-replay": (0.01, 0.01),
    },
    "D4RL": {
        "antmaze-umaze": (0.003, 0.002),
        "antmaze-umaze-diverse": (0.003, 0.001),
        "antmaze-medium-play": (0.001, 0.0005),
        "antmaze-medium-diverse": (0.001, 0.0),
        "antmaze-large-play": (0.002, 0.001),
        "antmaze-large-diverse": (0.002, 0.002),
        "pen-human": (0.1, 0.5),
        "pen-cloned": (0.05, 0.5),
        "pen-expert": (0.01, 0.01),
        "door-human": (0.1, 0.1),
        "door-cloned": (0.01, 0.1),
        "door-expert": (0.05, 0.01),
        "hammer-human": (0.01, 0.5),
        "hammer-cloned": (0.1, 0.5),
        "hammer-expert": (0.01, 0.01),
        "relocate-human": (0.1, 0.01),
        "relocate-cloned": (0.1, 0.01),
        "relocate-expert": (0.05, 0.01),
    },
}
SMALL = dict(batch_size=256, actor_lr=3e-4, critic_lr=3e-4)  # the authors' rates for small batches
MAZE2D = SMALL | dict(actor_bc=0.003, critic_bc=0.001)
ANTMAZE = dict(batch_size=256, actor_lr=3e-4, critic_lr=5e-5, gamma=0.999, reward_scale=100.0)
OGBENCH = SMALL | dict(hidden=512, actor_layers=4, critic_layers=4, gelu=True)
OGBENCH |= dict(eval_every=100_000, eval_episodes=50)
SHORT = SMALL | dict(steps=16_000, eval_every=800)  # for a CPU

# on the tests' bandit cloning outweighs Q
CLONING = dict(actor_bc=1000.0, actor_lr=3e-4, hidden=256)

PRESETS = {
    **dict.fromkeys(("pen-*", "door-*", "hammer-*", "relocate-*"), SMALL),
    **dict.fromkeys(("D4RL/pen/*", "D4RL/door/*", "D4RL/hammer/*", "D4RL/relocate/*"), SMALL),
    "antmaze-*": ANTMAZE | dict(eval_every=50_000, eval_episodes=100),
    "D4RL/antmaze/*": ANTMAZE | dict(eval_every=50_000, eval_episodes=100),
    "maze2d-*": MAZE2D | dict(eval_episodes=100),
    "D4RL/pointmaze/*": MAZE2D | dict(eval_episodes=100),
    **{  # every row of WEIGHTS twice: under D4RL's name and under Minari's
        pattern: dict(actor_bc=actor_bc, critic_bc=critic_bc)
        for space, rows in WEIGHTS.items()
        for name, (actor_bc, critic_bc) in rows.items()
        for pattern in (f"{name}-v*", f"{space}/{name.replace('-', '/', 1)}-v*")
    },
    "hopper-medium-expert-demo": SHORT  # with more cloning, faster targets, normalized observations
    | dict(actor_bc=0.4, critic_bc=0.01, polyak=0.01, normalize_obs=True),
    "hopper-replay-demo": SHORT  # with faster targets and normalized observations
    | dict(actor_bc=0.05, critic_bc=0.5, polyak=0.02, normalize_obs=True)
    | dict(steps=40_000, eval_every=2_000),
    "pointmaze-stitch-demo": SHORT  # with faster targets
    | dict(actor_bc=0.003, critic_bc=0.001, polyak=0.02)
    | dict(steps=12_000, eval_every=600, eval_episodes=20),
    # The names of FQL's table 3, all five tasks of each, and what --short adds.
    "antmaze-large-navigate-singletask*": OGBENCH | dict(actor_bc=0.003, critic_bc=0.01),
    "antmaze-giant-navigate-singletask*": OGBENCH
    | dict(actor_bc=0.003, critic_bc=0.01, gamma=0.995),
    "humanoidmaze-medium-navigate-singletask*": OGBENCH
    | dict(actor_bc=0.01, critic_bc=0.01, gamma=0.995),
    "humanoidmaze-large-navigate-singletask*": OGBENCH
    | dict(actor_bc=0.01, critic_bc=0.01, gamma=0.995),
    "antsoccer-arena-navigate-singletask*": OGBENCH
    | dict(actor_bc=0.01, critic_bc=0.01, gamma=0.995),
    "cube-single-play-singletask*": OGBENCH | dict(actor_bc=1.0, critic_bc=0.0),
    "cube-double-play-singletask*": OGBENCH | dict(actor_bc=0.1, critic_bc=0.0),
    "scene-play-singletask*": OGBENCH | dict(actor_bc=0.1, critic_bc=0.01),
    "puzzle-3x3-play-singletask*": OGBENCH | dict(actor_bc=0.3, critic_bc=0.01),
    "puzzle-4x4-play-singletask*": OGBENCH | dict(actor_bc=0.3, critic_bc=0.01),
    "short *-singletask*": dict(steps=100_000, eval_every=20_000, eval_episodes=50, hidden=128),
}

if __name__ == "__main__":
    from run import main

    main(Args, PRESETS, train)

"""SAC+BC: the AC+BC actor of S. Park's lecture notes "Offline RL" on SAC (arXiv:1812.05905).

Idea: SAC, with behavior cloning added to the actor's loss and Q scaled to unit size, so that one
number trades return against staying close to the data. The cloning term is the forward divergence
KL(data, pi) (8): the data's log-likelihood under SAC's own stochastic actor.

    y    = r + gamma (min_i Q'_i(s',a') - temperature log pi(a'|s'))         (SAC target)
    L_Q  = E[ sum_i (Q_i(s,a) - y)^2 ]                                      (SAC critics)
    L_pi = E[ weight (temperature log pi(a~|s) - min_i Q_i(s,a~)) - alpha_bc log pi(a|s) ],  (9)
           weight = 1 / mean |min_i Q_i(s,a~)|, detached
    L_T  = temperature (E[-log pi(a~|s)] + A)                               (SAC temperature)

a' and a~ are samples of the tanh-Gaussian pi, a~ with its gradient; the target's entropy term is
off unless --backup-entropy. alpha_bc -> 0 is SAC, alpha_bc -> infinity is maximum likelihood. It
is inverse to TD3+BC's alpha: with the std fixed at 1, TD3+BC is alpha_bc = 2 / (alpha A).

The default of alpha_bc is ours. With the std fitted, cloning pulls back over a distance d by
alpha_bc d / (std^2 + d^2) per dimension (std: the data's), TD3+BC by 2 d / (alpha A). Near the
data they agree at alpha_bc = 2 std^2 / (alpha A), but a likelihood lets go: its pull is never
above alpha_bc / (2 std). At std 0.3 and A = 3, alpha_bc = 0.1 resists any pull of Q that moves
TD3+BC (alpha = 2.5) by less than 0.6.

Departures: the notes have neither entropy nor `weight`, which is TD3+BC's; it scales all of SAC's
loss, so the temperature stays in units of Q. SAC itself keeps the target's entropy term. The
log-std's bounds are ours. AntMaze's reward shift of -1 is CORL's. Ours, off by default:
--dequantize, for data with many actions exactly at a bound, where log pi grows without limit.

    python algorithms/sac_bc.py --env hopper-medium-v2  # no flags: 21 ± 1, 3 seeds, 4 min
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import (
    MLP,
    Adam,
    ScalarMLP,
    Scaling,
    dequantize,
    graphed,
    load_dataset,
    minimize,
    normalize_obs,
    parse,
    polyak,
    sample,
    sample_tanh_normal,
    share_at_bounds,
    tanh_normal_log_prob,
)
from experiment import Run


@dataclass
class Args:
    env: str = "hopper-replay-demo"
    """dataset: bundled name, D4RL name, Minari id, or path of an .hdf5 or .npz file"""
    seed: int = 0
    """seeds networks, batches and evaluation"""
    steps: int = 1_000_000
    """gradient steps"""
    batch_size: int = 256
    """transitions per gradient step"""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one"""
    precision: str = "auto"
    """fp32 products: highest, high, medium, or auto: the fastest that does not round"""
    compile: bool = False
    """compile the whole update: faster after half a minute"""
    eval_every: int = 5_000
    """gradient steps between evaluations"""
    eval_episodes: int = 10
    """episodes per evaluation"""
    eval_env: str | None = None
    """Gymnasium id to evaluate in; None: the dataset's own task; "none": no evaluation"""
    log_every: int = 1_000
    """gradient steps between rows of train.csv"""
    save_every: int = 50_000
    """gradient steps between checkpoints"""
    out: str = "runs"
    """folder of all runs"""
    name: str = ""
    """suffix of the run's folder, tells variants apart"""
    resume: bool = False
    """continue this run from its checkpoint"""
    overwrite: bool = False
    """replace this run's folder"""
    track: bool = False
    """mirror the logs to Weights & Biases"""

    alpha_bc: float = 0.1
    """weight of cloning against Q (Eq. 9): 0 is SAC, infinity is behavior cloning"""
    backup_entropy: bool = False
    """subtract temperature log pi(a'|s') in the target, as SAC does online"""
    dequantize: float = 0.0
    """width of the band inside the bounds over which actions exactly at a bound are spread"""
    gamma: float = 0.99
    """discount"""
    polyak: float = 0.005
    """share of the online critics that targets take over per step"""
    lr: float = 3e-4
    """Adam's learning rate: actor, critics and temperature"""
    critics: int = 2
    """critics whose minimum is the target's and the actor's Q"""
    normalize_obs: bool = True
    """shift and scale observations to mean 0, deviation 1 over the data"""
    reward_shift: float = 0.0
    """added to every reward"""


PRESETS = {
    "hopper-replay-demo": dict(steps=30_000, eval_every=3_000),  # shortened
    "antmaze-*": dict(reward_shift=-1.0, eval_every=100_000, eval_episodes=100),
    "D4RL/antmaze/*": dict(reward_shift=-1.0, eval_every=100_000, eval_episodes=100),
}


class Nets(nn.Module):
    """Every network and its target; losses and optimizers live outside."""

    def __init__(self, data, args):
        super().__init__()
        obs_dim, act_dim = data.obs.shape[1], data.action.shape[1]
        self.scaling = Scaling(data)
        self.actor = MLP(obs_dim, 256, 256, 2 * act_dim)
        self.q = ScalarMLP(obs_dim + act_dim, 256, 256, members=args.critics)
        self.q_target = copy.deepcopy(self.q).requires_grad_(False)
        self.log_temperature = nn.Parameter(torch.zeros(()))

    def pi(self, s):
        """Mean and log-std (B, A) of the actor's tanh-Gaussian."""
        mean, log_std = self.actor(s).chunk(2, -1)
        return mean, log_std.clamp(-5, 2)  # likelihoods of repeated actions have no limit


def critic_loss(nets, s, a, r, s2, terminal, args):
    """SAC target and critics; sum over critics of the mean over the batch."""
    with torch.no_grad():
        a2, log_prob, _ = sample_tanh_normal(*nets.pi(s2))
        v2 = nets.q_target(s2, a2).amin(0)  # (B,)
        if args.backup_entropy:
            v2 = v2 - nets.log_temperature.exp() * log_prob
        y = r + args.gamma * (1 - terminal) * v2  # (B,)
    q = nets.q(s, a)  # (E, B)
    return (q - y).square().mean(1).sum(), q.detach().mean()


def actor_loss(nets, s, a, args):
    """Eq. 9: SAC's loss scaled to unit Q, plus the data's negative log-likelihood (8)."""
    mean, log_std = nets.pi(s)
    pi, log_prob, _ = sample_tanh_normal(mean, log_std)
    q = nets.q(s, pi).amin(0)  # (B,)
    weight = 1 / q.detach().abs().mean()
    sac_loss = (nets.log_temperature.exp().detach() * log_prob - q).mean()
    a = dequantize(a, args.dequantize)
    bc_loss = -tanh_normal_log_prob(a, mean, log_std, clip=1e-6).mean()
    loss = weight * sac_loss + args.alpha_bc * bc_loss
    return loss, bc_loss.detach(), weight, pi.detach(), -log_prob.detach().mean()


def temperature_loss(nets, entropy, act_dim):
    """SAC's temperature: grows while the mean entropy is below its target -A."""
    return nets.log_temperature.exp() * (entropy + act_dim)


def update(nets, opt, data, args):
    """One step of the critics, the actor, the temperature and the targets."""
    s, a, r, s2, terminal = sample(data, args.batch_size)
    loss, q_mean = critic_loss(nets, s, a, r, s2, terminal, args)
    metrics = {"q_loss": minimize(opt.q, loss), "q_mean": q_mean}
    loss, bc_loss, weight, pi, entropy = actor_loss(nets, s, a, args)
    metrics |= {"actor_loss": minimize(opt.actor, loss), "bc_loss": bc_loss, "weight": weight}
    metrics["saturated_actions"] = (pi.abs() > 0.99).float().mean()
    minimize(opt.temperature, temperature_loss(nets, entropy, a.shape[1]))
    metrics |= {"entropy": entropy, "temperature": nets.log_temperature.detach().exp()}
    polyak(nets.q_target, nets.q, args.polyak)
    return metrics


def policy(nets, obs, args):
    """Raw observations (B, S) to deterministic actions (B, A) in the task's bounds."""
    return nets.scaling.action(nets.pi(nets.scaling.obs(obs))[0].tanh())


def train(args):
    """Train, log and save; returns the mean score of the last 10 evaluations."""
    run = Run(args)
    data, task = load_dataset(args.env, run.device, args.eval_env)
    data.reward += args.reward_shift
    if args.normalize_obs:
        normalize_obs(data, eps=1e-3)
    nets = Nets(data, args).to(run.device)
    opt = SimpleNamespace(
        q=Adam(nets.q.parameters(), args.lr),
        actor=Adam(nets.actor.parameters(), args.lr),
        temperature=Adam([nets.log_temperature], args.lr),
    )
    run.start(data, task, nets, opt)
    share_at_bounds(data, args.dequantize)
    step = graphed(update, nets, opt, data, args, compile=args.compile)
    for t in run.loop(args.steps):
        run.after(t, step(), lambda obs: policy(nets, obs, args))
    return run.finish()


if __name__ == "__main__":
    train(parse(Args, PRESETS))

"""Fisher-BRC (Kostrikov, Tompson, Fergus & Nachum, ICML 2021; arXiv:2103.08050).

Idea: write the critic as an offset plus the log-density of the behavior policy, and keep the
offset flat in the action, so that outside the data the density alone decides.

    mu(a|s): 5 tanh-Gaussians per action dimension, by maximum likelihood with an entropy floor -A
    Q_i(s,a) = O_i(s,a) + log mu(a|s)                                        (5)
    J(Q)     = sum_i E[ (r + bonus + gamma min_j Q'_j(s',a') - Q_i(s,a))^2 ] (2)
    L_O      = J(O + log mu) + lambda E_{a~pi} sum_i |grad_a O_i(s,a)|^2     (7)
    L_pi     = E_{a~pi}[ temperature log pi(a|s) - min_i Q_i(s,a) ]          (SAC; gradient is 6)

The penalty (7) is the Fisher divergence between exp(Q) and mu (11), under pi in exp(Q)'s place.
a' ~ pi(s') carries no entropy term; the temperature is SAC's, with target entropy -A.

Departures from the paper, as in the authors' code: a mixture per action dimension ("mixture of
Gaussians"), a clone of two hidden layers (three), a bonus of 5 added to the reward (the derivation
gives half of that), Adam's epsilon of 1e-7, as in Keras. Ours: clone and actor start from their own
random seeds, so a cached clone changes nothing; rows cut by a time limit are kept where the data
has their next observation (D4RL's loader drops them); AntMaze, which neither has, is without bonus:
it would pay for never reaching the goal; --dequantize, off by default, for data with many actions
exactly at a bound, where log mu grows without limit.

On the bundled dataset, one thread: 45, 22, 40 on seeds 0, 1, 2 (data 11; BC 12, 9, 5). Two idle
cores take 4 minutes and round otherwise: 32 on seed 0. The preset was chosen among six on it.

    python algorithms/fisher_brc.py
"""

import copy
import math
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
    InputError,
    ScalarMLP,
    Scaling,
    dequantize,
    graphed,
    load_dataset,
    minimize,
    normal_log_prob,
    orthogonal_,
    parse,
    polyak,
    sample,
    sample_tanh_normal,
    share_at_bounds,
    tanh_log_det,
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

    lam: float = 0.1
    """weight lambda of the gradient penalty (Eq. 7): 0 frees the offset, infinity is cloning"""
    bonus: float = 5.0
    """added to every reward: above 0 it pays for survival where episodes can end early"""
    offset: bool = True
    """write Q as O + log mu (Eq. 5); without it Q is O alone (the paper's figure 5)"""
    penalty_actions: str = "policy"
    """where the penalty is taken: policy (Eq. 7) or data (the reverse divergence)"""
    dequantize: float = 0.0
    """width of the band inside the bounds over which actions exactly at a bound are spread"""
    gamma: float = 0.99
    """discount"""
    polyak: float = 0.005
    """share of the online critics that targets take over per step"""
    lr: float = 3e-4
    """Adam's learning rate: actor, critics and temperature"""
    components: int = 5
    """tanh-Gaussians per action dimension of the clone"""
    bc_steps: int = 1_000_000
    """gradient steps of the clone, before all others"""
    bc_lr: float = 1e-3
    """its learning rate, and its entropy weight's; divided by 10 after 80% and 90% of bc_steps"""


PRESETS = {
    "*": dict(eval_every=10_000),
    "hopper-replay-demo": dict(  # shortened; faster targets need the stronger penalty
        bc_steps=12_000, steps=18_000, eval_every=1_000, polyak=0.01, lam=1.0
    ),
    "antmaze-*": dict(bonus=0.0, eval_every=100_000, eval_episodes=100),
    "D4RL/antmaze/*": dict(bonus=0.0, eval_every=100_000, eval_episodes=100),
}

MAX_X = math.atanh(1 - 1e-6)  # log mu is clipped at |a| = 1 - 1e-6 (authors' code): flat beyond


class Nets(nn.Module):
    """Every network and its target; losses and optimizers live outside."""

    def __init__(self, data, args):
        super().__init__()
        obs_dim, act_dim = data.obs.shape[1], data.action.shape[1]
        self.scaling, self.components = Scaling(data), args.components
        self.behavior = MLP(obs_dim, 256, 256, 3 * act_dim * args.components)
        self.actor = MLP(obs_dim, 256, 256, 256, 2 * act_dim)
        self.offset = ScalarMLP(obs_dim + act_dim, 256, 256, 256, members=2)
        for net in (self.behavior, self.actor, self.offset):
            orthogonal_(net, hidden_gain=math.sqrt(2), last_gain=0.01)
        self.offset_target = copy.deepcopy(self.offset).requires_grad_(False)
        self.log_temperature = nn.Parameter(torch.zeros(()))
        self.log_bc_weight = nn.Parameter(torch.zeros(()))

    def mu(self, s):
        """Log-weights, means and log-stds of the clone, each (K, B, A)."""
        out = self.behavior(s).view(len(s), 3, self.components, -1)
        logits, mean, log_std = out.permute(1, 2, 0, 3).contiguous()
        return logits.log_softmax(0), mean, log_std.clamp(-20, 2)

    def pi(self, s):
        """Mean and log-std (B, A) of the actor's tanh-Gaussian."""
        mean, log_std = self.actor(s).chunk(2, -1)
        return mean, log_std.clamp(-20, 2)


def pre_tanh(a, args):
    """x of the data's actions; an action at a bound, where mu has no density, is spread inward."""
    return torch.atanh(dequantize(a, args.dequantize).clamp(-1 + 1e-6, 1 - 1e-6))


def log_mu(mixture, x):
    """log mu(tanh(x)|s), (..., B), of x (..., B, A): dimensions are independent mixtures."""
    log_weight, mean, log_std = mixture
    x = x.clamp(-MAX_X, MAX_X)
    log_components = log_weight + normal_log_prob(x.unsqueeze(-3), mean, log_std)
    return (log_components.logsumexp(-3) - tanh_log_det(x)).sum(-1)


def sample_mu(mixture):
    """x (B, A) with tanh(x) ~ mu; the gradient reaches the chosen component's mean and std only."""
    log_weight, mean, log_std = mixture
    u = torch.rand_like(mean[:1])
    k = (log_weight.detach().exp().cumsum(0) < u).sum(0, keepdim=True).clamp(max=len(mean) - 1)
    mean, log_std = mean.gather(0, k).squeeze(0), log_std.gather(0, k).squeeze(0)
    return mean + log_std.exp() * torch.randn_like(mean)


def behavior_loss(nets, s, a, args):
    """Clone of mu: likelihood, plus weighted entropy. Also returns both, means over the batch."""
    mixture = nets.mu(s)
    x = torch.stack([pre_tanh(a, args), sample_mu(mixture)])  # (2, B, A)
    nll, entropy = -log_mu(mixture, x).mean(1)
    loss = nll - nets.log_bc_weight.exp().detach() * entropy
    return loss, nll.detach(), entropy.detach()


def target_value(nets, s2, r, terminal, a2, log_mu2, args):
    """y of Eq. 2, without entropy; log mu is 0 without the offset form."""
    q2 = nets.offset_target(s2, a2).amin(0) + log_mu2  # min_j Q'_j = min_j O'_j + log mu
    return r + args.bonus + args.gamma * (1 - terminal) * q2  # (B,)


def gradient_penalty(nets, s, a):
    """Eq. 7, second term: sum over critics of E |grad_a O_i(s,a)|^2."""
    grad = nets.offset.input_gradient(s, a)[..., s.shape[1] :]  # (2, B, A): one per critic
    return grad.square().sum(-1).mean(1).sum()


def actor_loss(nets, s, a_pi, log_prob, log_mu_pi):
    """SAC's actor on Q = O + log mu; its gradient in the action is Eq. 6."""
    q = nets.offset(s, a_pi).amin(0) + log_mu_pi
    return (nets.log_temperature.exp().detach() * log_prob - q).mean()


def entropy_weight_loss(log_weight, entropy, act_dim):
    """SAC's temperature: grows while the mean entropy is below its target -A."""
    return log_weight.exp() * (entropy + act_dim)


def update_behavior(nets, opt, data, args):
    """One step of the clone and of its entropy weight."""
    s, a = sample(data, args.batch_size, ("obs", "action"))
    loss, nll, entropy = behavior_loss(nets, s, a, args)
    minimize(opt.behavior, loss)
    minimize(opt.bc_weight, entropy_weight_loss(nets.log_bc_weight, entropy, a.shape[1]))
    return {"nll": nll, "entropy": entropy, "weight": nets.log_bc_weight.detach().exp()}


def update(nets, opt, data, args):
    """One step of Algorithm 1: critics, targets, actor, temperature."""
    s, a, r, s2, terminal = sample(data, args.batch_size)
    pi = nets.pi(s)  # before its step; shared by the penalty's and the actor's samples
    with torch.no_grad():
        a2, _, x2 = sample_tanh_normal(*nets.pi(s2))
        a_penalty = a if args.penalty_actions == "data" else sample_tanh_normal(*pi)[0]
        mixture, mixture2 = (nets.mu(s), nets.mu(s2)) if args.offset else (None, None)
        log_mu2 = log_mu(mixture2, x2) if args.offset else 0.0
        log_mu_data = log_mu(mixture, pre_tanh(a, args)) if args.offset else torch.zeros_like(r)
        y = target_value(nets, s2, r, terminal, a2, log_mu2, args)
    o = nets.offset(s, a)  # (2, B); the critics are o + log mu (Eq. 5)
    td_loss = (o + log_mu_data - y).square().mean(1).sum()
    penalty = gradient_penalty(nets, s, a_penalty)
    minimize(opt.offset, td_loss + args.lam * penalty)
    polyak(nets.offset_target, nets.offset, args.polyak)

    a_pi, log_prob, x_pi = sample_tanh_normal(*pi)
    log_mu_pi = log_mu(mixture, x_pi) if args.offset else torch.zeros_like(r)
    loss = minimize(opt.actor, actor_loss(nets, s, a_pi, log_prob, log_mu_pi))
    entropy = -log_prob.detach().mean()
    minimize(opt.temperature, entropy_weight_loss(nets.log_temperature, entropy, a.shape[1]))
    return {
        "td_loss": td_loss.detach(),
        "penalty": penalty.detach(),
        "actor_loss": loss,
        "q_data": (o.detach() + log_mu_data).mean(),
        "o_data": o.detach().mean(),
        "target": y.mean(),
        "log_mu_data": log_mu_data.mean(),
        "log_mu_pi": log_mu_pi.detach().mean(),
        "entropy": entropy,
        "temperature": nets.log_temperature.detach().exp(),
        "abs_action": a_pi.detach().abs().mean(),
    }


def behavior_policy(nets, obs, args):
    """The clone's most likely component per dimension, in the task's bounds."""
    log_weight, mean, _ = nets.mu(nets.scaling.obs(obs))
    best = mean.gather(0, log_weight.argmax(0, keepdim=True)).squeeze(0)
    return nets.scaling.action(best.tanh())


def policy(nets, obs, args):
    """Raw observations (B, S) to deterministic actions (B, A) in the task's bounds."""
    return nets.scaling.action(nets.pi(nets.scaling.obs(obs))[0].tanh())


def train_behavior(run, nets, opt, data, args):
    """Phase one: clone the behavior policy, or read the clone of an earlier run."""
    saturated = share_at_bounds(data, args.dequantize)
    settings = args.bc_steps, args.bc_lr, args.batch_size, args.components, args.dequantize
    clone, cached = run.cached("clone", nets.behavior, *settings)
    step = graphed(update_behavior, nets, opt, data, args, compile=args.compile)
    for t in run.loop(0 if cached else args.bc_steps, phase="behavior"):
        decay = 0.1 ** ((t > 0.8 * args.bc_steps) + (t > 0.9 * args.bc_steps))
        opt.behavior.lr.fill_(args.bc_lr * decay)
        opt.bc_weight.lr.fill_(args.bc_lr * decay)
        run.after(t, step() | {"saturated_actions": saturated})
        if t == args.bc_steps:
            run.share(clone, nets.behavior)
    run.reference("its clone (BC)", lambda obs: behavior_policy(nets, obs, args))


def train(args):
    """Train, log and save; returns the mean score of the last 10 evaluations."""
    if args.penalty_actions not in ("policy", "data"):
        raise InputError(f"--penalty-actions is {args.penalty_actions!r}: give policy or data")
    run = Run(args)
    data, task = load_dataset(args.env, run.device, args.eval_env)
    nets = Nets(data, args).to(run.device)
    opt = SimpleNamespace(
        behavior=Adam(nets.behavior.parameters(), args.bc_lr, eps=1e-7),
        bc_weight=Adam([nets.log_bc_weight], args.bc_lr, eps=1e-7),
        offset=Adam(nets.offset.parameters(), args.lr, eps=1e-7),
        actor=Adam(nets.actor.parameters(), args.lr, eps=1e-7),
        temperature=Adam([nets.log_temperature], args.lr, eps=1e-7),
    )
    run.start(data, task, nets, opt)
    if args.offset:
        train_behavior(run, nets, opt, data, args)
    step = graphed(update, nets, opt, data, args, compile=args.compile)
    for t in run.loop(args.steps):
        run.after(t, step(), lambda obs: policy(nets, obs, args))
    return run.finish()


if __name__ == "__main__":
    train(parse(Args, PRESETS))

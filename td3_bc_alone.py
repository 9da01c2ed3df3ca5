"""TD3+BC (Fujimoto & Gu, NeurIPS 2021; arXiv:2106.06860): offline reinforcement learning on one
page. This file needs PyTorch, Gymnasium, tyro, tqdm and a dataset, and nothing else.

Idea: TD3, with behavior cloning added to the actor's loss and Q scaled to unit size, so that one
number trades return against staying close to the data.

    y    = r + gamma (1 - terminal) min_i Q'_i(s', a'),                      (TD3 target)
           a' = clip(pi'(s') + clip(noise, -c, c), -1, 1)
    L_Q  = E[ sum_i (Q_i(s,a) - y)^2 ]                                      (TD3 critics)
    L_pi = E[ -q_weight Q_1(s, pi(s)) + (pi(s) - a)^2 ],                    (TD3+BC actor)
           q_weight = alpha / mean |Q_1(s, pi(s))|, detached

A prime marks the target networks. It computes the numbers of algorithms/td3_bc.py, to the last
digit on a CPU, and leaves out what is convenient there: names of public datasets, checks of the
data, checkpoints, compilation.

    python td3_bc_alone.py --env data/hopper-medium-expert-demo.npz
"""

import copy
import csv
import importlib
import json
import math
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import numpy as np
import torch
import tyro
from torch import nn
from tqdm import tqdm


@dataclass
class Args:
    env: str = "data/hopper-medium-expert-demo.npz"
    """dataset: path of an .npz file with D4RL's keys"""
    seed: int = 0
    """seeds networks, batches and evaluation"""
    steps: int = 25_000
    """gradient steps; the paper has 1,000,000"""
    batch_size: int = 256
    """transitions per gradient step"""
    eval_every: int = 1_250
    """gradient steps between evaluations; the paper has 5,000"""
    eval_episodes: int = 10
    """episodes per evaluation"""
    log_every: int = 1_000
    """gradient steps between rows of train.csv"""
    alpha: float = 2.5
    """weight of Q against cloning: 0 is behavior cloning, a large number is TD3"""
    gamma: float = 0.99
    """discount"""
    polyak: float = 0.005
    """share of the online networks that targets take over per policy step"""
    lr: float = 3e-4
    """Adam's learning rate of the actor and the critics"""
    policy_noise: float = 0.2
    """standard deviation of the noise that smooths the target action"""
    noise_clip: float = 0.5
    """bound c to which the noise of the target action is clipped"""
    policy_freq: int = 2
    """critic steps per step of actor and targets"""
    reward_shift: float = 0.0
    """added to every reward"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cpu or cuda"""
    out: str = "runs"
    """folder that holds the folders of all runs"""


# ---- the data --------------------------------------------------------------------------------


def load(path):
    """Transitions s, a, r, s2, terminal of a file, and its task. A time limit is no terminal: the
    last row of an episode that it ended has its next observation in final_observations."""
    file = np.load(path, allow_pickle=False)
    task = json.loads(file["metadata"].item())
    s, a, r, terminal = (
        torch.as_tensor(file[key].astype(np.float32))
        for key in ("observations", "actions", "rewards", "terminals")
    )
    end = torch.as_tensor(file["terminals"] | file["timeouts"])
    final = file["final_observations"].astype(np.float32)
    s2 = s.roll(-1, 0)
    s2[end] = torch.as_tensor(final)
    return (s, a, r, s2, terminal), task


# ---- networks and losses ---------------------------------------------------------------------


class MLP(nn.Module):
    """Fully connected layers of the widths `sizes` with ReLU between them, (B, in) -> (B, out).
    Each is initialized as nn.Linear is. `members` networks run as one batched product per layer,
    (B, in) -> (E, B, out)."""

    def __init__(self, *sizes, members=None):
        super().__init__()
        lead, row = ((members,), (1,)) if members else ((), ())
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for n_in, n_out in zip(sizes, sizes[1:]):
            for params, shape in ((self.weights, (n_in,)), (self.biases, row)):
                w = torch.empty(*lead, *shape, n_out).uniform_(-1, 1) / math.sqrt(n_in)
                params.append(nn.Parameter(w))

    def forward(self, *inputs, member=None):
        """`member`: this one of the networks alone."""
        x = torch.cat(inputs, -1)
        for i, (w, b) in enumerate(zip(self.weights, self.biases)):
            if member is not None:
                w, b = w[member], b[member, 0]
            if w.ndim == 2:
                x = torch.addmm(b, x, w)
            else:
                x = torch.baddbmm(b, x.expand(len(w), *x.shape[-2:]), w)
            if i < len(self.weights) - 1:
                x = x.relu()
        return x


class ScalarMLP(MLP):
    """One output and no last axis: (B, in) -> (E, B), or with `member` (B,)."""

    def forward(self, *inputs, member=None):
        return super().forward(*inputs, member=member).squeeze(-1)


def critic_loss(q, q_target, actor_target, batch, args):
    """TD3 target and critics. Also returns the mean of Q."""
    s, a, r, s2, terminal = batch
    with torch.no_grad():
        noise = torch.randn_like(a) * args.policy_noise
        noise = noise.clamp(-args.noise_clip, args.noise_clip)
        a2 = actor_target(s2).tanh() + noise
        a2 = a2.clamp(-1, 1)
        q2 = q_target(s2, a2).amin(0)  # (B,)
        y = r + args.gamma * (1 - terminal) * q2
    values = q(s, a)  # (E, B)
    loss = (values - y).square().mean(1).sum()
    return loss, values.detach().mean()


def actor_loss(actor, q, s, a, args):
    """TD3+BC actor, which uses the first critic only. Also returns what train.csv shows of it."""
    pi = actor(s).tanh()
    values = q(s, pi, member=0)  # (B,)
    q_weight = args.alpha / values.detach().abs().mean()
    bc_loss = (pi - a).square().mean()
    loss = -q_weight * values.mean() + bc_loss
    return loss, {
        "bc_loss": bc_loss,
        "q_weight": q_weight,
        "saturated_actions": (pi.abs() > 0.99).float().mean(),
    }


def step(optimizer, loss):
    """One step of Adam on its own parameters; no other network gathers gradients."""
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def polyak(target, online, rate):
    """target <- rate * online + (1 - rate) * target, in place."""
    targets = list(target.parameters())
    torch._foreach_lerp_(targets, list(online.parameters()), rate)


# ---- evaluation ------------------------------------------------------------------------------


def make(task):
    if "Maze" in task["env_id"]:
        gymnasium.register_envs(importlib.import_module("gymnasium_robotics"))
    return gymnasium.make(task["env_id"], **task["env_kwargs"])


def flat(obs):
    """An observation as one row of numbers, a dictionary's in the order of its sorted keys."""
    if isinstance(obs, dict):
        obs = np.concatenate([obs[key] for key in sorted(obs)])
    return np.asarray(obs, np.float32)


@torch.no_grad()
def evaluate(act, envs, seed):
    """Undiscounted returns (n,) of one episode in each of n environments."""
    obs = np.stack([flat(env.reset(seed=seed + i)[0]) for i, env in enumerate(envs)])
    returns = np.zeros(len(envs))
    running = set(range(len(envs)))
    while running:
        actions = act(torch.as_tensor(obs)).cpu().numpy()
        for i in sorted(running):
            state, reward, terminal, timeout, _ = envs[i].step(actions[i])
            obs[i] = flat(state)
            returns[i] += reward
            if terminal or timeout:
                running.remove(i)
    return returns


def score(task, returns):
    """100 x the share of returns above 0 in a maze that ends at its goal; else 100 x the mean
    position between the returns of a random policy (0) and an expert (1)."""
    if task["env_kwargs"].get("continuing_task") is False:
        return 100 * np.mean(returns > 0)
    low, high = task["ref_min_score"], task["ref_max_score"]
    return 100 * np.mean((returns - low) / (high - low))


# ---- the run ---------------------------------------------------------------------------------


def write(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[-1])
        writer.writeheader()
        writer.writerows(rows)


def main(args):
    folder = Path(args.out, f"{Path(args.env).stem}__td3_bc_alone__{args.seed}")
    folder.mkdir(parents=True)
    torch.set_flush_denormal(True)  # Adam's moments decay into subnormals, which are slow
    torch.manual_seed(args.seed)
    data, task = load(args.env)
    s, a, r, s2, terminal = (x.to(args.device) for x in data)
    envs = [make(task) for _ in range(args.eval_episodes)]

    # Observations get mean 0 and deviation 1, actions lie in [-1, 1].
    columns = [x.double() for x in s.T]
    mean = torch.stack([x.mean() for x in columns]).float()
    std = torch.stack([x.std(correction=0) + 1e-3 for x in columns]).float()
    s = (s - mean) / std
    s2 = (s2 - mean) / std
    r = r + args.reward_shift
    low, high = (
        torch.tensor(task[key], device=args.device) for key in ("action_low", "action_high")
    )
    if (low != -1).any() or (high != 1).any():
        a = (a - low) / (high - low) * 2 - 1

    obs_dim, act_dim = s.shape[1], a.shape[1]
    actor = MLP(obs_dim, 256, 256, act_dim).to(args.device)
    q = ScalarMLP(obs_dim + act_dim, 256, 256, 1, members=2).to(args.device)
    actor_target, q_target = copy.deepcopy(actor), copy.deepcopy(q)
    lr = torch.tensor(args.lr)
    q_opt = torch.optim.Adam(q.parameters(), lr, fused=True)
    actor_opt = torch.optim.Adam(actor.parameters(), lr, fused=True)

    def act(obs):
        """Raw observations (n, S) to actions (n, A) in the task's bounds."""
        obs = (obs.to(args.device) - mean) / std
        center, half_range = (high + low) / 2, (high - low) / 2
        return center + half_range * actor(obs).tanh()

    train_rows, eval_rows, metrics = [], [], {}
    begun = time.monotonic()
    torch.manual_seed(zlib.crc32(f"train {args.seed}".encode()))
    for t in tqdm(range(1, args.steps + 1)):
        i = torch.randint(len(s), (args.batch_size,), device=args.device)
        batch = [x[i] for x in (s, a, r, s2, terminal)]
        q_loss, q_mean = critic_loss(q, q_target, actor_target, batch, args)
        step(q_opt, q_loss)
        metrics |= {"q_loss": q_loss, "q_mean": q_mean}
        if t % args.policy_freq == 0:
            pi_loss, details = actor_loss(actor, q, *batch[:2], args)
            step(actor_opt, pi_loss)
            polyak(q_target, q, args.polyak)
            polyak(actor_target, actor, args.polyak)
            metrics |= {"pi_loss": pi_loss} | details

        row = {"step": t, "seconds": f"{time.monotonic() - begun:.2f}"}
        if t % args.log_every == 0 or t == args.steps:
            train_rows.append(row | {key: x.item() for key, x in metrics.items()})
            write(folder / "train.csv", train_rows)
        if t % args.eval_every == 0 or t == args.steps:
            returns = evaluate(act, envs, seed=1000 * args.seed + 100)
            row["return"] = returns.mean()
            row["score"] = score(task, returns)
            eval_rows.append(row | {f"episode_{i}": x for i, x in enumerate(returns)})
            write(folder / "eval.csv", eval_rows)
            tqdm.write(f"{t:,}: score {row['score']:.1f}")
    torch.save(actor.state_dict(), folder / "actor.pt")
    scores = [row["score"] for row in eval_rows[-10:]]
    print(f"td3_bc_alone score {np.mean(scores):.1f} | {folder}")


if __name__ == "__main__":
    main(tyro.cli(Args))

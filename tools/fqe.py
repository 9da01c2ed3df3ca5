"""Fitted Q evaluation (FQE; Le, Voloshin & Yue, ICML 2019; arXiv:1903.08738): the discounted return
of a policy, estimated from recorded data alone.

The policy's Q is trained on the data's transitions with

    L_Q = E[ (r + gamma (1 - terminal) Q'(s', pi(s')) - Q(s,a))^2 ]

and read at the first states of the data's episodes; where a recording has holes, the states after
them are no first states. The policy that recorded the data is judged in the same way: its pi(s') is
the action that the data have next, so that both numbers have the same horizon, which goes on beyond
time limits.

Five networks are trained. Each one learns from its own draw of the episodes, with replacement, and
is read at the start states of that draw. The estimate is their mean, and the 95% interval is their
standard deviation times Student's 2.78. With the same seed, every policy gets the same draws,
batches and initial weights, so the interval of a difference of two policies is narrower than those
of the two. The interval shows how much another log of the same size would change the estimate.
Where a policy leaves the data, all five networks may be wrong together: read the notes, and
docs/selection.md for how often the interval held the truth.

Two things keep the number right for rewards of any size. Q is b + unit * network, where b is the
constant that solves the equation above best, and unit is the root mean square of the discounted
returns that are left. And targets are kept inside what the data's rewards allow.
"""

import copy
import itertools
import math
import sys
from dataclasses import dataclass

import torch
from tqdm import tqdm

from common import Adam, InputError, ScalarMLP, minimize, polyak

MEMBERS, STUDENT = 5, 2.78  # Student's t for 95% and four degrees of freedom
FASTEST = 0.1  # share of the way that a target goes in one step


@torch.no_grad()
def in_chunks(act, obs, rows: int = 10_000):
    """What `act` returns (N, ...) for observations (N, S), computed `rows` at a time."""
    return torch.cat([act(part) for part in obs.split(rows)])


def recorded_episodes(data):
    """The number (N,) of each row's episode as it was recorded, holes and all. A recording that is
    one episode has the parts between its holes instead."""
    whole = data.recording
    return data.episode if whole is None or whole[-1] == 0 else whole


def first_rows(data):
    """The index (E,) of the first row of every recorded episode."""
    episode = recorded_episodes(data)
    return torch.searchsorted(episode, torch.arange(int(episode[-1]) + 1))


def last_rows(data):
    """Whether a row (N,) is the last one of its episode, or the last one before a hole."""
    return torch.cat([data.episode[1:] != data.episode[:-1], torch.ones(1, dtype=torch.bool)])


def actions_of(data, act):
    """Actions of a policy (raw observations to actions within the bounds) as the data have them, in
    [-1, 1]: at the rows' next states (N, A) and at the rows themselves (N, A)."""
    center = (data.action_high + data.action_low) / 2
    half = (data.action_high - data.action_low) / 2
    return [(in_chunks(act, x) - center) / half for x in (data.next_obs, data.obs)]


def recorded_actions(data):
    """`actions_of` for the policy that recorded the data. What it did after an episode's last row
    is not known (NaN), and does not matter where the task itself ended."""
    follows = data.episode[1:] == data.episode[:-1]
    after = torch.full_like(data.action, math.nan)
    after[:-1][follows] = data.action[1:][follows]
    after[data.terminal > 0] = 0
    return after, data.action


def interval(members) -> list[float]:
    """The 95% interval of an estimate, from the five networks' values (5,)."""
    x = torch.as_tensor(members)
    width = STUDENT * x.std()
    return [float(x.mean() - width), float(x.mean() + width)]


def returns_left(reward, weight, last):
    """sum_k (the product of weights up to k) reward_k from every row (N,) to its episode's end."""
    left, total = [], 0.0
    for r, w, end in zip(*(x.flip(0).tolist() for x in (reward, weight, last))):
        total = r if end else r + w * total
        left.append(total)
    return torch.tensor(left, dtype=torch.double).flip(0)


def recorded_return(data, gamma: float) -> float | None:
    """Mean discounted return of the data's episodes, or None where a time limit cuts one off."""
    if not data.terminal[last_rows(data)].all():
        return None
    left = returns_left(data.reward, gamma * (1 - data.terminal), last_rows(data))
    return float(left[first_rows(data)].mean())


def draw_episodes(episodes: int):
    """A draw (5, E) of E episodes, with replacement, for each network; each leaves one out."""
    while True:
        draws = torch.randint(episodes, (MEMBERS, episodes))
        if all(len(draw.unique()) < episodes for draw in draws):
            return draws


@dataclass
class Problem:
    """A policy's Bellman equation on the data's N rows, as the networks take it: Q is
    b + unit * network."""

    x: torch.Tensor  # (N, S + A) states and actions
    x2: torch.Tensor  # (N, S + A) next states and the policy's actions there
    x0: torch.Tensor  # (E, S + A) start states and the policy's actions there
    reward: torch.Tensor  # (N,) of (Q - b) / unit
    go_on: torch.Tensor  # (N,) gamma, or 0 at a terminal
    known: torch.Tensor  # (N,) whether the policy's action at the next state is known
    b: float
    unit: float
    low: float  # the values that the data's rewards allow, of (Q - b) / unit
    high: float

    def y(self, q_target, i, member=None):
        """The targets of rows i, for all networks or one."""
        y = self.reward[i] + self.go_on[i] * q_target(self.x2[i], member=member)
        return y.clamp(self.low, self.high)


def problem(data, actions, gamma: float) -> Problem:
    """The equation of a policy whose `actions` are those of `actions_of`."""
    after, action = actions
    known = after.isfinite().all(1)
    go_on = gamma * (1 - data.terminal.double())
    reward = data.reward.double()
    b = reward[known].sum() / (1 - go_on[known]).sum()
    low = min(reward.min(), 0) / (1 - gamma)
    high = max(reward.max(), 0) / (1 - gamma)
    reward = reward - (1 - go_on) * b
    left = returns_left(reward, go_on, last_rows(data))
    unit = left.square().mean().sqrt() + 1e-9 * b.abs() + 1e-30

    first = first_rows(data)
    mean, std = data.obs.mean(0), data.obs.std(0) + 1e-3
    s, s2 = (data.obs - mean) / std, (data.next_obs - mean) / std
    return Problem(
        torch.cat([s, data.action], 1),
        torch.cat([s2, after.nan_to_num()], 1),
        torch.cat([s[first], action[first]], 1),
        (reward / unit).float(),
        go_on.float(),
        known,
        float(b),
        float(unit),
        float((low - b) / unit),
        float((high - b) / unit),
    )


def estimate(data, actions, gamma: float, steps: int, seed: int, name: str) -> dict:
    """FQE of a policy whose `actions` are those of `actions_of`. Returns its value, the values of
    the five networks, their interval, the root-mean-square TD error on the rows of the episodes
    that a network did not see, the spread of the returns, and the share of the horizon that the
    steps leave uncovered. Raises InputError."""
    episode = recorded_episodes(data)
    episodes = int(episode[-1]) + 1
    if episodes < 2:
        raise InputError(f"{data.name} is one episode, none can be held out: --fqe-steps 0")
    torch.manual_seed(seed)
    draws = draw_episodes(episodes)
    counts = torch.stack([draw.bincount(minlength=episodes) for draw in draws])
    counts = counts[:, episode]  # (5, N)
    one = problem(data, actions, gamma)
    speed = target_speed(gamma, steps)
    pause = 0.1 if sys.stderr.isatty() else 30  # seconds between two states of the bar
    bar = tqdm(range(steps), desc=f"FQE of {name}", mininterval=pause)
    q_target = train(one, counts, speed, bar)
    with torch.no_grad():
        values = one.b + one.unit * q_target(one.x0).double()  # (5, E)
        members = values.gather(1, draws).mean(1)
        errors = []
        for k, count in enumerate(counts):
            held_out = torch.nonzero((count == 0) & one.known).squeeze(1)
            for i in held_out.split(10_000):
                errors.append(q_target(one.x[i], member=k) - one.y(q_target, i, k))
    return {
        "fqe": float(members.mean()),
        "fqe_interval": interval(members),
        "fqe_members": members.tolist(),
        "td_error": one.unit * float(torch.cat(errors).square().mean().sqrt()),
        "fqe_unit": one.unit,
        "uncovered": math.exp(-speed * (1 - gamma) * steps),
    }


def train(one: Problem, counts, speed: float, steps, batch_size: int = 128, lr: float = 3e-3):
    """Train five networks, each on rows drawn as often as its `counts` (5, N) say; returns their
    targets. The learning rate falls to 0. With ReLU instead of SiLU, they follow the noise of small
    logs (docs/selection.md)."""
    q = ScalarMLP(one.x.shape[1], 64, 64, members=MEMBERS, activation="silu")
    q_target = copy.deepcopy(q).requires_grad_(False)
    opt = Adam(q.parameters(), lr)
    drawn = [torch.arange(len(one.x)).repeat_interleave(count) for count in counts]
    for t in steps:
        opt.lr.fill_(lr * (1 - t / len(steps)))
        i = torch.stack([rows[torch.randint(len(rows), (batch_size,))] for rows in drawn])
        error = q(one.x[i]) - one.y(q_target, i)  # (5, B)
        loss = one.known[i] * error.square()
        minimize(opt, loss.mean(1).sum())
        polyak(q_target, q, speed)
    return q_target


def target_speed(gamma: float, steps: int) -> float:
    """The share of the way that targets go in one step. After n steps, exp(-n (1 - gamma) speed) of
    the horizon is uncovered: 1%, or more where the steps are few."""
    return min(FASTEST, max(0.005, math.log(100) / ((1 - gamma) * max(steps, 1))))


def compare(data, acts: dict, gamma: float, steps: int, seed: int) -> list[dict]:
    """FQE of the data's own policy, then of every policy of `acts`, {name: raw observations to
    actions within the bounds}, with its difference from the data's. Raises InputError."""
    own = estimate(data, recorded_actions(data), gamma, steps, seed, "the data")
    found = [own | {"recorded_return": recorded_return(data, gamma)}]
    for name, act in acts.items():
        actions = actions_of(data, act)
        x = estimate(data, actions, gamma, steps, seed, name) | {"fqe_steps": steps}
        x["minus_data"], x["minus_data_interval"] = difference(x, own)
        x |= {f"data_{key}": own[key] for key in ("fqe", "fqe_interval")}
        x["action_distance"] = float((actions[1] - data.action).square().mean().sqrt())
        found.append(x)
    return found


def difference(x: dict, y: dict):
    """How much more FQE finds for x than for y, and its 95% interval."""
    members = torch.tensor(x["fqe_members"]) - torch.tensor(y["fqe_members"])
    return float(members.mean()), interval(members)


def notes(ranked: list[dict], data) -> list[str]:
    """Where FQE is not to be trusted, one line each, for policies in FQE's order, best first."""
    lines, ends = [], bool(data.terminal.any())
    reward = float(data.reward.square().mean().sqrt())
    for x in ranked:
        # With no terminals, a constant added to all rewards changes no comparison and no size.
        what, size = ("a reward", reward) if ends else ("the returns' spread", x["fqe_unit"])
        if x["td_error"] > size:
            lines.append(
                f"{x['run']}: the TD error on held-out transitions, {x['td_error']:.3g}, is as "
                f"large as {what}, {size:.3g}, so FQE may be far off: test the policy first"
            )
    if (share := ranked[0]["uncovered"]) > 0.02:
        lines.append(
            f"the steps leave {share:.0%} of the horizon uncovered: use more --fqe-steps or a "
            "smaller --gamma"
        )
    own = next(i for i, x in enumerate(ranked) if "minus_data" not in x)
    for i, j in itertools.combinations(range(len(ranked)), 2):
        x, y = ranked[i], ranked[j]
        gap, (low, high) = difference(x, y)
        if low <= 0 and (j == i + 1 or own in (i, j)):
            lines.append(
                f"FQE cannot tell {x['run']} from {y['run']}: the interval of their difference, "
                f"{low:.3g} to {high:.3g}, is as wide as the difference, {gap:.3g}, or wider"
            )
    return [f"note: {line}" for line in lines]

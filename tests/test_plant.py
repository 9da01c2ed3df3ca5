"""From the log of a plant to a decision: FQE ranks four controllers and the operators as the plant
itself does, or a note warns. docs/selection.md tells the trial."""

import numpy as np
import pytest
import torch

from run import rows
from tools import fqe

LOW, HIGH = np.array([0.0, 600, 0]), np.array([100.0, 1800, 15])  # a valve, a pump, a heater
REST, SCALE = np.array([75.0, 2.5, 4, 30]), np.array([8.0, 0.6, 0.5, 6])  # of four sensors
GAMMA, LIMIT = 0.98, 100
IMPROVEMENTS = {"small step": 0.5, "large step": 1.5}  # towards the goal


class Plant:
    """A drawn plant: z' = A z + B u - 0.03 z^3 + noise, with a profit that is largest at a goal."""

    def __init__(self, rng):
        a = rng.normal(size=(4, 4)) + 2 * np.eye(4)
        self.a = a * rng.uniform(0.85, 0.94) / np.abs(np.linalg.eigvals(a)).max()
        self.b = 0.12 * rng.normal(size=(4, 3))
        self.goal = 0.3 * rng.normal(size=4)

    def step(self, z, u, rng):
        """States (n, 4) and actions (n, 3) in [-1, 1] to profits (n,) and the next states."""
        profit = 6 - 3 * np.square(z - self.goal).sum(1) - np.square(u).sum(1)
        noise = 0.08 * rng.normal(size=z.shape)
        return profit, z @ self.a.T + u @ self.b.T - 0.03 * z**3 + noise

    def returns(self, act, rng, episodes=3_000, length=400):
        """The mean discounted return of act(z, the noise of an operator's hand)."""
        z, hand, total = 0.6 * rng.normal(size=(episodes, 4)), 0.0, 0.0
        for t in range(length):
            hand = 0.5 * hand + 0.2 * rng.normal(size=(episodes, 3))
            profit, z = self.step(z, act(z, hand), rng)
            total += GAMMA**t * profit.mean()
        return total


def linear(z, w):
    return np.clip(z @ w[:4] + w[4], -1, 1)


def log_of(plant, operators, rng, episodes=500):
    """A log in the README's format: a time limit, and holes in a seventh of the episodes."""
    n = episodes
    z, hand = 0.6 * rng.normal(size=(n, 4)), 0.0
    operator = operators[rng.integers(len(operators), size=n)]  # (n, 5, 3)
    hole = np.where(rng.random(n) < 0.15, rng.integers(10, 80, n), LIMIT)
    steps = []
    for t in range(LIMIT):
        hand = 0.5 * hand + 0.2 * rng.normal(size=(n, 3))
        u = np.clip(np.einsum("ni,nij->nj", z, operator[:, :4]) + operator[:, 4] + hand, -1, 1)
        profit, z2 = plant.step(z, u, rng)
        end = (t == LIMIT - 1) | (t == hole - 1)
        steps.append((REST + SCALE * z, u, profit, REST + SCALE * z2, np.broadcast_to(end, n)))
        z = z2
    t = np.arange(LIMIT)
    kept = ((t < hole[:, None]) | (t >= hole[:, None] + 10)).ravel()
    obs, u, profit, next_obs, end = (
        np.stack(x, 1).reshape(n * LIMIT, -1)[kept] for x in zip(*steps)
    )
    arrays = dict(observations=obs, actions=(LOW + HIGH) / 2 + (HIGH - LOW) / 2 * u)
    arrays |= dict(next_observations=next_obs, rewards=profit[:, 0], timeouts=end[:, 0])
    arrays = {key: x.astype(np.float32) for key, x in arrays.items()}
    arrays["terminals"] = np.zeros(len(obs), bool)
    arrays["episode"] = np.repeat(np.arange(n), LIMIT)[kept]
    return rows(arrays, dict(action_low=LOW, action_high=HIGH), "log", "cpu")


def judged(seed):
    """(ranked as fqe.notes takes it, notes, the true return of every policy)."""
    rng = np.random.default_rng(seed)
    plant = Plant(rng)
    sense = np.vstack([-plant.b, plant.goal @ plant.b])  # towards the goal
    habits = rng.normal(size=(3, 5, 3)) * np.array([0.12] * 4 + [0.2])[:, None]
    operators = habits + 0.5 * sense
    data = log_of(plant, operators, rng)
    z = (data.obs.numpy() - REST) / SCALE
    clone = np.linalg.lstsq(np.hstack([z, np.ones((len(z), 1))]), data.action.numpy())[0]
    policies = {"yesterday's": operators[0], "clone": clone}
    policies |= {name: clone + k * sense for name, k in IMPROVEMENTS.items()}

    def act(w):
        return lambda obs: torch.as_tensor(
            (LOW + HIGH) / 2 + (HIGH - LOW) / 2 * linear((obs.numpy() - REST) / SCALE, w)
        ).float()

    def operate(z, hand, which=np.arange(3_000) % 3):
        u = np.einsum("ni,nij->nj", z, operators[which, :4]) + operators[which, 4] + hand
        return np.clip(u, -1, 1)

    acts = {name: act(w) for name, w in policies.items()}
    own, *found = fqe.compare(data, acts, GAMMA, 2_500, 1)
    rows = [{"run": "the data"} | own, *({"run": k} | x for k, x in zip(acts, found))]
    ranked = sorted(rows, key=lambda x: -x["fqe"])
    true = {"the data": plant.returns(operate, np.random.default_rng(5))}
    for name, w in policies.items():
        draw = np.random.default_rng(5)
        true[name] = plant.returns(lambda z, _, w=w: linear(z, w), draw)
    return ranked, fqe.notes(ranked, data), true


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20_000, 20_010))
def test_order_and_signs_are_the_true_ones_or_a_note_warns(seed):
    ranked, notes, true = judged(seed)
    order = [x["run"] for x in ranked]
    print(seed, order, notes, true)
    gains = {x["run"]: x["minus_data"] for x in ranked if x["run"] != "the data"}
    signs = [(gain > 0) == (true[name] > true["the data"]) for name, gain in gains.items()]
    assert notes or (order == sorted(true, key=true.get, reverse=True) and all(signs))

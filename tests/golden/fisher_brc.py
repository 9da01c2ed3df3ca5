"""Fisher-BRC's golden numbers; fisher_brc.md says how they were computed and how the inputs are
drawn."""

import functools
import math
from types import SimpleNamespace

import fisher_brc
import numpy as np
import torch

from common import Data, sample_tanh_normal
from golden.tools import Inject, KerasAdam, compare, draw_network, in_float64, layers, load_network

REFERENCE = "google-research 35a5be2, folder fisher_brc"
TOLERANCE = 1e-9
COMPARED = "densities, ten updates and ten steps of the clone, five settings"

OBS, ACT, BATCH, UPDATES = 11, 3, 64, 10


class Recorder:
    """Stands where an optimizer does, keeps the gradients and moves nothing."""

    def __init__(self, params, lr):
        self.params = list(params)

    def step(self, grads):
        self.gradients = list(grads)


@functools.cache
def draw():
    """(networks by name, rows as Data, tables of noise), in the order of fisher_brc.md."""
    rng = np.random.default_rng(0)
    drawn = {"clone": draw_network(rng, (OBS, 256, 256, 15 * ACT))}
    drawn["actor"] = draw_network(rng, (OBS, 256, 256, 256, 2 * ACT))
    drawn["critics"] = draw_network(rng, (OBS + ACT, 256, 256, 256, 1), members=2)
    rows, noises = [], []
    for _ in range(UPDATES):
        s = rng.normal(size=(BATCH, OBS))
        a, v = rng.uniform(-1, 1, (BATCH, ACT)), rng.random((BATCH, ACT))
        a = np.where(v < 0.05, -1.0, np.where(v > 0.95, 1.0, a))
        r, s2 = rng.normal(size=BATCH), rng.normal(size=(BATCH, OBS))
        terminal = (rng.random(BATCH) < 0.05).astype(float)
        rows.append((s, a, r, s2, terminal))
        u = rng.random((BATCH, ACT))
        noises.append([u, *(rng.normal(size=(BATCH, ACT)) for _ in range(4))])
    data = Data(*[torch.tensor(np.concatenate(column)) for column in zip(*rows)])
    names = ("u", "eps", "next_noise", "penalty_noise", "actor_noise")
    tables = (np.stack(column) for column in zip(*noises))
    return drawn, data, dict(zip(names, tables))


class Case:
    """Networks as drawn, one of the settings, and an optimizer of one kind for each part."""

    def __init__(self, optimizer, clamped=False, **settings):
        drawn, self.data, self.noise = draw()
        self.args = fisher_brc.Args(batch_size=BATCH, **settings)
        with in_float64():
            self.nets = nets = fisher_brc.Nets(self.data, self.args)
            load_network(nets.behavior, drawn["clone"])
            load_network(nets.actor, drawn["actor"])
            load_network(nets.offset, drawn["critics"])
            load_network(nets.offset_target, drawn["critics"])
            with torch.no_grad():
                nets.log_temperature.fill_(-0.7)
                nets.log_bc_weight.fill_(-0.7)
                if clamped:  # bounds of the log-stds, and actions near +-1
                    log_std = nets.behavior.biases[-1].view(3, 5, ACT)[2]
                    log_std[0] += 4
                    log_std[1] -= 25
                    nets.actor.biases[-1][ACT] += 4
                    nets.actor.biases[-1][ACT + 1] -= 25
            self.opt = SimpleNamespace(
                behavior=optimizer(nets.behavior.parameters(), self.args.bc_lr),
                bc_weight=optimizer([nets.log_bc_weight], self.args.bc_lr),
                offset=optimizer(nets.offset.parameters(), self.args.lr),
                actor=optimizer(nets.actor.parameters(), self.args.lr),
                temperature=optimizer([nets.log_temperature], self.args.lr),
            )

    def inject(self, t, *normals):
        """The rows of update t (from 0), its component draws, and these tables of normal noise."""
        rows = torch.arange(BATCH) + t * BATCH
        uniforms = [self.noise["u"][t][None]] if normals == ("eps",) else []
        normals = [self.noise[name][t] for name in normals]
        return Inject(randint=[rows], rand_like=uniforms, randn_like=normals)

    def behavior_step(self, t):
        """One step of the clone: its series, by the names of the record."""
        before = self.nets.log_bc_weight.detach().clone()
        with self.inject(t, "eps"):
            metrics = fisher_brc.update_behavior(self.nets, self.opt, self.data, self.args)
        nll, entropy = metrics["nll"], metrics["entropy"]
        return {
            "loss": nll - before.exp() * entropy,
            "entropy": entropy,
            "log_mu": -nll,
            "weight_loss": fisher_brc.temperature_loss(before, entropy, ACT),
        }

    def step(self, t):
        """One update: its series, by the names of the record, and all that it reports."""
        before = self.nets.log_temperature.detach().clone()
        names = ["next_noise", "penalty_noise", "actor_noise"]
        if self.args.penalty_actions == "data":
            names.remove("penalty_noise")
        with self.inject(t, *names):
            metrics = fisher_brc.update(self.nets, self.opt, self.data, self.args)
        return {
            "critic_loss": metrics["q_loss"],
            "penalty": metrics["penalty"],
            "actor_loss": metrics["pi_loss"],
            "temperature_loss": fisher_brc.temperature_loss(before, metrics["entropy"], ACT),
        }, metrics

    @torch.no_grad()
    def log_mu(self, s, x):
        if not self.args.offset:
            return torch.zeros(len(s), dtype=torch.float64)
        return fisher_brc.log_mu(self.nets.mu(s), x)

    @torch.no_grad()
    def sample(self, s, name):
        """a, log pi and x of the actor at s, with the noise of that name of update 0."""
        with Inject(randn_like=[self.noise[name][0]]):
            return sample_tanh_normal(*self.nets.pi(s))


def clone():
    """What the record has of the clone."""
    case = Case(Recorder)
    nets, s, a = case.nets, case.data.obs[:BATCH], case.data.action[:BATCH]
    log_mu_data = case.log_mu(s, fisher_brc.pre_tanh(a, case.args))
    with (
        torch.no_grad(),
        Inject(rand_like=[case.noise["u"][:1]], randn_like=[case.noise["eps"][0]]),
    ):
        entropy_sample = -case.log_mu(s, fisher_brc.sample_mu(nets.mu(s)))
    at_bounds = (a.abs() == 1).any(1)
    first = case.behavior_step(0)
    found = {
        "log_mu_data": log_mu_data,
        "log_mu_data_at_bounds": log_mu_data[at_bounds],
        "rows_at_bounds": at_bounds.sum(),
        "log_mu_data_first_4_rows": log_mu_data[:4],
        "entropy_sample": entropy_sample,
        "entropy_sample_first_4_rows": entropy_sample[:4],
        "entropy": first["entropy"],
        "log_mu": first["log_mu"],
        "loss": first["loss"],
        "gradient": layers(nets.behavior, "wb", case.opt.behavior.gradients),
        "entropy_weight_loss": first["weight_loss"],
        "entropy_weight_gradient": case.opt.bc_weight.gradients[0],
    }
    case, series = Case(KerasAdam), []
    for t in range(UPDATES):
        series.append(case.behavior_step(t))
        if t in (0, UPDATES - 1):
            weight = case.nets.log_bc_weight
            after = {"clone": layers(case.nets.behavior, "wb"), "log_entropy_weight": weight}
            found[f"after_{t + 1}"] = copied(after)
    return found | {"series": listed(series)}


def copied(found):
    if isinstance(found, dict):
        return {key: copied(value) for key, value in found.items()}
    return found.detach().clone()


def listed(rows):
    """One tensor for each name, from a list of dictionaries."""
    return {name: torch.stack([row[name] for row in rows]).detach() for name in rows[0]}


def first_update(**settings):
    """The first update, in which nothing moves."""
    case = Case(Recorder, **settings)
    nets, data = case.nets, case.data
    s, a, s2 = data.obs[:BATCH], data.action[:BATCH], data.next_obs[:BATCH]
    a2, _, x2 = case.sample(s2, "next_noise")
    a_pi, log_prob, x_pi = case.sample(s, "actor_noise")
    zeros, undiscounted = torch.zeros_like(data.reward[:BATCH]), fisher_brc.Args(gamma=1, bonus=0)
    with torch.no_grad():
        log_mu2 = case.log_mu(s2, x2)
        q2 = fisher_brc.target_value(nets, s2, zeros, zeros, a2, log_mu2, undiscounted)
        value = nets.offset(s, a_pi).amin(0) + case.log_mu(s, x_pi)
        q = nets.offset(s, a) + case.log_mu(s, fisher_brc.pre_tanh(a, case.args))
    series, _ = case.step(0)
    return {
        "next_value": q2,
        "policy": {"action": a_pi, "log_prob": log_prob, "value": value},
        "critic": {
            "q1": q[0].mean(),
            "q2": q[1].mean(),
            "penalty": series["penalty"],
            "loss": series["critic_loss"],
            "gradient": layers(nets.offset, "wb", case.opt.offset.gradients),
        },
        "actor": {
            "loss": series["actor_loss"],
            "gradient": layers(nets.actor, "wb", case.opt.actor.gradients),
        },
        "temperature": {
            "loss": series["temperature_loss"],
            "gradient": case.opt.temperature.gradients[0],
        },
    }


def updates(**settings):
    """Ten updates."""
    case, series, found = Case(KerasAdam, **settings), [], {}
    nets = case.nets
    for t in range(UPDATES):
        series.append(case.step(t)[0])
        if t in (0, UPDATES - 1):
            after = {"actor": layers(nets.actor, "wb"), "critics": layers(nets.offset, "wb")}
            after |= {
                "targets": layers(nets.offset_target, "wb"),
                "log_temperature": nets.log_temperature,
            }
            found[f"after_{t + 1}"] = copied(after)
    return found | {"series": listed(series)}


def clamped():
    """Log-stds at both of their bounds, and actions of the policy so near to +-1 that log mu is
    flat."""
    case = Case(Recorder, clamped=True)
    nets, s, a = case.nets, case.data.obs[:BATCH], case.data.action[:BATCH]
    nets.log_bc_weight.data.fill_(-math.inf)
    with Inject(rand_like=[case.noise["u"][:1]], randn_like=[case.noise["eps"][0]]):
        loss, nll, _ = fisher_brc.behavior_loss(nets, s, a, case.args)
    gradient = torch.autograd.grad(loss, list(nets.behavior.parameters()))
    return {
        "log_mu_data": case.log_mu(s, fisher_brc.pre_tanh(a, case.args)),
        "nll": nll,
        "nll_gradient": layers(nets.behavior, "wb", gradient),
        "first_update": first_update(clamped=True),
    }


def inputs():
    case = Case(Recorder)
    data, nets = case.data, case.nets
    names = ("obs", "action", "reward", "next_obs", "terminal")
    found = {"clone": layers(nets.behavior, "wb"), "actor": layers(nets.actor, "wb")}
    found |= {"critics": layers(nets.offset, "wb")} | {name: getattr(data, name) for name in names}
    at_bound = (data.action.abs() == 1).view(UPDATES, -1).sum(1)
    counts = {"terminals": data.terminal.view(UPDATES, -1).sum(1), "at_bound": at_bound}
    return found | case.noise | {"counts": counts}


def values(record):
    record = record["values"]
    yield from compare("inputs", inputs(), record["inputs"])
    yield from compare("clone", clone(), record["clone"])
    yield from compare("first update", first_update(), record["first_update"])
    yield from compare("updates", updates(), record["updates"])
    case = Case(Recorder)
    act = fisher_brc.policy(case.nets, case.data.obs[:BATCH], case.args)
    yield "act", act, record["act"]
    variants = record["variants"]
    for name, settings in (
        ("no_offset_form", dict(offset=False)),
        ("penalty_at_data", dict(penalty_actions="data")),
    ):
        ours = {"first_update": first_update(**settings), "updates": updates(**settings)}
        yield from compare(name, ours, variants[name])
    critic = first_update(lam=1e5)["critic"]
    kept = {name: critic[name] for name in ("penalty", "loss", "gradient")}
    yield from compare("lambda_1e5", kept, variants["lambda_1e5"]["first_update"]["critic"])
    yield from compare("clamped", clamped(), record["clamped"])

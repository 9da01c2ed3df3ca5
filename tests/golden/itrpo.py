"""iTRPO's golden numbers; itrpo.md says how they were computed and how the inputs are drawn."""

import functools
from types import SimpleNamespace

import itrpo
import numpy as np
import torch

from common import Adam, Data, ScalarMLP, minimize
from golden.tools import Inject, compare, draw_network, in_float64, layers, load_network

REFERENCE = "offorRL c979ba2, the trainers IKL and BC"
TOLERANCE = 1e-9
COMPARED = "ten updates and ten steps of the clone, seven settings"

OBS, ACT, BATCH, SAMPLES, UPDATES = 11, 3, 64, 4, 10


class Shifted(ScalarMLP):
    """Critics whose action gradient has a constant added to every component, as the author's."""

    def input_gradient(self, *inputs):
        return super().input_gradient(*inputs) + self.shift


@functools.cache
def draw():
    """(networks by name, rows as Data, tables of noise), in the order of itrpo.md."""
    rng = np.random.default_rng(0)
    drawn = {"behavior": draw_network(rng, (OBS, 256, 256, 2 * ACT))}
    drawn["actor"] = draw_network(rng, (OBS, 256, 256, 256, 2 * ACT))
    drawn["q"] = draw_network(rng, (OBS + ACT, 256, 256, 256, 1), members=2)
    drawn["q_target"] = draw_network(rng, (OBS + ACT, 256, 256, 256, 1), members=2)
    rows, noises = [], []
    for _ in range(UPDATES):
        s = rng.standard_normal((BATCH, OBS))
        a = np.clip(rng.uniform(-1.05, 1.05, (BATCH, ACT)), -1, 1)
        r = rng.standard_normal(BATCH)
        s2 = rng.standard_normal((BATCH, OBS))
        terminal = (rng.random(BATCH) < 0.05).astype(float)
        rows.append((s, a, r, s2, terminal))
        noise = {"n_clone": rng.standard_normal((BATCH, ACT))}
        noise["n_penalty"] = rng.standard_normal((1, BATCH, ACT))
        noise["n_next"] = rng.standard_normal((SAMPLES, BATCH, ACT))
        noise["n_actor"] = rng.standard_normal((SAMPLES, BATCH, ACT))
        noises.append(noise)
    data = Data(*[torch.tensor(np.concatenate(column)) for column in zip(*rows)])
    return drawn, data, noises


class Case:
    """Networks as drawn, with the last layers of the policies multiplied, and their optimizers."""

    def __init__(self, case):
        drawn, self.data, self.noises = draw()
        settings = {name: float(value) for name, value in case["args"].items()}
        if "penalty" in settings:
            settings["lam"] = settings.pop("penalty")
        settings |= dict(batch_size=BATCH, samples=SAMPLES)
        self.args = args = itrpo.Args(**settings)
        args.resolve()
        with in_float64():
            self.nets = nets = itrpo.Nets(self.data, args)
            for name, layers in drawn.items():
                load_network(getattr(nets, name), layers)
            with torch.no_grad():
                for net in (nets.behavior, nets.actor):
                    net.weights[-1].mul_(case["last_layer_times"])
                    net.biases[-1].mul_(case["last_layer_times"])
                nets.log_bc_weight.fill_(float(case.get("initial_log_bc_weight", 0)))
            self.opt = SimpleNamespace(
                behavior=Adam(nets.behavior.parameters(), args.bc_lr),
                bc_weight=Adam([nets.log_bc_weight], args.bc_lr),
                q=Adam(nets.q.parameters(), args.lr),
                actor=Adam(nets.actor.parameters(), args.lr),
            )

    def rows(self, t):
        return torch.arange(BATCH) + t * BATCH

    def inject(self, t, *names):
        """The rows of update t (from 0), and its tables of noise of these names."""
        noise = [self.noises[t][name] for name in names]
        return Inject(randint=[self.rows(t)], randn_like=noise)

    def behavior_step(self, t):
        """One step of the clone; its scalars, by the names of the record."""
        nets = self.nets
        before = nets.log_bc_weight.detach().clone()
        with self.inject(t, "n_clone"):
            metrics = itrpo.update_behavior(nets, self.opt, self.data, self.args)
        loss = metrics["nll"] - before.exp() * metrics["entropy"]
        return self.scalars(metrics["nll"], metrics["entropy"], loss)

    def authors_behavior_step(self, t):
        """The same in the author's order: the entropy weight moves before the clone."""
        nets, opt, i = self.nets, self.opt, self.rows(t)
        inputs = nets, self.data.obs[i], self.data.action[i], self.args
        with Inject(randn_like=[self.noises[t]["n_clone"]]):
            _, nll, entropy = itrpo.behavior_loss(*inputs)
        minimize(opt.bc_weight, itrpo.bc_weight_loss(nets.log_bc_weight, entropy, ACT))
        with Inject(randn_like=[self.noises[t]["n_clone"]]):
            loss, _, _ = itrpo.behavior_loss(*inputs)
        minimize(opt.behavior, loss)
        return self.scalars(nll, entropy, loss.detach())

    def scalars(self, nll, entropy, loss):
        weight = self.nets.log_bc_weight.detach().clone()
        return {"nll": nll, "entropy": entropy, "loss": loss, "log_bc_weight": weight}

    def kl_next(self, t):
        """rho at s', mean over states and samples, with the noise of y."""
        s2 = self.data.next_obs[self.rows(t)]
        with torch.no_grad(), Inject(randn_like=[self.noises[t]["n_next"]]):
            pi, behavior = (
                itrpo.gaussian(self.nets.actor, s2),
                itrpo.gaussian(self.nets.behavior, s2),
            )
            _, rho = itrpo.q_and_ratio(self.nets.q_target, s2, pi, behavior, self.args)
        return rho.mean()

    def step(self, t):
        """One update; its scalars, by the names of the record."""
        found = {"kl_next": self.kl_next(t)}
        names = ("n_penalty", "n_next", "n_actor") if self.args.lam else ("n_next", "n_actor")
        with self.inject(t, *names):
            metrics = itrpo.update(self.nets, self.opt, self.data, self.args)
        same = ("td_loss", "penalty", "q_data", "target", "shaping")
        found |= {name: metrics[name] for name in same if name in metrics}
        return found | {"actor_loss": metrics["pi_loss"]}


def trained(label, case, record, step, parts):
    """Ten calls of step(t): the first gradients, the networks `parts` after 1 and after 10, and the
    scalars of all."""
    rows = []
    for t in range(UPDATES):
        rows.append(step(t))
        if t == 0:
            yield from first_gradients(label, case, record["gradients"])
        if t in (0, UPDATES - 1):
            after = {name: layers(getattr(case.nets, name), "Wb") for name in parts}
            yield from compare(f"{label} after {t + 1}", after, record[f"after_{t + 1}"])
    for name in [name for name in rows[0] if name in record["scalars"]]:
        ours = torch.stack([row[name] for row in rows])
        recorded = [float(x) for x in record["scalars"][name]]
        yield f"{label}, {name}", ours, recorded


def first_gradients(label, case, record):
    """After one step, Adam's first moment is 0.1 times the gradient."""
    for name, recorded in record.items():
        if name == "log_bc_weight":
            gradient = case.opt.bc_weight.m[0] / (1 - 0.9)
        else:
            moments = [m / (1 - 0.9) for m in getattr(case.opt, name).m]
            gradient = layers(getattr(case.nets, name), "Wb", moments)
        yield from compare(f"{label}, gradient of {name}", gradient, recorded)


def clone(name, record):
    case = Case(record)
    step = case.behavior_step if name == "clone_nll" else case.authors_behavior_step
    yield from trained(name, case, record, step, ["behavior"])


def update(name, record):
    case = Case(record)
    nets, data, i = case.nets, case.data, case.rows(0)
    if record["added_to_action_gradient"]:
        nets.q.__class__, nets.q.shift = Shifted, record["added_to_action_gradient"]
    with torch.no_grad():
        q = nets.q(data.obs[i], data.action[i])
    yield f"{name}, Q of the data", q, record["first"]["q_data"]
    yield from trained(name, case, record, case.step, ["q", "q_target", "actor"])


def first_target(name, record):
    """y (B,) of the first update, and both squared errors, by our functions."""
    case = Case(record)
    nets, data, args, i = case.nets, case.data, case.args, case.rows(0)
    s, a, r, s2, terminal = (
        x[i] for x in (data.obs, data.action, data.reward, data.next_obs, data.terminal)
    )
    with torch.no_grad(), Inject(randn_like=[case.noises[0]["n_next"]]):
        rho = itrpo.log_ratio(
            itrpo.pre_tanh(a, args), itrpo.gaussian(nets.actor, s), itrpo.gaussian(nets.behavior, s)
        )
        pi2, behavior2 = itrpo.gaussian(nets.actor, s2), itrpo.gaussian(nets.behavior, s2)
        q2, rho2 = itrpo.q_and_ratio(nets.q_target, s2, pi2, behavior2, args)
        y = itrpo.target_value(r, terminal, rho, itrpo.value(q2, rho2, args), args)
        errors = (nets.q(s, a) - y).square().mean(1)
    yield f"{name}, y", y, record["first"]["target"]
    yield f"{name}, squared errors", errors, record["first"]["td_loss_each"]


def inputs(record):
    drawn, data, noises = draw()
    case = Case(dict(args={}, last_layer_times=1))
    for name in drawn:
        yield from compare(f"input {name}", layers(getattr(case.nets, name), "Wb"), record[name])
    rows = dict(s=data.obs, a=data.action, r=data.reward, s2=data.next_obs, terminal=data.terminal)
    for t in (0, UPDATES - 1):
        batch = {name: table[case.rows(t)] for name, table in rows.items()}
        yield from compare(f"input batch {t + 1}", batch | noises[t], record[f"batch_{t + 1}"])


def values(record):
    yield from inputs(record["inputs"])
    for name, case in record["clone"].items():
        yield from clone(name, case)
    for name in ("code", "code_eps", "unclipped", "clips"):
        yield from update(name, record["update"][name])
        yield from first_target(name, record["update"][name])

"""Golden numbers of both files of BRAC+, brac_plus.py and brac_plus_acml.py; brac_plus.md says how
they were computed and how the inputs are drawn."""

from types import SimpleNamespace

import brac_plus
import brac_plus_acml
import numpy as np
import torch

from common import Data, tanh_log_det
from golden.tools import Inject, KerasAdam, draw_network, in_float64, load_network

REFERENCE = (
    "the authors' code: rlutils 3a90a38 for brac_plus.py, bracp 6ac8c2d for brac_plus_acml.py"
)
TOLERANCE = 5e-9
COMPARED = "ten updates of three phases, four cases"

OBS, ACT, BATCH, LATENT, ACTIONS, LATENTS, UPDATES = 11, 3, 32, 6, 5, 5, 10
NETWORKS = ("encoder", "decoder", "actor", "actor_target", "q", "q_target", "alpha")


def draw_networks(rng, members):
    """Drawn layers by the name of the network, in the order of brac_plus.md."""

    def draw(n_in, n_out, members=None):
        return draw_network(rng, (n_in, 256, 256, n_out), members)

    return {
        "encoder": draw(ACT + OBS, 2 * LATENT, members),
        "decoder": draw(LATENT + OBS, 2 * ACT, members),
        "actor": draw(OBS, 2 * ACT),
        "actor_target": draw(OBS, 2 * ACT),
        "q": draw(OBS + ACT, 1, 2),
        "q_target": draw(OBS + ACT, 1, 2),
        "alpha": draw(OBS, 1),
    }


def draw_update(rng, members, divergence):
    """Rows and noise of one update, by the names of the record."""
    rows = {"obs": rng.standard_normal((BATCH, OBS))}
    rows["act"] = np.tanh(1.2 * rng.standard_normal((BATCH, ACT)))
    rows["act"][0, 0], rows["act"][1, 1] = 1.0, -1.0
    rows["rew"] = rng.random(BATCH)
    rows["next_obs"] = rng.standard_normal((BATCH, OBS))
    rows["terminal"] = (rng.random(BATCH) < 0.2).astype(float)
    latents = (members, LATENTS) if divergence == "kl" else (members,)
    noise = {
        "clone": rng.standard_normal((members, BATCH, LATENT)),
        "target": rng.standard_normal((ACTIONS, BATCH, ACT)),
        "x": rng.standard_normal((ACTIONS, BATCH, ACT)),
        "z": rng.standard_normal((*latents, ACTIONS, BATCH, LATENT)),
    }
    return rows, noise


class Case:
    """One case of the record: its drawn inputs, and fresh networks for each phase."""

    def __init__(self, name, record):
        self.settings = settings = record["settings"]
        version, divergence = name.split("_")
        self.acml = version == "acml"
        self.file = brac_plus_acml if self.acml else brac_plus
        self.sign = 1 if divergence == "kl" else -1  # of the entropy's bracket in Eq. 8
        rng, members = np.random.default_rng(0), settings["members"]
        self.drawn = draw_networks(rng, members)
        self.updates = [draw_update(rng, members, divergence) for _ in range(UPDATES)]
        self.act_noise = rng.standard_normal((20, ACT))
        self.data = [Data(*map(torch.tensor, rows.values())) for rows, _ in self.updates]
        same = ("gamma", "polyak", "lr", "actor_lr", "eps", "h0", "members")
        own = ("dual_lr", "dual_start", "gp_target") if self.acml else ("alpha_lr",)
        values = settings | dict(dual_start=settings["beta_start"])
        adroit = {"gate", "mmd_width"} & self.file.ADROIT.keys() if divergence == "mmd" else ()
        self.args = self.file.Args(
            divergence=divergence,
            batch_size=BATCH,
            samples=ACTIONS,
            lam=settings["lambda_floor"],
            **{key: values[key] for key in (*same, *own)},
            **{key: self.file.ADROIT[key] for key in adroit},
        )
        assert divergence == "kl" or self.args.mmd_width == settings["mmd_width"]

    def start(self):
        """Networks as drawn and new optimizers."""
        settings = self.settings
        with in_float64():
            nets = self.file.Nets(self.data[0], self.args)
            for name, net in self.networks(nets).items():
                load_network(net, self.drawn[name])
            with torch.no_grad():
                nets.beta.copy_(self.file.before_softplus(settings["beta_start"]))
                if self.acml:
                    start = settings.get("alpha_start", settings["beta_start"])
                    nets.alpha.copy_(self.file.before_softplus(start))
                    nets.lam.copy_(self.file.before_softplus(settings["lambda_start"]))
            for key in ("eps", "eps_gp", "h0"):
                getattr(nets, key).fill_(settings[key])
            nets.noise.copy_(torch.tensor(self.act_noise))
            opt = SimpleNamespace(
                behavior=KerasAdam(nets.behavior.parameters(), settings["clone_lr"]),
                init=KerasAdam(nets.actor.parameters(), settings["init_lr"]),
                init_beta=KerasAdam([nets.beta], settings["dual_lr"]),
                q=KerasAdam(nets.q.parameters(), settings["lr"]),
                actor=KerasAdam(nets.actor.parameters(), settings["actor_lr"]),
                beta=KerasAdam([nets.beta], settings["dual_lr"]),
            )
            if self.acml:
                opt.alpha = KerasAdam([nets.alpha], settings["dual_lr"])
                opt.lam = KerasAdam([nets.lam], settings["dual_lr"])
            else:
                opt.alpha = KerasAdam(nets.alpha.parameters(), settings["alpha_lr"])
        return nets, opt

    def networks(self, nets):
        """By name; acml has no network alpha(s)."""
        behavior = nets.behavior
        found = (behavior.encoder, behavior.decoder, nets.actor, nets.actor_target)
        found = dict(zip(NETWORKS, (*found, nets.q, nets.q_target, nets.alpha), strict=True))
        return {name: net for name, net in found.items() if not (self.acml and name == "alpha")}

    def draws(self, t, actions, target=False):
        """What update t (from 0) draws: its rows, `actions` of the policy, those of the target."""
        noise, members = self.updates[t][1], self.args.members
        normals, prior = [noise["x"][:actions]], []
        if self.args.divergence == "mmd":
            prior = [noise["z"].reshape(members, -1, LATENT)]
        else:
            normals.append(noise["z"][:, :, :actions].reshape(members, -1, LATENT))
        if target:
            normals.append(noise["target"])
        return Inject(randint=[torch.arange(BATCH)], randn_like=normals, randn=prior)


def layers(net, values=None):
    """W1, b1, W2, b2, W3, b3 of a network, or what `values` has under the ids of these."""
    found = [p for layer in zip(net.weights, net.biases) for p in layer]
    return [p.detach().clone() if values is None else values[id(p)] for p in found]


def pair(recorded):
    """A tensor's two numbers, as the comparison wants them."""
    return {"norm": recorded[0], "proj": recorded[1]}


def compare_layers(label, ours, recorded):
    for key, x, numbers in zip(("W1", "b1", "W2", "b2", "W3", "b3"), ours, recorded, strict=True):
        yield f"{label}.{key}", x, pair(numbers)


def compare_gradient(label, adam, net, recorded):
    """The first gradient of a network that `adam` moves, alone or with others."""
    first = dict(zip(map(id, adam.params), adam.first, strict=True))
    yield from compare_layers(f"{label} gradient", layers(net, first), recorded)


def compare_parameters(label, case, nets, before, recorded, t):
    """Parameters after t updates, and how far they moved."""
    for name, net in case.networks(nets).items():
        if name in recorded[f"after_{t}"]:
            now = layers(net)
            moved = [x - y for x, y in zip(now, before[name])]
            yield from compare_layers(f"{label} {name} {t}", now, recorded[f"after_{t}"][name])
            yield from compare_layers(f"{label} {name} by {t}", moved, recorded[f"moved_{t}"][name])


def inputs(case, recorded):
    nets, _ = case.start()
    for name, net in case.networks(nets).items():
        yield from compare_layers(f"input {name}", layers(net), recorded[name])
    for t in (1, 10):
        for kind, drawn in zip(("batch", "noise"), case.updates[t - 1]):
            for key, x in drawn.items():
                yield f"input {kind}_{t} {key}", torch.tensor(x), pair(recorded[f"{kind}_{t}"][key])
    yield "input act_noise", torch.tensor(case.act_noise), pair(recorded["act_noise"])


def heads(case, recorded):
    """Deviations of the Gaussians; acml's policy has a lowest one that ours has not."""
    raw = torch.tensor(recorded["raw"], dtype=torch.float64)
    for name, floor in {"policy": -20, "encoder": -10, "decoder": -10}.items():
        _, log_std = case.file.gaussian(torch.cat([raw, raw]), floor)
        keep = (raw >= -10) | (not case.acml)
        expected = torch.tensor(recorded[f"{name}_std"], dtype=torch.float64)[keep]
        yield f"{name}_std", log_std.exp()[keep], expected.tolist()


def clone(case, recorded):
    """The clones: losses, parts of the first one, gradients, parameters."""
    nets, opt = case.start()
    before = {name: layers(net) for name, net in case.networks(nets).items()}
    args, data = case.args, case.data
    noise = [noise["clone"] for _, noise in case.updates]
    x = [torch.atanh(rows.action.clamp(-1 + 1e-6, 1 - 1e-6)) for rows in data]
    log_det = [tanh_log_det(each).sum(-1).mean() for each in x]
    if case.acml:  # whose loss has it, as ours
        log_det = [0.0] * UPDATES
    with Inject(randn_like=[noise[0]]):
        minus_elbo = case.file.behavior_loss(nets, data[0].obs, data[0].action, args).mean()
    q_mean, q_log_std = case.file.gaussian(nets.behavior.encoder(x[0], data[0].obs))
    latent_kl = case.file.normal_kl(q_mean, q_log_std).mean()
    yield "clone minus_elbo", minus_elbo, recorded["minus_elbo"]
    yield "clone kl_mean", latent_kl, recorded["kl_mean"]
    yield "clone nll_mean", minus_elbo - latent_kl - log_det[0], recorded["nll_mean"]
    if case.acml:
        by_state = []
        for i in range(BATCH):
            one = slice(i, i + 1)
            with Inject(randn_like=[noise[0][:, one]]):
                loss = case.file.behavior_loss(nets, data[0].obs[one], data[0].action[one], args)
            by_state.append(loss.mean())
        yield "clone by state", torch.stack(by_state), pair(recorded["minus_elbo_by_state"])
    losses = []
    for t in range(UPDATES):
        with Inject(randint=[torch.arange(BATCH)], randn_like=[noise[t]]):
            metrics = case.file.update_behavior(nets, opt, data[t], args)
        losses.append(args.members * (metrics["minus_elbo"] - log_det[t]))
        if t + 1 in (1, UPDATES):
            yield from compare_parameters("clone", case, nets, before, recorded, t + 1)
    yield "clone loss", losses[0], recorded["loss"]
    yield "clone losses", torch.stack(losses), recorded["losses"]
    for name, grad in recorded["grad"].items():
        net = case.networks(nets)[name]
        yield from compare_gradient(f"clone {name}", opt.behavior, net, grad)


def first_policy(case, recorded):
    """The policy with the least D: losses, parts of the first one, gradients, parameters."""
    nets, opt = case.start()
    before = {name: layers(net) for name, net in case.networks(nets).items()}
    args, data = case.args, case.data
    actions = ACTIONS if args.divergence == "mmd" else 1
    with case.draws(0, actions) as draws:
        draws.queues["randint"] = []
        _, log_prob, d = case.file.divergence(nets, data[0].obs, actions, args)
    beta = torch.nn.functional.softplus(nets.beta)
    loss = case.file.beta_loss(nets, beta, log_prob, args)
    yield "first policy d", d.mean(0), pair(recorded["d"])
    yield "first policy log_pi", log_prob.mean(0), pair(recorded["log_pi"])
    yield "first policy beta_loss", loss, recorded["beta_loss"]
    found = {"loss": [], "d_mean": [], "log_pi_mean": []}
    for t in range(UPDATES):
        with case.draws(t, actions):
            metrics = case.file.update_first_policy(nets, opt, data[t], args)
        constant = case.sign * metrics["beta"] * args.h0  # ours has it, theirs has not
        found["loss"].append(metrics["pi_loss"] + constant)
        found["d_mean"].append(metrics["d_mean"])
        found["log_pi_mean"].append(-metrics["entropy"])
        if t + 1 in (1, UPDATES):
            yield from compare_parameters("first policy", case, nets, before, recorded, t + 1)
            yield (
                f"beta {t + 1}",
                nets.beta.detach().clone(),
                recorded[f"after_{t + 1}"]["beta_raw"],
            )
    yield "first policy loss", found["loss"][0], recorded["loss"]
    yield "first policy beta gradient", opt.init_beta.first[0], recorded["beta_grad"]
    yield from compare_gradient("first policy", opt.init, nets.actor, recorded["grad"]["actor"])
    for key, ours in found.items():
        yield f"first policy {key}", torch.stack(ours), recorded["by_update"][key]


def rl_parts(case, recorded):
    """What `update` does not report, by our functions on the first update's rows and noise."""
    nets, _ = case.start()
    args, data = case.args, case.data[0]
    with case.draws(0, ACTIONS, target=True) as draws:
        draws.queues["randint"] = []
        a_pi, log_prob, d = case.file.divergence(nets, data.obs, ACTIONS, args)
        rows = data.reward, data.next_obs, data.terminal
        y = case.file.target_value(nets, *rows, args)
    _, q = case.file.critic_loss(nets, data.obs, data.action, y)
    a_gp = a_pi if args.divergence == "mmd" else a_pi[:1]
    norm = case.file.gradient_norm(nets, data.obs, a_gp.detach())
    gate = case.file.penalty_gate(nets, d[0].detach(), *([args] if case.acml else []))
    alpha = torch.nn.functional.softplus(nets.alpha if case.acml else nets.alpha(data.obs))
    beta = torch.nn.functional.softplus(nets.beta)
    penalty = (gate * norm).mean().detach()
    yield "y", y, pair(recorded["y"])
    yield "q1", q[0], pair(recorded["q1"])
    yield "q2", q[1], pair(recorded["q2"])
    yield "d_penalty", d[0], pair(recorded["d_penalty"])
    yield "d", d.mean(0), pair(recorded["d"])
    yield "log_pi", log_prob.mean(0), pair(recorded["log_pi"])
    yield "alpha", alpha, pair(recorded["alpha"])
    yield "alpha_loss", case.file.alpha_loss(nets, alpha, d.mean(0)), recorded["alpha_loss"]
    yield "beta_loss", case.file.beta_loss(nets, beta, log_prob, args), recorded["beta_loss"]
    yield "act", case.file.policy(nets, data.obs, args), pair(recorded["act"])
    if case.acml:
        yield "penalty by state", gate * norm, pair(recorded["penalty_by_state"])
        lam = torch.nn.functional.softplus(nets.lam)
        yield "lambda_loss", case.file.lam_loss(lam, penalty, args), recorded["lambda_loss"]


def rl(case, recorded):
    """RL: losses and multipliers of ten updates, first gradients, parameters."""
    nets, opt = case.start()
    before = {name: layers(net) for name, net in case.networks(nets).items()}
    scalars = {"beta": nets.beta}
    if case.acml:
        scalars |= {"alpha": nets.alpha, "lambda": nets.lam}
    names = {  # theirs: ours
        "td_loss": "td_loss",
        "penalty": "penalty",
        "critic_loss": "q_loss",
        "d_mean": "d_mean",
        "alpha_mean": "alpha",
        "beta": "beta",
        "violations": "violations",
    }
    if case.acml:
        names["lambda"] = "lam"
    found = {name: [] for name in (*names, "policy_loss", "log_pi_mean")}
    for t in range(UPDATES):
        with case.draws(t, ACTIONS, target=True):
            metrics = case.file.update(nets, opt, case.data[t], case.args)
        for theirs, ours in names.items():
            found[theirs].append(metrics[ours])
        constant = case.sign * metrics["beta"] * case.args.h0  # ours has it, theirs has not
        found["policy_loss"].append(metrics["pi_loss"] + constant)
        found["log_pi_mean"].append(-metrics["entropy"])
        if t + 1 in (1, UPDATES):
            yield from compare_parameters("rl", case, nets, before, recorded, t + 1)
            for name, expected in recorded[f"after_{t + 1}"]["raw"].items():
                yield f"rl {name} {t + 1}", scalars[name].detach().clone(), expected
    for name, expected in recorded["by_update"].items():
        yield f"rl {name}", torch.stack(found[name]), expected
    for name in ("td_loss", "penalty", "critic_loss", "policy_loss", "violations", "beta"):
        yield f"rl first {name}", found[name][0], recorded[name]
    adams = {"q": opt.q, "actor": opt.actor, "alpha": opt.alpha}
    for name, grad in recorded["grad"].items():
        net = case.networks(nets)[name]
        yield from compare_gradient(f"rl {name}", adams[name], net, grad)
    adams = {"alpha": opt.alpha, "beta": opt.beta, "lambda": vars(opt).get("lam")}
    for name, slope in recorded["raw_grad"].items():
        yield f"rl gradient of {name}", adams[name].first[0], slope


def comparisons(case, record):
    yield from inputs(case, record["inputs"])
    yield from heads(case, record["heads"])
    yield from clone(case, record["clone"])
    if record["first_policy"]:  # iclr's own code fails with mmd here
        yield from first_policy(case, record["first_policy"])
    yield from rl_parts(case, record["rl"])
    yield from rl(case, record["rl"])


def values(record):
    for name, each in record.items():
        for label, ours, recorded in comparisons(Case(name, each), each):
            yield f"{name}: {label}", ours.detach(), recorded

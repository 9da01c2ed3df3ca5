"""ARQ's golden numbers; arq.md says how they were computed and how the inputs are drawn."""

import math
from types import SimpleNamespace

import arq
import numpy as np
import torch

from common import Adam, Data
from golden.tools import Inject, draw_network, in_float64, load_network

REFERENCE = "hiwonjoon/ARQ-public ff12732"
TOLERANCE = 1e-9
COMPARED = (
    "score network, its training, predictor-corrector, likelihoods, targets, critics, Q^beta, "
    "advantages, pi_phi, probabilities of the implicit policy"
)

OBS, ACT, SAMPLES, BATCH, UPDATES, WIDTH = 11, 3, 10, 64, 10, 32
ROWS = BATCH * UPDATES
LEFT_OUT = {"batch", "resnet", "t", "alpha"}  # what ours has not; descriptions
THRESHOLDS = {"few": -1.5, "most": 1.0, "all": 10.0, "half": 0.0}


class Inputs:
    """All that the recipe draws, in its order; tensors in float64, networks as lists of layers."""

    def __init__(self):
        rng = np.random.default_rng(0)
        normal = lambda *shape: torch.tensor(rng.standard_normal(shape))
        uniform = lambda low, high, *shape: torch.tensor(rng.uniform(low, high, shape))
        self.obs = normal(ROWS, OBS)
        self.obs[:, 10] *= 0.01
        self.action = uniform(-0.9, 0.9, ROWS, ACT)
        self.reward = normal(ROWS)
        self.terminal = (uniform(0, 1, ROWS) < 0.05).double()
        self.next_obs = normal(ROWS, OBS)
        self.next_obs[:, 10] *= 0.01
        self.next_action = uniform(-0.9, 0.9, ROWS, ACT)
        self.candidates = uniform(-1, 1, ROWS, SAMPLES, ACT)
        self.log_prob = normal(ROWS, SAMPLES)
        self.advantage = 4 * normal(ROWS)
        self.frequencies = 30 * normal(1, WIDTH // 2)
        self.score = self.draw_score(rng)
        self.u = uniform(0, 1, UPDATES, BATCH)
        self.z = normal(UPDATES, BATCH, ACT)
        self.x0 = normal(BATCH, ACT)
        self.noise = normal(25, 2, BATCH, ACT)
        self.q = draw_network(rng, (OBS + ACT, 256, 256, 1), members=2)
        self.q_target = draw_network(rng, (OBS + ACT, 256, 256, 1), members=2)
        self.actor = draw_network(rng, (OBS, 256, 256, ACT))
        self.log_std = 0.5 * uniform(-1, 1, ACT)
        draw_network(rng, (OBS, *[WIDTH] * 9, ACT))  # the residual policy, which is left out
        self.members = [self.draw_score(rng) for _ in range(2)]

    def draw_score(self, rng):
        """The layer of the time, then the other eight."""
        time = draw_network(rng, (WIDTH, WIDTH))
        return time + draw_network(rng, (ACT + OBS, *[WIDTH] * 7, ACT))


def layers(net):
    """The nine layers of a score network, as its inputs are drawn."""
    return net.time, net.first, *net.hidden, net.last


def score_parameters(net):
    """Recorded name -> parameter."""
    names = ["time.w0", "time.b0"] + [f"{kind}{i}" for i in range(8) for kind in "wb"]
    tensors = [p for layer in layers(net) for p in (layer.weights[0], layer.biases[0])]
    return dict(zip(names, tensors, strict=True))


def mlp_parameters(net):
    """Recorded name -> parameter."""
    weights = {f"w{i}": w for i, w in enumerate(net.weights)}
    return weights | {f"b{i}": b for i, b in enumerate(net.biases)}


def load_score(net, drawn, frequencies):
    """`drawn` is one network, or a list of them for an ensemble."""
    net.frequencies.copy_(frequencies)
    ensemble = isinstance(drawn[0], list)
    for i, layer in enumerate(layers(net)):
        load_network(layer, [[d[i]] for d in drawn] if ensemble else [drawn[i]])


def make(inputs, frequencies, **settings):
    """Our networks, loaded, with the flags in force."""
    args = arq.Args(width=WIDTH, batch_size=BATCH, n=SAMPLES, filter=True, **settings)
    zeros = torch.zeros(ROWS)
    nets = arq.Nets(Data(inputs.obs, inputs.action, zeros, inputs.next_obs, zeros), args)
    drawn = inputs.members if args.ensemble > 1 else inputs.score
    load_score(nets.score, drawn, frequencies)
    load_score(nets.score_ema, drawn, frequencies)
    twins = len(nets.q.weights[0])
    load_network(nets.q, inputs.q[:twins])
    load_network(nets.q_target, inputs.q_target[:twins])
    load_network(nets.actor, inputs.actor)
    if nets.log_std is not None:
        with torch.no_grad():
            nets.log_std.copy_(inputs.log_std)
    return nets, args


def rows(i):
    """Row numbers of update i."""
    return torch.arange(BATCH * i, BATCH * (i + 1))


def compare(label, found, recorded):
    """(label, ours, recorded) of every entry of `recorded`, a tree, but for those left out."""
    for key in (key for key in recorded if key not in LEFT_OUT):
        if isinstance(found[key], dict):
            yield from compare(f"{label} {key}", found[key], recorded[key])
        else:
            yield f"{label} {key}", found[key], recorded[key]


def trained(opt, step, parameters, target_parameters=None, target_name="target"):
    """Ten updates: step(i) -> metrics. Returns the metrics of all, and the tensors that are
    recorded: first gradients (from Adam's first moment) and parameters after 1 and 10 updates."""
    copied = lambda tensors: {name: x.detach().clone() for name, x in tensors.items()}
    metrics, found = [], {}
    for i in range(UPDATES):
        metrics.append(step(i))
        if i == 0:
            moments = {id(p): m for p, m in zip(opt.params, opt.m)}
            found["grad"] = {name: moments[id(p)] / 0.1 for name, p in parameters.items()}
        if i in (0, UPDATES - 1):
            found[f"params_{i + 1}"] = copied(parameters)
            if target_parameters:
                found[f"{target_name}_{i + 1}"] = copied(target_parameters)
    table = {name: torch.stack([row[name] for row in metrics]) for name in metrics[0]}
    return table, found


def networks_at_times(inputs, nets, args, recorded):
    raw = arq.raw_at(nets, inputs.obs[:BATCH], 1, args)
    return {t: raw(inputs.x0, float(t)) for t in recorded}


def score_training(inputs, frequencies):
    nets, args = make(inputs, frequencies)
    data = support_data(inputs, 0.0)
    opt = SimpleNamespace(score=Adam(nets.score.parameters(), 1e-4))

    def step(i):
        with Inject(randint=[rows(i)], rand_like=[inputs.u[i][:, None]], randn_like=[inputs.z[i]]):
            return arq.update_score(nets, opt, data, args)

    names = score_parameters(nets.score), score_parameters(nets.score_ema)
    metrics, found = trained(opt.score, step, *names, "ema")
    return {"loss": ACT * metrics["loss_per_dim"], **found}


def likelihoods(inputs, nets, args, recorded):
    raw = arq.raw_at(nets, inputs.obs[:BATCH], 1, args)
    x = 0.8 * inputs.x0
    vectors = arq.trace_vectors(x)
    slopes = {}
    for t in recorded["divergence"]:
        beta, _, sigma = arq.schedule(torch.tensor(float(t)))
        out, trace = arq.raw_and_trace(raw, x, float(t), vectors)
        drift = -0.5 * beta * (x + out / sigma)
        slopes[t] = {"drift": drift, "div": -0.5 * beta * (ACT + trace / sigma)}
    data = arq.log_likelihood(raw, nets.z_action(inputs.action[:BATCH]), vectors)
    normal = arq.log_likelihood(raw, x, vectors)
    found = {"divergence": slopes, "data": data, "normal": normal}
    return found | {
        "data_minus_mean": data - data.mean(),
        "normal_minus_mean": normal - normal.mean(),
    }


def clone(inputs, record):
    """All that depends on the constant in the angle of the time's features."""
    for version in ("2*pi", "2*3.1415"):
        frequencies = inputs.frequencies
        if version == "2*3.1415":
            frequencies = frequencies * 3.1415 / math.pi
        nets, args = make(inputs, frequencies)
        take = lambda section: record[section][version]
        found = networks_at_times(inputs, nets, args, take("score_network"))
        yield from compare(f"score_network {version}", found, take("score_network"))
        two = make(inputs, frequencies, ensemble=2)
        found = networks_at_times(inputs, *two, take("ensemble"))
        yield from compare(f"ensemble {version}", found, take("ensemble"))
        found = score_training(inputs, frequencies)
        yield from compare(f"score_training {version}", found, take("score_training"))
        raw = arq.raw_at(nets, inputs.obs[:BATCH], 1, args)
        with Inject(randn=list(inputs.noise)):
            x = arq.sample_pc(raw, inputs.x0, 25)
        found = {"sample": nets.z_action.inverse(x)}
        yield from compare(f"predictor_corrector {version}", found, take("predictor_corrector"))
        found = likelihoods(inputs, nets, args, take("log_likelihood"))
        yield from compare(f"log_likelihood {version}", found, take("log_likelihood"))


def support_data(inputs, threshold):
    """Rows 0 to 639 are the transitions, rows 640 to 1279 their next states and actions."""
    twice = lambda x, y: torch.cat([x, y])
    zeros = torch.zeros(ROWS)
    return arq.SupportData(
        obs=twice(inputs.obs, inputs.next_obs),
        action=twice(inputs.action, inputs.next_action),
        reward=twice(inputs.reward, zeros),
        next_obs=twice(inputs.next_obs, inputs.next_obs),
        terminal=twice(inputs.terminal, zeros),
        episode=torch.zeros(2 * ROWS),
        episode_return=torch.zeros(1),
        rows=torch.arange(ROWS),
        next_row=torch.arange(2 * ROWS) + ROWS,
        candidates=twice(inputs.candidates, inputs.candidates),
        in_support=twice(inputs.log_prob, inputs.log_prob) > threshold,
        advantage=twice(inputs.advantage, zeros),
    )


def critic(inputs, threshold, lr, **settings):
    nets, args = make(inputs, inputs.frequencies, q_lr=lr, **settings)
    data = support_data(inputs, threshold)
    opt = SimpleNamespace(q=Adam(nets.q.parameters(), lr))
    targets = {}

    def step(i):
        if i in (0, UPDATES - 1):
            here = arq.select(data, rows(i), "reward")
            there = arq.select(data, rows(i) + ROWS, "obs", "action", "candidates", "in_support")
            terminal = data.terminal[rows(i)]
            targets[f"y_{i + 1}"] = arq.target(nets, *here, *there, terminal, args)
        with Inject(randint=[rows(i)]):
            return arq.update_q(nets, opt, data, args)

    names = mlp_parameters(nets.q), mlp_parameters(nets.q_target)
    metrics, found = trained(opt.q, step, *names)
    return {"loss": metrics["q_loss"], "y_mean": metrics["target"], **targets, **found}


def critics(inputs, record):
    found = {}
    for case in record["critic"]:
        k, which = case[1:].split("_")
        found[case] = critic(inputs, THRESHOLDS[which], 3e-4, k=int(k))
    yield from compare("critic", found, record["critic"])
    found = critic(inputs, 0.0, 1e-4, value="sarsa")
    yield from compare("q_beta", found, record["q_beta"])


def policy(inputs, pi):
    nets, args = make(inputs, inputs.frequencies, pi=pi, alpha_pi=0.7)
    data = support_data(inputs, 0.0)
    parameters = mlp_parameters(nets.actor)
    if pi == "gaussian":
        parameters["log_std"] = nets.log_std
    opt = SimpleNamespace(actor=Adam(parameters.values(), 3e-4))
    first = arq.policy(nets, inputs.obs, args).detach()

    def step(i):
        with Inject(randint=[rows(i)]):
            return arq.update(nets, opt, data, args)

    metrics, found = trained(opt.actor, step, parameters)
    found |= {"loss": metrics["pi_loss"], "weight_mean": metrics["weight"][0]}
    return found | {"action_0": first, "action_10": arq.policy(nets, inputs.obs, args)}


def advantages(inputs, nets):
    found = {}
    for which in ("few", "most", "all"):
        kept = inputs.log_prob > THRESHOLDS[which]
        found[which] = arq.advantage(nets, inputs.obs, inputs.action, inputs.candidates, kept)
    return found


def implicit(inputs, nets, args):
    found = {}
    for which in ("few", "half"):
        args.alpha, args.threshold = 2.0, THRESHOLDS[which]
        here = inputs.obs[:BATCH], inputs.candidates[:BATCH], inputs.log_prob[:BATCH]
        found[which] = arq.implicit_logits(nets, *here, args).softmax(1)
    return found


def values(record):
    with in_float64():
        inputs = Inputs()
        nets, args = make(inputs, inputs.frequencies)
        found = {
            "s_mean": nets.z_obs.mean,
            "s_std": nets.z_obs.std,
            "s_std_last": nets.z_obs.std[-1],
            "a_mean": nets.z_action.mean,
            "a_std": nets.z_action.std,
        }
        yield from compare("zscore", found, record["zscore"])
        beta, m, sigma = arq.schedule(torch.tensor(record["schedule"]["t"]))
        found = {"beta": beta, "m": m, "sigma": sigma}
        yield from compare("schedule", found, record["schedule"])
        yield from clone(inputs, record)
        yield from critics(inputs, record)
        found = {pi: policy(inputs, pi) for pi in ("gaussian", "deterministic")}
        yield from compare("policy", found, record["policy"])
        yield from compare("advantage", advantages(inputs, nets), record["advantage"])
        yield from compare("implicit", implicit(inputs, nets, args), record["implicit"])

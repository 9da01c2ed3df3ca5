"""CQL's golden numbers; cql.md says how they were computed and how the inputs are drawn."""

from types import SimpleNamespace

import cql
import numpy as np
import torch

from common import Data
from golden.tools import Inject, RecordingAdam, draw_network, in_float64, load_network

REFERENCE = "CORL 6afec90, cql.py"
TOLERANCE = 1e-9
COMPARED = "ten updates, nine settings"

OBS, ACT = 11, 3
SCALARS = ("log_std_scale", "log_std_shift", "log_temperature", "log_multiplier")


def draw_batch(rng, case):
    """One update's rows as Data, and its noise by name."""
    B, N = case["batch"], case["settings"]["n_actions"]
    s = rng.standard_normal((B, OBS))
    a = np.tanh(rng.standard_normal((B, ACT)))
    r = 1 + 0.5 * rng.standard_normal(B)
    s2 = s + 0.1 * rng.standard_normal((B, OBS))
    terminal = (rng.random(B) < 0.05).astype(float)
    if case.get("rewards"):
        r = 10 * terminal - 5
    noise = {"z_pi": rng.standard_normal((B, ACT)), "u": rng.random((B, N, ACT))}
    noise["z_next"] = rng.standard_normal((B, N, ACT))
    noise["z_now"] = rng.standard_normal((B, N, ACT))
    M = N if case["settings"]["max_backup"] else 1
    noise["z_target"] = rng.standard_normal((B, M, ACT))
    return Data(*map(torch.as_tensor, (s, a, r, s2, terminal))), noise


def make(case):
    """(nets, opt, args, [(data, noise), ...]) of a case, all drawn in the order of cql.md."""
    rng = np.random.default_rng(case["seed"])
    args = cql.Args(batch_size=case["batch"], **case["settings"])
    actor = draw_network(rng, (OBS, 256, 256, 256, 2 * ACT))
    q = draw_network(rng, (OBS + ACT, 256, 256, 256, 1), members=2)
    q_target = draw_network(rng, (OBS + ACT, 256, 256, 256, 1), members=2)
    scalars = rng.uniform((0.5, -1.5, -1, 0), (1.5, -0.5, 0, 1))
    scalars[1] = case.get("log_std_shift_start", scalars[1])
    batches = [draw_batch(rng, case) for _ in range(case["updates"])]
    with in_float64():
        nets = cql.Nets(batches[0][0], args)
        load_network(nets.actor, actor)
        load_network(nets.q, q)
        load_network(nets.q_target, q_target)
        with torch.no_grad():
            for name, value in zip(SCALARS, scalars):
                getattr(nets, name).fill_(value)
            for net in (nets.q, nets.q_target):
                net.weights[-1].mul_(case.get("last_layer_factor", 1.0))
                net.biases[-1].mul_(case.get("last_layer_factor", 1.0))
        opt = SimpleNamespace(
            actor=RecordingAdam(nets.pi_parameters(), args.actor_lr),
            temperature=RecordingAdam([nets.log_temperature], args.actor_lr),
            q=RecordingAdam(nets.q.parameters(), args.lr),
            multiplier=RecordingAdam([nets.log_multiplier], args.lr),
        )
    return nets, opt, args, batches


@torch.no_grad()
def parts(nets, data, noise, args):
    """What `update` does not report, by our functions on the same noise and before its steps."""
    pi, pi2, zeros = nets.pi(data.obs), nets.pi(data.next_obs), torch.zeros_like(data.reward)
    normals = [noise[name] for name in ("z_next", "z_now", "z_target")]
    with Inject(rand_like=[noise["u"]], randn_like=normals):
        others, log_density = cql.proposals(pi, pi2, data.action, args)
        a2, log_prob2 = cql.draw(pi2, noise["z_target"].shape[1])
    next_rows = zeros, data.next_obs, zeros, a2, log_prob2  # no reward, no terminal
    discounted = cql.target_value(nets, *next_rows, nets.log_temperature.exp(), args)
    rows = data.obs, data.action, zeros, others, log_density
    _, _, diff, _ = cql.critic_loss(nets, *rows, 1.0, args)
    found = {"target_q": discounted.mean() / args.gamma, "diff_1": diff[0], "diff_2": diff[1]}
    if args.lagrange:
        found["multiplier_loss"] = cql.multiplier_loss(nets.multiplier(), diff, args)
    return found


def one_update(nets, opt, data, noise, args):
    """One update on the given rows and noise; its losses, by the names of the record."""
    log_temperature = nets.log_temperature.detach().clone()
    normals = [noise[name] for name in ("z_pi", "z_next", "z_now", "z_target")]
    rows = torch.arange(args.batch_size)
    with Inject(randint=[rows], rand_like=[noise["u"]], randn_like=normals):
        metrics = cql.update(nets, opt, data, args, False)
    found = {name: metrics[name] for name in ("td_loss", "diff", "temperature", "entropy")}
    found["actor_loss"], found["critic_loss"] = metrics["pi_loss"], metrics["q_loss"]
    found["temperature_loss"] = cql.temperature_loss(log_temperature, metrics["entropy"], ACT)
    if args.lagrange:
        found["multiplier"] = metrics["multiplier"]
        found["critic_loss"] -= 2 * metrics["multiplier"] * args.weight * args.gap
    return found


def inputs(nets, batches):
    """What the record keeps of the drawn inputs, by its names."""
    found = dict(nets.named_parameters())
    for t, (data, noise) in enumerate(batches, 1):
        rows = {"s": data.obs, "a": data.action, "r": data.reward, "s2": data.next_obs}
        rows |= {"terminal": data.terminal} | noise
        found |= {f"{name}[{t}]": value for name, value in rows.items()}
    return found


def values(record):
    for name, case in record["cases"].items():
        nets, opt, args, batches = make(case)
        drawn = inputs(nets, batches)
        for key, recorded in case["inputs"].items():
            yield f"{name}, input {key}", drawn[key], recorded
        losses = case["losses"]
        for key, ours in parts(nets, *batches[0], args).items():
            yield f"{name}, {key} of update 1", ours, losses[key][0]
        losses["diff"] = [(one + two) / 2 for one, two in zip(losses["diff_1"], losses["diff_2"])]
        found = []
        for t, (data, noise) in enumerate(batches, 1):
            found.append(one_update(nets, opt, data, noise, args))
            for key, recorded in case["parameters"].get(str(t), {}).items():
                yield f"{name}, {key} after update {t}", nets.get_parameter(key), recorded
        for key in found[0]:
            yield f"{name}, {key}", torch.stack([each[key] for each in found]), losses[key]
        names = {id(p): key for key, p in nets.named_parameters()}
        for adam in vars(opt).values():
            for p, grad in zip(adam.params, adam.first or []):
                yield f"{name}, gradient of {names[id(p)]}", grad, case["gradients"][names[id(p)]]

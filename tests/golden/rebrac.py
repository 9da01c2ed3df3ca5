"""ReBRAC's golden numbers; rebrac.md says how they were computed and how the inputs are drawn."""

from types import SimpleNamespace

import numpy as np
import rebrac
import torch

from common import Adam
from golden.tools import (
    Inject,
    draw_critic,
    draw_network,
    first_gradients,
    in_float64,
    load_critics,
    load_network,
)

REFERENCE = "the authors' ReBRAC 694385b"
TOLERANCE = 1e-9
COMPARED = "ten updates, three settings"

OBS, ACT = 11, 3
COLUMNS = ("s", "a", "r", "s2", "terminal", "next_a", "z")
METRICS = {"q_loss": "q_loss", "actor_loss": "pi_loss", "bc_loss": "bc_loss"}


def draw_batch(rng, B):
    """s, a, r, s2, terminal, next_a of one update, and the unit noise z of its target actions."""
    s = rng.standard_normal((B, OBS))
    a = np.tanh(rng.standard_normal((B, ACT)))
    r = 1 + 0.5 * rng.standard_normal(B)
    s2 = s + 0.1 * rng.standard_normal((B, OBS))
    terminal = (rng.random(B) < 0.05).astype(float)
    next_a = np.tanh(rng.standard_normal((B, ACT)))
    z = rng.standard_normal((B, ACT))
    return [torch.tensor(x) for x in (s, a, r, s2, terminal, next_a, z)]


def make(case):
    """(nets, opt, args, batches) of a case, all drawn in the order of rebrac.md."""
    rng = np.random.default_rng(case["seed"])
    args = rebrac.Args(batch_size=case["batch"], **case["settings"])
    actor_sizes = (OBS, *[256] * args.actor_layers, ACT)
    q_sizes = (OBS + ACT, *[256] * args.critic_layers, 1)
    actor, actor_target = (draw_network(rng, actor_sizes) for _ in range(2))
    q = [draw_critic(rng, q_sizes, args.critic_ln) for _ in range(2)]
    q_target = [draw_critic(rng, q_sizes, args.critic_ln) for _ in range(2)]
    batches = [draw_batch(rng, case["batch"]) for _ in range(case["updates"])]
    with in_float64():
        nets = rebrac.Nets(transitions(batches[0]), args)
        load_network(nets.actor, actor)
        load_network(nets.actor_target, actor_target)
        load_critics(nets.q, q)
        load_critics(nets.q_target, q_target)
        opt = SimpleNamespace(
            q=Adam(nets.q.parameters(), args.critic_lr),
            actor=Adam(nets.actor.parameters(), args.actor_lr),
        )
    return nets, opt, args, batches


def transitions(batch):
    *columns, next_a, _ = batch
    return rebrac.Transitions(*columns, next_action=next_a)


def values(record):
    for label, case in record["cases"].items():
        nets, opt, args, batches = make(case)
        inputs = {name: p.detach().clone() for name, p in nets.named_parameters()}
        for t, batch in enumerate(batches, 1):
            inputs |= {f"{name}[{t}]": x for name, x in zip(COLUMNS, batch)}
        for name, recorded in case["inputs"].items():
            yield f"{label}, input {name}", inputs[name], recorded
        terminals, clipped = 0, 0
        for t, batch in enumerate(batches, 1):
            _, _, _, s2, terminal, _, z = batch
            noise = (args.policy_noise * z).clamp(-args.noise_clip, args.noise_clip)
            a2 = nets.actor_target(s2).tanh() + noise
            terminals, clipped = terminals + terminal.sum(), clipped + (a2.abs() > 1).sum()
            with Inject(randint=[torch.arange(args.batch_size)], randn_like=[z]):
                policy_step = (t - 1) % args.policy_freq == 0
                metrics = rebrac.update(nets, opt, transitions(batch), args, policy_step)
            for name, ours in METRICS.items():
                recorded = case["losses"][name][t - 1]
                assert (ours in metrics) == (recorded is not None)
                if recorded is not None:
                    yield f"{label}, {ours} of update {t}", metrics[ours], recorded
            if t == 1:
                gradients = first_gradients(nets, opt)
                assert gradients.keys() == case["gradients"].keys()
                for name, recorded in case["gradients"].items():
                    yield f"{label}, gradient of {name}", gradients[name], recorded
            for name, recorded in case["parameters"].get(str(t), {}).items():
                yield f"{label}, {name} after update {t}", nets.get_parameter(name), recorded
        yield f"{label}, terminals", terminals, case["terminals"]
        yield f"{label}, actions at their bound", clipped, case["actions_clipped"]

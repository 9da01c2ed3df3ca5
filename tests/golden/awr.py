"""AWR's golden numbers; awr.md says how they were computed and how the inputs are drawn."""

from types import SimpleNamespace

import awr
import numpy as np
import torch

from common import Adam
from golden.replay import Replay
from golden.tools import draw_network, in_float64, load_network

REFERENCE = "awr 831442f, awr_agent.py"
TOLERANCE = 1e-9
COMPARED = "tables of returns, advantages and weights, six settings; ten updates, two settings"

OBS, ACT = 11, 3


def tables_case(case):
    """Networks, data and args of a case `tables_*`, drawn in the order of awr.md."""
    rng = np.random.default_rng(case["seed"])
    v_target = draw_network(rng, (OBS, 256, 256, 1))
    episodes = []
    for i, (length, end) in enumerate(zip(case["episode_lengths"], case["episode_ends"])):
        states = rng.standard_normal((length + 1, OBS))
        reward = 1 + rng.standard_normal(length) ** 3
        terminal = np.zeros(length)
        terminal[-1] = end == "terminal"
        episodes.append((states[:-1], reward, states[1:], terminal, np.full(length, i)))
    obs, reward, next_obs, terminal, episode = (
        torch.tensor(np.concatenate(x)) for x in zip(*episodes)
    )
    action, zeros = obs.new_zeros(len(obs), ACT), torch.zeros_like(reward)
    data = awr.Tables(
        *(obs, action, reward, next_obs, terminal, episode),
        returns=zeros,
        advantage=zeros.clone(),
    )
    args = awr.Args(**case["settings"])
    with in_float64(), torch.no_grad():
        nets = awr.Nets(data, args)
        load_network(nets.v_target, v_target)
        nets.v_target.weights[-1].mul_(case["last_layer_factor"])
        nets.v_target.biases[-1].mul_(case["last_layer_factor"])
    return nets, data, args


@torch.no_grad()
def compare_tables(label, case):
    nets, data, args = tables_case(case)
    drawn = {"v_target.weights.0": nets.v_target.weights[0], **vars(data)}
    for name, recorded in case["inputs"].items():
        yield f"{label}, input {name}", drawn[name], recorded
    args.normalize_advantage = False
    awr.tabulate(nets, data, args)
    raw = data.advantage.clone()
    args.normalize_advantage = True
    awr.tabulate(nets, data, args)
    _, weight = awr.awr_loss(nets, data.obs, data.action, data.advantage, args)
    found = {"returns": data.returns, "advantage_raw": raw, "advantage": data.advantage}
    found["weight"] = weight
    for name, recorded in case["tables"].items():
        yield f"{label}, {name}", found[name], recorded
    for row, i in (("first_row", 0), ("last_row", -1)):
        for name, recorded in case[row].items():
            yield f"{label}, {name} of the {row}", found[name][i], recorded
    capped = (weight >= args.max_weight).sum()
    yield f"{label}, number of capped weights", capped, case["capped_weights"]
    yield f"{label}, mean of the advantages", raw.mean(), case["advantage_mean"]
    yield f"{label}, their deviation", raw.std(correction=0), case["advantage_std"]


def replay(case):
    """The updates of a case `returns_*`, on tables drawn in the order of awr.md."""
    rng, B = np.random.default_rng(case["seed"]), case["batch"]
    actor = draw_network(rng, (OBS, 256, 256, ACT))
    log_std = rng.uniform(-1, 0, ACT)
    v = draw_network(rng, (OBS, 256, 256, 1))
    batches = []
    for _ in range(case["updates"]):
        s, a = rng.standard_normal((B, OBS)), np.tanh(rng.standard_normal((B, ACT)))
        returns = 5 + 3 * rng.standard_normal(B)
        batches.append((s, a, returns, 1.5 * rng.standard_normal(B)))
    s, a, returns, advantage = (torch.tensor(np.concatenate(x)) for x in zip(*batches))
    nothing = torch.zeros_like(returns)
    data = awr.Tables(s, a, nothing, s, nothing, returns=returns, advantage=advantage)

    @torch.no_grad()
    def load(nets):
        load_network(nets.actor, actor)
        nets.log_std.copy_(torch.tensor(log_std))
        load_network(nets.v, v)

    args = awr.Args(batch_size=B, **case["settings"])
    run = Replay(case, data, load)
    with in_float64():
        nets = awr.Nets(data, args)
        opt = SimpleNamespace(
            v=Adam(nets.v.parameters(), args.lr),
            actor=Adam([*nets.actor.parameters(), nets.log_std], args.lr),
        )
    run.start(nets, opt)
    for t in run.loop(case["updates"]):  # `train` would make tables of its own
        run.after(t, awr.update(nets, opt, data, args))
    return run


def values(record):
    for label, case in record["cases"].items():
        yield from compare_tables(label, case) if "tables" in case else replay(case).compare(label)

"""td3_bc.py and CORL's TD3+BC in lockstep: equal weights at the start, equal rows and equal noise
in every update.

A curve is the distance of the two programs' parameters, relative to their size. In float64 it stays
at rounding, so the updates are one function, and with --compile, too. In float32 it grows to a few
percent, as it does between two copies of CORL's own program, in one of which one weight was first
moved by one unit in the last place. So two runs with one seed, on two processors say, need not have
one score.

    git clone https://github.com/tinkoff-ai/CORL ../CORL
    git -C ../CORL checkout 6afec90
    python peers/td3_lockstep.py --corl ../CORL
"""

import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import matplotlib.figure
import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "algorithms")]
import td3_bc

from common import Adam, graphed, normalize_obs
from peers import stand_ins
from run import load

ROWS = ("obs", "action", "reward", "next_obs", "terminal")
NAMES = (
    "ours and CORL's, float64",
    "ours and CORL's, float32",
    "two copies of CORL's, one weight moved, float32",
)


@dataclass
class Args:
    corl: str = "../CORL"
    """checkout of tinkoff-ai/CORL"""
    steps: int = 2_000
    """updates"""
    compile: bool = False
    """compile our update"""
    out: str = "figures/td3_lockstep.png"
    """where the picture goes"""


def start_ours(data, args):
    """(networks, [(weight (in, out), bias (out,))] of actor and critics, update(t, rows)).
    The update draws rows and then noise, as CORL's is given them."""
    nets = td3_bc.Nets(data, args).to(data.obs.dtype)
    layers = list(zip(nets.actor.weights, nets.actor.biases))
    for j in (0, 1):
        layers += [(w[j], b[j, 0]) for w, b in zip(nets.q.weights, nets.q.biases)]
    opt = SimpleNamespace(
        q=Adam(nets.q.parameters(), args.lr),
        actor=Adam(nets.actor.parameters(), args.lr),
    )

    step = graphed(td3_bc.update, nets, opt, data, args, compile=args.compile)
    return layers, lambda t, rows: step(t % args.policy_freq == 0)


def start_corl(program, data, args, layers):
    """The same of CORL's program, started from `layers`."""
    s, a = data.obs.shape[1], data.action.shape[1]
    linear = []
    pairs = []
    critics = [program["Critic"](s, a) for _ in range(2)]
    for net in (program["Actor"](s, a, 1.0), *critics):
        linear += [x for x in net.modules() if isinstance(x, torch.nn.Linear)]
        pairs += [net, torch.optim.Adam(net.parameters(), args.lr)]
    for own, (weight, bias) in zip(linear, layers, strict=True):
        own.weight.data = weight.detach().T.clone()
        own.bias.data = bias.detach().clone()
    trainer = program["TD3_BC"](1.0, *pairs, discount=args.gamma, tau=args.polyak)

    def update(t, rows):
        batch = [getattr(data, key)[rows] for key in ROWS]
        trainer.train([x[:, None] if x.dim() == 1 else x for x in batch])

    return [(x.weight.T, x.bias) for x in linear], update


def distance(a, b) -> float:
    """|a's parameters - b's| / |a's parameters|."""
    flat = lambda pairs: torch.cat([p.reshape(-1) for pair in pairs for p in pair])
    x = flat(a)
    y = flat(b)
    return ((x - y).norm() / x.norm()).item()


def lockstep(program, name, how):
    """Distances after each update; both programs see the same random numbers."""
    dtype = torch.float64 if "64" in name else torch.float32
    torch.set_default_dtype(dtype)
    data, _ = load("hopper-replay-demo", "cpu", "none")
    normalize_obs(data, eps=1e-3)
    for key in ROWS:
        setattr(data, key, getattr(data, key).to(dtype))
    args = td3_bc.Args(polyak=0.01, compile=how.compile)  # else CORL's defaults are ours
    torch.manual_seed(0)
    layers, update = start_ours(data, args)
    theirs, their_update = start_corl(program, data, args, layers)
    draws_rows = "ours" in name
    if not draws_rows:
        layers, update = start_corl(program, data, args, layers)
        moved = layers[0][0].data[0]
        moved[0] = torch.nextafter(moved[0], moved[0] + 1)
    found = []
    for t in range(1, how.steps + 1):
        torch.manual_seed(t)
        start = torch.get_rng_state()
        rows = torch.randint(len(data.obs), (args.batch_size,))
        noise = torch.get_rng_state()
        their_update(t, rows)
        torch.set_rng_state(start if draws_rows else noise)
        update(t, rows)
        found.append(distance(layers, theirs))
    return found


def main(how):
    stand_ins.put_all({})
    stand_ins.put_flags(stand_ins.nothing)
    program = runpy.run_path(f"{how.corl}/algorithms/offline/td3_bc.py")
    figure = matplotlib.figure.Figure(layout="constrained")
    panel = figure.subplots()
    for name in NAMES:
        values = lockstep(program, name, how)
        panel.loglog(range(1, how.steps + 1), values, label=name)
        print(f"{name}: {values[-1]:.1e} after {how.steps} updates")
    panel.set(xlabel="updates", ylabel="relative distance of the parameters")
    panel.legend()
    figure.savefig(how.out)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

"""td3_bc.py and CORL's TD3+BC in lockstep: equal weights at the start, equal rows and equal noise
in every update.

A curve is the distance of the two programs' parameters, relative to their size. In float64 it stays
at rounding, so the two are the same function. In float32 it grows to a few percent, as it does
between two copies of CORL's own program, in one of which one weight was first moved by one unit in
the last place. So two runs with one seed, on two processors say, need not have one score.

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

from common import Adam, InputError, normalize_obs
from peers import drive
from run import load

ROWS = ("obs", "action", "reward", "next_obs", "terminal")
NAMES = (
    "ours and CORL's, float64",
    "ours and CORL's, float32",
    "two copies of CORL's, one weight moved, float32",
)


@dataclass
class Args:
    corl: str = ""
    """checkout of tinkoff-ai/CORL"""
    env: str = "hopper-replay-demo"
    """dataset"""
    steps: int = 2_000
    """updates"""
    out: str = "figures/td3_lockstep.png"
    """where the picture goes"""


class Ours:
    """td3_bc.py on `data`; `layers` has (weight (in, out), bias (out,)) of actor and critics."""

    def __init__(self, data, args):
        self.data = data
        self.args = args
        self.nets = td3_bc.Nets(data, args).to(data.obs.dtype)
        actor = self.nets.actor
        q = self.nets.q
        self.layers = list(zip(actor.weights, actor.biases))
        for j in (0, 1):
            for w, b in zip(q.weights, q.biases):
                self.layers.append((w[j], b[j]))
        self.opt = SimpleNamespace(
            q=Adam(q.parameters(), args.lr),
            actor=Adam(actor.parameters(), args.lr),
        )

    def update(self, t, rows):
        """Draws rows and then noise, as CORL's update is given them."""
        td3_bc.update(self.nets, self.opt, self.data, self.args, t % self.args.policy_freq == 0)


class Corl:
    """CORL's program, started from `layers`, those of Ours; `moved`: one weight is moved first."""

    def __init__(self, program, data, args, layers, moved=False):
        self.data = data
        s = data.obs.shape[1]
        a = data.action.shape[1]
        nets = [
            program["Actor"](s, a, 1.0),
            program["Critic"](s, a),
            program["Critic"](s, a),
        ]
        linear = []
        pairs = []
        for net in nets:
            linear += [x for x in net.modules() if isinstance(x, torch.nn.Linear)]
            pairs += [net, torch.optim.Adam(net.parameters(), args.lr)]
        for own, (weight, bias) in zip(linear, layers, strict=True):
            own.weight.data = weight.detach().T.clone()
            own.bias.data = bias.detach().reshape(-1).clone()
        if moved:
            first = linear[0].weight.data[0]
            above = torch.full_like(first[0], 2.0)
            first[0] = torch.nextafter(first[0], above)
        self.layers = [(x.weight.T, x.bias) for x in linear]
        self.program = program["TD3_BC"](
            1.0,
            *pairs,
            discount=args.gamma,
            tau=args.polyak,
            policy_noise=args.policy_noise,
            noise_clip=args.noise_clip,
            policy_freq=args.policy_freq,
            alpha=args.alpha,
        )

    def update(self, t, rows):
        batch = []
        for key in ROWS:
            x = getattr(self.data, key)[rows]
            batch.append(x[:, None] if x.dim() == 1 else x)
        self.program.train(batch)


def distance(a, b) -> float:
    """|a's parameters - b's| / |a's parameters|."""
    flat = []
    for one in (a, b):
        parts = [p.detach().reshape(-1) for pair in one.layers for p in pair]
        flat.append(torch.cat(parts))
    x, y = flat
    return ((x - y).norm() / x.norm()).item()


def lockstep(a, b, args, steps, shown):
    """Distances after each of the updates `shown`; both see the same random numbers."""
    found = []
    for t in range(1, steps + 1):
        torch.manual_seed(t)
        start = torch.get_rng_state()
        rows = torch.randint(len(a.data.obs), (args.batch_size,))
        noise = torch.get_rng_state()
        for one in (a, b):
            torch.set_rng_state(start if isinstance(one, Ours) else noise)
            one.update(t, rows)
        if t in shown:
            found.append(distance(a, b))
    return found


def curves(program, how):
    """(numbers of updates, {name: distances})."""
    points = {int(10 ** (k / 8)) for k in range(60)}
    shown = sorted(x for x in points | {how.steps} if x <= how.steps)
    found = {}
    for name in NAMES:
        dtype = torch.float64 if "64" in name else torch.float32
        torch.set_default_dtype(dtype)
        data, _ = load(how.env, "cpu", "none")
        normalize_obs(data, eps=1e-3)
        for key in ROWS:
            setattr(data, key, getattr(data, key).to(dtype))
        args = td3_bc.Args(polyak=0.01)  # the preset's
        torch.manual_seed(0)
        ours = Ours(data, args)
        first = Corl(program, data, args, ours.layers)
        second = ours
        if "copies" in name:
            second = Corl(program, data, args, ours.layers, moved=True)
        found[name] = lockstep(second, first, args, how.steps, shown)
    torch.set_default_dtype(torch.float32)
    return shown, found


def main(how):
    path = Path(how.corl) / "algorithms" / "offline" / "td3_bc.py"
    if not how.corl or not path.is_file():
        raise InputError(f"--corl {how.corl or 'is missing'}: name a checkout of tinkoff-ai/CORL")
    torch.set_num_threads(1)
    drive.put_all(print)
    drive.put_flags(lambda train, Config: None)
    shown, found = curves(runpy.run_path(str(path)), how)
    figure = matplotlib.figure.Figure((6.4, 4), layout="constrained")
    panel = figure.subplots()
    for (name, values), style in zip(found.items(), ("C0-", "C1-", "k--")):
        panel.loglog(shown, values, style, label=name)
        print(f"{name}: {values[-1]:.1e} after {how.steps} updates")
    panel.set_xlabel("updates")
    panel.set_ylabel("relative distance of the parameters")
    panel.set_title(f"TD3+BC in lockstep, {how.env}", fontsize=11)
    panel.legend()
    figure.savefig(how.out, dpi=150)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

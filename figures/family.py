"""The family in one picture: every algorithm file, trained by its own `train` on one bandit.

At a state s, the data has two branches of actions, and the upper one pays more. The most is paid
where the data has no action: in the hole between the branches, and beyond them. No row tells this,
so what a method does there, it does by luck: one that averages the branches falls into the hole,
and one that trusts the slope of its Q climbs out of the data.

Some methods have a known optimum, the density prior(a|s) exp(value(s,a) / TAU), normalized. Its
likeliest action is drawn as a dashed line, and its KL from the policy, the mean over states in
nats, is integrated on a grid:
- AWR, AWAC, IQL and ARQ clone weighted rows. The prior is the true density of the data, the value
  the true reward, with AWR's and ARQ's bound on a row's weight. The KL is KL(optimum | policy).
- BRAC and iTRPO pay for divergence from a clone. The prior is their clone, a single Gaussian that
  also covers the hole, and the value their own Q. The KL is KL(policy | optimum).
- Fisher-BRC's actor fits exp(Q / temperature), Q = O + log mu. The KL is KL(policy | optimum).

TOLERANCE was fixed before the first run; the learning rates, the rows and the scale of the rewards
were chosen after it. Two methods cannot meet it, because one Gaussian cannot follow the optimum:
AWR, whose bounded weights keep 0.1% of the lower branch, which costs 0.11, and Fisher-BRC, whose
temperature leaves more of it. ARQ has no KL and no band: the deviation of its policy moves at a
rate that no flag sets, and is far too large after so few steps. FQL acts with noise, so draws of
its policy are shown.

Differs: this is no figure of a paper. All files have the same data and the flags of SHARED, each
those that it knows; every phase has --steps steps. A file sets nothing of its own but its weight
of the data, where this is in units of reward: TAU. Networks learn faster than in the papers.

    python figures/family.py
"""

import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.figure
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "algorithms"))
import brac
import brac_plus
import itrpo

from common import Data, normal_log_prob, tanh_log_det

TAU = 1.0  # units of reward
TOLERANCE = 0.1  # nats
WIDTH = 0.05  # standard deviation of a branch
SHARED = dict(lr=3e-3, actor_lr=3e-3, critic_lr=3e-3, q_lr=3e-3, bc_lr=3e-3, score_lr=3e-3)
SHARED |= dict(polyak=0.05, normalize_obs=True, warm_start=0, dual_start=1.0, beta_start=1.0)
SHARED |= dict(hidden=128, width=128, samples=2, members=1, n_actions=4, n=10, k=3)


@dataclass
class Args:
    steps: int = 2_500
    """gradient steps of every phase of every method"""
    batch_size: int = 64
    """rows per gradient step"""
    rows: int = 4_000
    """rows of the data"""
    seed: int = 0
    """seeds data, networks and batches"""
    out: str = "figures/family.png"
    """where the picture goes"""


class Plain:
    """A run that keeps the networks and the policy, and writes nothing."""

    device = torch.device("cpu")
    after = lambda self, t, metrics, act=None: setattr(self, "act", act)
    loop = lambda self, steps, phase="train": range(1, steps + 1)
    kept = lambda self, name, compute: compute()
    reference = lambda self, label, act: None

    def start(self, nets, opt, **largest):
        self.nets = nets


def center(s):
    """The middle of the hole at states s."""
    return 0.15 * torch.sin(math.pi * s)


def reward(s, a):
    """What an action pays: more upwards, and most between the branches and beyond them."""
    u = a - center(s)
    return 10 * u + 3 * torch.cos(2 * math.pi * u / 0.8)


def data_log_density(s, a):
    """log beta(a|s): two branches of equal shares, 0.4 above and below the middle of the hole."""
    u = a - center(s)
    log_std = torch.tensor(WIDTH).log()
    above = normal_log_prob(u, 0.4, log_std)
    below = normal_log_prob(u, -0.4, log_std)
    return torch.logaddexp(above, below) - math.log(2)


def bandit(rows):
    """Data of `rows` episodes of one step each."""
    s = 2 * torch.rand(rows, 1) - 1
    branch = 0.8 * torch.randint(2, (rows, 1)) - 0.4
    noise = WIDTH * torch.randn(rows, 1)
    a = center(s) + branch + noise
    r = reward(s, a).squeeze(1)
    return Data(s, a, r, s.clone(), torch.ones(rows))


@dataclass
class Grid:
    """S states and G actions between -1 and 1; s (S, 1) broadcasts against a (G,)."""

    s: torch.Tensor = field(default_factory=lambda: torch.linspace(-0.99, 0.99, 67)[:, None])
    a: torch.Tensor = field(default_factory=lambda: (torch.arange(1000) + 0.5) / 500 - 1)

    def normalized(self, log_density):
        """log-probabilities (S, G) of the cells, which add up to 1 in every state."""
        return log_density - log_density.logsumexp(1, keepdim=True)

    def gaussian(self, mean, log_std, squashed):
        """log-density (S, G) of a Gaussian (S, 1), through tanh if `squashed`."""
        x = torch.atanh(self.a) if squashed else self.a
        jacobian = tanh_log_det(x) if squashed else 0.0
        log_prob = normal_log_prob(x, mean, log_std)
        return self.normalized(log_prob - jacobian)

    def quantile(self, log_prob, share):
        """The action (S,) below which this share of the probability lies."""
        cumulative = log_prob.exp().cumsum(1)
        i = (cumulative < share).sum(1)
        return self.a[i.clamp(max=len(self.a) - 1)]

    def smaller_q(self, module, nets):
        """min_i Q_i (S, G) of a method's critics."""
        states, actions = len(self.s), len(self.a)
        s = nets.scaling.obs(self.s)
        s = s.expand(-1, actions).reshape(-1, 1)
        a = self.a.repeat(states)
        q = module.q(nets, s, a[:, None]).amin(0)
        return q.view(states, actions)


def weighted(grid, scale=TAU, bound=math.inf):
    """Optimum of weighted cloning: the data's density times the weights, which are bounded."""
    beta = grid.normalized(data_log_density(grid.s, grid.a))
    r = reward(grid.s, grid.a)
    v = (beta.exp() * r).sum(1, keepdim=True)
    advantage = r - v
    log_weight = (advantage / scale).clamp(max=math.log(bound))
    return grid.normalized(beta + log_weight)


def from_clone(grid, module, nets, args, alpha):
    """Optimum of BRAC and iTRPO: their clone times exp(Q / alpha)."""
    s = nets.scaling.obs(grid.s)
    clone = module.gaussian(nets.behavior, s)
    prior = grid.gaussian(*clone, squashed=True)
    q = grid.smaller_q(module, nets)
    return grid.normalized(prior + q / alpha)


def from_log_mu(grid, module, nets, args):
    """Optimum of Fisher-BRC's actor."""
    q = grid.smaller_q(module, nets)
    temperature = nets.log_temperature.exp()
    return grid.normalized(q / temperature)


def latent_policy(nets, s):
    """Mean and log-deviation of BRAC+'s policy."""
    return brac_plus.gaussian(nets.actor(s), floor=-20)


@dataclass
class Method:
    title: str
    weight: dict = field(default_factory=dict)
    """the one flag of the file that trades return against the data"""
    pi: Callable | None = None
    """(nets, scaled states) -> mean and log-deviation of the policy; None: no density"""
    squashed: bool = True
    """whether tanh follows the Gaussian"""
    optimum: Callable | None = None
    """(grid, module, nets, args) -> its log-probabilities on the grid"""
    covers: bool = False
    """KL(optimum | policy), as weighted cloning has it, instead of KL(policy | optimum)"""


cloning = dict(squashed=False, covers=True)
REWARD_STD = 4.1  # of the data's rewards, by which AWR divides its advantages
METHODS = {
    "bc": Method("BC"),
    "td3_bc": Method("TD3+BC"),
    "rebrac": Method("ReBRAC"),
    "sac_bc": Method("SAC+BC", pi=lambda nets, s: nets.pi(s)),
    "awr": Method(
        "AWR",
        dict(temperature=TAU / REWARD_STD),
        lambda nets, s: nets.pi(s),
        optimum=lambda grid, *_: weighted(grid, bound=20.0),
        **cloning,
    ),
    "awac": Method(
        "AWAC",
        dict(temperature=TAU),
        lambda nets, s: nets.pi(s),
        optimum=lambda grid, *_: weighted(grid),
        **cloning,
    ),
    "iql": Method(
        "IQL",
        dict(beta=1 / TAU),
        lambda nets, s: (nets.pi(s), nets.log_std),
        optimum=lambda grid, *_: weighted(grid),
        **cloning,
    ),
    "arq": Method(
        "ARQ",
        dict(alpha_pi=1 / TAU),
        optimum=lambda grid, *_: weighted(grid, bound=100.0),
    ),
    "fql": Method("FQL"),
    "cql": Method("CQL", pi=lambda nets, s: nets.pi(s)),
    "brac": Method(
        "BRAC",
        dict(alpha=TAU),
        lambda nets, s: brac.gaussian(nets.actor, s),
        optimum=lambda *x: from_clone(*x, alpha=TAU),
    ),
    "itrpo": Method(
        "iTRPO",
        dict(kl_coef=TAU),
        lambda nets, s: itrpo.gaussian(nets.actor, s),
        optimum=lambda *x: from_clone(*x, alpha=TAU),
    ),
    "brac_plus": Method("BRAC+ (ICLR)", pi=latent_policy),
    "brac_plus_acml": Method("BRAC+", pi=latent_policy),
    "fisher_brc": Method("Fisher-BRC", pi=lambda nets, s: nets.pi(s), optimum=from_log_mu),
}


def learn(name, data, args, **own):
    """Train one file, with flags of its `own` in place of its weight of the data: its module, its
    flags and the run."""
    module = importlib.import_module(name)
    known = module.Args.__dataclass_fields__
    flags = {key: value for key, value in SHARED.items() if key in known}
    lengths = {key: args.steps for key in module.Args.phases.values() if key}
    flags |= lengths | (own or METHODS[name].weight)
    how = module.Args(seed=args.seed, batch_size=args.batch_size, **flags)
    run = Plain()
    torch.manual_seed(args.seed)
    module.train(run, data, how)
    return module, how, run


@dataclass
class Panel:
    """What a panel shows at the states of the grid, (S,) each. The band from low to high is the
    middle 90% of the policy, and `best` the likeliest action of the optimum."""

    action: torch.Tensor
    """the action taken; of a policy that acts with noise, (5, S) draws"""
    low: torch.Tensor | None = None
    high: torch.Tensor | None = None
    best: torch.Tensor | None = None
    kl: float | None = None


def kl(p, q):
    """KL(p | q) in nats, the mean over states, of log-probabilities (S, G)."""
    in_state = (p.exp() * (p - q)).sum(1)
    return in_state.mean().item()


@torch.no_grad()
def look(name, grid, module, how, run):
    """The panel of a trained file."""
    method = METHODS[name]
    draws = run.act(grid.s.repeat(5, 1)).view(5, -1)
    noisy = (draws[0] != draws[1]).any()
    panel = Panel(draws if noisy else draws[0])
    if method.optimum:
        best = method.optimum(grid, module, run.nets, how)
        panel.best = grid.a[best.argmax(1)]
    if method.pi:
        s = run.nets.scaling.obs(grid.s)
        pi = method.pi(run.nets, s)
        learned = grid.gaussian(*pi, method.squashed)
        panel.low = grid.quantile(learned, 0.05)
        panel.high = grid.quantile(learned, 0.95)
    if method.optimum and method.pi:
        pair = (best, learned) if method.covers else (learned, best)
        panel.kl = kl(*pair)
    return panel


def train_and_look(name, args):
    """The panel of one file, on the data that all files share."""
    torch.manual_seed(args.seed)
    data = bandit(args.rows)
    return look(name, Grid(), *learn(name, data, args))


def background(axes, data):
    """The reward in gray levels, and rows of the data. Returns the image."""
    grid = Grid()
    image = axes.contourf(
        grid.s[:, 0],
        grid.a[::10],
        reward(grid.s, grid.a[::10]).T,
        torch.linspace(-12, 12, 13),
        cmap="Blues_r",
        extend="both",
    )
    axes.plot(data.obs[:250], data.action[:250], ".", c="gold", ms=1.5)
    axes.set(
        xlim=(-0.99, 0.99),
        ylim=(-1.06, 1.06),
        xticks=(-1, 0, 1),
        yticks=(-1, 0, 1),
    )
    return image


POLICY = dict(color="tab:red", lw=2)
DRAWS = dict(c="tab:red", ls="", marker="o", ms=2)
BAND = dict(color="tab:red", alpha=0.5, lw=0)
OPTIMUM = dict(color="darkturquoise", ls="--", lw=1.5)


def draw(axes, name, panel, data):
    """The panel of one file."""
    s = Grid().s[:, 0]
    image = background(axes, data)
    if panel.low is not None:
        axes.fill_between(s, panel.low, panel.high, **BAND)
    if panel.action.ndim == 2:
        axes.plot(s, panel.action.T, **DRAWS)
    else:
        axes.plot(s, panel.action, **POLICY)
    if panel.best is not None:
        axes.plot(s, panel.best, **OPTIMUM)
    title = METHODS[name].title
    if panel.kl is not None:
        title += f": KL {panel.kl:.2f}"
    axes.set_title(title)
    return image


def legend(figure, axes, image):
    """What the lines, the band, the dots and the gray levels are, in the place of a panel."""
    axes.set_axis_off()
    axes.plot([], [], label="action taken", **POLICY)
    axes.plot([], [], label="five draws", **DRAWS)
    axes.fill_between([], [], label="90% of policy", **BAND)
    axes.plot([], [], label="optimum", **OPTIMUM)
    axes.plot([], [], ".", c="goldenrod", label="data")
    axes.legend(loc="upper center", frameon=False)
    place = axes.inset_axes([0.05, 0.1, 0.9, 0.07])
    figure.colorbar(
        image,
        cax=place,
        orientation="horizontal",
        ticks=(-10, 0, 10),
        label="reward",
    )


def main(args):
    torch.manual_seed(args.seed)
    data = bandit(args.rows)
    with matplotlib.rc_context({"font.size": 10, "axes.titlesize": 10}):
        figure = matplotlib.figure.Figure((8, 8.4), layout="constrained")
        panels = figure.subplots(4, 4, sharex=True, sharey=True)
        for axes, name in zip(panels.flat, METHODS):
            panel = train_and_look(name, args)
            image = draw(axes, name, panel, data)
            print(f"{METHODS[name].title}: KL {panel.kl}")
        legend(figure, panels[-1, -1], image)
        figure.supxlabel("state s")
        figure.supylabel("action a")
        figure.suptitle("Maximize return while staying close to the data", fontweight="bold")
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

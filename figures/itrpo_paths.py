"""iTRPO's figure 1 made exact (Zhang & Tan, AAAI 2024): the paths of BRAC's and iTRPO's policies.

The paper's figure is a sketch; here both iterate Eq. 5 on a random MDP (6 states, 3 actions):

    pi <- softmax(log pi_b + Q / alpha),  rho = log pi - log pi_b
    Q  <- r + tau alpha rho + 0.9 P <pi, Q - alpha rho>  (+ an error, N(0, 1/4))

Differs: iTRPO's limit is BRAC's at alpha (1 - tau), so that BRAC is drawn (itrpo.py's --control):
without it, a larger tau would only be a smaller alpha. Both start at the clone, Q at r.

    python figures/itrpo_paths.py
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.figure
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "algorithms"))
import itrpo  # noqa: E402


@dataclass
class Args:
    taus: tuple[float, ...] = (0.0, 0.3, 0.6, 0.9)
    """share of alpha = 4 that holds the policy at its last self; above, the last one"""
    steps: int = 60
    """iterations"""
    out: str = "figures/itrpo_paths.png"
    """where the picture goes"""


def random_mdp(seed=3):
    """P (S, A, S), r (S, A) and log pi_b (S, A), float64."""
    torch.manual_seed(seed)
    p = torch.randn(6, 3, 6).double().softmax(-1)
    (r, logits) = torch.randn(2, 6, 3).double()
    return p, r, (logits / 2).log_softmax(-1)


def iterate(mdp, args, steps, noise=0.0):
    """log pi_0 (the clone) to log pi_K by Eq. 5, (K + 1, S, A), and Q_K."""
    torch.manual_seed(1)
    (p, r, log_b) = mdp
    path = [mdp[2]]
    q = mdp[1]
    for _ in range(steps):
        path.append((log_b + q / args.kl_coef).log_softmax(-1))
        rho = path[-1] - log_b
        value = (path[-1].exp() * (q - args.kl_coef * rho)).sum(-1)
        q = itrpo.target_value(r, 0.0, rho, p @ value, args) + noise * torch.randn_like(q)
    return torch.stack(path), q


def setting(tau, control=False, alpha=4.0):
    args = itrpo.Args(
        setting="paper",
        kl_coef=alpha,
        shape_coef=tau,
        control=control,
        gamma=0.9,
    )
    args.name = f"BRAC, α = {alpha * (1 - tau):.2g}" if control else f"iTRPO, τ = {tau:g}"
    args.resolve()
    return args


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def triangle(log_pi):
    _, p2, p3 = log_pi.exp().unbind(-1)
    return p2 + p3 / 2, 0.866 * p3


def main(args):
    mdp = random_mdp()
    figure = matplotlib.figure.Figure((10.5, 8.8), layout="constrained")
    *paths, distance, length = figure.subplots(2, 2).flat
    for panel, noise, title in zip(paths, (0, 0.5), ("exact", "Q with errors")):
        for control, style in ((True, "C0o--"), (False, "C3o-")):
            how = setting(args.taus[-1], control)
            path, goal = (iterate(mdp, how, *k)[0][:, 0] for k in ((args.steps, noise), (999,)))
            panel.plot(*triangle(path), style, lw=1, ms=4, label=how.name)
        panel.plot(*triangle(path[0]), "ks", ms=9, label="clone, both start here")
        panel.plot(
            *triangle(goal[-1]),
            "k*",
            ms=15,
            label="limit of both without errors",
        )
        panel.plot([0, 1, 0.5, 0], [0, 0, 0.866, 0], "k", lw=1)
        for x, y, a in ((0, -0.04, 1), (1, -0.04, 2), (0.5, 0.89, 3)):
            panel.text(x, y, f"action {a}", ha="center", va="center")
        panel.set(
            title=f"policies at one state, {title}",
            aspect="equal",
            ylim=(-0.25, 0.95),
        )
        panel.set_axis_off()
        panel.legend(fontsize=9, loc="lower center", ncols=2)
    for i, tau in enumerate(args.taus):
        for control, style in ((False, f"C{i}-"), (True, f"C{i}--")):
            path, _ = iterate(mdp, how := setting(tau, control), args.steps)
            distance.plot(kl(path, path[0]).mean(1), style, label=how.name)
            length.semilogy(kl(path[1:], path[:-1]).mean(1), style, label=how.name)
    distance.set(xlabel="iteration", ylabel="mean over states of KL(π ‖ clone)")
    length.set(
        xlabel="iteration",
        ylabel="KL(new π ‖ last π), log scale",
        ylim=(1e-8, 3),
    )
    distance.legend(fontsize=8, ncols=2)
    length.legend(fontsize=8, ncols=2)
    figure.suptitle("iTRPO ends where BRAC with α (1 - τ) does; its smaller steps average errors")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

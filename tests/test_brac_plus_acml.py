"""brac_plus_acml.py: its soft gate, the weight lam, and what a task sets. test_brac_plus.py has the
equations and phases that both files share."""

from types import SimpleNamespace

import pytest
import torch
from brac_plus_acml import PRESETS, Args, lam_loss, penalty_gate, train
from stand_in import PlainRun
from torch.testing import assert_close

from run import parse


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_gate(kind):
    """softplus with a largest value of one, or a step."""
    d, nets = torch.linspace(0, 3, 16), SimpleNamespace(eps_gp=torch.tensor(1.5))
    weight = torch.log1p(torch.exp(d - 1.5))
    expected = weight / weight[-1] if kind == "soft" else torch.arange(16) >= 8
    assert_close(penalty_gate(nets, d, Args(gate=kind)), expected.float())


@pytest.mark.parametrize("penalty", [0.5, 0.1])
def test_lam_grows_above_the_target_alone(penalty):
    lam = torch.tensor(0.3, requires_grad=True)
    loss = lam_loss(lam, torch.tensor(penalty), Args(gp_target=0.2))
    (slope,) = torch.autograd.grad(loss, lam)
    assert_close(slope, torch.tensor(0.2 - penalty))


def test_lam_is_never_below_its_first_value(tiny_data):
    """Its parameter falls far below it here, the weight in the critics' loss does not."""
    run, short = PlainRun(), dict(batch_size=8, bc_steps=2, samples=2, members=1)
    args = Args(lam=0.4, gp_target=1e6, dual_lr=0.1, dual_start=0.5, steps=20, **short)
    train(run, tiny_data(), args)
    assert run.nets.lam < -1
    for row in run.phases["train"]:
        assert row["lam"] == pytest.approx(0.4)
        assert row["q_loss"] == pytest.approx(row["td_loss"] + 0.4 * row["penalty"], rel=1e-5)


def resolved(env):
    return parse(Args, PRESETS, ["--env", env])[0]


@pytest.mark.parametrize(
    ("env", "margin", "mmd_margin"),
    [
        ("hopper-medium-v0", 0.2, 0.02),
        ("hopper-medium-replay-v2", 3.0, 0.05),
        ("hopper-random-v0", 3.0, 0.1),
        ("walker2d-medium-v2", 1.0, 0.05),
        ("halfcheetah-medium-v0", 7.0, 0.1),
        ("walker2d-medium-expert-v0", 0.2, 0.02),
        ("mujoco/hopper/medium-v0", 0.2, 0.02),
        ("mujoco/walker2d/medium-v0", 1.0, 0.05),
        ("mujoco/halfcheetah/medium-v0", 7.0, 0.1),
        ("mujoco/hopper/expert-v0", 3.0, 0.05),
        ("hopper/medium-v0", 3.0, 0.05),  # a dataset of the user's own
        ("ant-medium-expert-v0", 3.0, 0.05),
        ("hopper-medium-v0.npz", 3.0, 0.05),
        ("hopper-medium-expert-demo", 0.2, 0.05),
    ],
)
def test_margins_of_tasks(env, margin, mmd_margin):
    """Thresholds are measured everywhere."""
    args = resolved(env)
    assert args.eps is args.h0 is None and args.divergence == "kl" and args.gate == "soft"
    assert (args.margin, args.mmd_margin) == (margin, mmd_margin)
    assert args.gp_target == (0.1 if "halfcheetah" in env else 0.01)


@pytest.mark.parametrize("env", ["pen-human-v0", "pen-cloned-v1", "D4RL/pen/human-v2"])
def test_adroit_has_settings_of_its_own(env):
    args = resolved(env)
    assert (args.divergence, args.gate, args.gp_target) == ("mmd", "hard", 0.005)
    assert (args.mmd_margin, args.mmd_width) == (0.001, 120)
    assert (args.steps, args.actor_lr) == (250_000, 5e-8)

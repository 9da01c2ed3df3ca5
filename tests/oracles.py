"""What several tests compare with: plain nn.Linear stacks, plain gradient steps, float64 rows."""

import torch
from torch import nn
from torch.testing import assert_close


def stack(net, member=None):
    """The same network as nn.Linear layers with ReLU between them, weights copied."""
    layers = []
    for w, b in zip(net.weights, net.biases, strict=True):
        w, b = (w, b) if member is None else (w[member], b[member, 0])
        linear = nn.Linear(*w.shape, dtype=w.dtype)
        linear.weight.data, linear.bias.data = w.detach().T.clone(), b.detach().clone()
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def assert_same(net, *stacks):
    """The weights of `net` are those of the stacks, one for each member."""
    for i, (w, b) in enumerate(zip(net.weights, net.biases, strict=True)):
        w, b = (w, b[:, 0]) if w.ndim == 3 else (w[None], b[None])
        for e, oracle in enumerate(stacks):
            assert_close(w[e], oracle[2 * i].weight.T, atol=1e-8, rtol=1e-6)
            assert_close(b[e], oracle[2 * i].bias, atol=1e-8, rtol=1e-6)


class SGD:
    """In Adam's place where a test needs the gradient's size, which Adam's first step hides."""

    def __init__(self, params, lr):
        self.params, self.lr = list(params), lr

    @torch.no_grad()
    def step(self, grads):
        for p, g in zip(self.params, grads):
            p.sub_(self.lr * g)


def in_double(data):
    """The same Data with its tensors in float64."""
    for name, value in vars(data).items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            setattr(data, name, value.double())
    return data


def rows(data):
    """s, a, r, s2, terminal of every transition, in order."""
    return data.obs, data.action, data.reward, data.next_obs, data.terminal

"""The tiny helpers that every algorithm file shares: parsing with presets, networks, Adam,
evaluation, and one run's folder (logs, checkpoints, exact resume).

Nothing here belongs to a paper: no losses, no targets, no schedules, no hyperparameter defaults.
Arrows go one way: algorithms/* -> common.py -> datasets.py.
"""

import csv
import ctypes
import dataclasses
import hashlib
import io
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
import zlib
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from datasets import InputError, load_dataset  # noqa: F401 (algorithms import them from here)

# ---- command line ----------------------------------------------------------------------------


def parse(Args, presets: dict, argv: list[str] | None = None):
    """Command line -> `Args`. Later matching rows of `presets` ({fnmatch pattern of --env: {field:
    value}}) replace the defaults; a flag that is typed always wins. Whole numbers may be typed as
    1e5. Raises InputError for values that cannot work."""
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    types = {f.name: f.type for f in dataclasses.fields(Args)}
    argv = [part for arg in argv for part in (arg.split("=", 1) if re.match(r"--\w", arg) else [arg])]
    env = types and Args.env
    for i in range(len(argv) - 1):
        flag = argv[i].removeprefix("--").replace("-", "_")
        if flag == "env":
            env = argv[i + 1]
        if types.get(flag) is int and re.fullmatch(r"[\d.]+e\+?\d+", argv[i + 1], re.I):
            if float(argv[i + 1]).is_integer():  # tyro takes no 1e5 for an int
                argv[i + 1] = str(int(float(argv[i + 1])))
    preset = {}
    for pattern, fields in presets.items():
        if fnmatch(env, pattern):
            preset.update(fields)
    doc = sys.modules[Args.__module__].__doc__
    args = tyro.cli(Args, default=Args(**preset), args=argv, description=doc)
    args.preset = preset
    for name, value in vars(args).items():
        if types.get(name) is int and name != "seed" and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}: give a whole number above 0")
    if args.seed < 0:
        raise InputError(f"--seed is {args.seed}: give a whole number, 0 or above")
    if args.resume and args.overwrite:
        raise InputError("--resume continues a run and --overwrite deletes it: give one of them")
    if args.precision not in ("auto", "highest", "high", "medium"):
        raise InputError(f"--precision is {args.precision!r}: give auto, highest, high or medium")
    return args


def seed_everything(seed: int) -> None:
    """Seed torch (CPU and CUDA) and numpy."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)


def choose_device(device: str, precision: str) -> torch.device:
    """Resolve "auto" to cuda where there is one, else cpu, and choose how fp32 products are computed.

    Precision "auto" is oneDNN's route ("medium"; twice as fast on AMD CPUs) where its error on one
    product is that of fp32, and "highest" where the hardware would round (AMX, TF32)."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        line = str(error).splitlines()[0]
        raise InputError(f"--device {device}: {line}; give cpu, cuda or auto") from None
    if precision == "auto":
        torch.set_float32_matmul_precision("medium")
        a = torch.linspace(-1, 1, 256 * 256, device=device).sin().view(256, 256)
        exact = a.double() @ a.double()
        exact_enough = (a @ a - exact).abs().max() < 2e-6 * exact.abs().max()
        precision = "medium" if exact_enough else "highest"
    torch.set_float32_matmul_precision(precision)
    if sys.platform == "linux":  # glibc: keep freed megabyte buffers instead of faulting them anew
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-1, 1 << 30), libc.mallopt(-3, 1 << 25)  # M_TRIM_, M_MMAP_THRESHOLD
    return device


# ---- data on the device ----------------------------------------------------------------------


def sample(data, batch_size: int):
    """Rows drawn uniformly with replacement, on the data's device: s (B, S), a (B, A), r (B,),
    s2 (B, S), terminal (B,)."""
    i = torch.randint(len(data.obs), (batch_size,), device=data.obs.device)
    rows = (data.obs, data.action, data.reward, data.next_obs, data.terminal)
    return [x.index_select(0, i) for x in rows]


def normalize_obs(data, eps: float) -> None:
    """Shift and scale data.obs and data.next_obs in place to (s - mean) / (std + eps), population
    statistics of data.obs; `Scaling` applies the same constants when the policy acts."""
    data.obs_mean = data.obs.mean(0)
    data.obs_std = data.obs.std(0, correction=0) + eps
    for x in (data.obs, data.next_obs):
        x.sub_(data.obs_mean).div_(data.obs_std)


class Scaling(nn.Module):
    """What stands between networks and task, saved with the weights: raw observations (B, S) to
    network inputs, and network actions in [-1, 1] (B, A) to the task's bounds."""

    def __init__(self, data):
        super().__init__()
        self.register_buffer("obs_mean", data.obs_mean.clone())
        self.register_buffer("obs_std", data.obs_std.clone())
        self.register_buffer("action_center", (data.action_high + data.action_low) / 2)
        self.register_buffer("action_half_range", (data.action_high - data.action_low) / 2)

    def obs(self, obs):
        return (obs - self.obs_mean) / self.obs_std

    def action(self, a):
        return self.action_center + self.action_half_range * a


# ---- networks and updates --------------------------------------------------------------------


class MLP(nn.Module):
    """Fully connected layers `sizes` with ReLU between them; inputs are concatenated on the last
    axis. (B, in) -> (B, out). With `members` E, that many independent networks run as one batched
    product per layer: (B, in) or (E, B, in) -> (E, B, out); `member` runs one of them alone.
    Initialized as nn.Linear is."""

    def __init__(self, *sizes: int, members: int | None = None):
        super().__init__()
        lead, row = ((), ()) if members is None else ((members,), (1,))
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for n_in, n_out in zip(sizes[:-1], sizes[1:]):
            for params, shape in ((self.weights, (n_in,)), (self.biases, row)):
                w = torch.empty(*lead, *shape, n_out).uniform_(-1, 1) / math.sqrt(n_in)
                params.append(nn.Parameter(w))

    def forward(self, *inputs, member: int | None = None):
        x = torch.cat(inputs, -1) if len(inputs) > 1 else inputs[0]
        last = len(self.weights) - 1
        for i, (w, b) in enumerate(zip(self.weights, self.biases)):
            w, b = (w, b) if member is None else (w[member], b[member, 0])
            if w.ndim == 3:
                x = torch.baddbmm(b, x.expand(len(w), *x.shape[-2:]), w)
            else:
                x = torch.addmm(b, x, w) if x.ndim == 2 else x @ w + b
            x = x.relu_() if i < last else x
        return x

    def input_gradient(self, *inputs):
        """With members: gradient (E, B, in) of each one's output with respect to the concatenated
        inputs, differentiable in the weights. ReLU's masks are constants, so this is the chain rule written
        out: the same numbers as a double backward at two thirds of its products."""
        x, masks = torch.cat(inputs, -1), []
        with torch.no_grad():
            for w, b in list(zip(self.weights, self.biases))[:-1]:
                x = torch.baddbmm(b, x.expand(len(w), *x.shape[-2:]), w).relu_()
                masks.append(x)
        grad = self.weights[-1].mT.expand(*x.shape)
        for w, mask in zip(reversed(self.weights[:-1]), reversed(masks)):
            grad = torch.ops.aten.threshold_backward(grad, mask, 0) @ w.mT
        return grad


class ScalarMLP(MLP):
    """An MLP with one output and no last axis: (B, in) -> (B,), with members (E, B)."""

    def __init__(self, *sizes: int, members: int | None = None):
        super().__init__(*sizes, 1, members=members)

    def forward(self, *inputs, member: int | None = None):
        return super().forward(*inputs, member=member).squeeze(-1)


@torch.no_grad()
def orthogonal_(net: MLP, hidden_gain: float, last_gain: float) -> MLP:
    """Orthogonal weights, each member on its own, and zero biases; returns the network."""
    for i, w in enumerate(net.weights):
        for member in w.view(-1, *w.shape[-2:]):
            nn.init.orthogonal_(member, last_gain if i == len(net.weights) - 1 else hidden_gain)
    for b in net.biases:
        b.zero_()
    return net


class Adam:
    """Adam (Kingma & Ba) as one fused call. Step count and learning rate are tensors, so that a
    schedule (`lr` changed in place) and the whole update survive compilation and CUDA graphs."""

    def __init__(self, params, lr: float, eps: float = 1e-8):
        self.params = list(params)
        self.m = [torch.zeros_like(p) for p in self.params]
        self.v = [torch.zeros_like(p) for p in self.params]
        device = self.params[0].device
        self.count = torch.zeros((), device=device)
        self.lr = torch.tensor(lr, device=device)
        self.eps = eps

    @torch.no_grad()
    def step(self, grads):
        self.count += 1
        if not torch.compiler.is_compiling():
            counts = [self.count] * len(self.params)
            torch._fused_adam_(
                self.params, grads, self.m, self.v, [], counts, lr=self.lr, beta1=0.9, beta2=0.999,
                weight_decay=0.0, eps=self.eps, amsgrad=False, maximize=False,
            )  # fmt: skip
            return
        torch._foreach_lerp_(self.m, grads, 1 - 0.9)  # the fused call does not compile
        torch._foreach_mul_(self.v, 0.999)
        torch._foreach_addcmul_(self.v, grads, grads, 1 - 0.999)
        root = torch._foreach_sqrt(self.v)
        torch._foreach_div_(root, (1 - 0.999**self.count).sqrt())
        torch._foreach_add_(root, self.eps)
        delta = torch._foreach_div(self.m, root)
        torch._foreach_mul_(delta, -self.lr / (1 - 0.9**self.count))
        torch._foreach_add_(self.params, delta)

    def state(self) -> list:
        """Every tensor that a checkpoint must hold."""
        return [*self.m, *self.v, self.count, self.lr]


def minimize(opt: Adam, loss):
    """One step on `loss` with respect to opt.params only; returns the loss, detached."""
    opt.step(torch.autograd.grad(loss, opt.params))
    return loss.detach()


@torch.no_grad()
def polyak(target: nn.Module, online: nn.Module, rate: float) -> None:
    """target <- rate * online + (1 - rate) * target, in place."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)


def tanh_log_det(x):
    """log(1 - tanh(x)^2) elementwise, exact in both tails."""
    return 2 * (math.log(2) - x - F.softplus(-2 * x))


def normal_log_prob(x, mean, log_std):
    """Elementwise log-density of N(mean, exp(log_std)^2) at x."""
    return -0.5 * ((x - mean) * torch.exp(-log_std)) ** 2 - log_std - 0.5 * math.log(2 * math.pi)


def sample_tanh_normal(mean, log_std):
    """Reparameterized sample a = tanh(x), x ~ N(mean, exp(log_std)^2), all (..., A). Returns a, its
    log-density (...,) computed from x (finite where tanh rounds to 1), and x."""
    noise = torch.randn_like(mean)
    x = mean + torch.exp(log_std) * noise
    log_prob = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi) - tanh_log_det(x)
    return torch.tanh(x), log_prob.sum(-1), x


def graphed(update, *inputs, compile: bool = False):
    """`update(*inputs, *constants)` as a function of its Python constants alone. On a GPU the whole
    update becomes one CUDA graph per set of constants, after three plain calls (which count as
    updates); on a CPU it is the plain call. `compile` compiles the update whole."""
    if compile:
        import torch._dynamo
        import torch._inductor

        if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
            raise InputError(f"--compile needs torch 2.15 or newer, this is {torch.__version__}")
        torch._dynamo.config.trace_autograd_ops = True  # takes autograd.grad inside the update
        torch._inductor.config.fallback_random = True  # the same random stream as the plain call
        update = torch.compile(update, fullgraph=True, dynamic=False)
    if next(inputs[0].parameters()).device.type != "cuda":
        return lambda *constants: update(*inputs, *constants)
    graphs, calls, side = {}, {}, torch.cuda.Stream()

    def step(*constants):
        calls[constants] = calls.get(constants, 0) + 1
        if calls[constants] <= 3:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                metrics = update(*inputs, *constants)
            torch.cuda.current_stream().wait_stream(side)
            return metrics
        if constants not in graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                metrics = update(*inputs, *constants)
            graphs[constants] = graph, metrics
        graph, metrics = graphs[constants]
        graph.replay()
        return metrics

    return step


# ---- evaluation ------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(act, envs: list, seed: int, device) -> np.ndarray:
    """Undiscounted returns (n,) of one episode in each of n environments, stepped side by side.

    `act` maps raw observations (n, S) to actions (n, A) in the task's bounds. Environment i is
    reset with seed + i; the training random stream is left as it was."""
    returns, running = np.zeros(len(envs)), np.ones(len(envs), bool)
    obs = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)])
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        while running.any():
            actions = act(torch.as_tensor(obs, dtype=torch.float32, device=device)).cpu().numpy()
            for i in np.flatnonzero(running):
                obs[i], reward, terminal, timeout, _ = envs[i].step(actions[i])
                returns[i] += reward
                running[i] = not (terminal or timeout)
    return returns


# ---- one run's folder ------------------------------------------------------------------------


def write_atomic(path: Path, content: bytes) -> None:
    """Write to a temporary name, then rename: the file is whole or absent. Raises OSError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(path: Path, tensors) -> None:
    """torch.save, atomically."""
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    write_atomic(path, buffer.getbuffer())


def load_tensors(path: Path):
    """What save_tensors wrote, on the CPU; nothing is unpickled. Raises InputError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive can raise nearly anything
        line = (str(error).splitlines() or [type(error).__name__])[0][:80]
        raise InputError(f"{path} cannot be read ({line}): delete it and start again") from None


CONTROL = ("device", "compile", "log_every", "save_every", "out", "resume", "overwrite", "track")


class Run:
    """One run: its folder, device, evaluation, logs, checkpoints and the final line.

    Construction checks the folder and seeds; `start` binds data and networks and restores; `loop`
    yields steps and stops cleanly on Ctrl-C or SIGTERM; `after` logs, evaluates and saves when due;
    `finish` writes the summary and the learning curve."""

    def __init__(self, args):
        self.args = args
        self.algorithm = Path(sys.modules[type(args).__module__].__file__).stem
        env = Path(args.env).stem if args.env.endswith((".hdf5", ".h5", ".npz")) else args.env
        self.env_name = re.sub(r"[^\w.-]+", "-", env)
        variant = f"-{args.name}" if args.name else ""
        self.folder = Path(args.out) / f"{self.env_name}__{self.algorithm}{variant}__{args.seed}"
        if (self.folder / "summary.json").exists() and args.resume:
            print(f"{self.folder} is finished: nothing to resume")
            raise SystemExit(0)
        if (self.folder / "config.json").exists() and not (args.resume or args.overwrite):
            raise InputError(f"{self.folder} exists: add --resume, --overwrite, or a new --name")
        self.device = choose_device(args.device, args.precision)
        seed_everything(args.seed)

    def start(self, data, task, nets: nn.Module, opt) -> None:
        """Bind what the run trains; write config.json; restore the checkpoint with --resume."""
        self.data, self.task, self.nets, self.opt = data, task, nets, opt
        self.folder.mkdir(parents=True, exist_ok=True)
        self.references, self.last, self.stopped, self.warned = {}, {}, False, set()
        self.rows = {"train": [], "eval": []}
        self.train_seconds = self.eval_seconds = 0.0
        self.resume_at = None
        self.envs = [task.make() for _ in range(self.args.eval_episodes)] if task else []
        self.settings = {k: v for k, v in vars(self.args).items() if k not in (*CONTROL, "preset")}
        self.settings |= {"algorithm": self.algorithm, "data": data.digest}
        self.checkpoint = self.folder / "checkpoint.pt"
        restored = self.args.resume and self.checkpoint.exists()
        if restored:
            self._restore(load_tensors(self.checkpoint))
        else:
            for old in self.folder.iterdir():
                old.unlink() if old.is_file() else None
        self._save("config.json", json.dumps(self._config(), indent=2, default=str).encode())
        self.board = self._tensorboard(self.resume_at[1] if restored else 0)
        score = self.score(data.episode_return.cpu().numpy())
        self.references["data"] = score
        preset = ", ".join(f"{k}={v}" for k, v in getattr(self.args, "preset", {}).items())
        unit = "score" if task and task.ref_min is not None else "return"
        print(
            f"{self.algorithm} on {data.name}: {len(data.obs):,} transitions, "
            f"{len(data.episode_return):,} episodes, {unit} {score:.1f}; seed {self.args.seed}, "
            f"{self.device}, precision {torch.get_float32_matmul_precision()}"
            + (f"; preset {preset}" if preset else "")
            + (f"; resumed after {self.resume_at[0]} step {self.resume_at[1]}" if restored else ""),
            flush=True,
        )

    def score(self, returns) -> float:
        """Normalized score x 100 of episode returns; the mean raw return where there is no task."""
        return float(self.task.score(returns) if self.task else np.mean(returns))

    def loop(self, steps: int, phase: str = "train"):
        """Yield 1..steps, or what is left of them after a restored checkpoint. A finished phase
        yields nothing. Seeds the phase on its own, so that a cached phase changes no later one."""
        from tqdm import tqdm

        first = 1
        if self.resume_at and self.resume_at[0] != phase:
            return
        if self.resume_at:
            first = self.resume_at[1] + 1
            torch.set_rng_state(self.rng[0])
            if self.device.type == "cuda" and len(self.rng) > 1:
                torch.cuda.set_rng_state(self.rng[1], self.device)
            self.resume_at = None
        else:
            seed_everything(zlib.crc32(f"{phase} {self.args.seed}".encode()))
        self.phase, self.phase_steps, self.last = phase, steps, {}
        handlers = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        self.bar = tqdm(total=steps, initial=first - 1, desc=phase, disable=None, unit="up")
        self.clock, self.logged = time.time(), (time.time(), first - 1)
        try:
            for t in range(first, steps + 1):
                yield t
                self.bar.update()
                if self.stopped or t % self.args.save_every == 0 or t == steps:
                    self._save_checkpoint(t)
                if self.stopped:
                    self._leave(t)
        finally:
            self.bar.close()
            for s, handler in handlers.items():
                signal.signal(s, handler)

    def after(self, t: int, metrics: dict, act=None) -> None:
        """Log `metrics` (0-d tensors; the only copies from device to host) and evaluate `act` (raw
        observations to actions) when step t asks for it."""
        self.last.update(metrics)
        if t % self.args.log_every == 0 or t == self.phase_steps:
            self._log(t)
        if act and self.task and (t % self.args.eval_every == 0 or t == self.phase_steps):
            returns = self.evaluate(act)
            self.rows["eval"].append(
                {"step": t, "seconds": f"{self.train_seconds:.2f}", "return": returns.mean(),
                 "score": self.score(returns), **{f"episode_{i}": x for i, x in enumerate(returns)}}
            )  # fmt: skip
            self._save_rows("eval")
            self._board({"charts/return": returns.mean(), "charts/score": self.score(returns)}, t)
            self._say(t, f"score {self.score(returns):.1f}")

    def evaluate(self, act) -> np.ndarray:
        """Returns (eval_episodes,) of a policy, on start states fixed by the run's seed."""
        start = time.time()
        returns = evaluate(act, self.envs, 1000 * self.args.seed + 100, self.device)
        self.eval_seconds += time.time() - start
        self.clock += time.time() - start  # training time goes on where it stood
        return returns

    def reference(self, label: str, act) -> None:
        """Score a policy that is not this run's result; the final line and the curve name it."""
        if self.task:
            self.clock = time.time()
            self.references[label] = self.score(self.evaluate(act))
            print(f"{label}: score {self.references[label]:.1f}", flush=True)

    def cached(self, stage: str, module: nn.Module, *settings):
        """The file that holds `module` as trained by an earlier run on the same data, seed and
        settings, for runs to share; loads it where it exists. Returns (path, loaded)."""
        shapes = [tuple(p.shape) for p in module.state_dict().values()]
        key = repr((self.algorithm, stage, self.data.digest, self.args.seed, settings, shapes))
        name = f"{self.env_name}__{stage}__{hashlib.sha256(key.encode()).hexdigest()[:12]}.pt"
        path = Path(self.args.out) / "cache" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.resume_at or not path.exists():
            return path, False
        module.load_state_dict(load_tensors(path))
        print(f"{stage}: read from {path}", flush=True)
        return path, True

    def finish(self) -> float | None:
        """Write summary.json and curve.png, print the final line, return the mean score of the last
        10 evaluations (None without an evaluation task)."""
        scores = [float(row["score"]) for row in self.rows["eval"]]
        final = float(np.mean(scores[-10:])) if scores else None
        summary = {"score": final, "last": scores[-1] if scores else None}
        summary |= {"best": max(scores, default=None), "evaluations": len(scores)}
        summary |= {"references": self.references, "train_seconds": self.train_seconds}
        summary |= {"eval_seconds": self.eval_seconds, "updates": self.args.steps}
        if scores:
            self._curve()
        self.board and self.board.close()
        self._save("summary.json", json.dumps(summary, indent=2).encode())
        if not (self.folder / "summary.json").exists():
            raise InputError(f"{self.folder}: the results above could not be saved: free some space")
        unit = "score" if self.task and self.task.ref_min is not None else "return"
        parts = [f"{self.algorithm} {unit} {final:.1f}"] if scores else [self.algorithm]
        parts += [f"{label} {value:.1f}" for label, value in self.references.items()]
        seconds = self.train_seconds + self.eval_seconds
        print(" | ".join([*parts, f"{seconds:.0f} s", str(self.folder)]), flush=True)
        return final

    def _stop(self, *_):
        if self.stopped:  # a second Ctrl-C does not wait
            raise KeyboardInterrupt
        self.stopped = True

    def _leave(self, t):
        command = shlex.join(["python", *sys.argv, *([] if self.args.resume else ["--resume"])])
        saved = f"saved at {self.phase} step {t}" if self.checkpoint.exists() else "not saved"
        print(f"\nstopped, {saved}; continue with: {command}", flush=True)
        raise SystemExit(130)

    def _say(self, t, text):
        if self.bar.disable:
            rate = (t - self.logged[1]) / max(time.time() - self.logged[0], 1e-9)
            left = (self.phase_steps - t) / max(rate, 1e-9)
            print(f"{self.phase} {t:,}/{self.phase_steps:,} {text} {rate:.0f}/s, {left:.0f} s left",
                  flush=True)  # fmt: skip
        else:
            self.bar.set_postfix_str(text)

    def _log(self, t):
        values = {k: v.item() for k, v in self.last.items()}
        now = time.time()
        self.train_seconds += now - self.clock
        rate = (t - self.logged[1]) / max(now - self.logged[0], 1e-9)
        self.clock = now
        table = self.rows.setdefault(self.phase, [])
        table.append({"step": t, "seconds": f"{self.train_seconds:.2f}", **values})
        self._save_rows(self.phase)
        prefix = "losses" if self.phase == "train" else self.phase
        scalars = {f"{prefix}/{k}": v for k, v in values.items()}
        self._board(scalars | {"charts/updates_per_second": rate}, t)
        bad = [k for k, v in values.items() if not math.isfinite(v)]
        if bad:
            kept = f"the last good checkpoint is {self.checkpoint}" if self.checkpoint.exists() else (
                "no checkpoint was due yet")  # fmt: skip
            raise InputError(
                f"{self.phase} step {t}: {bad[0]} is {values[bad[0]]}; training diverged, {kept}: "
                "lower the learning rates or strengthen the regularizer"
            )
        if not self.task or self.phase != "train":
            if t % (10 * self.args.log_every) == 0 or t == self.phase_steps:
                self._say(t, ", ".join(f"{k} {v:.3g}" for k, v in list(values.items())[:3]))

    def _save(self, name, content: bytes):
        """Write a file of this run; a full disk is said once and training goes on."""
        try:
            write_atomic(self.folder / name, content)
            self.warned.discard(name)
        except OSError as error:
            if name not in self.warned:
                print(f"{self.folder / name} not saved ({error.strerror}): free some space; "
                      "training goes on and saving is tried again", file=sys.stderr)  # fmt: skip
            self.warned.add(name)

    def _save_rows(self, name):
        rows, text = self.rows[name], io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(k for row in rows for k in row)))
        writer.writeheader()
        writer.writerows(rows)
        self._save(f"{name}.csv", text.getvalue().encode())

    def _save_checkpoint(self, t):
        rng = [torch.get_rng_state()]
        rng += [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        buffer = io.BytesIO()
        torch.save(
            {"settings": json.dumps(self.settings, default=str), "phase": self.phase, "step": t,
             "nets": self.nets.state_dict(), "opt": [o.state() for o in vars(self.opt).values()],
             "rng": rng, "rows": json.dumps(self.rows), "references": self.references,
             "seconds": [self.train_seconds, self.eval_seconds]}, buffer,
        )  # fmt: skip
        self._save("checkpoint.pt", buffer.getvalue())

    def _restore(self, saved):
        then, now = json.loads(saved["settings"]), json.loads(json.dumps(self.settings, default=str))
        for key in now:
            if then.get(key) != now[key]:
                raise InputError(
                    f"{self.checkpoint} was made with {key}={then.get(key)}, not {now[key]}: "
                    "resume with the same settings, or add --overwrite or a new --name"
                )
        self.nets.load_state_dict(saved["nets"])
        for optimizer, state in zip(vars(self.opt).values(), saved["opt"]):
            for tensor, value in zip(optimizer.state(), state):
                tensor.copy_(value)
        self.resume_at, self.rng = (saved["phase"], saved["step"]), saved["rng"]
        self.rows, self.references = json.loads(saved["rows"]), saved["references"]
        self.train_seconds, self.eval_seconds = saved["seconds"]

    def _config(self):
        root = Path(__file__).parent
        git = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True)
        config = {"algorithm": self.algorithm, "args": {k: v for k, v in vars(self.args).items()}}
        config |= {"command": shlex.join(sys.argv), "dataset": self.data.name}
        config |= {"dataset_sha256": self.data.digest, "commit": git.stdout.strip() or None}
        config |= {"task": self.task.id if self.task else None, "python": platform.python_version()}
        config |= {"torch": torch.__version__, "numpy": np.__version__}
        return config | {"machine": f"{platform.machine()}, {os.cpu_count()} cores, {self.device}"}

    def _tensorboard(self, step):
        from torch.utils.tensorboard import SummaryWriter

        if self.args.track:
            try:
                import wandb
            except ImportError:
                raise InputError("--track needs Weights & Biases: pip install wandb") from None
            wandb.init(project="stayclose", name=self.folder.name, config=vars(self.args),
                       sync_tensorboard=True)  # fmt: skip
        return SummaryWriter(self.folder, purge_step=step + 1 if step else None)

    def _board(self, scalars, t):
        try:
            for tag, value in scalars.items():
                self.board and self.board.add_scalar(tag, value, t)
        except OSError as error:
            print(f"TensorBoard events stop here ({error.strerror})", file=sys.stderr)
            self.board = None

    def _curve(self):
        import matplotlib.figure

        figure = matplotlib.figure.Figure((6, 4), layout="constrained")
        axes = figure.subplots()
        steps = [int(row["step"]) for row in self.rows["eval"]]
        axes.plot(steps, [float(r["score"]) for r in self.rows["eval"]], label=self.algorithm, lw=2)
        for i, (label, value) in enumerate(self.references.items()):
            axes.axhline(value, ls="--", c=f"C{i + 1}", label=f"{label} {value:.1f}")
        unit = "normalized score" if self.task.ref_min is not None else "return"
        axes.set(xlabel="gradient steps", ylabel=unit, title=f"{self.data.name}, {self.task.id}")
        axes.legend()
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=150)
        self._save("curve.png", buffer.getvalue())

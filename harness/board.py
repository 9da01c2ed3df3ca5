"""What a person looks at: the first lines of a run, its progress, TensorBoard, Weights & Biases and
curve.png: a guest of run.py that changes no number."""

import importlib.util
import io
import sys
import threading
import time

import torch

from common import InputError, preset_of


class Guest:
    """What run.py tells: start, begin (of a phase), step, row, finish."""

    first_line_after, line_every = 5, 30  # seconds between progress lines without a terminal

    def __init__(self, run):
        self.run, self.board, self.begun, self.first_values = run, None, False, {}
        if run.args.track and importlib.util.find_spec("wandb") is None:
            raise InputError("--track needs Weights & Biases: pip install wandb")
        if hasattr(sys.stdout, "reconfigure"):  # a notebook's has none
            sys.stdout.reconfigure(errors="backslashreplace")  # a name can hold any bytes

    def start(self):
        run, args = self.run, self.run.args
        self.largest = run.largest
        if args.track:
            import wandb

            name = run.folder.name
            wandb.init(project="stayclose", name=name, config=vars(args), sync_tensorboard=True)
        resumed = max((int(row["step"]) for row in run.rows["train"]), default=0)
        self._open_board(resumed)
        for line in self.first_lines():
            print(line, flush=True)

    def first_lines(self) -> list[str]:
        """Data, steps, preset, folder and arithmetic of the run."""
        run, args = self.run, self.run.args
        phases = type(args).phases
        steps = [f"{phase} {getattr(args, field):,}" if field else f"{phase} one pass"
                 for phase, field in phases.items()]  # fmt: skip
        preset = ", ".join(f"{name}={value}" for name, value in run.preset.items()) or "none"
        known = getattr(sys.modules[type(args).__module__], "PRESETS", {})
        if "-singletask" in args.env and not preset_of(known, args.env):
            text = "no published settings for this data: defaults of the file"
            preset = f"{text}, with {preset}" if run.preset else text
        how = "compiled" if args.compile else "eager"
        rows, episodes = len(run.data.obs), len(run.data.episode_return)
        return [
            f"data:       {run.data.name}, {rows:,} transitions, {episodes:,} episodes, "
            f"{run.unit} {run.references['data']:.1f}",
            f"steps:      {', '.join(steps)}; seed {args.seed}",
            f"preset:     {preset}",
            f"folder:     {run.folder}",
            f"arithmetic: {run.device}, threads: {torch.get_num_threads()}, fp32 products: "
            f"{args.precision}, {how}",
        ]

    def begin(self):
        run = self.run
        if self.begun and run.phase_steps and not sys.stderr.isatty():
            print(f"{run.phase} {run.first - 1}/{run.phase_steps:,}", flush=True)
        self.begun, self.next_line = True, time.monotonic() + self.first_line_after
        self.logged = time.monotonic(), run.first - 1

    def step(self, t):
        if self.run.bar.disable and time.monotonic() > self.next_line:
            self.progress(t, "")

    def row(self, name, t, values):
        """The scalars of a row; what the bar, or a line, says of it."""
        run = self.run
        if name == "eval":
            scalars = {f"charts/{key}": values[key] for key in ("return", "score")}
            self.progress(t, f"{run.unit} {values['score']:.1f}")
        else:
            prefix = "losses" if name == "train" else name
            scalars = {f"{prefix}/{key}": x for key, x in values.items()}
            scalars["charts/updates_per_second"] = self.rate(t)
            self._compare_with_largest(values, t)
            if not run.task or name != "train":
                if t % (10 * run.args.log_every) == 0 or t == run.phase_steps:
                    few = list(values.items())[:3]
                    self.progress(t, ", ".join(f"{key} {x:.3g}" for key, x in few))
        self._add(scalars, t)

    def rate(self, t) -> float:
        """Updates per second since the phase began."""
        began, first = self.logged
        return (t - first) / max(time.monotonic() - began, 1e-9)

    def progress(self, t, text):
        """On the bar of a terminal, else as a line."""
        run = self.run
        if not run.bar.disable:
            run.bar.set_postfix_str(text)
            return
        rate = self.rate(t)
        left = (run.phase_steps - t) / max(rate, 1e-9)
        text = f"{text} " if text else ""
        print(f"{run.phase} {t:,}/{run.phase_steps:,} {text}{rate:.0f}/s, {left:.0f} s left",
              flush=True)  # fmt: skip
        self.next_line = time.monotonic() + self.line_every

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._add({}, 0)

    def _compare_with_largest(self, values, t):
        for name in self.largest.keys() & values.keys():
            first = self.first_values.setdefault(name, abs(values[name]))
            if abs(values[name]) > 2 * self.largest[name] + 10 * first:
                print(
                    f"note: {name} is {values[name]:.3g} at step {t}, but no policy can reach more "
                    f"than {self.largest[name]:.3g} with the data's rewards: Q runs away where "
                    "there is no data; strengthen the regularizer"
                )
                self.largest = {}  # said once
                return

    def finish(self, summary):
        """Write the events out; draw curve.png."""
        run = self.run
        if run.rows["eval"]:
            unit = "normalized score" if run.unit == "score" else "return"
            title = f"{run.data.name}, {run.task['env_id']}"
            run.save("curve.png", curve(run.algorithm, run.rows["eval"], run.references, title,
                                        unit))  # fmt: skip
        self._add({}, 0)

    # ---- TensorBoard -------------------------------------------------------------------------

    def _open_board(self, step: int) -> None:
        """Start the TensorBoard events, or continue them after `step`."""
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = lambda failure: (  # a full disk: said by _add, not by a thread
            isinstance(failure.exc_value, OSError) or threading.__excepthook__(failure)
        )
        try:
            self.board = SummaryWriter(self.run.folder, purge_step=step + 1 if step else None)
        except OSError as error:
            print(f"no TensorBoard events ({error.strerror})", file=sys.stderr)

    def _add(self, scalars: dict, t: int) -> None:
        """Add scalars to the TensorBoard events; none given: write them out and close."""
        if not self.board:
            return
        try:
            for tag, value in scalars.items():
                self.board.add_scalar(tag, value, t)
            if not scalars:
                self.board.close()
        except OSError as error:
            print(f"TensorBoard events stop here ({error.strerror})", file=sys.stderr)
            self.board = None


def curve(label: str, rows: list[dict], references: dict, title: str, unit: str) -> bytes:
    """A PNG of the score over gradient steps, beside the references."""
    import matplotlib.figure

    # Between two dollars matplotlib reads a formula, and a name that is none would raise.
    label, title = (text.replace("$", r"\$") for text in (label, title))
    figure = matplotlib.figure.Figure((6, 4), layout="constrained")
    axes = figure.subplots()
    steps = [int(row["step"]) for row in rows]
    axes.plot(steps, [float(row["score"]) for row in rows], "o-", ms=3, lw=2, label=label)
    for i, (name, value) in enumerate(references.items()):
        axes.axhline(value, ls="--", c=f"C{i + 1}", label=f"{name} {value:.1f}")
    axes.set(xlabel="gradient steps", ylabel=unit, title=title.encode(errors="replace").decode())
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150)
    return buffer.getvalue()

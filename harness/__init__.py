"""What every run needs and no paper describes: flags, data, the loop, evaluation, a folder."""

try:
    from harness.datasets import load_dataset
    from harness.run import Run, main, parse
except KeyboardInterrupt:  # these imports take seconds
    print("\nstopped before anything was saved")
    raise SystemExit(130) from None

__all__ = ["Run", "load_dataset", "main", "parse"]

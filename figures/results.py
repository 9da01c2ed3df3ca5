"""The tables and pictures of docs/results.md, of the runs that are stored in results/.

scores     every seed of every method as a dot, and the means, from the lowest to the highest
clone_to_policy    for each method that learns a clone first, a line for every seed from the score
           of its clone to that of its policy
stopping   the scores of every method along its training on the mixture
fisher_brc the curve of README's first run
peers      our programs beside other people's
published  our runs on made data, beside the numbers of papers on the data that they imitate

    ./benchmark.sh local
    ./benchmark.sh local_ablations
    python tools/store.py runs results
    python figures/results.py

Differs from tools/report.py, which shows anybody's runs with the same tables and the same picture:
here are the tables that only these pages need. It prints them as the pages have them, and the
commands with their scores, as the docstrings in algorithms/ have them. A mean is that over seeds, ±
its standard error.
"""

import io
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.figure
import numpy as np
import pandas as pd
import scipy.stats
import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import InputError
from run import CONTROL, load, score
from tools import report, store
from tools.report import PEERS, TITLES, markdown, mean_text

MIXTURE = "hopper-medium-expert-demo"  # the default of --env
CLONES = ("its clone (BC)", "its first policy", "its flow", "clone s_psi")  # a run has one of them
IMPLICIT = "implicit policy"  # ARQ's, between its clone and its policy
BEST = "best of 16 of its flow"  # of FQL
FRESH = Path(__file__).resolve().parents[1] / "peers/outcomes"  # runs that decide about peers
REPLAY, MAZE = "hopper-replay-demo", "pointmaze-stitch-demo"
PAIRS = {  # whom the pages compare by a test: a method, or "method: " and a reference of its runs
    (MIXTURE, REPLAY, MAZE): [
        ("brac", "brac_plus_acml"),
        ("brac", "brac_plus"),
        ("brac_plus_acml", "brac_plus"),
        ("arq: clone s_psi", f"arq: {IMPLICIT}"),
        (f"arq: {IMPLICIT}", "arq"),
        (f"fql: {BEST}", "fql"),
        ("fql: its flow", "fql"),
        ("arq: clone s_psi", "arq"),
        ("brac: its clone (BC)", "brac"),
        ("fisher_brc: its clone (BC)", "fisher_brc"),
        ("itrpo: its clone (BC)", "itrpo"),
        ("brac_plus: its first policy", "brac_plus"),
        ("brac_plus_acml: its first policy", "brac_plus_acml"),
    ],
    (REPLAY,): [("bc-top10", "brac"), ("bc-top10", "rebrac"), ("bc-top10", "awr")],
}


@dataclass
class Args:
    folder: tyro.conf.Positional[str] = "results"
    """folder of finished runs, searched at any depth"""
    out: str = "results"
    """folder of the pictures"""


# ---- runs ------------------------------------------------------------------------------------


def read_cells(folder, kind="-demo"):
    """{(dataset, method): finished runs} on the datasets with `kind` in their names, sorted: the
    bundled ones, or OGBench's "-singletask". Raises InputError."""
    runs = report.read_runs([folder])
    runs = runs[runs.score.notna() & runs.dataset.str.contains(kind)]
    report.check(runs)
    if kind == "-demo" and not runs.method.isin(TITLES).any():
        raise InputError(f"no finished run below {folder} is on a bundled dataset")
    runs = runs.sort_values(["dataset", "method", "seed"])
    return dict(list(runs.groupby(["dataset", "method"])))


def together(cells, methods) -> pd.DataFrame:
    """The runs of some methods in one table."""
    return pd.concat([runs for (_, method), runs in cells.items() if method in methods])


def path_of(run) -> list[float]:
    """Scores of a run's clone, of the implicit policy where there is one, and of its policy; the
    last one alone where the method has no clone."""
    known = run.references
    stages = [known[name] for name in (*CLONES, IMPLICIT) if name in known]
    return [*stages, run.score]


# ---- tables ----------------------------------------------------------------------------------


def scores(cells) -> str:
    """The table of all methods, with the best episode of the bundled data."""
    best = {}
    for env in {env for env, _ in cells}:
        data, task = load(env)
        best[env] = score(task, [data.episode_return.max().item()])
    runs = together(cells, TITLES | PEERS)
    return report.table(runs, [("the data, best episode", best)])


def counterpart(cells, env, method) -> str:
    """The run that one under another name is compared with: "itrpo-trust-control" with
    "itrpo-trust", or with "itrpo" where that was not run."""
    if method in PEERS:
        return method.removeprefix("corl_").removesuffix("_authors")
    base = method.rpartition("-")[0]
    while "-" in base and (env, base) not in cells:
        base = base.rpartition("-")[0]
    return base


def short(value) -> str:
    """A setting as one would type it: 0.1 for "0.09999999999999998"."""
    return re.sub(r"^-?\d+\.\d+$", lambda found: f"{float(found[0]):g}", str(value))


def name_of(cells, env, method) -> str:
    """A method's title; for a run under another name the flags in which it differs from its
    counterpart."""
    if method in TITLES | PEERS:
        return report.title_of(method)
    base = counterpart(cells, env, method)
    own, other = (cells[env, name].args.iloc[0] for name in (method, base))
    shared = sorted(own.keys() & other.keys() - {*report.FREE, *CONTROL})
    whats = [f"`{x}` {short(own[x])}, not {short(other[x])}" for x in shared if own[x] != other[x]]
    file, _, variant = base.partition("-")
    return f"{TITLES[file]}{variant and f', `{variant}`,'} with {', '.join(whats)}"


def beside(cells, chosen) -> str:
    """All seeds of (dataset, method) cells, and how far each mean lies from its counterpart's."""
    rows = []
    for env, method in chosen:
        own, base = cells[env, method].score, cells.get((env, counterpart(cells, env, method)))
        row = {"dataset": f"`{env}`", "run": name_of(cells, env, method)}
        row["scores of its seeds"] = ", ".join(f"{score:.1f}" for score in own)
        row["mean ± standard error"] = mean_text(own.mean(), own.sem())
        row["minus its counterpart"] = ""
        if base is not None:
            gap = own.mean() - base.score.mean()
            error = np.hypot(own.sem(), base.score.sem())
            row["minus its counterpart"] = f"{gap:+.1f} ± {error:.1f}".removesuffix(" ± nan")
        rows.append(row)
    return markdown(pd.DataFrame(rows))


def welch(first, second) -> dict:
    """Mean of the second sample minus that of the first, ± its standard error, and the two-sided p
    of Welch's t-test."""
    gap = np.mean(second) - np.mean(first)
    error = np.hypot(scipy.stats.sem(first), scipy.stats.sem(second))
    p = scipy.stats.ttest_ind(first, second, equal_var=False).pvalue
    digits = f"= {p:.1g}" if p < 0.01 else f"= {p:.2f}"
    if p < 0.001:
        digits = "< 0.001"
    return {"difference": f"{gap:+.1f} ± {error:.1f}", "p": digits}


def sample(cells, env, name):
    """The scores of a method's seeds, or those of a reference of its runs."""
    method, _, reference = name.partition(": ")
    runs = cells[env, method]
    return [known[reference] for known in runs.references] if reference else runs.score


def tests(cells) -> str:
    """Welch's tests behind the words of docs/claims.md, peers.md and results.md: of PAIRS, of runs
    under other names, and of other people's code."""
    pairs = {}
    for envs, own in PAIRS.items():
        for env in envs:
            pairs |= {(env, *pair): None for pair in own}
    for env, method in cells:
        base = counterpart(cells, env, method)
        if method not in TITLES and (env, base) in cells:
            pairs[env, base, method] = None
    rows = []
    for env, first, second in pairs:
        row = {"dataset": f"`{env}`", "first": first, "second": second}
        both = sample(cells, env, first), sample(cells, env, second)
        rows.append(row | welch(*both))
    return markdown(pd.DataFrame(rows))


def ablations(cells) -> dict:
    """{title of a method: a table of its runs under other names beside those of its preset}."""
    found = {}
    for env, method in cells:
        file = method.partition("-")[0]
        if method not in TITLES | PEERS and (env, file) in cells:
            own = found.setdefault(f"Ablations of {TITLES[file]}", {})
            own |= {(env, file): None, (env, method): None}
    return {title: beside(cells, own) for title, own in found.items()}


def peers(cells) -> list:
    """(dataset, method) of other people's code, each program of ours before those beside it."""
    groups = {}
    for peer in PEERS:
        for env in sorted({env for env, _ in cells}):
            ours = counterpart(cells, env, peer)
            if cells.keys() >= {(env, ours), (env, peer)}:
                groups.setdefault((ours, env), [ours]).append(peer)
    return [(env, x) for (_, env), group in groups.items() for x in group]


def clones(cells) -> str:
    """Means of the clone, of ARQ's implicit policy and of the policy, with arrows between them."""
    rows = []
    for method in TITLES:
        row = {"method": TITLES[method]}
        for env in sorted({env for env, _ in cells}):
            runs = cells.get((env, method), pd.DataFrame()).itertuples()
            means = np.mean([path_of(run) for run in runs] or [[]], 0)  # (stages,)
            row[f"`{env}`"] = " → ".join(f"{mean:.1f}" for mean in means) or "-"
        if "→" in str(row):
            rows.append(row)
    return markdown(pd.DataFrame(rows)) if rows else ""


def gaps(cells, folder) -> str:
    """What Fisher-BRC's backups pay, over the second half of training: means of log mu(a), of
    log mu(a'), and of Q, for a of the data and a' of the policy in the same states, which stand for
    the next ones. Read from metrics.csv.gz; empty where the folder has none."""
    _, _, metrics = store.stored(Path(folder))
    metrics = metrics[metrics.method.eq("fisher_brc") & metrics.phase.eq("train")]
    metrics = metrics.astype({"step": int, "value": float})
    rows = []
    for (env, variant), own in metrics.groupby(["dataset", "variant"]):
        cell = cells.get((env, f"fisher_brc-{variant}".removesuffix("-")))
        if cell is None or not cell.args.iloc[0]["offset"]:
            continue
        flags, late = cell.args.iloc[0], own[own.step > own.step.max() / 2]
        wide = late.pivot(index=["seed", "step"], columns="metric", values="value")
        q_pi = -wide.pi_loss - wide.temperature * wide.entropy  # of L_pi = T log pi - min Q
        mean, gained = wide.mean(), (wide.q_data - q_pi).mean()
        gap = mean.log_mu_data - mean.log_mu_pi
        row = {
            "dataset": f"`{env}`",
            "lambda": short(flags["lam"]),
            "score": f"{cell.score.mean():.1f}",
            "log mu(a)": f"{mean.log_mu_data:.2f}",
            "log mu(a')": f"{mean.log_mu_pi:.2f}",
            "gap": f"{gap:.2f}",
            "Q(a) - min Q(a')": f"{gained:.2f}",
            "Q on the data": f"{mean.q_data:.1f}",
            "Q + gap / (1 - gamma)": f"{mean.q_data + gap / (1 - flags['gamma']):.1f}",
        }
        rows.append(row)
    return markdown(pd.DataFrame(rows)) if rows else ""


def ogbench(folder) -> str:
    """Our shortened runs on OGBench's tasks, for docs/ogbench.md; empty where there are none."""
    cells = read_cells(folder, "-singletask")
    order = [(env, x) for env in sorted({env for env, _ in cells}) for x in TITLES | PEERS]
    return beside(cells, [cell for cell in order if cell in cells]) if cells else ""


def tables(cells, folder) -> dict:
    """{heading: table}, as docs/results.md has them."""
    found = {"Scores": scores(cells), "From the clone to the policy": clones(cells)}
    found |= ablations(cells)
    found["What Fisher-BRC's backups pay"] = gaps(cells, folder)
    return {heading: text for heading, text in found.items() if text}


def command(cells, algorithm: str) -> str:
    """The last line of an algorithm's docstring: the bare command, the steps of its last phase, and
    the score on its dataset."""
    runs = cells[MIXTURE, algorithm]
    seeds = f"{len(runs)} seeds".replace("1 seeds", "1 seed")
    length = f"{runs.args.iloc[0]['steps'] / 1000:g}k steps"
    mean = mean_text(runs.score.mean(), runs.score.sem())
    return f"    python algorithms/{algorithm}.py  # {length}: {mean}, {MIXTURE}, {seeds}"


# ---- pictures --------------------------------------------------------------------------------
# Where 800 pixels are shown, a letter has 11 or more.


def arrows(cells):
    """Every seed's way from its clone to its policy: panels share their axes."""
    with_clone = together(cells, TITLES)
    with_clone = with_clone[[len(path_of(run)) > 1 for run in with_clone.itertuples()]]
    methods = [method for method in TITLES if method in {*with_clone.method}]
    envs = sorted({env for env, method in cells if method in methods})
    figure = matplotlib.figure.Figure((8, 1.4 + 0.5 * len(methods)), layout="constrained")
    panels = figure.subplots(1, len(envs), sharex=True, sharey=True, squeeze=False)[0]
    for panel, env in zip(panels, envs):
        for y, method in enumerate(methods):
            runs = cells.get((env, method), pd.DataFrame())
            for i, run in enumerate(runs.itertuples()):
                *before, policy = path_of(run)
                height = y + 0.6 * ((i + 0.5) / len(runs) - 0.5)
                panel.plot([*before, policy], [height] * (len(before) + 1), color="0.7", lw=1)
                for x, marker in zip(before, "oD"):
                    panel.plot(x, height, marker, ms=4, mec="0.35", mfc="white")
                panel.plot(policy, height, "o", ms=4.5, color="tab:red")
        panel.set_title(env, fontsize=10)
        panel.set(xlim=(-4, 108), xlabel="score", ylim=(len(methods) - 0.4, -0.6))
    panels[0].set_yticks(range(len(methods)), [TITLES[x] for x in methods])
    panels[0].plot([], [], "o", ms=4, mec="0.35", mfc="white", label="the clone of a seed")
    panels[0].plot([], [], "D", ms=4, mec="0.35", mfc="white", label="ARQ's implicit policy")
    panels[0].plot([], [], "o", ms=4.5, color="tab:red", label="the policy")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("Most policies score far more than the clone that they stay close to")
    return figure


def curves(cells):
    """A panel for each method on the mixture: all panels share their axes."""
    methods = [method for method in TITLES if (MIXTURE, method) in cells]
    figure = matplotlib.figure.Figure((8, 6.4), layout="constrained")
    panels = figure.subplots(-(-len(methods) // 4), 4, sharex=True, sharey=True, squeeze=False)
    for panel, method in zip(panels.flat, methods):
        for curve in cells[MIXTURE, method].curve:
            share = 100 * curve.step / curve.step.max()
            panel.plot(share, curve.score, lw=1)
        panel.set_title(TITLES[method], fontsize=10)
        panel.set(xlim=(0, 100), ylim=(-3, 109))
    figure.supxlabel("share of the method's own training steps, in %", fontsize=10)
    figure.supylabel("score of each seed", fontsize=10)
    figure.suptitle("On the mixture, the order of the methods depends on when training stops")
    return figure


def first_run(cells):
    """README's first run, beside the data, its clone and the clone of the best tenth."""
    run = cells[MIXTURE, "fisher_brc"].iloc[0]
    lines = {
        "10% BC, the mean of its seeds": cells[MIXTURE, "bc-top10"].score.mean(),
        "the data, mean of its episodes": run.references["data"],
        "its clone": run.references["its clone (BC)"],
    }
    figure = matplotlib.figure.Figure((8, 3.6), layout="constrained")
    panel = figure.subplots()
    panel.plot(run.curve.step, run.curve.score, "o-", color="tab:red", label="Fisher-BRC, seed 0")
    for (label, height), style in zip(lines.items(), ("-", "--", ":")):
        panel.axhline(height, color="0.35", ls=style, lw=1.5, label=label)
    panel.set(xlim=(0, None), ylim=(-3, 109), xlabel="gradient steps", ylabel="score")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle("Fisher-BRC leaves its clone behind; on this data, so does 10% BC")
    return figure


def save(figure, path):
    """A PNG of 256 colors: a third of the bytes, and no difference to the eye."""
    with io.BytesIO() as buffer:
        figure.savefig(buffer, dpi=160)
        image = Image.open(buffer).convert("RGB")
        image.quantize(256, dither=0).save(path, optimize=True)
    print(f"written to {path}")


def main(args):
    cells, out = read_cells(args.folder), Path(args.out)
    paper, _ = report.paper_table("random_v2")
    shown = tables(cells, args.folder) | {"OGBench (docs/ogbench.md)": ogbench(args.folder)}
    for heading, text in shown.items():
        print(f"# {heading}\n\n{text}\n")
    if cells.keys() >= {(env, "fql") for envs in PAIRS for env in envs}:
        print(f"# Welch's tests\n\n{tests(cells)}\n")
    for algorithm in TITLES:
        if (MIXTURE, algorithm) in cells and "-" not in algorithm:
            print(command(cells, algorithm))
    out.mkdir(parents=True, exist_ok=True)
    title = "No method is the best on all three datasets"
    save(report.picture(together(cells, TITLES), title), out / "scores.png")
    save(arrows(cells), out / "clone_to_policy.png")
    save(curves(cells), out / "stopping.png")
    save(first_run(cells), out / "fisher_brc.png")
    pairs = peers(cells)
    if pairs:
        fresh = pd.concat(read_cells(FRESH).values())
        fresh.dataset += "\nfresh seeds"
        runs = pd.concat([*(cells[cell] for cell in pairs), fresh])
        runs = runs.assign(own=runs.method.isin(PEERS))
        title = "Our programs, and above them, in red, other people's on the same rows"
        save(report.picture(runs, title), out / "peers.png")
    runs = report.read_runs([args.folder, FRESH])
    corl = runs.query("method == 'corl_td3_bc' and dataset.str.endswith('-made')")
    corl = corl.assign(dataset=paper.dataset[0])
    runs = [report.runs_of(paper, runs), corl]
    title = "Data that we made by D4RL's recipe, and the papers' numbers on D4RL's own"
    save(report.picture(pd.concat(runs), title, paper), out / "published.png")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

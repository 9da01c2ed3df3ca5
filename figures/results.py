"""The tables and pictures of docs/results.md, of all methods on the bundled datasets.

curves: the scores over training. A point is the mean of the last ten evaluations up to there, so
that a curve's right end is the score in the tables; lines are means over seeds, and bands are one
standard error to both sides. Each method trains for as many steps as its preset says, so the axis
is the share of a method's own training.
scores, peers: the score of every seed as a dot, and their mean as a bar; peers shows our programs
beside other people's, where those were run (peers/).
clone_to_policy: for each method that learns a clone of the data first, an arrow for every seed from
what its clone scores to what its policy scores.

Differs from the figures of tools/report.py, which show every variant that was run, against steps
and against seconds, with intervals.

    ./benchmark.sh local
    ./benchmark.sh local_ablations
    python tools/store.py runs results
    python figures/results.py

It prints the tables as the pages have them, and the commands with their scores, as the docstrings
in algorithms/ have them. A mean is that over seeds, ± its standard error.
"""

import io
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.figure
import numpy as np
import pandas as pd
import tyro
from matplotlib.lines import Line2D
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import InputError
from tools import report, store

MIXTURE = "hopper-medium-expert-demo"  # the default of --env
ACTORS = {  # in the legend's order; a method without a title is left out
    "bc": "BC",
    "bc-top10": "10% BC",
    "td3_bc": "TD3+BC",
    "rebrac": "ReBRAC",
    "sac_bc": "SAC+BC",
    "fql": "FQL",
    "awr": "AWR",
    "awac": "AWAC",
    "iql": "IQL",
}
CRITICS = {
    "bc": "BC",
    "cql": "CQL",
    "brac": "BRAC",
    "brac_plus": "BRAC+ (ICLR)",
    "brac_plus_acml": "BRAC+",
    "fisher_brc": "Fisher-BRC",
    "itrpo": "iTRPO",
    "arq": "ARQ",
}
FAMILIES = {
    "the actor clones the data's actions": ACTORS,
    "the policy stays near a learned clone, or Q is kept low outside the data": CRITICS,
}
TITLES = ACTORS | CRITICS
PEERS = {  # other people's code
    "corl_td3_bc": "TD3+BC, CORL's code",
    "corl_iql": "IQL, CORL's code",
    "iql_authors": "IQL, its authors' code",
    "fql_authors": "FQL, its authors' code",
}
DATA = {what: what for what in ("the data, mean of its episodes", "the data, best episode")}
CLONES = ("its clone (BC)", "its first policy", "its flow", "clone s_psi")  # a run has one of them
IMPLICIT = "implicit policy"  # ARQ's, between its clone and its policy
LAST = 10  # evaluations that a score averages
MEAN = "mean ± standard error"


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
    return dict(list(runs.groupby(["dataset", "method"])))


def datasets(cells) -> list[str]:
    return list(dict.fromkeys(env for env, _ in cells))


def rows_of(cells, titles) -> list[str]:
    """The methods with a title that were run, in the order of the titles."""
    trained = {method for _, method in cells}
    return [method for method in titles if method in trained]


def path_of(run) -> list[float]:
    """Scores of a run's clone, of the implicit policy where there is one, and of its policy; the
    last one alone where the method has no clone."""
    known = run.references
    stages = [known[name] for name in (*CLONES, IMPLICIT) if name in known]
    return [*stages, run.score]


# ---- tables ----------------------------------------------------------------------------------


def head_of(env, scores) -> tuple[str, str]:
    """(a column's head, what its cells need not say): a dataset and its usual number of seeds."""
    seeds = scores.seeds.xs(env, level="dataset")
    usual = seeds.mode()[0]
    return f"`{env}`, {usual} seeds", f" ({usual})"


def table(cells) -> str:
    """What the data score, then each method's mean ± standard error, and the mean over all
    datasets. A column's head says of how many seeds its cells are; a cell of others says it."""
    scores = report.score_table(pd.concat(cells.values()))
    scores = scores.set_index(["method", "dataset"])
    heads = {env: head_of(env, scores) for env in datasets(cells)}
    rows = []
    for method, title in (DATA | TITLES | PEERS).items():
        if method not in scores.index:
            continue
        own = scores.loc[method][report.SCORE]
        row = {"method": title}
        for env, (head, usual) in heads.items():
            row[head] = own.get(env, "-").removesuffix(usual)
        every = "" if method in DATA else "-"
        if report.ALL in own and "-" not in row.values():
            every = own[report.ALL].partition(" (")[0]
        row["mean over the datasets"] = every
        rows.append(row)
    return report.markdown(pd.DataFrame(rows))


def mean_of(scores) -> str:
    return f"{scores.mean():.1f} ± {scores.sem():.1f}".removesuffix(" ± nan")


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
    counterpart, where both versions of the code have them."""
    if method in TITLES | PEERS:
        return (TITLES | PEERS)[method]
    base = counterpart(cells, env, method)
    own, other = (cells[env, name].identity.iloc[0] for name in (method, base))
    whats = []
    for name in sorted(own.keys() & other.keys() - {"name"}):
        if own[name] != other[name] and not re.match("(code|version) of ", name):
            whats.append(f"`{name}` {short(own[name])}, not {short(other[name])}")
    file, _, variant = base.partition("-")
    title = TITLES[file]
    if variant:
        title += f", `{variant}`,"
    return f"{title} with {', '.join(whats)}"


def beside(cells, chosen) -> str:
    """All seeds of (dataset, method) cells, and how far each mean lies from its counterpart's."""
    rows = []
    for env, method in chosen:
        own = cells[env, method].score
        row = {"dataset": f"`{env}`", "run": name_of(cells, env, method)}
        row["scores of its seeds"] = ", ".join(f"{score:.1f}" for score in own)
        row[MEAN] = mean_of(own)
        base = cells.get((env, counterpart(cells, env, method)))
        row["minus its counterpart"] = ""
        if base is not None:
            gap = own.mean() - base.score.mean()
            error = np.hypot(own.sem(), base.score.sem())
            row["minus its counterpart"] = f"{gap:+.1f} ± {error:.1f}".removesuffix(" ± nan")
        rows.append(row)
    return report.markdown(pd.DataFrame(rows))


def ablations(cells) -> dict:
    """{title of a method: a table of its runs under other names beside those of its preset}."""
    found = {}
    for env, method in cells:
        file = method.partition("-")[0]
        if method in TITLES | PEERS or (env, file) not in cells:
            continue
        chosen = found.setdefault(TITLES[file], {})
        chosen |= {(env, file): None, (env, method): None}
    return {title: beside(cells, chosen) for title, chosen in found.items()}


def peers(cells) -> str:
    """Other people's code beside ours."""
    groups = {}
    for peer in PEERS:
        for env in datasets(cells):
            ours = counterpart(cells, env, peer)
            if cells.keys() >= {(env, ours), (env, peer)}:
                groups.setdefault((ours, env), [ours]).append(peer)
    return beside(cells, [(env, x) for (_, env), group in groups.items() for x in group])


def clones(cells) -> str:
    """Means of the clone, of ARQ's implicit policy and of the policy, with arrows between them."""
    rows = []
    for method in rows_of(cells, TITLES):
        row = {"method": TITLES[method]}
        for env in datasets(cells):
            row[f"`{env}`"] = "-"
            if (env, method) in cells:
                runs = cells[env, method].itertuples()
                means = np.mean([path_of(run) for run in runs], 0)  # (stages,)
                row[f"`{env}`"] = " → ".join(f"{mean:.1f}" for mean in means)
        if "→" in str(row):
            rows.append(row)
    return report.markdown(pd.DataFrame(rows)) if rows else ""


def gaps(cells, folder) -> str:
    """What Fisher-BRC's backups pay, over the second half of training: means of log mu(a), of
    log mu(a'), and of Q, for a of the data and a' of the policy in the same states, which stand for
    the next ones. Read from metrics.csv.gz; empty where the folder has none."""
    _, _, metrics = store.stored(Path(folder))
    metrics = metrics[metrics.method.eq("fisher_brc") & metrics.phase.eq("train")]
    metrics = metrics.astype({"step": int, "value": float})
    rows = []
    for (env, variant), own in metrics.groupby(["dataset", "variant"]):
        method = f"fisher_brc-{variant}".removesuffix("-")
        if (env, method) not in cells:
            continue
        cell = cells[env, method]
        flags = cell.identity.iloc[0]
        if flags["offset"] == "False":
            continue
        late = own[own.step > own.step.max() / 2]
        wide = late.pivot(index=["seed", "step"], columns="metric", values="value")
        q_pi = -wide.pi_loss - wide.temperature * wide.entropy  # of L_pi = T log pi - min Q
        gained = (wide.q_data - q_pi).mean()
        mean = wide.mean()
        gap = mean.log_mu_data - mean.log_mu_pi
        horizon = 1 / (1 - float(flags["gamma"]))
        row = {
            "dataset": f"`{env}`",
            "lambda": short(flags["lam"]),
            "score": cell.score.mean(),
            "log mu(a)": f"{mean.log_mu_data:.2f}",
            "log mu(a')": f"{mean.log_mu_pi:.2f}",
            "gap": f"{gap:.2f}",
            "Q(a) - min Q(a')": f"{gained:.2f}",
            "Q on the data": mean.q_data,
            "Q + gap / (1 - gamma)": mean.q_data + gap * horizon,
        }
        rows.append(row)
    return report.markdown(pd.DataFrame(rows)) if rows else ""


def stopping(cells) -> str:
    """First and last evaluations of every seed on the mixture, and the means of the last ones."""
    rows = []
    for method, title in (TITLES | PEERS).items():
        if (MIXTURE, method) not in cells:
            continue
        own = cells[MIXTURE, method]
        row = {"method": title}
        for name, i in ("first", 0), ("last", -1):
            at = sorted({int(curve.steps.iloc[i]) for curve in own.curve})
            row[f"{name} evaluation, at step"] = ", ".join(f"{step:,}" for step in at)
            shown = (f"{curve.score.iloc[i]:.0f}" for curve in own.curve)
            row[f"{name} scores"] = ", ".join(shown)
        row["means of the last ten"] = ", ".join(f"{score:.1f}" for score in own.score)
        rows.append(row)
    return report.markdown(pd.DataFrame(rows)) if rows else ""


def ogbench(folder) -> str:
    """Our shortened runs on OGBench's tasks, for docs/ogbench.md; empty where there are none."""
    cells = read_cells(folder, "-singletask")
    rows = []
    for env, method in sorted(cells, key=lambda key: (key[0], [*TITLES, *PEERS].index(key[1]))):
        own = cells[env, method].score
        row = {"task": f"`{env}`", "run": (TITLES | PEERS)[method]}
        row["scores of its seeds"] = ", ".join(f"{score:.1f}" for score in own)
        rows.append(row | {MEAN: mean_of(own)})
    return report.markdown(pd.DataFrame(rows)) if rows else ""


def tables(cells, folder) -> dict:
    """{heading: table}, as docs/results.md has them."""
    found = {"Scores": table(cells)}
    found["From the clone to the policy"] = clones(cells)
    for title, text in ablations(cells).items():
        found[f"Ablations of {title}"] = text
    found["What Fisher-BRC's backups pay"] = gaps(cells, folder)
    found["The mixture ranks stopping times"] = stopping(cells)
    if rows_of(cells, PEERS):
        found["Beside other people's code"] = peers(cells)
    return {heading: text for heading, text in found.items() if text}


def command(cells, algorithm: str) -> str:
    """The last line of an algorithm's docstring: the bare command, the steps of its last phase, and
    the score on its dataset."""
    scores = report.score_table(cells[MIXTURE, algorithm]).iloc[-1]
    mean, seeds = scores[report.SCORE].rstrip(")").split(" (")
    seeds += " seed" if seeds == "1" else " seeds"
    line = f"python algorithms/{algorithm}.py"
    length = f"{int(scores['steps']) / 1000:g}k steps"
    return f"    {line}  # {length}: {mean}, {MIXTURE}, {seeds}"


# ---- pictures --------------------------------------------------------------------------------
# They are 8 inches wide: where 800 pixels are shown, a letter of size 10 has 14.


def curve(runs):
    """(share of the training, mean, standard error), each (T,), of runs with equal steps, where a
    run's score is the mean of its LAST evaluations, of fewer at the beginning. The error is 0 for
    one seed. Raises InputError where steps differ."""
    first = runs.folder.iloc[0]
    steps = runs.curve.iloc[0].steps
    for folder, one in zip(runs.folder, runs.curve):
        if not one.steps.equals(steps):
            raise InputError(f"{folder} and {first} have other steps: move one away")
    means = [one.score.rolling(LAST, min_periods=1).mean() for one in runs.curve]
    scores = pd.concat(means, axis=1)  # (T, seeds)
    errors = scores.sem(axis=1).fillna(0)
    return steps / steps.max(), scores.mean(axis=1), errors


def lines_of_data(panel, data, draw) -> dict:
    """{label: line} of what the data's episodes score, by the panel's axhline or axvline."""
    lines = {}
    for what, dashes in zip(data, (":", "--")):
        look = dict(color="0.4", ls=dashes, lw=1, zorder=0)
        lines[f"data, {what}"] = draw(panel)(data[what], **look)
    return lines


def curves(cells):
    """For each family a row of panels, one a dataset, and a legend below."""
    figure = matplotlib.figure.Figure((8, 8), layout="constrained")
    parts = figure.subfigures(len(FAMILIES), 1)
    data = report.data_scores(pd.concat(cells.values()))
    for part, (words, titles) in zip(parts, FAMILIES.items()):
        named = rows_of(cells, titles)
        styles, handles = report.styles_of(named), {}
        part.suptitle(words, fontsize=12)
        panels = part.subplots(1, len(datasets(cells)), sharey=True, squeeze=False)[0]
        for panel, env in zip(panels, datasets(cells)):
            known = lines_of_data(panel, data.get(env, {}), lambda panel: panel.axhline)
            for method in named:
                if (env, method) not in cells:
                    continue
                x, mean, error = curve(cells[env, method])
                color, dashes = styles[method]
                (line,) = panel.plot(100 * x, mean, color=color, ls=dashes, lw=1.5)
                low, high = mean - error, mean + error
                panel.fill_between(100 * x, low, high, color=color, alpha=0.15, lw=0)
                handles[titles[method]] = line
            panel.set_title(env, fontsize=10)
            panel.set(xlim=(0, 100), ylim=(-3, 109))
            panel.set_xticks([0, 50, 100])
            panel.tick_params(labelsize=10)
        panels[0].set_ylabel("normalized score", fontsize=11)
        words = "share of each method's own training steps, in %"
        panels[len(panels) // 2].set_xlabel(words, fontsize=11)
        order = {titles[m]: handles[titles[m]] for m in named} | known
        place = dict(loc="outside lower center", ncols=4)
        look = dict(fontsize=10, frameon=False, columnspacing=1.2, handlelength=2)
        part.legend(order.values(), order, **place, **look)
    return figure


def rows_of_panels(cells, named, height):
    """A figure with a row of `height` inches for each method and a panel for each dataset, and
    {dataset: panel}."""
    size = (8, 1.4 + height * len(named))
    figure = matplotlib.figure.Figure(size, layout="constrained")
    envs = datasets(cells)
    panels = figure.subplots(1, len(envs), sharey=True, squeeze=False)[0]
    for panel, env in zip(panels, envs):
        panel.set_title(env, fontsize=10)
        panel.set(xlim=(-4, 108), ylim=(len(named) - 0.4, -0.6))
        panel.set_xticks([0, 50, 100])
        panel.tick_params(labelsize=10)
        panel.tick_params(axis="y", length=0)
        for row in range(1, len(named)):
            panel.axhline(row - 0.5, color="0.9", lw=0.8, zorder=0)
    titles = [(TITLES | PEERS)[method] for method in named]
    panels[0].set_yticks(range(len(named)), titles)
    middle = panels[len(panels) // 2]
    middle.set_xlabel("normalized score", fontsize=11)
    return figure, dict(zip(envs, panels))


def explain(figure, signs) -> None:
    """A legend below the panels of {words: sign}."""
    place = dict(loc="outside lower center", ncols=4, fontsize=10)
    look = dict(frameon=False, columnspacing=1.2, handlelength=1.5)
    figure.legend(signs.values(), signs, **place, **look)


def sign(marker, **look):
    """A marker for a legend."""
    look = dict(ls="", ms=5, color="0.3") | look
    return Line2D([], [], marker=marker, **look)


def heights(row, count, half):
    """Heights (count,) of a row's seeds, around its middle."""
    if count == 1:
        return np.array([row])
    return np.linspace(row - half, row + half, count)


def dots(cells, named):
    """Every seed's score, and their mean."""
    figure, panels = rows_of_panels(cells, named, 0.27)
    styles = report.styles_of(named)
    data = report.data_scores(pd.concat(cells.values()))
    for env, panel in panels.items():
        known = lines_of_data(panel, data.get(env, {}), lambda panel: panel.axvline)
        for row, method in enumerate(named):
            if (env, method) not in cells:
                continue
            scores = cells[env, method].score
            color, _ = styles[method]
            face = "white" if method in PEERS else color
            look = dict(ms=5, mec=color, mfc=face, clip_on=False)
            panel.plot(scores, heights(row, len(scores), 0.15), "o", **look)
            mean = [scores.mean()] * 2
            panel.plot(mean, [row - 0.35, row + 0.35], color=color, lw=2)
    signs = {"a seed": sign("o"), "mean": sign("|", ms=11, mew=2)}
    if PEERS.keys() & {*named}:
        signs["a seed of other people's code"] = sign("o", mfc="white")
    explain(figure, signs | known)
    return figure


def draw_path(panel, path, y, down, color) -> None:
    """One seed's way at height y. Where it has three points, its last part leads `down` a little,
    because it may lead back."""
    *before, policy = path
    panel.plot(before, [y] * len(before), color=color, lw=1.2)
    look = dict(arrowstyle="-|>", color=color, lw=1.2, shrinkA=0, shrinkB=0)
    end = policy, y + down * (len(before) - 1)
    if abs(policy - before[-1]) < 3:  # too short for an arrow, which would point backwards
        panel.plot(*end, "<" if policy < before[-1] else ">", color=color, ms=5)
    else:
        panel.annotate("", end, (before[-1], y), arrowprops=look)
    for x, marker in zip(before, "oD"):
        look = dict(ms=4.5, mec=color, mfc="white", clip_on=False)
        panel.plot(x, y, marker, **look)


def arrows(cells):
    """Every seed's way from its clone to its policy, or None where no method has a clone."""
    paths = {}
    for cell, runs in cells.items():
        found = [path_of(run) for run in runs.itertuples()]
        if len(found[0]) > 1:
            paths[cell] = found
    cloners = {method for _, method in paths}
    named = [method for method in TITLES if method in cloners]
    if not named:
        return None
    figure, panels = rows_of_panels(cells, named, 0.5)
    styles = report.styles_of(named)
    for env, panel in panels.items():
        for row, method in enumerate(named):
            found = paths.get((env, method), [])
            ys = heights(row, len(found), 0.3)
            for path, y in zip(found, ys):
                color, _ = styles[method]
                draw_path(panel, path, y, 0.25 / len(found), color)
    signs = {
        "the clone of a seed": sign("o", mfc="white"),
        "ARQ's implicit policy": sign("D", mfc="white"),
        "the policy": sign(">", ms=6),
    }
    explain(figure, signs)
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
    shown = tables(cells, args.folder) | {"OGBench (docs/ogbench.md)": ogbench(args.folder)}
    for heading, text in shown.items():
        print(f"# {heading}\n\n{text}\n")
    for algorithm in TITLES:
        if (MIXTURE, algorithm) in cells and "-" not in algorithm:
            print(command(cells, algorithm))
    out.mkdir(parents=True, exist_ok=True)
    save(curves(cells), out / "curves.png")
    save(dots(cells, rows_of(cells, TITLES)), out / "scores.png")
    ways = arrows(cells)
    if ways:
        save(ways, out / "clone_to_policy.png")
    pairs = []
    for peer in rows_of(cells, PEERS):
        pairs += [counterpart(cells, MIXTURE, peer), peer]
    if pairs:
        save(dots(cells, list(dict.fromkeys(pairs))), out / "peers.png")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

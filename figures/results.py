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


def read_cells(folder):
    """{(dataset, method): finished runs} on the bundled datasets, sorted. Raises InputError."""
    runs = report.read_runs([folder])
    runs = runs[runs.score.notna() & runs.dataset.str.endswith("-demo")]
    report.check(runs)
    if not runs.method.isin(TITLES).any():
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
    stages = [name for name in (*CLONES, IMPLICIT) if name in run.references]
    return [*(run.references[name] for name in stages), run.score]


# ---- tables ----------------------------------------------------------------------------------


def table(cells) -> str:
    """What the data score, then each method's mean ± standard error, and the mean over all
    datasets. A column's head says of how many seeds its cells are; a cell with other ones says
    it."""
    scores = report.score_table(pd.concat(cells.values())).set_index(["method", "dataset"])
    columns, rows = {}, {}
    for env in datasets(cells):
        usual = scores.seeds.xs(env, level="dataset").mode()[0]
        columns[env] = f"`{env}`, {usual} seeds", f" ({usual})"
    for method in DATA | TITLES | PEERS:
        if method not in scores.index:
            continue
        own = scores.loc[method][report.SCORE]
        texts = [own.get(env, "-").removesuffix(usual) for env, (_, usual) in columns.items()]
        every = "" if method in DATA else "-"
        if report.ALL in own and "-" not in texts:
            every = own[report.ALL].partition(" (")[0]
        rows[(DATA | TITLES | PEERS)[method]] = [*texts, every]
    heads = [*(head for head, _ in columns.values()), "mean over the datasets"]
    frame = pd.DataFrame.from_dict(rows, "index", columns=heads)
    return report.markdown(frame.rename_axis("method").reset_index())


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
    """A method's title; for a run under another name the settings in which it differs from its
    counterpart."""
    if method in TITLES | PEERS:
        return (TITLES | PEERS)[method]
    base = counterpart(cells, env, method)
    own, other = (cells[env, name].identity.iloc[0] for name in (method, base))
    names = [name for name in own if name != "name" and own[name] != other.get(name)]
    pairs = [(name, *map(short, (own[name], other.get(name)))) for name in names]
    what = ", ".join(f"`{name}` {here}, not {there}" for name, here, there in pairs)
    file, _, variant = base.partition("-")
    return f"{TITLES[file]}{variant and f', `{variant}`,'} with {what}"


def beside(cells, chosen) -> str:
    """All seeds of (dataset, method) cells, and how far each mean lies from its counterpart's."""
    rows = []
    for env, method in chosen:
        own, base = (cells.get((env, x)) for x in (method, counterpart(cells, env, method)))
        difference = ""
        if base is not None:
            gap = own.score.mean() - base.score.mean()
            difference = f"{gap:+.1f} ± {np.hypot(own.score.sem(), base.score.sem()):.1f}"
        every = ", ".join(f"{score:.1f}" for score in own.score)
        title = name_of(cells, env, method)
        row = f"`{env}`", title, every, mean_of(own.score), difference.removesuffix(" ± nan")
        rows.append(row)
    columns = ["dataset", "run", "scores of its seeds", MEAN, "minus its counterpart"]
    return report.markdown(pd.DataFrame(rows, columns=columns))


def ablations(cells) -> dict:
    """{title of a method: a table of its runs under other names beside those of its preset}."""
    found = {}
    for env, method in cells:
        file = method.partition("-")[0]
        if method not in TITLES and (env, file) in cells and method not in PEERS:
            found.setdefault(TITLES[file], {}).update({(env, file): None, (env, method): None})
    return {title: beside(cells, chosen) for title, chosen in found.items()}


def peers(cells) -> str:
    """Other people's code beside ours."""
    pairs = [(env, peer) for peer in PEERS for env in datasets(cells) if (env, peer) in cells]
    both = [(env, x) for env, peer in pairs for x in (counterpart(cells, env, peer), peer)]
    return beside(cells, both)


def clones(cells) -> str:
    """Means of the clone, of ARQ's implicit policy and of the policy, with arrows between them."""
    rows = {}
    for method in rows_of(cells, TITLES):
        texts = []
        for env in datasets(cells):
            runs = cells[env, method].itertuples() if (env, method) in cells else ()
            paths = np.array([path_of(run) for run in runs])  # (seeds, stages)
            means = paths.mean(0) if len(paths) else ()
            texts.append(" → ".join(f"{mean:.1f}" for mean in means) or "-")
        if any("→" in text for text in texts):
            rows[TITLES[method]] = texts
    heads = [f"`{env}`" for env in datasets(cells)]
    frame = pd.DataFrame.from_dict(rows, "index", columns=heads)
    return report.markdown(frame.rename_axis("method").reset_index())


def gaps(cells, folder) -> str:
    """What Fisher-BRC's backups pay, over the second half of training: the mean of Q on the data,
    and of log mu(a) - log mu(a'), for a of the data and a' of the policy in the same states, which
    stand for the next ones. Read from metrics.csv.gz; empty where the folder has none."""
    _, _, metrics = store.stored(Path(folder))
    metrics = metrics[(metrics.method == "fisher_brc") & (metrics.phase == "train")]
    rows = []
    for (env, variant), own in metrics.groupby(["dataset", "variant"]):
        cell = cells.get((env, "-".join(filter(None, ("fisher_brc", variant)))))
        if cell is None or cell.identity.iloc[0]["offset"] == "False":
            continue
        names = ["q_data", "log_mu_data", "log_mu_pi"]
        own = own.assign(step=own.step.astype(int), value=own.value.astype(float))
        late = own[own.step > own.step.max() / 2]
        means = late.groupby(["metric", "seed"]).value.mean().groupby("metric").mean()
        q, data, pi = means[names]
        horizon = 1 / (1 - float(cell.identity.iloc[0]["gamma"]))
        cost = [f"{x:.2f}" for x in (data, pi, data - pi)] + [(data - pi) * horizon]
        rows.append((f"`{env}`", cell.identity.iloc[0]["lam"], cell.score.mean(), q, *cost))
    columns = ["dataset", "lambda", "score", "Q on the data", "log mu(a)", "log mu(a')"]
    columns += ["gap", "gap / (1 - gamma)"]
    return report.markdown(pd.DataFrame(rows, columns=columns)) if rows else ""


def tables(cells, folder) -> dict:
    """{heading: table}, as docs/results.md has them."""
    found = {"Scores": table(cells), "From the clone to the policy": clones(cells)}
    found |= {f"Ablations of {title}": text for title, text in ablations(cells).items()}
    found["What Fisher-BRC's backups pay"] = gaps(cells, folder)
    if any(method in PEERS for _, method in cells):
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


def rows_of_panels(cells, named):
    """A figure with a row for each method and a panel for each dataset, and {dataset: panel}."""
    figure = matplotlib.figure.Figure((8, 1.4 + 0.27 * len(named)), layout="constrained")
    envs = datasets(cells)
    panels = figure.subplots(1, len(envs), sharey=True, squeeze=False)[0]
    for panel, env in zip(panels, envs):
        panel.set_title(env, fontsize=10)
        panel.set(xlim=(-4, 108), ylim=(len(named) - 0.4, -0.6))
        panel.set_xticks([0, 50, 100])
        panel.tick_params(labelsize=10)
        panel.tick_params(axis="y", length=0)
        for row in range(len(named) - 1):
            panel.axhline(row + 0.5, color="0.9", lw=0.8, zorder=0)
    panels[0].set_yticks(range(len(named)), [(TITLES | PEERS)[method] for method in named])
    panels[len(panels) // 2].set_xlabel("normalized score", fontsize=11)
    return figure, dict(zip(envs, panels))


def explain(figure, signs) -> None:
    """A legend below the panels of {words: line}."""
    place = dict(loc="outside lower center", ncols=4, fontsize=10, frameon=False)
    figure.legend(signs.values(), signs, columnspacing=1.2, handlelength=1.5, **place)


def spread(count: int):
    """Heights (count,) of a row's seeds, around its middle."""
    return np.linspace(-0.3, 0.3, count) if count > 1 else np.zeros(1)


def dots(cells, named):
    """Every seed's score, and their mean."""
    figure, panels = rows_of_panels(cells, named)
    styles = report.styles_of(named)
    data = report.data_scores(pd.concat(cells.values()))
    for env, panel in panels.items():
        known = lines_of_data(panel, data.get(env, {}), lambda panel: panel.axvline)
        for row, method in enumerate(named):
            if (env, method) not in cells:
                continue
            scores, color = cells[env, method].score, styles[method][0]
            heights = row + spread(len(scores)) / 2
            face = "white" if method in PEERS else color
            panel.plot(scores, heights, "o", ms=5, mec=color, mfc=face, clip_on=False)
            panel.plot([scores.mean()] * 2, [row - 0.35, row + 0.35], color=color, lw=2)
    signs = {"a seed": Line2D([], [], ls="", marker="o", ms=5, color="0.3")}
    signs["mean"] = Line2D([], [], ls="", marker="|", ms=11, mew=2, color="0.3")
    explain(figure, signs | known)
    return figure


def arrows(cells):
    """Every seed's way from its clone to its policy."""
    paths = {cell: [path_of(run) for run in runs.itertuples()] for cell, runs in cells.items()}
    long = {method for (_, method), found in paths.items() if len(found[0]) > 1}
    named = [method for method in rows_of(cells, TITLES) if method in long]
    figure, panels = rows_of_panels(cells, named)
    figure.set_figheight(1.4 + 0.5 * len(named))
    styles = report.styles_of(named)
    for env, panel in panels.items():
        for row, method in enumerate(named):
            found, color = paths.get((env, method), []), styles[method][0]
            look = dict(arrowstyle="-|>", color=color, lw=1.2, shrinkA=0, shrinkB=0)
            heights = row + spread(len(found))
            down = 0.25 / max(1, len(found))  # of the last arrow, which may lead back
            for y, (*before, policy) in zip(heights, found):
                end = policy, y + down * (len(before) - 1)
                panel.plot(before, [y] * len(before), color=color, lw=1.2)
                panel.annotate("", end, (before[-1], y), arrowprops=look)
                for x, marker in zip(before, "oD"):
                    panel.plot(x, y, marker, ms=4.5, mec=color, mfc="white", clip_on=False)
    sign = lambda marker: Line2D([], [], ls="", marker=marker, color="0.3", mfc="white", ms=5)
    signs = {"the clone of a seed": sign("o"), "ARQ's implicit policy": sign("D")}
    signs["the policy"] = Line2D([], [], ls="", marker=">", ms=6, color="0.3")
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
    for heading, text in tables(cells, args.folder).items():
        print(f"# {heading}\n\n{text}\n")
    for algorithm in TITLES:
        if (MIXTURE, algorithm) in cells and "-" not in algorithm:
            print(command(cells, algorithm))
    out.mkdir(parents=True, exist_ok=True)
    save(curves(cells), out / "curves.png")
    save(dots(cells, rows_of(cells, TITLES)), out / "scores.png")
    save(arrows(cells), out / "clone_to_policy.png")
    others = rows_of(cells, PEERS)
    if others:
        pairs = [x for peer in others for x in (counterpart(cells, MIXTURE, peer), peer)]
        save(dots(cells, pairs), out / "peers.png")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

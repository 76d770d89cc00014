"""What a table says that declared its primary contrast before it ran, and chose a learning rate for each variant."""

from __future__ import annotations

import math

from lab.experiments.markdown import interval, mean_and_spread, p_text
from lab.experiments.paired import Estimate, Rows, difference, equivalence, gaps, holm, level, p_value, welch
from lab.experiments.rows import final_rows, key_of
from lab.experiments.table import Key, Table, pair_of, rate
from lab.experiments.tuning import WIDENED_AT_MOST, Tuning, pending_runs, tuning_of
from lab.files import markdown_table

VARIANTS = ("variant", "learning rate", "n", "top-1 (%)", "training loss", "dead units (%)", "zeros (%)",
            "collapsed", "failed")  # fmt: skip
CONTRASTS = ("contrast (points of top-1)", "n", "paired", "Welch", "p", "p after Holm")
Row = dict[str, str]


def body(table: Table, rows: list[Row]) -> str:
    """Declaration, verdict, and the tables of variants, contrasts and learning rates."""
    final = final_rows(rows)
    runs = {key_of(row): row for row in rows}
    tuning, left = tuning_of(table, runs), pending_runs(table, runs)
    parts = [declaration(table)]
    if final:
        said = (
            f"- Not finished: {len(left)} of {len(final) + len(left)} final runs are to do, and nothing is said before."
        )
        parts += ["\n".join(filter(None, [said if left else verdict(table, final), failures(table, final)]))]
        parts += [table_of(table, final), "" if left else table_of_contrasts(table, final)]
    if tuning and table.tune:
        parts += [table_of_rates(table, rows, tuning)]
    return "\n\n".join(part for part in parts if part)


def declaration(table: Table) -> str:
    """What the file of the table says before it runs."""
    parts = []
    if table.primary:
        margin = f", margin of equivalence ±{table.margin:g} points" if table.margin else ""
        parts.append(f"Declared before it ran: primary contrast `{table.primary}`{margin}.")
    if tune := table.tune:
        epochs = tune.options.get("epochs", table.options.get("epochs"))
        seeds = f"seed{'s' if len(tune.seeds) > 1 else ''} {', '.join(map(str, tune.seeds))}"
        parts.append(
            f"Each variant has the learning rate that is best for it on {tune.held_out} held-out training images of "
            f"each class ({epochs} epoch{'' if epochs == 1 else 's'}, tuning {seeds}); the final seeds are new."
        )
    return " ".join(parts)


def verdict(table: Table, rows: list[Row]) -> str:
    """By rule: what the paired interval of the primary contrast says, and which other contrasts survive Holm."""
    lines = []
    if table.primary:
        lines.append(f"- {primary_sentence(table, rows)}")
    others = other_contrasts(table, rows)
    shown = [f"`{name}` ({interval(gap)})" for name, gap, p in others if p < 0.05]
    rest = [f"`{name}` ({interval(gap)})" for name, gap, p in others if not p < 0.05]
    if shown:
        lines.append(f"- Other differences that survive Holm's correction: {', '.join(shown)}.")
    if rest:
        lines.append(f"- No difference is shown for {', '.join(rest)}.")
    return "\n".join(lines)


def primary_sentence(table: Table, rows: Rows) -> str:
    """What the paired 95 % interval of the primary contrast says about 0 and the margin of equivalence."""
    assert table.primary
    rows = list(rows)
    one, other = pair_of(table.primary)
    gap, margin = difference(rows, one, other), table.margin
    name = f"`{one}` - `{other}`"
    if math.isnan(gap.low):
        return f"{name}: {gap.n} paired seeds, too few to say anything."
    found = f"{name} is {interval(gap)} points in {gap.n} paired seeds"
    if margin is None:
        return f"{found}: {('no difference is shown', 'a gain', 'a loss')[gap.sign]}."
    tost = f"TOST p {p_text(equivalence(gaps(rows, one, other), margin))}"
    if gap.low > margin:
        return f"{found}: above the margin, a gain of more than {margin:g} points ({tost})."
    if gap.high < -margin:
        return f"{found}: below the margin, a loss of more than {margin:g} points ({tost})."
    if -margin < gap.low and gap.high < margin:
        sign = ("no difference from 0 is shown", "above 0", "below 0")[gap.sign]
        return f"{found}: within ±{margin:g} points ({sign}; {tost})."
    return f"{found}: not settled, it reaches over a margin of ±{margin:g} ({tost}). {needed(gap, margin)}"


def needed(gap: Estimate, margin: float) -> str:
    """How many seeds would settle it, if mean and spread stayed as they are."""
    from scipy.stats import t  # here, since it takes long to import

    room = abs(abs(gap.mean) - margin)
    for n in range(gap.n + 1, 1001):
        if float(t.ppf(0.975, n - 1)) * gap.spread / math.sqrt(n) < room:
            return f"With this mean and spread it would take about {n} seeds."
    return "With this mean and spread it would take more than 1000 seeds."


def other_contrasts(table: Table, rows: Rows) -> list[tuple[str, Estimate, float]]:
    """The contrasts but the primary one that have two paired seeds: name, paired estimate, p after Holm."""
    rows = list(rows)
    found = [(name, difference(rows, *pair_of(name))) for name in table.compared() if name != table.primary]
    found = [(name, gap) for name, gap in found if gap.n > 1]
    adjusted = holm([p_value(gaps(rows, *pair_of(name))) for name, _ in found])
    return [(name, gap, p) for (name, gap), p in zip(found, adjusted, strict=True)]


def failures(table: Table, rows: list[Row]) -> str:
    """How many runs collapsed or failed, by variant; empty if none did."""
    lost = [row for row in rows if row["status"] in ("collapsed", "failed")]
    parts = []
    for name in table.variants:
        counts = [
            sum(row["variant"] == name and row["status"] == kind for row in lost) for kind in ("collapsed", "failed")
        ]
        if any(counts):
            total = sum(row["variant"] == name for row in rows)
            parts.append(f"`{name}` ({counts[0]} collapsed, {counts[1]} failed of {total})")
    return f"- Left out of the means: {', '.join(parts)}." if parts else ""


def table_of(table: Table, rows: list[Row]) -> str:
    """The variants that have run, in Markdown."""
    lines = []
    for name in table.variants:
        own = [row for row in rows if row["variant"] == name]
        if own:
            shares = [mean_and_spread(level(own, name, key), 1, 100) for key in ("dead_units", "sparsity")]
            counts = [str(sum(row["status"] == kind for row in own)) for kind in ("collapsed", "failed")]
            lines.append([
                f"`{name}`", "/".join(sorted({row["lr"] for row in own})), str(level(own, name).n),
                mean_and_spread(level(own, name)), mean_and_spread(level(own, name, "train_loss"), 3), *shares, *counts,
            ])  # fmt: skip
    return markdown_table(VARIANTS, lines)


def table_of_contrasts(table: Table, rows: list[Row]) -> str:
    """Each contrast with both intervals, its p and, but for the primary one, Holm's, in Markdown."""
    adjusted = {name: p for name, _, p in other_contrasts(table, rows)}
    lines = []
    for name in table.compared():
        one, other = pair_of(name)
        gap = difference(rows, one, other)
        if gap.n:
            last = "primary" if name == table.primary else p_text(adjusted.get(name, math.nan))
            p = p_text(p_value(gaps(rows, one, other)))
            lines.append(
                [f"`{one}` - `{other}`", str(gap.n), interval(gap), interval(welch(rows, one, other)), p, last]
            )
    return markdown_table(CONTRASTS, lines) if lines else ""


def table_of_rates(table: Table, rows: list[Row], tuning: Tuning) -> str:
    """Top-1 on held-out images by variant and learning rate, the chosen one in bold, and how far the grid grew."""
    assert table.tune
    runs = {key_of(row): row for row in rows}
    lines = []
    for name in table.variants:
        cells = []
        for lr in map(rate, tuning.grid):
            own = [runs[key] for seed in table.tune.seeds if (key := Key("tune", name, lr, seed)) in runs]
            lost = sum(row["status"] != "done" for row in own)
            cell = f"{lost} of {len(own)} lost" if lost else mean_and_spread(level(own, name))
            cells.append(f"**{cell}**" if tuning.best.get(name) == lr else cell)
        lines.append([f"`{name}`", *cells])
    head = ["held-out top-1 (%) at learning rate", *map(rate, tuning.grid)]
    return f"{widening(tuning)}\n\n{markdown_table(head, lines)}"


def widening(tuning: Tuning) -> str:
    """What happened to the grid, and whose best rate is still at its edge."""
    if not tuning.done:
        return f"Tuning isn't finished: {len(tuning.pending)} runs to go."
    text = "The grid was not widened." if not tuning.widened else (
        f"The grid was widened {('once', 'twice')[tuning.widened - 1]} for all variants."
    )  # fmt: skip
    edge = [f"`{name}`" for name in tuning.edge if name in tuning.best]
    lost = [f"`{name}`" for name in tuning.edge if name not in tuning.best]
    if edge:
        text += f" At its edge even after {WIDENED_AT_MOST} widenings: {', '.join(edge)}."
    if lost:
        text += f" A run was lost at every rate: {', '.join(lost)}, which so has no final runs."
    return text

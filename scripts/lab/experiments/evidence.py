"""What results/TABLE.csv say: tables in Markdown, sentences; the pages of results/, and the overview of docs/."""

from __future__ import annotations

import math
from pathlib import Path

from lab.experiments import tuned
from lab.experiments.markdown import interval, mean_and_spread
from lab.experiments.paired import Rows, difference, gaps, holm, level, p_value, survives_holm
from lab.experiments.pictures import PANELS
from lab.experiments.rows import done_epochs, final_rows, key_of, load_rows
from lab.experiments.table import TABLES, Table, list_tables, load_table
from lab.experiments.tuning import pending_runs
from lab.files import markdown_table, read_rows, write_atomically

PAGE = """\
# Results

Every table has a page. `python scripts/reproduce.py` writes them from the CSV files beside them. How to read them:

Top-1 is of the last epoch, mean ± standard deviation over the seeds. Differences are paired: variant minus baseline
with the same seed, so with the same first weights and the same order of the data; the mean over the seeds, and its 95 %
interval by Student's t. Intervals are not corrected for the number of comparisons: of twenty without a real
difference, about one misses 0. So a difference counts as shown only if its paired t-test survives Holm's correction
(p < 0.05) over all differences that stand in the same sentence. Where none is shown, there may still be one.

`relu`, `gelu`, ... are the activation itself, with its own gradient; `sugar-...` is ReLU with that one's gradient. A
dead unit was never above 0 on the validation data; a smooth activation still has a gradient there. An empty cell was
not counted.

A run collapsed if its loss is not finite or its top-1 is within 2 points of chance, and failed if it diverged before
its end. Such runs are counted and left out of every mean and difference.

Some tables say before they run what decides: the primary contrast and the margin within which two variants count as
equal. In these each variant has its own learning rate, chosen on held-out training images from one grid with one budget
for all, and every final seed is new. All other tables have one rate for all variants, and what they show may be the
rate's doing. Beside the paired interval stands Welch's, which makes no use of the pairs. p is of the paired t-test;
Holm's correction is over all contrasts of the table but the primary one. TOST is the equivalence test of two one-sided
paired t-tests at the margin.
"""
COLUMNS = ("variant", "n", "top-1 (%)", "minus `{}` (points)", "minus the activation itself (points)", "training loss",
           "dead units (%)", "zeros (%)")  # fmt: skip
OVERVIEW = ("experiment", "learning rate", "seeds", "baseline, top-1 (%)", "difference in top-1 (bold: shown)")
INDEX = ("table", "learning rate", "final runs")

# Folders of results/ that scripts/diagnose.py wrote: heading, and the options that make them again.
DEPTHS = {
    "deep_depth": (
        "The 50-layer MLP by depth",
        "Seed 0 of the table `deep` above, once it has run, on its held-out images: activations from the first to the "
        "last.",
        "--data-dir output/reproduce/subset-per_class-1000-held_out-200 "
        "--compare output/reproduce/deep/relu-0 output/reproduce/deep/sugar-nelu-0.01-0",
    ),
    "swin_zeros": (
        "The zeros of a Swin by depth",
        "The published `swin_tiny_sugar.nelu_cifar10` on 1,000 test images.",
        "--data-dir DATA --model swin_tiny_sugar.nelu_cifar10 --images 1000",
    ),
}


def twin(table: Table, variant: str) -> str | None:
    """The variant whose activation is itself the function that this one borrows the gradient of, if there is one."""
    own = dict(table.variants[variant])
    if "sugar" not in own:
        return None
    plain = {"plain": own.pop("sugar"), **own}
    return next((name for name, other in table.variants.items() if other == plain), None)


def table_of(table: Table, rows: Rows) -> str:
    """The variants that have run, in Markdown."""
    ran = [name for name in table.variants if level(rows, name).n]
    twins = {name: twin(table, name) for name in ran}
    lines = [[column.format(table.baseline) for column in COLUMNS]]
    for name in ran:
        gaps = [None if name == table.baseline else table.baseline, twins[name]]
        shares = [mean_and_spread(level(rows, name, key), 1, 100) for key in ("dead_units", "sparsity")]
        lines.append([
            f"`{name}`", str(level(rows, name).n), mean_and_spread(level(rows, name)),
            *(interval(difference(rows, name, other)) if other else "" for other in gaps),
            mean_and_spread(level(rows, name, "train_loss"), 3), *shares,
        ])  # fmt: skip
    if not any(twins.values()):
        lines = [line[:4] + line[5:] for line in lines]
    return markdown_table(lines[0], lines[1:])


def table_of_epochs(table: Table, epochs: list[dict[str, str]]) -> str:
    """Top-1 after each epoch, minus the baseline's, in Markdown; empty unless the start was validated (epoch -1)."""
    numbers = sorted({int(row["epoch"]) for row in epochs})
    if -1 not in numbers:
        return ""
    at = {number: [row for row in epochs if row["epoch"] == str(number)] for number in numbers}
    head = ["top-1 (%) after", *(f"{number + 1} epochs" if number else "1 epoch" for number in numbers)]
    lines = []
    for name in table.variants:
        cells = [mean_and_spread(level(rows, name)) for rows in at.values()]
        if name != table.baseline:
            gaps = [interval(difference(rows, name, table.baseline)) for rows in at.values()]
            cells = [f"{cell} ({gap})" if gap else cell for cell, gap in zip(cells, gaps, strict=True)]
        if any(cells):
            lines.append([f"`{name}`", *cells])
    return f"In brackets: minus `{table.baseline}`.\n\n{markdown_table(head, lines)}"


def verdict(table: Table, rows: Rows) -> str:
    """By rule: for which variants top-1 is above the baseline's, or below, and for which no difference is shown.

    Then the same for SUGAR against the activation itself, for SUGAR against ReLU where that isn't the baseline, and for
    the share of dead units against the baseline's.
    """
    against = {name: table.baseline for name in table.variants if name != table.baseline}
    twins = {name: other for name in table.variants if (other := twin(table, name))}
    relu = next((name for name, own in table.variants.items() if own == {"plain": "relu"}), table.baseline)
    gradients = {name: relu for name, own in table.variants.items() if "sugar" in own and relu != table.baseline}
    if not any(difference(rows, name, table.baseline).n for name in against):
        return f"Nothing to compare with `{table.baseline}` has run."
    found = [
        sentence(rows, against, "top-1", f"with `{table.baseline}`"),
        sentence(rows, twins, "top-1", "with the activation itself"),
        sentence(rows, gradients, "top-1", f"with ReLU's own gradient (`{relu}`)"),
        sentence(rows, against, "the share of dead units", f"with `{table.baseline}`", "dead_units", 100),
    ]
    return "\n".join(f"- {text}" for text in found if text)


def sentence(rows: Rows, pairs: dict[str, str], what: str, other: str, column: str = "top1", factor: float = 1) -> str:
    """What the differences between these pairs of variants show; empty if none has run."""
    found = {one: difference(rows, one, base, column) for one, base in pairs.items()}
    found = {one: gap for one, gap in found.items() if gap.n}
    if not found:
        return ""
    single = [one for one, gap in found.items() if math.isnan(gap.low)]
    if len(single) == len(found):
        return f"One seed says nothing about a difference in {what} from the run {other}."
    found = {one: gap for one, gap in found.items() if one not in single}
    survive = survives_holm(rows, [(one, pairs[one]) for one in found], column)
    signs = {one: gap.sign if survives else 0 for (one, gap), survives in zip(found.items(), survive, strict=True)}
    parts = []
    for sign, text in ((1, f"{what} is higher than {other}"), (-1, f"{what} is lower than {other}"),
                       (0, f"no difference in {what} from the runs {other} is shown")):  # fmt: skip
        named = [f"`{one}` ({interval(gap, factor)})" for one, gap in found.items() if signs[one] == sign]
        if named:
            parts.append(f"{text} for {', '.join(named)}")
    if single:
        parts.append(f"one seed says nothing of {', '.join(f'`{one}`' for one in single)}")
    seeds = " to ".join(map(str, sorted({gap.n for gap in found.values()})))
    return f"In {seeds} paired seeds, {'; '.join(parts)}."


def overview(results: Path) -> str:
    """A line in Markdown for each table that has run with several seeds: how its variants differ from the baseline.

    A table that declared what decides is left out before all its runs are in.
    Paired differences in points of top-1 with their 95 % intervals, as in results/README.md. One is shown, in bold, if
    it survives Holm's correction over all differences of the overview. Links are those of a page of docs/.
    """
    ran = {}
    for table in map(load_table, list_tables()):
        rows = load_rows(table, results)
        if not (table.primary and pending_runs(table, {key_of(row): row for row in rows})):  # nothing is said before
            ran[table.name] = table, final_rows(rows)
    pairs = [
        (name, variant)
        for name, (table, rows) in ran.items()
        for variant in table.variants
        if variant != table.baseline and difference(rows, variant, table.baseline).n > 1
    ]
    adjusted = holm([p_value(gaps(ran[name][1], variant, ran[name][0].baseline)) for name, variant in pairs])
    p_of = dict(zip(pairs, adjusted, strict=True))
    lines = []
    for name, (table, rows) in ran.items():
        own = {variant: p for (other, variant), p in p_of.items() if other == name}
        if own:
            found = {variant: f"`{variant}` {interval(difference(rows, variant, table.baseline))}" for variant in own}
            differences = "<br>".join(f"**{text}**" if own[variant] < 0.05 else text for variant, text in found.items())
            start, rates = level(rows, table.baseline), "each its own" if table.tune else "one for all"
            baseline = f"`{table.baseline}` {mean_and_spread(start)}"
            lines.append([f"[{table.title}](results/{name}.md)", rates, str(start.n), baseline, differences])
    return markdown_table(OVERVIEW, lines) if lines else "None yet."


def compare(table: Table, rows: list[dict[str, str]]) -> str:
    """What to print when a table has run."""
    return f"\n{table.title}\n\n{body(table, rows)}"


def body(table: Table, rows: list[dict[str, str]]) -> str:
    """What the rows of a table say: sentences and tables."""
    if table.primary or table.tune:
        return tuned.body(table, rows)
    final = final_rows(rows)
    found = "\n".join(filter(None, [verdict(table, final), tuned.failures(table, final)]))
    return f"{found}\n\n{table_of(table, final)}"


def table_page(table: Table, results: Path) -> str:
    """The page about one table that has run."""
    rows, curves = load_rows(table, results), done_epochs(table, results)
    ran = {key: sorted({row[key] for row in rows}) for key in ("device", "torch", "timm", "timm_sugar")}
    versions = ", ".join(f"{key} {'/'.join(ran[key])}" for key in ("torch", "timm", "timm_sugar"))
    epochs = "/".join(sorted({row["epochs"] for row in final_rows(rows) or rows}))
    note = f"{table.note}\n\n" if table.note else ""
    picture, by_epoch = results / f"{table.name}.png", table_of_epochs(table, curves)
    by_epoch = f"\n{by_epoch}\n" if by_epoch else ""
    image = f"\n![Top-1 and dead units by variant and epoch]({table.name}.png)\n" if picture.exists() else ""
    return (
        f"# {table.title}\n\n{note}{body(table, rows)}\n{by_epoch}{image}\n"
        f"{epochs} epochs; {'; '.join(ran['device'])}; {versions}.\n"
        f"Settings: [`{table.name}.yaml`](../scripts/reproduce/{table.name}.yaml); each run: [`{table.name}.csv`]"
        f"({table.name}.csv). [How to read this](README.md). Again:\n\n```bash\n{command(table)}\n```\n"
    )


def command(table: Table) -> str:
    """The command that runs a table, as it stands in the head of its file."""
    lines = (TABLES / f"{table.name}.yaml").read_text().splitlines()
    return next(line for line in lines if line.startswith("#   python scripts/reproduce.py")).lstrip("# ")


def pages(results: Path) -> dict[str, str]:
    """The pages of results/ by file name: README.md, one for each table that has run and for each folder of DEPTHS."""
    ran, missing, found = [], [], {}
    for table in map(load_table, list_tables()):
        if rows := load_rows(table, results):
            final = final_rows(rows)
            compared = "compared" if len({row["lr"] for row in final}) > 1 else "one for all"
            rates = "each its own" if table.tune else compared
            ran.append([f"[{table.title}]({table.name}.md)", rates, str(len(final))])
            found[f"{table.name}.md"] = table_page(table, results)
        else:
            missing.append(f"- {table.title}: `{command(table)}`")
    for name, (title, *_) in DEPTHS.items():
        if (results / name / "activations.csv").exists():
            ran.append([f"[{title}]({name}.md)", "", ""])
            found[f"{name}.md"] = depth_page(name, results)
    index = [PAGE]
    if ran:
        index.append(f"\n## What has run\n\n{markdown_table(INDEX, ran)}\n")
    if missing:
        index.append("\n## Defined, not run here\n\n" + "\n".join(missing) + "\n")
    return {"README.md": "".join(index), **found}


def depth_page(name: str, results: Path) -> str:
    """The page about one folder that scripts/diagnose.py wrote."""
    title, text, options = DEPTHS[name]
    totals = [row for row in read_rows(results / name / "activations.csv") if row["layer"] == "total"]
    lines = [[f"`{row['model']}`", *(f"{100 * float(row[key]):.2f}" for key in PANELS)] for row in totals]
    table = markdown_table(["", *PANELS.values()], lines)
    command = f"PYTHONPATH=scripts/reproduce python scripts/diagnose.py {options} --output results/{name}"
    return (
        f"# {title}\n\n{text} All of them together:\n\n{table}\n\n![{', '.join(PANELS.values())} by depth]"
        f"({name}/activations.png)\n\nAgain:\n\n```bash\n{command}\n```\n"
    )


def write_pages(results: Path) -> None:
    """Write the pages of results/."""
    for name, text in pages(results).items():
        write_atomically(results / name, text)

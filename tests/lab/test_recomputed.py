"""The intervals of docs/evidence.md, and which differences count as shown, from results/*.csv by statsmodels."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW, ttost_paired

ROOT = Path(__file__).resolve().parents[2]
CELL = re.compile(r"(\*\*)?`([^`]+)` ([+-][\d.]+) \[([+-][\d.]+), ([+-][\d.]+)\]")


def tops(name: str) -> dict[str, dict[str, float]]:
    """Top-1 by variant and seed of the runs that count, as their CSV file has it."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    file = ROOT / "results" / f"{name}.csv"
    for row in csv.DictReader(file.read_text().splitlines() if file.exists() else []):
        if row.get("phase", "final") == "final" and row.get("status", "done") == "done":
            found[row["variant"]][row["seed"]] = float(row["top1"])
    return found


def titles() -> dict[str, str]:
    """The names of tables by their titles."""
    settings = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "scripts/reproduce").glob("*.yaml")}
    return {settings[name]["title"]: name for name in settings}


def test_overview_is_that_of_other_code() -> None:
    text = (ROOT / "docs" / "evidence.md").read_text()
    lines = text.split("<!-- evidence -->")[1].split("<!-- /evidence -->")[0].strip().splitlines()[2:]
    named, p_values, shown = titles(), [], []
    for line in lines:
        title, _, n, baseline, differences = (cell.strip() for cell in line.strip("|").split("|"))
        title = re.sub(r"\[(.*)\]\(.*\)", r"\1", title)
        top = tops(named[title])
        name, mean = re.match(r"`([^`]+)` ([\d.]+)", baseline).groups()  # type: ignore[union-attr]
        assert (len(top[name]), np.mean(list(top[name].values()))) == (int(n), pytest.approx(float(mean), abs=0.0051))
        cells = CELL.findall(differences)
        assert len(cells) == differences.count("[")
        for bold, variant, *numbers in cells:
            pairs = [top[variant][seed] - top[name][seed] for seed in top[variant] if seed in top[name]]
            found = DescrStatsW(pairs)
            expected = [found.mean, *found.tconfint_mean(0.05)]
            assert [float(number) for number in numbers] == pytest.approx(expected, abs=0.0051), (title, variant)
            p_values.append(found.ttest_mean(0)[1])
            shown.append(bool(bold))
    survive = multipletests(np.nan_to_num(p_values, nan=1.0), 0.05, "holm")[0]
    assert len(lines) >= 8
    assert list(survive) == shown


TUNED = sorted(
    path.stem
    for path in (ROOT / "scripts/reproduce").glob("*.yaml")
    if "tune" in yaml.safe_load(path.read_text()) and tops(path.stem)  # with final runs
)
CONTRAST = re.compile(
    r"\| `([^`]+)` - `([^`]+)` \| (\d+) \| (.*?) \[(.*?), (.*?)\] \| (.*?) \[(.*?), (.*?)\] \| (.*?) \| (.*?) \|"
)


def p_value(text: str) -> float:
    return 0.0005 if text.startswith("<") else float(text)


@pytest.mark.parametrize("name", TUNED)
def test_page_of_a_tuned_table_is_that_of_other_code(name: str) -> None:
    """Contrasts, Holm's correction, equivalence, and the rates chosen, from the CSV file alone."""
    page, top = (ROOT / "results" / f"{name}.md").read_text(), tops(name)
    tuning: dict[str, dict[str, float]] = defaultdict(dict)
    final = 0
    settings = yaml.safe_load((ROOT / "scripts/reproduce" / f"{name}.yaml").read_text())
    for row in csv.DictReader((ROOT / "results" / f"{name}.csv").read_text().splitlines()):
        if row["phase"] == "tune" and row["status"] == "done" and int(row["seed"]) in settings["tune"]["seeds"]:
            tuning[row["variant"]][row["lr"]] = float(row["top1"])
        final += row["phase"] == "final"
    for variant, rate in re.findall(r"^\| `([^`]+)` \| ([\d.]+) \| \d+ \| [\d.]+ ±", page, re.MULTILINE):
        assert float(max(tuning[variant], key=lambda lr: tuning[variant][lr])) == float(rate), variant

    found, corrected = CONTRAST.findall(page), {}
    if unfinished := re.search(r"^- Not finished: (\d+) of (\d+) final runs", page, re.MULTILINE):
        assert int(unfinished[2]) - int(unfinished[1]) == final
        assert not found
        return
    assert len(found) >= 2
    for one, other, n, *numbers, p, holm in found:
        seeds = sorted(top[one].keys() & top[other].keys())
        pairs = DescrStatsW([top[one][seed] - top[other][seed] for seed in seeds])
        welch = CompareMeans(DescrStatsW(list(top[one].values())), DescrStatsW(list(top[other].values())))
        expected = [pairs.mean, *pairs.tconfint_mean(0.05)]
        expected += [
            np.mean(list(top[one].values())) - np.mean(list(top[other].values())),
            *welch.tconfint_diff(0.05, usevar="unequal"),
        ]
        assert int(n) == len(seeds)
        assert [float(number) for number in numbers] == pytest.approx(expected, abs=0.0051), (one, other)
        assert p_value(p) == pytest.approx(pairs.ttest_mean(0)[1], abs=0.00051)
        if holm != "primary":
            corrected[one, other] = pairs.ttest_mean(0)[1], p_value(holm)
    adjusted = multipletests([p for p, _ in corrected.values()], 0.05, "holm")[1]
    assert [p for _, p in corrected.values()] == pytest.approx(list(adjusted), abs=0.00051)

    ((one, other, tost),) = re.findall(r"^- `([^`]+)` - `([^`]+)` is .*TOST p (<?[ \d.]+)", page, re.MULTILINE)
    seeds, margin = sorted(top[one].keys() & top[other].keys()), settings.get("margin") or 1.0
    equivalent = ttost_paired(
        *(np.array([top[variant][seed] for seed in seeds]) for variant in (one, other)), -margin, margin
    )[0]
    assert p_value(tost) == pytest.approx(equivalent, abs=0.00051)

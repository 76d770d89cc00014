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
from statsmodels.stats.weightstats import DescrStatsW

ROOT = Path(__file__).resolve().parents[2]
CELL = re.compile(r"(\*\*)?`([^`]+)` ([+-][\d.]+) \[([+-][\d.]+), ([+-][\d.]+)\]")


def tops(name: str) -> dict[str, dict[str, float]]:
    """Top-1 by variant and seed of the runs that count, as their CSV file has it."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for row in csv.DictReader((ROOT / "results" / f"{name}.csv").read_text().splitlines()):
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

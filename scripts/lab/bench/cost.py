"""What benchmarks measured: rows of CSV files with all that is needed to read and repeat them, and a table of them.

One row is one measurement of one variant: median and quartiles over the repeats, and the same of its ratios to ReLU
and to the base's own activation (for an activation alone: to GELU) in the same repeats.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import timm
import torch

from lab.bench.timing import quartiles, ratios, slope
from lab.bench.variants import OWN, describe
from lab.files import markdown_table, read_rows, write_rows
from timm_sugar.version import __version__

ROOT = Path(__file__).resolve().parents[3]
SETTING = ("subject", "mode", "dtype", "axis", "size", "batch_size", "img_size", "processes")
MACHINE = ("device", "machine", "cores", "threads")
SOFTWARE = ("torch", "timm", "timm_sugar", "commit", "command")
KEY = (*SETTING, "variant", "surrogate", "metric", *MACHINE)
COLUMNS = (
    *(*SETTING, "variant", "surrogate", "metric", "unit", "median", "q1", "q3", "repeats"),
    *("to_relu", "to_relu_q1", "to_relu_q3", "to_own", "to_own_q1", "to_own_q3", *MACHINE, *SOFTWARE),
)
COUNT = "1"  # the unit of what is counted, and has no ratio
Row = dict[str, str]

TITLES = {
    "relu": "ReLU",
    "gelu": "GELU",
    "sugar": "SUGAR",
    "function": "autograd.Function",
    "fgi": "FGI",
    "detach": "detach",
    "x-mlps": "x-mlps-pytorch",
    "product": "a product alone",
    "exponential": "a product and an exponential",
}
METRICS = {
    "step": "training step",
    "kept": "bytes kept for backward",
    "peak": "peak memory of the process",
    "added": "peak memory, added by training",
    "tensors": "most bytes in tensors during a step",
    "forward": "inference",
}
ACTIVATIONS = {
    "pass": "activation, forward + backward",
    "recorded": "activation, forward alone, in training",
}
AXES = {
    "elements": "elements",
    "batch": "images in a batch",
    "pixels": "pixels of an image",
    "depth": "hidden activations",
    "processes": "processes (torchrun)",
}


def provenance(device: str, command: str) -> Row:
    """The columns that say what something was measured on, and by which code."""
    return {
        "device": torch.device(device).type,
        "machine": machine(device),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "timm_sugar": __version__,
        "commit": commit(),
        "command": command,
    }


def commit() -> str:
    """The commit that this code is of, marked where the code has changed since; nothing outside a checkout."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)

    name = git("rev-parse", "--short", "HEAD").stdout.strip()
    changed = git("diff", "--quiet", "HEAD", "--", "timm_sugar", "scripts").returncode  # results change meanwhile
    return f"{name}-dirty" if name and changed else name


def machine(device: str) -> str:
    """The name of the processor that a device is; of a CPU also the vector instructions that PyTorch uses there."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", info.read_text(), flags=re.MULTILINE) if info.exists() else None
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def summarize(
    setting: Mapping[str, object],
    metric: str,
    unit: str,
    samples: Mapping[str, Sequence[float]],
    surrogates: Mapping[str, str],
    environment: Row,
) -> list[Row]:
    """One row per variant of `samples`; `surrogates`: what describe() says of each. Ratios are of the same repeat."""
    own = OWN if OWN in samples else "gelu"
    rows = []
    for variant, values in samples.items():
        row = dict.fromkeys(COLUMNS, "") | {key: str(value) for key, value in setting.items()}
        row |= {"variant": variant, "surrogate": surrogates[variant], "metric": metric, "unit": unit}
        digits = ".5g" if unit == "s" else ".0f"
        row |= dict(zip(("q1", "median", "q3"), (f"{x:{digits}}" for x in quartiles(values)), strict=True))
        for name, reference in (("to_relu", "relu"), ("to_own", own)):
            if reference in samples and unit != COUNT:
                over = quartiles(ratios(values, samples[reference]))
                row |= {f"{name}_q1": f"{over.q1:.4f}", name: f"{over.median:.4f}", f"{name}_q3": f"{over.q3:.4f}"}
        rows.append(row | {"repeats": str(len(values))} | environment)
    return rows


def record(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a file, in the place of those of the same setting, variant, metric and machine."""
    merged = {tuple(row[key] for key in KEY): row for row in [*read_rows(path), *rows]}
    write_rows(path, merged.values(), COLUMNS)


def of_default(rows: Iterable[Row]) -> list[Row]:
    """The rows that tables and pictures show: those whose surrogate is the default one, or that have none."""
    return [row for row in rows if not row["surrogate"] or row["surrogate"].startswith(describe("sugar", {}))]


def cell(row: Row | None, name: str = "to_relu") -> str:
    """A ratio as it stands in a table: the median, and the quartiles where they differ from it."""
    if not row or not row[name]:
        return ""
    median, q1, q3 = (f"{float(row[key]):.2f}" for key in (name, f"{name}_q1", f"{name}_q3"))
    return median if q1 == q3 else f"{median} ({q1}–{q3})"


def _groups(rows: Iterable[Row], keys: Sequence[str]) -> dict[tuple[str, ...], list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def activation_table(rows: list[Row], what: str, sizes: Sequence[int] = (12, 16, 20, 24)) -> str:
    """Time of one activation for 2**k elements against ReLU; `what`: of which pass."""
    rows = [row for row in rows if row["size"] in {str(2**k) for k in sizes}]
    there = {row["variant"] for row in rows} - {"relu"}
    variants = [name for name in TITLES if name in there]
    body = []
    for (mode, dtype, size), group in _groups(rows, ("mode", "dtype", "size")).items():
        cells = {row["variant"]: cell(row) for row in group}
        setting = f"{mode}, {dtype}, 2^{int(size).bit_length() - 1}"
        body.append([setting, *(cells.get(variant, "") for variant in variants)])
    return markdown_table([what, *(TITLES[name] for name in variants)], body)


def model_table(rows: list[Row]) -> str:
    """Time and memory of networks against the same network with ReLU and with its own activations."""
    there = {row["variant"] for row in rows}
    variants = [name for name in TITLES if name in there and name != "relu"]
    head = ["network", "what", "its own / ReLU"]
    head += [f"{TITLES[name]} / {other}" for name in variants for other in ("ReLU", "its own")]
    keys = ("subject", "batch_size", "img_size", "mode", "dtype", "metric")
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    groups = _groups((row for row in rows if row["metric"] in METRICS), keys)
    body = []
    for key in sorted(groups, key=lambda key: subjects.index(key[0])):
        subject, batch, pixels, mode, dtype, metric = key
        by = {row["variant"]: row for row in groups[key]}
        cells = [cell(by.get(name), ratio) for name in variants for ratio in ("to_relu", "to_own")]
        what = f"{subject}, {batch} images of {pixels} px"
        body.append([what, f"{METRICS[metric]}, {mode}, {dtype}", cell(by.get(OWN)), *cells])
    return markdown_table(head, body)


def growth_table(rows: list[Row]) -> str:
    """How time grows with size: the slope on logarithmic axes, and SUGAR's ratio to ReLU at either end."""
    body = []
    keys = ("axis", "network", "mode", "dtype", "threads")
    lines_of = _groups((row | {"network": "" if row["axis"] == "depth" else row["subject"]} for row in rows), keys)
    for (axis, network, mode, dtype, threads), group in lines_of.items():
        lines = {}
        for name in ("relu", "sugar"):
            lines[name] = sorted((row for row in group if row["variant"] == name), key=lambda row: int(row["size"]))
        points = {name: [(float(row["size"]), float(row["median"])) for row in line] for name, line in lines.items()}
        if min(map(len, points.values())) < 2:
            continue
        sizes = [row["size"] for row in lines["sugar"]]
        slopes = [f"{slope(*zip(*points[name], strict=True)):.2f}" for name in points]
        ends = [cell(lines["sugar"][i]) for i in (0, -1)]
        subject = network or ", ".join(dict.fromkeys(row["subject"] for row in lines["sugar"]))
        what = AXES[axis] + (f", {threads} thread each" if axis == "processes" else "")
        body.append([f"{what}; {subject}, {mode}, {dtype}", f"{sizes[0]} to {sizes[-1]}", *slopes, *ends])
    head = ["time against", "from, to", "slope, ReLU", "slope, SUGAR", "SUGAR / ReLU at the first", "at the last"]
    return markdown_table(head, body)


def deploy_table(results: Path, most: int | None = None) -> str:
    """Latency with a network's own activations over that with ReLU: one image, one thread; `most`: networks."""
    rows = [
        row for row in read_rows(results / "benchmark_deploy.csv") if (row["batch_size"], row["threads"]) == ("1", "1")
    ]
    if not rows:
        return "Not measured yet."
    own = [row | {"ratio": cell(row)} for row in rows if row["variant"] == OWN]
    columns = list(dict.fromkeys((row["mode"], row["dtype"]) for row in own))
    body = []
    groups = _groups(own, ("subject", "surrogate", "img_size"))
    for (subject, activations, pixels), group in list(groups.items())[:most]:
        cells = {(row["mode"], row["dtype"]): row["ratio"] for row in group}
        body.append([f"{subject}, {pixels} px", activations, *(cells.get(column, "") for column in columns)])
    head = ["network", "its own activation", *(f"{mode}, {dtype}" for mode, dtype in columns)]
    where = f"{rows[0]['machine']}, torch {rows[0]['torch']}"
    return f"{markdown_table(head, body)}\n\n{where}; own activation / ReLU, median (quartiles)."


def tables(results: Path) -> str:
    """All tables in Markdown, for each machine that there are rows of in `results`."""
    names = ("activation", "backward", "model", "memory", "inference", "growth")
    rows = [row | {"file": name} for name in names for row in of_default(read_rows(results / f"benchmark_{name}.csv"))]
    parts = []
    for (device, processor, cores), found in _groups(rows, ("device", "machine", "cores")).items():
        threads, version = found[0]["threads"], found[0]["torch"]
        where = f"{device}, {threads} of {cores} cores" if device == "cpu" else device
        parts.append(f"{processor} ({where}), torch {version}; time or bytes as ratios, median (quartiles):")
        alike = [row for row in found if row["threads"] == threads]
        activations = [row for row in alike if row["file"] == "activation"]
        for metric, title in ACTIVATIONS.items():
            if passes := [row for row in activations if row["metric"] == metric]:
                parts.append(activation_table(passes, title))
        if loops := [row for row in found if row["file"] == "backward"]:  # of a CPU
            parts.append(activation_table(loops, "the loop of the backward pass alone, one thread"))
        parts.append(model_table([row for row in alike if row["file"] in names[2:5]]))
        whole = [row for row in activations if row["metric"] == "pass"]
        parts.append(growth_table([*whole, *(row for row in found if row["file"] == "growth")]))
    return "\n\n".join(parts) if parts else "Not measured yet."

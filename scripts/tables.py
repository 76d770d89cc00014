#!/usr/bin/env python3
"""Keep results/recipes.csv, and the tables in README.md, up to date.

    python scripts/tables.py output/train/RUN ...   # add runs of recipes to results/recipes.csv, then write the table
    python scripts/tables.py                        # write the tables only, those of costs and experiments too
    python scripts/tables.py --selection RECIPE RUN ...   # runs that chose a recipe's settings: results/selection.csv

A run belongs to the recipe that its folder is named after. Its row has the last epoch's numbers on the validation
split, how many epochs it ran of those that the recipe asks for, and what it ran on. A newer run replaces an older one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lab.bench import cost
from lab.cli import Parser, UserError, as_options, choose_device, explained
from lab.experiments import evidence
from lab.files import environment, markdown_table, read_rows, write_atomically, write_rows
from lab.release.card import CONFIG, SURROGATES, TWIN, read_results
from lab.training.options import build_parser
from lab.training.runs import read_summary

from timm_sugar.models._weights import MODEL_CARDS, WEIGHTS

ROOT = Path(__file__).resolve().parents[1]
RECIPES, RESULTS, README = ROOT / "scripts" / "recipes", ROOT / "results" / "recipes.csv", ROOT / "README.md"
SELECTION = ROOT / "results" / "selection.csv"  # HOLDOUT: what scripts/holdout.py made of the training split
COLUMNS = (
    *("recipe", "epochs", "recipe_epochs", "seed", "top1", "top5", "dead_units", "sparsity"),
    *("device", "torch", "timm", "timm_sugar", "command"),
)
DATA = {"cifar10": "CIFAR-10", "tin200": "Tiny-ImageNet-200", "in1k": "ImageNet-1k", "finetune": "your own"}
OF_THE_MACHINE = ("data_dir", "output", "experiment", "device", "pretrained_path")
MEASURED = ("top-1 (%)", "dead units (%)", "zeros (%)")
HEAD = ("recipe in `scripts/recipes/`", "model, surrogate", "data", "epochs run here", *MEASURED)
MODELS_HEAD = ("weights", "data", MEASURED[0], "plain ReLU twin, top-1 (%)", *MEASURED[1:], "MB")


def load_recipe(name: str) -> dict[str, Any]:
    """The settings of a recipe. Raises UserError if there is none of that name."""
    with explained(f"no recipe is named {name}"):
        return yaml.safe_load((RECIPES / f"{name}.yaml").read_text())


def summarize(folder: Path, name: str, data: str = "DATA") -> dict[str, Any]:
    """One row of results on a run of the recipe of that name. Raises UserError for a folder that is no finished run."""
    recipe = load_recipe(name)
    with explained(f"{folder} is not a training run"):
        args = yaml.safe_load((folder / "args.yaml").read_text())
    rows = read_summary(folder, args["epochs"])
    if len(rows) < args["epochs"]:
        raise UserError(f"{folder}: {len(rows)} of {args['epochs']} epochs are done; finish it with train.py --resume")
    asked = vars(build_parser().parse_args([])) | recipe
    changed = [key for key in args if key not in ("epochs", *OF_THE_MACHINE) and args[key] != asked[key]]
    kept = " ".join(word for key in ("epochs", *changed) for word in as_options(key, args[key]))
    return {
        "recipe": name,
        "epochs": args["epochs"],
        "recipe_epochs": recipe["epochs"],
        "seed": args["seed"],
        **{key: f"{float(rows[-1][f'eval_{key}']):.2f}" for key in ("top1", "top5")},
        **{key: f"{float(rows[-1][f'eval_{key}']):.4f}" for key in ("dead_units", "sparsity")},
        **environment(choose_device(args["device"])),
        "command": f"python scripts/train.py --config scripts/recipes/{name}.yaml {kept} --data-dir {data}",
    }


def load_results(path: Path = RESULTS, key: str = "recipe") -> dict[str, dict[str, Any]]:
    """Rows of a file of results by one of their columns."""
    return {row[key]: dict(row) for row in read_rows(path)}


def write_results(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """All rows, in the order of their keys."""
    write_rows(path, (rows[key] for key in sorted(rows)), COLUMNS)


def table(results: dict[str, dict[str, Any]]) -> str:
    """The table of all recipes in Markdown; those without a run here say so."""
    body = []
    for path in sorted(RECIPES.glob("*.yaml"), key=lambda path: (list(DATA).index(path.stem.split("_")[-1]), path)):
        recipe, row = load_recipe(path.stem), results.get(path.stem)
        surrogate = SURROGATES[recipe.get("model_kwargs", {}).get("surrogate", "bsilu")]
        model = f"{recipe['model']}, {surrogate}" + (", pretrained" if recipe.get("pretrained") else "")
        data = DATA[path.stem.split("_")[-1]] + (f", {recipe['img_size']} px" if "img_size" in recipe else "")
        measured = ["not run here", "", "", ""]
        if row:
            shares = [f"{100 * float(row[key]):.2f}" for key in ("dead_units", "sparsity")]
            measured = [f"{row['epochs']} of {row['recipe_epochs']}", row["top1"], *shares]
        body.append([f"`{path.name}`", model, data, *measured])
    return markdown_table(HEAD, body)


def models_table(models: Path = MODEL_CARDS) -> str:
    """The table of the weights in model_cards/, in Markdown."""
    body = []
    for folder in sorted(path.parent for path in models.glob(f"*/{CONFIG}")):
        (own, *others), config = read_results(folder), json.loads((folder / CONFIG).read_text())
        twin = next((f"{float(row['top1']):.2f}" for row in others if row["weights"] == TWIN), "not run")
        data = f"{DATA[config['sugar']['dataset']]}, {config['pretrained_cfg']['input_size'][-1]} px"
        top1 = f"{float(own['top1']):.2f}"
        shares = [f"{100 * float(own[key]):.2f}" for key in ("dead_units", "sparsity")]
        size = f"{(folder / WEIGHTS).stat().st_size / 1e6:.1f}"
        link = f"[`{folder.name}`](model_cards/{folder.name}/README.md)"
        body.append([link, data, top1, twin, *shares, size])
    return markdown_table(MODELS_HEAD, body) if body else "None yet."


def with_tables(readme: str, results: dict[str, dict[str, Any]]) -> str:
    """README.md's text, what stands between each pair of marks replaced by its table."""
    tables = {"recipes": table(results), "models": models_table(), "benchmark": cost.tables(RESULTS.parent)}
    tables["evidence"] = evidence.overview(RESULTS.parent)
    for mark, text in tables.items():
        before, rest = readme.split(f"<!-- {mark} -->\n")
        readme = f"{before}<!-- {mark} -->\n{text}\n<!-- /{mark} -->{rest.partition(f'<!-- /{mark} -->')[2]}"
    return readme


def run(args: argparse.Namespace) -> None:
    """Read all runs before the first file is written."""
    if args.selection:
        chosen = [summarize(folder, args.selection, "HOLDOUT") for folder in args.runs]
        rows = load_results(SELECTION, "command") | {row["command"]: row for row in chosen}
        write_results(SELECTION, rows)
        return
    results = load_results() | {folder.name: summarize(folder, folder.name) for folder in args.runs}
    if args.runs:
        write_results(RESULTS, results)
    write_atomically(README, with_tables(README.read_text(), results))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 130 after Ctrl-C. A user's mistake exits with status 2 and one line on stderr, nothing written."""
    parser = Parser("tables.py", description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folder of a finished run of a recipe")
    parser.add_argument(
        "--selection", metavar="RECIPE", help="the runs were made on held-out images, to choose settings"
    )
    return parser.run(run, argv)


if __name__ == "__main__":
    sys.exit(main())

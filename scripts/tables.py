#!/usr/bin/env python3
"""Keep results/recipes.csv, and the tables in README.md and docs/, up to date.

    python scripts/tables.py output/train/RUN ...   # add runs of recipes to results/recipes.csv, then write the tables
    python scripts/tables.py                        # write the tables only
    python scripts/tables.py --selection RECIPE RUN ...   # runs that chose a recipe's settings: results/selection.csv

A run belongs to the recipe that its folder is named after. Its row has the last epoch's numbers on the validation
split, how many epochs it ran of those that the recipe asks for, and what it ran on. A newer run replaces an older one.

A page says where a table belongs by two marks, <!-- NAME --> and <!-- /NAME -->. NAME is recipes, models, evidence,
benchmark, costs, acceptance or replay. Each model card also gets a page of docs/, in docs/cards/, and each table of
experiments one in docs/results/.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from lab.bench import cost
from lab.cli import Parser, UserError, as_options, explained
from lab.experiments import evidence, outside
from lab.files import check_checkout, markdown_table, read_rows, write_atomically, write_rows
from lab.release.card import CONFIG, SURROGATES, TWIN, read_results
from lab.training.options import build_parser
from lab.training.runs import read_checkpoint, read_summary

from timm_sugar.models._weights import MODEL_CARDS, WEIGHTS

ROOT = Path(__file__).resolve().parents[1]
RECIPES, RESULTS, DOCS = ROOT / "scripts" / "recipes", ROOT / "results" / "recipes.csv", ROOT / "docs"
README, CARDS = ROOT / "README.md", DOCS / "cards"
SELECTION = ROOT / "results" / "selection.csv"  # HOLDOUT: what scripts/holdout.py made of the training split
COLUMNS = (
    *("recipe", "epochs", "recipe_epochs", "seed", "top1", "top5", "dead_units", "sparsity"),
    *("device", "torch", "timm", "timm_sugar", "command"),
)
DATA = {"cifar10": "CIFAR-10", "tin200": "Tiny-ImageNet-200", "in1k": "ImageNet-1k", "finetune": "your own"}
OF_THE_MACHINE = ("data_dir", "output", "experiment", "device", "pretrained_path")
# Settings that the table takes from the recipe, and what they are if they aren't there.
_SHOWN: dict[str, Any] = {"model": None, "model_kwargs": {}, "img_size": None, "pretrained": False}
MEASURED = ("top-1 (%)", "dead units (%)", "zeros (%)")
HEAD = ("recipe in `scripts/recipes/`", "model, surrogate", "data", "epochs run here", *MEASURED)
COSTS_HEAD = ("network, what", "SUGAR over ReLU", "SUGAR over the network's own activation")
# What the short table of costs shows, in float32: file, network, mode, metric.
COSTS = (
    ("model", "resnet18", "eager", "step"),
    ("model", "convnext_tiny", "eager", "step"),
    ("model", "resnet18", "compile", "step"),
    ("model", "resnet18", "eager", "kept"),
    ("inference", "resnet18", "eager", "forward"),
)
CARD_PAGE = """\
# {name}

<!-- Written by scripts/tables.py. -->
```{{include}} ../../model_cards/{name}/README.md
:start-after: "# Model card for {name}"
:relative-images:
```
"""
RESULT_PAGE = """\
{title}

<!-- Written by scripts/tables.py. -->
[results/{name}](../../results/{name}) has this table. The site shows it here.
"""
MODELS_HEAD = ("weights", "data", MEASURED[0], "ReLU twin, top-1 (%)", *MEASURED[1:], "MB")


def load_recipe(name: str) -> dict[str, Any]:
    """The settings of a recipe. Raises UserError if there is none of that name."""
    with explained(f"no recipe is named {name}"):
        return yaml.safe_load((RECIPES / f"{name}.yaml").read_text())


def recipe_row(folder: Path, name: str, data: str = "DATA") -> dict[str, Any]:
    """One row of results on a run of the recipe of that name. Raises UserError for a folder that is no such run."""
    recipe = load_recipe(name)
    with explained(f"{folder} is not a run of {name}"):
        args = yaml.safe_load((folder / "args.yaml").read_text())
        rows = read_summary(folder, int(args["epochs"]))
        if len(rows) < args["epochs"]:
            raise ValueError(f"{len(rows)} of {args['epochs']} epochs are done; finish it with train.py --resume")
        ran_on = vars(read_checkpoint(folder / "last.pth.tar", None)["args"]).get("environment")
        if not ran_on:
            raise ValueError("its checkpoint doesn't say what it ran on: an older version made it")
        for key, default in _SHOWN.items():
            if args.get(key, default) != recipe.get(key, default):
                raise ValueError(f"its {key} is {args.get(key, default)}, not {recipe.get(key, default)}")
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
            **ran_on,
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
        name = recipe.get("model_kwargs", {}).get("surrogate", "bsilu")
        surrogate = SURROGATES.get(name, name)
        model = f"{recipe['model']}, {surrogate}" + (", pretrained" if recipe.get("pretrained") else "")
        data = DATA[path.stem.split("_")[-1]] + (f", {recipe['img_size']} px" if "img_size" in recipe else "")
        measured = ["not run here", "", "", ""]
        if row:
            shares = [f"{100 * float(row[key]):.2f}" for key in ("dead_units", "sparsity")]
            measured = [f"{row['epochs']} of {row['recipe_epochs']}", row["top1"], *shares]
        body.append([f"`{path.name}`", model, data, *measured])
    return markdown_table(HEAD, body)


def models_table(models: Path = MODEL_CARDS, link: str = "model_cards/{}/README.md") -> str:
    """The table of the weights in model_cards/, in Markdown. `link`: where a card is, with {} for the model's name."""
    body = []
    for folder in model_folders(models):
        (own, *others), config = read_results(folder), json.loads((folder / CONFIG).read_text())
        twin = next((f"{float(row['top1']):.2f}" for row in others if row["weights"] == TWIN), "not run")
        dataset = config["sugar"]["dataset"]
        data = f"{DATA.get(dataset, dataset)}, {config['pretrained_cfg']['input_size'][-1]} px"
        top1 = f"{float(own['top1']):.2f}"
        shares = [f"{100 * float(own[key]):.2f}" for key in ("dead_units", "sparsity")]
        size = f"{(folder / WEIGHTS).stat().st_size / 1e6:.1f}"
        body.append([f"[`{folder.name}`]({link.format(folder.name)})", data, top1, twin, *shares, size])
    return markdown_table(MODELS_HEAD, body) if body else "None yet."


def model_folders(models: Path = MODEL_CARDS) -> list[Path]:
    """The folders of published models, by name."""
    return sorted(path.parent for path in models.glob(f"*/{CONFIG}"))


def costs_table(results: Path) -> str:
    """The few rows of cost that README shows, of the first machine that was measured, in Markdown."""
    body, where, versions = [], "", ""
    for file, subject, mode, metric in COSTS:
        key = {"subject": subject, "mode": mode, "metric": metric, "variant": "sugar", "dtype": "float32"}
        rows = cost.of_default(read_rows(results / f"benchmark_{file}.csv"))
        row = next((row for row in rows if key.items() <= row.items()), None)
        if row:
            what = f"{subject}, {row['batch_size']} images of {row['img_size']} px: {cost.METRICS[metric]}, {mode}"
            body.append([what, cost.cell(row), cost.cell(row, "to_own")])
            where = f"{row['machine']} ({row['device']}, {row['threads']} cores), float32"
            versions = f"torch {row['torch']}, timm_sugar {row['timm_sugar']}"
    if not body:
        return "Not measured yet."
    return f"{markdown_table(COSTS_HEAD, body)}\n\n{where}; {versions}; ratios, median (quartiles)."


def tables(results: dict[str, dict[str, Any]], page: Path) -> dict[str, Callable[[], str]]:
    """What makes each table, by the name in its marks, for a page whose links start from its folder."""
    link = "model_cards/{}/README.md" if page == README else "cards/{}.md"
    return {
        "recipes": lambda: table(results),
        "models": lambda: models_table(link=link),
        "benchmark": lambda: cost.tables(RESULTS.parent),
        "deploy": lambda: cost.deploy_table(RESULTS.parent, 5 if page == README else None),
        "costs": lambda: costs_table(RESULTS.parent),
        "evidence": lambda: evidence.overview(RESULTS.parent),
        "acceptance": lambda: outside.acceptance(RESULTS.parent),
        "replay": lambda: outside.replay(RESULTS.parent),
    }


def with_tables(page: Path, results: dict[str, dict[str, Any]]) -> str:
    """A page's text, what stands between each pair of marks replaced by its table. Raises UserError for bad marks."""
    makers = tables(results, page)

    def filled(match: re.Match[str]) -> str:
        if match[1] not in makers:
            raise UserError(f"{page}: no table is named {match[1]} (there are {', '.join(makers)})")
        return f"<!-- {match[1]} -->\n{makers[match[1]]()}\n<!-- /{match[1]} -->"

    text = re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", filled, page.read_text(), flags=re.DOTALL)
    if lone := re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", "", text, flags=re.DOTALL).count("<!-- /"):
        raise UserError(f"{page}: {lone} tables have no opening mark")
    return text


def pages() -> list[Path]:
    """README.md and the pages of docs/, without what a kill left of one."""
    return [README, *sorted(page for page in DOCS.glob("*.md") if not page.name.startswith("tmp-"))]


def card_pages() -> dict[Path, str]:
    """The page of each model card in docs/, which includes the card."""
    return {CARDS / f"{folder.name}.md": CARD_PAGE.format(name=folder.name) for folder in model_folders()}


def result_pages() -> dict[Path, str]:
    """The page of each table of experiments in docs/; docs/conf.py puts the table there."""
    texts = evidence.pages(RESULTS.parent)
    return {
        DOCS / "results" / name: RESULT_PAGE.format(title=text.split("\n", 1)[0], name=name)
        for name, text in texts.items()
        if name != "README.md"
    }


def run(args: argparse.Namespace) -> None:
    """Read all runs before the first file is written."""
    check_checkout()
    if args.selection:
        chosen = [recipe_row(folder, args.selection, "HOLDOUT") for folder in args.runs]
        rows = load_results(SELECTION, "command") | {row["command"]: row for row in chosen}
        write_results(SELECTION, rows)
        return
    results = load_results() | {folder.name: recipe_row(folder, folder.name) for folder in args.runs}
    texts = {page: with_tables(page, results) for page in pages()} | card_pages() | result_pages()
    if args.runs:
        write_results(RESULTS, results)
    for page, text in texts.items():
        page.parent.mkdir(exist_ok=True)
        write_atomically(page, text)
    for page in {*CARDS.glob("*.md"), *(DOCS / "results").glob("*.md")} - texts.keys():
        page.unlink()


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

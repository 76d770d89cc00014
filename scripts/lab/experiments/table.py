"""A table of experiments: a YAML file that names a network, the activations to compare in it, and the settings.

    title: ResNet-18 on a fifth of CIFAR-10      # heads the table in results/README.md
    network: resnet18                            # any timm name; without one, variants have options alone
    baseline: relu                               # the variant that the others are compared with, seed by seed
    seeds: 5                                     # 0, 1, ... one run each
    options: {epochs: 5, batch_size: 128}        # of the script, for all variants
    variants:
      original: {}                               # the network as it is
      relu: {plain: relu}                        # the activation itself (networks.py)
      sugar-nelu: {sugar: nelu, alpha: 0.05}     # ReLU with the gradient of the surrogate
      small-steps: {plain: relu, options: {lr: 0.001}}

In options, `{seed}` stands for the seed, so that a run can start from what another one left, and `null` leaves out one
of the base.
Further keys: `note`, a sentence for the page; `script` (scripts/train.py); `subset`, the arguments of `make_subset`
(subset.py); and `base`, another table from which everything comes that this one doesn't say; `options` are merged.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from lab.cli import UserError, as_options, explained

TABLES = Path(__file__).resolve().parents[2] / "reproduce"
COLUMNS = (
    *("variant", "seed", "epochs", "top1", "top5", "train_loss", "dead_units", "sparsity"),
    *("device", "torch", "timm", "timm_sugar", "command"),
)
CURVES = ("variant", "seed", "epoch", "train_loss", "top1", "dead_units", "sparsity")


@dataclass(frozen=True)
class Table:
    """The experiments of one YAML file; the module's docstring says what the fields mean."""

    name: str
    title: str
    baseline: str
    variants: dict[str, dict[str, Any]]
    note: str = ""
    network: str | None = None
    seeds: int = 5
    script: str = "scripts/train.py"
    options: dict[str, Any] = field(default_factory=dict)
    subset: dict[str, int] | None = None

    def settings(self, variant: str, seed: int) -> dict[str, Any]:
        """The options of one run, by their names in args.yaml."""
        own = dict(self.variants[variant])
        options = {**self.options, **own.pop("options", {}), "seed": seed}
        for key, value in list(options.items()):
            if isinstance(value, str):
                options[key] = value.replace("{seed}", str(seed))
            elif value is None:
                del options[key]
        suffix = next((key for key in ("plain", "sugar") if key in own), "")
        if suffix:
            own = {"activation" if suffix == "plain" else "surrogate": own.pop(suffix), **own}
        if self.network:
            options["model"] = f"{self.network}_{suffix}" if suffix else self.network
            options["device_modules"] = ["networks"]
        if own:
            options["model_kwargs"] = {**options.get("model_kwargs", {}), **own}
        return options

    def command(self, variant: str, seed: int) -> str:
        """The command that makes one run again; DATA stands for where the images are."""
        words = [word for key, value in self.settings(variant, seed).items() for word in as_options(key, value)]
        data = ["--data-dir", "DATA"] if self.network else []
        path = ["PYTHONPATH=scripts/reproduce"] if self.network else []
        return " ".join([*path, shlex.join(["python", self.script, *words, *data])])


def list_tables() -> list[str]:
    """Names of the tables in scripts/reproduce/."""
    return sorted(path.stem for path in TABLES.glob("*.yaml"))


def load_table(name: str) -> Table:
    """A table by its name in scripts/reproduce/ or by the path of its file.

    Raises UserError if there is none, or it is no table: unknown or missing keys, a baseline that isn't a variant.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else TABLES / f"{name}.yaml"
    if not path.exists():
        raise UserError(f"no table {name!r}: choose one of {', '.join(list_tables())}, or name a YAML file")
    values = _read(path)
    unknown = sorted(values.keys() - {part.name for part in fields(Table)})
    if unknown:
        raise UserError(f"{path}: unknown key {unknown[0]!r}")
    with explained(f"{path} is not a table"):
        table = Table(path.stem, **values)
        if table.baseline not in table.variants:
            raise ValueError(f"the baseline {table.baseline!r} is none of its variants")
    return table


def _read(path: Path) -> dict[str, Any]:
    """The keys of a YAML file, over those of its base."""
    with explained(f"can't read {path}"):
        try:
            values = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ValueError(error) from error
        if not isinstance(values, dict):
            raise ValueError("expected 'key: value' lines")
    if "base" not in values:
        return values
    base = _read(path.with_name(f"{values.pop('base')}.yaml"))
    return {**base, **values, "options": {**base.get("options", {}), **values.get("options", {})}}

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
      sugar-elu: {sugar: elu, seeds: 3}          # fewer seeds than the table

In options, `{seed}` stands for the seed, so that a run can start from what another one left, and `null` leaves out one
of the base.
Further keys: `note`, a sentence for the page; `script` (scripts/train.py); and `base`, another table from which
everything comes that this one doesn't say; `options` are merged. A table of scripts/convert.py has `checkpoint` among
its options, in the place of a network.

`subset: {per_class: 1000}` trains on a part of the training split (subset.py). With `per_seed: true` each seed draws a
part of its own; with `held_out: 200` the runs are validated on further training images. `of: 4500` holds out none of a
class's first 4,500: where a run starts from a network that trained on those, it is validated on images new to both.

A table that is to decide something says these before it runs:

    tune: {lr: [0.1, 0.2, 0.4], seeds: [100], held_out: 500, options: {epochs: 5}}
    primary: sugar-bsilu - relu                  # the contrast that decides
    margin: 0.5                                  # points of top-1 within which two variants count as equal
    contrasts: [sugar-bsilu - sugar-leaky-0.5]   # the others (default: every variant minus the baseline)

With `tune`, every variant first runs at every rate of the grid, validated on held-out training images (tuning.py); its
best rate is then used with new seeds.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lab.cli import UniqueKeys, UserError, as_options, explained

TABLES = Path(__file__).resolve().parents[2] / "reproduce"
BUDGET = ("lr", "epochs", "warmup_epochs", "batch_size")  # options that tuned variants must have in common


class Key(NamedTuple):
    """What a row of results is about: no two rows of a table have the same."""

    phase: str  # "tune" or "final"
    variant: str
    lr: str  # as `rate` writes it; empty if the script has no such option
    seed: int


@dataclass(frozen=True)
class Tune:
    """How the learning rate of each variant is chosen."""

    lr: list[float]
    seeds: list[int]
    held_out: int  # training images of each class to validate on
    options: dict[str, Any] = field(default_factory=dict)  # over those of the table

    def __post_init__(self) -> None:
        if len(list(map(rate, self.lr))) < 2 or sorted(set(self.lr)) != self.lr or self.lr[0] <= 0:
            raise ValueError(f"the grid of tune must be two or more rates above 0, lowest first, not {self.lr}")
        if not self.seeds or self.held_out < 1:
            raise ValueError("tune needs one or more seeds, and held_out of at least 1")


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
    subset: dict[str, Any] | None = None
    tune: Tune | None = None
    primary: str | None = None
    margin: float | None = None
    contrasts: list[str] = field(default_factory=list)
    folder: Path = TABLES  # where the file is

    def __post_init__(self) -> None:
        if odd := next((name for name in self.variants if Path(name).name != name), None):
            raise ValueError(f"variant {odd!r} can't be the name of a folder")
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, not {self.seeds}")
        if unknown := sorted((self.subset or {}).keys() - {"per_class", "of", "per_seed", "held_out", "seed"}):
            raise ValueError(f"unknown key {unknown[0]!r} of subset")
        if self.subset and "of" in self.subset and self.subset["of"] < self.subset.get("per_class", math.inf):
            raise ValueError("`of` of a subset needs per_class, and must be at least as large")
        if self.baseline not in self.variants:
            raise ValueError(f"the baseline {self.baseline!r} is none of its variants")
        if self.margin is not None and not self.margin > 0:
            raise ValueError(f"the margin must be above 0, not {self.margin}")
        for one, other in map(pair_of, self.compared()):
            if one not in self.variants or other not in self.variants:
                raise ValueError(f"the contrast '{one} - {other}' is not one of two of its variants")
        if self.tune:
            self._check_tuned(self.tune)

    def _check_tuned(self, tune: Tune) -> None:
        """The same budget for all, and seeds that had no part in the choice."""
        if again := sorted(set(tune.seeds) & set(range(self.seeds))):
            raise ValueError(f"seed {again[0]} is used for tuning, so it can't be one of the final seeds")
        for name, own in self.variants.items():
            if other := next((key for key in BUDGET if key in own.get("options", {})), None):
                raise ValueError(f"variant {name!r} has its own {other}: with tune it is the same for all variants")

    @property
    def takes_images(self) -> bool:
        """Whether its script trains on images: a network's, or one that a checkpoint holds."""
        return bool(self.network or self.options.get("checkpoint"))

    @property
    def chance(self) -> float | None:
        """Top-1 of guessing, in percent; None if the number of classes is not known."""
        classes = self.options.get("num_classes")
        return 100 / classes if classes else None

    def compared(self) -> list[str]:
        """The contrasts of the table, the primary one first."""
        default = [f"{name} - {self.baseline}" for name in self.variants if name != self.baseline]
        first = [self.primary] if self.primary else []
        return list(dict.fromkeys([*first, *(self.contrasts or default)]))

    def final_keys(self, rates: dict[str, str] | None = None) -> list[Key]:
        """All final runs, seed by seed; `rates` are those chosen in tuning, and a variant without one has no run."""
        keys = []
        for seed in range(self.seeds):
            for name, own in self.variants.items():
                if seed < own.get("seeds", self.seeds) and (rates is None or name in rates):
                    lr = rates[name] if rates else rate(self.settings(Key("final", name, "", seed)).get("lr"))
                    keys.append(Key("final", name, lr, seed))
        return keys

    def settings(self, key: Key) -> dict[str, Any]:
        """The options of one run, by their names in args.yaml."""
        own = dict(self.variants[key.variant])
        own.pop("seeds", None)
        options = {**self.options, **own.pop("options", {}), "seed": key.seed}
        if self.tune:
            options |= self.tune.options if key.phase == "tune" else {}
            options |= {"lr": float(key.lr)} if key.lr else {}
        for name, value in list(options.items()):
            if isinstance(value, str):
                options[name] = value.replace("{seed}", str(key.seed))
            elif value is None:
                del options[name]
        suffix = next((kind for kind in ("plain", "sugar") if kind in own), "")
        if suffix:
            own = {"activation" if suffix == "plain" else "surrogate": own.pop(suffix), **own}
        if self.network:
            options["model"] = f"{self.network}_{suffix}" if suffix else self.network
            options["device_modules"] = ["networks"]
        if own:
            options["model_kwargs"] = {**options.get("model_kwargs", {}), **own}
        return options

    def command(self, key: Key) -> str:
        """The command that makes one run again; DATA stands for where the images are."""
        words = [word for name, value in self.settings(key).items() for word in as_options(name, value)]
        data = ["--data-dir", "DATA"] if self.takes_images else []
        path = ["PYTHONPATH=scripts/reproduce"] if self.network else []
        return " ".join([*path, shlex.join(["python", self.script, *words, *data])])

    def images(self, key: Key) -> dict[str, int]:
        """The arguments of `make_subset` for one run; none if it uses the data set as it is."""
        chosen = dict(self.subset or {})
        if chosen.pop("per_seed", False):
            chosen["seed"] = key.seed
        if self.tune and key.phase == "tune":
            chosen["held_out"] = self.tune.held_out
        return {name: chosen[name] for name in ("per_class", "of", "held_out", "seed") if name in chosen}


def rate(lr: float | None) -> str:
    """A learning rate as it stands in results and in names of folders. Raises ValueError for what is no number."""
    if isinstance(lr, str):
        raise ValueError(f"the rate {lr!r} is text: in YAML a power of ten needs a point, as in 1.0e-3")
    return "" if lr is None else f"{lr:.6g}"


def pair_of(contrast: str) -> tuple[str, str]:
    """The two variants of a contrast "one - other". Raises ValueError for anything else."""
    one, minus, other = contrast.partition(" - ")
    if not minus:
        raise ValueError(f"a contrast is written 'one - other', not {contrast!r}")
    return one.strip(), other.strip()


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
    unknown = sorted(values.keys() - {part.name for part in fields(Table)} | values.keys() & {"name", "folder"})
    if unknown:
        raise UserError(f"{path}: unknown key {unknown[0]!r}")
    with explained(f"{path} is not a table", AttributeError):
        if values.get("tune"):
            values["tune"] = Tune(**values["tune"])
        table = Table(path.stem, **values, folder=path.parent)
        for key in table.final_keys():  # raises for settings that are none
            epochs = table.settings(key).get("epochs")
            if not isinstance(epochs, int) or epochs < 1:
                raise ValueError(f"options has no number of epochs, but {epochs!r}")
        return table


def _read(path: Path) -> dict[str, Any]:
    """The keys of a YAML file, over those of its base."""
    with explained(f"can't read {path}"):
        try:
            values = yaml.load(path.read_text(), UniqueKeys)
        except yaml.YAMLError as error:
            raise ValueError(error) from error
        if not isinstance(values, dict):
            raise ValueError("expected 'key: value' lines")
        if empty := [key for key in ("options", "variants", "script") if key in values and values[key] is None]:
            raise ValueError(f"{empty[0]} has no value")
    if "base" not in values:
        return values
    with explained(f"{path}: base"):
        base = _read(path.with_name(f"{values.pop('base')}.yaml"))
    return {**base, **values, "options": {**base.get("options", {}), **values.get("options", {})}}

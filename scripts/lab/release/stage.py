"""From a training run to the folder of a published model: weights, config, how it was trained, what it measures.

A folder is exactly what its repository on the Hub holds; its name is the model's full name, `<architecture>.<tag>`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from timm.data import ImageNetInfo, resolve_data_config
from timm.models import clean_state_dict, create_model, resolve_model_input_args, save_for_hf
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lab.cli import UserError, explained
from lab.files import write_atomically, write_rows
from lab.release.card import (
    CARD,
    CONFIG,
    INT8,
    ODD,
    ORIGINAL,
    ORIGINAL_INT8,
    RECIPE,
    RESULTS,
    TWIN,
    card,
    read_results,
)
from lab.training.loading import find_file, load_weights
from lab.training.runs import check_model, read_checkpoint, read_summary
from lab.training.seal import digest
from timm_sugar.activation import SUGAR
from timm_sugar.models._weights import WEIGHTS
from timm_sugar.models.sugar import ALIASES, SUFFIX
from timm_sugar.surgery import other_than_relu
from timm_sugar.surrogate import SAME, built_in_parameters, get_surrogate

FROM_RUN = ("summary.csv", "train.log", "curves.png")
FILES = (CARD, CONFIG, WEIGHTS, RECIPE, RESULTS, *FROM_RUN)
HALF_COSTS_AT_MOST = 0.05  # points of top-1
_OF_THE_MACHINE = ("data_dir", "output", "experiment", "device")
_STARTED_FROM = ("class_map", "initial_checkpoint", "pretrained_path", "checkpoint")  # files
_COLUMNS = (
    *("weights", "top1", "top5", "loss", "dead_units", "sparsity", "images", "params", "macs", "ms", "to_own"),
    *("device", "torch", "timm", "timm_sugar", "command"),
)


class TrainedRun:
    """A finished training run: its settings, and the weights after its last epoch (their average, if it kept one).

    The last epoch, not the best one, which would be chosen by the images on which the model is then reported.
    `published` are the settings with the image size, in pixels, at which the model is evaluated and published.
    """

    def __init__(self, folder: Path, img_size: int | None = None) -> None:
        """Raises UserError if the folder holds no run, or one that isn't finished."""
        self.folder = folder
        with explained(f"{folder} is not a training run"):
            self.recipe: dict[str, Any] = yaml.safe_load((folder / "args.yaml").read_text())
            asked = int(self.recipe["epochs"])
        for name in FROM_RUN:
            if not (folder / name).exists():
                raise UserError(f"{folder} has no {name}: was it made by scripts/train.py?")
        read_summary(folder, asked)  # which is copied
        state = read_checkpoint(folder / "last.pth.tar", None)
        with explained(f"{folder / 'last.pth.tar'} doesn't say how it was trained"):
            known: dict[str, Any] = vars(state["args"])
            epochs, done = max(asked, known.get("all_epochs", asked)), state["epoch"] + 1
        if done < epochs:
            script = "convert.py" if "original" in known else "train.py"
            raise UserError(f"{folder}: {done} of {epochs} epochs are done; finish it with scripts/{script} --resume")
        self.recipe["num_classes"] = known["num_classes"]  # those of the data, if none were asked for
        # A schedule has left other values than the run began with.
        self.settings = {**self.recipe, "model_kwargs": known["model_kwargs"]}
        if "original" in known:  # a conversion, whose model is the original's ReLU self
            self.settings["model"] = known["model"]
        self.changes: list[str] = list(known.get("changes", ()))  # of options, when it was resumed
        self.classes: list[str] | None = known.get("classes")  # that it was trained on, if its data named them
        self.teacher: str | None = known.get("teacher")  # of a conversion, the digest of the original's weights
        check_model(state, folder / "last.pth.tar", self.settings["model"])
        self.published = self.settings | ({"img_size": img_size, "input_size": None} if img_size else {})
        weights = clean_state_dict(state.get("state_dict_ema") or state["state_dict"])
        # safetensors takes no channels_last
        self.weights: dict[str, Tensor] = {key: value.contiguous() for key, value in weights.items()}

    def build(self, name: str, arguments: dict[str, Any]) -> nn.Module:
        """A model of these settings with these weights, in eval mode."""
        options = {"num_classes": self.settings["num_classes"], "global_pool": self.settings["gp"], **arguments}
        model: Any = create_model(**resolve_model_input_args(name, self.published, **options)).eval()
        model.load_state_dict(self.weights)
        return model

    @property
    def model_args(self) -> dict[str, Any]:
        """The arguments of the `_sugar` model, surrogate and its parameters spelled out."""
        arguments = dict(self.settings["model_kwargs"])
        if arguments.get("surrogate") == SAME:  # a surrogate for each activation that was replaced
            return arguments
        surrogate = get_surrogate(arguments.pop("surrogate", "bsilu"))
        given = {key: arguments.pop(key) for key in surrogate.parameters if key in arguments}
        return arguments | {"surrogate": surrogate.name} | get_surrogate(surrogate, **given).parameters

    def deployed(self) -> nn.Module:
        """A stock timm model that computes the same, bit for bit; the `_sugar` model if there is none.

        Raises UserError if the settings are not those of a `_sugar` model, or the weights don't fit it.
        """
        name = self.settings["model"].partition(".")[0]
        if ":" in self.settings["model"]:
            raise UserError(
                f"{self.folder} trained {self.settings['model']}: train a {SUFFIX} model by its name, with the weights "
                "as --initial-checkpoint"
            )
        if not name.endswith(SUFFIX):
            raise UserError(f"{self.folder} trained {name}: only {SUFFIX} models are staged")
        with explained(f"the weights of {self.folder} don't fit {name}"):
            model: Any = self.build(name, self.model_args)
        if (self.published.get("in_chans") or (self.published.get("input_size") or [3])[0]) != 3:
            raise UserError(f"{self.folder} was trained on images of one channel: only networks of RGB are staged")
        image = torch.randn(2, *resolve_data_config(self.published, model=model)["input_size"])
        base = name.removesuffix(SUFFIX)
        sugar = {"surrogate"} | built_in_parameters()
        of_base = {key: value for key, value in self.settings["model_kwargs"].items() if key not in sugar}
        for arguments in (of_base, of_base | {"act_layer": "relu"}):
            with suppress(TypeError, RuntimeError), torch.inference_mode():  # it may take no act_layer
                stock: Any = self.build(ALIASES.get(base, base), arguments)
                if not other_than_relu(stock) and torch.equal(stock(image), model(image)):
                    return stock
        return model


def stage(
    run: TrainedRun,
    folder: Path,
    *,
    licence: str,
    labels: list[str],
    about: dict[str, Any],
    measure: Callable[[Path], dict[str, Any]],
) -> None:
    """Make a model's folder from a run; whole or not at all.

    `measure(folder)` evaluates a folder and returns a row of results: weights are stored as float16 if that costs at
    most HALF_COSTS_AT_MOST, else as float32. `about` has `dataset`, `org` and `notes` of the card, `labels` the names
    of the classes in order. Raises UserError for a run that can't be staged or a folder that exists.
    """
    if folder.exists():
        raise UserError(f"{folder} exists: remove it first, or choose another --tag")
    model = run.deployed()
    with explained(f"can't write {folder}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="tmp-") as temporary:
            partial = Path(temporary, folder.name)
            _save(model, run, partial, licence, labels, about)
            rows = [{"weights": "float32", **measure(partial)}]
            half = {key: value.half() if value.is_floating_point() else value for key, value in run.weights.items()}
            _write_weights(half, partial)
            row = {"weights": "float16", **measure(partial)}
            if rows[0]["top1"] - row["top1"] <= HALF_COSTS_AT_MOST and all(v.isfinite().all() for v in half.values()):
                rows.insert(0, row)
            else:
                _write_weights(run.weights, partial)
            rows[0].update(statistics(partial))
            for name in FROM_RUN:
                shutil.copyfile(run.folder / name, partial / name)
            (partial / RECIPE).write_text(yaml.safe_dump(_portable(run.recipe)))
            write_results(partial, rows)
            write_atomically(partial / CARD, card(partial))
            os.replace(partial, folder)


def _write_weights(weights: dict[str, Tensor], folder: Path) -> None:
    """Write weights with the permissions of other files; safetensors and timm write them for the owner alone."""
    (folder / WEIGHTS).unlink(missing_ok=True)
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(weights, metadata={"format": "pt"}))


def add_twin(folder: Path, run: TrainedRun, measure: Callable[[], dict[str, Any]]) -> None:
    """Add what the plain ReLU network measures, trained with the recipe and seed of the folder's weights, and its card.

    `measure()` evaluates that run and returns a row of results. Raises UserError, with nothing changed, if the run
    differs from the folder's in more than the gradient, or is no network of ReLU.
    """
    with explained(f"can't read {folder / RECIPE} and {CONFIG}", *ODD):
        recipe = {**yaml.safe_load((folder / RECIPE).read_text())}
        changes = json.loads((folder / CONFIG).read_text())["sugar"].get("changes", [])
    if run.changes != changes:
        raise UserError(
            f"{run.folder} was not trained with the same options throughout as {folder.name}: "
            f"{'; '.join(run.changes or changes)}"
        )
    other = _portable(run.recipe)
    for key in sorted(recipe.keys() - {"model", "model_kwargs", "device_modules", "surrogate"}):
        if recipe[key] != other.get(key):
            raise UserError(f"{run.folder} was trained with another {key} than {folder.name}")
    _check_is_twin(folder.name.partition(".")[0], run)
    rows: list[dict[str, Any]] = [row for row in read_results(folder) if row["weights"] != TWIN]
    measured = measure()
    _check_count(folder, rows, measured["images"])
    write_results(folder, [*rows, {"weights": TWIN, **measured}])
    write_atomically(folder / CARD, card(folder))


def _check_count(folder: Path, rows: list[dict[str, Any]], images: int) -> None:
    """Raises UserError for another count of images than the rows of a folder are of."""
    if str(images) != rows[0]["images"]:
        raise UserError(f"this was scored on {images} images, {folder.name} on {rows[0]['images']}: give --data-dir")


def _check_is_twin(name: str, run: TrainedRun) -> None:
    """Raises UserError for a run that did not train the base of a `_sugar` model with ReLU and its gradient."""
    base = name.removesuffix(SUFFIX)
    trained = run.settings["model"].partition(".")[0]
    if trained not in (name, base, ALIASES.get(base)):
        raise UserError(f"{run.folder} trained {trained}, not {base}")
    model = run.build(trained, run.settings["model_kwargs"])
    sugar = [module for module in model.modules() if isinstance(module, SUGAR)]
    kinds = other_than_relu(model) - ({"SUGAR"} if sugar else set())
    others = kinds | {repr(module) for module in sugar} - {repr(SUGAR(surrogate="relu"))}
    if others:
        raise UserError(f"{run.folder} is no network of ReLU and its gradient: there is {', '.join(sorted(others))}")


def check_is_of(folder: Path, run: TrainedRun) -> None:
    """Raises UserError for a run whose weights are not those of the model's folder."""
    with explained(f"can't read {folder / WEIGHTS}"):
        weights = safetensors.torch.load_file(folder / WEIGHTS)
    same = weights.keys() == run.weights.keys() and all(
        torch.equal(value, run.weights[key].to(value.dtype)) for key, value in weights.items()
    )
    if not same:
        raise UserError(f"{folder.name} does not have the weights of {run.folder}")


def check_original(run: TrainedRun, path: Path) -> None:
    """Raises UserError for a checkpoint that is not, or no longer, what a run converted."""
    found = clean_state_dict(load_weights(find_file(path), ema=True)[0])
    weights = {key: found[key].to(value.dtype) for key, value in run.weights.items() if key in found}
    if digest({"state_dict": weights}, {}) != run.teacher:
        raise UserError(f"{path} has other weights than those that {run.folder} converted: convert it anew")


def add_int8(folder: Path, measured: dict[str, Any], row: dict[str, Any]) -> None:
    """Add what `scripts/export.py --format onnx-int8 --original` measured, and write the card again.

    Args:
        folder: of a converted network.
        measured: the content of its `--results-file`.
        row: versions and command, which the three new rows have in common.

    Raises UserError, with nothing changed, if other images were scored than for the folder's rows.
    """
    own, latency = measured["original"], measured["latency"]
    images, ratio = own["images"], latency["own_to_relu"]
    new: list[dict[str, Any]] = [
        {"weights": ORIGINAL, "top1": own["pytorch"], "images": images},
        {"weights": INT8, "top1": measured["top1"]["file"], "images": images, "ms": latency["relu_ms"]},
        {"weights": ORIGINAL_INT8, "top1": own["file"], "images": images, "ms": latency["own_ms"], "to_own": ratio},
    ]
    names = {found["weights"] for found in new}
    kept: list[dict[str, Any]] = [found for found in read_results(folder) if found["weights"] not in names]
    _check_count(folder, kept, images)
    write_results(folder, [*kept, *({**row, **found} for found in new)])
    write_atomically(folder / CARD, card(folder))


def _portable(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without what holds for one machine; of a path outside the working directory only the name."""
    kept = {key: value for key, value in settings.items() if key not in _OF_THE_MACHINE}
    kept |= {key: _name_outside(kept[key]) for key in _STARTED_FROM if kept.get(key)}
    kind, slash, name = (kept.get("dataset") or "").partition("/")  # hfds//PATH is a folder
    return kept | {"dataset": kind + slash + _name_outside(name)} if slash else kept


def _name_outside(path: str) -> str:
    """A path within the working directory; of another one the last part."""
    parts = Path(path)
    return parts.name if parts.is_absolute() or ".." in parts.parts else path


def _save(
    model: nn.Module, run: TrainedRun, folder: Path, licence: str, labels: list[str], about: dict[str, Any]
) -> None:
    """Weights and config.json, in which what stock timm has no word for stands below the key `sugar`."""
    origin = {"tag": folder.name.partition(".")[2], "license": licence, "paper_ids": "arXiv:2505.22074"}
    nothing = dict.fromkeys(("description", "origin_url", "paper_name", "notes"))  # of the base's own weights
    save_for_hf(
        model,
        str(folder),
        model_config={
            "label_names": labels,
            "label_descriptions": describe_labels(labels),
            "pretrained_cfg": nothing | origin,
            "sugar": {"model_args": run.model_args, **about} | ({"changes": run.changes} if run.changes else {}),
        },
        data_config=resolve_data_config(run.published, model=model),
        safe_serialization=True,
    )
    config = json.loads((folder / CONFIG).read_text())
    config["model_args"].pop("num_classes", None)  # stands beside them; transformers would pass it twice
    write_atomically(folder / CONFIG, json.dumps(config, indent=2))


def describe_labels(labels: list[str]) -> dict[str, str] | None:
    """What WordNet ids (n01443537) stand for, by timm's lists of ImageNet; None if the labels are something else."""
    known = ImageNetInfo("imagenet-1k")
    if not set(labels) <= set(known.label_names()):
        return None
    return {label: known.label_name_to_description(label) for label in labels}


def statistics(folder: Path) -> dict[str, int]:
    """Parameters, and multiply-accumulate operations (of convolutions and matrix products) for one image."""
    model: Any = create_model(f"local-dir:{folder}", pretrained=True).eval()
    with FlopCounterMode(display=False) as flops, torch.inference_mode():
        model(torch.randn(1, *model.pretrained_cfg["input_size"]))
    return {"params": sum(p.numel() for p in model.parameters()), "macs": flops.get_total_flops() // 2}


def write_results(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Measurements as CSV, those of the folder's own weights first."""
    write_rows(folder / RESULTS, [{key: row.get(key, "") for key in _COLUMNS} for row in rows], _COLUMNS)

"""What a model's folder must be before it is published; a check raises UserError with the first reason against it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import timm
import torch
import yaml
from PIL import Image
from torch import Tensor

from lab.cli import Parser, UserError, as_options, explained
from lab.release.card import CARD, CONFIG, ODD, RESULTS, card, read_results
from lab.release.stage import FILES
from lab.training.groups import add_images
from lab.training.options import check_channels
from lab.training.runs import check_numbers, read_summary
from timm_sugar.models._weights import MODEL_CARDS, WEIGHTS, WEIGHTS_FILE, describe

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".tar")
_SECRETS = re.compile(
    r"(?<![A-Za-z0-9])("
    r"(hf|api_org|gh[pousr]|github_pat|npm|dckr_pat|[sr]k_live)_\w{20,}|(AKIA|ASIA)[0-9A-Z]{16}|AIza[\w-]{35}"
    r"|(glpat|xox[abeprs]|xapp|sk|pypi)-[\w-]{20,}|(hvs|ya29|SG)[.][\w.-]{20,}|eyJ[\w-]{10,}[.]eyJ[\w-]{10,}[.]"
    r"|(?i:token)[\"']?\s*[:=]\s*[\"']?[\w/+-]{32,}|(?i:bearer)\s+[\w.~+/-]{20,}"
    r"|(?i:api_?key|secret(_access)?_?key|password)[\"']?\s*[:=]\s*[\"']?[\w/+-]{8,}"
    r")|PRIVATE KEY-----|://[^/\s:@]+:[^/\s:@]+@"
)
_ELSEWHERE = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "custom_load")  # other weights, or code
_CODE = ("auto_map", "custom_pipelines", "trust_remote_code")  # of transformers
_END_OF_PNG = b"IEND\xaeB`\x82"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.int64)
CROP_MODES = ("center", "squash", "border")
LARGEST_IMAGE, MOST_CLASSES = 4096, 100_000  # pixels a side


def check(folder: Path) -> None:
    """Raise UserError for a folder that must not be published; scripts/publish.py push calls this before it uploads.

    Refused are: a missing or additional file, above all a pickle; a link; a text that holds a token; a picture that is
    none; weights that are not finite or not those of the registered model; a config that disagrees with the folder's
    name, its weights or the registered model, or names no licence; a card that isn't what the other files make; a model
    of model_cards/ whose tag says something else.
    """
    check_files(folder)
    with explained(f"{folder} can't be checked", *ODD):
        config = check_config(folder)
        check_model(folder, config, check_weights(folder))
        text = card(folder)
    for row in read_results(folder):
        check_result(folder, row)
    if (folder / CARD).read_text() != text:
        raise UserError(f"{folder / CARD} is out of date: run scripts/publish.py cards")
    if folder.resolve().parent == MODEL_CARDS:  # the project's own
        entry = json.loads(WEIGHTS_FILE.read_text()).get(folder.name)
        if entry != describe(config, folder / WEIGHTS):
            raise UserError(f"{WEIGHTS_FILE} disagrees with {folder}: run scripts/publish.py cards")


def check_files(folder: Path) -> None:
    """Check that a folder holds the files of a model and nothing else, each of them what its name says."""
    paths = sorted(folder.rglob("*"))
    if links := [path for path in (folder, *paths) if path.is_symlink()]:
        raise UserError(f"{links[0]} is a link: put a copy of the file there")
    there = [str(path.relative_to(folder)) for path in paths if not path.is_dir()]
    if pickles := [name for name in there if name.endswith(_PICKLES)]:
        raise UserError(f"{folder / pickles[0]} may hold pickled code: remove it")
    if unknown := sorted(set(there) - set(FILES)):
        raise UserError(f"{folder / unknown[0]} doesn't belong into a model's folder: remove it")
    if missing := [name for name in FILES if name not in there]:
        raise UserError(f"{folder} has no {missing[0]}: make the folder with scripts/publish.py stage")
    for name in there:
        texts = read_texts(folder / name)
        if not any(texts):
            raise UserError(f"{folder / name} is empty: make the folder with scripts/publish.py stage")
        if any(map(_SECRETS.search, texts)):
            raise UserError(f"{folder / name} holds what looks like a token: remove it, and revoke the token")
    read_summary(folder, 0)


def check_result(folder: Path, row: dict[str, str]) -> None:
    """Raises UserError for a measurement that can't be: percentages and shares have their range."""
    for key, most in {"top1": 100, "top5": 100, "dead_units": 1, "sparsity": 1}.items():
        with explained(f"{folder / RESULTS}, {key}", *ODD):
            if row[key] and not 0 <= float(row[key]) <= most:
                raise ValueError(f"{row[key]} is not from 0 to {most}")


def read_texts(path: Path) -> list[str]:
    """What a file says, as it stands and without escapes: a picture in its comments, weights in their header.

    Raises UserError for a file that isn't what its name says.
    """
    if path.suffix == ".png":
        with explained(f"{path} is not a picture", Image.DecompressionBombError):
            with Image.open(path, formats=["PNG"]) as picture:
                picture.load()
                said = [f"{key} {value}" for key, value in picture.info.items()]
            content = path.read_bytes()
            if not content.endswith(_END_OF_PNG):
                raise ValueError("something follows it")
        return [*said, *(chunk.decode("ascii", "replace") for chunk in chunks_of(content))]
    if path.suffix == ".safetensors":
        with explained(f"{path} is not a whole safetensors file"), safetensors.safe_open(path, "pt") as file:
            return [f"{key} {value}" for key, value in (file.metadata() or {}).items()] + list(file.keys())
    with explained(f"can't read {path} as text"):
        text = path.read_text()
        if "\0" in text:
            raise ValueError("it has zero bytes")
    texts = [text]
    with suppress(ValueError, RecursionError, yaml.YAMLError):  # which other checks explain
        if path.suffix == ".json":
            texts.append(json.dumps(json.loads(text), ensure_ascii=False))
        elif path.suffix == ".yaml":
            texts.append(json.dumps(yaml.safe_load(text), ensure_ascii=False, default=str))
    return texts


def chunks_of(png: bytes) -> Iterator[bytes]:
    """What is in each chunk of a picture, also of those that Pillow says nothing of."""
    start = 8  # after the signature; each chunk has its length, its type, what is in it, and a checksum
    while start < len(png):
        end = start + 8 + int.from_bytes(png[start : start + 4], "big")
        yield png[start + 8 : end]
        start = end + 4


def check_config(folder: Path) -> dict[str, Any]:
    """Return a folder's config after a look at what it says of itself."""
    path = folder / CONFIG
    with explained(f"{path} is not the config of a model"):
        config: dict[str, Any] = json.loads(path.read_text())
        cfg, labels = config["pretrained_cfg"], config["label_names"]
        if not isinstance(config["sugar"]["model_args"], dict) or not isinstance(cfg, dict):
            raise ValueError("model_args and pretrained_cfg must be objects")
        if not isinstance(labels, list) or not isinstance(config["architecture"], str):
            raise ValueError("label_names must be a list and architecture a name")
    for arguments in (config["sugar"]["model_args"], config.get("model_args") or {}):
        if taken := sorted(arguments.keys() & signature(timm.create_model).parameters.keys()):
            raise UserError(f"{path}: model_args.{taken[0]} is no argument of a model: remove it")
    if code := [key for key in _CODE if config.get(key)]:
        raise UserError(f"{path}: {code[0]} names code that a user would run: remove it")
    if elsewhere := [key for key in _ELSEWHERE if cfg.get(key) not in (None, "", False)]:
        raise UserError(f"{path}: pretrained_cfg.{elsewhere[0]} names weights outside of the folder: remove it")
    if not cfg.get("license"):
        raise UserError(f"{path} names no licence: add pretrained_cfg.license")
    classes = config.get("num_classes")
    for name in ("input_size", *({"test_input_size"} & cfg.keys())):
        size = cfg.get(name)
        if not isinstance(size, list) or len(size) != 3 or not all(_is_whole(side, LARGEST_IMAGE) for side in size):
            raise UserError(f"{path}: pretrained_cfg.{name} is {size!r:.60} and should be three numbers up to 4096")
    if not _is_whole(classes, MOST_CLASSES):
        raise UserError(f"{path}: num_classes is {classes!r:.60} and should be a number up to {MOST_CLASSES}")
    for what, said, found in (
        ("pretrained_cfg.tag", cfg.get("tag"), folder.name.partition(".")[2]),
        ("num_classes", classes, cfg.get("num_classes")),
        ("label_names", len(labels), classes),
        ("model_args.num_classes", config.get("model_args", {}).get("num_classes"), None),  # transformers gives it too
    ):
        if said != found:
            raise UserError(f"{path}: {what} is {said!r} and should be {'left out' if found is None else repr(found)}")
    if not all(isinstance(label, str) for label in labels) or len({*labels}) < len(labels):
        raise UserError(f"{path}: label_names must be different names")
    check_preprocessing(path, cfg)
    return config


class _Preprocessing(Parser):
    """The options that say how images are prepared, read from a config."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: pretrained_cfg: {message}")


def check_preprocessing(path: Path, cfg: dict[str, Any]) -> None:
    """Raises UserError for a config that prepares images as no option of training could say."""
    parser = _Preprocessing(str(path))
    add_images(parser.add_argument)
    for test in ("", "test_"):  # as in training, and where a model is evaluated otherwise
        names = ("mean", "std", f"{test}crop_pct", "interpolation")
        given = {name.removeprefix("test_"): cfg[name] for name in names if name in cfg}
        words = [word for name, value in given.items() for word in as_options(name, value)]
        size = cfg.get(f"{test}input_size") or cfg["input_size"]
        check_channels(parser.parse_args([*words, "--input-size", *map(str, size)]))
    if cfg.get("crop_mode", "center") not in CROP_MODES:
        raise UserError(f"{path}: pretrained_cfg.crop_mode should be one of {', '.join(CROP_MODES)}")


def _is_whole(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def check_weights(folder: Path) -> dict[str, Tensor]:
    """Return a folder's weights, which are whole and finite."""
    with explained(f"{folder / WEIGHTS} is not a whole safetensors file"):
        weights = safetensors.torch.load_file(folder / WEIGHTS)
        with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
            if (file.metadata() or {}).get("format") != "pt":
                raise ValueError("its metadata don't say that its format is pt, which transformers asks for")
    for key, value in weights.items():
        if value.dtype not in _DTYPES:
            raise UserError(f"{folder / WEIGHTS}: {key} is {value.dtype}: store weights as float16 or float32")
        if not value.isfinite().all():
            raise UserError(f"{folder / WEIGHTS}: {key} has values that are NaN or infinite")
    return weights


def check_model(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Check that the registered model takes the weights, and computes what the config's own architecture does."""
    architecture = folder.name.partition(".")[0]
    with explained(f"{folder / WEIGHTS} doesn't load into {architecture}"):
        local: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        arguments = config["sugar"]["model_args"]
        model: Any = timm.create_model(architecture, num_classes=config["num_classes"], **arguments).eval()
        check_numbers(weights, model)
        model.load_state_dict(weights)
    size = config["pretrained_cfg"]["input_size"]
    image = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    with explained(f"{folder / CONFIG} doesn't agree with {architecture}"), torch.inference_mode():
        if not torch.equal(local(image), model(image)):
            raise ValueError("their outputs differ")

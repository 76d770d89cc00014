"""A random part of the images is one of all classes, and always the same."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from lab.cli import Parser, UserError
from lab.training.data import DataError, RandomPart
from lab.training.loading import add_options, load_model, open_loader
from scripting import make_images
from torch.utils.data import IterableDataset


def test_part_is_drawn_from_all_classes_and_preprocessed_like_the_whole(tmp_path: Path) -> None:
    parser = Parser("test")
    add_options(parser)
    data = str(make_images(tmp_path / "data", validation=10))
    args = parser.parse_args(["--data-dir", data, "--img-size", "32", "-j", "0", "-b", "4"])
    model = timm.create_model("test_resnet_sugar", num_classes=3)

    def load(images: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        batches = list(open_loader(args, model, torch.device("cpu"), images)[0])
        return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])

    whole, targets = load(None)
    part, its_targets = load(9)
    assert (len(whole), len(part)) == (30, 9)
    assert set(its_targets.tolist()) == {0, 1, 2}
    positions = [next(i for i, image in enumerate(whole) if torch.equal(image, x)) for x in part]
    assert positions == sorted(set(positions))
    assert torch.equal(targets[positions], its_targets)
    assert torch.equal(load(9)[0], part)
    assert torch.equal(load(1000)[0], whole)


def test_no_part_is_taken_of_a_stream() -> None:
    class Stream(IterableDataset):
        def __len__(self) -> int:
            return 2

        def __iter__(self) -> Iterator[int]:
            return iter([1, 2])

    with pytest.raises(DataError, match="stream"):
        RandomPart(Stream(), 1)


def test_a_run_brings_the_modules_that_register_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings beside a checkpoint name them; where they can't be imported, one line says so."""
    model = timm.create_model("test_resnet", num_classes=3)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "last.pth.tar")
    (tmp_path / "args.yaml").write_text("model: my_own_net\nnum_classes: 3\ndevice_modules: [my_own_nets]\n")
    parser = Parser("test")
    add_options(parser)

    def load() -> torch.nn.Module:
        return load_model(parser.parse_args(["--checkpoint", str(tmp_path)]))[0]

    with pytest.raises(UserError, match="--device-modules: No module named 'my_own_nets'"):
        load()
    (tmp_path / "my_own_nets.py").write_text(
        "from timm.models import create_model, register_model\n\n\n@register_model\n"
        "def my_own_net(pretrained=False, **kwargs):\n    return create_model('test_resnet', num_classes=3)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for key, value in load().state_dict().items():
        assert torch.equal(value, model.state_dict()[key])


@pytest.mark.parametrize(("name", "value"), [("classes", 5), ("model_kwargs", "a=b")])
def test_a_checkpoint_with_odd_settings_is_one_line(name: str, value: object, tmp_path: Path) -> None:
    parser = Parser("test")
    add_options(parser)
    model = timm.create_model("test_resnet", num_classes=3)
    settings = argparse.Namespace(model="test_resnet", num_classes=3, **{name: value})
    torch.save({"state_dict": model.state_dict(), "args": settings}, tmp_path / "odd.pth.tar")
    with pytest.raises(UserError, match=f"settings of the checkpoint: {name} is"):
        load_model(parser.parse_args(["--checkpoint", str(tmp_path / "odd.pth.tar")]))

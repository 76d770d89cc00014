#!/usr/bin/env python3
"""Fine-tune pretrained SUGAR weights on other images in a minute on a CPU, beside the same training from random ones.

    python scripts/quickstart.py

The weights are those of a tag in model_cards/; the images are the 1,797 handwritten digits (8x8 pixels) that
scikit-learn ships. So nothing is downloaded. The output folder gets the fine-tuned model, in the format that
timm.create_model loads, and a picture.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import timm.models
import timm.optim
import torch
from lab.cli import Parser, UserError, explained
from lab.files import save_figure
from lab.training.groups import SEED, n
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import timm_sugar
from timm_sugar.diagnostics import track_activations

NAME = "resnet18_sugar"
TAG = "bsilu_cifar10"  # what pretrained weights were trained on
SIZE = 32  # pixels to which the 8x8 images are enlarged
BATCH = 64
LEARNING_RATE = 2e-3
HELD_OUT = 360  # images


def build_parser() -> Parser:
    """All options."""
    parser = Parser("quickstart.py", description=__doc__)
    add = parser.add_argument
    add("--epochs", **n(1, default=2), help="passes over the training images (default: %(default)s)")
    add("--surrogate", default="bsilu", metavar="NAME", help="whose derivative ReLU borrows (default: %(default)s)")
    add("--seed", type=SEED, default=42, metavar="N", help="(default: %(default)s)")
    add("--output", default="output/quickstart", metavar="DIR", help="overwritten (default: %(default)s)")
    return parser


def build(args: argparse.Namespace, pretrained: bool) -> nn.Module:
    """The model with a new classifier for ten digits, its other weights those of the tag or random as well."""
    torch.manual_seed(args.seed)
    name = f"{NAME}.{TAG}" if pretrained else NAME
    with explained(f"can't load {name}"):
        return timm.create_model(name, pretrained=pretrained, num_classes=10, in_chans=1, surrogate=args.surrogate)


def load_images(data_config: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images, held-out images (N, 1, SIZE, SIZE) and their labels (N); the same split every time."""
    digits = load_digits()
    transform = timm.data.create_transform(**data_config)
    pictures = [Image.fromarray((pixels * (255 / 16)).astype(np.uint8)) for pixels in digits.images]
    images = torch.stack([transform(picture) for picture in pictures])
    labels = torch.as_tensor(digits.target)
    order = np.arange(len(labels))
    train, held_out = train_test_split(order, test_size=HELD_OUT, stratify=labels.numpy(), random_state=0)
    return images[train], images[held_out], labels[train], labels[held_out]


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """AdamW with a one-cycle schedule; leaves the model in eval mode."""
    steps = len(images) // BATCH
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * steps)
    model.train()
    with tqdm(total=epochs * steps, desc="training", unit="step", disable=not sys.stderr.isatty()) as bar:
        for epoch in range(epochs):
            mean_loss = 0.0
            for chosen in torch.randperm(len(images))[: steps * BATCH].split(BATCH):
                loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                mean_loss += loss.item() / steps
                bar.update()
                bar.set_postfix(epoch=epoch + 1, loss=f"{loss.item():.3f}")
            if bar.disable:
                print(f"epoch {epoch + 1}/{epochs}  loss {mean_loss:.3f}", flush=True)
    model.eval()


@torch.no_grad()
def inspect(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, str]:
    """Predictions (N), and a line with accuracy, dead units and sparsity on these images."""
    model.eval()
    with track_activations(model) as activations:
        predictions = torch.cat([model(batch).argmax(1) for batch in images.split(BATCH)])
    accuracy = (predictions == labels).float().mean().item()
    return predictions, f"{accuracy:12.1%}{activations.dead:12.2%}{activations.sparsity:12.1%}"


def save(model: nn.Module, data_config: dict[str, Any], folder: Path) -> None:
    """Weights and config as timm's create_model reads them, with what doesn't hold for ImageNet weights replaced."""
    origin = {"tag": "digits", "license": "apache-2.0", "description": "Trained by scripts/quickstart.py.",
              "origin_url": None, "paper_ids": None}  # fmt: skip
    timm.models.save_for_hf(
        model,
        str(folder),
        model_config={"label_names": [str(digit) for digit in range(10)], "pretrained_cfg": origin},
        data_config=data_config,
        safe_serialization=True,
    )


def draw(images: Tensor, labels: Tensor, predictions: Tensor, path: Path) -> None:
    """A grid of held-out images with their predictions; wrong ones come first, in red, with the right answer."""
    from matplotlib.figure import Figure

    wrong_first = torch.argsort((predictions == labels).int(), stable=True)[:40].tolist()
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    count = int((predictions != labels).sum())
    figure.suptitle(f"{NAME} on held-out digits: {count} of {len(labels)} wrong, drawn first")
    for axes, i in zip(figure.subplots(4, 10).flat, wrong_first, strict=True):
        right = bool(predictions[i] == labels[i])
        title = f"{predictions[i]}" if right else f"{predictions[i]}, is {labels[i]}"
        axes.imshow(images[i, 0].numpy(), cmap="gray_r")
        axes.set_title(title, color="black" if right else "crimson", fontsize=11)
        axes.axis("off")
    save_figure(figure, path)


def run(args: argparse.Namespace) -> None:
    """Train twice, from random weights and from the tag's; save the latter, load it back, and tell what is where."""
    start = time.time()
    torch.set_num_threads(1)  # the same numbers on any count of cores; a model this small gains little from more
    if args.surrogate not in timm_sugar.list_surrogates():
        known = ", ".join(timm_sugar.list_surrogates())
        raise UserError(f"argument --surrogate: {args.surrogate!r} is none of {known}")
    output = Path(args.output)
    with explained(f"can't write to {output}"):
        output.mkdir(parents=True, exist_ok=True)
    model = build(args, pretrained=False)
    data_config = timm.data.resolve_data_config(
        {"input_size": (1, SIZE, SIZE), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}, model=model
    )
    images, held_out, labels, truth = load_images(data_config)
    print(f"{NAME} ({args.surrogate}): {len(images)} images to train on, {len(held_out)} held out")
    lines = []
    for name in ("random weights", TAG):
        model = build(args, pretrained=name == TAG)
        print(f"\nstarting from {name}")
        _, before = inspect(model, held_out, truth)
        train(model, images, labels, args.epochs)
        predictions, after = inspect(model, held_out, truth)
        lines += [f"{name:22}{before}", f"{'  after training':22}{after}"]

    folder, picture = output / NAME, output / "predictions.png"
    with explained(f"can't write to {output}"):
        save(model, data_config, folder)
        draw(held_out, truth, predictions, picture)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    timm_sugar.to_relu(loaded)
    same = torch.equal(inspect(loaded, held_out, truth)[0], predictions)

    print("\n".join([f"\non the held-out images{'accuracy':>12}{'dead units':>12}{'zeros':>12}", *lines]))
    print(f"loaded back as a plain ReLU network: predictions are {'the same' if same else 'DIFFERENT'}")
    print(f"\nmodel    {folder}\npicture  {picture}\ntime     {time.time() - start:.0f} s\n\nLoad it again:\n")
    print(f"    import timm, timm_sugar\n    model = timm.create_model('local-dir:{folder}', pretrained=True)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 130 after Ctrl-C. A user's mistake exits with status 2 and one line on stderr."""
    return build_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())

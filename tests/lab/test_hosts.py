"""Hosts of models: what they build, train and attribute has SUGAR's gradient. `make test-hosts` installs them all."""

from __future__ import annotations

import copy
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import timm_sugar
from timm_sugar import SUGAR

sys.path.append(str(Path(__file__).parents[1] / "library"))
from fgi import injected

pytestmark = pytest.mark.filterwarnings("default")  # what hosts warn of isn't ours


class Injected(nn.Module):
    """B-SiLU's gradient by forward gradient injection, in the place of SUGAR."""

    def forward(self, x: Tensor) -> Tensor:
        return injected(x)


def same_gradients(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> None:
    """Compare the gradients of all weights with those of the same model with injected gradients."""
    reference = timm_sugar.replace_activations(copy.deepcopy(model), Injected)
    found = []
    for one in (model, reference):
        torch.manual_seed(0)
        one.zero_grad()
        loss(one).backward()
        found.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    scale = max(float(gradient.abs().max()) for gradient in found[1].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-3, atol=1e-4 * scale)


def tiny(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("test_resnet_sugar", num_classes=3, **kwargs)


IMAGES, LABELS = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])


def by_hand(steps: int = 1) -> nn.Module:
    """The model after steps of SGD in a loop of its own."""
    model = tiny().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES), LABELS).backward()
        optimizer.step()
    return model


def same_weights(model: nn.Module, expected: nn.Module) -> None:
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()))


TORCHVISION: list[Any] = ["resnet18", "mobilenet_v3_small"]
TORCHVISION += [
    pytest.param(name, marks=pytest.mark.slow) for name in ("efficientnet_b0", "convnext_tiny", "swin_t", "vit_b_16")
]


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_is_sugarized_whole(name: str) -> None:
    models = pytest.importorskip("torchvision").models
    model = timm_sugar.sugarize(getattr(models, name)(weights=None).eval(), example=torch.randn(1, 3, 224, 224))
    assert {*timm_sugar.list_activations(model).values()} == {"SUGAR"}
    same_gradients(model, lambda one: one(torch.linspace(-1, 1, 3 * 224 * 224).view(1, 3, 224, 224)).square().sum())


def test_torchvision_densenet_is_sugarized_through_fx() -> None:
    models = pytest.importorskip("torchvision").models
    model = timm_sugar.sugarize(torch.fx.symbolic_trace(models.densenet121(weights=None).eval()))
    assert len(timm_sugar.list_activations(model)) == 121


def test_a_unet_of_segmentation_models_has_sugar_in_its_encoder_and_relu_in_its_decoder() -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.Unet("tu-resnet18_sugar", encoder_weights=None, classes=2).eval()
    kinds = timm_sugar.list_activations(model)
    assert {kind for name, kind in kinds.items() if name.startswith("encoder.")} == {"SUGAR"}
    assert {kind for name, kind in kinds.items() if name.startswith("decoder.")} == {"ReLU"}
    timm_sugar.sugarize(model)
    assert {*timm_sugar.list_activations(model).values()} == {"SUGAR"}
    same_gradients(model, lambda one: one(torch.ones(1, 3, 64, 64)).square().sum())


def test_lightning_trains_as_a_loop_does(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Classifier(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny()

        def training_step(self, batch: Any, _: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    classifier = Classifier()
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path
    )
    trainer.fit(classifier, DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4))
    same_weights(classifier.model, by_hand(2))


def test_accelerate_trains_as_a_loop_does() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = tiny().train()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.backward(F.cross_entropy(model(IMAGES), LABELS))
    optimizer.step()
    same_weights(accelerator.unwrap_model(model), by_hand())


def test_lora_of_peft_trains_and_is_merged_before_relu() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = timm.create_model("test_vit_sugar", num_classes=3)
    config = peft.LoraConfig(r=2, target_modules=["fc1", "fc2"], modules_to_save=["head"], init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    images = torch.randn(2, 3, 160, 160)
    same_gradients(model, lambda one: one(images).square().sum())
    with torch.no_grad():
        before = model(images)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(images), before, rtol=1e-4, atol=1e-5)
        expected = merged(images)
        assert torch.equal(timm_sugar.to_relu(merged)(images), expected)


def test_a_yolo_of_ultralytics_is_sugarized_and_makes_two_steps() -> None:
    ultralytics = pytest.importorskip("ultralytics")
    torch.manual_seed(0)
    model = ultralytics.YOLO("yolo11n.yaml").model.train().requires_grad_(True)
    timm_sugar.sugarize(model)
    kinds = timm_sugar.list_activations(model)
    assert len(kinds) > 50
    assert {*kinds.values()} == {"SUGAR"}
    images = torch.rand(2, 3, 64, 64)

    def loss(one: nn.Module) -> Tensor:
        return sum((output.square().mean() for output in tensors(one(images))), torch.zeros(()))

    same_gradients(model, loss)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=1e-3), []
    for _ in range(2):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[1] < losses[0]


def tensors(output: Any) -> list[Tensor]:
    """All tensors with gradients in nested lists and dictionaries."""
    if isinstance(output, Tensor):
        return [output] if output.requires_grad else []
    parts = output.values() if isinstance(output, dict) else output
    return [tensor for part in parts for tensor in tensors(part)]


def test_transformers_trainer_trains_a_sugarized_vit(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")  # which its trainer needs
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=16, num_labels=3)
    torch.manual_seed(0)
    model = timm_sugar.sugarize(transformers.ViTForImageClassification(config))
    assert {*timm_sugar.list_activations(model).values()} == {"SUGAR"}
    expected = copy.deepcopy(model).train()
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(IMAGES, LABELS, strict=True)]
    options = transformers.TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=4, learning_rate=0.1, optim="sgd", max_grad_norm=0,
        lr_scheduler_type="constant", report_to=[], use_cpu=True, save_strategy="no",
    )  # fmt: skip
    transformers.Trainer(model, options, train_dataset=rows).train()
    expected(pixel_values=IMAGES, labels=LABELS).loss.backward()
    for name, weight in expected.named_parameters():
        wanted = weight if weight.grad is None else weight - 0.1 * weight.grad
        torch.testing.assert_close(operator.attrgetter(name)(model), wanted, rtol=1e-4, atol=1e-6)


def test_integrated_gradients_of_captum_are_complete_with_relus_gradient_alone() -> None:
    captum = pytest.importorskip("captum.attr")
    model = tiny().eval()
    image = IMAGES[:1]

    def missing(one: nn.Module) -> float:
        attributions, delta = captum.IntegratedGradients(one).attribute(
            image, target=0, n_steps=200, return_convergence_delta=True
        )
        return abs(float(delta)) / float(attributions.abs().sum())

    with_surrogate = missing(model)
    with timm_sugar.relu_gradient():
        with_relu = missing(model)
    assert with_relu < 1e-4 < 0.01 < with_surrogate
    assert missing(timm_sugar.to_relu(copy.deepcopy(model))) < 1e-4


def test_guided_backpropagation_of_captum_needs_to_relu() -> None:
    captum = pytest.importorskip("captum.attr")
    model = timm_sugar.to_relu(tiny().eval())
    guided = captum.GuidedBackprop(model).attribute(IMAGES[:1].clone().requires_grad_(), target=0)
    (own,) = torch.autograd.grad(model(x := IMAGES[:1].clone().requires_grad_())[0, 0], x)
    assert not torch.allclose(guided, own)
    assert not any(isinstance(module, SUGAR) for module in model.modules())


def test_grad_cam_is_that_of_the_relu_network_with_its_gradient() -> None:
    cam = pytest.importorskip("pytorch_grad_cam")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    model = tiny().eval()
    relu = timm_sugar.to_relu(copy.deepcopy(model))
    layers: Callable[[Any], list[nn.Module]] = lambda one: [one.layer2]  # noqa: E731
    maps = []
    for one in (relu, model):
        with timm_sugar.relu_gradient(), cam.GradCAM(one, layers(one)) as method:
            maps.append(method(IMAGES[:1], [targets.ClassifierOutputTarget(0)]))
    assert (maps[0] == maps[1]).all()
    with cam.GradCAM(model, layers(model)) as method:
        other = method(IMAGES[:1], [targets.ClassifierOutputTarget(0)])
    assert (other != maps[0]).any()

"""What is counted while a model runs equals what its whole activations, collected and counted by hand, give."""

from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from timm_sugar import SUGAR, diagnose
from timm_sugar.diagnostics import track_activations


def by_hand(model: nn.Module, batches: list[Tensor], dims: dict[str, int]) -> dict[str, tuple[float, float]]:
    """Dead share and sparsity by activation name, from all of its outputs at once."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in dims}
    modules = dict(model.named_modules())
    hooks = [modules[n].register_forward_hook(lambda m, x, y, n=n: outputs[n].append(y.detach())) for n in dims]
    for batch in batches:
        model(batch)
    for hook in hooks:
        hook.remove()
    result = {}
    for name, dim in dims.items():
        units = torch.cat(outputs[name]).movedim(dim, 0).flatten(1)
        result[name] = ((units <= 0).all(1).double().mean().item(), (units == 0).double().mean().item())
    return result


def convnet() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), SUGAR(), nn.Conv2d(8, 4, 3), nn.GELU(),
        nn.Flatten(), nn.Linear(64, 5), nn.ReLU(),
    ).eval()  # fmt: skip
    with torch.no_grad():
        model[0].weight[:3].zero_()  # three units that no image can wake
        model[1].bias[:3].fill_(-1.0)
        model[6].bias[0] = -100.0
    return model


@pytest.fixture
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, 8, 8, generator=generator) for _ in range(3)]


def test_counts_equal_the_collected_activations(batches: list[Tensor]) -> None:
    model = convnet()
    with track_activations(model) as activations:
        for batch in batches:
            model(batch)
    expected = by_hand(model, batches, {"2": 1, "4": 1, "7": 1})
    assert list(activations.layers) == ["2", "4", "7"]
    for name, (dead, sparsity) in expected.items():
        assert activations.layers[name].dead == pytest.approx(dead)
        assert activations.layers[name].sparsity == pytest.approx(sparsity)
    assert activations.layers["2"].dead == pytest.approx(3 / 8)
    assert activations.layers["4"].sparsity == 0  # GELU has no exact zeros


def test_totals_weigh_units_and_elements(batches: list[Tensor]) -> None:
    model = convnet()
    with track_activations(model) as activations:
        for batch in batches:
            model(batch)
    layers = activations.layers.values()
    alive = sum(int(layer.active.sum()) for layer in layers)
    assert activations.dead == pytest.approx(1 - alive / (8 + 4 + 5))
    zeros = sum(layer.sparsity * layer.elements for layer in layers)
    assert activations.sparsity == pytest.approx(zeros / (6 * (8 * 36 + 4 * 16 + 5)))


def test_a_unit_is_dead_only_if_no_batch_wakes_it() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
    model[0].weight.data = torch.eye(2)
    with track_activations(model) as activations:
        model(torch.tensor([[1.0, -1.0]]))
        assert activations.dead == 0.5
        model(torch.tensor([[-1.0, 1.0]]))
        assert activations.dead == 0
    assert activations.sparsity == 0.5


class Permuting(nn.Module):
    """A convolution whose output the activation sees with the channels last, as tokens, and one before any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ReLU()
        self.conv = nn.Conv2d(3, 6, 1)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.first(x))
        return self.act(x.permute(0, 2, 3, 1)) if self.training else self.act(x.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("training", [True, False])
def test_units_are_found_where_the_channels_were_moved(training: bool) -> None:
    model = Permuting().train(training)
    with track_activations(model) as activations:
        model(torch.randn(2, 3, 4, 4))
    assert activations.layers["act"].active.shape == (6,)
    assert activations.layers["first"].active.shape == (3,)


@pytest.mark.parametrize("name", ["test_convnext_sugar", "swin_tiny_sugar", "test_vit_sugar", "test_resnet_sugar"])
def test_units_are_the_features_of_the_layer_before(name: str) -> None:
    """In token and feature map networks alike; the oracle is the size of the fully connected or convolution layer."""
    options = {"img_size": 32, "window_size": 4, "patch_size": 2} if "swin" in name else {}
    model = timm.create_model(name, **options).eval()
    last, expected = [0], []
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            size = module.weight.shape[0]
            module.register_forward_hook(lambda m, x, y, size=size: last.__setitem__(0, size))
        elif isinstance(module, SUGAR):
            module.register_forward_hook(lambda m, x, y: expected.append(last[0]))
    size = 32 if "swin" in name else 160
    with torch.no_grad(), track_activations(model) as activations:
        model(torch.randn(1, 3, size, size))
    assert expected
    assert [layer.active.numel() for layer in activations.layers.values()] == expected


def test_a_module_called_twice_has_two_entries() -> None:
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 3), act, nn.Linear(3, 5), act)
    with track_activations(model) as activations:
        for _ in range(2):
            model(torch.randn(2, 4))
    shapes = {name: layer.active.numel() for name, layer in activations.layers.items()}
    assert shapes == {"1": 3, "1#2": 5}


def test_the_model_is_left_as_it_was(batches: list[Tensor]) -> None:
    model = convnet()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    plain = model(batches[0])
    with track_activations(model):
        assert torch.equal(model(batches[0]), plain)
    with pytest.raises(RuntimeError, match="Expected"), track_activations(model):
        model(torch.randn(1, 7))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not model.training


def test_memory_does_not_grow_with_the_data(batches: list[Tensor]) -> None:
    model = convnet()
    sizes = []
    with track_activations(model) as activations:
        for batch in batches:
            model(batch)
            sizes.append(sum(layer.active.numel() + layer.zeros.numel() for layer in activations.layers.values()))
    assert sizes == [17 + 3] * 3


def test_no_gradient_is_changed(batches: list[Tensor]) -> None:
    model = convnet()
    model(batches[0]).sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with track_activations(model):
        model(batches[0]).sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))


def test_nothing_seen_is_not_a_number() -> None:
    with track_activations(nn.Linear(2, 2)) as activations:
        pass
    assert activations.dead != activations.dead
    assert activations.sparsity != activations.sparsity


# ---- diagnose()

Pairs = list[tuple[Tensor, Tensor]]


@pytest.fixture
def pairs() -> Pairs:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 3, 8, 8, generator=generator), torch.randint(0, 5, (n,), generator=generator))
        for n in (4, 4, 1)
    ]


def in_two_passes(model: nn.Module, pairs: Pairs, dims: dict[str, int], tau: float) -> list[dict[str, Any]]:
    """The rows of `diagnose` for the named activations, from all their inputs, outputs and gradients, in float64."""
    modules = dict(model.named_modules())
    seen: dict[str, dict[str, list[Tensor]]] = {name: {"x": [], "y": [], "grad": []} for name in dims}
    for images, target in pairs:
        passed: dict[str, tuple[Tensor, Tensor]] = {}
        hooks = [
            modules[n].register_forward_hook(lambda _, x, y, n=n, to=passed: to.update({n: (x[0], y)})) for n in dims
        ]
        loss = F.cross_entropy(model(images), target)
        for hook in hooks:
            hook.remove()
        for name, (x, y) in passed.items():
            seen[name]["x"].append(x.detach())
            seen[name]["y"].append(y.detach())
            seen[name]["grad"].append(torch.autograd.grad(loss, x, retain_graph=True)[0])
    rows = []
    for name, dim in dims.items():
        x, y, grad = (torch.cat(seen[name][key]).movedim(dim, 0).flatten(1).double() for key in ("x", "y", "grad"))
        scores = y.abs().mean(1) / y.abs().mean(1).mean()
        rows.append(
            {
                "layer": name,
                "units": len(y),
                "dead": (y <= 0).all(1).double().mean().item(),
                "dormant": (scores <= tau).double().mean().item(),
                "zeros": (y == 0).double().mean().item(),
                "gradient": (grad != 0).any(1).double().mean().item(),
                "mean": x.mean().item(),
                "spread": x.std(correction=0).item(),
            }
        )
    return rows


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.2])
def test_all_numbers_equal_those_of_the_collected_activations(pairs: Pairs, tau: float) -> None:
    model = convnet()
    rows = diagnose(model, pairs, tau=tau).rows()
    expected = in_two_passes(model, pairs, {"2": 1, "4": 1, "7": 1}, tau)
    total = rows.pop()
    for row, other in zip(rows, expected, strict=True):
        assert row.pop("layer") == other.pop("layer")
        assert row == pytest.approx(other, rel=1e-5, abs=1e-6)
    assert total["layer"] == "total"
    assert total["units"] == sum(row["units"] for row in expected) == 17
    for key in ("dead", "dormant", "gradient"):
        assert total[key] == pytest.approx(sum(row[key] * row["units"] for row in expected) / 17), key


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU(inplace=True), SUGAR()], ids=["relu", "inplace", "sugar"])
def test_known_dead_units_get_a_gradient_under_sugar_only(activation: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.copy_(torch.tensor([0.0, -1000.0, -2.0, 5.0]))
    x = torch.tensor([[1.0, 0.5, 0.25], [-1.0, 0.0, 0.0]])
    (row, _) = diagnose(model, [(x, torch.tensor([0, 1]))]).rows()
    assert row["dead"] == pytest.approx(2 / 4)  # -1000 and -2, as the sums are 1.75 and -1
    assert row["dormant"] == pytest.approx(2 / 4)
    assert row["zeros"] == pytest.approx(5 / 8)
    assert row["gradient"] == pytest.approx(3 / 4 if isinstance(activation, SUGAR) else 2 / 4)  # -1000 underflows
    assert row["mean"] == pytest.approx((4 * 0.75 + 2 * -997) / 8)


def test_in_place_activations_give_the_same_numbers(pairs: Pairs) -> None:
    def rows(inplace: bool) -> list[dict[str, Any]]:
        model = convnet()
        model[2], model[4] = nn.ReLU(inplace), nn.SiLU(inplace)
        return diagnose(model, pairs).rows()

    assert rows(True)[:-1] == rows(False)[:-1]


def test_layers_that_are_computed_again_in_the_backward_pass_are_counted_once(pairs: Pairs) -> None:
    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    plain = convnet()
    assert str(diagnose(Checkpointed(*plain), pairs)) == str(diagnose(plain, pairs))


def test_frozen_weights_let_the_gradient_through(pairs: Pairs) -> None:
    model = convnet()
    expected = diagnose(model, pairs)
    assert str(diagnose(model.requires_grad_(False), pairs)) == str(expected)
    assert expected.flow > 0


def test_the_diagnosed_model_and_its_data_are_left_as_they_were(pairs: Pairs) -> None:
    model = convnet().train()
    model[1].eval()  # frozen statistics
    model[0].bias.requires_grad_(False)
    F.cross_entropy(model(pairs[0][0]), pairs[0][1]).backward()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes = [module.training for module in model.modules()]

    def unchanged() -> bool:
        now = [p.grad for p in model.parameters()]
        same = all(a is b if b is None else torch.equal(a, b) for a, b in zip(now, grads, strict=True))
        hooks = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        state_is = all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        return same and state_is and not hooks and modes == [module.training for module in model.modules()]

    diagnose(model, pairs)
    assert unchanged()
    assert not any(images.requires_grad for images, _ in pairs)
    with pytest.raises(RuntimeError):
        diagnose(model, [(torch.randn(1, 7), torch.tensor([0]))])
    assert unchanged()


def test_without_a_criterion_batches_alone_are_enough(pairs: Pairs) -> None:
    model = convnet()
    alone = diagnose(model, [images for images, _ in pairs], criterion=None)
    assert alone.flow != alone.flow
    for row, full in zip(alone.rows(), diagnose(model, pairs).rows(), strict=True):
        assert {**full, "gradient": None, "mean": str(full["mean"]), "spread": str(full["spread"])} == {
            **row, "gradient": None, "mean": str(row["mean"]), "spread": str(row["spread"])
        }  # fmt: skip


def test_what_cannot_be_diagnosed_is_an_error(pairs: Pairs) -> None:
    with pytest.raises(ValueError, match="loader is empty"):
        diagnose(convnet(), [])
    with pytest.raises(ValueError, match="no hidden activation"):
        diagnose(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), pairs)
    with pytest.raises(ValueError, match="no targets"):
        diagnose(convnet(), [images for images, _ in pairs])
    with pytest.raises(ValueError, match="tau"):
        diagnose(convnet(), pairs, tau=-1)


def test_table_shows_every_layer_and_the_total(pairs: Pairs) -> None:
    lines = str(diagnose(convnet(), pairs)).splitlines()
    assert [line.split()[0] for line in lines] == ["layer", "2", "4", "7", "total"]
    assert lines[1].split()[1:3] == ["8", "37.50"]
    assert len({len(line) for line in lines}) == 1


def test_memory_of_a_diagnosis_does_not_grow_with_the_data(pairs: Pairs) -> None:
    def size(repeats: int) -> int:
        layers = diagnose(convnet(), pairs * repeats).layers.values()
        return sum(value.nbytes for layer in layers for value in vars(layer).values() if isinstance(value, Tensor))

    assert size(1) == size(5)


# --- models and batches of other people


def numbers(report: Any) -> list[dict[str, Any]]:
    return [{key: str(value) for key, value in row.items() if key != "layer"} for row in report.rows()]


def test_an_in_place_relu_may_come_first() -> None:
    images = torch.randn(4, 3)
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2))
    kept = images.clone()
    expected = diagnose(nn.Sequential(nn.ReLU(), model[1]), [(images, torch.tensor([0, 1, 0, 1]))])
    assert numbers(diagnose(model, [(images, torch.tensor([0, 1, 0, 1]))])) == numbers(expected)
    assert torch.equal(images, kept)


def test_integers_into_a_frozen_model_have_a_gradient_flow_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    tokens, target = torch.tensor([1, 5, 8]), torch.tensor([0, 1, 0])
    expected = diagnose(model, [(tokens, target)])
    assert expected.flow > 0
    assert diagnose(model.requires_grad_(False), [(tokens, target)]).flow == expected.flow
    assert not any(p.requires_grad for p in model.parameters())
    model[3].requires_grad_()  # behind the activation, so that its gradient does not pass through it
    assert diagnose(model, [(tokens, target)]).flow == expected.flow
    assert [p.requires_grad for p in model.parameters()] == [False, False, False, True, True]


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x.sum()) * x


def test_an_activation_of_no_dimensions_is_one_unit() -> None:
    report = diagnose(Scalar(), [(torch.ones(2, 3), torch.tensor([0, 1]))])
    assert (report.layers["act"].units, report.dead, report.sparsity) == (1, 0.0, 0.0)


class Named(nn.Module):
    """Called by names, and answering with an object, as models of transformers are."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.act, self.answer = nn.Linear(3, 4), nn.Linear(4, 2), nn.GELU(), answer

    def forward(self, pixel_values: Tensor, scale: float = 1.0) -> Any:
        logits = self.head(self.act(input=scale * self.body(pixel_values)))
        return self.answer(logits)


@pytest.mark.parametrize("answer", [lambda y: y, lambda y: {"logits": y}, lambda y: SimpleNamespace(logits=y)])
@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize("key", ["labels", "label", "target"])
def test_batches_may_be_dicts_and_outputs_may_hold_logits(answer: Any, kind: Any, key: str) -> None:
    x, target = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    expected = numbers(diagnose(Named(lambda y: y), [(x, target)]))
    assert numbers(diagnose(Named(answer), [kind({"pixel_values": x, key: target, "scale": 1.0})])) == expected


def test_what_follows_the_targets_is_ignored_and_arrays_are_tensors(pairs: Pairs) -> None:
    expected = numbers(diagnose(convnet(), pairs))
    assert numbers(diagnose(convnet(), [(x, y, torch.ones(2)) for x, y in pairs])) == expected
    assert numbers(diagnose(convnet(), [(x.numpy(), y.numpy()) for x, y in pairs])) == expected


def test_inside_inference_mode_there_is_a_gradient_flow(pairs: Pairs) -> None:
    expected = numbers(diagnose(convnet(), pairs))
    model = convnet()
    with torch.inference_mode():
        inside = [(x.clone(), y.clone()) for x, y in pairs]
        assert numbers(diagnose(model, inside)) == expected


def test_nan_is_an_error_that_names_the_layer_and_not_a_dead_unit(pairs: Pairs) -> None:
    broken = [(torch.full_like(x, torch.nan), y) for x, y in pairs]
    with pytest.raises(ValueError, match="activation 2 is NaN on this data"):
        diagnose(convnet(), broken)
    model = convnet()
    with track_activations(model) as activations, torch.no_grad():
        model(broken[0][0])
    assert activations.dead != activations.dead


@pytest.mark.parametrize("tau", ["a", None, True, float("nan")])
def test_a_tau_that_is_no_number_is_named(pairs: Pairs, tau: Any) -> None:
    with pytest.raises(ValueError, match="tau must be a number, 0 or more"):
        diagnose(convnet(), pairs, tau=tau)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.act, self.head = nn.Linear(3, 8), F.relu, nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.body(x), inplace=True))


def test_a_function_that_a_model_keeps_is_seen_as_its_module_would_be() -> None:
    x, target = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])
    model = Functional()
    report = diagnose(model, [(x, target)])
    assert list(report.layers) == ["act"]
    assert model.act is F.relu
    twin = nn.Sequential(model.body, nn.ReLU(), model.head)
    assert numbers(report) == numbers(diagnose(twin, [(x, target)]))

"""The `_sugar` names in timm's registry: what is there, what it is built from, its weights, and its tags."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from fgi import inject
from safetensors.torch import load_file, save_file
from timm.models import DefaultCfg, get_arch_pretrained_cfgs, get_pretrained_cfg, save_for_hf
from torch import nn

import timm_sugar
from timm_sugar import SUGAR
from timm_sugar import surrogate as surrogate_module
from timm_sugar.models import sugar as models
from timm_sugar.models._weights import SugarTag
from timm_sugar.surrogate import get_surrogate, register_surrogate

# Not those that a module of another test has registered.
NAMES = [name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__.startswith("timm")]
BASES = [name for name in NAMES if not name.endswith("_sugar")]
REGISTERED = [name for name in NAMES if name.endswith("_sugar")]
WITH_BASE = [(base + "_sugar", base) for base in BASES if base + "_sugar" in REGISTERED]
SWIN = "swin_tiny_patch4_window7_224"

# Small architectures of different families: ReLU, GELU, SiLU, windows with a fixed image size.
SMALL = ["test_resnet", "test_vit", "test_efficientnet", "convnext_atto"]
SMALL_SWIN = {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
RELU_NETS = ["test_resnet", "resnet18", "vgg11", "regnetx_002"]
OTHER_NETS = {"convnext_atto": "GELU", "test_vit": "GELU", "mobilenetv2_035": "ReLU6", "test_efficientnet": "SiLU"}


def build(name: str, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


def images(model: Any, size: int = 64, batch: int = 2) -> torch.Tensor:
    fixed = model.pretrained_cfg.get("fixed_input_size")
    shape = model.pretrained_cfg["input_size"][1:] if fixed else (size, size)
    return torch.randn(batch, 3, *shape, generator=torch.Generator().manual_seed(1))


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in model.state_dict().items()}


def small_vgg(name: str) -> dict[str, Any]:
    """Arguments that keep vgg's classifier, of 4096 units, out of a test's memory."""
    return {"num_classes": 3, "mlp_ratio": 0.02} if name.startswith("vgg") else {"num_classes": 3}


# ---- names ----


def test_every_timm_architecture_has_a_sugar_name_unless_left_out() -> None:
    wanted = {base + "_sugar" for base in BASES if not models.is_left_out(base)}
    assert set(REGISTERED) == wanted | {alias + "_sugar" for alias in models.ALIASES}


def test_no_pattern_leaves_out_more_than_it_is_meant_to() -> None:
    evonorm = {"ese_vovnet39b_evos", "regnetz_b16_evos", "regnetz_c16_evos", "regnetz_d8_evos", "resnetv2_50d_evos"}
    linear = {f"mobilevitv2_{width}" for width in ("050", "075", "100", "125", "150", "175", "200")}
    taps = {"legacy_xception", "nasnetalarge", "pnasnet5large"}
    left_out = {base for base in BASES if models.is_left_out(base)}
    assert left_out == evonorm | linear | taps | {"resnetv2_50d_frn", "test_efficientnet_evos"}


@pytest.mark.parametrize("pattern", models.LEFT_OUT)
def test_left_out_names_are_unknown_to_timm(pattern: str) -> None:
    base = timm.list_models(pattern)[0]
    assert not timm.is_model(base + "_sugar")
    with pytest.raises(RuntimeError, match=f"Unknown model \\({base}_sugar\\)"):
        timm.create_model(base + "_sugar")


@pytest.mark.parametrize("name", ["resnet18_sugar", "convnext_tiny_sugar", "vgg16_sugar", "swin_tiny_sugar"])
def test_names_that_users_expect(name: str) -> None:
    assert timm.is_model(name)


def test_short_name_is_the_same_architecture_with_the_same_tags() -> None:
    short, long = build("swin_tiny_sugar", device="meta"), build(f"{SWIN}_sugar", device="meta")
    assert shapes(short) == shapes(long)
    assert short.pretrained_cfg["architecture"] == "swin_tiny_sugar"
    tags = {tag: cfg.hf_hub_id for tag, cfg in by_tag("swin_tiny_sugar").items()}
    assert tags == {tag: cfg.hf_hub_id for tag, cfg in by_tag(f"{SWIN}_sugar").items()}


def test_unknown_names_and_tags_fail_as_timm_does() -> None:
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.create_model("resnet19_sugar")
    with pytest.raises(RuntimeError, match=r"Invalid pretrained tag \(nonsense\)"):
        timm.create_model("resnet18_sugar.nonsense")


def test_list_models_filters() -> None:
    assert timm.list_models("resnet18*_sugar") == [f"{name}_sugar" for name in BASES if name.startswith("resnet18")]
    found = timm.list_models("*_sugar", exclude_filters=["[!v]*"])
    assert [name for name in found if name in NAMES] == [name for name in REGISTERED if name.startswith("v")]
    of_the_base = {name.replace("resnet18", "resnet18_sugar") for name in timm.list_models("resnet18", pretrained=True)}
    for tags, listed in (
        (with_weights(), timm.list_models("resnet18_sugar", pretrained=True)),
        (models.SUGAR_TAGS.keys(), timm.list_models("resnet18_sugar", include_tags=True)),
    ):
        assert set(listed) == of_the_base | {name for name in tags if name.startswith("resnet18_sugar.")}


def test_list_pretrained_has_each_tag_of_each_base_and_those_trained_with_sugar() -> None:
    listed = set(timm.list_pretrained("*_sugar*"))
    wanted = {f"{name}.{tag}" for name, base in WITH_BASE for tag, cfg in by_tag(base).items() if cfg.has_weights}
    aliases = {
        f"{a}_sugar.{tag}" for a, base in models.ALIASES.items() for tag, c in by_tag(base).items() if c.has_weights
    }
    assert listed == wanted | aliases | with_weights()


def with_weights() -> set[str]:
    """Tags trained with SUGAR that have a source: all in a checkout, none in a wheel before they are published."""
    return {name for name, tag in models.SUGAR_TAGS.items() if tag.cfg.has_weights}


# ---- tags ----


def by_tag(name: str) -> dict[str, Any]:
    """Configurations of an architecture, but for those of weights that were trained with SUGAR (tests/test_tags.py)."""
    cfgs = get_arch_pretrained_cfgs(name).items()
    return {full.partition(".")[2]: cfg for full, cfg in cfgs if full not in models.SUGAR_TAGS}


@pytest.mark.parametrize(("name", "base"), [*WITH_BASE[::97], ("resnet18_sugar", "resnet18")])
def test_a_tag_that_is_shown_is_one_that_resolves(name: str, base: str) -> None:
    for tag in by_tag(base):
        assert (
            get_pretrained_cfg(f"{name}.{tag}".rstrip(".")).tag == get_pretrained_cfg(f"{base}.{tag}".rstrip(".")).tag
        )


def test_every_tag_is_the_bases_with_its_full_hub_id_licence_and_preprocessing() -> None:
    """All of them: nothing but the name of the architecture may differ from the base's configuration."""
    for name, base in WITH_BASE:
        ours, theirs = by_tag(name), by_tag(base)
        assert list(ours) == list(theirs), name
        for tag, cfg in ours.items():
            differing = {
                field.name
                for field in dataclasses.fields(cfg)
                if getattr(cfg, field.name) != getattr(theirs[tag], field.name)
            }
            assert differing <= {"architecture"}, f"{name}.{tag}: {differing}"
            assert cfg.hf_hub_id is None or not cfg.hf_hub_id.endswith("/"), f"{name}.{tag}: {cfg.hf_hub_id}"
            assert cfg.hf_hub_id is None or "_sugar" not in cfg.hf_hub_id, f"{name}.{tag}: {cfg.hf_hub_id}"


def test_bare_name_has_the_default_tag_of_the_base() -> None:
    for name, base in WITH_BASE:
        ours, theirs = get_pretrained_cfg(name), get_pretrained_cfg(base)
        assert (ours.tag, ours.num_classes, ours.input_size) == (theirs.tag, theirs.num_classes, theirs.input_size)
        assert ours.hf_hub_id == theirs.hf_hub_id, name


def test_resnet18_tags_have_the_hub_ids_that_users_expect() -> None:
    assert get_pretrained_cfg("resnet18_sugar").hf_hub_id == "timm/resnet18.a1_in1k"
    assert get_pretrained_cfg("resnet18_sugar.tv_in1k").hf_hub_id == "timm/resnet18.tv_in1k"
    assert get_pretrained_cfg("resnet18_sugar.tv_in1k").license == "bsd-3-clause"
    assert get_pretrained_cfg("swin_tiny_sugar").hf_hub_id == f"timm/{SWIN}.ms_in1k"


# ---- arguments ----

ARGUMENTS = [
    ("test_resnet", {"num_classes": 7}),
    ("test_resnet", {"num_classes": 0, "global_pool": ""}),
    ("test_resnet", {"in_chans": 1, "drop_rate": 0.2, "drop_path_rate": 0.1}),
    ("test_resnet", {"features_only": True, "out_indices": (1, 3)}),
    ("convnext_atto", {"num_classes": 7, "in_chans": 5, "drop_path_rate": 0.1}),
    ("test_vit", {"img_size": 96, "num_classes": 3, "global_pool": "avg"}),
    ("test_vit", {"dynamic_img_size": True, "class_token": False, "global_pool": "avg"}),
    ("test_vit", {"features_only": True}),
    (SWIN, {"img_size": 64, "num_classes": 3, **SMALL_SWIN}),
]


@pytest.mark.parametrize(("base", "kwargs"), ARGUMENTS)
def test_arguments_mean_what_they_mean_for_the_base(base: str, kwargs: dict[str, Any]) -> None:
    ours, theirs = build(f"{base}_sugar", **kwargs), build(base, **kwargs)
    assert shapes(ours) == shapes(theirs)
    for attribute in ("num_classes", "num_features", "drop_rate", "global_pool", "in_chans"):
        assert str(getattr(ours, attribute, None)) == str(getattr(theirs, attribute, None)), attribute
    size, channels = kwargs.get("img_size", 160 if base == "test_vit" else 64), kwargs.get("in_chans", 3)
    x = torch.randn(2, channels, size, size)
    ours, theirs = ours.eval()(x), theirs.eval()(x)
    pairs = zip(ours, theirs, strict=True) if kwargs.get("features_only") else [(ours, theirs)]
    assert all(a.shape == b.shape for a, b in pairs)


def test_drop_rates_reach_the_modules() -> None:
    model = build("convnext_atto_sugar", drop_rate=0.3, drop_path_rate=0.2)
    assert model.head.drop.p == pytest.approx(0.3)
    assert model.stages[-1].blocks[-1].drop_path.drop_prob == pytest.approx(0.2)


@pytest.mark.parametrize("base", SMALL)
def test_device_and_dtype(base: str) -> None:
    model = build(f"{base}_sugar", device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    with torch.device("meta"):
        assert {p.device.type for p in build(f"{base}_sugar").parameters()} == {"meta"}


@pytest.mark.parametrize("base", SMALL)
def test_reset_classifier(base: str) -> None:
    model = build(f"{base}_sugar").eval()
    model.reset_classifier(5)
    assert model(images(model)).shape == (2, 5)
    model.reset_classifier(0)
    assert model(images(model)).shape == (2, model.head_hidden_size)


@pytest.mark.filterwarnings("ignore::UserWarning:timm.layers.interpolate")  # which torch finds old-fashioned
@pytest.mark.parametrize(("base", "kwargs"), [("test_vit", {}), (SWIN, SMALL_SWIN)])
def test_set_input_size_keeps_sugar(base: str, kwargs: dict[str, Any]) -> None:
    model, theirs = build(f"{base}_sugar", **kwargs).eval(), build(base, **kwargs).eval()
    before = sum(isinstance(module, SUGAR) for module in model.modules())
    model.set_input_size(img_size=(128, 96))
    theirs.set_input_size(img_size=(128, 96))
    assert shapes(model) == shapes(theirs)
    assert sum(isinstance(module, SUGAR) for module in model.modules()) == before > 0
    assert model(torch.randn(1, 3, 128, 96)).shape == (1, 1000)


@pytest.mark.parametrize("base", [*SMALL, "vgg11", SWIN])
def test_unknown_argument_is_a_type_error(base: str) -> None:
    with pytest.raises(TypeError, match="not_an_argument"):
        build(f"{base}_sugar", device="meta", not_an_argument=1)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"surrogate": "tanh"}, ValueError, "unknown surrogate 'tanh'; choose one of bsilu"),
        ({"surrogate": get_surrogate("nelu")}, TypeError, "create_model takes JSON values"),
        ({"surrogate": {"*": "tanh"}}, ValueError, "unknown surrogate 'tanh'"),
        ({"surrogate": "gelu", "alpha": 1.0}, TypeError, "'gelu' has no parameter 'alpha'"),
        ({"alpha": float("nan")}, ValueError, "alpha .* finite and 0 or more"),
        ({"alpha": -1.0}, ValueError, "alpha .* finite and 0 or more"),
        ({"alpha": "1.0"}, TypeError, "alpha .* must be a number"),
    ],
)
def test_bad_surrogate_arguments_are_refused_before_anything_is_built(
    kwargs: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.Conv2d, "__init__", lambda *_, **__: pytest.fail("a layer was built"))
    with pytest.raises(error, match=message):
        timm.create_model("resnet18_sugar", **kwargs)


def test_surrogate_may_be_chosen_by_layer_with_values_that_json_can_hold() -> None:
    by_layer = json.loads('{"layer1.*": {"surrogate": "nelu", "alpha": 0.05}, "layer[23].*": "same", "*": "gelu"}')
    model = build("test_resnet_sugar", surrogate=by_layer)
    found = {name: (m.surrogate, *m.values) for name, m in model.named_modules() if isinstance(m, SUGAR)}
    for name, settings in found.items():
        layer = name.partition(".")[0]
        assert settings == {"layer1": ("nelu", 0.05), "layer2": ("relu", 1.0), "layer3": ("relu", 1.0)}.get(
            layer, ("gelu",)
        )
    assert {settings[0] for settings in found.values()} == {"nelu", "relu", "gelu"}


def test_parameters_of_a_registered_surrogate_are_those_of_its_models_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """ResNet has an argument `zero_init_last`: a surrogate with a parameter of that name takes it from no other."""
    monkeypatch.setattr(surrogate_module, "_surrogates", dict(surrogate_module._surrogates))
    register_surrogate("mine", derivative=lambda x, zero_init_last: torch.sigmoid(x), zero_init_last=1.0)
    assert build("test_resnet_sugar", zero_init_last=False).layer1[0].bn2.weight.sum() > 0
    assert {m.surrogate for m in build("test_resnet_sugar", surrogate="mine").modules() if isinstance(m, SUGAR)} == {
        "mine"
    }


@pytest.mark.parametrize("filter", ["", "resnet18*", ["resnet18*", "swin_tiny*"], "*.nelu_*"])
@pytest.mark.parametrize("pretrained", [False, True])
def test_list_models_lists_what_timm_does_but_only_ours(filter: str | list[str], pretrained: bool) -> None:
    listed = timm_sugar.list_models(filter, pretrained=pretrained)
    everything = timm.list_models(filter, pretrained=pretrained)
    assert listed == [name for name in everything if name.split(".")[0].endswith("_sugar")]
    assert all(timm.is_model(name) for name in listed)
    assert len(timm_sugar.list_models()) > 1000


@pytest.mark.parametrize("base", SMALL)
def test_every_activation_has_the_surrogate_that_was_asked_for(base: str) -> None:
    model = build(f"{base}_sugar", surrogate="nelu", alpha=0.05)
    settings = [(m.surrogate, m.values) for m in model.modules() if isinstance(m, SUGAR)]
    assert settings
    assert all(setting == ("nelu", [0.05]) for setting in settings)


# Every activation of the base has to be found: counted by hand in the architectures' definitions.
@pytest.mark.parametrize(("base", "count"), [("resnet18", 17), ("vgg16", 15), ("convnext_tiny", 18), (SWIN, 12)])
def test_count_of_activations(base: str, count: int) -> None:
    calls = []
    model = build(f"{base}_sugar", device="meta")
    for module in model.modules():
        if isinstance(module, SUGAR):
            module.register_forward_hook(lambda *_: calls.append(1))
    model(torch.empty(2, 3, 224, 224, device="meta"))
    assert len(calls) == count


# ---- saved models ----


@pytest.mark.parametrize("base", SMALL)
def test_surrogate_comes_back_from_a_saved_config(base: str, tmp_path: Path) -> None:
    model = build(f"{base}_sugar", surrogate="nelu", alpha=0.05, num_classes=4).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == f"{base}_sugar"
    assert (config["model_args"]["surrogate"], config["model_args"]["alpha"]) == ("nelu", 0.05)
    assert not list(tmp_path.glob("*.bin"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the weights were trained with SUGAR: no word of a warm start
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert {(m.surrogate, *m.values) for m in loaded.modules() if isinstance(m, SUGAR)} == {("nelu", 0.05)}
    x = images(model)
    assert torch.equal(loaded(x), model(x))


def settings_of(model: Any) -> dict[str, Any]:
    return {name: (m.surrogate, m.values) for name, m in model.named_modules() if isinstance(m, SUGAR)}


def comes_back(model: Any, folder: Path) -> Any:
    """A model as it is after it was saved and loaded; it computes the same."""
    save_for_hf(model, folder, safe_serialization=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = images(model)
    assert torch.equal(loaded(x), model.eval()(x))
    return loaded


@pytest.mark.parametrize("arguments", [{}, {"surrogate": "elu", "num_classes": 3}])
def test_surrogates_of_a_tag_come_back_from_a_saved_config(arguments: dict[str, Any], tmp_path: Path) -> None:
    model = build("mobilenetv3_small_100_sugar.same_cifar10", **arguments)
    settings = settings_of(model)
    assert {name for name, _ in settings.values()} == ({"elu"} if arguments else {"relu", "silu"})
    assert settings_of(comes_back(model, tmp_path)) == settings


@pytest.mark.parametrize(
    "change",
    [
        lambda model: timm_sugar.set_surrogate(model, "nelu", alpha=0.05),
        lambda model: timm_sugar.set_surrogate(model, "relu", gain=1.3),
        lambda model: timm_sugar.SurrogateSchedule(model, alpha=(1.6, 0.1), updates=1).step(),
        lambda model: timm_sugar.sugarize(model, {"layer1.*": "nelu", "*": "same"}),
        lambda model: timm_sugar.replace_activations(model, lambda: SUGAR(surrogate="nelu")),
        lambda model: model.reset_classifier(7) or timm_sugar.set_surrogate(model, alpha=0.5),
    ],
)
def test_changed_surrogates_come_back_from_a_saved_config(change: Any, tmp_path: Path) -> None:
    model = build("test_resnet_sugar", alpha=0.7, num_classes=4)
    change(model)
    assert settings_of(comes_back(model, tmp_path)) == settings_of(model)


@pytest.mark.parametrize(
    "surrogate", ["nelu", "same", {"stages.1.*": "nelu", "*": {"surrogate": "bsilu", "alpha": 0.5}}]
)
def test_a_network_that_was_sugarized_by_hand_comes_back_as_relu(surrogate: Any, tmp_path: Path) -> None:
    """Its architecture alone would compute GELU; with ReLU alone its name stays, and timm loads it."""
    model = timm_sugar.sugarize(build("test_convnext", num_classes=4), surrogate)
    assert settings_of(comes_back(model, tmp_path / "sugar")) == settings_of(model)
    comes_back(timm_sugar.to_relu(model), tmp_path / "relu")
    plain = timm_sugar.sugarize(build("test_resnet", num_classes=4), "nelu")
    assert not settings_of(comes_back(plain, tmp_path / "plain"))


@pytest.mark.parametrize(("name", "part"), [("test_vit_sugar", "blocks.0"), ("test_resnet_sugar", "layer1")])
def test_what_became_relu_in_a_part_comes_back_as_relu(name: str, part: str, tmp_path: Path) -> None:
    """Where the architecture has GELU, too; the gradient is ReLU's."""
    model = build(name, num_classes=4)
    timm_sugar.to_relu(model.get_submodule(part))
    timm_sugar.set_surrogate(model, alpha=0.5)
    loaded = settings_of(comes_back(model, tmp_path))
    settings = settings_of(model)
    assert 0 < len(settings) < len(loaded)
    assert loaded == {name: settings.get(name, ("relu", [1.0])) for name in loaded}


@pytest.mark.parametrize("config", [None, {}, {"architecture": "test_convnext"}])
def test_a_model_that_timm_could_not_save_is_sugarized_all_the_same(config: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.GELU())
    model.pretrained_cfg = config  # type: ignore[assignment]
    assert list(settings_of(timm_sugar.sugarize(model, "nelu"))) == ["1"]
    assert model.pretrained_cfg == config


def test_what_sugarize_leaves_is_left_in_a_saved_model_and_undoing_it_undoes_its_name(tmp_path: Path) -> None:
    model = build("test_convnext", num_classes=4)
    with timm_sugar.sugarized(model):
        assert settings_of(comes_back(model, tmp_path / "within")) == settings_of(model)
    assert set(timm_sugar.list_activations(comes_back(model, tmp_path / "after")).values()) == {"GELUTanh"}
    timm_sugar.sugarize(model, filter_fn=lambda _, name: "stages.0" in name)
    loaded = comes_back(model, tmp_path / "part")
    assert timm_sugar.list_activations(loaded) == timm_sugar.list_activations(model)


def test_defaults_come_back_from_a_saved_config(tmp_path: Path) -> None:
    save_for_hf(build("test_vit_sugar"), tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}")
    assert {(m.surrogate, *m.values) for m in loaded.modules() if isinstance(m, SUGAR)} == {("bsilu", 1.67)}


# ---- weights ----


def saved_base(base: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """A base model with random weights in a file, and the arguments that load that file as pretrained weights."""
    kwargs = small_vgg(base)
    model = build(base, **kwargs).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # otherwise an untrained network's outputs are near zero
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
    save_file(model.state_dict(), folder / "model.safetensors")
    overlay = {"file": str(folder / "model.safetensors"), "num_classes": 3}
    return model, {**kwargs, "pretrained": True, "pretrained_cfg_overlay": overlay}


@pytest.mark.parametrize("base", RELU_NETS)
def test_weights_of_a_relu_net_give_its_outputs_bit_for_bit_and_no_warning(base: str, tmp_path: Path) -> None:
    theirs, kwargs = saved_base(base, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = timm.create_model(f"{base}_sugar", **kwargs).eval()
    x = images(theirs)
    assert theirs(x).std() > 0
    assert torch.equal(ours(x), theirs(x))
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize(("base", "activation"), OTHER_NETS.items())
def test_weights_of_another_net_load_with_a_warning_that_says_why(base: str, activation: str, tmp_path: Path) -> None:
    theirs, kwargs = saved_base(base, tmp_path)
    with pytest.warns(UserWarning, match=f"{base}_sugar: .* trained with {activation} .*needs fine-tuning") as caught:
        ours = timm.create_model(f"{base}_sugar", **kwargs).eval()
    assert len(caught) == 1
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(value, saved[key]) for key, value in ours.state_dict().items())
    x = images(theirs, 160)
    assert not torch.equal(ours(x), theirs(x))  # hence the warning


@pytest.mark.parametrize("base", OTHER_NETS)
def test_no_warning_without_weights(base: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        timm.create_model(f"{base}_sugar", device="meta")
    assert caught == []


def test_declared_sugar_tag_resolves_without_warm_start_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_base("test_vit", tmp_path)
    file = tmp_path / "model.safetensors"
    cfg = dataclasses.replace(get_pretrained_cfg("test_vit"), tag="nelu_x", hf_hub_id=None, file=str(file))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    arguments = {"surrogate": "nelu", "alpha": 0.3, "num_classes": 3}
    monkeypatch.setitem(models.SUGAR_TAGS, "test_vit_sugar.nelu_x", SugarTag("x", cfg, arguments, digest))
    tags: DefaultCfg = models._tags("test_vit_sugar", "test_vit")
    assert next(iter(tags.tags)) == get_pretrained_cfg("test_vit").tag  # the bare name stays the base's
    assert tags.cfgs["nelu_x"] == cfg
    assert "nelu_x" not in models._tags("test_vit2_sugar", "test_vit2").cfgs
    declared = {"pretrained": True, "pretrained_cfg": cfg.to_dict()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = timm.create_model("test_vit_sugar", **declared)
        other = timm.create_model("test_vit_sugar", **declared, surrogate="bsilu", drop_rate=0.5)
        random = timm.create_model("test_vit_sugar", pretrained_cfg=cfg.to_dict())
    assert torch.equal(model.norm.weight, load_file(file)["norm.weight"])
    for built, settings in ((model, ("nelu", [0.3])), (other, ("bsilu", [1.67])), (random, ("nelu", [0.3]))):
        assert {(m.surrogate, *m.values) for m in built.modules() if isinstance(m, SUGAR)} == {
            (settings[0], *settings[1])
        }


# ---- gradient ----


@pytest.mark.parametrize(
    ("base", "kwargs", "types", "settings"),
    [
        ("test_resnet", {}, (nn.ReLU,), {"surrogate": "bsilu", "alpha": 1.1}),
        # a layer scale of 1, as its usual 1e-6 hides what the activations do
        ("convnext_atto", {"ls_init_value": 1.0}, (nn.GELU, timm.layers.GELU), {"surrogate": "nelu", "alpha": 0.3}),
    ],
)
def test_gradient_of_a_built_model_in_training_is_that_of_fgi(
    base: str, kwargs: dict[str, Any], types: tuple[type, ...], settings: dict[str, Any]
) -> None:
    ours = build(f"{base}_sugar", num_classes=3, **kwargs, **settings).double().train()
    oracle = inject(build(base, num_classes=3, **kwargs).double().train(), types, **settings)
    relu = build(f"{base}_sugar", num_classes=3, **kwargs).double().train()
    timm_sugar.to_relu(relu)  # the wrong answer, to see that the comparison can tell
    gradients = []
    for model in (ours, oracle, relu):
        model.load_state_dict(ours.state_dict())
        model(images(model).double()).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)
    assert (gradients[0] - gradients[2]).norm() > 1e-3 * gradients[2].norm()


# ---- import and download, each in a process of its own ----


def run_python(code: str, **environment: str) -> str:
    """Run code in a new process, with warnings as errors; what it printed."""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_import_builds_no_model_and_touches_no_network() -> None:
    code = """
import socket, torch, timm
def forbidden(*args, **kwargs): raise AssertionError("built or connected while importing")
torch.nn.Module.__init__ = socket.socket.connect = forbidden
import timm_sugar
print(len(timm.list_models("*_sugar")))
"""
    assert int(run_python(code)) == len(REGISTERED)


class Hub(BaseHTTPRequestHandler):
    """The few answers of a Hub that a download needs: HEAD and GET of a file. No redirects, no API, only 404s."""

    files: dict[str, bytes]
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        content = self._answer()
        self.wfile.write(content)

    def _answer(self) -> bytes:
        content = self.files.get(self.path, b"")
        self.asked.append(f"{self.command} {self.path}")
        self.send_response(200 if content else 404)
        self.send_header("Content-Length", str(len(content)))
        if content:
            self.send_header("ETag", f'"{hash(self.path):x}"')
            self.send_header("X-Repo-Commit", "0" * 40)
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        return content

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, type[Hub]]]:
    """A Hub on this machine with two sets of weights of resnet18; its address, and the class that notes requests."""
    files = {}
    for seed, tag in enumerate(["a1_in1k", "tv_in1k"]):
        torch.manual_seed(seed)
        save_file(timm.create_model("resnet18").state_dict(), tmp_path / "weights")
        files[f"/timm/resnet18.{tag}/resolve/main/model.safetensors"] = (tmp_path / "weights").read_bytes()
    handler = type("HubOfTest", (Hub,), {"files": files, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_pretrained_downloads_the_bases_weights(hub: tuple[str, type[Hub]], tmp_path: Path) -> None:
    address, handler = hub
    code = """
import hashlib, timm, timm_sugar
for name in ("resnet18_sugar", "resnet18_sugar.tv_in1k"):
    print(hashlib.sha256(timm.create_model(name, pretrained=True).conv1.weight.detach().numpy().tobytes()).hexdigest())
"""
    environment = {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    printed = run_python(code, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_TELEMETRY="1", NO_PROXY="127.0.0.1", **environment)
    got = [request for request in handler.asked if request.startswith("GET /timm/")]
    assert got == [f"GET {path}" for path in handler.files]
    assert len(set(printed.split())) == 2
    expected = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        expected.append(timm.create_model("resnet18").conv1.weight.detach().numpy().tobytes())
    assert printed.split() == [hashlib.sha256(weight).hexdigest() for weight in expected]


@pytest.mark.parametrize("make", [SUGAR, partial(SUGAR, surrogate="nelu", alpha=0.3)])
def test_a_model_takes_sugar_as_its_act_layer(make: Any) -> None:
    model = build("test_resnet", act_layer=make, num_classes=3).double().eval()
    settings = {} if make is SUGAR else {"surrogate": "nelu", "alpha": 0.3}
    oracle = inject(copy.deepcopy(model), (SUGAR,), **settings)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for network in (model, oracle):
        network(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)

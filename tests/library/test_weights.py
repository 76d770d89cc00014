"""Tags of weights trained with SUGAR: where their weights come from, and that other content is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
from loopback_hub import READ, LoopbackHub, Repo
from safetensors.torch import load_file
from timm.models import save_for_hf

import timm_sugar
from timm_sugar.models._weights import describe, load_tags

TAG = "test_resnet_sugar.nelu_x"
PACKAGE = Path(timm_sugar.__file__).parent


# ---- the Hub and installed packages, each in a process of its own


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of the package with one tag, the weights in its model_cards/."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(PACKAGE, root / "timm_sugar", ignore=shutil.ignore_patterns("__pycache__"))
    arguments = {"surrogate": "nelu", "alpha": 0.3}
    folder = root / "model_cards" / TAG
    about = {"label_names": ["cat", "dog", "owl"], "sugar": {"model_args": arguments}}
    save_for_hf(timm.create_model("test_resnet", num_classes=3), folder, model_config=about, safe_serialization=True)
    tag = describe(json.loads((folder / "config.json").read_text()), folder / "model.safetensors")
    (root / "timm_sugar" / "models" / "weights.json").write_text(json.dumps({TAG: tag}))
    return root


@pytest.fixture(scope="module")
def installed(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same package alone, as in a plain installation: no model_cards/ beside it."""
    root = tmp_path_factory.mktemp("installed")
    shutil.copytree(checkout / "timm_sugar", root / "timm_sugar")
    return root


@pytest.fixture
def hub(checkout: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        server.repos[f"org/{TAG}"] = repo = Repo()
        repo.commit({path.name: path.read_bytes() for path in (checkout / "model_cards" / TAG).iterdir()})
        yield server


def run(code: str, environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, with the package that lies in `folder`."""
    return subprocess.run(
        [sys.executable, "-c", code],
        **{"env": environment, "cwd": folder, "capture_output": True, "text": True},
        **{"timeout": 300, "check": False},
    )


LOAD = f"""
import hashlib, timm, timm_sugar
model = timm.create_model("{TAG}", pretrained=True)
assert {{(m.surrogate, *m.values) for m in model.modules() if isinstance(m, timm_sugar.SUGAR)}} == {{("nelu", 0.3)}}
assert timm.create_model("{TAG}", pretrained=True, num_classes=5).num_classes == 5
assert "{TAG}" in timm.list_pretrained("test_resnet_sugar.*")
assert timm.get_pretrained_cfg("test_resnet_sugar").tag == timm.get_pretrained_cfg("test_resnet").tag
print(hashlib.sha256(model.fc.weight.detach().numpy().tobytes()).hexdigest())
"""
STOCK = f"""
import hashlib, sys, timm
model = timm.create_model("hf-hub:org/{TAG}", pretrained=True)
assert "timm_sugar" not in sys.modules and model.pretrained_cfg["label_names"][0] == "cat"
print(hashlib.sha256(model.fc.weight.detach().numpy().tobytes()).hexdigest())
"""


@pytest.fixture(scope="module")
def expected(checkout: Path) -> str:
    """Hash of the published weights of the head."""
    weight = load_file(checkout / "model_cards" / TAG / "model.safetensors")["fc.weight"].float()
    return hashlib.sha256(weight.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("content", ["[1", None])
def test_a_damaged_list_of_weights_is_an_error_that_names_the_file(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "weights.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ImportError, match=r"weights\.json is missing or damaged"):
        load_tags(path)


@pytest.mark.slow
def test_checkout_needs_no_network(hub: LoopbackHub, checkout: Path, expected: str, tmp_path: Path) -> None:
    done = run(LOAD, hub.environment(tmp_path), checkout)
    assert done.stdout.split() == [expected], done.stderr
    assert hub.requests == []


@pytest.mark.slow
@pytest.mark.parametrize("code", [LOAD, STOCK], ids=["tag", "stock"])
def test_hub_serves_an_installed_package_and_timm_alone(
    code: str, hub: LoopbackHub, installed: Path, expected: str, tmp_path: Path
) -> None:
    environment = hub.environment(tmp_path) | {"TIMM_SUGAR_ORG": "org"}
    done = run(code, environment, installed)
    assert done.stdout.split() == [expected], done.stderr
    assert f"GET /org/{TAG}/resolve/main/model.safetensors" in hub.requests
    hub.alive_for = 0
    again = run(code, environment | {"HF_HUB_OFFLINE": "1"}, installed)  # a warm cache
    assert again.stdout.split() == [expected], again.stderr


@pytest.mark.slow
def test_installed_package_lists_nothing_that_is_nowhere(hub: LoopbackHub, installed: Path, tmp_path: Path) -> None:
    code = "import timm, timm_sugar; print(timm_sugar.__file__, timm.list_pretrained('test_resnet_sugar.*'))"
    done = run(code, hub.environment(tmp_path), installed)
    assert str(installed) in done.stdout
    assert "test_resnet_sugar.r160_in1k" in done.stdout
    assert TAG not in done.stdout
    done = run(LOAD, hub.environment(tmp_path), installed)
    assert "RuntimeError: the weights of" in done.stderr.splitlines()[-1]
    assert "not on the Hub yet" in done.stderr.splitlines()[-1]
    assert "pretrained_cfg_overlay" in done.stderr.splitlines()[-1]
    assert hub.requests == []


@pytest.mark.slow
def test_installed_package_takes_the_file_that_is_named_as_train_py_of_timm_names_it(
    checkout: Path, installed: Path, hub: LoopbackHub, tmp_path: Path
) -> None:
    """`--pretrained-path FILE`: the tag's surrogate comes along, the head is new, and no network is asked."""
    file = checkout / "model_cards" / TAG / "model.safetensors"
    overlay = {"file": str(file), "num_classes": -1}
    weight = "model.layer1[0].conv1.weight"
    code = LOAD.partition("assert timm.create_model")[0] + f"print(float({weight}.sum()), model.num_classes)"
    code = code.replace("pretrained=True", f"pretrained=True, pretrained_cfg_overlay={overlay}, num_classes=5")
    done = run(code, hub.environment(tmp_path), installed)
    assert done.stdout.split() == [str(float(load_file(file)["layer1.0.conv1.weight"].sum())), "5"], done.stderr
    assert hub.requests == []


@pytest.mark.slow
@pytest.mark.parametrize("code", [LOAD, STOCK], ids=["tag", "stock"])
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "RepositoryNotFoundError"),
        ("private", "RepositoryNotFoundError"),
        ("offline and cold", "LocalEntryNotFoundError"),
    ],
)
def test_weights_that_cannot_be_had_are_an_error(
    case: str, message: str, code: str, hub: LoopbackHub, installed: Path, tmp_path: Path
) -> None:
    environment = hub.environment(tmp_path) | {"TIMM_SUGAR_ORG": "org"}
    if case == "missing":
        hub.repos.clear()
    if case == "private":
        hub.repos[f"org/{TAG}"].private = True
    if case == "offline and cold":
        environment["HF_HUB_OFFLINE"] = "1"
    done = run(code, environment, installed)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stdout == ""


@pytest.mark.slow
def test_transfer_that_breaks_off_is_resumed_and_the_result_checked(
    hub: LoopbackHub, installed: Path, expected: str, tmp_path: Path
) -> None:
    hub.truncate.add("model.safetensors")
    done = run(LOAD, hub.environment(tmp_path) | {"TIMM_SUGAR_ORG": "org"}, installed)
    assert done.stdout.split() == [expected], done.stderr
    assert [request.split()[0] for request in hub.requests if "safetensors" in request].count("GET") == 2


@pytest.mark.slow
def test_private_weights_load_with_a_token(hub: LoopbackHub, installed: Path, expected: str, tmp_path: Path) -> None:
    hub.repos[f"org/{TAG}"].private = True
    done = run(LOAD, hub.environment(tmp_path, READ) | {"TIMM_SUGAR_ORG": "org"}, installed)
    assert done.stdout.split() == [expected], done.stderr
    assert READ not in done.stderr


@pytest.mark.slow
def test_weights_with_another_content_are_refused(
    hub: LoopbackHub, checkout: Path, installed: Path, expected: str, tmp_path: Path
) -> None:
    """A file that was damaged on the way, and one that changed under the same revision: the SHA-256 tells."""
    content = bytearray((checkout / "model_cards" / TAG / "model.safetensors").read_bytes())
    content[-1] ^= 1
    environment = hub.environment(tmp_path) | {"TIMM_SUGAR_ORG": "org"}
    hub.other_content["model.safetensors"] = bytes(content)
    done = run(LOAD, environment, installed)
    assert "its SHA-256 differs" in done.stderr.splitlines()[-1]
    assert done.stdout == ""
    hub.other_content.clear()
    done = run(LOAD, environment, installed)  # the damaged file is in the cache still
    assert done.stdout.split() == [expected], done.stderr
    hub.repos[f"org/{TAG}"].commit({"model.safetensors": bytes(content)})
    done = run(LOAD, environment, installed)  # the right one is in the cache
    assert done.stdout.split() == [expected], done.stderr
    done = run(LOAD, environment | {"HF_HOME": str(tmp_path / "new")}, installed)
    assert "its SHA-256 differs" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_weights_that_are_in_the_cache_need_no_network(
    hub: LoopbackHub, installed: Path, expected: str, tmp_path: Path
) -> None:
    environment = hub.environment(tmp_path) | {"TIMM_SUGAR_ORG": "org"}
    assert run(LOAD, environment, installed).stdout.split() == [expected]
    hub.requests.clear()
    hub.alive_for = 0
    done = run(LOAD, environment, installed)
    assert done.stdout.split() == [expected], done.stderr
    assert hub.requests == []

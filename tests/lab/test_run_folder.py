"""The folder of a run: moved, renamed, forked, taken by two processes, damaged; and the SHA-256 of its checkpoints."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from lab.cli import UserError
from lab.files import read_rows, write_atomically
from lab.training import folder as folder_module
from lab.training.runs import find_checkpoint, load_file, read_checkpoint, read_summary
from lab.training.seal import check_seal
from scripting import SCRIPTS, TINY, error_line, load_script, make_images

train, evaluate = load_script("train"), load_script("evaluate")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def begun(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch, of a run that has a name."""
    out = tmp_path_factory.mktemp("begun")
    shared = ["--data-dir", str(data), *TINY, "--device", "cpu", "-b", "12", "-j", "0", "--sched", "none"]
    assert train.main([*shared, "--epochs", "1", "--model-ema", "--output", str(out), "--experiment", "old"]) == 0
    return out / "old"


@pytest.fixture
def moved(begun: Path, tmp_path: Path) -> Path:
    """The run under another name in another folder."""
    shutil.copytree(begun, tmp_path / "archive" / "new")
    return tmp_path / "archive" / "new"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def epochs(folder: Path) -> list[str]:
    return [row["epoch"] for row in read_rows(folder / "summary.csv")]


@pytest.mark.parametrize("part", ["", "last.pth.tar"])
def test_the_folder_that_is_named_is_the_one_that_is_used(begun: Path, moved: Path, part: str) -> None:
    before = contents(begun)
    assert train.main(["--resume", str(moved / part), "--epochs", "2"]) == 0
    assert epochs(moved) == ["0", "1"]
    assert load_file(moved / "last.pth.tar")["epoch"] == 1
    assert contents(begun) == before
    assert [path.name for path in moved.parent.iterdir()] == ["new"]
    args = yaml.safe_load((moved / "args.yaml").read_text())
    assert (args["output"], args["experiment"]) == (str(moved.parent), "new")


def test_a_checkpoint_says_what_it_was_made_on(begun: Path) -> None:
    ran_on = load_file(begun / "last.pth.tar")["args"].environment
    assert ran_on.keys() == {"device", "torch", "timm", "timm_sugar"}
    assert ran_on["device"].startswith("cpu, ")
    assert ran_on["torch"] == torch.__version__


def test_a_relative_path_from_inside_the_folder(moved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(moved)
    assert train.main(["--resume", ".", "--epochs", "2"]) == 0
    assert epochs(moved) == ["0", "1"]
    assert [path.name for path in moved.parent.iterdir()] == ["new"]


def test_folders_of_an_export_that_was_killed_are_gone_after_the_run_goes_on(moved: Path) -> None:
    for name in ("tmp-int8-x1y2", "tmp-float-x1y2", "mine"):
        (moved / name).mkdir()
        (moved / name / "model.onnx").write_bytes(b"x")
    assert train.main(["--resume", str(moved), "--epochs", "2"]) == 0
    assert [path.name for path in moved.iterdir() if path.is_dir()] == ["mine"]


@pytest.mark.parametrize("name", ["train.log", "tmp-args.yaml", "tmp-summary.csv", "tmp.pth.tar"])
def test_nothing_is_written_through_a_link(
    name: str, moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("precious")
    (moved / name).unlink(missing_ok=True)
    (moved / name).symlink_to(tmp_path / "mine")
    line = error_line(train.main, ["--resume", str(moved), "--epochs", "2"], capsys)
    assert f"{moved / name} is a link" in line
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_file_is_not_written_through_a_link_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "tmp-a.csv").symlink_to(tmp_path / "mine")
    write_atomically(tmp_path / "a.csv", "content")
    assert (tmp_path / "mine").read_text() == "precious"
    assert (tmp_path / "a.csv").read_text() == "content"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "mine"]


def test_two_writers_of_one_file_are_an_error_that_says_so_and_leave_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    errors: list[OSError] = []

    def attempt(content: bytes) -> OSError | None:
        try:
            write_atomically(path, content)
        except OSError as error:
            return error
        return None

    def write(content: bytes) -> None:
        errors.extend(error for _ in range(300) if (error := attempt(content)))

    threads = [threading.Thread(target=write, args=(letter * 100_000,)) for letter in (b"a", b"b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in (b"a" * 100_000, b"b" * 100_000)
    assert {error.strerror.partition(":")[0] for error in errors} <= {"another process writes this file, too"}
    assert [file.name for file in tmp_path.iterdir()] == ["a.csv"]


def test_a_file_that_another_writer_takes_away_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def too_late(source: Path, target: Path) -> None:
        replace(source, target)  # the other one's
        replace(source, target)

    monkeypatch.setattr("lab.files.os.replace", too_late)
    with pytest.raises(OSError, match="another process writes this file, too: give the command again"):
        write_atomically(tmp_path / "a.csv", "text")


def test_ctrl_c_while_a_file_is_written_leaves_the_old_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomically(tmp_path / "a.csv", "old")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lab.files.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a.csv", "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.csv", "old")]


def test_another_experiment_forks_and_says_so(moved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(moved)
    assert train.main(["--resume", str(moved), "--experiment", "fork", "--epochs", "2"]) == 0
    fork = moved.parent / "fork"
    line = "fork: new goes on in fork"
    assert line in capsys.readouterr().out
    log = (fork / "train.log").read_text()
    assert log.startswith(line)
    assert str(moved.parent) not in log  # which is published
    assert epochs(fork) == ["1"]
    assert contents(moved) == before | {".lock": b""}
    assert "exists" in error_line(train.main, ["--resume", str(moved), "--experiment", "fork", "--epochs", "2"], capsys)


def test_going_back_leaves_nothing_of_the_epochs_that_are_made_anew(
    begun: Path, moved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last epoch stands as the best. Then epoch 1 is made anew at a rate that ruins it, so the best is epoch 0."""
    first, last = load_file(begun / "last.pth.tar"), moved / "last.pth.tar"
    assert train.main(["--resume", str(moved), "--epochs", "3"]) == 0
    (moved / "model_best.pth.tar").unlink()  # a link to another checkpoint
    shutil.copyfile(last, moved / "model_best.pth.tar")
    args = ["--resume", str(moved / "checkpoint-0.pth.tar"), "--lr", "30", "--epochs", "2"]
    assert train.main(args) in (0, 3)
    assert "back to epoch 1: later checkpoints are gone" in capsys.readouterr().out
    assert not (moved / "checkpoint-2.pth.tar").exists()
    best = load_file(moved / "model_best.pth.tar")
    assert best["epoch"] == 0
    assert all(torch.equal(best["state_dict"][name], value) for name, value in first["state_dict"].items())


@pytest.mark.parametrize("undone", ["best", "checkpoints"])
def test_going_back_that_was_cut_off_is_done_by_the_next_resume(
    undone: str, begun: Path, moved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    still = ["--lr", "1e-9", "--epochs", "3"]  # so no epoch is better than the first
    assert train.main(["--resume", str(moved), *still]) == 0
    last, best = moved / "last.pth.tar", moved / "model_best.pth.tar"
    best.unlink()
    shutil.copyfile(last, best)
    back = ["--resume", str(moved / "checkpoint-1.pth.tar"), *still]

    def cut_off(path: Path, *rest: Any) -> None:
        if path.name != "args.yaml":
            raise KeyboardInterrupt
        write_atomically(path, *rest)

    with monkeypatch.context() as patch:
        if undone == "best":
            patch.setattr(folder_module, "write_atomically", cut_off)
        else:
            unlink = Path.unlink
            patch.setattr(
                Path, "unlink", lambda path, **more: cut_off(path) if "point-" in path.name else unlink(path, **more)
            )
        assert train.main(back) == 130
    assert (moved / "checkpoint-2.pth.tar").exists()
    assert train.main(["--resume", str(moved), "--lr", "30", "--epochs", "3"]) in (0, 3)
    assert load_file(best)["epoch"] == 0
    first = load_file(begun / "last.pth.tar")["state_dict"]
    assert all(torch.equal(load_file(best)["state_dict"][name], value) for name, value in first.items())


def test_a_fork_that_ended_before_its_first_checkpoint_is_not_begun_from_other_weights(
    moved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fork, argv = moved.parent / "fork", ["--resume", str(moved), "--experiment", "fork", "--epochs", "2"]

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lab.training.seal.SealedSaver.save_checkpoint", full)
        assert f"mend that, then remove {fork} and give the same command again" in error_line(train.main, argv, capsys)
    for resume in (["--resume", str(fork)], ["--resume", "auto", "--output", str(fork.parent), "--experiment", "fork"]):
        assert "ended before its first checkpoint: remove it" in error_line(train.main, resume, capsys)
    shutil.rmtree(fork)
    assert train.main(argv) == 0
    assert epochs(fork) == ["1"]


@pytest.mark.parametrize("option", ["--data-dir", "--resume", "--initial-checkpoint"])
def test_a_path_that_no_file_can_have_is_one_line(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--data-dir", ".", *TINY, "--device", "cpu", option, "x" * 300 + "/y"]
    assert "File name too long" in error_line(train.main, argv, capsys)
    assert "File name too long" in error_line(evaluate.main, ["--checkpoint", "x" * 300, "--data-dir", "."], capsys)


def test_a_fork_has_what_stands_before_its_first_epoch(moved: Path) -> None:
    for name in ("start.csv", "original.csv"):
        (moved / name).write_text(f"epoch,eval_top1\n-1,{len(name)}\n")
    assert train.main(["--resume", str(moved), "--experiment", "fork", "--epochs", "2"]) == 0
    for name in ("start.csv", "original.csv"):
        assert (moved.parent / "fork" / name).read_text() == (moved / name).read_text()


def test_another_output_alone_is_no_way_to_fork(moved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--resume", str(moved), "--epochs", "2", "--output", str(moved)]
    assert "add --experiment to continue new in another folder" in error_line(train.main, argv, capsys)
    assert train.main([*argv[:-1], str(moved.parent)]) == 0
    assert epochs(moved) == ["0", "1"]


def test_two_processes_never_train_in_one_folder(
    moved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other one is a process that holds the lock as train.py does; where it dies, the folder is free."""
    monkeypatch.setattr(folder_module, "_PATIENCE", 0.2)
    holder = (
        f"from filelock import FileLock; lock = FileLock({str(moved / '.lock')!r}); lock.acquire(); "
        "print(1, flush=True); input()"
    )
    process = subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    before = contents(moved)
    argv = ["--output", str(moved.parent), "--experiment", "new", "--resume", "auto", "--epochs", "2"]
    try:
        assert f"another process trains in {moved}" in error_line(train.main, argv, capsys)
        assert contents(moved) == before
    finally:
        process.kill()
        process.communicate()
    assert train.main(argv) == 0
    assert epochs(moved) == ["0", "1"]
    FileLock(moved / ".lock").acquire(timeout=0)  # given back


@pytest.mark.slow
def test_of_two_runs_that_begin_at_once_one_trains(data: Path, tmp_path: Path) -> None:
    argv = ["--data-dir", str(data), *TINY, "--device", "cpu", "-b", "12", "-j", "0", "--epochs", "1"]
    argv += ["--resume", "auto", "--output", str(tmp_path), "--experiment", "run"]
    command = [sys.executable, str(SCRIPTS / "train.py"), *argv]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    errors = [process.communicate(timeout=200)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], errors
    (line,) = [error for error in errors if "error" in error]
    assert "another process trains in" in line or "exists" in line or "the run is finished" in line
    assert epochs(tmp_path / "run") == ["0"]


def flip(path: Path, tensor: torch.Tensor) -> None:
    """Change one bit of a tensor in the file, where its bytes stand."""
    content = bytearray(path.read_bytes())
    place = content.index(tensor.contiguous().numpy().tobytes())
    content[place + 5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("part", ["state_dict", "state_dict_ema", "optimizer"])
def test_a_flipped_bit_is_refused_wherever_it_is(moved: Path, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = moved / "last.pth.tar"
    state = load_file(path)
    held = state["optimizer"]["state"][5] if part == "optimizer" else state[part]
    flip(path, next(value for value in held.values() if value.numel() > 9))
    message = f"{path} is not a whole checkpoint: its SHA-256 differs"
    assert message in error_line(train.main, ["--resume", str(moved), "--epochs", "2"], capsys)
    for name in ("evaluate", "diagnose", "landscape"):
        argv = ["--checkpoint", str(path), "-j", "0", "--device", "cpu"]
        assert message in error_line(load_script(name).main, argv, capsys)
    argv = ["--config", str(moved / "args.yaml"), "--experiment", "b", "--initial-checkpoint", str(path)]
    assert "its SHA-256 differs" in error_line(train.main, argv, capsys)
    path.unlink()  # the numbered one is whole
    assert train.main(["--resume", str(moved), "--epochs", "2"]) == 0


def test_a_checkpoint_without_a_digest_still_loads(moved: Path) -> None:
    """As timm's own script and older versions of this one leave them."""
    path = moved / "last.pth.tar"
    state = load_file(path)
    del state["saver"]["sha256"]
    state["state_dict"]["fc.weight"][0, 0] += 1
    torch.save(state, path)
    assert train.main(["--resume", str(moved), "--epochs", "2"]) == 0
    assert evaluate.main(["--checkpoint", str(moved), "-j", "0", "--device", "cpu"]) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(epoch=5),
        lambda state: state["args"].__setattr__("crop_pct", 0.5),
        lambda state: state["optimizer"]["param_groups"][0].update(lr=1.0),
        lambda state: state["saver"].update(best_metric=1.0),
        lambda state: state["state_dict"].pop("fc.bias"),
    ],
    ids=["epoch", "args", "rate", "saver", "missing"],
)
def test_the_digest_covers_all_that_training_goes_on_with(begun: Path, change: Any) -> None:
    state = load_file(begun / "last.pth.tar")
    check_seal(state)
    change(state)
    with pytest.raises(ValueError, match="SHA-256"):
        check_seal(state)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(brch=state.pop("arch")),
        lambda state: state.update(saves=state.pop("saver")),
        lambda state: state["saver"].update(sha257=state["saver"].pop("sha256")),
    ],
    ids=["arch", "saver", "digest"],
)
def test_a_changed_name_takes_nothing_out_of_the_check(begun: Path, change: Any) -> None:
    state = load_file(begun / "last.pth.tar")
    change(state)
    with pytest.raises(ValueError, match="other keys than were saved"):
        check_seal(state)


def test_a_name_that_is_too_long_is_one_line(begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--config", str(begun / "args.yaml"), "--output", str(tmp_path), "--experiment", 300 * "x"]
    assert "can't write to output folder" in error_line(train.main, argv, capsys)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="a device of Linux")
def test_a_run_outlives_its_terminal(begun: Path, tmp_path: Path) -> None:
    argv = ["--config", str(begun / "args.yaml"), "--output", str(tmp_path), "--experiment", "run"]
    with open("/dev/full", "w") as full:
        command = [sys.executable, str(SCRIPTS / "train.py"), *argv]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")
    assert "epoch 0 validation" in (tmp_path / "run" / "train.log").read_text()


def test_a_stray_numbered_checkpoint_is_no_traceback(moved: Path, tmp_path: Path) -> None:
    (moved / "last.pth.tar").unlink()
    (moved / "checkpoint-best.pth.tar").write_bytes((moved / "checkpoint-0.pth.tar").read_bytes())
    (moved / "checkpoint-7.pth.tar").write_bytes(b"PK half")
    assert find_checkpoint(moved) == moved / "checkpoint-0.pth.tar"
    assert train.main(["--resume", str(moved), "--epochs", "2"]) == 0
    assert epochs(moved) == ["0", "1"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("state_dict", value) for value in (None, [1], {"a": 1}, {1: torch.ones(1)})],
        *[("optimizer", value) for value in ("x", {}, {"state": {}, "param_groups": "abc"})],
        *[("epoch", value) for value in ("1", -3, 1.5, float("nan"), 10**30)],
        *[("saver", value) for value in ([1], {"checkpoint_files": 5}, {"pending": (1, "x"), "best_metric": "a"})],
        *[("arch", 5), ("state_dict_ema", [1])],
    ],
    ids=lambda value: str(value).replace(" ", "")[:20],
)
def test_odd_content_is_one_line(moved: Path, key: str, value: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = moved / "last.pth.tar"
    state = load_file(path)
    del state["saver"]["sha256"]
    torch.save(state | {key: value}, path)
    line = error_line(train.main, ["--resume", str(moved), "--epochs", "2"], capsys)
    assert str(moved) in line


@pytest.mark.parametrize("name", ["../outside.txt", "args.yaml", "last.pth.tar", "{tmp_path}/archive/outside.txt"])
def test_a_checkpoint_cannot_have_other_files_deleted(
    moved: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """timm's saver deletes what its history lists, once there are better checkpoints; a checkpoint has that history."""
    (moved.parent / "outside.txt").write_text("not of this run")
    path = moved / "last.pth.tar"
    state = load_file(path)
    del state["saver"]["sha256"]
    state["saver"]["checkpoint_files"] = [(name.format(tmp_path=tmp_path), -1.0)]
    torch.save(state, path)
    before = contents(moved)
    argv = ["--resume", str(moved), "--epochs", "2", "--checkpoint-hist", "1"]
    assert "is no checkpoint of a run" in error_line(train.main, argv, capsys)
    assert contents(moved) == before | {"args.yaml": contents(moved)["args.yaml"], ".lock": b""}
    assert (moved.parent / "outside.txt").read_text() == "not of this run"


@pytest.mark.parametrize(
    "text",
    [
        *("epoch,train_loss\n0,abc\n", "x,y\n1,2\n", "epoch,train_loss\n0\n", "epoch,train_loss\n0,1,2\n"),
        *(
            "",
            "\0" * 400,
            "<html>",
            "epoch,train_loss\n",
            "epoch,train_loss\n0,1\n0,1\n",
            "epoch,train_loss\n0,1\n2,1\n",
        ),
    ],
)
def test_a_damaged_summary_is_one_line(moved: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (moved / "summary.csv").write_text(text)
    with pytest.raises(UserError, match="damaged; mend or remove it"):
        read_summary(moved, 5)
    assert "summary.csv is damaged" in error_line(train.main, ["--resume", str(moved), "--epochs", "2"], capsys)


def test_a_file_that_cannot_take_its_place_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):  # noqa: PT011
        write_atomically(tmp_path / "folder", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_read_checkpoint_gives_is_what_was_saved(begun: Path) -> None:
    """Bit for bit what torch reads by itself."""
    state = read_checkpoint(begun / "last.pth.tar", "test_resnet_sugar")
    with torch.serialization.safe_globals([argparse.Namespace]):
        raw = torch.load(begun / "last.pth.tar", weights_only=True)
    assert all(torch.equal(weight, raw["state_dict"][name]) for name, weight in state["state_dict"].items())


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
@pytest.mark.parametrize("part", ["state_dict", "state_dict_ema"])
def test_numbers_of_another_kind_are_one_line(
    moved: Path, dtype: torch.dtype, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a checkpoint without a digest, which torch would cast in silence."""
    state = load_file(moved / "last.pth.tar")
    del state["saver"]["sha256"]
    state["state_dict_ema"] = dict(state["state_dict"])
    name = next(iter(state[part]))
    state[part][name] = state[part][name].to(dtype)
    torch.save(state, other := moved / "last.pth.tar")
    for script, *argv in (
        ("train", "--resume", str(moved), "--epochs", "2", "--model-ema"),
        ("train", "--config", str(moved / "args.yaml"), "--initial-checkpoint", str(other)),
        ("evaluate", "--checkpoint", str(other), "--device", "cpu", *(["--no-ema"] if part == "state_dict" else [])),
    ):
        if (script, argv[0], part) != ("train", "--config", "state_dict"):  # timm takes the average
            assert f"{name} is {dtype}, not torch.float32" in error_line(load_script(script).main, argv, capsys)

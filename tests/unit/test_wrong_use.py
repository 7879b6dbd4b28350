"""What is wrong is said in one line, with its exit code, and nothing is half written."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Command


def wrong(text: str) -> Callable[[Path, Path], list[object]]:
    return lambda setting, root: [part.format(s=setting, r=root) for part in text.split()]


TRAIN = "fedcunet train --data 300w --out {r}/o --size 64"
RUN = "simulations run {s} --engine loopback --out {r}/o"
WRONG = {
    "file as folder of a training": (
        "fedcunet train --data 300w --root {r} --out {r}/helen/testset/10_1.jpg --size 64",
        "10_1.jpg: expected a folder, found a file",
    ),
    "no such option": (f"{TRAIN} --epoch 3", "--epochs? (see fedcunet train --help)"),
    "no such command": ("simulations walk", "No such command 'walk'. (see simulations --help)"),
    "option without a value": ("fedcunet sizes --unets", "--unets' requires an argument"),
    "option of the wrong kind": ("fedcunet sizes --unets x", "'--unets': 'x' is not a valid int"),
    "missing option": ("fedcunet predict --out {r}/o x.png", "Missing option '--checkpoint'"),
    "missing folder": (f"{TRAIN} --root {{r}}/absent", "absent"),
    "folder without images": (f"{TRAIN} --root {{r}}/empty", "empty"),
    "bits 0": (f"{TRAIN} --root {{r}} --bits 0,1,8", "input bits: expected 2 to 16"),
    "bits 33": (f"{TRAIN} --root {{r}} --bits 8,1,33", "gradient bits: expected 2 to 16"),
    "weights at 3 bits": (f"{TRAIN} --root {{r}} --bits 8,3,8", "weight bits: expected 1"),
    "unknown data set": ("fedcunet train --data coco --root {r} --out {r}/o", "coco"),
    "unknown model": (f"{TRAIN} --root {{r}} --model vgg", "of dunet, stacked, found 'vgg'"),
    "unknown device": (f"{TRAIN} --root {{r}} --device gpu7", "gpu7"),
    "device without values": (f"{TRAIN} --root {{r}} --device meta", "meta: expected one that"),
    "unknown device to measure on": ("fedcunet memory --unets 1 --device gpu", "device gpu"),
    "bits beyond all": (f"{TRAIN} --root {{r}} --bits 8,1,{5000 * '8'}", "three whole numbers"),
    "buffer that never fills": (
        f"{RUN} --set federation.mode=buffered --set federation.buffer-size=500",
        "federation.buffer-size: expected at most",
    ),
    "codec of the downlink": (f"{RUN} --set downlink.codec=edn", "downlink.codec: unknown codec"),
    "bits of the updates": (f"{RUN} --set update.bits=99", "update.bits: bits of codec"),
    "factor beyond all": (
        f"{TRAIN} --root {{r}} --schedule 5:1e300",
        "training.schedule: expected",
    ),
    "file as run folder": (
        "simulations run {s} --engine loopback --out {r}/helen/testset/10_1.jpg",
        "expected an empty or new folder, found a file",
    ),
    "size": ("fedcunet train --data 300w --root {r} --out {r}/o --size 65", "multiple of 64"),
    "one folder for two data sets": (
        "fedcunet train --data lsp+mpii --root {r} --out {r}/o --size 64",
        "lsp+mpii: expected 2 folders",
    ),
    "no checkpoint": (
        "fedcunet evaluate --checkpoint {r}/no --data 300w --root {r}",
        "not found",
    ),
    "image as checkpoint": (
        "fedcunet evaluate --checkpoint {r}/helen/testset/10_1.jpg --data 300w --root {r}",
        "not a safetensors file",
    ),
    "unknown codec": ("fedcunet codecs --codec edn", "unknown codec 'edn'"),
    "missing setting": ("simulations run {r}/no.toml", "not found"),
    "unknown engine": ("simulations run {s} --engine spark", "expected ray or loopback"),
    "no workers": ("simulations run {s} --num-workers 0", "expected 1 or more"),
    "workers of no Ray": (f"{RUN} --num-workers 5", "loopback: expected no --num-workers, found 5"),
    "GPUs of no Ray": (f"{RUN} --num-gpus 3", "loopback: expected no --num-gpus, found 3"),
    "address of no Ray": (f"{RUN} --ray-address a:1", "expected no --ray-address, found a:1"),
    "data without root": (f"{RUN} --data 300w", "expected --root DIR"),
    "more clients than photos": (f"{RUN} --clients 500", "500"),
    "rounds": (f"{RUN} --rounds 0", "federation.rounds: expected 1"),
    "availability drawn for real clients": (
        "server run {s} --folder {r}/no --set federation.availability=true",
        "federation.availability: expected false outside of python -m simulations",
    ),
    "nothing to resume": (f"{RUN} --resume", "expected a run to resume, found none"),
    "no run": ("simulations report {r}", "no run"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_one_line_and_exit_code_2(
    command: Command, tiny_setting: Path, tiny_root: Path, case: str
) -> None:
    (tiny_root / "empty").mkdir()
    text, said = WRONG[case]
    program, *arguments = wrong(text)(tiny_setting, tiny_root)
    code, out, err = command(str(program), *arguments)
    last = err.strip().splitlines()[-1]
    assert (code, said in last) == (2, True), err
    assert last.startswith(f"{program}: ")
    assert out == ""
    assert "Traceback" not in err
    assert "Usage" not in err
    assert not (tiny_root / "o" / "metrics.jsonl").exists()


def test_a_pts_with_67_points_is_named(command: Command, tiny_root: Path) -> None:
    path = tiny_root / "helen/trainset/1_1.pts"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:40], *lines[41:]]))
    arguments = ["--data", "300w", "--root", tiny_root, "--out", tiny_root / "o"]
    code, _, err = command("fedcunet", "train", *arguments)
    assert code == 2
    assert "1_1.pts" in err
    assert "67" in err


def test_a_truncated_image_is_named(command: Command, tiny_root: Path) -> None:
    path = tiny_root / "helen/trainset/1_1.jpg"
    path.write_bytes(path.read_bytes()[:300])
    arguments = ["--data", "300w", "--root", tiny_root, "--out", tiny_root / "o", "--size", 64]
    arguments += ["--unets", 1, "--order", 0, "--epochs", 1]
    code, _, err = command("fedcunet", "train", *arguments)
    assert code == 2
    assert "1_1.jpg: expected a whole JPEG image" in err


def test_a_run_folder_that_is_taken_is_left_alone(
    command: Command, tiny_setting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "a:1")  # which is no option of a person who says loopback
    out = tmp_path / "taken"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    code, _, err = command("simulations", "run", tiny_setting, "--engine", "loopback", "--out", out)
    assert code == 2
    assert "expected an empty or new folder" in err
    assert [file.name for file in out.iterdir()] == ["mine.txt"]


def test_workers_that_do_not_fit_into_memory_are_refused(
    command: Command, tiny_setting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simulations.ray_session.free_memory_bytes", lambda: 2 * 10**9)
    code, _, err = command("simulations", "run", tiny_setting, "--num-workers", 64)
    assert code == 1
    assert "64 workers need about" in err
    assert "2.0 GB free: use --num-workers 1" in err


def test_ctrl_c_is_one_line_and_exit_code_130(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedcunet.commands.codecs.gaussian_vector", interrupt)
    code, out, err = command("fedcunet", "codecs")
    assert (code, out, err.strip()) == (130, "", "fedcunet: interrupted")


def test_a_refused_setting_leaves_no_folder(
    command: Command, tiny_setting: Path, tmp_path: Path
) -> None:
    buffered = ["--set", "federation.mode=buffered", "--set", "federation.buffer-size=500"]
    out = tmp_path / "run"
    code, _, _ = command(
        "simulations", "run", tiny_setting, "--engine", "loopback", "--out", out, *buffered
    )
    assert (code, out.exists()) == (2, False)


def test_a_client_that_is_refused_and_an_image_left_out_are_said_while_the_run_goes_on(
    command: Command,
    tiny_setting: Path,
    tiny_root: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    paths = sorted((tiny_root / "helen/trainset").glob("*.jpg"))
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:200])
    code, _, _ = command(
        "simulations", "run", tiny_setting, "--engine", "loopback", "--out", tmp_path / "run"
    )
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"train: helen/trainset: no image to {paths[0].stem}.pts; left out" in said
    assert [line for line in said if "round 1, client" in line and str(paths[1]) in line]
    assert code == 0

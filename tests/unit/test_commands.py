"""The command lines as a person uses them: results, exit codes, one line for what is wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from fedcunet.config import RunConfig
from fedcunet.data import FACE68
from fedcunet.data.images import read_image, write_image
from fedcunet.training.checkpoint import save_checkpoint
from fedcunet.training.evaluation import Evaluation, evaluate
from fedcunet.training.network import build_network
from tests.conftest import Command


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["data", "--help"],
        ["sizes", "--help"],
        ["predict", "--help"],
    ],
    ids=" ".join,
)
def test_help_explains_every_option(command: Command, arguments: list[str]) -> None:
    code, out, _ = command("fedcunet", *arguments)
    assert code == 0
    assert "Usage" in out


def test_sizes_are_the_papers(command: Command) -> None:
    code, out, _ = command("fedcunet", "sizes", "--unets", 16, "--bits", "32,1,32", "--json")
    sizes = json.loads(out)
    assert code == 0
    assert sizes["conv_parameters"] == 15_919_488
    assert round(sizes["bytes_float32"] / 2**20, 1) == 62.3
    # Weights at one bit; first and last convolutions in float16, two bytes a channel of BatchNorm.
    assert sizes["bytes_packed"] == pytest.approx(1.99e6 + 2 * 51_584 + 2 * 102_000, rel=0.02)


def test_a_single_unet_needs_no_order(command: Command) -> None:
    code, out, _ = command("fedcunet", "sizes", "--unets", 1, "--json")
    assert (code, json.loads(out)["conv_parameters"] > 0) == (0, True)
    assert command("fedcunet", "sizes", "--unets", 1, "--order", 1)[0] == 2


def test_training_then_evaluating_then_predicting(
    command: Command, tiny_root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "training"
    arguments = ["--data", "300w", "--root", tiny_root, "--unets", 1, "--order", 0, "--size", 64]
    arguments += ["--epochs", 1, "--batch-size", 4, "--bits", "8,2,8", "--out", out, "--json"]
    code, text, _ = command("fedcunet", "train", *arguments)
    assert code == 0
    assert json.loads(text)["epochs"] == 1
    checkpoint = out / "best.safetensors"
    code, text, _ = command(
        "fedcunet",
        "evaluate",
        "--checkpoint",
        checkpoint,
        "--data",
        "300w",
        "--root",
        tiny_root,
        "--json",
    )
    result = json.loads(text)
    assert code == 0
    assert result["images"] == 2
    assert len(result["per_landmark"]) == 68
    assert result["boxes"] == "square landmark box x 1.25"
    assert result["nme_percent"] == pytest.approx(sum(result["per_landmark"]) / 68, rel=1e-3)
    pictures = tmp_path / "pictures"
    code, text, _ = command(
        "fedcunet", "predict", tiny_root / "helen/testset", "--checkpoint", checkpoint,
        "--out", pictures, "--json",
    )  # fmt: skip
    points = json.loads(text)
    assert code == 0
    assert sorted(points) == ["10_1.jpg", "11_1.jpg"]
    assert len(points["10_1.jpg"]) == 68
    assert sorted(file.name for file in pictures.iterdir()) == [
        "10_1.png",
        "11_1.png",
        "points.json",
    ]


def test_a_checkpoint_of_mpii_is_evaluated_on_lsp_and_not_on_faces(
    command: Command, tiny_root: Path, tmp_path: Path
) -> None:
    people, out = tmp_path / "people", tmp_path / "training"
    arguments = ["--out", people, "--num-train", 6, "--num-test", 3, "--processes", 1]
    assert command("fedcunet", "data", "make", "people", *arguments)[0] == 0
    arguments = ["--root", people, "--unets", 1, "--order", 0, "--size", 64, "--epochs", 1]
    assert command("fedcunet", "train", "--data", "people", *arguments, "--out", out)[0] == 0
    joints = np.random.default_rng(0).uniform(60, 200, (14, 3, 4))
    joints[:, 2] = 1
    savemat(tmp_path / "joints.mat", {"joints": joints})
    (tmp_path / "images").mkdir()
    pictures = sorted((people / "images").iterdir())
    for number, picture in enumerate(pictures[:4], start=1):
        shutil.copy(picture, tmp_path / "images" / f"im{number:05d}.jpg")
    arguments = ["--checkpoint", out / "best.safetensors", "--json", "--root"]
    code, text, err = command(
        "fedcunet",
        "evaluate",
        "--data",
        "lspet",
        "--subset",
        "all",
        *arguments,
        tmp_path,
        "--flip-test",
    )
    result = json.loads(text)
    assert code == 0
    assert result["images"] == 4
    assert len(result["per_landmark"]) == 14
    assert result["mean_shape_percent"] >= 0
    assert 0 <= result["joint_mean_percent"] <= 100
    assert list(result["joints_percent"]) == [
        "head",
        "shoulder",
        "elbow",
        "wrist",
        "hip",
        "knee",
        "ankle",
    ]
    ankle = (result["per_landmark"][0] + result["per_landmark"][5]) / 2
    assert result["joints_percent"]["ankle"] == pytest.approx(ankle, abs=1e-3)
    assert result["boxes"] == "square landmark box x 1.5"
    assert "trained on mpii16; of its 16 landmarks the 14 of lsp14 are scored" in err
    code, text, err = command("fedcunet", "evaluate", "--data", "300w", *arguments, tiny_root)
    assert code == 2
    assert text == ""
    assert "trained on mpii16, 300w has face68" in err


@pytest.fixture
def untrained(tmp_path: Path) -> Path:
    """A checkpoint of a small face network as it begins."""
    config = RunConfig().replace(model__unets=1, model__order=0)
    path = tmp_path / "untrained.safetensors"
    save_checkpoint(path, build_network(config, 68), config, FACE68)
    return path


def test_predict_gives_the_points_of_the_picture_that_viewers_show(
    command: Command, tmp_path: Path, untrained: Path, generator: np.random.Generator
) -> None:
    noise_HW3 = generator.integers(0, 256, (90, 60, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored picture is shown turned by a quarter to the right
    (tmp_path / "in").mkdir()
    Image.fromarray(noise_HW3).save(tmp_path / "in" / "phone.jpg", exif=exif)
    upright_HW3 = read_image(tmp_path / "in" / "phone.jpg", oriented=True)
    write_image(tmp_path / "in" / "upright.png", upright_HW3)
    for options in ([], ["--box", "10,5,40,40"], ["--flip-test"]):
        code, text, _ = command(
            "fedcunet", "predict", tmp_path / "in", "--checkpoint", untrained,
            "--out", tmp_path / "out", "--json", *options,
        )  # fmt: skip
        points = json.loads(text)
        assert code == 0
        assert points["phone.jpg"] == points["upright.png"]
    picture_HW3 = read_image(tmp_path / "out" / "phone.png")
    assert picture_HW3.shape[0] < picture_HW3.shape[1]
    assert (picture_HW3 == read_image(tmp_path / "out" / "upright.png")).all()


def test_predict_never_writes_over_the_images_it_reads(
    command: Command, tmp_path: Path, untrained: Path
) -> None:
    image = tmp_path / "in" / "a.png"
    write_image(image, np.zeros((20, 20, 3), dtype=np.uint8))
    before = image.read_bytes()
    code, _, err = command(
        "fedcunet", "predict", image, "--checkpoint", untrained, "--out", image.parent / "." / "."
    )
    assert (code, "expected another folder than that of the images" in err) == (2, True)
    assert image.read_bytes() == before
    assert [path.name for path in image.parent.iterdir()] == ["a.png"]


def test_predict_draws_into_no_folder_of_images(
    command: Command, tmp_path: Path, untrained: Path
) -> None:
    write_image(tmp_path / "in" / "a.jpg", np.zeros((20, 20, 3), dtype=np.uint8))
    source = tmp_path / "in"
    code, _, err = command(
        "fedcunet", "predict", source, "--checkpoint", untrained, "--out", source
    )
    assert (code, "expected another folder" in err) == (2, True)
    assert [path.name for path in source.iterdir()] == ["a.jpg"]


@pytest.mark.parametrize(
    "box",
    [
        *("20,0,5,5", "0,20,5,5", "-5,0,5,5", "0,-5,5,5", "nan,0,5,5", "9,9,-5,5"),
        *("0,0,1e300,1e300", "0,0,1e-300,5", "-1e308,0,1.5e308,1e308"),
    ],
)
def test_predict_refuses_a_box_outside_the_image(
    command: Command, tmp_path: Path, untrained: Path, box: str
) -> None:
    image = tmp_path / "a.png"
    write_image(image, np.zeros((20, 20, 3), dtype=np.uint8))
    code, out, err = command(
        "fedcunet", "predict", image, "--checkpoint", untrained, "--out", tmp_path / "o",
        f"--box={box}",
    )  # fmt: skip
    assert (code, out) == (2, "")
    assert f"--box {box}: expected a box that meets {image}, 20x20 pixels" in err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp]\nDefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    ],
    ids=["python", "cpu", "cuda"],
)
def test_out_of_memory_is_one_line(
    command: Command, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("fedcunet.commands.machine.build_network", fail)
    code, _, said = command("fedcunet", "sizes")
    assert code == 1
    assert said.strip() == " ".join(f"fedcunet: out of memory: {error}".split()).rstrip(": ")
    assert said.count("\n") == 1


def test_a_folder_that_cannot_be_made_is_one_line(
    command: Command, tmp_path: Path, untrained: Path
) -> None:
    image = tmp_path / "a.png"
    write_image(image, np.zeros((20, 20, 3), dtype=np.uint8))
    code, out, err = command(
        "fedcunet", "export", "--checkpoint", untrained, "--format", "safetensors",
        "--out", image / "x.safetensors",
    )  # fmt: skip
    assert (code, out) == (1, "")
    assert err.strip().splitlines()[-1].startswith(f"fedcunet: {image}")
    assert "Traceback" not in err


def test_the_rate_of_a_joint_that_nobody_has_is_null(
    command: Command,
    tiny_root: Path,
    untrained: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nobody_has_the_first(*arguments: object, **options: object) -> Evaluation:
        found = evaluate(*arguments, **options)  # type: ignore[arg-type]
        found.per_landmark_K[0] = np.nan
        return found

    monkeypatch.setattr("fedcunet.commands.evaluate.evaluate_network", nobody_has_the_first)
    arguments = ["--checkpoint", untrained, "--data", "300w", "--root", tiny_root, "--json"]
    code, text, _ = command("fedcunet", "evaluate", *arguments)
    assert code == 0
    assert "NaN" not in text
    assert json.loads(text)["per_landmark"][0] is None


def test_faces_without_eye_distance_are_left_out_and_a_set_of_such_is_refused(
    command: Command, tiny_root: Path, untrained: Path
) -> None:
    arguments = ["--checkpoint", untrained, "--data", "300w", "--root", tiny_root, "--json"]
    paths = sorted((tiny_root / "helen/testset").glob("*.pts"))
    for number, path in enumerate(paths, start=1):
        lines = path.read_text().splitlines()
        lines[3 + 45] = lines[3 + 36]
        path.write_text("\n".join(lines))
        code, text, err = command("fedcunet", "evaluate", *arguments)
        assert err.count("coincide (10_1.jpg") == 1
        if number < len(paths):
            found = json.loads(text)
            assert (found["images"], found["images_left_out"]) == (2, 1)
            assert 0 < found["nme_percent"] < 1000
            assert "NaN" not in text
            assert "Infinity" not in text
    assert (code, text) == (2, "")
    said = "300w subset 'test': expected images that can be scored, with outer eye corners"
    assert said in err
    options = ["--unets", 1, "--order", 0, "--size", 64, "--out", tiny_root / "o"]
    code, _, err = command("fedcunet", "train", *arguments[2:], *options)
    assert (code, said in err, (tiny_root / "o").exists()) == (2, True, False)


def test_evaluate_takes_the_flip_test(command: Command, tiny_root: Path, untrained: Path) -> None:
    arguments = ["--checkpoint", untrained, "--data", "300w", "--root", tiny_root, "--json"]
    found = [
        json.loads(command("fedcunet", "evaluate", *arguments, *options)[1])["nme_percent"]
        for options in ([], ["--flip-test"])
    ]
    assert found[0] != found[1]


def test_training_says_once_that_there_is_no_tensorboard(
    command: Command, tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedcunet.commands.train.has_tensorboard", lambda: False)
    monkeypatch.setattr("fedcunet.training.training_log.has_tensorboard", lambda: False)
    arguments = ["--data", "300w", "--root", tiny_root, "--unets", 1, "--order", 0, "--size", 64]
    arguments += ["--epochs", 2, "--batch-size", 4, "--out", tmp_path / "out", "--json"]
    code, text, err = command("fedcunet", "train", *arguments)
    result = json.loads(text)
    assert code == 0
    assert err.count("TensorBoard") == 1
    assert "left" in err
    assert result["best_nme_percent"] <= result["nme_percent"]


def test_checks_find_this_machine_in_order(command: Command) -> None:
    code, out, _ = command("fedcunet", "checks", "--json")
    found = {check["name"]: check for check in json.loads(out)["checks"]}
    assert found["torch"]["found"].startswith("2.13.0")
    assert found["training step 8-1-8"]["found"] == "finite"
    assert (code == 0) == json.loads(out)["ok"]

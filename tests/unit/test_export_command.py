"""`fedcunet export`, and `evaluate` and `predict` on what it writes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedcunet.config import RunConfig
from fedcunet.data import FACE68
from fedcunet.training.checkpoint import load_checkpoint, save_checkpoint, tensors_sha256
from fedcunet.training.network import build_network
from tests.conftest import Command

CONFIG = RunConfig().replace(model__unets=1, model__order=0, quant__bits="8,1,8", quant__alpha=True)
PARTS = {"weights", "alpha", "batchnorm", "end_layers", "header"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, build_network(CONFIG, 68), CONFIG, FACE68, {"epoch": "1"})
    return path


def test_a_packed_file_is_evaluated_and_predicts(
    command: Command, checkpoint: Path, make_300w: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "network.fcpk"
    code, text, said = command(
        "fedcunet", "export", "--checkpoint", checkpoint, "--out", out, "--json"
    )
    result = json.loads(text)
    assert code == 0
    assert set(result) == {"bytes", "bytes_by_part", "format"}
    assert result["format"] == "packed"
    assert set(result["bytes_by_part"]) == PARTS
    assert result["bytes"] == sum(result["bytes_by_part"].values()) == out.stat().st_size
    assert "1 bit a weight" in said
    assert "at 8 bits" in said
    assert [file.name for file in out.parent.iterdir()] == [out.name]
    root = make_300w({"helen/testset": ["1_1.jpg", "2_1.jpg"]})
    code, text, _ = command(
        "fedcunet", "evaluate", "--checkpoint", out, "--data", "300w", "--root", root, "--json"
    )
    assert code == 0
    assert json.loads(text)["images"] == 2
    images = root / "helen/testset"
    code, text, _ = command(
        "fedcunet", "predict", images, "--checkpoint", out, "--out", tmp_path / "pictures", "--json"
    )
    assert code == 0
    assert sorted(json.loads(text)) == ["1_1.jpg", "2_1.jpg"]


def test_plain_weights_come_back_unchanged(
    command: Command, checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "plain.safetensors"
    arguments = ["--checkpoint", checkpoint, "--out", out, "--format", "safetensors", "--json"]
    code, text, _ = command("fedcunet", "export", *arguments)
    result = json.loads(text)
    assert code == 0
    assert result["bytes"] == sum(result["bytes_by_part"].values()) == out.stat().st_size
    assert set(result["bytes_by_part"]) == PARTS
    assert 0 < result["bytes_by_part"]["header"] < 20_000
    before, after = load_checkpoint(checkpoint), load_checkpoint(out)
    assert tensors_sha256(before.model) == tensors_sha256(after.model)
    assert (before.config, before.facts) == (after.config, after.facts)


def test_a_packed_file_can_be_written_as_plain_weights(
    command: Command, checkpoint: Path, tmp_path: Path
) -> None:
    packed, plain = tmp_path / "a.fcpk", tmp_path / "b.safetensors"
    command("fedcunet", "export", "--checkpoint", checkpoint, "--out", packed)
    code, text, _ = command(
        "fedcunet", "export", "--checkpoint", packed, "--out", plain, "--format", "safetensors"
    )
    assert code == 0
    assert "hidden convolutions" in text
    assert tensors_sha256(load_checkpoint(packed).model) == tensors_sha256(
        load_checkpoint(plain).model
    )


def test_more_bits_make_a_larger_file(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    sizes = []
    for bits in (4, 8, 16):
        out = tmp_path / f"{bits}.fcpk"
        command(
            "fedcunet", "export", "--checkpoint", checkpoint, "--out", out, "--vector-bits", bits
        )
        sizes.append(out.stat().st_size)
    assert sizes == sorted(set(sizes))


def test_weights_that_no_setting_quantises_are_halves(command: Command, tmp_path: Path) -> None:
    config = CONFIG.replace(quant__bits="32,32,32", quant__alpha=False)
    path, out = tmp_path / "model.safetensors", tmp_path / "model.fcpk"
    save_checkpoint(path, build_network(config, 68), config, FACE68)
    code, text, said = command("fedcunet", "export", "--checkpoint", path, "--out", out, "--json")
    assert code == 0
    assert "weights: float16" in said
    assert json.loads(text)["bytes"] == pytest.approx(path.stat().st_size / 2, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--format", "onnx"], "--format: expected packed or safetensors, found 'onnx'"),
        (["--vector-bits", "3"], "expected 4 to 16, found 3"),
        (["--format", "safetensors", "--vector-bits", "8"], "--vector-bits: expected with"),
        (["--out", "{d}"], "expected a file, found a folder"),
        (["--out", "{c}"], "expected another file than the checkpoint"),
        (["--checkpoint", "{d}/no"], "not found"),
    ],
)
def test_wrong_use_is_one_line(
    command: Command, checkpoint: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    before = checkpoint.read_bytes()
    given = ["--checkpoint", str(checkpoint), "--out", str(tmp_path / "x"), *arguments]
    filled = [part.format(d=tmp_path, c=checkpoint) for part in given]
    code, out, err = command("fedcunet", "export", *filled)
    assert (code, said in err) == (2, True), err
    assert err.startswith("fedcunet: ")
    assert len(err.strip().splitlines()) == 1
    assert out == ""
    assert checkpoint.read_bytes() == before
    assert not (tmp_path / "x").exists()


def test_a_damaged_file_is_one_line(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "network.fcpk"
    command("fedcunet", "export", "--checkpoint", checkpoint, "--out", out)
    content = bytearray(out.read_bytes())
    content[len(content) // 2] ^= 1
    out.write_bytes(bytes(content))
    code, text, err = command(
        "fedcunet", "predict", tmp_path, "--checkpoint", out, "--out", tmp_path / "p"
    )
    assert (code, text) == (2, "")
    assert f"packed network {out}: damaged" in err

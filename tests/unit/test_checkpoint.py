"""Checkpoints: what they give back, what is refused, the bytes of a network."""

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fedcunet.data import FACE68
from fedcunet.errors import UserError
from fedcunet.training.checkpoint import (
    float32_bytes,
    load_checkpoint,
    model_bytes,
    save_checkpoint,
    tensors_sha256,
)
from fedcunet.training.network import (
    build_network,
    network_layout,
)
from fedcunet.training.packed import pack_network
from tests.made_networks import SMALL as CONFIG


def test_model_bytes_are_the_length_of_the_exported_file(tmp_path: Path) -> None:
    model = build_network(CONFIG, 68)
    float32 = 4 * network_layout(model).num_parameters
    assert model_bytes(model, CONFIG, FACE68) == len(pack_network(model, CONFIG, FACE68).content)
    assert model_bytes(model, CONFIG, FACE68) < float32 / 10
    unquantised = CONFIG.replace(quant__bits="32,32,32", quant__alpha=False)
    plain = build_network(unquantised, 68)
    assert model_bytes(plain, unquantised, FACE68) == float32_bytes(plain) == float32


def test_checkpoint_gives_network_and_setting_back(tmp_path: Path) -> None:
    model = build_network(CONFIG, 68)
    path = tmp_path / "deep" / "model.safetensors"
    save_checkpoint(path, model, CONFIG, FACE68, {"round": "3"})
    loaded = load_checkpoint(path)
    assert tensors_sha256(loaded.model) == tensors_sha256(model)
    assert loaded.config == CONFIG
    assert loaded.scheme == FACE68
    assert loaded.facts == {"round": "3"}
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_same_network_is_the_same_file_each_time(tmp_path: Path) -> None:
    model, files = build_network(CONFIG, 68), set()
    for number in range(8):  # safetensors alone has 24 orders of the metadata
        path = tmp_path / f"{number}.safetensors"
        save_checkpoint(path, model, CONFIG, FACE68, {"round": "3", "größe": "ä"})
        files.add(path.read_bytes())
    assert len(files) == 1
    assert load_checkpoint(path).facts == {"round": "3", "größe": "ä"}
    assert int.from_bytes(files.pop()[:8], "little") % 8 == 0  # tensors stay aligned


def test_files_that_are_no_checkpoints_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="not found"):
        load_checkpoint(path)
    path.write_bytes(b"no")
    with pytest.raises(UserError, match="not a safetensors file"):
        load_checkpoint(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"expected format fedcunet\.checkpoint\.v1"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("config", None, "config, found nothing"),
        ("config", "{", "config, found '{'"),
        ("facts", "[]", "facts, found '[]'"),
        ("config", 200_000 * "[", "config, found '[[["),
    ],
)
def test_a_checkpoint_with_odd_metadata_is_refused_in_a_line(
    tmp_path: Path, key: str, value: str | None, found: str
) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, build_network(CONFIG, 68), CONFIG, FACE68)
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del metadata[key]
    save_file(tensors, path, metadata | ({} if value is None else {key: value}))
    with pytest.raises(
        UserError, match=re.escape(f"{path}: expected a JSON object as its {found}")
    ):
        load_checkpoint(path)
    with pytest.raises(UserError, match="expected a file, found a folder"):
        load_checkpoint(tmp_path)

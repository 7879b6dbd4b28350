"""The command `export`: a trained network as a file for others, small or plain."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedcunet.commands.options import CheckpointOption, JsonOption
from fedcunet.errors import UserError
from fedcunet.files import write_atomically
from fedcunet.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fedcunet.training.network import state_tensors
from fedcunet.training.packed import default_vector_bits, pack_network, weight_format

FORMATS = ("packed", "safetensors")
PART_NAMES = {
    "weights": "hidden convolutions",
    "alpha": "alpha",
    "batchnorm": "BatchNorm",
    "end_layers": "first and last convolutions",
    "header": "header and setting",
}


def export(
    checkpoint: CheckpointOption,
    out: Annotated[Path, typer.Option("--out", help="The file to write.")],
    file_format: Annotated[
        str, typer.Option("--format", help="packed: small; safetensors: plain float32.")
    ] = "packed",
    vector_bits: Annotated[
        int | None,
        typer.Option(
            "--vector-bits",
            help="packed: of each value of alpha and BatchNorm, 4 to 16; where absent, 8, or 16 "
            "in a network without quantised weights.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Writes a checkpoint's network in another form, which evaluate and predict take as well.

    packed is for inference: weights at 1 bit (binary) or 1.6 bits (ternary), or in float16 where
    the setting does not quantise them; alpha and BatchNorm, folded into a scale and a shift, at
    --vector-bits; first and last convolutions in float16. The latent weights are not kept:
    training cannot go on from it.
    """
    if file_format not in FORMATS:
        raise UserError(f"--format: expected {' or '.join(FORMATS)}, found '{file_format}'")
    if vector_bits is not None and file_format != "packed":
        raise UserError(f"--vector-bits: expected with --format packed, found '{file_format}'")
    if out.is_dir():
        raise UserError(f"--out {out}: expected a file, found a folder")
    loaded = load_checkpoint(checkpoint)
    if out.exists() and out.samefile(checkpoint):
        raise UserError(f"--out {out}: expected another file than the checkpoint")
    console = Console(stderr=True, highlight=False)
    if file_format == "packed":
        packed = pack_network(
            loaded.model, loaded.config, loaded.scheme, loaded.facts, vector_bits=vector_bits
        )
        write_atomically(out, packed.content)
        parts = packed.bytes_by_part
        bits = default_vector_bits(loaded.config) if vector_bits is None else vector_bits
        console.print(
            f"weights: {weight_format(loaded.config)}; alpha and BatchNorm at {bits} bits; "
            "first and last convolutions in float16",
            soft_wrap=True,
        )
    else:
        save_checkpoint(out, loaded.model, loaded.config, loaded.scheme, loaded.facts)
        parts = _float32_parts(loaded, out.stat().st_size)
    result = {"bytes": sum(parts.values()), "bytes_by_part": parts, "format": file_format}
    if as_json:
        print(json.dumps(result))
        return
    table = Table(title=f"{out}: {result['bytes']:,} bytes", box=None, show_header=False)
    for name, count in parts.items():
        table.add_row(PART_NAMES[name], f"{count:,}")
    Console().print(table)


def _float32_parts(loaded: Checkpoint, file_bytes: int) -> dict[str, int]:
    """Bytes of a checkpoint file by what they hold; they add up to the file."""
    ends = set(loaded.model.end_layers())  # type: ignore[operator]
    parts = dict.fromkeys(("weights", "alpha", "batchnorm", "end_layers"), 0)
    for name, tensor in state_tensors(loaded.model).items():
        hidden = "weights" if tensor.dim() == 4 else "batchnorm"
        part = "end_layers" if name.rpartition(".")[0] in ends else hidden
        parts[part] += 4 * tensor.numel()
    return parts | {"header": file_bytes - sum(parts.values())}

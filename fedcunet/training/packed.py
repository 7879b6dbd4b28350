"""Networks in small files for inference: weights at 1 or 1.6 bits, the rest at a few bits.

    header        36 bytes, little-endian, `_HEADER` below
    setting       zlib of compact JSON: configuration, landmark scheme, facts
    weights       hidden convolutions: signs, one bit each; or trits, five in a byte; or float16
                  where the setting has no quantised weights
    alpha         a vector a convolution with its filters' scales, where the setting has them
    BatchNorm     two vectors a layer
    end layers    first and last convolutions, and what else there may be, in float16
    checksum      8 bytes, BLAKE2b of all that stands before it

Weights of one kind are one stream in the order of the network's state, vectors are coded as in
`fedcunet/packed.py`; `packed_parts.py` says what becomes of each. All lengths follow from the
setting and two counts in the header, and are checked before anything is allocated.
"""

import hashlib
import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from fedcunet.config import RunConfig
from fedcunet.data import SCHEMES, LandmarkScheme
from fedcunet.errors import UserError
from fedcunet.packed import MAX_VECTOR_BITS, MIN_VECTOR_BITS
from fedcunet.quant.layers import FULL
from fedcunet.training.network import (
    build_network,
    make_network,
    network_layout,
    state_tensors,
)
from fedcunet.training.packed_parts import Plan, decode_body, encode_body

MAGIC = b"FCPK"
VERSION = 1
_HEADER = struct.Struct("<4sBBHIQII8s")  # the fields of `_Header`
_CHECKSUM_BYTES = 8
_MAX_SETTING_BYTES = 2**16  # of the JSON, unpacked
_MAX_FILE_BYTES = 2**31


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """A file's bytes, and how many of them are what."""

    content: bytes
    bytes_by_part: dict[str, int]  # they add up to the file


@dataclass(frozen=True, kw_only=True, slots=True)
class Unpacked:
    """A network from a packed file."""

    model: nn.Module
    config: RunConfig
    scheme: LandmarkScheme
    facts: dict[str, str]


class _Header(NamedTuple):
    """The fields of a file's header as they came, none of them trusted."""

    magic: bytes
    version: int
    bits: int  # of each value of alpha and BatchNorm
    zero: int
    setting_bytes: int
    body_bytes: int  # weights to end layers
    apart_alpha: int  # values of alpha that stand apart from their vectors' grids
    apart_norms: int  # the same of BatchNorm
    layout_id: bytes

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole file."""
        return _HEADER.size + self.setting_bytes + self.body_bytes + _CHECKSUM_BYTES


def default_vector_bits(config: RunConfig) -> int:
    """Bits of alpha and BatchNorm where nobody names any: 8; 16 beside weights in float16."""
    return 16 if config.quant.spec().weight_bits == FULL else 8


def weight_format(config: RunConfig) -> str:
    """In words, what becomes of the hidden convolutions' weights."""
    return {
        1: "1 bit a weight (signs)",
        2: "1.6 bits a weight (five trits in a byte)",
        FULL: "float16, since the setting does not quantise them",
    }[config.quant.spec().weight_bits]


def pack_network(
    model: nn.Module,
    config: RunConfig,
    scheme: LandmarkScheme,
    facts: Mapping[str, str] | None = None,
    *,
    vector_bits: int | None = None,
) -> Packed:
    """A network of `build_network` as the bytes of a packed file.

    Args:
        model: the network.
        config: its setting.
        scheme: its landmarks.
        facts: whatever else the file is to say, such as the epoch.
        vector_bits: of each value of alpha and BatchNorm, 4 to 16; `default_vector_bits` if None.

    Raises:
        UserError: values of the network are not finite, or too large for float16.
    """
    bits = default_vector_bits(config) if vector_bits is None else vector_bits
    _check_vector_bits(bits)
    for name, tensor in state_tensors(model).items():
        if not bool(tensor.isfinite().all()):
            raise UserError(f"network: '{name}' has values that are not finite")
    encoded = encode_body(Plan(model, config, bits))
    text = json.dumps(
        {"config": config.nested(), "scheme": scheme.name, "facts": dict(facts or {})},
        separators=(",", ":"),
    )
    setting = zlib.compress(text.encode(), 9)
    if len(text.encode()) > _MAX_SETTING_BYTES:
        raise UserError(f"setting: expected at most {_MAX_SETTING_BYTES} bytes as JSON")
    body = b"".join(encoded.parts.values())
    header = _HEADER.pack(
        *_Header(
            magic=MAGIC,
            version=VERSION,
            bits=bits,
            zero=0,
            setting_bytes=len(setting),
            body_bytes=len(body),
            apart_alpha=encoded.apart_alpha,
            apart_norms=encoded.apart_norms,
            layout_id=network_layout(model).layout_id,
        )
    )
    content = header + setting + body
    return Packed(
        content=content + _checksum(content),
        bytes_by_part={name: len(part) for name, part in encoded.parts.items()}
        | {"header": len(header) + len(setting) + _CHECKSUM_BYTES},
    )


def unpack_network(content: bytes, where: str = "packed network") -> Unpacked:
    """The network of `pack_network`.

    Args:
        content: the whole file.
        where: what messages begin with.

    Raises:
        UserError: the bytes are not whole, or not those of a packed network.
    """
    try:
        header, setting, body = _open(content)
        config, scheme, facts = _read_setting(setting, where)
        # The file's weights are those of the forward pass, scales included: no latent ones.
        config = config.replace(quant__latent="float32")
        with torch.device("meta"):
            bare = make_network(config.model, scheme.num_landmarks)
        lengths = Plan(bare, config, header.bits).lengths(header.apart_alpha, header.apart_norms)
        if network_layout(bare).layout_id != header.layout_id:
            raise ValueError("its tensors are not those that its setting has in this version")
        if sum(lengths.values()) != len(body):
            raise ValueError(f"expected {sum(lengths.values())} bytes of body, found {len(body)}")
        model = build_network(config, scheme.num_landmarks)
        model.load_state_dict(
            decode_body(body, lengths, Plan(model, config, header.bits)), strict=False
        )
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(where) else f"{where}: {text}") from None
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    return Unpacked(model=model, config=config, scheme=scheme, facts=facts)


def _check_vector_bits(bits: int) -> None:
    if not MIN_VECTOR_BITS <= bits <= MAX_VECTOR_BITS:
        raise UserError(
            f"bits of alpha and BatchNorm: expected {MIN_VECTOR_BITS} to {MAX_VECTOR_BITS}, "
            f"found {bits}"
        )


def is_packed(path: Path) -> bool:
    """Whether the file begins as packed networks do; False where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_packed(path: Path, where: str) -> bytes:
    """The bytes of a packed file, read if its length is the one that its header states."""
    try:
        with path.open("rb") as file:
            begin = file.read(_HEADER.size)
            found = path.stat().st_size
            stated = _HEADER.size + _CHECKSUM_BYTES
            if len(begin) == _HEADER.size:
                stated = _Header._make(_HEADER.unpack(begin)).file_bytes
            if found != stated or found > _MAX_FILE_BYTES:
                raise UserError(f"{where}: expected {stated} bytes, found {found}")
            return begin + file.read(stated - _HEADER.size)
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from None


def _checksum(content: bytes | memoryview) -> bytes:
    return hashlib.blake2b(content, digest_size=_CHECKSUM_BYTES).digest()


def _open(content: bytes) -> tuple[_Header, bytes, bytes]:
    """Header, setting and body of a file that is whole. Raises ValueError if it is not."""
    smallest = _HEADER.size + _CHECKSUM_BYTES
    if len(content) < smallest:
        raise ValueError(f"expected {smallest} bytes or more, found {len(content)}")
    header = _Header._make(_HEADER.unpack_from(content))
    if header.magic != MAGIC:
        raise ValueError(f"expected a file that begins with {MAGIC!r}, found {header.magic!r}")
    if header.version != VERSION or header.zero:
        raise ValueError(f"expected version {VERSION} of packed files, found {header.version}")
    if header.file_bytes != len(content):
        raise ValueError(f"expected {header.file_bytes} bytes, found {len(content)}")
    if _checksum(memoryview(content)[:-_CHECKSUM_BYTES]) != content[-_CHECKSUM_BYTES:]:
        raise ValueError("damaged: its checksum does not agree with its bytes")
    _check_vector_bits(header.bits)
    start = _HEADER.size + header.setting_bytes
    return header, content[_HEADER.size : start], content[start:-_CHECKSUM_BYTES]


def _read_setting(setting: bytes, where: str) -> tuple[RunConfig, LandmarkScheme, dict[str, str]]:
    """Configuration, scheme and facts. Raises ValueError if `setting` does not hold them."""
    unzip = zlib.decompressobj()
    try:
        text = unzip.decompress(setting, _MAX_SETTING_BYTES)
        if not unzip.eof or unzip.unused_data:
            raise ValueError("too long or not whole")
        values = json.loads(text)
    except (zlib.error, ValueError, RecursionError) as error:
        raise ValueError(f"its setting cannot be read ({error})") from None
    if not isinstance(values, dict) or set(values) != {"config", "scheme", "facts"}:
        raise ValueError("its setting: expected config, scheme and facts")
    config, name, facts = values["config"], values["scheme"], values["facts"]
    if not isinstance(name, str) or name not in SCHEMES:
        raise ValueError(f"landmarks: expected one of {', '.join(SCHEMES)}, found {name!r}")
    if not isinstance(config, dict) or not isinstance(facts, dict):
        raise ValueError("its setting: expected tables of config and facts")
    facts = {key: str(value) for key, value in facts.items()}
    return RunConfig.from_nested(config, where), SCHEMES[name], facts

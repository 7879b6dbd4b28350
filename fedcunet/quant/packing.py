"""Codes of a few bits side by side in bytes, along the rows of a map (its pixels and channels).

A row's codes are taken in as many equal groups as codes share bytes, so that every operation below
runs over long stretches of neighbouring bytes, and any rows of a map can be cut out of the packed
form. A number of codes that does not divide is filled up.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

WIDTHS = (2, 4, 6, 8)  # bits per code when packed; others are stored in the next width, or in 16


def width_of(bits: int) -> int:
    """Bits that a code of `bits` bits takes in memory."""
    return next((width for width in WIDTHS if width >= bits), 16)


def packed_row(values: int, width: int) -> int:
    """Bytes of a row of so many codes."""
    quarter = -(-values // 4)
    return {2: quarter, 4: -(-values // 2), 6: 3 * quarter, 8: values}[width]


def pack_rows(codes_nhWC: Tensor, width: int) -> Tensor:
    """Codes of 2, 4 or 6 bits (uint8, contiguous) in bytes: uint8 (n, h, packed_row(W·C, width)).

    Multiples of a power of two are added, modulo 256: what is shifted beyond a byte is gone.
    """
    codes_nhV = codes_nhWC.flatten(2)
    groups = 2 if width == 4 else 4
    missing = -codes_nhV.shape[-1] % groups
    if missing:
        codes_nhV = F.pad(codes_nhV, (0, missing))
    parts = codes_nhV.chunk(groups, dim=-1)
    if width == 4:
        return torch.add(parts[0], parts[1], alpha=16)
    if width == 2:
        packed = torch.add(parts[0], parts[1], alpha=4)
        return packed.add_(parts[2], alpha=16).add_(parts[3], alpha=64)
    # 6 bits: each byte takes a code of the first three groups and 2 bits of one of the fourth.
    quarter, last = parts[0].shape[-1], parts[3]
    packed = codes_nhV.new_empty(*codes_nhV.shape[:2], 3 * quarter)
    for place, part, shift in zip(packed.chunk(3, dim=-1), parts, (0, 2, 4), strict=False):
        torch.add(part, last >> shift if shift else last, alpha=64, out=place)
    return packed


def unpack_rows(packed_nhv: Tensor, width: int, values: int) -> Tensor:
    """The uint8 codes (n, h, values) of `pack_rows`, W·C values a row; a new tensor."""
    if width == 4:
        return torch.cat([packed_nhv & 15, packed_nhv >> 4], -1)[..., :values]
    if width == 2:
        parts = [packed_nhv & 3, packed_nhv >> 2 & 3, packed_nhv >> 4 & 3, packed_nhv >> 6]
        return torch.cat(parts, -1)[..., :values]
    quarter = packed_nhv.shape[-1] // 3
    codes = packed_nhv.new_empty(*packed_nhv.shape[:2], 4 * quarter)
    torch.bitwise_and(packed_nhv, 63, out=codes[..., : 3 * quarter])
    first, second, third = (packed_nhv >> 6).chunk(3, dim=-1)
    last = codes[..., 3 * quarter :]
    torch.add(first, second, alpha=4, out=last).add_(third, alpha=16)
    return codes[..., :values]

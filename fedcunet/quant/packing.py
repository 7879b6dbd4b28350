"""Codes of a few bits side by side in bytes, along the last dimension of a map (channels).

Channels are taken in as many equal groups as codes share bytes, so that every operation below runs
over neighbouring bytes, and any pixels of a map can be cut out of the packed form. A number of
channels that does not divide is filled up.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

WIDTHS = (2, 4, 6, 8)  # bits per code when packed; others are stored in the next width, or in 16


def width_of(bits: int) -> int:
    """Bits that a code of `bits` bits takes in memory."""
    return next((width for width in WIDTHS if width >= bits), 16)


def packed_channels(channels: int, width: int) -> int:
    """Bytes of `channels` codes of one pixel."""
    quarter = -(-channels // 4)
    return {2: quarter, 4: -(-channels // 2), 6: 3 * quarter, 8: channels}[width]


def pack_channels(codes_nhWC: Tensor, width: int) -> Tensor:
    """Codes of 2, 4 or 6 bits (uint8) in bytes: uint8 (n, h, W, packed_channels(C, width))."""
    groups = 2 if width == 4 else 4
    missing = -codes_nhWC.shape[-1] % groups
    if missing:
        codes_nhWC = F.pad(codes_nhWC, (0, missing))
    parts = codes_nhWC.chunk(groups, dim=-1)
    if width == 4:
        return (parts[1] << 4).bitwise_or_(parts[0])
    if width == 2:
        packed = (parts[3] << 6).bitwise_or_(parts[0])
        return packed.bitwise_or_(parts[1] << 2).bitwise_or_(parts[2] << 4)
    # 6 bits: each byte takes a code of the first three groups and 2 bits of one of the fourth.
    quarter, last = parts[0].shape[-1], parts[3]
    packed = codes_nhWC[..., : 3 * quarter].contiguous()
    for number, shift in enumerate((0, 2, 4)):
        place = packed[..., number * quarter : (number + 1) * quarter]
        place.bitwise_or_((last >> shift if shift else last) << 6)
    return packed


def unpack_channels(packed_nhWc: Tensor, width: int, channels: int) -> Tensor:
    """The uint8 codes (n, h, W, channels) of `pack_channels`; a new tensor."""
    if width == 4:
        return torch.cat([packed_nhWc & 15, packed_nhWc >> 4], -1)[..., :channels]
    if width == 2:
        parts = [packed_nhWc & 3, packed_nhWc >> 2 & 3, packed_nhWc >> 4 & 3, packed_nhWc >> 6]
        return torch.cat(parts, -1)[..., :channels]
    quarter = packed_nhWc.shape[-1] // 3
    codes = packed_nhWc.new_empty(*packed_nhWc.shape[:-1], 4 * quarter)
    torch.bitwise_and(packed_nhWc, 63, out=codes[..., : 3 * quarter])
    high = packed_nhWc >> 6
    first, second, third = high.chunk(3, dim=-1)
    last = second.bitwise_left_shift_(2).bitwise_or_(third.bitwise_left_shift_(4))
    torch.bitwise_or(first, last, out=codes[..., 3 * quarter :])
    return codes[..., :channels]

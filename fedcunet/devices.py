"""Device profiles: what a phone, a tablet, a laptop can compute, hold and send.

A simulation runs every client on the same processor. A profile turns what was measured there
(seconds of compute, bytes of the blobs) into the seconds that the round would take on the
client's own device. `docs/devices.md` says where each figure comes from and what is left out.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from fractions import Fraction

from fedcunet.errors import UserError


@dataclass(frozen=True)
class DeviceProfile:
    """One kind of device.

    Attributes:
        name: The name used in a fleet string.
        memory_bytes: Main memory of the device, in bytes; a training process gets part of it.
        uplink_bytes_per_second: Sustained rate from the device to the server.
        downlink_bytes_per_second: Sustained rate from the server to the device.
        relative_speed: Training speed against the reference CPU core, the one that measured the
            compute: 0.5 takes twice as long.
        availability: Probability, in (0, 1], that the device answers in a round it is asked for.
    """

    name: str
    memory_bytes: int
    uplink_bytes_per_second: float
    downlink_bytes_per_second: float
    relative_speed: float
    availability: float

    @property
    def training_bytes(self) -> int:
        """What a training process may take of the memory."""
        return int(TRAINING_SHARE * self.memory_bytes)

    def __post_init__(self) -> None:
        positive = {
            "memory_bytes": self.memory_bytes,
            "uplink_bytes_per_second": self.uplink_bytes_per_second,
            "downlink_bytes_per_second": self.downlink_bytes_per_second,
            "relative_speed": self.relative_speed,
        }
        for key, value in positive.items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"device {self.name!r}: {key} is {value}, must be above 0")
        if not 0 < self.availability <= 1:
            raise ValueError(
                f"device {self.name!r}: availability is {self.availability}, must be in (0, 1]"
            )


@dataclass(frozen=True)
class DeviceTime:
    """Seconds that one client's round takes on its device; `total` is the sum of the others."""

    compute: float
    downlink: float
    uplink: float
    total: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", self.compute + self.downlink + self.uplink)


_GIB = 2**30

# Of a device's memory, what a training process may take: an assumption, as the rest is the
# system's and other programs'.
TRAINING_SHARE = 0.5


def _bytes_per_second(megabits_per_second: float) -> float:
    """Network rates are published in 10^6 bits a second."""
    return megabits_per_second * 1e6 / 8


def _profile(
    name: str, gib: int, up: float, down: float, speed: float, availability: float
) -> DeviceProfile:
    """A profile from GiB of memory and Mbit/s of uplink and downlink."""
    return DeviceProfile(
        name, gib * _GIB, _bytes_per_second(up), _bytes_per_second(down), speed, availability
    )


# Rates and availability: docs/devices.md, with sources. Columns: memory in GiB, uplink and
# downlink in Mbit/s, speed against the reference core, availability.
PROFILES: dict[str, DeviceProfile] = {
    profile.name: profile
    for profile in (
        _profile("phone-low", 2, 2.0, 5.9, 0.25, 0.84),  # 3G
        _profile("phone-mid", 4, 7.6, 29.5, 0.5, 0.90),  # 4G
        _profile("phone-high", 12, 14.7, 129.9, 1.0, 0.91),  # 5G
        _profile("tablet", 6, 45.7, 85.7, 0.7, 0.92),  # Wi-Fi on a fixed line
        _profile("laptop", 16, 45.7, 85.7, 1.5, 0.92),  # Wi-Fi on a fixed line
        _profile("edge-gpu", 16, 940.0, 940.0, 8.0, 0.99),  # gigabit Ethernet, embedded GPU
    )
}

# A mix of profiles with their shares, in the order of the string.
Fleet = tuple[tuple[DeviceProfile, Fraction], ...]

_SHARE = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
_MEMORY = re.compile(r"([1-9][0-9]{0,5})(MB|GB|MiB|GiB)")
_UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": _GIB}


def kind_of(name: str) -> str:
    """The profile's name in a device's: `phone-low` in `phone-low@900MB`."""
    return name.partition("@")[0]


def profile_named(name: str) -> DeviceProfile:
    """The profile of that name; `phone-low@900MB` is `phone-low` with so much memory.

    Raises:
        UserError: There is none (the line lists those that exist), or the memory is none.
    """
    kind, at, memory = name.partition("@")
    if kind not in PROFILES:
        known = ", ".join(PROFILES)
        raise UserError(f"unknown device profile {kind!r}; there are {known}")
    if not at:
        return PROFILES[kind]
    found = _MEMORY.fullmatch(memory)
    if found is None:
        raise UserError(
            f"device {name!r}: expected its memory as a whole number of {', '.join(_UNITS)}, such "
            f"as {kind}@900MB, found {memory!r}"
        )
    return replace(PROFILES[kind], name=name, memory_bytes=int(found[1]) * _UNITS[found[2]])


def availability_of(name: str) -> float:
    """The probability that such a device answers; 1 for a name that no profile has."""
    profile = PROFILES.get(kind_of(name))
    return 1.0 if profile is None else profile.availability


def parse_fleet(text: str) -> Fleet:
    """The profiles and shares of a fleet string such as `"phone-low@900MB:1,phone-mid:2"`.

    A share is a positive decimal number, 1 where none is given; only their ratios matter.

    Raises:
        UserError: An empty fleet, an unknown or repeated profile, or a share that is none.
    """
    fleet: list[tuple[DeviceProfile, Fraction]] = []
    for entry in text.split(","):
        name, colon, share = (part.strip() for part in entry.partition(":"))
        if not name:
            raise UserError(
                f"fleet {text!r}: an entry without a name; expected 'profile:share,profile:share'"
            )
        profile = profile_named(name)
        if any(profile == other for other, _ in fleet):
            raise UserError(f"fleet {text!r}: profile {name!r} is given twice")
        share = share if colon else "1"
        if not _SHARE.fullmatch(share) or Fraction(share) == 0:
            raise UserError(
                f"fleet {text!r}: share of {name!r} must be a positive number, found {share!r}"
            )
        fleet.append((profile, Fraction(share)))
    return tuple(fleet)


def assign(fleet: Fleet, num_clients: int, seed: int) -> list[DeviceProfile]:
    """The profile of each client, by client id 0 … `num_clients` - 1.

    The counts are those of the largest remainder method: each profile gets the whole part of its
    quota, the clients left go to the largest fractions (the earlier profile on a tie). Which
    client gets which device depends on `seed` alone, by a hash, so it is the same everywhere.

    Raises:
        UserError: No profile, or no client.
    """
    if num_clients < 1:
        raise UserError(f"a fleet needs at least 1 client, found {num_clients}")
    whole = sum((share for _, share in fleet), Fraction(0))
    if whole <= 0:
        raise UserError("a fleet needs at least one profile")
    quotas = [share / whole * num_clients for _, share in fleet]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(fleet)), key=lambda i: (counts[i] - quotas[i], i))
    for i in by_remainder[: num_clients - sum(counts)]:
        counts[i] += 1
    devices = [
        profile for (profile, _), count in zip(fleet, counts, strict=True) for _ in range(count)
    ]
    order = sorted(range(num_clients), key=lambda client: _rank(seed, client))
    return [device for _, device in sorted(zip(order, devices, strict=True), key=lambda p: p[0])]


def _rank(seed: int, client: int) -> bytes:
    """Pseudo-random position of a client: a hash, as the order must not depend on a library."""
    return hashlib.sha256(f"fedcunet fleet {seed} {client}".encode()).digest()


def device_time(
    profile: DeviceProfile, compute_seconds: float, bytes_down: int, bytes_up: int
) -> DeviceTime:
    """Seconds on the device for compute measured on the reference core and for bytes sent.

    Download, compute and upload follow each other; latency and protocol overhead are left out.

    Raises:
        ValueError: A negative or not finite amount.
    """
    for key, value in (
        ("compute_seconds", compute_seconds),
        ("bytes_down", bytes_down),
        ("bytes_up", bytes_up),
    ):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{key} is {value}, must be a finite number, 0 or more")
    return DeviceTime(
        compute=compute_seconds / profile.relative_speed,
        downlink=bytes_down / profile.downlink_bytes_per_second,
        uplink=bytes_up / profile.uplink_bytes_per_second,
    )


def too_small(devices: list[DeviceProfile], needed_bytes: int) -> list[DeviceProfile]:
    """The devices whose share for training is less than what a training process was seen to take.

    Args:
        devices: the clients' devices.
        needed_bytes: high-water mark of such a process (`fedcunet.measured.StepNeed`).
    """
    return [device for device in devices if needed_bytes > device.training_bytes]


def describe(devices: list[DeviceProfile]) -> str:
    """The fleet in words, in the order of the table: "2 phone-low, 4 phone-mid"."""
    counts, order = Counter(devices), list(PROFILES)
    kinds = sorted(counts, key=lambda one: (order.index(kind_of(one.name)), one.memory_bytes))
    return ", ".join(f"{counts[kind]} {kind.name}" for kind in kinds)

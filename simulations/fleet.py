"""What the devices of a simulation can hold: said, or led down the ladder of the setting."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping

from clients.fitting import NEEDED_KEY, RUNG_KEY, STAYS_OUT_KEY
from fedcunet.config import RunConfig, Scalar
from fedcunet.config.device_bits import parse_device_bits
from fedcunet.config.ladder import rung_texts
from fedcunet.data import load
from fedcunet.devices import (
    TRAINING_SHARE,
    DeviceProfile,
    assign,
    describe,
    kind_of,
    parse_fleet,
    too_small,
)
from fedcunet.errors import RunFailure
from fedcunet.ladder import Place, TooSmall, climb
from fedcunet.measured import NotMeasured, step_need

# Where the devices of a fleet train, or why they do not, by their names.
Places = Mapping[str, Place | TooSmall]


def devices_of(config: RunConfig) -> list[DeviceProfile]:
    """The device of each client of the setting."""
    return assign(parse_fleet(config.federation.fleet), config.federation.clients, config.seed)


def growth_bytes(config: RunConfig) -> int:
    """What the largest training step of the setting's clients takes beyond the process before it.

    Raises:
        RunFailure: it could not be measured, or no client has a device that holds one.
    """
    if config.federation.ladder:
        places = places_of(config).values()
        return max(place.growth_bytes for place in places if isinstance(place, Place))
    return step_need(config, _num_landmarks(config)).growth_bytes


def node_values(config: RunConfig) -> list[dict[str, Scalar]]:
    """What each virtual client finds of its device in its node's config.

    On standard error it says which devices could not hold the training process: they train all
    the same; or, where the setting has a ladder, who trains on which rung.

    Raises:
        RunFailure: no client has a device that holds the training process.
    """
    devices = devices_of(config)
    _warn_of_bits_without_effect(devices, config)
    if not config.federation.ladder:
        _warn_of_small_devices(devices, config)
        return [{"device": device.name} for device in devices]
    places = places_of(config)
    _say_places(devices, places, config)
    return [{"device": device.name, **_values(places[device.name])} for device in devices]


@functools.lru_cache(maxsize=8)
def places_of(config: RunConfig) -> Places:
    """Where on the setting's ladder the devices of its clients train.

    Raises:
        RunFailure: none of them trains anywhere.
    """
    places: dict[str, Place | TooSmall] = {}
    # The largest first: then a rung that one of them needs is measured when it is its turn.
    for device in sorted(set(devices_of(config)), key=lambda one: (-one.memory_bytes, one.name)):
        try:
            places[device.name] = climb(
                config, _num_landmarks(config), device.training_bytes, who=device.name
            )
        except TooSmall as reason:
            places[device.name] = reason
    if not any(isinstance(place, Place) for place in places.values()):
        raise RunFailure(f"no client can take part: {next(iter(places.values()))}")
    return places


def _values(place: Place | TooSmall) -> dict[str, Scalar]:
    if isinstance(place, TooSmall):
        return {STAYS_OUT_KEY: str(place)}
    return {RUNG_KEY: place.rung, NEEDED_KEY: place.needed_bytes}


@functools.lru_cache(maxsize=8)
def _num_landmarks(config: RunConfig) -> int:
    data = config.data
    return load(data.name, data.root, data.train_subset, boxes=data.boxes).scheme.num_landmarks


def _say_places(devices: list[DeviceProfile], places: Places, config: RunConfig) -> None:
    """A line for each rung that is taken; who stays out is said when the run begins."""
    texts = ["the setting itself", *rung_texts(config.federation.ladder)]
    for rung, text in enumerate(texts):
        on_rung = {
            name: place
            for name, place in places.items()
            if isinstance(place, Place) and place.rung == rung
        }
        if on_rung:
            needed = next(iter(on_rung.values())).needed_bytes / 1e6
            who = describe([device for device in devices if device.name in on_rung])
            print(f"ladder: {who} on rung {rung} ({text}): {needed:.0f} MB", file=sys.stderr)


def _warn_of_bits_without_effect(devices: list[DeviceProfile], config: RunConfig) -> None:
    kinds = {kind_of(device.name) for device in devices}
    for name in parse_device_bits(config.update.bits_by_device):
        if name not in kinds:
            print(f"update.bits-by-device: no client is on a {name}", file=sys.stderr)


def _warn_of_small_devices(devices: list[DeviceProfile], config: RunConfig) -> None:
    """Says so on standard error if devices of the fleet could not hold the training process."""
    try:
        needed = step_need(config, _num_landmarks(config)).resident_bytes
    except NotMeasured:
        return  # the summary says so
    small = too_small(devices, needed)
    if small:
        print(
            f"fleet: too small for a training process of {needed / 1e9:.2f} GB (measured; a "
            f"device gives it {TRAINING_SHARE:.0%} of its memory): {describe(small)}",
            file=sys.stderr,
        )

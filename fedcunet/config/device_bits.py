"""Bits of the updates by device: a slow uplink can be given fewer."""

from fedcunet.devices import profile_named
from fedcunet.errors import UserError

KEY = "update.bits-by-device"


def parse_device_bits(text: str) -> dict[str, float]:
    """Bits by the profile's name in a text such as `"phone-low:1,phone-mid:2"`; none if empty.

    Raises:
        UserError: an unknown or repeated profile, or bits that are no number.
    """
    bits: dict[str, float] = {}
    for entry in text.split(",") if text.strip() else []:
        name, _, value = (part.strip() for part in entry.partition(":"))
        try:
            number = float(value)
        except ValueError:
            raise UserError(
                f"{KEY}: expected profile:bits,profile:bits, found '{entry.strip()}'"
            ) from None
        if "@" in name:
            raise UserError(f"{KEY}: expected a profile without its memory, found '{name}'")
        try:
            profile_named(name)
        except UserError as error:
            raise UserError(f"{KEY}: {error}") from None
        if name in bits:
            raise UserError(f"{KEY}: profile '{name}' is given twice")
        bits[name] = number
    return bits

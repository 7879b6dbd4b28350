"""The ladder of thriftier settings that small devices take: how it is written, what a rung changes.

Rungs are parted by semicolons, the changes of one rung by spaces:
`"storage=packed; storage=frugal; bits=6,1,6 batch-size=half"`. Each keeps what the rungs before it
have changed. Only what stays on a client's own machine may change: how activations wait for the
backward pass, their bits and those of their gradients, the batch size. The network and the bits of
its weights are the same for all, so that updates can be averaged.
"""

from dataclasses import replace
from typing import get_args, get_type_hints

from fedcunet.config.local import QuantConfig, TrainingConfig
from fedcunet.errors import UserError

Rung = tuple[tuple[str, str], ...]  # its changes: key, value

KEYS = ("storage", "bits", "batch-size")
STORAGES: tuple[str, ...] = get_args(get_type_hints(QuantConfig)["storage"])
MAX_RUNGS = 16


def rung_texts(ladder: str) -> list[str]:
    """The rungs as they were written; none of an empty ladder."""
    return [" ".join(part.split()) for part in ladder.split(";")] if ladder.strip() else []


def parse_ladder(ladder: str) -> list[Rung]:
    """The rungs of a ladder.

    Raises:
        UserError: a rung without a change, an unknown key, or too many rungs.
    """
    texts = rung_texts(ladder)
    if len(texts) > MAX_RUNGS:
        raise UserError(
            f"federation.ladder: expected at most {MAX_RUNGS} rungs, found {len(texts)}"
        )
    return [_parse_rung(text, number) for number, text in enumerate(texts, start=1)]


def _parse_rung(text: str, number: int) -> Rung:
    changes: dict[str, str] = {}
    for change in text.split() or [""]:
        key, equals, value = change.partition("=")
        if key not in KEYS or not equals or not value or key in changes:
            raise UserError(
                f"federation.ladder, rung {number}: expected changes of {', '.join(KEYS)} such as "
                f"'storage=frugal bits=6,1,6 batch-size=half', each key once, found '{text}'"
            )
        changes[key] = value
    return tuple(changes.items())


def climb_rung(
    quant: QuantConfig, training: TrainingConfig, rung: Rung
) -> tuple[QuantConfig, TrainingConfig]:
    """The sections with the changes of a rung.

    Raises:
        UserError: a value that the section refuses, or other bits of the weights.
    """
    for key, value in rung:
        if key == "storage":
            quant = _with_storage(quant, value)
        elif key == "bits":
            quant = _with_bits(quant, value)
        else:
            training = replace(training, batch_size=_batch_size(training.batch_size, value))
    return quant, training


def _with_storage(quant: QuantConfig, value: str) -> QuantConfig:
    if value not in STORAGES:
        raise UserError(f"storage: expected one of {', '.join(STORAGES)}, found '{value}'")
    return replace(quant, storage=value)  # type: ignore[arg-type]


def _with_bits(quant: QuantConfig, value: str) -> QuantConfig:
    changed = replace(quant, bits=value)
    wanted = quant.spec().weight_bits
    if changed.spec().weight_bits != wanted:
        raise UserError(
            f"bits: expected {wanted} for the weights as in quant.bits, or updates could not be "
            f"averaged, found '{value}'"
        )
    return changed


def _batch_size(before: int, value: str) -> int:
    if value == "half":
        return max(1, before // 2)
    if not value.isdecimal():
        raise UserError(f"batch-size: expected half or a whole number, found '{value}'")
    return int(value)

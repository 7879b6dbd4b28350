"""The bytes of one update: one blob with a header, two coded bodies and a checksum.

    header     52 bytes, little-endian (payload_header.py)
    main body  all tensors that are not `fine`, as one vector, by the update's codec
    fine body  the `fine` tensors (BatchNorm, first and last convolutions), by `fine_codec`
    checksum   8 bytes, BLAKE2b of all that stands before it

Nothing is trusted: `admit` checks every length before anything is allocated, never raises, and
gives a reason for what it refuses. `len(blob)` is the measured size of an update.

Seeds: the header holds the run's seed, the round and the sender, and both bodies' seeds are hashed
from these (`make_seed`). So a payload of a plain vector is decoded from its file alone, a client's
rotation is its own, and a server refuses a payload that claims another run.

A codec with a budget (`Codec.budget`) meets the mean `bits` over the whole payload, header, fine
tensors and checksum included: the main body gets what the others leave.

The decoded update, also what its own client takes to compute an error-feedback residual
(`decode_own`), is made by the same function on both sides.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedcunet.codecs import get_codec
from fedcunet.codecs.base import noise_known, sum_of_squares
from fedcunet.errors import UserError
from fedcunet.expected import CHECKSUM_BYTES, HEADER_BYTES, Expected
from fedcunet.layout import Layout
from fedcunet.payload_header import (
    WIRE_IDS,
    Header,
    Reason,
    Rejection,
    checksum,
    header_bytes,
    read_header,
)


class Refused(ValueError):
    """A payload that was admitted turned out to be one that no encoder makes."""

    def __init__(self, rejection: Rejection) -> None:
        super().__init__(f"{rejection.reason}: {rejection.detail}")
        self.rejection = rejection


@dataclass(frozen=True, slots=True)
class Admitted:
    """A payload that passed every check and is still coded."""

    blob: bytes
    expected: Expected
    main_bytes: int

    def decode(self, reference: np.ndarray | None = None) -> np.ndarray:
        """The update as one float32 vector in layout order; else as `decode_bodies`."""
        return self.expected.layout.scatter(*self.decode_bodies(reference))

    def decode_bodies(self, reference: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The values (float32) that are not fine and those that are; they are not checked yet.

        Args:
            reference: The prediction that the sender used, in layout order.

        Raises:
            Refused: No encoder makes these bytes. Nothing else is raised, whatever the bytes.
        """
        try:
            main, fine = (kind.decode(body, reference) for kind, body in self._kinds())
            return main, fine
        except Exception as error:
            raise Refused(Rejection("undecodable", f"{type(error).__name__}: {error}")) from error

    def noise(
        self, bodies: Sequence[np.ndarray], reference: np.ndarray | None = None
    ) -> np.ndarray:
        """What coding is expected to have added: sums of squares, a number a tensor (float64).

        Zero for tensors whose codec cannot tell.

        Args:
            bodies: As `decode_bodies` gave them.
            reference: As it was given there.
        """
        layout = self.expected.layout
        noise_T, is_fine_T = np.zeros(len(layout.fine)), np.array(layout.fine, dtype=bool)
        for (kind, body), values in zip(self._kinds(), bodies, strict=True):
            noise_T[is_fine_T == kind.fine] = kind.noise(body, values, reference)
        return noise_T

    def _kinds(self) -> tuple[tuple["_Body", bytes], tuple["_Body", bytes]]:
        """The two kinds of tensors, those that are not fine first, and their bodies."""
        main_stop = HEADER_BYTES + self.main_bytes
        fine_body = self.blob[main_stop:-CHECKSUM_BYTES]
        main = _Body(self.expected, fine=False, fine_bytes=len(fine_body))
        fine = _Body(self.expected, fine=True, fine_bytes=len(fine_body))
        return (main, self.blob[HEADER_BYTES:main_stop]), (fine, fine_body)


@dataclass(frozen=True, slots=True)
class _Body:
    """One of the two bodies of a payload."""

    expected: Expected
    fine: bool
    fine_bytes: int  # of the fine body, which is coded first

    @property
    def _codec(self) -> tuple[str, float]:
        expected = self.expected
        if self.fine:
            return expected.fine_codec
        return expected.codec, expected.main_bits(self.fine_bytes)

    def _terms(self, reference: np.ndarray | None) -> dict[str, Any]:
        layout = self.expected.layout
        return {
            "bits": self._codec[1],
            "seed": self.expected.seed("fine" if self.fine else "update"),
            "segments": layout.segments(fine=self.fine),
            "reference": None if reference is None else layout.gather(reference, fine=self.fine),
        }

    def encode(self, flat: np.ndarray, reference: np.ndarray | None) -> bytes:
        """The body of the tensors of this kind in `flat`."""
        if not self.expected.layout.segments(fine=self.fine):
            return b""
        values = self.expected.layout.gather(flat, fine=self.fine)
        return get_codec(self._codec[0]).encode(values, **self._terms(reference))

    def decode(self, body: bytes, reference: np.ndarray | None) -> np.ndarray:
        """The inverse of `encode`."""
        segments = self.expected.layout.segments(fine=self.fine)
        if not segments:
            return np.empty(0, dtype=np.float32)
        codec = get_codec(self._codec[0])
        return codec.decode(body, length=sum(segments), **self._terms(reference))

    def noise(self, body: bytes, values: np.ndarray, reference: np.ndarray | None) -> np.ndarray:
        """The expected sum of squared errors of each tensor of this kind."""
        segments = self.expected.layout.segments(fine=self.fine)
        codec = noise_known(get_codec(self._codec[0]))
        if not segments or codec is None:
            return np.zeros(len(segments))
        terms = self._terms(reference)
        del terms["seed"]
        return codec.noise(body, values, **terms)


def pack(
    update: np.ndarray | Mapping[str, np.ndarray],
    expected: Expected,
    reference: np.ndarray | None = None,
) -> bytes:
    """The payload of one update, of a length within `expected.payload_limits`.

    Args:
        update: A vector in layout order, or the tensors by name; finite.
        expected: What the receiver expects.
        reference: A prediction of the update that the receiver has too, in layout order.

    Raises:
        ValueError: Shapes differ from the layout, or values are not finite.
    """
    layout = expected.layout
    flat = layout.flatten(update) if isinstance(update, Mapping) else update
    if flat.shape != (layout.num_parameters,):
        raise ValueError(f"the update has shape {flat.shape}, not ({layout.num_parameters},)")
    fine = _Body(expected, fine=True, fine_bytes=0).encode(flat, reference)
    main = _Body(expected, fine=False, fine_bytes=len(fine)).encode(flat, reference)
    header = header_bytes(expected, len(main), len(fine))
    content = b"".join((header, main, fine))
    return content + checksum(content)


def admit(blob: bytes, expected: Expected) -> Admitted | Rejection:
    """The payload, checked against what is expected and still coded; or why it is refused.

    Never raises, whatever the bytes. Allocates nothing that grows with a number in the header.
    """
    try:
        header = read_header(blob)
        if isinstance(header, Rejection):
            return header
        refused = _compare(header, expected)
        return refused or Admitted(bytes(blob), expected, header.main_bytes)
    except Exception as error:  # The last line of defence: one reply must not end a run.
        return Rejection("undecodable", f"{type(error).__name__}: {error}")


def _compare(header: Header, expected: Expected) -> Rejection | None:
    """The first difference between a header and what is expected, or None."""
    fine_name, fine_bits = expected.fine_codec
    layout = expected.layout
    checks: tuple[tuple[Reason, str, object, object], ...] = (
        ("wrong-layout", "layout id", header.layout_id.hex(), layout.layout_id.hex()),
        ("wrong-seed", "run seed", header.run_seed, expected.run_seed),
        ("wrong-round", "round", header.round, expected.round),
        ("wrong-sender", "sender", header.sender, expected.sender),
        ("wrong-codec", "codec number", header.codec_id, WIRE_IDS[expected.codec]),
        ("wrong-codec", "fine codec number", header.fine_codec_id, WIRE_IDS[fine_name]),
        ("wrong-bits", "bits in 1/256", header.bits_256ths, round(256 * expected.bits)),
        ("wrong-bits", "fine bits in 1/256", header.fine_bits_256ths, round(256 * fine_bits)),
        ("wrong-length", "parameters", header.num_parameters, layout.num_parameters),
        ("undecodable", "reserved byte", header.zero, 0),
    )
    for reason, what, found, wanted in checks:
        if found != wanted:
            return Rejection(reason, f"{what} {found}, expected {wanted}")
    for what, size, (least, most) in (
        ("fine bytes", header.fine_bytes, expected.fine_limits),
        ("main bytes", header.main_bytes, expected.main_limits(header.fine_bytes)),
    ):
        if not least <= size <= most:
            wanted = str(most) if least == most else f"{least} to {most}"
            return Rejection("wrong-length", f"{what} {size}, expected {wanted}")
    return None


def open_vector(blob: bytes) -> Admitted | Rejection:
    """A payload of layout "vector of n", admitted by what its own header says. Never raises."""
    header = read_header(blob)
    if isinstance(header, Rejection):
        return header
    names = {number: name for name, number in WIRE_IDS.items()}
    if header.codec_id not in names:
        return Rejection("wrong-codec", f"codec number {header.codec_id} is not known")
    try:
        expected = Expected(
            layout=Layout.vector(header.num_parameters),
            run_seed=header.run_seed,
            round=header.round,
            sender=header.sender,
            codec=names[header.codec_id],
            bits=header.bits_256ths / 256,
            fine_bits=_stated_fine_bits(header),
        )
    except UserError as error:
        return Rejection("wrong-bits", str(error))
    return admit(blob, expected)


def _stated_fine_bits(header: Header) -> float:
    """`Expected.fine_bits` for which a payload states the header's fine codec and bits."""
    if header.fine_codec_id == WIRE_IDS["trellis-even"]:
        return 0
    return header.fine_bits_256ths / 256


def decode_own(blob: bytes, expected: Expected, reference: np.ndarray | None = None) -> np.ndarray:
    """The update that the server will decode from our own payload, in layout order.

    With error feedback a client's next residual is the update it meant less this.
    """
    admitted = admit(blob, expected)
    if isinstance(admitted, Rejection):
        raise ValueError(f"own payload: {admitted.reason}: {admitted.detail}")
    return admitted.decode(reference)


def check_values(
    *vectors: np.ndarray, limit: float, norm_limit: float | None = None
) -> Rejection | None:
    """Why a decoded update must not be added to the others, or None.

    Args:
        vectors: The decoded update in one or more parts, float32.
        limit: The largest magnitude allowed.
        norm_limit: The largest Euclidean norm of all together allowed, if there is one.
    """
    # Extremes and sums of pieces: no second vector is made. NaN passes through both extremes.
    with np.errstate(all="ignore"):
        ends = [float(end) for one in vectors for end in (one.max(initial=0), -one.min(initial=0))]
    if not np.isfinite(ends).all():
        count = sum(one.size - int(np.isfinite(one).sum()) for one in vectors)
        return Rejection("not-finite", f"{count} values are not finite")
    largest = max(ends, default=0.0)
    if not largest <= limit:
        return Rejection("too-large", f"largest magnitude {largest:.3g}, allowed {limit:.3g}")
    if norm_limit is not None:
        norm = math.sqrt(sum(map(sum_of_squares, vectors)))
        if not norm <= norm_limit:
            return Rejection("too-large", f"norm {norm:.3g}, allowed {norm_limit:.3g}")
    return None


def bits_per_parameter(blob: bytes, layout: Layout) -> float:
    """8·len(blob) / number of parameters: header, scales, fine tensors, padding, all counted."""
    if layout.num_parameters == 0:
        raise ValueError("an update without parameters has no bits per parameter")
    return 8 * len(blob) / layout.num_parameters

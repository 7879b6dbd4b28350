"""The sections of what the machines do together: updates, downlink, rounds, privacy."""

from dataclasses import dataclass
from typing import Literal, get_args

from fedcunet.codecs import check_codec_bits, get_codec
from fedcunet.config.device_bits import KEY as DEVICE_BITS_KEY
from fedcunet.config.device_bits import parse_device_bits
from fedcunet.config.tables import check_range
from fedcunet.data.labels import Label
from fedcunet.data.partition import PartitionScheme
from fedcunet.data.sizes import Sizes
from fedcunet.devices import kind_of
from fedcunet.errors import UserError

# Partitioners of flwr-datasets, an optional extra: fedcunet/partitioners.py.
FlowerScheme = Literal[
    "flwr:DirichletPartitioner",
    "flwr:PathologicalPartitioner",
    "flwr:ShardPartitioner",
    "flwr:LinearPartitioner",
    "flwr:SquarePartitioner",
    "flwr:ExponentialPartitioner",
]
FLOWER_SCHEMES: tuple[FlowerScheme, ...] = get_args(FlowerScheme)


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateConfig:
    """How a client's update is coded."""

    codec: str = "eden"  # a name of `fedcunet codecs`
    bits: float = 2.0  # bits per parameter of the codec
    # Other bits for the clients on some devices, "phone-low:1,phone-mid:2"; the others have `bits`.
    bits_by_device: str = ""
    # Of BatchNorm and the first and last convolutions; 32 with codec float32; 0: 8, or beside a
    # codec with a budget four times its bits.
    fine_bits: int = 0
    # What the coding loses is kept by the client and added to its next update. auto: with sign, and
    # with trellis where a client is expected to be asked in 8 rounds or more.
    error_feedback: Literal["auto", "on", "off"] = "auto"
    # Code the difference from the last global step instead, where the client knows it; only with
    # a downlink that is coded.
    prediction: bool = False

    def codec_with(self, *, feedback: bool) -> str:
        """The codec of the payloads: with error feedback the trellis in its Wiener-scaled form."""
        return "trellis-wiener" if self.codec == "trellis" and feedback else self.codec

    def bits_on(self, device: str) -> float:
        """The bits of a client on a device of that name."""
        return parse_device_bits(self.bits_by_device).get(kind_of(device), self.bits)

    def __post_init__(self) -> None:
        _check_codec("update", self.codec, self.bits)
        for name, bits in parse_device_bits(self.bits_by_device).items():
            try:
                check_codec_bits(get_codec(self.codec), bits)
            except UserError as error:
                raise UserError(f"{DEVICE_BITS_KEY}, {name}: {error}") from None
        if self.fine_bits not in (0, *range(2, 17), 32):
            raise UserError(f"update.fine-bits: expected 0, 2 to 16, or 32, found {self.fine_bits}")
        if self.error_feedback == "on" and self.codec == "float32":
            raise UserError("update.error-feedback: float32 updates leave no error to feed back")


@dataclass(frozen=True, kw_only=True, slots=True)
class DownlinkConfig:
    """How the model travels to the clients."""

    # float32: the whole model in every message. Another name of `fedcunet codecs`: differences from
    # what the clients have, which keep that between rounds.
    codec: str = "float32"
    bits: float = 32.0  # bits per parameter of a difference
    snapshot_bits: float = 8.0  # of a whole model for a client that missed too much, 4 to 8, or 32

    @property
    def coded(self) -> bool:
        """Whether clients get differences."""
        return self.codec != "float32"

    def __post_init__(self) -> None:
        _check_codec("downlink", self.codec, self.bits)
        if self.snapshot_bits != 32:
            check_range("downlink.snapshot-bits", self.snapshot_bits, 4, 8)
        if self.coded and self.bits > self.snapshot_bits:
            raise UserError(
                f"downlink.bits: expected at most snapshot-bits, {self.snapshot_bits:g}, "
                f"found {self.bits:g}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class FederationConfig:
    """Clients, rounds, and what the server does with the updates."""

    clients: int = 8  # virtual clients of a simulation
    # synchronous: a round waits for its clients. buffered: `fraction` of the clients are always at
    # work, and the server steps at every `buffer-size` answers (fedcunet/buffered.py).
    mode: Literal["synchronous", "buffered"] = "synchronous"
    buffer_size: int = 2
    rounds: int = 10
    fraction: float = 1.0  # share of the clients asked in a round
    over_selection: float = 1.0  # this many times as many are asked
    quorum: float = 0.5  # share of the wanted updates without which a round is abandoned
    deadline_seconds: float = 0.0  # of a round on the clients' virtual clock; 0: none
    seconds_per_example: float = 0.0  # compute on the reference core; 0: as measured
    timeout_seconds: float = 3600.0  # wall-clock guard of a round against faults
    client_timeout_seconds: float = 900.0  # and of one virtual client at one message, on Ray
    max_update_norm: float = 1e4  # an update with a larger l2 norm is refused; 0: no limit
    # What becomes of the updates: their mean, or a rule that withstands a minority (docs/robust.md)
    aggregation: Literal["mean", "trimmed-mean", "median", "multi-krum", "norm-clipping"] = "mean"
    # Shorten each tensor of the mean by the noise that coding is known to have added to it
    # (fedcunet/shrinkage.py); for codecs that are unbiased and whose noise the server can tell.
    shrinkage: bool = False
    assumed_attackers: float = 0.0  # share of a round's clients that the rule must withstand
    scratch_dir: str = ".fedcunet/scratch"  # the server's: decoded updates of a round, for rules
    # Of a simulation's clients: share that attacks, and how. No other client obeys it.
    attackers: float = 0.0
    attack: Literal["none", "sign-flip", "scaled", "label-shift", "nan"] = "none"
    server_optimizer: Literal["sgd", "adam", "adagrad"] = "sgd"
    server_learning_rate: float = 1.0
    server_momentum: float = 0.0  # of sgd
    evaluate_every: int = 1  # rounds; the last one is always evaluated
    # What the clients' images have in common; `fedcunet data partition` shows it.
    partition: Literal[PartitionScheme, FlowerScheme] = "source"
    partition_alpha: float = 0.5  # concentration of dirichlet
    partition_sizes: Sizes = "log-normal"  # what the clients' sizes follow; not of flwr: schemes
    partition_skew: float = 0.5  # spread of log-normal sizes; 0: equal
    partition_label: Label = "source"  # of flwr: schemes
    partition_labels_per_client: int = 2  # of flwr:Pathological- and ShardPartitioner
    # Share of its own images that each client keeps back, by whole photos; the global model is
    # evaluated on them there, at the rounds that are evaluated. 0: none.
    validation_fraction: float = 0.0
    test_fraction: float = 0.0  # and another share, for the final model alone
    fleet: str = "phone-low:1,phone-mid:2,phone-high:1"  # mix of device profiles
    # Thriftier settings for devices that cannot hold this one, "storage=packed; storage=frugal":
    # the first that fits is taken, and where none does the client stays out. Empty: all train.
    ladder: str = ""
    # Whether clients answer with the probability of their device only.
    availability: bool = False
    state_dir: str = ".fedcunet/clients"  # the clients' own state, a file each
    measured_dir: str = ".fedcunet/measured"  # memory that training steps were seen to take

    def __post_init__(self) -> None:
        check_range("federation.clients", self.clients, 1, 1_000_000)
        check_range("federation.rounds", self.rounds, 1, 1_000_000)
        check_range("federation.buffer-size", self.buffer_size, 1, 1_000_000)
        check_range("federation.fraction", self.fraction, 1e-6, 1)
        check_range("federation.over-selection", self.over_selection, 1, 10)
        check_range("federation.quorum", self.quorum, 0, 1)
        check_range("federation.deadline-seconds", self.deadline_seconds, 0, 1e9)
        check_range("federation.seconds-per-example", self.seconds_per_example, 0, 1e6)
        check_range("federation.timeout-seconds", self.timeout_seconds, 0.1, 1e9)
        check_range("federation.client-timeout-seconds", self.client_timeout_seconds, 0.1, 1e9)
        check_range("federation.max-update-norm", self.max_update_norm, 0, 1e30)
        self._check_attackers()
        check_range("federation.server-learning-rate", self.server_learning_rate, 1e-9, 100)
        check_range("federation.server-momentum", self.server_momentum, 0, 0.9999)
        check_range("federation.evaluate-every", self.evaluate_every, 1, 1_000_000)
        check_range("federation.partition-alpha", self.partition_alpha, 1e-3, 1e6)
        check_range("federation.partition-skew", self.partition_skew, 0, 3)
        check_range(
            "federation.partition-labels-per-client", self.partition_labels_per_client, 1, 1000
        )
        check_range("federation.validation-fraction", self.validation_fraction, 0, 0.9)
        left = round(0.9 - self.validation_fraction, 9)  # 0.1 beside 0.8, not a little less
        check_range("federation.test-fraction", self.test_fraction, 0, left)

    def _check_attackers(self) -> None:
        rule, assumed = self.aggregation, self.assumed_attackers
        if not 0 <= assumed < 0.5:
            raise UserError(
                f"federation.assumed-attackers: expected 0 to less than 0.5, found {assumed!r}"
            )
        if assumed and rule == "mean":
            raise UserError(
                "federation.assumed-attackers: expected 0 with federation.aggregation mean, which "
                f"withstands none, found {assumed!r}"
            )
        if not assumed and rule in ("trimmed-mean", "multi-krum"):
            raise UserError(
                "federation.assumed-attackers: expected more than 0 with federation.aggregation "
                f"{rule}, found 0"
            )
        check_range("federation.attackers", self.attackers, 0, 1)
        if (self.attackers > 0) != (self.attack != "none"):
            raise UserError(
                "federation.attackers and federation.attack: expected both or none, found "
                f"{self.attackers!r} and {self.attack}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivacyConfig:
    """Differential privacy of clients (docs/privacy.md); off while the clip norm is 0."""

    clip_norm: float = 0.0  # C: l2 norm that each client clips its whole update to
    noise_multiplier: float = 0.0  # z: the noise in the sum of a round's updates has deviation z·C
    delta: float = 1e-5  # of (epsilon, delta); well below 1 / number of clients

    @property
    def enabled(self) -> bool:
        """Whether updates are clipped."""
        return self.clip_norm > 0

    def __post_init__(self) -> None:
        check_range("privacy.clip-norm", self.clip_norm, 0, 1e9)
        check_range("privacy.noise-multiplier", self.noise_multiplier, 0, 1e6)
        check_range("privacy.delta", self.delta, 1e-30, 0.1)
        if self.noise_multiplier and not self.enabled:
            raise UserError("privacy.noise-multiplier: expected a privacy.clip-norm too, found 0")


def _check_codec(section: str, codec: str, bits: float) -> None:
    """Raises UserError, naming the key, unless there is the codec and it has these bits."""
    for key, check in (
        ("codec", lambda: get_codec(codec)),
        ("bits", lambda: check_codec_bits(get_codec(codec), bits)),
    ):
        try:
            check()
        except UserError as error:
            raise UserError(f"{section}.{key}: {error}") from None

"""Everything that a user can set, with its default, and every check of a user's value.

A setting is a TOML file whose tables are the sections below, in kebab-case; Flower's run
configuration holds the same keys, joined by dots (`training.learning-rate`).
"""

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from fedcunet.codecs import check_codec_bits, get_codec
from fedcunet.data.labels import Label
from fedcunet.data.partition import PartitionScheme
from fedcunet.data.sizes import Sizes
from fedcunet.errors import UserError
from fedcunet.quant.layers import FULL, QuantSpec

Scalar = bool | int | float | str
Section = TypeVar("Section")

# Partitioners of flwr-datasets, an optional extra: fedcunet/partitioners.py.
FlowerScheme = Literal[
    "flwr:DirichletPartitioner",
    "flwr:PathologicalPartitioner",
    "flwr:ShardPartitioner",
    "flwr:LinearPartitioner",
    "flwr:SquarePartitioner",
    "flwr:ExponentialPartitioner",
]
# Rounds of one client from which on error feedback is better than unbiased updates without it:
# at 1 bit with a tenth of the clients a round, they crossed at 7.5.
OFTEN_ASKED = 8

FLOWER_SCHEMES: tuple[FlowerScheme, ...] = get_args(FlowerScheme)


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raises UserError unless low <= value <= high (never for NaN)."""
    if not low <= value <= high:
        raise UserError(f"{name}: expected {low:g} to {high:g}, found {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The network."""

    kind: Literal["dunet", "stacked"] = "dunet"  # DU-Net, or stacked U-Nets (hourglasses)
    unets: int = 2  # number of U-Nets, n
    order: int = 1  # K of a DU-Net's order-K connectivity, 0 to n - 1
    supervisions: int = 0  # number of U-Nets with a head; 0: all of them
    # regression: Gaussians by squared error; detection: discs by sigmoid cross entropy.
    supervision: Literal["regression", "detection"] = "regression"
    iterative: bool = False  # a second pass through the same U-Nets, with heads of its own
    refined_supervision: Literal["regression", "detection"] = "regression"  # of that pass

    def __post_init__(self) -> None:
        check_range("model.unets", self.unets, 1, 64)
        if self.kind == "dunet":
            check_range("model.order", self.order, 0, self.unets - 1)
        check_range("model.supervisions", self.supervisions, 0, self.unets)
        if self.refined_supervision != "regression" and not self.iterative:
            raise UserError(
                "model.refined-supervision: expected with model.iterative, which is not set"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantConfig:
    """Bit widths of the training step; `QuantSpec` says what the fields mean."""

    bits: str = "32,32,32"  # inputs, weights, gradients: the paper's I,W,G
    alpha: bool = False
    input_quantizer: Literal["paper", "ranged", "source"] = "ranged"
    input_range: float = 4.0
    gradient_scale: Literal["tensor", "channel"] = "channel"
    # What waits for the backward pass: float32 maps; packed codes; or, frugal, fewer of them, with
    # the optimiser's state in codes too (docs/memory.md).
    storage: Literal["float32", "packed", "frugal"] = "float32"
    # How the latent weights of 1 or 2 bits are kept; bfloat16 with frugal storage only.
    latent: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        spec = self.spec()
        if self.latent == "bfloat16":
            if self.storage != "frugal":
                raise UserError(
                    f"quant.latent: bfloat16 goes with quant.storage frugal, found {self.storage}"
                )
            if spec.weight_bits == FULL:
                raise UserError("quant.latent: bfloat16 goes with weights at 1 or 2 bits, found 32")

    @property
    def has_latent_weights(self) -> bool:
        """Whether hidden convolutions train float weights within [-1, 1] behind their bits."""
        return self.spec().weight_bits != FULL

    def spec(self) -> QuantSpec:
        """The checked specification that the quantised layers take."""
        parts = self.bits.replace(" ", "").split(",")
        if len(parts) != 3 or not all(part.isdecimal() for part in parts):
            raise UserError(
                f"bits: expected three whole numbers I,W,G such as 8,1,8, found '{self.bits}'"
            )
        inputs, weights, gradients = map(int, parts)
        return QuantSpec(
            input_bits=inputs,
            weight_bits=weights,
            gradient_bits=gradients,
            alpha=self.alpha,
            input_quantizer=self.input_quantizer,
            input_range=self.input_range,
            gradient_scale=self.gradient_scale,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which images, and how they are cropped and augmented."""

    # data set: 300w, faces, lsp, lsp-oc (observer-centric), lspet, mpii, people; or several such as
    # lsp+mpii, tested on the first.
    name: str = "faces"
    root: str = ".fedcunet/data/faces"  # its folder; of several, with commas: DIR1,DIR2
    train_subset: str = "train"
    test_subset: str = "test"
    size: int = 64  # side of the square crop in pixels, a multiple of 64
    boxes: Literal["landmarks", "given", "ground-truth"] = "landmarks"
    sigma: float = 1.0  # of the target Gaussians, in heatmap pixels (a quarter of the crop's)
    scale: float = 0.25  # augmentation: scale 1 - s to 1 + s
    rotation: float = 30.0  # augmentation: degrees to either side
    colour: float = 0.4  # augmentation: factor 1 - c to 1 + c a channel
    # augmentation: mirror half of the crops; the paper mirrors people and not faces.
    flip: Literal["paper", "always", "never"] = "paper"
    cache_bytes: int = 512 * 2**20  # memory for decoded base crops in one process
    cache_dir: str = ".fedcunet/cache"  # the same on disk, for all processes of this machine
    disk_cache_bytes: int = 2 * 2**30  # of that folder, whoever fills it; 0: nothing on disk
    flip_test: bool = False  # evaluation: heatmaps are the mean of the crop's and its mirror's

    def __post_init__(self) -> None:
        check_range("data.size", self.size, 64, 1024)
        if self.size % 64:
            raise UserError(f"data.size: expected a multiple of 64, found {self.size}")
        check_range("data.sigma", self.sigma, 0.1, 16)
        check_range("data.scale", self.scale, 0, 0.25)
        check_range("data.rotation", self.rotation, 0, 30)
        check_range("data.colour", self.colour, 0, 1)
        check_range("data.cache-bytes", self.cache_bytes, 0, 2**50)
        check_range("data.disk-cache-bytes", self.disk_cache_bytes, 0, 2**50)
        if not self.cache_dir and self.disk_cache_bytes:
            raise UserError("data.cache-dir: expected a folder, found none")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """Optimisation on one machine: a whole training, or a client's part of a round."""

    optimizer: Literal["rmsprop", "sgd", "adam"] = "rmsprop"
    learning_rate: float = 2.5e-4
    # paper: the paper's for the data set (face or pose); constant; cosine; or factors that apply
    # from an epoch on, such as "30:0.2,60:0.5,90:0.5".
    schedule: str = "paper"
    epochs: int = 100  # of central training
    local_epochs: float = 1.0  # of a client in a round; 0.5 is half of its examples
    batch_size: int = 16
    threads: int = 1  # of torch in the process that trains

    def __post_init__(self) -> None:
        check_range("training.learning-rate", self.learning_rate, 1e-9, 100)
        check_range("training.epochs", self.epochs, 1, 100_000)
        check_range("training.local-epochs", self.local_epochs, 0.01, 1000)
        check_range("training.batch-size", self.batch_size, 1, 4096)
        check_range("training.threads", self.threads, 1, 1024)


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateConfig:
    """How a client's update is coded."""

    codec: str = "eden"  # a name of `fedcunet codecs`
    bits: float = 2.0  # bits per parameter of the codec
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

    def __post_init__(self) -> None:
        check_codec_bits(get_codec(self.codec), self.bits)
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
        check_codec_bits(get_codec(self.codec), self.bits)
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
        left = 0.9 - self.validation_fraction
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


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A whole setting. Two runs with equal settings give equal models."""

    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    downlink: DownlinkConfig = field(default_factory=DownlinkConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)

    def __post_init__(self) -> None:
        check_range("seed", self.seed, 0, 2**31 - 1)
        if self.federation.mode == "buffered":
            self._check_buffered()
        if self.update.prediction and not self.downlink.coded:
            raise UserError(
                "update.prediction: expected a downlink.codec that sends differences, found float32"
            )

    def _check_buffered(self) -> None:
        federation = self.federation
        for key, value, wanted in (
            ("federation.aggregation", federation.aggregation, "mean"),
            ("federation.deadline-seconds", federation.deadline_seconds, 0),
            ("federation.over-selection", federation.over_selection, 1),
            ("update.prediction", self.update.prediction, False),
            ("privacy.clip-norm", self.privacy.clip_norm, 0),
        ):
            if value != wanted:
                raise UserError(
                    f"{key}: expected {wanted} with federation.mode 'buffered', found {value}"
                )

    @property
    def error_feedback(self) -> bool:
        """Whether clients feed back what the coding of their updates loses.

        Few participations leave residuals stale, and an unbiased update without feedback is then
        the better one (docs/codecs.md).
        """
        asked, codec = self.update.error_feedback, self.update.codec
        if asked != "auto":
            return asked == "on"
        often = self.federation.fraction * self.federation.rounds >= OFTEN_ASKED
        return codec == "sign" or (codec == "trellis" and often)

    @property
    def update_codec(self) -> str:
        """The codec of the updates: with error feedback the trellis in its Wiener-scaled form."""
        return self.update.codec_with(feedback=self.error_feedback)

    @classmethod
    def from_nested(cls, values: Mapping[str, Any], where: str) -> "RunConfig":
        """A setting from nested tables with kebab-case keys; what is absent has its default.

        Args:
            values: as read from TOML.
            where: the file, for messages.

        Raises:
            UserError: for an unknown key, a wrong type or a value outside its range.
        """
        return _build(cls, values, where, prefix="")

    @classmethod
    def from_flat(cls, values: Mapping[str, Scalar], where: str = "run config") -> "RunConfig":
        """A setting from keys joined by dots, as in Flower's run configuration."""
        nested: dict[str, Any] = {}
        for key, value in values.items():
            *tables, name = key.split(".")
            table = nested
            for part in tables:
                table = table.setdefault(part, {})
                if not isinstance(table, dict):
                    raise UserError(f"{where}: '{part}' is both a value and a table")
            table[name] = value
        return cls.from_nested(nested, where)

    @classmethod
    def from_toml(cls, path: Path) -> "RunConfig":
        """Reads a setting file. Raises UserError if it cannot be read or does not hold."""
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"setting file {path}: not found") from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise UserError(f"setting file {path}: {error}") from None
        return cls.from_nested(values, f"setting file {path}")

    def nested(self) -> dict[str, Any]:
        """Tables with kebab-case keys, every value written out."""
        return _nested(self)

    def flat(self) -> dict[str, Scalar]:
        """Keys joined by dots: `{"seed": 0, "model.unets": 2, ...}`."""
        result: dict[str, Scalar] = {}
        for key, value in self.nested().items():
            if isinstance(value, dict):
                result.update({f"{key}.{name}": inner for name, inner in value.items()})
            else:
                result[key] = value
        return result

    def replace(self, **changes: Scalar | None) -> "RunConfig":
        """The setting with some values changed; None leaves a value as it is.

        Args:
            changes: names as in `section__field`, such as `data__root="faces"` or `seed=3`.
        """
        flat = self.flat()
        for name, value in changes.items():
            if value is not None:
                flat[name.replace("__", ".").replace("_", "-")] = value
        return RunConfig.from_flat(flat, "setting")

    def with_values(self, assignments: Sequence[str]) -> "RunConfig":
        """The setting with values as typed on a command line: `federation.partition=activity`.

        Args:
            assignments: `key=value` in the flat form, the value as in TOML; a text needs no quotes.

        Raises:
            UserError: for what is no assignment, an unknown key or a value that does not fit.
        """
        flat = self.flat()
        for assignment in assignments:
            key, equals, value = assignment.partition("=")
            if not equals:
                raise UserError(f"--set: expected key=value, found '{assignment}'")
            flat[key.strip()] = _typed(value.strip())
        return RunConfig.from_flat(flat, "--set")


def _typed(text: str) -> Scalar:
    """The TOML value that `text` is, or the text itself."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    if isinstance(value, float) and not math.isfinite(value):
        return text  # no setting is NaN, but an attack is called so
    return value if isinstance(value, bool | int | float | str) else text


def _nested(section: Any) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        key = item.name.replace("_", "-")
        result[key] = _nested(value) if dataclasses.is_dataclass(value) else value
    return result


def _build(cls: type[Section], values: Mapping[str, Any], where: str, prefix: str) -> Section:
    """An instance of the dataclass `cls` from a table, checked for unknown keys and types."""
    types = get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in types or "_" in key:
            known = sorted(field_name.replace("_", "-") for field_name in types)
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
            hint = f"did you mean '{prefix}{close[0]}'?" if close else f"known: {', '.join(known)}"
            raise UserError(f"{where}: unknown key '{prefix}{key}'; {hint}")
        if dataclasses.is_dataclass(types[name]):
            if not isinstance(value, Mapping):
                raise UserError(f"{where}: '{key}': expected a table, found {value!r}")
            arguments[name] = _build(types[name], value, where, prefix=f"{key}.")
        else:
            arguments[name] = _checked(types[name], value, f"{where}: '{prefix}{key}'")
    try:
        return cls(**arguments)
    except UserError as error:
        if str(error).startswith(where):
            raise
        raise UserError(f"{where}: {error}") from None


def _checked(expected: Any, value: Any, where: str) -> Scalar:
    """`value` if it has the expected type; a whole number passes for a float."""
    if get_origin(expected) is Literal:
        choices = get_args(expected)
        if value not in choices:
            raise UserError(f"{where}: expected one of {', '.join(choices)}, found {value!r}")
        return str(value)
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not expected:
        words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
        raise UserError(f"{where}: expected {words[expected]}, found {value!r}")
    return expected(value)  # type: ignore[no-any-return]

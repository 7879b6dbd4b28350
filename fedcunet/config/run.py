"""A whole setting: its sections, what they must agree in, and the forms it is read from."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedcunet.codecs import CODECS, get_codec
from fedcunet.codecs.base import noise_known
from fedcunet.config.federated import (
    DownlinkConfig,
    FederationConfig,
    PrivacyConfig,
    UpdateConfig,
)
from fedcunet.config.ladder import climb_rung, parse_ladder, rung_texts
from fedcunet.config.local import DataConfig, ModelConfig, QuantConfig, TrainingConfig
from fedcunet.config.tables import Scalar, build, check_range, flat, nested, typed, unflat
from fedcunet.errors import UserError

# Rounds of one client from which on error feedback is better than unbiased updates without it:
# at 1 bit with a tenth of the clients a round, they crossed at 7.5.
OFTEN_ASKED = 8


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
        if self.training.batch_size == 1 and self.data.size == 64:
            raise UserError(
                "training.batch-size: expected 2 or more with crops of 64 pixels, whose innermost "
                "map is one pixel (BatchNorm needs two values a channel), found 1"
            )
        if self.federation.mode == "buffered":
            self._check_buffered()
        self.rungs()
        if self.federation.shrinkage:
            self._check_shrinkage()
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

    def rungs(self) -> tuple["RunConfig", ...]:
        """This setting, then those of `federation.ladder`, each thriftier than the one before.

        A setting on a rung has no ladder of its own.

        Raises:
            UserError: the ladder is none, or a rung makes no setting.
        """
        found = [self]
        quant, training = self.quant, self.training
        on_rung = replace(self.federation, ladder="") if self.federation.ladder else self.federation
        texts = rung_texts(self.federation.ladder)
        for number, rung in enumerate(parse_ladder(self.federation.ladder), start=1):
            try:
                quant, training = climb_rung(quant, training, rung)
                setting = replace(self, quant=quant, training=training, federation=on_rung)
            except UserError as error:
                where = f"federation.ladder, rung {number} '{texts[number - 1]}'"
                raise UserError(f"{where}: {error}") from None
            found.append(setting)
        return tuple(found)

    def _check_shrinkage(self) -> None:
        """Refuses what gives no mean, or a mean whose noise cannot be told."""
        rule = self.federation.aggregation
        if rule != "mean":
            # A rule's result has another noise, and steps are a client's own word.
            raise UserError(
                f"federation.shrinkage: expected federation.aggregation mean, found {rule}"
            )
        if self.error_feedback:
            # What is shrunk away would never come back; the residuals are small already.
            raise UserError(
                "federation.shrinkage: expected update.error-feedback off, found "
                f"{self.update.error_feedback}, which feeds back in this setting"
            )
        if noise_known(get_codec(self.update.codec)) is None:
            known = ", ".join(name for name, codec in CODECS.items() if noise_known(codec))
            raise UserError(
                "federation.shrinkage: expected an update.codec whose noise the server can tell "
                f"({known}), found {self.update.codec}"
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
        return build(cls, values, where)

    @classmethod
    def from_flat(cls, values: Mapping[str, Scalar], where: str = "run config") -> "RunConfig":
        """A setting from keys joined by dots, as in Flower's run configuration."""
        return cls.from_nested(unflat(values, where), where)

    @classmethod
    def from_toml(cls, path: Path) -> "RunConfig":
        """Reads a setting file. Raises UserError if it cannot be read or does not hold."""
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"setting file {path}: not found") from None
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"setting file {path}: {error}") from None
        return cls.from_nested(values, f"setting file {path}")

    def nested(self) -> dict[str, Any]:
        """Tables with kebab-case keys, every value written out."""
        return nested(self)

    def flat(self) -> dict[str, Scalar]:
        """Keys joined by dots: `{"seed": 0, "model.unets": 2, ...}`."""
        return flat(self.nested())

    def replace(self, **changes: Scalar | None) -> "RunConfig":
        """The setting with some values changed; None leaves a value as it is.

        Args:
            changes: names as in `section__field`, such as `data__root="faces"` or `seed=3`.
        """
        values = self.flat()
        for name, value in changes.items():
            if value is not None:
                values[name.replace("__", ".").replace("_", "-")] = value
        return RunConfig.from_flat(values, "setting")

    def with_values(self, assignments: Sequence[str]) -> "RunConfig":
        """The setting with values as typed on a command line: `federation.partition=activity`.

        Args:
            assignments: `key=value` in the flat form, the value as in TOML; a text needs no quotes.

        Raises:
            UserError: for what is no assignment, an unknown key or a value that does not fit.
        """
        values = self.flat()
        for assignment in assignments:
            key, equals, value = assignment.partition("=")
            if not equals:
                raise UserError(f"--set: expected key=value, found '{assignment}'")
            values[key.strip()] = typed(value.strip())
        return RunConfig.from_flat(values, "--set")

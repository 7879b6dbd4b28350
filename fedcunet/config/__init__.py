"""Everything that a user can set, with its default, and every check of a user's value.

A setting is a TOML file whose tables are the sections of `local.py` and `federated.py`, in
kebab-case; Flower's run configuration holds the same keys, joined by dots
(`training.learning-rate`).
"""

from fedcunet.config.federated import (
    FLOWER_SCHEMES,
    DownlinkConfig,
    FederationConfig,
    PrivacyConfig,
    UpdateConfig,
)
from fedcunet.config.local import DataConfig, ModelConfig, QuantConfig, TrainingConfig
from fedcunet.config.run import RunConfig
from fedcunet.config.tables import Scalar, check_range

__all__ = [
    "FLOWER_SCHEMES",
    "DataConfig",
    "DownlinkConfig",
    "FederationConfig",
    "ModelConfig",
    "PrivacyConfig",
    "QuantConfig",
    "RunConfig",
    "Scalar",
    "TrainingConfig",
    "UpdateConfig",
    "check_range",
]

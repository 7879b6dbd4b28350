"""The sections of what one machine trains: network, bit widths, images, optimisation."""

from dataclasses import dataclass
from typing import Literal

from fedcunet.config.schedule import parse_schedule
from fedcunet.config.tables import check_range
from fedcunet.errors import UserError
from fedcunet.quant.layers import FULL, QuantSpec


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
    input_quantizer: Literal["paper", "ranged", "source"] = "source"
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
        if len(parts) != 3 or not all(part.isdecimal() and len(part) < 4 for part in parts):
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
    latent_rate: float = 1.0  # of weights at 1 or 2 bits, in learning rates
    # Over this share of the training they go from floats to their bits; 0: they have them at once.
    ramp: float = 0.0
    # Over this share of the training, its last, BatchNorm keeps its running statistics.
    freeze_norm: float = 0.0
    # paper: the paper's for the data set (face or pose); constant; cosine; or factors that apply
    # from an epoch on, such as "30:0.2,60:0.5,90:0.5".
    schedule: str = "paper"
    epochs: int = 100  # of central training
    local_epochs: float = 1.0  # of a client in a round; 0.5 is half of its examples
    batch_size: int = 16
    threads: int = 1  # of torch in the process that trains

    def __post_init__(self) -> None:
        check_range("training.learning-rate", self.learning_rate, 1e-9, 100)
        check_range("training.latent-rate", self.latent_rate, 1e-3, 1000)
        check_range("training.ramp", self.ramp, 0, 1)
        check_range("training.freeze-norm", self.freeze_norm, 0, 1)
        parse_schedule(self.schedule)
        check_range("training.epochs", self.epochs, 1, 100_000)
        check_range("training.local-epochs", self.local_epochs, 0.01, 1000)
        check_range("training.batch-size", self.batch_size, 1, 4096)
        check_range("training.threads", self.threads, 1, 1024)

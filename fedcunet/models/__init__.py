"""Networks for landmark localisation, by the paper's terms; plain float torch."""

from fedcunet.models.blocks import PreActivation
from fedcunet.models.dunet import DUNet, supervised_unets

__all__ = ["DUNet", "PreActivation", "supervised_unets"]

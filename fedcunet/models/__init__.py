"""Networks for landmark localisation, by the paper's terms; plain float torch."""

from fedcunet.models.blocks import PreActivation, Supervision, supervised_unets
from fedcunet.models.dunet import DUNet
from fedcunet.models.hourglass import StackedHourglass
from fedcunet.models.refinement import IterativeRefinement

__all__ = [
    "DUNet",
    "IterativeRefinement",
    "PreActivation",
    "StackedHourglass",
    "Supervision",
    "supervised_unets",
]

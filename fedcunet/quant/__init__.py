"""Quantised training: weights at 1 or 2 bits, the rest at k bits (paper, section 3.5)."""

from fedcunet.quant.layers import QuantConv2d, QuantSpec, quantise_network, seed_rounding

__all__ = ["QuantConv2d", "QuantSpec", "quantise_network", "seed_rounding"]

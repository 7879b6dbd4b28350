"""Federated training of quantised densely connected U-Nets for landmark localisation."""

__version__ = "0.1.0"

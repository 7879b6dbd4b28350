"""Flower client application."""

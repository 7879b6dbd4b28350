"""Flower server application."""

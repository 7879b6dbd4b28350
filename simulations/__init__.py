"""Engines that run the server and client applications on one machine or a Ray cluster."""

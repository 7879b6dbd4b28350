"""Embedded faces (68 points) and people (16 joints), drawn by numbers, for want of real ones."""

from .faces import make_faces
from .people import default_processes, make_people

__all__ = ["default_processes", "make_faces", "make_people"]

"""An embedded 68-point face set, painted by numbers, for use where real faces are absent."""

from .faces import make_faces

__all__ = ["make_faces"]

"""The ways in which a command ends badly for a reason that the user can act on."""


class UserError(ValueError):
    """What the user gave cannot be used: one line that says what, where, expected and found.

    The commands print the line on standard error and exit with 2.
    """


class RunFailure(RuntimeError):
    """Work that was asked for properly could not be done; the commands exit with 1."""


class FolderInUse(UserError):
    """Another process writes into the folder."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, numpy or torch found no memory; torch on a CPU has no type for it."""
    texts = ("can't allocate memory", "out of memory")  # of a CPU, of CUDA
    is_torch = isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    return isinstance(error, MemoryError) or is_torch

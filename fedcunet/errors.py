"""The ways in which a command ends badly for a reason that the user can act on."""


class UserError(ValueError):
    """What the user gave cannot be used: one line that says what, where, expected and found.

    The commands print the line on standard error and exit with 2.
    """


class RunFailure(RuntimeError):
    """Work that was asked for properly could not be done; the commands exit with 1."""


class FolderInUse(UserError):
    """Another process writes into the folder."""

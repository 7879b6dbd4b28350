"""How every command ends: its exit code, and one line where something is wrong."""

import logging
import sys

import click
import typer

from fedcunet.errors import RunFailure, UserError, is_out_of_memory

DONE, FAILED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130


def run_app(app: typer.Typer, program: str) -> None:
    """Runs a command line and exits: 0 done, 1 failed, 2 wrong use, 130 interrupted.

    Args:
        app: the commands.
        program: name in front of the line that says what is wrong.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        code = app(standalone_mode=False, prog_name=program) or DONE
        if code == INTERRUPTED:  # Typer's own answer to Ctrl-C says nothing
            _say(program, "interrupted", code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = error.exit_code
    except click.ClickException as error:  # wrong options and arguments
        context = getattr(error, "ctx", None)
        command = context.command_path if context else program
        code = _say(program, f"{error.format_message()} (see {command} --help)", WRONG_USE)
    except UserError as error:
        code = _say(program, error, WRONG_USE)
    except RunFailure as error:
        code = _say(program, error, FAILED)
    except (KeyboardInterrupt, click.Abort):
        code = _say(program, "interrupted", INTERRUPTED)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        code = _say(program, f"out of memory{': ' if str(error) else ''}{error}", FAILED)
    except BrokenPipeError:
        code = FAILED  # the reader of our output has gone; there is nobody to tell
        sys.stderr.close()
    except OSError as error:  # a full disk, a folder that cannot be written to
        place = f"{error.filename}: " if error.filename is not None else ""
        code = _say(program, f"{place}{error.strerror or error}", FAILED)
    sys.exit(code)


def _say(program: str, problem: BaseException | str, code: int) -> int:
    print(f"{program}: {' '.join(str(problem).split())}", file=sys.stderr)
    return code

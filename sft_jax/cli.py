"""What every command shares: flags, exit codes, and one message instead of a traceback.

Exit codes: 0 done; 2 the user's input is wrong; 75 stopped early by a signal with the state saved, start again;
1 anything else, with its traceback.
"""

import os
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from sft_jax.errors import StoppedBySignal, UserError

EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # sysexits' EX_TEMPFAIL: launchers start the same command again


def define_config_flag() -> flags.FlagHolder:
    """Declares `--config FILE.py[:argument]`, any field of which `--config.KEY=VALUE` overrides."""
    return config_flags.DEFINE_config_file("config", None, "The recipe: a Python file with get_config().", lock_config=True)


def run(main: Callable[[], None], usage: str) -> None:
    """Parses the flags, runs `main` and ends the process with the exit code that its outcome asks for.

    Args:
        main: The command; reads its flags from their holders.
        usage: The text that precedes the list of flags in `--help`.
    """
    app.usage(shorthelp=True)  # registers absl's help flags before they are parsed
    sys.modules["__main__"].__doc__ = usage
    app.run(lambda argv: _exit(main, argv), flags_parser=_parse_flags)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        rest = flags.FLAGS(list(argv), known_only=False)
    except flags.Error as error:
        _fail(_flag_message(error))
    except (FileNotFoundError, IsADirectoryError) as error:
        _fail(f"--config: there is no file '{error.filename}'.")
    except (AttributeError, KeyError, TypeError, ValueError, SyntaxError, ImportError) as error:
        # A recipe is the user's code, and ml_collections lets its errors through as they are.
        _fail(f"--config: {type(error).__name__}: {error}")
    if len(rest) > 1:
        _fail(f"'{rest[1]}' is not a flag; write --NAME=VALUE.")
    return rest


def _flag_message(error: flags.Error) -> str:
    return " ".join(str(error).split())


def _exit(main: Callable[[], None], argv: Sequence[str]) -> None:
    del argv
    if not any(argument.startswith(("--verbosity", "-v=")) for argument in sys.argv[1:]):
        logging.set_verbosity(logging.WARNING)  # Orbax and JAX tell every save and compilation otherwise
    try:
        main()
    except UserError as error:
        _fail(str(error))
    except StoppedBySignal as stop:
        print(stop, file=sys.stderr)
        sys.exit(EXIT_STOPPED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _fail(message: str):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)

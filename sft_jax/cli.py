"""What every command shares: flags, exit codes, and one message instead of a traceback.

Exit codes: 0 done; 2 the user's input is wrong; 3 data with more faults than allowed, or a plan that does not fit; 75 stopped early by a signal with the
state saved, or before there was anything to save: start again; 130 ended at once by Ctrl-C (in training by the second one); 1 anything else, with its
traceback, and where other processes or a store could not be reached, with one message: starting again may help.
"""

import functools
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from sft_jax.config import Config, is_key, leaf_keys
from sft_jax.config_parsing import overridden, parse_config, without_inherited
from sft_jax.errors import StoppedBySignal, Unreachable, UserError, did_you_mean

EXIT_UNREACHABLE = 1
EXIT_USER_ERROR = 2
EXIT_FINDINGS = 3  # the answer is no: data with more faults than allowed, a plan that does not fit
EXIT_INTERRUPTED = 130  # as a shell reports Ctrl-C
EXIT_STOPPED = 75  # sysexits' EX_TEMPFAIL: launchers start the same command again
_SHARED = (__name__, "sft_jax.decoding_flags")  # modules that define flags for commands
_FILE_WIDTH = 160  # of tables that go to a file
_DEFAULTS = str(Path(__file__).with_name("default_recipe.py"))  # what overrides are read against where no recipe is named
_RECIPE_FLAG, _OVERRIDE_FLAG = re.compile(r"--?config(=|$)"), re.compile(r"--?(no)?config\.")


def define_config_flag() -> flags.FlagHolder:
    """Declares `--config FILE.py[:argument]`, any field of which `--config.KEY=VALUE` overrides."""
    return config_flags.DEFINE_config_file("config", None, "The recipe: a Python file with get_config().", lock_config=True)


def read_config(holder: flags.FlagHolder, needs_data: bool = True, model: str | None = None, needs_model: bool = True) -> Config:
    """Returns the checked configuration of `--config`; raises UserError where it is missing or wrong.

    Without `needs_data` it may name no training data, without `needs_model` no model. `model` takes the place of its model.path.
    """
    raw = read_raw_config(holder)
    if model is not None and isinstance(raw.get("model"), dict):
        raw["model"]["path"] = model
    return parse_config(raw, needs_data, needs_model)


def read_config_over(holder: flags.FlagHolder, recorded: dict[str, Any]) -> Config:
    """Returns the checked configuration that a run has `recorded`, with `--config.KEY=VALUE` over it; raises UserError as `parse_config`.

    It may name no training data. What a data set has taken from the `data` section follows that section.
    """
    return parse_config(overridden(without_inherited(recorded), _overrides(holder)), needs_data=False)


def has_recipe(holder: flags.FlagHolder) -> bool:
    """Returns whether `--config` names a recipe; overrides alone name none."""
    return holder.value is not None and config_flags.get_config_filename(flags.FLAGS[holder.name]) != _DEFAULTS


def asks_for(holder: flags.FlagHolder, section: str) -> bool:
    """Returns whether the command line says what a section of the configuration is, by a recipe or by an override."""
    return has_recipe(holder) or any(key.partition(".")[0] == section for key in _overrides(holder))


def _overrides(holder: flags.FlagHolder) -> dict[str, Any]:
    """Returns the keys and values of `--config.KEY=VALUE`."""
    return dict(config_flags.get_override_values(flags.FLAGS[holder.name])) if holder.value is not None else {}


def read_raw_config(holder: flags.FlagHolder) -> dict[str, Any]:
    """Returns what `--config` and its overrides say, as `parse_config` takes it; raises UserError where it is missing."""
    try:
        if not has_recipe(holder):
            raise UserError("--config: is missing; name a recipe, such as --config configs/sft.py.")
        return holder.value.to_dict()
    except OSError as error:  # ml_collections tells a missing file only when the value is used
        raise UserError(f"--config: {_recipe_name(sys.argv)} cannot be read; name a Python file with get_config().") from error


def _recipe_name(argv: Sequence[str]) -> str:
    """Returns the recipe as it was given on the command line."""
    for place, argument in enumerate(argv):
        if argument.startswith("--config="):
            return argument.removeprefix("--config=")
        if argument == "--config" and place + 1 < len(argv):
            return argv[place + 1]
    return "the recipe"


def print_json(found: dict[str, Any]) -> None:
    """Prints the answer of a command as one JSON object; a number that JSON does not have, NaN or an infinity, is null."""
    from sft_jax.training.workdir import plain

    print(json.dumps(plain(found), allow_nan=False))


def show_results(found: dict[str, Any], text: Any, files: Sequence[str], *, as_json: bool, failed: bool) -> None:
    """Prints what several runs have shown, as one JSON object or as `text`, which rich prints, with the files that were written.

    Ends the process with EXIT_FINDINGS where a run has `failed`.
    """
    if as_json:
        print_json(found)
    else:
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else _FILE_WIDTH, soft_wrap=True).print(text)
        print(f"Written: {', '.join(files)}")
    if failed:
        sys.exit(EXIT_FINDINGS)


def run(main: Callable[..., None], usage: str, arguments: int = 0) -> None:
    """Parses the flags, runs `main` and ends the process with the exit code that its outcome asks for.

    Args:
        main: The command; reads its flags from their holders. With `arguments` it is given a list of them.
        usage: The text that precedes the list of flags in `--help`.
        arguments: How many there may be that are no flags.
    """
    sys.modules["__main__"].__doc__ = usage
    for module in _SHARED:  # else --help leaves out the flags that are defined there
        for flag in flags.FLAGS.flags_by_module_dict().get(module, ()):
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    sys.unraisablehook = _show_unraisable
    app.run(
        lambda argv: _exit(functools.partial(main, list(argv[1:])) if arguments else main, argv),
        flags_parser=functools.partial(_parse_flags, arguments=arguments),
    )


def _show_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Shows what could not be raised as Python does, but for the noise after a save that failed.

    Orbax gives up at the first array that cannot be written; TensorStore then reports each of the others to an event loop
    that is gone, with a traceback for each.
    """
    if not (unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(unraisable)


def _parse_flags(argv: Sequence[str], arguments: int) -> list[str]:
    for argument in argv[1:]:
        key = argument.removeprefix("--config.").split("=", 1)[0]
        if argument.startswith("--config.") and not is_key(key):
            _fail(f"Unknown key '{key}'; {did_you_mean(key, leaf_keys())}.")
    try:
        rest = flags.FLAGS(_with_recipe(argv))
    except SystemExit:  # --help and its kin, which absl ends with 1
        sys.exit(0)
    except flags.Error as error:
        _fail(_flag_message(error))
    except UserError as error:
        _fail(str(error))
    except (AttributeError, KeyError, TypeError, ValueError, SyntaxError, ImportError, NameError, OSError) as error:
        # A recipe is the user's code, and ml_collections lets its errors through as they are.
        _fail(f"--config: {_recipe_name(argv)}: {type(error).__name__}: {error}")
    if len(rest) > 1 + arguments:
        _fail(f"'{rest[1 + arguments]}' is not a flag; write --NAME=VALUE.")
    return rest


def _with_recipe(argv: Sequence[str]) -> list[str]:
    """Returns the command line, with the defaults as its recipe where it overrides keys of none."""
    named, changed = (any(kind.match(argument) for argument in argv[1:]) for kind in (_RECIPE_FLAG, _OVERRIDE_FLAG))
    return [argv[0], f"--config={_DEFAULTS}", *argv[1:]] if changed and not named and "config" in flags.FLAGS else list(argv)


def _flag_message(error: flags.Error) -> str:
    """Returns the message in one line; of a boolean that is none, absl gives the arguments of an error as a tuple."""
    text = " ".join(str(error).split())
    return re.sub(r": \('Non-boolean argument to boolean flag', .*\)$", ": must be True or False", text)


def _exit(main: Callable[[], None], argv: Sequence[str]) -> None:
    del argv
    if not any(argument.startswith(("--verbosity", "-v=")) for argument in sys.argv[1:]):
        # Orbax tells every save through it otherwise, and an error that it also raises, which becomes our one message.
        logging.set_verbosity(logging.FATAL)
    if "json" in flags.FLAGS and flags.FLAGS["json"].value:
        _keep_standard_output()
    try:
        main()
    except Unreachable as error:
        _fail(str(error), EXIT_UNREACHABLE)
    except UserError as error:
        _fail(str(error))
    except StoppedBySignal as stop:
        print(stop, file=sys.stderr)
        sys.exit(EXIT_STOPPED)
    except KeyboardInterrupt as interrupt:  # nothing is waited for, not even threads that write
        print(f"Interrupted{f'; {interrupt}' if str(interrupt) else ''}.", file=sys.stderr, flush=True)
        os._exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _keep_standard_output() -> None:
    """Leaves standard output to what Python prints, which with --json is the answer alone.

    Libraries in C++ write to file descriptor 1, such as gloo when processes join; from here on that is standard error.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = open(kept, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)


def _fail(message: str, code: int = EXIT_USER_ERROR):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)

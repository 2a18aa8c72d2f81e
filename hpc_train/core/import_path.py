"""What a job file names as "package.module:name": tasks, models, metrics, data sets, optimizers of other packages."""

import importlib
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from hpc_train.core.errors import UserError


def is_import_path(value: str) -> bool:
    return ":" in value


def import_path(key: str, path: str, what: str) -> Any:
    """The object `path`, "package.module:name" or "package.module:Class.method", from this folder or `sys.path`.

    key: of the job file, and what: what it should name there, such as "class": for messages. Nothing is called. Raises
    `UserError`, also for modules of Python itself: no job needs one, and `os:system` would be called with its options.
    """
    module_name, _, name = path.partition(":")
    told = f"{key} = '{path}'"
    if not all(part.isidentifier() for part in (*module_name.split("."), *name.split("."))):
        raise UserError(f"{told} is no import path", f"Write 'package.module:name' with the name of a {what}.")
    if module_name.partition(".")[0] in sys.stdlib_module_names:
        raise UserError(f"{told}: {module_name} is a part of Python and has no {what} for it", f"Name a {what}.")
    here = str(Path.cwd())
    if here not in sys.path:  # the user's module is usually where the job is started
        sys.path.insert(0, here)
    found = _module(told, module_name, here)
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise UserError(f"{told}: {module_name} has no {what} {name}", f"Name a {what} after the colon.") from None
        except Exception as error:  # noqa: BLE001  a package may import a part of itself here
            raise UserError(f"{told}: {error}{at_user_line(error)}", "Install what it needs.") from None
    return found


def _module(told: str, name: str, here: str) -> Any:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # noqa: BLE001  a module may raise anything
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            what = f"no module {error.name}"
            remedy = f"Looked in {here} and in sys.path: install the package, or start the job where the module is."
        else:
            what = f"{name} cannot be loaded: {type(error).__name__}: {error}{at_user_line(error)}"
            remedy = f"Fix it there; for the whole traceback: python -c 'import {name}'"
        raise UserError(f"{told}: {what}", remedy) from None


def at_user_line(error: BaseException) -> str:
    """ ", at FILE:LINE": the line of the user's own code that raised `error`, or called the function that did.

    Of an error in a package that none of that code called, the package's line. "" if only this program's lines led
    there: they tell a user nothing.
    """
    if isinstance(error, SyntaxError):
        return f", at {error.filename}:{error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    libraries, package = (os.path.dirname(os.__file__), "<"), f"{Path(__file__).parents[1]}{os.sep}"
    others = [frame for frame in frames if not frame.filename.startswith(package)]
    own = [frame for frame in others if not frame.filename.startswith(libraries) and "-packages" not in frame.filename]
    found = own or others
    return f", at {found[-1].filename}:{found[-1].lineno}" if found else ""


def refused_options(key: str, path: str, options: dict[str, Any], error: Exception) -> UserError:
    """The error of a constructor of another package or of the user, called with the options of `key`."""
    line = at_user_line(error)
    if options and not line:  # the call itself does not fit, as with a misspelt option
        return UserError(f"{key} = {options}: {path} refuses them: {error}", f"See the documentation of {path}.")
    told = f"{path} cannot be made{f' with {key} = {options}' * bool(options)}: {type(error).__name__}: {error}{line}"
    remedy = f"Fix it there, or change {key}." if line else f"Set what it needs in {key}."
    return UserError(told, remedy)

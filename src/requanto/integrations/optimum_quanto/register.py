"""``requanto register-optimum-cli``: puts ``optimum-cli quanto quantize`` into the installed optimum.

optimum loads every file of its folder ``optimum/commands/register``, and nothing of a package it does not know (read in 1.23
to 2.3). The wheel does not ship such a file: it would make a folder ``optimum`` where there is none, and Transformers, PEFT
and Diffusers, which look for just that, would take optimum and optimum-quanto for installed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

FILE_NAME = "register_requanto.py"

# optimum must go on working when Requanto is uninstalled and this file is not.
_TEXT = '''"""Written by `requanto register-optimum-cli`; `requanto register-optimum-cli --remove` takes it away."""

import logging

try:
    from requanto.integrations.optimum_quanto.command import REGISTER_COMMANDS
except ModuleNotFoundError as error:
    if error.name != "requanto":
        raise
    logging.getLogger(__name__).warning("requanto is not installed any more: delete %s", __file__)
    REGISTER_COMMANDS = []
'''


def commands_folder() -> Path:
    """The folder ``optimum/commands`` of the installed optimum.

    Raises:
        ModuleNotFoundError: optimum is not installed; packages that extend it, such as optimum-quanto, do not bring it.
    """
    spec = importlib.util.find_spec("optimum.commands") if importlib.util.find_spec("optimum") is not None else None
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (Path(place) / "optimum_cli.py").is_file():
            return Path(place)
    raise ModuleNotFoundError("optimum, which has the command optimum-cli, is not installed: pip install optimum")


def register() -> Path:
    """Writes the file that optimum's command line loads; again, and nothing changes.

    Returns:
        The file.

    Raises:
        ModuleNotFoundError: optimum is not installed.
        OSError: its folder cannot be written.
    """
    file = commands_folder() / "register" / FILE_NAME
    file.parent.mkdir(exist_ok=True)
    file.write_text(_TEXT, encoding="utf-8")
    return file


def unregister() -> Path | None:
    """Deletes the file, and the folder if it is empty then.

    Returns:
        The file that was there, or None.

    Raises:
        ModuleNotFoundError: optimum is not installed.
    """
    file = commands_folder() / "register" / FILE_NAME
    if not file.is_file():
        return None
    file.unlink()
    for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*.pyc"):
        compiled.unlink()
    for folder in (file.parent / "__pycache__", file.parent):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return file

"""``requanto register-optimum-cli``: adds ``optimum-cli quanto quantize`` to the installed optimum.

optimum imports every file of its folder ``optimum/commands/register`` and has no other way to add commands (checked in 1.23
to 2.3). Requanto's wheel does not contain such a file: it would create a folder ``optimum``, and Transformers, PEFT and
Diffusers would then conclude that optimum and optimum-quanto are installed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

FILE_NAME = "register_requanto.py"

# The try: optimum-cli must still work after Requanto is uninstalled while this file remains.
_TEXT = '''"""Written by `requanto register-optimum-cli`; `requanto register-optimum-cli --remove` deletes it."""

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
    """Returns the folder ``optimum/commands`` of the installed optimum.

    Raises:
        ModuleNotFoundError: optimum is not installed; optimum-quanto alone does not contain it.
    """
    spec = importlib.util.find_spec("optimum.commands") if importlib.util.find_spec("optimum") is not None else None
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (Path(place) / "optimum_cli.py").is_file():
            return Path(place)
    raise ModuleNotFoundError("optimum, which provides the command optimum-cli, is not installed: pip install optimum")


def register() -> Path:
    """Writes the file that optimum's command line imports; a second call writes the same file.

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
    """Deletes the file, and its folder if that is then empty.

    Returns:
        The deleted file; None if there was none.

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

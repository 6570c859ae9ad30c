"""Adds requanto_autoload.pth, which setuptools has no setting for; everything else is in pyproject.toml."""

import os

from setuptools import setup
from setuptools.command.build_py import build_py

PTH = os.path.join("src", "requanto_autoload.pth")


class BuildWithPth(build_py):
    """Writes the .pth beside the packages: into the wheel's root, from which pip installs and uninstalls it."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the packages stay in the checkout; what is in install_lib becomes the wheel's root
            folder = self.distribution.get_command_obj("install").install_lib
        else:
            folder = self.build_lib
        self.mkpath(folder)
        self.copy_file(PTH, os.path.join(folder, os.path.basename(PTH)), preserve_mode=False)

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), PTH]


setup(cmdclass={"build_py": BuildWithPth})

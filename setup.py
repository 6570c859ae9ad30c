"""What setuptools has no setting for; everything else is in pyproject.toml.

Adds requanto_autoload.pth, and builds the library of CPU kernels (kernels/requanto_cpu) into the package. The library needs
no header of Python or torch: a wheel with it is for one platform and all their versions. Where no C++ compiler works, the
wheel has the sources alone, which are built at the first use, and is for every platform.
"""

import functools
import os
import shutil
import sys
import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

PTH = os.path.join("src", "requanto_autoload.pth")
ROOT = Path(__file__).resolve().parent

sys.path.insert(0, str(ROOT / "kernels"))
from requanto_cpu import build, cache, trust  # noqa: E402


@functools.cache
def library() -> bytes | None:
    """The library's bytes; None, with a message, where it cannot be built."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "library"
        try:
            compilers = build.compilers()
            levels = build.build(target, compilers[0])
        except (build.BuildError, OSError) as error:
            print(
                f"requanto: no CPU kernels in this build ({trust.first_line(error)}); they are built at their first use"
            )
            return None
        print(f"requanto: CPU kernels for {', '.join(levels)}, built with {compilers[0].version()}")
        return target.read_bytes()


def write_library(package: Path) -> None:
    """Writes the library into a folder of the package ``requanto_cpu``, in place of older ones."""
    target = package / cache.PACKAGED.name / cache.packaged().name
    shutil.rmtree(target.parent, ignore_errors=True)
    content = library()
    if content is not None:
        target.parent.mkdir()
        trust.write(target, content + trust.mark(target.name))


class BuildPackages(build_py):
    """Writes the .pth beside the packages, into the wheel's root, from which pip installs it; and the library."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the packages stay in the checkout; what is in install_lib becomes the wheel's root
            folder = self.distribution.get_command_obj("install").install_lib
            write_library(ROOT / "kernels" / "requanto_cpu")
        else:
            folder = self.build_lib
            write_library(Path(folder) / "requanto_cpu")
        self.mkpath(folder)
        self.copy_file(PTH, os.path.join(folder, os.path.basename(PTH)), preserve_mode=False)

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), PTH]


class PlatformWheel(bdist_wheel):
    """Names the wheel after the platform, but not after a version of Python, if it has the library."""

    def run(self) -> None:
        self.root_is_pure = library() is None
        self.distribution.has_ext_modules = lambda: not self.root_is_pure  # into the folder for code of one platform
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


setup(cmdclass={"build_py": BuildPackages, "bdist_wheel": PlatformWheel})

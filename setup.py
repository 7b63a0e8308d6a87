"""Build the shim into the wheel: the Makefile stays the only place that knows how it is compiled."""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import subprocess

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py


class BuildShim(build_py):
    """Have `make shim` build injector/ramlock/ramlock.so, which is then packed like any other package data."""

    def run(self) -> None:
        """Build. An editable install does not: `make` builds the shim into the checkout."""
        if not self.editable_mode:
            subprocess.run(["make", f"-j{os.cpu_count()}", "shim"], check=True)  # noqa: S607 whichever make the user has
        super().run()


class Native(Distribution):
    """A distribution with machine code in it, though not as an extension module."""

    def has_ext_modules(self) -> bool:
        """Have the package installed with those that are made for one platform."""
        return True


class PlatformWheel(bdist_wheel):
    """A wheel for any Python 3 on one platform: the shim knows nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return py3-none-PLATFORM."""
        return "py3", "none", super().get_tag()[2]


setup(distclass=Native, cmdclass={"build_py": BuildShim, "bdist_wheel": PlatformWheel})

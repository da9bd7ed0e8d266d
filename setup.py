"""The one step of the build that pyproject.toml cannot state: `configs/` becomes part of the installed package."""

import pathlib
import shutil

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies `configs/` to `faithdiff_jax/configs/`; an editable installation finds it in the repository."""

    def run(self) -> None:
        """Build as usual, then copy."""
        super().run()
        if not self.editable_mode:
            shutil.copytree("configs", pathlib.Path(self.build_lib, "faithdiff_jax", "configs"), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithConfigs})

"""Build the package. Files of the repository's top level that the commands use are copied to minimind_ray/shipped/.

`minimind_ray/config/shipped.py` finds them. All other settings of the build are in pyproject.toml.
"""

from pathlib import Path
from shutil import rmtree

from setuptools import setup
from setuptools.command.build_py import build_py

# The last five are for `ray up`, which installs the package on the cluster's nodes from the files of this installation.
SHIPPED = ("experiments", "cluster", "cluster.yaml", "pyproject.toml", "setup.py", "README.md", "LICENSE")


class BuildPy(build_py):
    """Builds the package with the shipped files. An editable install reads them where they lie."""

    def run(self) -> None:
        """Copy the package's modules, then the shipped files."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "minimind_ray", "shipped")
        rmtree(target, ignore_errors=True)
        # A cluster's node has no cluster.yaml.
        for top in (Path(name) for name in SHIPPED if Path(name).exists()):
            for file in sorted(top.rglob("*")) if top.is_dir() else [top]:
                if file.is_file() and "__pycache__" not in file.parts:
                    self.mkpath(str((target / file).parent))
                    self.copy_file(str(file), str(target / file))


setup(cmdclass={"build_py": BuildPy})

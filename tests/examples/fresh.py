"""A fresh environment with flarebus installed from this checkout as a user installs it, made without a network.

Only the third-party packages are shared, through a .pth file that names where they lie. Editable installs are not
followed along that way: what flarebus, its pipes and its entry points are is what pip put into the environment.
"""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

__all__ = ["ROOT", "FreshEnvironment"]

ROOT = Path(__file__).parents[2]
_PACKAGING = ("pyproject.toml", "README.md", "LICENSE", "flarebus", "pipes", "workflows")
_BUILT = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
# For a command of a test, on a machine that does other things too.
LIMIT_S = 100.0


class FreshEnvironment:
    """An environment in a folder of its own.

    Args:
        folder: an empty place for it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "env" / "bin"
        self._sources = folder / "sources"
        venv.EnvBuilder(symlinks=True).create(folder / "env")
        (place,) = (folder / "env" / "lib").glob("python*/site-packages")
        self.place = place
        shared = [path for path in (*site.getsitepackages(), *sys.path) if path.endswith(("-packages",))]
        (place / "shared.pth").write_text("\n".join(dict.fromkeys(shared)))
        self._install_copy("flarebus", [ROOT / name for name in _PACKAGING])

    def install(self, project: Path) -> None:
        """Install a distribution from its folder."""
        self._install_copy(project.name, list(project.iterdir()))

    def run(self, command: Sequence[str], folder: Path, limit_s: float = LIMIT_S) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment, or of the system, in a folder."""
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
        return subprocess.run(
            command,
            cwd=folder,
            env={**environ, "PATH": f"{self.bin}{os.pathsep}{environ['PATH']}", "PYTHONNOUSERSITE": "1"},
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )

    def _install_copy(self, name: str, parts: Sequence[Path]) -> None:
        # A copy: building leaves folders beside the sources.
        source = self._sources / name
        source.mkdir(parents=True)
        for part in parts:
            if part.is_dir():
                shutil.copytree(part, source / part.name, ignore=_BUILT)
            else:
                shutil.copy(part, source)
        # Nothing is looked up, built elsewhere or removed: what the shared folder holds stays as it is.
        offline = ["--no-deps", "--no-build-isolation", "--no-index", "--no-cache-dir", "--ignore-installed"]
        pip = [str(self.bin / "python"), "-m", "pip", "--isolated", "--disable-pip-version-check", "install"]
        done = self.run([*pip, *offline, "--no-compile", "--quiet", str(source)], self.folder)
        assert done.returncode == 0, done.stdout + done.stderr

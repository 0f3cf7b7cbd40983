"""The code of a job: which files belong to its training scripts and what they are called inside a job folder.

Everything below the folder of the main script counts, Python files only: data stays where it is. A script of a single
site that lies elsewhere brings its own folder, under `site_scripts/`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from flarebus.errors import ConfigError

__all__ = ["CodeLayout", "file_content", "lay_out"]

# A script in a home folder would drag everything along: past these bounds that is what has happened.
_MAX_FILES = 2000
_MAX_BYTES = 64 * 2**20
_MAX_FOLDERS = 5000
_SKIPPED = frozenset({"__pycache__", "node_modules", "site-packages"})
# A folder that holds one of these is an environment or another job, not code of this one.
_FOREIGN = ("pyvenv.cfg", "job.json", "run.json")


@dataclass(frozen=True, slots=True)
class CodeLayout:
    """Where everything lies inside the `code/` of a job folder.

    Args:
        scripts: each training script -> its name below `code/`, with forward slashes.
        files: name below `code/` -> the file; the scripts included.
    """

    scripts: dict[str, str]
    files: dict[str, Path]

    def same_code(self, other: CodeLayout) -> bool:
        """Whether both hold the same names with the same content. Reads the files."""
        if self.files.keys() != other.files.keys():
            return False
        return all(file_content(path) == file_content(other.files[name]) for name, path in self.files.items())


def lay_out(code_dir: Path, scripts: Iterable[str]) -> CodeLayout:
    """Name every script and collect the Python files around it.

    Args:
        code_dir: folder of the main script, absolute.
        scripts: absolute paths of the training scripts; the order decides the names of folders outside `code_dir`.

    Raises:
        ConfigError: there is more in the folder of a script than can belong to it.
    """
    names: dict[str, str] = {}
    folders: dict[Path, str] = {code_dir: ""}
    for script in scripts:
        path = Path(script)
        if path.is_relative_to(code_dir):
            names[script] = path.relative_to(code_dir).as_posix()
        else:
            prefix = folders.setdefault(path.parent, f"site_scripts/{len(folders) - 1}/")
            names[script] = prefix + path.name
    files: dict[str, Path] = {}
    for folder, prefix in folders.items():
        files.update(_python_files(folder, prefix))
    # A script whose folder is skipped by the walk still belongs to the job.
    files.update({name: Path(script) for script, name in names.items()})
    return CodeLayout(names, files)


def _python_files(folder: Path, prefix: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    n_bytes = 0
    for n_folders, (here, below, names) in enumerate(os.walk(folder)):
        below[:] = sorted(name for name in below if _is_code(Path(here, name)))
        for name in sorted(names):
            path = Path(here, name)
            if name.endswith(".py") and path.is_file():
                found[prefix + path.relative_to(folder).as_posix()] = path
                n_bytes += path.stat().st_size
        if len(found) > _MAX_FILES or n_bytes > _MAX_BYTES or n_folders > _MAX_FOLDERS:
            allowed = (
                f"{folder} holds more than belongs to a job; put the script and its modules in a folder of their own"
            )
            raise ConfigError("train_script", str(folder), allowed)
    return found


def _is_code(folder: Path) -> bool:
    if folder.name.startswith(".") or folder.name in _SKIPPED:
        return False
    return not any(folder.joinpath(mark).exists() for mark in _FOREIGN)


def file_content(path: Path) -> bytes | None:
    """The bytes of a file, or None when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return None

"""Where another process has to look to import the very flarebus, pipes and workflows that run here."""

from __future__ import annotations

import importlib.util
import os
import site
from collections.abc import Mapping
from pathlib import Path

__all__ = ["import_path"]

_PACKAGES = ("flarebus", "flarebus_pipes", "workflows")


def import_path(environ: Mapping[str, str]) -> dict[str, str]:
    """The variable ``PYTHONPATH`` for a process that gets `environ` otherwise; nothing if it needs none.

    What is installed is left out: an interpreter of the same installation finds it, and to another one the compiled
    packages beside it would be wrong. Relative folders become absolute, for the process may have another working
    directory.
    """
    installed = {os.path.realpath(place) for place in (*site.getsitepackages(), site.getusersitepackages())}
    places: list[str] = []
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        place = str(Path(spec.origin).absolute().parent.parent)
        if os.path.realpath(place) not in installed and place not in places:
            places.append(place)
    before = environ.get("PYTHONPATH")
    places += [os.path.abspath(place) for place in before.split(os.pathsep)] if before else []
    return {"PYTHONPATH": os.pathsep.join(places)} if places else {}

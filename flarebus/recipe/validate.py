"""Checks of recipe parameters that are more than one value: files, models, aggregators, sites.

Nothing here writes; files are looked for, never opened.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flarebus.address import check_name
from flarebus.errors import ConfigError
from flarebus.job.checks import check_mapping, check_number, check_text
from flarebus.job.class_ref import ClassRef
from flarebus.job.file_names import CKPT_SUFFIXES, saved_suffixes, stem_of, suffix_of
from flarebus.job.initial import params_of
from flarebus.job.keras_models import is_keras_model
from flarebus.job.kinds import FrameworkType
from flarebus.workflow.aggregator import AGGREGATOR_METHODS
from flarebus.workflow.params import as_array, flatten

__all__ = [
    "check_aggregator",
    "check_best_filename",
    "check_ckpt",
    "check_clients",
    "check_model",
    "check_plain",
    "check_script",
    "check_site_name",
    "check_weights",
    "find_file",
]

# A site of this name could not be told from the server's cell.
_RESERVED_SITES = frozenset({"server"})
# Values of a model that are no arrays and are kept as they are.
_PLAIN = (type(None), bool, int, float, complex, str, bytes)
# Names, without suffix, of the other models that a run keeps.
_TAKEN = re.compile(r"FL_global_model|model-\d+")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


def check_site_name(parameter: str, name: object) -> str:
    """A name that a site may have; `server` and `@ALL` mean something else."""
    if isinstance(name, str) and (name.lower() in _RESERVED_SITES or name == "@ALL"):
        raise ConfigError(parameter, name, "this name is reserved; choose another one for the site")
    return check_name(name, parameter)


def check_clients(value: object) -> tuple[str, ...] | None:
    """Names of sites, each once, at least one; None for all sites."""
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ConfigError("clients", value, "a list of site names, or None for all sites")
    names = tuple(dict.fromkeys(check_site_name("clients", name) for name in value))
    if not names:
        raise ConfigError("clients", value, "at least one site name, or None for all sites")
    return names


def find_file(path: Path) -> Path | None:
    """The absolute path of a file, looked for in the working directory and beside the running script; or None."""
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    places = [Path.cwd(), *([Path(main).parent] if main else [])]
    for place in places:
        # `..` and links in the user's path are kept: the name stays the one he wrote.
        found = Path(os.path.abspath(place / path))
        if found.is_file():
            return found
    return None


def check_script(parameter: str, value: object) -> str:
    """The absolute path of a Python file that is there."""
    text = check_text(parameter, value)
    found = find_file(Path(text)) if text else None
    if found is None:
        raise ConfigError(parameter, text, f"no such file; looked in {Path.cwd()} and beside the running script")
    if found.suffix != ".py":
        raise ConfigError(parameter, text, "a Python file, its name ending in .py")
    return str(found)


def check_ckpt(value: object) -> tuple[Path | None, bool]:
    """Where an `initial_ckpt` is, and whether it travels with the job.

    An absolute path may be one that only the server has; a relative one must be there and becomes part of the job.
    """
    if value is None:
        return None, False
    if not isinstance(value, (str, os.PathLike)) or isinstance(value, bytes) or not os.fspath(value):
        raise ConfigError("initial_ckpt", value, "the path of a file, or None")
    path = Path(value)
    if suffix_of(path) not in CKPT_SUFFIXES:
        raise ConfigError("initial_ckpt", str(value), "a file ending in " + ", ".join(CKPT_SUFFIXES))
    if path.is_absolute():
        return path, False
    found = find_file(path)
    if found is None:
        allowed = "no such file; a relative path must be there, an absolute one may be on the server only"
        raise ConfigError("initial_ckpt", str(value), allowed)
    return found, True


def check_model(value: object) -> Any:
    """A `ClassRef`, or what `params_of` can convert; None stays None."""
    if value is None:
        return None
    if isinstance(value, Mapping) and ClassRef.is_description(value):
        return ClassRef.parse(value, "model")
    if is_keras_model(value):
        params_of(value)  # one that is not built yet is refused now
        return value
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.nn.Module):
        return value
    if isinstance(value, type):
        raise ConfigError("model", value, f"an instance, not the class: {value.__name__}()")
    if not isinstance(value, (Mapping, list, tuple, np.ndarray)):
        allowed = 'a module, {"class_path": "pkg.mod.Class", "args": {...}}, an array, or a list or dict of arrays'
        raise ConfigError("model", value, allowed)
    if not isinstance(value, np.ndarray) and not value:
        raise ConfigError("model", value, "holds no parameters; None starts without a model")
    for name, leaf in flatten(params_of(value)).items():
        array = as_array(leaf)
        if (array is None and not isinstance(leaf, _PLAIN)) or (array is not None and array.dtype.hasobject):
            raise ConfigError(f"model[{name!r}]", leaf, "an array, tensor or number, not a Python object")
    return value


def check_aggregator(value: object) -> Any:
    """An object with the methods of a `ModelAggregator`, or a `ClassRef` for one."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        return ClassRef.parse(value, "aggregator")
    if isinstance(value, type):
        raise ConfigError("aggregator", value, f"an instance, not the class: {value.__name__}()")
    missing = [name for name in AGGREGATOR_METHODS if not callable(getattr(value, name, None))]
    if missing:
        allowed = (
            f"needs the methods {', '.join(AGGREGATOR_METHODS)}; {type(value).__name__} lacks {', '.join(missing)}"
        )
        raise ConfigError("aggregator", value, allowed)
    return value


def check_plain(parameter: str, value: object) -> dict[str, Any]:
    """Name -> plain value, as JSON gives it back, so that a job that was exported has the same."""
    found = {}
    for name, each in check_mapping(parameter, value).items():
        if not isinstance(name, str) or not name:
            raise ConfigError(parameter, name, "names that are strings")
        try:
            found[name] = json.loads(json.dumps(each, allow_nan=False, default=_number))
        except (TypeError, ValueError) as error:
            allowed = f"numbers, strings, True, False, None, lists and dicts of them ({error})"
            raise ConfigError(f"{parameter}[{name!r}]", each, allowed) from None
    return found


def _number(value: object) -> Any:
    """What JSON makes of a NumPy number: the plain one."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is none of these")


def check_weights(value: object) -> dict[str, float] | None:
    """Site name -> weight from 0, finite; at least one above 0."""
    if value is None:
        return None
    weights = {
        check_site_name("aggregation_weights", site): check_number(
            f"aggregation_weights[{site!r}]", weight, minimum=0.0
        )
        for site, weight in check_mapping("aggregation_weights", value).items()
    }
    if weights and not any(weights.values()):
        raise ConfigError("aggregation_weights", value, "at least one weight above 0")
    return weights


def check_best_filename(best: object, save: object, framework: FrameworkType) -> str | None:
    """The name of the best model's file, given under its own name, its old one, or alike under both."""
    for parameter, value in (("best_model_filename", best), ("save_filename", save)):
        if value is None:
            continue
        allowed_suffixes = saved_suffixes(framework)
        if not isinstance(value, str) or not _FILE_NAME.fullmatch(value) or not value.endswith(allowed_suffixes):
            suffixes = " or ".join(allowed_suffixes)
            raise ConfigError(
                parameter, value, f"a plain file name of letters, digits, '.', '_', '-', ending in {suffixes}"
            )
        if _TAKEN.fullmatch(stem_of(Path(value))):
            raise ConfigError(parameter, value, "another name; this one is taken by the model of the last round")
    if best is not None and save is not None and best != save:
        raise ConfigError(
            "save_filename", save, f"must be the same as best_model_filename={best!r}; it is its old name"
        )
    found = best if best is not None else save
    return found if isinstance(found, str) else None

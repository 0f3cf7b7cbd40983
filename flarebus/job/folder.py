"""The job folder: `job.json`, `code/`, and the initial model where there is one. Written whole or not at all.

job.json             schema_version and the description; validated when read, unknown keys are errors
code/                the training scripts and the Python modules around them
model.safetensors    initial parameters, unless the model is named by its class
checkpoint/<file>    an `initial_ckpt` that is part of the job
models/<name>/<file> other models that are part of it
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from flarebus.errors import ConfigError, DecodeError
from flarebus.job.checks import check_mapping
from flarebus.job.definition import JobDefinition
from flarebus.job.initial import params_of
from flarebus.job.model_ref import ModelRef
from flarebus.job.site_config import SiteConfig
from flarebus.job.tensor_file import load_params, save_params

__all__ = ["SCHEMA_VERSION", "is_job_folder", "read_job", "write_job"]

SCHEMA_VERSION = 1
_JOB, _CODE, _MODEL, _CHECKPOINT, _MODELS = "job.json", "code", "model.safetensors", "checkpoint", "models"
# A description is a page of text; anything longer is not one.
_MAX_JOB_BYTES = 2**20


def is_job_folder(folder: Path) -> bool:
    """Whether `folder` looks like one that `write_job` made."""
    return folder.joinpath(_JOB).is_file() and folder.joinpath(_CODE).is_dir()


def write_job(job: JobDefinition, job_dir: Path) -> None:
    """Write `job` to `job_dir`, in place of a job that is there already.

    The new folder is complete before the old one goes; after an error the old one is as it was.

    Raises:
        ConfigError: `job_dir` is something else than a job folder or cannot be written, or the job cannot be
            described (a custom aggregator as an object, a script that is gone).
    """
    job_dir = Path(os.path.abspath(job_dir))
    if job_dir.exists() and not is_job_folder(job_dir) and (not job_dir.is_dir() or any(job_dir.iterdir())):
        raise ConfigError("job_dir", str(job_dir), "exists and is no job folder; choose another one")
    try:
        job_dir.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target: a rename works only within one file system.
        fresh = Path(tempfile.mkdtemp(prefix=f".{job_dir.name}.", dir=job_dir.parent))
        try:
            _fill(job, fresh)
            _swap(fresh, job_dir)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise ConfigError("job_dir", str(job_dir), f"cannot write the job: {error.strerror or error}{where}") from error


def read_job(job_dir: Path) -> JobDefinition:
    """Read a job folder.

    Raises:
        ConfigError: there is none, or its description is wrong; the parameter begins with the path of `job.json`.
    """
    job_dir = Path(os.path.abspath(job_dir))
    try:
        return _read(job_dir)
    except ConfigError as error:
        raise ConfigError(f"{job_dir / _JOB}: {error.parameter}", error.value, error.allowed) from error


def _fill(job: JobDefinition, folder: Path) -> None:
    data = job.to_json()
    layout = job.code_layout()
    for name, source in layout.files.items():
        target = folder / _CODE / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    for config in (data["site_defaults"], *data["sites"].values()):
        config["train_script"] = layout.scripts.get(config["train_script"], "")
    if data["model"] == "params":
        save_params(params_of(job.model), folder / _MODEL)
    if job.ckpt_is_bundled and job.initial_ckpt is not None:
        folder.joinpath(_CHECKPOINT).mkdir()
        shutil.copyfile(job.initial_ckpt, folder / _CHECKPOINT / job.initial_ckpt.name)
        data["initial_ckpt"] = f"{_CHECKPOINT}/{job.initial_ckpt.name}"
    for name, ref in job.models.items():
        if ref.is_bundled:
            target = folder / _MODELS / name / ref.path.name
            target.parent.mkdir(parents=True)
            shutil.copyfile(ref.path, target)
            data["models"][name]["path"] = f"{_MODELS}/{name}/{ref.path.name}"
    text = json.dumps({"schema_version": SCHEMA_VERSION, **data}, indent=2, allow_nan=False)
    folder.joinpath(_JOB).write_text(text + "\n", encoding="utf-8")
    folder.chmod(0o755)  # mkdtemp made it private; a job folder is there to be handed on


def _swap(fresh: Path, target: Path) -> None:
    if not target.exists():
        fresh.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        target.rename(old / "job")
        try:
            fresh.rename(target)
        except OSError:
            (old / "job").rename(target)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _read(job_dir: Path) -> JobDefinition:
    data = _load_json(job_dir)
    version = data.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise ConfigError("schema_version", version, f"this version of flarebus reads {SCHEMA_VERSION}")
    code_dir = job_dir / _CODE
    model = _load_model(job_dir / _MODEL) if data.get("model") == "params" else None
    job = JobDefinition.from_json(data, code_dir, model)
    ckpt = job.initial_ckpt
    if ckpt is not None and job.ckpt_is_bundled:
        ckpt = _inside(job_dir, str(ckpt), "initial_ckpt")
    elif ckpt is not None and not ckpt.is_absolute():
        raise ConfigError("initial_ckpt", str(ckpt), "an absolute path, unless ckpt_is_bundled is true")
    return replace(
        job,
        initial_ckpt=ckpt,
        models={name: _model_placed(job_dir, name, ref) for name, ref in job.models.items()},
        site_defaults=_placed(job.site_defaults, code_dir, "site_defaults"),
        sites={site: _placed(config, code_dir, f"sites[{site!r}]") for site, config in job.sites.items()},
    )


def _load_json(job_dir: Path) -> dict[str, Any]:
    path = job_dir / _JOB
    try:
        if path.stat().st_size > _MAX_JOB_BYTES:
            raise ConfigError("job", path.stat().st_size, f"a description has at most {_MAX_JOB_BYTES} bytes")
        return check_mapping("job", json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError("job_dir", str(job_dir), f"no job can be read there: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError("job", path.name, f"not JSON: {error}") from error


def _load_model(path: Path) -> dict[Any, Any]:
    try:
        return load_params(path)
    except OSError as error:
        raise ConfigError("model", path.name, f"cannot be read: {error.strerror or error}") from error
    except DecodeError as error:
        raise ConfigError("model", path.name, str(error).removeprefix(f"{path}: ")) from error


def _placed(config: SiteConfig, code_dir: Path, parameter: str) -> SiteConfig:
    if not config.train_script:
        return config
    script = _inside(code_dir, config.train_script, f"{parameter}['train_script']")
    return replace(config, train_script=str(script))


def _model_placed(job_dir: Path, name: str, ref: ModelRef) -> ModelRef:
    return replace(ref, path=_inside(job_dir, str(ref.path), f"models[{name!r}]")) if ref.is_bundled else ref


def _inside(root: Path, name: str, parameter: str) -> Path:
    """`root / name`; a description never names a file outside its own folder."""
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or not parts.parts:
        raise ConfigError(parameter, name, f"a path below {root}")
    path = root.joinpath(*parts.parts)
    if not path.resolve().is_relative_to(root.resolve()):
        raise ConfigError(parameter, name, f"a path below {root}; it leaves it through a link")
    return path

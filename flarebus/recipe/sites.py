"""Per-site parameters of a recipe: what each site runs, from what is said for all and what is said for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flarebus.errors import ConfigError
from flarebus.job.checks import check_enum, check_flag, check_int, check_keys, check_mapping
from flarebus.job.kinds import FrameworkType
from flarebus.job.site_config import DEFAULT_COMMAND, SiteConfig
from flarebus.recipe.validate import check_script, check_site_name

__all__ = ["make_sites", "site_parameters"]

_SITE_KEYS = (
    "train_script",
    "train_args",
    "launch_external_process",
    "command",
    "framework",
    "server_expected_format",
    "params_transfer_type",
    "launch_once",
    "shutdown_timeout",
    "launch_timeout",
    "attach",
    "client_memory_gc_rounds",
    "cuda_empty_cache",
)


def make_sites(given: Mapping[str, Any]) -> tuple[SiteConfig, dict[str, SiteConfig]]:
    """What a site runs that has no configuration of its own, and what those run that have one.

    Args:
        given: the parameters of the recipe, by name; `per_site_config` among them.

    Raises:
        ConfigError: one of them is wrong; named as the user wrote it.
    """
    sites = _own_configs(given["per_site_config"], given)
    # What it takes to start processes is of use in a job as long as one site does.
    some_external = any(config.is_external for config in sites.values())
    return _site_config(_inherited(given, {}) if some_external else given), sites


def site_parameters(config: SiteConfig) -> dict[str, Any]:
    """The parameters of a recipe, or of one site, that make `config`."""
    return {key: getattr(config, "memory_gc_rounds" if key == "client_memory_gc_rounds" else key) for key in _SITE_KEYS}


def _site_config(given: Mapping[str, Any], own: Mapping[str, str] | None = None) -> SiteConfig:
    """What a site runs.

    Args:
        given: the parameters, by name.
        own: how the user wrote a parameter that he gave for one site.
    """
    name = {key: key for key in _SITE_KEYS} | dict(own or {})
    check_enum(name["framework"], given["framework"], FrameworkType)
    gc_rounds = check_int(name["client_memory_gc_rounds"], given["client_memory_gc_rounds"], 0)
    cuda = check_flag(name["cuda_empty_cache"], given["cuda_empty_cache"])
    if cuda and not gc_rounds:
        raise ConfigError(
            name["cuda_empty_cache"], cuda, "needs client_memory_gc_rounds from 1: it is done at these clean-ups"
        )
    values = {key: given[key] for key in _SITE_KEYS if key != "client_memory_gc_rounds"}
    values["train_script"] = check_script(name["train_script"], given["train_script"])
    try:
        return SiteConfig(**values, memory_gc_rounds=gc_rounds)
    except ConfigError as error:
        raise ConfigError(name.get(error.parameter, error.parameter), error.value, error.allowed) from error


def _own_configs(per_site_config: object, given: Mapping[str, Any]) -> dict[str, SiteConfig]:
    """Each site's configuration: its own values over those of all."""
    if per_site_config is None:
        return {}
    sites = {}
    for site, own in check_mapping("per_site_config", per_site_config).items():
        check_site_name("per_site_config", site)
        label = f"per_site_config[{site!r}]"
        check_keys(check_mapping(label, own), _SITE_KEYS, (), label)
        # None means the same as leaving it out, as in job scripts that pass on what they were given.
        own = {key: value for key, value in own.items() if value is not None or key == "launch_timeout"}
        values = {**_inherited(given, own), **own}
        sites[site] = _site_config(values, {key: f"{label}[{key!r}]" for key in own})
    return sites


def _inherited(given: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """What a site with its `own` values takes over from the job."""
    values = dict(given)
    # A site says in its own way who starts the process, if there is one at all.
    for mine, other in (("attach", "launch_external_process"), ("launch_external_process", "attach")):
        if own.get(mine) is True:
            values[other] = False
    launched, attached = ({**values, **own}[key] is True for key in ("launch_external_process", "attach"))
    # What it takes to start a process is then meant for other sites.
    if not launched:
        values |= {"command": DEFAULT_COMMAND, "launch_once": True}
    if not launched and not attached:
        values["shutdown_timeout"] = 0.0
    return values

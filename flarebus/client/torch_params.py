"""Between a model as it travels and a PyTorch module: load what was received, take out what is sent.

Names are those of the module's state dict, behind a prefix if the server's model has one. What does not fit is an error
that shows both sides: half a model loaded would train on, and spoil the mean in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from flarebus.client.convert import to_tensors
from flarebus.errors import ClientApiError

__all__ = ["AdapterParams", "ModuleParams"]

# So many names of each kind stand in an error.
_N_SHOWN = 4


class ModuleParams:
    """The whole state dict of a module: parameters and buffers.

    Args:
        strict: both sides must have the same names. If not, names that only one side has are left alone: what only the
            module has stays here, and what only the server has goes back as it came.
        prefix: what the server's names have in front of the module's, such as ``model.``.
        prefix_parameter: what the user would set `prefix` with, for the error that suggests one; "" for nothing.
    """

    def __init__(self, strict: bool, prefix: str = "", prefix_parameter: str = "") -> None:
        self.strict = strict
        self.prefix = prefix
        self._prefix_parameter = prefix_parameter
        self._shared: list[str] | None = None  # names of the server's model; None: it has sent none yet
        self._others: dict[str, Any] = {}  # what the server has and the module has not

    def load(self, module: nn.Module, params: Mapping[str, Any] | None) -> None:
        """Copy what was received into the module, whatever device that is on; nothing if the server has no model yet.

        Args:
            params: name -> array or tensor, of the shape that the module has; only read.

        Raises:
            ClientApiError: names or shapes differ; the module is as it was.
        """
        if not params:
            return
        state = self._state(module)
        here = {name: self._local(name) for name in params}
        self._check(state, {local: params[name] for name, local in here.items() if local is not None}, params)
        self._put(module, to_tensors({local: params[name] for name, local in here.items() if local in state}))
        self._shared = list(params)
        self._others = {name: params[name] for name, local in here.items() if local not in state}

    def take(self, module: nn.Module) -> dict[str, Any]:
        """What is sent: under the server's names, tensors on the CPU. Those that are there already are not copied, and
        tied ones stay tied."""
        moved: dict[tuple[Any, ...], Tensor] = {}
        found: dict[str, Any] = {}
        for name, value in self._state(module).items():
            if isinstance(value, Tensor):
                key = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
                # Those without elements have no memory by which they could be told apart.
                value = moved.setdefault(key, value.detach().cpu()) if value.numel() else value.detach().cpu()
            found[self.prefix + name] = value
        if self._shared is None:
            return found
        return {name: found[name] if name in found else self._others[name] for name in self._shared}

    def to_local(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """Take the server's prefix off names; those without it are left out."""
        pairs = ((self._local(name), value) for name, value in named.items())
        return {local: value for local, value in pairs if local is not None}

    def to_server(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """Put the server's prefix before names."""
        return {self.prefix + name: value for name, value in named.items()}

    def _local(self, name: str) -> str | None:
        return name[len(self.prefix) :] if name.startswith(self.prefix) else None

    def _state(self, module: nn.Module) -> dict[str, Any]:
        return module.state_dict()

    def _put(self, module: nn.Module, tensors: dict[str, Any]) -> None:
        module.load_state_dict(tensors, strict=False)  # names were looked at, and these all fit

    def _check(self, state: Mapping[str, Any], given: Mapping[str, Any], params: Mapping[str, Any]) -> None:
        missing = [repr(self.prefix + name) for name in state if name not in given]
        unknown = [repr(name) for name in params if self._local(name) not in state]
        wrong = []
        if self.strict or len(unknown) == len(params):
            wrong += [f"the server's model lacks {_some(missing)}"] if missing else []
            wrong += [f"the module has no {_some(unknown)}"] if unknown else []
        shapes = [
            f"{self.prefix + name!r} is {_shape(given[name])} there and {_shape(value)} here"
            for name, value in state.items()
            if name in given and _shape(given[name]) != _shape(value)
        ]
        wrong += [_some(shapes)] if shapes else []
        if wrong:
            told = "; ".join(wrong)
            raise ClientApiError(f"the received model does not fit the module: {told}{self._hint(state, params)}")

    def _hint(self, state: Mapping[str, Any], params: Mapping[str, Any]) -> str:
        there, here = _prefix_between(state, params), _prefix_between(params, state)
        if there and self._prefix_parameter:
            return f". The server's names have {there!r} in front: patch with {self._prefix_parameter}={there!r}"
        if there:
            return (
                f". The server's names have {there!r} in front: give the recipe the model without what it is wrapped in"
            )
        if here:
            return f". The module's names have {here!r} in front: give the recipe the very module that is trained"
        return ". Give the recipe the model that the script trains"


class AdapterParams(ModuleParams):
    """Only the adapter of a PEFT model, under the names that PEFT gives it in files: no frozen weight travels.

    Args:
        strict: as for `ModuleParams`; likewise the others.
    """

    def _state(self, module: nn.Module) -> dict[str, Any]:
        found: dict[str, Any] = _import_peft().get_peft_model_state_dict(module, adapter_name=module.active_adapter)
        return found

    def _put(self, module: nn.Module, tensors: dict[str, Any]) -> None:
        _import_peft().set_peft_model_state_dict(module, tensors, adapter_name=module.active_adapter)


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ClientApiError(
            f"an adapter is exchanged with PEFT, which cannot be imported here ({error}): pip install 'flarebus[peft]'"
        ) from error
    return peft


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _N_SHOWN} more" if len(names) > _N_SHOWN else ""
    return ", ".join(names[:_N_SHOWN]) + more


def _prefix_between(short: Mapping[str, Any], long: Mapping[str, Any]) -> str:
    """What all names of `short` need in front to be names of `long`, or ""."""
    first = next(iter(short), None)
    for name in long:
        if first is not None and name.endswith(f".{first}"):
            prefix = name[: -len(first)]
            if all(prefix + each in long for each in short):
                return prefix
    return ""

"""HeldModel: a model that stays with whoever made it, for passing on. Whoever gets it in the end fetches it there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flarebus.cell import Payload
from flarebus.codec import edit_model, has_params
from flarebus.errors import DecodeError
from flarebus.model import FLModel

__all__ = ["HeldModel"]


class HeldModel:
    """A result whose arrays were not fetched. In a `Task` it goes on to other sites, which fetch them from the holder.

    Args:
        body: the encoded model.
        payload: where its arrays are.
        release: told when nobody needs them any more: None, or why the result did not count.

    Raises:
        DecodeError: what is around the parameters cannot be read without them.
    """

    def __init__(self, body: bytes, payload: Payload, release: Callable[[str | None], None]) -> None:
        self._body = body
        self._payload = payload
        self._release: Callable[[str | None], None] | None = release
        self.around = FLModel()
        """Metrics, meta and rounds of the model; no parameters."""
        self.has_params = has_params(body)
        """Whether there are parameters where it is held."""
        if edit_model(body, self._look) is None:
            raise DecodeError("its metrics or meta hold arrays")

    def _look(self, model: FLModel) -> FLModel:
        self.around = model
        return model

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return self._payload.nbytes

    def payload_around(self, model: FLModel, beside: Mapping[str, Any]) -> Payload:
        """Its parameters, and plain values beside them, with what is around those of `model`, for a message."""
        body = edit_model(self._body, lambda _: model, beside)
        assert body is not None  # it could be read
        return Payload(body, self._payload.bundle, self._payload.manifest)

    def release(self) -> None:
        """Nobody will fetch it any more: the holder may forget it. Idempotent."""
        self._settle(None)

    def refuse(self, reason: str) -> None:
        """The same, and its maker hears why it did not count."""
        self._settle(reason)

    def _settle(self, refused: str | None) -> None:
        release, self._release = self._release, None
        if release is not None:
            release(refused)

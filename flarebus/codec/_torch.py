"""Handlers of torch tensors and parameters. torch is imported when a tensor arrives, never by this module alone.

A tensor travels as an array on its own memory; dtypes that NumPy lacks travel as integers of the same size. It comes
back on the CPU, as a leaf. Attributes, hooks and `.grad` do not travel.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from flarebus.codec._decoder import Decoder
from flarebus.codec._encoder import Encoder, Region
from flarebus.codec._ids import TENSOR
from flarebus.codec._numpy import Array, array_node, read_array, view_node
from flarebus.codec._registry import Malformed, Refused, Registry

if TYPE_CHECKING:
    import torch

__all__ = ["add_torch"]

_REQUIRES_GRAD = 1
_PARAMETER = 2
_CODE_SHIFT = 2  # the bits above say which dtype the integers stand for
_DEVICE_SHIFT = 64  # memory of other devices gets addresses above all of the host's

# dtypes that NumPy has, too.
_FLOATS = ("float16", "float32", "float64", "complex64", "complex128")
_INTEGERS = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
# dtypes it lacks: code on the wire, name, integer dtype of the same size. Never renumber.
_CARRIED = (
    (1, "bfloat16", "int16"),
    (2, "float8_e4m3fn", "uint8"),
    (3, "float8_e5m2", "uint8"),
    (4, "float8_e4m3fnuz", "uint8"),
    (5, "float8_e5m2fnuz", "uint8"),
    (6, "float8_e8m0fnu", "uint8"),
    (7, "float4_e2m1fn_x2", "uint8"),
    (8, "complex32", "int32"),
)


class _Bridge:
    """torch and the tables made from it; one for the process, made at the first tensor."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.from_numpy = torch.from_numpy
        # dtype -> (code, dtype that stands for it or None)
        self.out: dict[torch.dtype, tuple[int, torch.dtype | None]] = {
            getattr(torch, name): (0, None) for name in _FLOATS + _INTEGERS if hasattr(torch, name)
        }
        self.back: dict[int, tuple[torch.dtype, torch.dtype]] = {}
        for code, name, carrier in _CARRIED:
            if hasattr(torch, name):
                self.out[getattr(torch, name)] = (code, getattr(torch, carrier))
                self.back[code] = (getattr(torch, name), getattr(torch, carrier))


@cache
def _bridge() -> _Bridge:
    return _Bridge()


def add_torch(registry: Registry) -> None:
    """Register tensors and parameters, by name."""
    registry.add_handlers(TENSOR, ("torch:Tensor", "torch.nn.parameter:Parameter"), _encode_tensor, _decode_tensor)


# -- out ----------------------------------------------------------------------------------------------------------


def _encode_tensor(value: torch.Tensor, sink: Encoder, depth: int) -> list[Any]:
    bridge = _bridge()
    flags = 0
    if type(value) is not bridge.torch.Tensor:
        flags = _PARAMETER
    if value.requires_grad:
        flags |= _REQUIRES_GRAD
        value = value.detach()
    known = bridge.out.get(value.dtype)
    if known is None:
        raise Refused(f"a tensor of {value.dtype}", "convert it to a dense dtype")
    code, carrier = known
    if carrier is not None:
        flags |= code << _CODE_SHIFT
    try:
        array = (value if carrier is None else value.view(carrier)).numpy()
    except (TypeError, RuntimeError):
        return [TENSOR, flags, *_host_node(value, carrier, sink)]
    return [TENSOR, flags, *array_node(array, sink)]


def _host_node(value: torch.Tensor, carrier: torch.dtype | None, sink: Encoder) -> list[Any]:
    """Return the node of a tensor whose memory itself cannot be an array: another device, lazy bits, or not dense."""
    torch = _bridge().torch
    if value.layout is not torch.strided or value.is_nested or value.is_quantized:
        raise Refused(f"a tensor of layout {value.layout}", "send value.to_dense()")
    if value.is_meta:
        raise Refused("a tensor on the device meta", "it has no values")
    if value.is_conj() or value.is_neg():
        value = value.resolve_conj().resolve_neg()
    if carrier is not None:
        value = value.view(carrier)
    return array_node(value.numpy(), sink) if value.is_cpu else _fetched_node(value, sink)


def _fetched_node(value: torch.Tensor, sink: Encoder) -> list[Any]:
    """Return the node of a tensor on another device; tensors that share memory there share it when they arrive."""
    if not value.numel():
        return array_node(value.cpu().numpy(), sink)
    start = value.data_ptr() + (1 + sink.device_number(str(value.device)) << _DEVICE_SHIFT)
    shape = tuple(value.shape)
    strides = tuple(stride * value.itemsize for stride in value.stride())
    extent = value.itemsize + sum((dim - 1) * stride for dim, stride in zip(shape, strides, strict=True))
    region = sink.region_of(start, extent)
    if region is not None and value.nbytes <= region.end - region.start:
        reference = sink.place_region(region, lambda: _fetched_region(region, value, start).data)
        dtype = _bridge().torch.empty(0, dtype=value.dtype).numpy().dtype
        return view_node(dtype, reference, start - region.start, shape, strides)
    key = (start, extent, value.nbytes, str(value.dtype), shape, strides)
    return array_node(sink.fetched(key, value, lambda: value.cpu().numpy()), sink)


def _fetched_region(region: Region, member: torch.Tensor, start: int) -> Array:
    """Return the bytes of a region that `member` lies in, (n_bytes,) uint8, copied from the device."""
    torch = _bridge().torch
    first = member.storage_offset() * member.itemsize - (start - region.start)
    flat = torch.empty(0, dtype=torch.uint8, device=member.device)
    flat.set_(member.untyped_storage(), first, (region.end - region.start,), (1,))
    found: Array = flat.cpu().numpy()
    return found


# -- in -----------------------------------------------------------------------------------------------------------


def _decode_tensor(node: list[Any], source: Decoder, depth: int) -> torch.Tensor:
    try:
        bridge = _bridge()
    except ImportError as error:
        raise Malformed("a torch tensor came, and torch is not here: pip install 'flarebus[torch]'") from error
    flags = node[1]
    if type(flags) is not int or flags < 0:
        raise Malformed("a tensor whose flags are no number")
    found: torch.Tensor = bridge.from_numpy(read_array(node[2:], source))
    if not flags:
        return found
    code = flags >> _CODE_SHIFT
    if code:
        if code not in bridge.back:
            raise Malformed(f"a tensor of dtype {code}, which this torch does not know")
        dtype, carrier = bridge.back[code]
        if found.dtype is not carrier:
            raise Malformed(f"a tensor of {dtype} on bytes of another size")
        found = found.view(dtype)
    requires_grad = bool(flags & _REQUIRES_GRAD)
    if flags & _PARAMETER:
        found = bridge.torch.nn.Parameter(found, requires_grad=requires_grad)
    else:
        found.requires_grad_(requires_grad)
    return found

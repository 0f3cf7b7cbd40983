"""Torch tensors travel with dtype, layout, gradient flag and shared storage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from flarebus.codec import decode, encode
from flarebus.codec._encoder import encode_with
from flarebus.codec._ids import TENSOR
from flarebus.codec._numpy import add_numpy
from flarebus.codec._plain import add_plain
from flarebus.codec._registry import Registry
from flarebus.codec._torch import _decode_tensor, _fetched_node
from flarebus.errors import EncodeError

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = [
    torch.bool,
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    *(torch.complex32, torch.complex64, torch.complex128),
]


def round_trip(value: Any, **options: Any) -> Any:
    body, buffers = encode(value, **options)
    return decode(body, [bytearray(buffer) for buffer in buffers])


def bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return (
        type(left) is type(right)
        and (left.dtype, left.shape, left.requires_grad) == (right.dtype, right.shape, right.requires_grad)
        and bits(left) == bits(right)
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("threshold", [1, 1024])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_every_dense_dtype_travels(dtype: torch.dtype, threshold: int, device: str) -> None:
    """Every dense dtype comes back bit for bit, in every layout, on the CPU."""
    size = torch.empty((), dtype=dtype).itemsize
    seeds = torch.arange(24 * size, dtype=torch.uint8) % 2
    base = seeds.view(dtype).reshape(4, 6).to(device)
    value = [base, base[1, 2], base[:0], base.t(), base[:, ::2], base[1:3, 2:], base.clone(), base[0].expand(3, 6)]
    found = round_trip(value, externalise_from=threshold)

    assert all(same(a, b) for a, b in zip(found, value, strict=True))
    assert {one.device.type for one in found} == {"cpu"}


def test_the_packed_four_bit_dtype_travels() -> None:
    """Two four-bit numbers in a byte come back as they went."""
    value = torch.arange(8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    found = round_trip(value)

    assert found.dtype is torch.float4_e2m1fn_x2
    assert torch.equal(found.view(torch.uint8), value.view(torch.uint8))


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_flags_and_parameters_stay(device: str) -> None:
    """Whether a tensor requires a gradient stays; a parameter stays one; what was computed becomes a leaf."""
    plain = torch.ones(3, device=device)
    value = {
        "plain": plain,
        "needs": torch.ones(3, device=device, requires_grad=True),
        "parameter": torch.nn.Parameter(plain.clone()),
        "frozen": torch.nn.Parameter(plain.clone(), requires_grad=False),
    }
    found = round_trip(value)
    computed = round_trip(value["needs"] * 2)

    assert all(same(found[key], value[key].cpu() if key == "plain" else value[key]) for key in ("plain", "needs"))
    assert [type(found[key]) for key in ("parameter", "frozen")] == [torch.nn.Parameter] * 2
    assert [found[key].requires_grad for key in ("parameter", "frozen")] == [True, False]
    assert computed.requires_grad
    assert computed.is_leaf


def test_a_tensor_lies_on_the_buffer_it_came_in() -> None:
    """A tensor is neither copied on the way out nor on the way in."""
    value = torch.arange(1000, dtype=torch.bfloat16)
    body, buffers = encode([value])
    memory = bytearray(buffers[0])

    assert np.frombuffer(buffers[0], np.uint8).__array_interface__["data"][0] == value.data_ptr()
    decode(body, [memory])[0].zero_()
    assert not any(memory)


def test_channels_last_stays_channels_last() -> None:
    """A tensor with permuted axes in memory keeps them, without a copy."""
    value = torch.rand(2, 3, 8, 8).to(memory_format=torch.channels_last)
    found = round_trip(value)

    assert found.stride() == value.stride()
    assert torch.equal(found, value)


@pytest.mark.parametrize("n_items", [24, 6000], ids=["in the body", "beside it"])
def test_tied_storage_stays_tied(n_items: int) -> None:
    """Tensors and arrays on one storage share one when they arrive, at whatever offset, and travel once."""
    base = torch.arange(n_items, dtype=torch.float32)
    value = {
        "base": base,
        "parameter": torch.nn.Parameter(base),
        "tail": base[5:],
        "turned": base.view(-1, 6).t(),
        "column": base.view(-1, 6)[:, 1],
        "array": base.numpy(),
        "bits": base.view(torch.int32),
    }
    body, buffers = encode(value)
    found = decode(body, [bytearray(buffer) for buffer in buffers])

    assert sum(buffer.nbytes for buffer in buffers) == (base.nbytes if buffers else 0)
    assert all(torch.equal(torch.as_tensor(found[key]), torch.as_tensor(value[key])) for key in value)
    found["base"].fill_(-1)
    assert all(torch.as_tensor(found[key]).eq(-1).all() for key in value if key != "bits")
    assert len(set(found["bits"].tolist())) == 1


def test_a_model_with_tied_weights_stays_tied() -> None:
    """The state of a model that uses one weight twice travels once and comes back tied."""
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(50, 8), "head": torch.nn.Linear(8, 50, bias=False)})
    model["head"].weight = model["embed"].weight
    body, buffers = encode(model.state_dict())
    found = decode(body, [bytearray(buffer) for buffer in buffers])

    assert len(buffers) == 1
    assert type(found) is type(model.state_dict())
    assert found["embed.weight"].data_ptr() == found["head.weight"].data_ptr()


def test_lazily_conjugated_tensors_travel_by_value() -> None:
    """Tensors whose conjugation or sign is only noted come back as what they mean."""
    value = torch.tensor([1 + 2j, 3 - 4j])
    found = round_trip([value.conj(), value.conj().imag, value.to(torch.complex32).conj()])

    assert torch.equal(found[0], value.conj().resolve_conj())
    assert torch.equal(found[1], -value.imag)
    assert torch.equal(found[2].to(torch.complex64), found[0])


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: torch.eye(3).to_sparse(), "layout torch.sparse_coo"),
    (lambda: torch.empty(3, device="meta"), "device meta"),
    (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "torch.qint8"),
    (lambda: torch.nested.as_nested_tensor([torch.ones(2), torch.ones(3)]), "layout"),
    (lambda: torch.nn.Linear(2, 2), "Linear"),
    (torch.nn.UninitializedParameter, "UninitializedParameter"),
    (lambda: torch.device("cpu"), "torch.device"),
    (lambda: torch.float32, "torch.dtype"),
]


@pytest.mark.parametrize(("make", "found"), REFUSED, ids=range(8))
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch deprecates some of these kinds
def test_refuses_what_is_no_dense_tensor(make: Callable[[], Any], found: str) -> None:
    """Sparse, quantised and empty-handed tensors, and whole modules, are refused with their place."""
    value = make()

    with pytest.raises(EncodeError, match=r"value\['w'\]") as caught:
        encode({"w": value})

    assert found in caught.value.found


def test_memory_of_another_device_is_fetched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that share storage on another device are fetched together and stay tied; others are fetched alone."""
    monkeypatch.setattr(torch.Tensor, "cpu", torch.Tensor.clone)
    registry = Registry()
    add_plain(registry)
    add_numpy(registry)
    registry.add_handlers(  # each tensor is taken for one of another device
        TENSOR, (torch.Tensor,), lambda value, sink, depth: [TENSOR, 0, *_fetched_node(value, sink)], _decode_tensor
    )
    base = torch.arange(3000.0)
    value = [base[6:], base[:100], base.view(-1, 3).t(), base[:0], base[:1].expand(4, 1)]
    body, buffers = encode_with(registry, value, 1024)
    found = decode(body, [bytearray(buffer) for buffer in buffers])

    assert [buffer.nbytes for buffer in buffers] == [base.nbytes]
    assert all(torch.equal(a, b) for a, b in zip(found, value, strict=True))
    found[2].zero_()
    assert not found[0].any()
    assert not found[1].any()

    apart, buffers = encode_with(registry, [torch.ones(500), torch.ones(500).view(5, 100)], 1024)
    assert [buffer.nbytes for buffer in buffers] == [2000, 2000]
    assert len(decode(apart, buffers)) == 2

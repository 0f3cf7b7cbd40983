"""Addresses and names: one grammar for whatever becomes part of a path, a route or a log."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flarebus.address import Address, check_name, safe_path
from flarebus.errors import ConfigError
from tests.core.halves import thorough

names = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?", fullmatch=True).filter(
    lambda name: name.lower() not in {"con", "prn", "aux", "nul"}
)

HOSTILE = [
    "",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "a.b",
    "-rf",
    "rf-",
    "_a",
    "a_",
    "a b",
    " a",
    "a ",
    "a\n",
    "\na",
    "a\r",
    "a\t",
    "a\0",
    "a\x1b[31m",
    "a\x7f",
    "x" * 64,
    "x" * 300,
    "%2e%2e",
    "~",
    "$HOME",
    "a;b",
    "a:b",
    "a*",
    "sitе-1",  # noqa: RUF001 - a Cyrillic letter, on purpose
    "ａ",  # noqa: RUF001 - a wide letter, on purpose
    "é",
    "１",  # noqa: RUF001 - a wide digit, on purpose
    "\udcff",
    "con",
    "CON",
    "Nul",
    "aux",
    "prn",
    None,
    1,
    b"a",
    ["a"],
]


@given(names)
@thorough(100)
def test_plain_names_are_names(name: str) -> None:
    """Letters, digits, and - or _ between them, up to 63, come back as they are."""
    assert check_name(name) == name
    assert Address(name) == name


@pytest.mark.parametrize("name", HOSTILE)
def test_anything_else_is_no_name(name: object) -> None:
    """It is refused, with the parameter, the value and the rule, in one line of plain letters."""
    with pytest.raises(ConfigError) as caught:
        check_name(name, "site")

    assert caught.value.parameter == "site"
    assert str(caught.value).startswith("site=")
    assert "name is" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@given(st.text(max_size=70))
@thorough(200)
def test_no_name_leaves_its_folder(name: str) -> None:
    """Whatever passes as a name is one plain file name."""
    try:
        check_name(name)
    except ConfigError:
        return
    assert name.isascii()
    assert len(name) <= 63
    assert Path(name).parts == (name,)


def test_names_become_paths(tmp_path: Path) -> None:
    """Checked names are joined below the root; without any it is the root."""
    assert safe_path(tmp_path) == tmp_path
    assert safe_path(tmp_path, "job", "site-1") == tmp_path / "job" / "site-1"


@pytest.mark.parametrize("name", [name for name in HOSTILE if isinstance(name, str)])
def test_no_hostile_name_becomes_a_path(tmp_path: Path, name: str) -> None:
    """One wrong name among right ones is enough to refuse the path."""
    with pytest.raises(ConfigError):
        safe_path(tmp_path, "job", name)
    with pytest.raises(ConfigError):
        safe_path(tmp_path, name, "site-1")


def test_no_link_leads_out(tmp_path: Path) -> None:
    """A link below the root that points elsewhere is refused, also on the way; one that stays below is a path."""
    root = tmp_path / "root"
    (root / "inside").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (root / "out").symlink_to(tmp_path / "outside")
    (root / "in").symlink_to(root / "inside")

    for names in (["out"], ["out", "file"]):
        with pytest.raises(ConfigError, match="below"):
            safe_path(root, *names)
    assert safe_path(root, "in", "file") == root / "in" / "file"


def test_a_root_behind_a_link_is_a_root(tmp_path: Path) -> None:
    """What matters is where the root leads, not how it is written."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")

    assert safe_path(tmp_path / "link", "a") == tmp_path / "link" / "a"


@given(st.lists(names, min_size=1, max_size=4))
@thorough(80)
def test_segments_make_an_address(segments: list[str]) -> None:
    """An address is its segments, its parent has all but the last, and a child has one more."""
    address = Address(".".join(segments))

    assert address.segments == tuple(segments)
    assert address.parent == (Address(".".join(segments[:-1])) if segments[1:] else None)
    if address.parent is not None:
        assert address.parent.child(segments[-1]) == address
        assert address.is_under(address.parent)
        assert not address.parent.is_under(address)


def test_an_address_is_a_str() -> None:
    """It compares, hashes and sends like the text it is, and carries nothing else."""
    address = Address("site-1.job")

    assert address == "site-1.job"
    assert {address: 1}["site-1.job"] == 1
    assert not hasattr(address, "__dict__")
    assert type(address.parent) is Address
    assert type(address.child("0")) is Address


@pytest.mark.parametrize("text", ["", ".", "a.", ".a", "a..b", "a.b.c.d.e", "a.b/c", "a.con", "a. b"])
def test_a_broken_address_is_refused(text: str) -> None:
    """Empty or wrong segments, and more than four, are none."""
    with pytest.raises(ConfigError, match=r"^address="):
        Address(text)


def test_a_child_of_the_deepest_is_refused() -> None:
    """Four segments are the limit, also step by step."""
    with pytest.raises(ConfigError):
        Address("a.b.c.d").child("e")


@pytest.mark.parametrize(
    ("address", "other", "under"),
    [
        ("site-1", "site-1", True),
        ("site-1.job", "site-1", True),
        ("site-1.job.0", "site-1", True),
        ("site-1", "site-1.job", False),
        ("site-10", "site-1", False),
        ("site-10.job", "site-1", False),
    ],
)
def test_under_means_by_segments(address: str, other: str, under: bool) -> None:
    """A name that only begins like another is not below it."""
    assert Address(address).is_under(other) is under

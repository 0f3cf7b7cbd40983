"""What each module says it offers, and that it is there."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path.relative_to(ROOT)
    for folder in ("flarebus", "workflows", "pipes/flarebus_pipes")
    for path in (ROOT / folder).rglob("*.py")
)


def module_name(path: Path) -> str:
    """The name under which a file is imported."""
    parts = path.with_suffix("").parts
    return ".".join(parts[1:] if parts[0] == "pipes" else parts).removesuffix(".__init__")


def declared(path: Path) -> list[str] | None:
    """The names in `__all__` of a file, without running it; None if it has none."""
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            names = ast.literal_eval(node.value)
            assert isinstance(names, list)
            return names
    return None


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_every_module_says_what_is_public(path: Path) -> None:
    """Each module has a docstring and an `__all__` without duplicates, and every name in it exists."""
    assert ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8")))
    names = declared(path)
    assert names is not None
    assert len(set(names)) == len(names)

    module = importlib.import_module(module_name(path))

    assert [name for name in names if not hasattr(module, name)] == []


def test_the_client_api_is_light() -> None:
    """`import flarebus.client` brings in nothing beyond the standard library, pyzmq, msgpack and NumPy."""
    code = "import sys\nbefore = set(sys.modules)\nimport flarebus.client\nprint(*(set(sys.modules) - before))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    tops = {name.partition(".")[0] for name in found.split()}

    assert tops <= sys.stdlib_module_names | {"flarebus", "zmq", "msgpack", "numpy"}


def test_the_root_package_has_its_names_lazily() -> None:
    """`import flarebus` loads none of its modules, and its names are found when they are used."""
    code = (
        "import sys, flarebus\n"
        "assert not [name for name in sys.modules if name.startswith('flarebus.')]\n"
        "assert all(getattr(flarebus, name) for name in flarebus.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

    import flarebus

    with pytest.raises(AttributeError, match="nothing_like_it"):
        flarebus.nothing_like_it  # noqa: B018


def test_every_folder_of_modules_is_a_package() -> None:
    """A folder without `__init__.py` works in a checkout and is missing from what is installed."""
    assert sorted({str(path.parent) for path in FILES if not (ROOT / path.parent / "__init__.py").exists()}) == []

"""Which module may import which, and what none may use: read from the source, nothing is imported for it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"flarebus": "flarebus", "workflows": "workflows", "flarebus_pipes": "pipes/flarebus_pipes"}
MAX_LINES = 600

# From the bottom up. A module imports from its own layer and from those above it in this list, never from below it.
LAYERS: list[tuple[str, list[str]]] = [
    ("vocabulary", ["errors", "address", "model", "message", "metric"]),
    ("pure protocol", ["tf_values", "codec", "wire", "transfer", "ahead", "routing", "channel", "link"]),
    (
        "I/O shell",
        [
            "slab",
            "pending",
            "failure",
            "plugins",
            "security",
            "sockets",
            "loop",
            "dial",
            "carrier",
            "intake",
            "router",
            "delivery",
            "cell",
        ],
    ),
    ("pipes", ["pipes"]),
    ("jobs and workflows", ["job", "workflow", "tracking", "statistics"]),
    ("client", ["client"]),
    ("tasks", ["tasks"]),
    ("site", ["site"]),
    ("server", ["server"]),
    ("recipe", ["recipe"]),
    ("commands", ["cli", "testing"]),
    ("plug-ins", ["workflows", "flarebus_pipes"]),
]
PURE = 1
# What a pure module has no business with: time, threads, sockets and queues come in as arguments or stay outside.
IMPURE = frozenset(
    {"asyncio", "concurrent", "multiprocessing", "queue", "select", "selectors", "socket", "threading", "time", "zmq"}
)
# Where a pure module may have one all the same, each for its reason.
NOT_QUITE_PURE = {
    ("flarebus.codec._registry", "threading"): "a lock, for decomposers may be registered from any thread",
}
# Whoever reads these runs the code of whoever wrote them.
BANNED_MODULES = frozenset({"_pickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"})
BANNED_CALLS = frozenset({"recv_pyobj", "send_pyobj", "eval"})

# An import inside a function hides a dependency: only these, each for its reason. `*` stands for any module.
LAZY_IMPORTS = {
    ("flarebus.cli.*", "flarebus.*"): "a command imports what it needs when it runs, so that --help is instant",
    ("workflows._*", "*"): "as a command: the program answers --help and wrong usage before it loads anything",
    ("flarebus.client.*", "flarebus.client.*"): "importing the Client API has a budget of 0.1 s",
    ("flarebus.recipe.sim_env", "flarebus.server.simulation"): "making a recipe needs neither sockets nor workers",
}


@dataclass(frozen=True)
class Import:
    """One import of one of our modules or of somebody else's."""

    source: str
    target: str
    line: int
    is_lazy: bool


def modules_of(root: Path) -> dict[str, Path]:
    """Name -> file of every module of the packages below `root`."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def imports_of(source: str, path: Path) -> Iterator[Import]:
    """Every import in a file except those only a type checker sees."""
    stack: list[tuple[ast.AST, bool]] = [(ast.parse(path.read_text(encoding="utf-8")), False)]
    while stack:
        node, is_lazy = stack.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            stack.extend((child, is_lazy) for child in node.orelse)
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(source, alias.name, node.lineno, is_lazy)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield Import(source, "." * node.level + (node.module or ""), node.lineno, is_lazy)
            for alias in node.names if not node.level else ():
                yield Import(source, f"{node.module}.{alias.name}", node.lineno, is_lazy)
        inside = is_lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        stack.extend((child, inside) for child in ast.iter_child_nodes(node))


def layer_of(module: str) -> int | None:
    """Index into LAYERS; None for the root package, which only holds the version, and for what is not ours."""
    top, _, rest = module.partition(".")
    name = rest.partition(".")[0] if top == "flarebus" else top
    for index, (_, names) in enumerate(LAYERS):
        if name in names:
            return index
    return None


def as_module(target: str, modules: dict[str, Path]) -> str:
    """`pkg.mod.Name` as the module that the name comes from."""
    return target if target in modules else target.rpartition(".")[0]


def matches(pattern: str, module: str) -> bool:
    """Whether `module` is meant by `pattern`, in which a `*` at the end stands for anything."""
    return module.startswith(pattern[:-1]) if pattern.endswith("*") else module == pattern


def complaints(root: Path) -> list[str]:
    """Everything below `root` that breaks a rule, as `file:line: what`."""
    modules = modules_of(root)
    found = []
    for module, path in modules.items():
        name = path.relative_to(root)
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > MAX_LINES:
            found.append(f"{name}: more than {MAX_LINES} lines")
        layer = layer_of(module)
        if layer is None and module != "flarebus":
            found.append(f"{name}: is in no layer; add it to LAYERS")
            continue
        found += [f"{name}:{line}: {what}" for line, what in banned_in(ast.parse(text))]
        for each in imports_of(module, path):
            found += [f"{name}:{each.line}: {what}" for what in wrong_with(each, layer, modules)]
    return found + [f"import cycle: {' -> '.join(cycle)}" for cycle in cycles(modules)]


def banned_in(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Calls that no module may make."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in BANNED_CALLS:
            yield node.lineno, f"calls {called}"
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if keywords.get("allow_pickle", "False") != "False":
            yield node.lineno, "allows pickles in a NumPy file"
        if ast.unparse(node.func) == "torch.load" and keywords.get("weights_only") != "True":
            yield node.lineno, "calls torch.load without weights_only=True"


def wrong_with(each: Import, layer: int | None, modules: dict[str, Path]) -> Iterator[str]:
    """The rules that one import breaks."""
    top = each.target.partition(".")[0]
    if each.target.startswith("."):
        yield f"imports {each.target}: only absolute imports say where a thing lives"
    if top in BANNED_MODULES:
        yield f"imports {top}: no code comes in as data"
    if layer is not None and layer <= PURE and top in IMPURE and (each.source, top) not in NOT_QUITE_PURE:
        yield f"imports {top}: the module is pure"
    if layer == 0 and top not in sys.stdlib_module_names | {"flarebus"}:
        yield f"imports {top}: the vocabulary needs the standard library only"
    if top not in PACKAGES:
        return
    target = as_module(each.target, modules)
    below = layer_of(target)
    if layer is not None and below is not None and below > layer:
        yield f"imports {target}: {LAYERS[layer][0]} must not know {LAYERS[below][0]}"
    if each.is_lazy and not any(
        matches(source, each.source) and matches(goal, target) for source, goal in LAZY_IMPORTS
    ):
        yield f"imports {target} inside a function: move it to the top, or list it in LAZY_IMPORTS with a reason"


def cycles(modules: dict[str, Path]) -> list[list[str]]:
    """Modules that import each other while they are being imported."""
    edges = {
        module: {as_module(each.target, modules) for each in imports_of(module, path) if not each.is_lazy}
        & set(modules)
        for module, path in modules.items()
    }
    found: list[list[str]] = []
    done: set[str] = set()

    def follow(module: str, trail: list[str]) -> None:
        if module in trail:
            found.append([*trail[trail.index(module) :], module])
            return
        if module not in done:
            for target in sorted(edges[module] - {module}):
                follow(target, [*trail, module])
            done.add(module)

    for module in sorted(edges):
        follow(module, [])
    return found


def test_the_project_keeps_its_layers() -> None:
    """Imports point down, pure modules stay pure, nothing banned is used, and no module is too long."""
    found = complaints(ROOT)

    assert not found, "\n".join(found)


def test_the_lists_of_exceptions_hold_nothing_that_is_gone() -> None:
    """Every exception to a rule is one that some module still makes use of."""
    modules = modules_of(ROOT)
    imports = [each for module, path in modules.items() for each in imports_of(module, path)]
    lazy = [(each.source, as_module(each.target, modules)) for each in imports if each.is_lazy]

    impure = set(NOT_QUITE_PURE) - {(each.source, each.target.partition(".")[0]) for each in imports}

    unused = [
        entry
        for entry in LAZY_IMPORTS
        if not any(matches(entry[0], source) and matches(entry[1], target) for source, target in lazy)
    ]

    assert unused == []
    assert impure == set()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small project that keeps all rules."""
    files = {
        "flarebus/__init__.py": "",
        "flarebus/errors.py": "import enum\n",
        "flarebus/link.py": "from flarebus.errors import X\n",
        "flarebus/cell.py": "import threading\nimport zmq\nfrom flarebus.link import Link\n",
        "workflows/fedavg.py": "from flarebus.cell import Cell\n",
        "pipes/flarebus_pipes/file.py": "from flarebus import cell\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_tree_that_keeps_the_rules_has_no_complaints(tree: Path) -> None:
    """The checker has nothing to say about what is allowed."""
    assert complaints(tree) == []


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("flarebus/link.py", "from flarebus.cell import Cell\n", "pure protocol must not know I/O shell"),
        ("flarebus/link.py", "from flarebus import cell\n", "pure protocol must not know I/O shell"),
        ("flarebus/errors.py", "import flarebus.link\n", "vocabulary must not know pure protocol"),
        ("flarebus/errors.py", "import numpy\n", "the vocabulary needs the standard library only"),
        ("flarebus/link.py", "import time\n", "the module is pure"),
        ("flarebus/link.py", "from zmq import Context\n", "the module is pure"),
        ("flarebus/link.py", "def f():\n    import threading\n", "the module is pure"),
        ("flarebus/codec/_numpy.py", "import queue\n", "the module is pure"),
        ("flarebus/cell.py", "import workflows.fedavg\n", "I/O shell must not know plug-ins"),
        ("flarebus/cli/main.py", "def f():\n    import flarebus_pipes.file\n", "commands must not know plug-ins"),
        ("flarebus/server/job.py", "from flarebus.recipe import Recipe\n", "server must not know recipe"),
        ("flarebus/cell.py", "def f():\n    from flarebus.link import Link\n", "inside a function"),
        ("flarebus/cell.py", "from . import link\n", "only absolute imports"),
        ("flarebus/cell.py", "import pickle\n", "no code comes in as data"),
        ("flarebus/cell.py", "from cloudpickle import loads\n", "no code comes in as data"),
        ("flarebus/cell.py", "def f(s):\n    s.recv_pyobj()\n", "calls recv_pyobj"),
        ("flarebus/cell.py", "x = eval('1')\n", "calls eval"),
        ("workflows/fedavg.py", "np.load(path, allow_pickle=True)\n", "allows pickles"),
        ("workflows/fedavg.py", "torch.load(path)\n", "without weights_only=True"),
        ("flarebus/cell.py", "x = 1\n" * (MAX_LINES + 1), "more than 600 lines"),
        ("flarebus/gossip.py", "x = 1\n", "is in no layer"),
    ],
)
def test_a_broken_rule_is_found(tree: Path, name: str, text: str, expected: str) -> None:
    """Each rule, once broken, is reported with the file and the rule."""
    (tree / name).parent.mkdir(parents=True, exist_ok=True)
    (tree / name).write_text(text)

    found = complaints(tree)

    assert any(name in line and expected in line for line in found), found


def test_an_import_cycle_is_found(tree: Path) -> None:
    """Two modules of one layer that import each other are reported with the way round."""
    (tree / "flarebus/loop.py").write_text("from flarebus.cell import Cell\n")
    (tree / "flarebus/cell.py").write_text("from flarebus.loop import Loop\n")

    assert "import cycle: flarebus.cell -> flarebus.loop -> flarebus.cell" in complaints(tree)


def test_an_import_for_the_type_checker_is_no_dependency(tree: Path) -> None:
    """What stands under TYPE_CHECKING never runs and may point anywhere."""
    (tree / "flarebus/link.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from flarebus.cell import Cell\n"
    )

    assert complaints(tree) == []

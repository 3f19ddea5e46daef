"""The house: which room may import from which, that no two modules import each other, and that none grows too long."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT, on_the_default_stack

pytestmark = on_the_default_stack

# From the ground up: a module imports from its own storey or from those above it in this list.
STOREYS = (
    {"atomic", "command_line", "resampling", "tables"},
    {"candidates"},
    {"language_model", "value_model", "market", "page"},
    {"training", "evaluation", "runtime"},
    {"publishing"},
    {"tuning"},
    {"__main__"},
)
ROOMS_APART = (
    {"language_model", "value_model", "market", "page"},
    {"training", "evaluation", "runtime"},
)  # on one storey, without a door
MAX_LINES = 500
PACKAGE = ROOT / "covered_call"


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(path: Path) -> set[str]:
    """The modules of the package that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    inside = {name.removeprefix("covered_call.") for name in found if name.startswith("covered_call.")}
    return inside & FILES.keys() - {"__init__"}


GRAPH = {name: imports_of(path) for name, path in FILES.items()}


def storey(name: str) -> int:
    return next(place for place, rooms in enumerate(STOREYS) if name.split(".")[0] in rooms)


def circle_from(name: str, way: tuple[str, ...] = (), done: set[str] | None = None) -> tuple[str, ...]:
    """A way that leads back to a module on it, if one can be reached from here."""
    done = set() if done is None else done
    if name in way:
        return (*way[way.index(name) :], name)
    if name in done:
        return ()
    done.add(name)
    return next((found for one in sorted(GRAPH[name]) if (found := circle_from(one, (*way, name), done))), ())


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"__init__"}))
def test_imports_run_downwards(name):
    upwards = {one for one in GRAPH[name] if storey(one) > storey(name)}
    assert not upwards
    room = name.split(".")[0]
    for rooms in ROOMS_APART:
        assert room not in rooms or not {one for one in GRAPH[name] if one.split(".")[0] in rooms - {room}}


def test_no_circle():
    assert not [circle for name in GRAPH if (circle := circle_from(name))]


def test_the_ground_knows_no_torch():
    heavy = {"torch", "transformers", "trl", "peft", "sklearn", "matplotlib"}
    for name, path in FILES.items():
        if name != "__init__" and (storey(name) <= 1 or name.startswith("value_model.")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            named = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
            named |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
            allowed = {"sklearn", "matplotlib"} if name.startswith("value_model.") else set()
            assert not {one.split(".")[0] for one in named} & (heavy - allowed), name


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_can_be_read_in_one_sitting(name):
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_every_module_says_what_it_is_for():
    silent = [name for name, path in FILES.items() if not ast.get_docstring(ast.parse(path.read_text("utf-8")))]
    assert [name for name in silent if FILES[name].name != "__init__.py"] == []

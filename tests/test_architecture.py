"""The plan of the house: imports only go down, and importing the library costs little."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import downloadview_async

PACKAGE = Path(downloadview_async.__file__).parent
NAME = "downloadview_async"
APP = PACKAGE.parent / "app"

# Rooms from the ground up. A room may import what is below it, and itself.
STOREYS = [
    {"errors", "http"},
    {"sources"},
    {"policy", "offload"},
    {"accounts"},
    {"asgi"},
    {"check"},
    {"contrib", "testing", "service"},
    {"cli"},
    {"app", "__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(STOREYS) for room in rooms}
LEVEL["pytest_plugin"] = LEVEL["testing"]
LEVEL[NAME] = LEVEL["asgi"]  # the public names: made of all below, and for all above
NEIGHBOURS = {("errors", "http"), ("http", "errors"), ("pytest_plugin", "testing")}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The part of the house that a module of ours is in."""
    parts = module.split(".")
    if parts[0] == "app":
        return "app"
    return parts[1] if len(parts) > 1 else NAME


def imports_of(path: Path) -> Iterator[tuple[str, str | None]]:
    """Every import of a file, wherever it stands: the module, and the name taken from it (None: all of it)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute, so that they can be read here"
            assert node.module is not None
            for alias in node.names:
                yield node.module, alias.name


def ours(module: str) -> bool:
    return module.partition(".")[0] in (NAME, "app")


def target_room(module: str, name: str | None) -> str:
    """The room that an import leads to: `from downloadview_async import errors` leads to `errors`."""
    is_module = name is not None and ((PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists())
    return str(name) if module == NAME and is_module else room_of(module)


MODULES = sorted([*PACKAGE.rglob("*.py"), *APP.rglob("*.py")])
MODULE_PARAMS = [pytest.param(path, id=module_name(path)) for path in MODULES]


def in_room(*rooms: str) -> list[Path]:
    return [path for path in MODULES if room_of(module_name(path)) in rooms]


def test_the_rooms_are_those_of_the_house() -> None:
    assert {room_of(module_name(path)) for path in MODULES} == {*LEVEL}, "say in STOREYS what a room may import"


@pytest.mark.parametrize("path", MODULE_PARAMS)
def test_imports_only_go_down(path: Path) -> None:
    room = room_of(module_name(path))
    for module, name in imports_of(path):
        if ours(module):
            other = target_room(module, name)
            allowed = other == room or (room, other) in NEIGHBOURS or LEVEL[other] < LEVEL[room]
            if room == NAME:
                allowed = LEVEL[other] <= LEVEL[NAME]
            assert allowed, f"{module_name(path)} imports {module}: {room} may not know of {other}"


@pytest.mark.parametrize("path", [pytest.param(path, id=module_name(path)) for path in in_room("http", "errors")])
def test_decisions_need_the_standard_library_alone(path: Path) -> None:
    for module, _ in imports_of(path):
        assert module.partition(".")[0] in sys.stdlib_module_names or ours(module), module


@pytest.mark.parametrize("path", [pytest.param(path, id=module_name(path)) for path in in_room("http")])
def test_decisions_do_no_input_or_output(path: Path) -> None:
    doing = {"os", "io", "socket", "asyncio", "threading", "subprocess", "tempfile", "shutil", "urllib.request"}
    assert not doing & {module for module, _ in imports_of(path)}
    calls = {
        node.func.id
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not {"open", "print", "input", "exec", "eval"} & calls


@pytest.mark.parametrize("path", [pytest.param(path, id=module_name(path)) for path in in_room("sources", "offload")])
def test_sources_and_offload_do_not_know_starlette(path: Path) -> None:
    assert "starlette" not in {module.partition(".")[0] for module, _ in imports_of(path)}


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=module_name(path)) for path in in_room("service", "cli", "app")]
)
def test_the_service_uses_the_public_names_alone(path: Path) -> None:
    for module, name in imports_of(path):
        # public under their own names: importing them needs uvicorn, and zttp for HTTP/2
        if ours(module) and module not in (f"{NAME}.asgi.server", f"{NAME}.asgi.http2"):
            room = target_room(module, name)
            # the checks of an installation are shared with Django, which is beside the service
            assert room in (NAME, "check", "service", "cli", "app"), f"{module} is not for users of the library"
            assert room != NAME or name in downloadview_async.__all__, f"{name} is not a public name"


def test_the_package_holds_the_public_names_and_nothing_else() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    kinds = (ast.ImportFrom, ast.Assign, ast.Expr)
    assert all(isinstance(node, kinds) for node in tree.body)
    imported = {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert imported | {"__version__"} == set(downloadview_async.__all__)
    assert len(set(downloadview_async.__all__)) == len(downloadview_async.__all__)


def test_the_import_path_of_the_protocol_holds_its_public_names_and_nothing_else() -> None:
    tree = ast.parse((PACKAGE / "asgi" / "server.py").read_text(encoding="utf-8"))
    assert all(isinstance(node, ast.ImportFrom | ast.Assign | ast.Expr) for node in tree.body)
    (names,) = (node.value for node in tree.body if isinstance(node, ast.Assign))
    imported = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(ast.literal_eval(names)) == imported
    assert not [name for name in imported if name.startswith("_")]


def test_the_modules_of_the_uvicorn_protocol_import_each_other_in_one_direction() -> None:
    imports = {
        module_name(path): {module for module, _ in imports_of(path) if module.startswith(f"{NAME}.asgi.uvicorn.")}
        for path in (PACKAGE / "asgi" / "uvicorn").glob("*.py")
    }
    assert tuple(TopologicalSorter(imports).static_order())  # raises CycleError


@pytest.mark.parametrize("name", [name for name in downloadview_async.__all__ if name != "__version__"])
def test_every_public_name_exists_and_says_what_it_promises(name: str) -> None:
    value = getattr(downloadview_async, name)
    assert value.__doc__
    assert value.__doc__ != object.__doc__
    assert not value.__doc__.startswith(f"{name}("), "a docstring that a dataclass has made promises nothing"


SIGNERS = {
    f"{NAME}.offload.signers.{path.stem}"
    for path in (PACKAGE / "offload" / "signers").glob("*.py")
    if path.stem not in ("__init__", "base", "keys")
}


@pytest.mark.parametrize("path", MODULE_PARAMS)
def test_each_signer_is_one_file_that_no_other_knows(path: Path) -> None:
    assert len(SIGNERS) >= 7
    assert not SIGNERS & {module for module, _ in imports_of(path)}


def modules_after(statement: str) -> set[str]:
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, encoding="utf-8")
    return set(json.loads(result.stdout))


def test_importing_the_library_imports_no_server_no_client_and_no_database() -> None:
    loaded = {module.partition(".")[0] for module in modules_after("import downloadview_async")}
    heavy = {"uvicorn", "sqlalchemy", "jinja2", "click", "httpx2", "httpx", "msgspec", "aiofiles", "fastapi"}
    heavy |= {"pytest", "obstore", "cryptography"}
    assert not heavy & loaded
    assert not SIGNERS & modules_after("import downloadview_async")


@pytest.mark.parametrize("path", MODULE_PARAMS)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))

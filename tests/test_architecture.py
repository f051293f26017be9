"""What the map promises: import order, torch-free modules, sizes, and nothing forbidden."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "lory_kernels": ROOT / "kernels/lory_kernels",
    "lory_server": ROOT / "server/lory_server",
    "lory_router": ROOT / "router/lory_router",
    "lory_trainer": ROOT / "trainer/lory_trainer",
    "lory_client": ROOT / "clients/python/lory_client",
}
SOURCES = [path for folder in PACKAGES.values() for path in sorted(folder.rglob("*.py"))]

MAY_IMPORT = {
    "lory_kernels": set(),
    "lory_server": {"lory_kernels"},
    "lory_router": {
        "lory_server.messages",
        "lory_server.recipes",
        "lory_server.host_memory",
        "lory_server.lifeline",
        "lory_server.low_priority",
        "lory_server.adapters.config",
        "lory_server.adapters.errors",
        "lory_server.adapters.header",
        "lory_server.adapters.manner",
        "lory_server.adapters.store",
        "lory_server.adapters.tokenizer_files",
        "lory_server.adapters.strict_json",
        "lory_trainer",
    },
    "lory_trainer": set(),
    "lory_client": set(),
}
"""Beside itself. The router's command line starts the trainer; what it fetches it judges by the
engine's own rules for an adapter's files."""

# Within the engine, from the bottom up: a module imports only modules of its own or lower layers.
LAYERS = [
    {
        "messages",
        "recipes",
        "giving_way",
        "lifeline",
        "low_priority",
        "plan",
        "blocks",
        "model.sites",
        "model.errors",
        "memory_plan",
        "host_memory",
    },
    {"sequence", "accounting", "adapters", "channel", "model.spec"},
    {"head_turns"},
    {"scheduler", "model"},
    {"engine"},
    {"build", "merge_folder"},
    {"process"},
    {"__main__"},
]

TORCH_FREE = [
    "lory_server.messages",
    "lory_server.recipes",
    "lory_server.giving_way",
    "lory_server.lifeline",
    "lory_server.low_priority",
    "lory_server.plan",
    "lory_server.blocks",
    "lory_server.sequence",
    "lory_server.scheduler",
    "lory_server.accounting",
    "lory_server.memory_plan",
    "lory_server.channel",
    "lory_server.model.sites",
    "lory_server.model.spec",
    "lory_server.adapters.config",
    "lory_server.adapters.format",
    "lory_server.adapters.header",
    "lory_server.adapters.manner",
    "lory_server.adapters.merge_plan",
    "lory_server.adapters.merge_sources",
    "lory_server.adapters.store",
    "lory_router.app",
    "lory_router.cli",
    "lory_router.engine_client",
    "lory_router.metrics",
    "lory_router.supervisor",
    "lory_router.sources.service",
    "lory_client",
]

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60


def module_name(path: Path) -> str:
    package = next(name for name, folder in PACKAGES.items() if path.is_relative_to(folder))
    parts = path.relative_to(PACKAGES[package]).with_suffix("").parts
    return ".".join((package, *(p for p in parts if p != "__init__")))


def imports(path: Path) -> Iterator[str]:
    """Every module a file names, those under TYPE_CHECKING and within functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_packages_import_only_downwards(path: Path) -> None:
    package = module_name(path).split(".")[0]
    for imported in imports(path):
        other = imported.split(".")[0]
        if not other.startswith("lory_") or other == package:
            continue
        allowed = MAY_IMPORT[package]
        assert any(
            imported == one or imported.startswith(one + ".") or one.startswith(imported + ".")
            for one in allowed
        ), f"{path.name} imports {imported}"


@pytest.mark.parametrize("package", [name for name, allowed in MAY_IMPORT.items() if allowed])
def test_no_allowance_outlives_its_use(package: str) -> None:
    """One that nobody needs would let the next import in unseen."""
    sources = [path for path in SOURCES if path.is_relative_to(PACKAGES[package])]
    imported = {name for path in sources for name in imports(path)}
    unused = {
        one
        for one in MAY_IMPORT[package]
        if not any(f"{name}.".startswith(f"{one}.") for name in imported)
    }
    assert not unused


COMES_WITH = {"pydantic_core": "pydantic", "referencing": "jsonschema", "triton": "torch"}
NAMED_OTHERWISE = {"yaml": "pyyaml"}


def test_every_import_is_a_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["train"], *extras["eval"]]
    declared = {re.split(r"[<>=;\[ ]", one)[0].replace("-", "_") for one in wanted}
    served = [p for p in SOURCES if not p.is_relative_to(PACKAGES["lory_client"])]
    tops = {name.partition(".")[0] for path in served for name in imports(path)}
    tops -= sys.stdlib_module_names | PACKAGES.keys()
    needed = {COMES_WITH.get(top, NAMED_OTHERWISE.get(top, top)) for top in tops}
    assert not needed - declared


def layer_of(module: str) -> int:
    """`module` without the package's name; the longest name in LAYERS that it lies under."""
    best = max(
        (name for layer in LAYERS for name in layer if f"{module}.".startswith(f"{name}.")),
        key=len,
    )
    return next(i for i, layer in enumerate(LAYERS) if best in layer)


@pytest.mark.parametrize(
    "path",
    [p for p in SOURCES if "lory_server" in p.parts and p.name != "__init__.py"],
    ids=lambda p: str(p.relative_to(PACKAGES["lory_server"])),
)
def test_the_engine_imports_only_downwards(path: Path) -> None:
    own = module_name(path).removeprefix("lory_server.")
    for imported in imports(path):
        if not imported.startswith("lory_server."):
            continue
        other = imported.removeprefix("lory_server.")
        target = PACKAGES["lory_server"] / Path(*other.split("."))
        if not (target.with_suffix(".py").exists() or target.is_dir()):
            continue  # a name within a module
        if target.is_dir():
            continue  # `from lory_server.model import lora` also names lory_server.model.lora
        assert layer_of(other) <= layer_of(own), f"{own} imports {other}"


def test_torch_free_modules_stay_so() -> None:
    program = (
        "import importlib, sys\n"
        f"for name in {TORCH_FREE!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, name\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_is_one_idea_with_a_header(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert text.count("\n") <= MAX_FILE_LINES, "split the file"
    assert ast.get_docstring(tree), "the header says what the file is"
    assert text.isascii(), "ASCII only"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{node.name}: {lines} lines"


FORBIDDEN = {
    r"\b(import|from) (pickle|cloudpickle|dill|marshal)\b": "pickle",
    r"torch\.load\(": "torch.load reads pickles",
    r"trust_remote_code\s*=\s*True": "remote code",
    r"yaml\.load\(": "yaml.safe_load",
    r"except\s*:": "bare except",
    r"\b(TODO|FIXME|XXX|HACK)\b": "unfinished",
    r"NotImplementedError": "a stub",
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_forbidden(path: Path) -> None:
    text = path.read_text()
    for pattern, what in FORBIDDEN.items():
        assert not re.search(pattern, text), what
    if path.name != "config.py" or "lory_router" not in path.parts:
        assert not re.search(r"os\.(environ|getenv)", text), "the environment is read in config"


def test_functions_are_small_on_the_whole() -> None:
    lengths = sorted(
        (node.end_lineno or 0) - node.lineno + 1
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    assert lengths[len(lengths) // 2] < 10, "the median function is too long"

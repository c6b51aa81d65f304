"""The shape of the code: which module may import which, what loads slowly, how long things are, no pickles."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

pytestmark = pytest.mark.shape

ROOT = Path(__file__).parents[2]
FOLDERS = {"grappa": "grappa", "pipeline": "grappa.pipeline", "slurm": "grappa.slurm"}  # on disk: as imported
COMMAND_LINE = "grappa.pipeline.cli"
MAY_IMPORT = {"grappa": {"grappa"}, "pipeline": {"pipeline", "grappa"}, "slurm": {"slurm", "pipeline", "grappa"}}
FOREIGN = {"grappa": {"pydantic", "rich", "submitit", "typer", "yaml"}, "pipeline": {"submitit"}, "slurm": set[str]()}
UPWARD = {(COMMAND_LINE, "slurm"), ("grappa.__main__", "pipeline"), ("grappa", "pipeline")}  # lazily, the public names
SLOW = {"torch", "torchvision", "timm", "faiss"}
HEAVY = SLOW | {"matplotlib", "numpy", "pandas", "pyarrow", "scipy", "sklearn"}
COMPUTING = {"grappa.pipeline.pages.report.page"}
STAGES = "grappa.pipeline.stages."
PICKLERS = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 500
MAX_FOLDER_ENTRIES = 17


@dataclass(frozen=True)
class Import:
    """One imported name, such as ``grappa.model`` or ``torch.nn``; at_start: it runs when the module is imported."""

    name: str
    line: int
    at_start: bool

    @property
    def package(self) -> str:
        """The layer of one of our modules; of anything else the first part of its name."""
        return layer(self.name) if self.name in modules() else self.name.partition(".")[0]


def layer(module: str) -> str:
    """Return the folder on disk: ``pipeline`` for ``grappa.pipeline.cli``."""
    second = module.split(".")[1:2]
    return second[0] if second and second[0] in FOLDERS else "grappa"


@cache
def modules() -> dict[str, Path]:
    """Return every module of the product by its dotted name; a package by its own."""
    found = {}
    for folder, package in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = (package, *file.relative_to(ROOT / folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def statements(node: ast.AST, at_start: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    """Yield all nodes with whether they run at import: not in a function, not for type checkers only."""
    for child in ast.iter_child_nodes(node):
        inner = at_start and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            inner = False
        yield child, inner
        yield from statements(child, inner)


@cache
def imports(module: str) -> tuple[Import, ...]:
    """Return what a module imports anywhere; ``from a import b`` is ``a.b`` if that is a module of ours, else ``a``."""
    found = []
    for node, at_start in statements(tree(modules()[module])):
        for name in imported_names(module, node):
            found.append(Import(name, getattr(node, "lineno", 0), at_start))
    return tuple(found)


def imported_names(module: str, node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    source = absolute(module, node)
    names = [f"{source}.{alias.name}" for alias in node.names]
    return [name if name in modules() else source for name in names]


def absolute(module: str, node: ast.ImportFrom) -> str:
    """Return the dotted name behind ``from .x import y``."""
    if node.level == 0:
        return str(node.module)
    parts = module.split(".")
    depth = node.level - (modules()[module].name == "__init__.py")
    return ".".join([*parts[: len(parts) - depth], *([node.module] if node.module else [])])


def loaded_by(module: str) -> dict[str, str]:
    """Return all that importing a module loads, each with a module of ours that asks for it."""
    loaded: dict[str, str] = {}
    waiting = [(module, "the test")]
    while waiting:
        name, asker = waiting.pop()
        if name in loaded:
            continue
        loaded[name] = asker
        parent = name.rpartition(".")[0]
        if parent:
            waiting.append((parent, name))
        if name in modules():
            waiting += [(each.name, name) for each in imports(name) if each.at_start]
    return loaded


def test_imports_go_one_way() -> None:
    wrong = [
        f"{modules()[module].relative_to(ROOT)}:{each.line}: imports {each.name}"
        for module in modules()
        for each in imports(module)
        if each.package in FOLDERS and each.package not in MAY_IMPORT[layer(module)]
        if (module, each.package) not in UPWARD
    ]
    assert not wrong, "\n".join(wrong)


def test_the_library_knows_no_configuration_and_the_pipeline_no_scheduler() -> None:
    wrong = [
        f"{modules()[module].relative_to(ROOT)}:{each.line}: imports {each.name}"
        for module in modules()
        for each in imports(module)
        if each.package in FOREIGN[layer(module)]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_import_cycle() -> None:
    graph = {
        module: {each.name for each in imports(module) if each.name in modules()} - {module} for module in modules()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " <- ".join(error.args[1]))


def commands() -> list[str]:
    """Return the modules that the command line imports when a command is given, the report aside: it computes."""
    parts = (COMMAND_LINE, "grappa.pipeline.commands.collection")
    return sorted({each.name for part in parts for each in imports(part) if each.name in modules()} - COMPUTING)


@pytest.mark.parametrize("module", [COMMAND_LINE, "grappa.pipeline.tables", *commands()])
def test_no_command_loads_anything_slow_before_it_computes(module: str) -> None:
    loaded = loaded_by(module)
    slow = [f"{name} (by {loaded[name]})" for name in sorted(SLOW & set(loaded))]
    assert not slow, f"importing {module} loads {', '.join(slow)}; import it inside the function that needs it"


def test_the_command_line_loads_no_stage() -> None:
    wrong = [
        f"{modules()[module].relative_to(ROOT)}:{each.line}: imports {each.name}"
        for module in modules()
        for each in imports(module)
        if each.name.startswith(STAGES) and not module.startswith(STAGES)
    ]
    assert not wrong, "a stage is loaded by its name when it runs:\n" + "\n".join(wrong)


def test_stages_import_at_the_top() -> None:
    wrong = [
        f"{modules()[module].relative_to(ROOT)}:{each.line}: imports {each.name}"
        for module in modules()
        if module.startswith(STAGES)
        for each in imports(module)
        if not each.at_start
    ]
    assert not wrong, "\n".join(wrong)


def test_the_command_line_loads_nothing_heavy() -> None:
    loaded = loaded_by(COMMAND_LINE)
    heavy = [f"{name} (by {loaded[name]})" for name in sorted(HEAVY & set(loaded))]
    assert not heavy, f"importing {COMMAND_LINE} loads {', '.join(heavy)}"


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['grappa', '--help']\n"
        "try:\n"
        "    runpy.run_module('grappa', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        f"print('loaded', *sorted({HEAVY!r} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded"


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    shadows = [module for module in modules() if module.rpartition(".")[2] in sys.stdlib_module_names - {"__main__"}]
    assert not shadows


def test_no_two_folders_of_the_library_have_a_file_of_one_name() -> None:
    names = [file.stem for module, file in modules().items() if layer(module) == "grappa" and file.stem != "__init__"]
    assert not [name for name in set(names) if names.count(name) > 1]


def test_folders_are_short() -> None:
    folders = [ROOT / name for name in (*FOLDERS, "tests")]
    folders += [path for folder in folders for path in folder.rglob("*") if path.is_dir()]
    numbers = {folder: sum(each.name != "__pycache__" for each in folder.iterdir()) for folder in folders}
    large = {folder: number for folder, number in numbers.items() if number > MAX_FOLDER_ENTRIES}
    assert not [folder for folder in large if folder.name != "__pycache__"]


def test_files_are_short() -> None:
    lengths = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in modules().values()}
    long = [f"{file.relative_to(ROOT)}: {length}" for file, length in lengths.items() if length > MAX_FILE_LINES]
    assert not long, "\n".join(long)


def test_functions_are_short() -> None:
    files = [*modules().values(), *sorted((ROOT / "tests").rglob("*.py"))]
    long = [
        f"{file.relative_to(ROOT)}:{node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for file in files
        for node in ast.walk(tree(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
        if node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert not long, "\n".join(long)


def test_nothing_is_pickled() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{node.lineno}: {reason}"
        for file in modules().values()
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Call | ast.Import | ast.ImportFrom) and (reason := unsafe(node))
    ]
    assert not wrong, "\n".join(wrong)


def unsafe(node: ast.Call | ast.Import | ast.ImportFrom) -> str | None:
    """Return why a statement reads or writes pickles (or runs text as code), or None."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
        return next((f"imports {name}" for name in names if name.partition(".")[0] in PICKLERS), None)
    function = ast.unparse(node.func)
    arguments = {each.arg: ast.unparse(each.value) for each in node.keywords}
    if function == "torch.load" and arguments.get("weights_only") != "True":
        return "torch.load without weights_only=True"
    if function in {"np.load", "np.save"} and arguments.get("allow_pickle") != "False":
        return f"{function} without allow_pickle=False"
    if function.endswith((".read_pickle", ".to_pickle")) or function in {"torch.save", "eval", "exec"}:
        return function
    return function if function in {"yaml.load", "yaml.unsafe_load", "yaml.full_load"} else None


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import dump",
        "torch.load(path)",
        "np.load(path, mmap_mode='r')",
        "table.to_pickle(path)",
        "yaml.load(text)",
    ],
)
def test_the_check_for_pickles_finds(line: str) -> None:
    (statement,) = ast.parse(line).body
    node = statement.value if isinstance(statement, ast.Expr) else statement
    assert isinstance(node, ast.Call | ast.Import | ast.ImportFrom)
    assert unsafe(node)

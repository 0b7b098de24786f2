"""The rules of docs/design.md, checked on the syntax tree of every file."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "switchlm"
DESIGN = ROOT / "docs" / "design.md"

# From the bottom; packages of one layer do not import each other, except files of layer 0.
LAYERS = [
    {"errors", "config", "files", "locks", "_torch"},
    {"kernels", "data"},
    {"model"},
    {"checkpoint", "parallel"},
    {"huggingface"},
    {"generation"},
    {"evaluation", "compression", "export"},
    {"transformers"},
    {"training", "report", "serving"},
    {"recipes"},
    {"planning"},
    {"cli"},
]
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}
FILES = sorted(SOURCE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in MODULES.items()}
PACKAGES = {name.split(".")[1] for name in MODULES if "." in name} - {"__main__"}


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield every imported dotted name, from functions and type-checking blocks too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write relative imports in full"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def own_imports(name: str) -> set[str]:
    """Return the modules of the package that a module imports."""
    return {found for found in imports(TREES[name]) if found.split(".")[0] == "switchlm"} - {name}


def package_of(name: str) -> str:
    return name.split(".")[1]


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Yield the dotted name of every function called, as written, and the call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def violations(*forbidden: str, outside: tuple[str, ...] = ()) -> list[str]:
    """Return the calls of forbidden functions, except in modules that start with `outside`."""
    return [
        f"{name}:{node.lineno} calls {called}"
        for name, tree in TREES.items()
        for called, node in calls(tree)
        if called in forbidden and not name.startswith(outside or ("-",))
    ]


INSIDE = [name for name in MODULES if name.count(".") >= 1 and name != "switchlm.__main__"]


def test_every_package_has_its_layer_and_every_layer_its_packages() -> None:
    assert set(LEVEL) == PACKAGES


def test_the_design_names_the_packages_that_exist_and_no_others() -> None:
    text = DESIGN.read_text("utf-8")
    block = text.split("```")[1]
    words = [
        part.split()[0].rstrip(",")
        for line in block.splitlines()
        for part in line.split("|")
        if line and not line.startswith(" ") and part.strip()
    ]
    assert set(words) | {"config", "files", "locks", "_torch"} == PACKAGES


def test_imports_only_go_down() -> None:
    found = []
    for name in INSIDE:
        here = package_of(name)
        for imported in own_imports(name) - {"switchlm"}:  # that is for the version
            there = package_of(imported)
            below = LEVEL[there] < LEVEL[here] or {here, there} <= LAYERS[0]
            if there != here and not below:
                found.append(f"{name} imports {imported}, which is not below it")
    assert not found


def test_switchlm_itself_is_imported_for_its_version_only() -> None:
    for name in INSIDE:
        for node in ast.walk(TREES[name]):
            if isinstance(node, ast.ImportFrom) and node.module == "switchlm":
                assert {alias.name for alias in node.names} <= {"__version__"} | PACKAGES, name
            elif isinstance(node, ast.Import):
                assert all(alias.name != "switchlm" for alias in node.names), name


def test_there_are_no_import_cycles() -> None:
    graph = {name: own_imports(name) for name in INSIDE}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_model_does_not_import_torch_distributed() -> None:
    for name in INSIDE:
        if package_of(name) in ("model", "kernels"):
            found = [i for i in imports(TREES[name]) if i.startswith("torch.distributed")]
            assert not found, f"{name} imports {found}"


def test_private_functions_of_pytorch_are_used_in_one_file() -> None:
    private = re.compile(r"torch\b[\w.]*\._[a-z]")
    found = [
        f"{name}:{node.lineno}"
        for name, tree in TREES.items()
        if name != "switchlm._torch"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute | ast.ImportFrom)
        and private.search(ast.unparse(node))
        and not ast.unparse(node).startswith("_torch.")
    ]
    assert not found


def test_only_the_command_line_prints_or_exits() -> None:
    found = violations(
        "print", "exit", "quit", "sys.exit", "os._exit", "input", outside=("switchlm.cli",)
    )
    found += [
        f"{name} imports {imported}"
        for name, tree in TREES.items()
        if not name.startswith("switchlm.cli")
        for imported in imports(tree)
        if imported.split(".")[0] in ("rich", "typer")
    ]
    assert not [f for f in found if not f.startswith("switchlm.__main__")]


def test_only_the_launch_and_the_program_read_the_environment() -> None:
    found = [
        f"{name}:{node.lineno}"
        for name, tree in TREES.items()
        if name not in ("switchlm.parallel.launch", "switchlm.cli.main")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute | ast.Name | ast.alias)
        for word in [
            getattr(node, "attr", None) or getattr(node, "id", None) or node.__dict__.get("name")
        ]
        if word in ("environ", "environb", "getenv", "putenv")
    ]
    assert not found


def test_nothing_executes_data() -> None:
    found = violations(
        "eval", "exec", "compile", "__import__",
        "pickle.load", "pickle.loads", "pickle.Unpickler", "pickle.dump", "pickle.dumps",
        "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load",
    )  # fmt: skip
    for name, tree in TREES.items():
        for imported in imports(tree):
            if imported.split(".")[0] in ("dill", "cloudpickle", "joblib", "shelve", "marshal"):
                found.append(f"{name} imports {imported}")
        for called, node in calls(tree):
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called == "torch.load" and options.get("weights_only") != "True":
                found.append(f"{name}:{node.lineno} calls torch.load without weights_only=True")
            if called in ("np.load", "numpy.load") and options.get("allow_pickle") != "False":
                found.append(f"{name}:{node.lineno} calls {called} without allow_pickle=False")
    assert not found


def test_no_error_is_caught_blindly() -> None:
    found = [
        f"{name}:{node.lineno}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
        # Raising again, raising another error, or passing the error on is not blind.
        and not any(isinstance(inner, ast.Raise) for inner in node.body)
        and not any(
            isinstance(inner, ast.Name) and inner.id == node.name for inner in ast.walk(node)
        )
    ]
    assert not found


def test_files_are_no_longer_than_450_lines() -> None:
    paths = [
        path for name in ("src", "tests", "benchmarks") for path in (ROOT / name).rglob("*.py")
    ]
    lines = {str(path.relative_to(ROOT)): path.read_text("utf-8").count("\n") for path in paths}
    assert not {path: count for path, count in lines.items() if count > 450}


def test_every_module_has_a_docstring() -> None:
    assert not [name for name, tree in TREES.items() if not ast.get_docstring(tree)]


@pytest.mark.parametrize("module", ["switchlm", "switchlm.cli.main"])
def test_nothing_heavy_is_imported_before_it_is_used(module: str) -> None:
    heavy = ("torch", "numpy", "tokenizers", "transformers", "datasets", "pyarrow", "matplotlib")
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "[]"

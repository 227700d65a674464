"""The house stands: who may import whom, what must stay light, how large a room may grow.

Each room may import only the rooms listed for it, and imports point down. A new arrow is a
decision: it changes this file.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

ROOT = Path(__file__).parent.parent
GROUND = {"configs", "errors", "tensors"}
THINGS = GROUND | {"math", "quant", "formats", "store", "adapter", "naming", "engine", "folder"}
MAY_IMPORT = {
    "configs": set(),
    "errors": set(),
    "tensors": {"errors"},
    "math": GROUND,
    "quant": GROUND | {"math"},
    "formats": GROUND,
    "store": GROUND,
    "adapter": GROUND | {"math", "formats", "store"},
    "naming": GROUND | {"formats"},
    "engine": GROUND | {"math", "store"},
    "folder": GROUND | {"store"},
    "verbs": THINGS,
    "runtime": THINGS | {"verbs"},
    "cli": GROUND | {"engine", "verbs"},
    "__init__": THINGS | {"verbs", "runtime"},
    "__main__": {"cli"},
}
# Imported inside functions only: each costs a tenth of a second to ten seconds.
HEAVY = {
    *("bitsandbytes", "diffusers", "gguf", "huggingface_hub", "matplotlib", "peft"),
    *("rich", "scipy", "torch", "transformers"),
}
NUMPY = {"array_api_compat", "ml_dtypes", "numpy", "threadpoolctl"}
# What `--help`, completion and the reading of headers go through.
LIGHT = {
    *("configs", "errors", "tensors", "formats", "store", "naming", "folder", "cli"),
    *("__init__", "__main__"),
}
NOT_LIGHT = {"lorakit.store.memory"}  # the source that is a dict of arrays
MAX_FILE, MAX_FUNCTION = 300, 50  # lines


def module_name(path: Path) -> str:
    dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return dotted.removesuffix(".__init__")


FILES = {module_name(path): path for path in sorted((ROOT / "lorakit").glob("**/*.py"))}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text())


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """Dotted names of the modules that these statements import; the version is anyone's."""
    plain = {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    froms = [n for n in nodes if isinstance(n, ast.ImportFrom)]
    pairs = {(n.module or "", alias.name) for n in froms for alias in n.names}
    return plain | {
        f"{module}.{name}" if f"{module}.{name}" in FILES else module
        for module, name in pairs - {("lorakit", "__version__")}
    }


def named(nodes: Iterable[ast.AST]) -> set[str]:
    """Modules named in strings, as a table of lazy imports names them."""
    texts = (n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str))
    return {text.split(":")[0] for text in texts} & FILES.keys() - {"lorakit"}


def run_on_import(statements: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """The statements that importing a module executes: not function bodies, not TYPE_CHECKING."""
    for node in statements:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from run_on_import(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            inner = ast.iter_child_nodes(node)
            yield from run_on_import(
                n for n in inner if isinstance(n, ast.stmt | ast.excepthandler)
            )


@cache
def on_import(module: str) -> frozenset[str]:
    """What importing a module imports directly, its parent packages included."""
    parents = {module.rsplit(".", depth)[0] for depth in range(1, module.count(".") + 1)}
    return frozenset(imported(list(run_on_import(tree(module).body))) | parents)


def routes(module: str) -> dict[str, str]:
    """Everything that importing a module imports, each with the module that asks for it."""
    asked_by = {module: ""}
    todo = [module]
    while todo:
        asker = todo.pop()
        for name in on_import(asker) - asked_by.keys():
            asked_by[name] = asker
            todo += [name] * (name in FILES)
    return asked_by


def functions(module: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def swallows_anything(handler: ast.ExceptHandler) -> bool:
    """Whether it catches every exception and does not end by raising it again (ruff's BLE001)."""
    caught = ast.walk(handler.type) if handler.type else ()
    names = {n.id for n in caught if isinstance(n, ast.Name)}
    broad = handler.type is None or bool(names & {"Exception", "BaseException"})
    last = handler.body[-1]
    return broad and not (isinstance(last, ast.Raise) and last.exc is None)


def offenders(found: Callable[[str], Any]) -> dict[str, Any]:
    """What is found in each module, where anything is."""
    return {module: wrong for module in FILES if (wrong := found(module))}


def test_the_table_of_rooms_points_down_only():
    TopologicalSorter(MAY_IMPORT).prepare()


def test_a_module_imports_only_the_rooms_below_it():
    def above(module: str) -> set[str]:
        nodes = list(ast.walk(tree(module)))
        ours = {n for n in imported(nodes) | named(nodes) if n.split(".")[0] == "lorakit"}
        return {room(n) for n in ours} - {room(module)} - MAY_IMPORT[room(module)]

    assert offenders(above) == {}


def test_heavy_libraries_are_imported_inside_functions_only():
    def heavy(module: str) -> set[str]:
        allowed = {"torch"} if room(module) == "runtime" else set()
        direct = {n.split(".")[0] for n in imported(list(run_on_import(tree(module).body)))}
        return (direct & HEAVY) - allowed

    assert offenders(heavy) == {}


def test_a_light_room_does_not_import_numpy_not_even_through_another():
    def heavy(module: str) -> dict[str, str]:
        if room(module) not in LIGHT or module in NOT_LIGHT:
            return {}
        return {n: by for n, by in routes(module).items() if n.split(".")[0] in HEAVY | NUMPY}

    assert offenders(heavy) == {}


def test_files_and_functions_stay_small():
    def large(module: str) -> dict[str, int]:
        sizes = {f.name: (f.end_lineno or 0) - f.lineno + 1 for f in functions(module)}
        found = {name: size for name, size in sizes.items() if size > MAX_FUNCTION}
        lines = len(FILES[module].read_text().splitlines())
        return found | ({"the file": lines} if lines > MAX_FILE else {})

    assert offenders(large) == {}


def test_nothing_is_left_undone_printed_or_swallowed():
    def found(module: str) -> list[object]:
        nodes = list(ast.walk(tree(module)))
        printing = {n.id for n in nodes if isinstance(n, ast.Name)} & {"print", "breakpoint"}
        handlers = [n for n in nodes if isinstance(n, ast.ExceptHandler)]
        swallowing = [handler.lineno for handler in handlers if swallows_anything(handler)]
        undone = ("raise NotImplementedError", "TODO", "FIXME", "XXX")
        text = FILES[module].read_text()
        return [*printing, *swallowing, *(words for words in undone if words in text)]

    assert offenders(found) == {}


def test_a_file_is_named_for_what_it_holds():
    names = {path.stem for path in FILES.values()}
    assert names & {"util", "utils", "helper", "helpers", "misc", "common"} == set()


# What a command really loads: run in a child, which reports its sys.modules when it ends.
REPORT = """
import atexit, json, sys
report, sys.argv = sys.argv[1], ["lorakit", *sys.argv[2:]]
atexit.register(lambda: open(report, "w").write(json.dumps(sorted(sys.modules))))
from lorakit.cli import main
sys.exit(main())
"""


def loaded_by(folder: Path, *arguments: str) -> set[str]:
    """The top-level modules in memory when `lorakit ARGUMENTS`, run in a folder, is done."""
    report = folder / "modules.json"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})" + REPORT
    command = [sys.executable, "-c", code, str(report), *arguments]
    child = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert child.returncode == 0, child.stdout + child.stderr
    return {name.split(".")[0] for name in json.loads(report.read_text())}


@pytest.fixture
def inputs(tmp_path):
    """A folder with a base of one projection and a PEFT adapter for it."""
    module = "model.layers.0.self_attn.q_proj"
    factor = f"base_model.model.{module}.lora_{{}}.weight".format
    (tmp_path / "adapter").mkdir()
    save_file({f"{module}.weight": np.ones((8, 16), "f4")}, tmp_path / "base.safetensors")
    factors = {factor("A"): np.ones((2, 16), "f4"), factor("B"): np.ones((8, 2), "f4")}
    save_file(factors, tmp_path / "adapter/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    return tmp_path


def test_help_loads_neither_numpy_nor_anything_heavy(tmp_path):
    assert loaded_by(tmp_path, "--help") & (HEAVY | NUMPY) == set()


def test_the_help_of_a_command_loads_neither_numpy_nor_anything_heavy(tmp_path):
    assert loaded_by(tmp_path, "merge", "--help") & (HEAVY | NUMPY) == set()


@pytest.mark.parametrize("path", ["base.safetensors", "adapter"])
def test_inspect_never_loads_torch(inputs, path):
    assert loaded_by(inputs, "inspect", path) & {"torch", "scipy"} == set()


def test_a_dry_run_of_merge_loads_what_it_needs(inputs):
    command = ("merge", "base.safetensors", "adapter", "-o", "out", "--dry-run")
    assert loaded_by(inputs, *command) & {"torch", "scipy", "regex", "yaml"} == set()


def test_a_merge_on_a_cpu_never_loads_torch(inputs):
    command = ("merge", "base.safetensors", "adapter", "-o", "out")
    assert loaded_by(inputs, *command) & {"torch", "transformers"} == set()

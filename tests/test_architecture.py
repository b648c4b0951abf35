"""Rules of imports, unsafe calls and sizes, checked on the AST. Nothing is imported; imports inside functions count."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = (
    {"config", "metrics", "ops"},
    {"data", "model", "clustering", "evaluation"},
    {"parallel", "storage", "report"},
    {"training", "serving", "export"},
    {"finetune"},
    {"commands", "jobs", "__main__", "python_api"},
)
"""Rooms by floor: a room imports itself and the floors below."""

FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
SAME_FLOOR = {("jobs", "commands"), ("__main__", "commands")}
"""Imports that are allowed between two rooms of one floor."""

LAZY = ("raymoe", "raymoe.python_api")
"""The only import of raymoe/__init__.py: at the first use of an attribute, so it is part of no cycle."""

WALLS = {
    "ray": {"ops", "training", "serving", "commands", "jobs"},
    "torch.distributed": {"ops", "parallel", "training"},
}
"""Packages that only these rooms may import."""

LIGHT = {
    "config": {"torch", "ray"},
    "python_api": {"torch", "ray"},
    "__main__": {"torch", "ray"},
    "metrics": {"torch", "ray"},
    "report": {"torch", "ray"},
    "ops": {"raymoe.config", "raymoe.metrics"},
    "serving.engine": {"ray", "socket", "asyncio", "fastapi", "starlette"},
    "serving.transport": {"ray", "fastapi", "starlette"},
    "serving.http": {"ray"},
}
"""Packages that these rooms, or rooms inside a room, may not import."""

CODE_IN_DATA = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
"""Modules whose files run code when they are read."""


def sources() -> dict[str, str]:
    """Return the source of each module of raymoe and jobs by its name."""
    files = [*sorted(ROOT.glob("raymoe/**/*.py")), *sorted(ROOT.glob("jobs/**/*.py"))]
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file.read_text()
        for file in files
    }


def room(module: str) -> str:
    """Return the room of a module: `model` for raymoe.model.router, `jobs` for jobs.train, empty for raymoe itself."""
    top, *rest = module.split(".")
    return rest[0] if top == "raymoe" and rest else "" if top == "raymoe" else top


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def dotted(node: ast.AST) -> str:
    """Return `a.b.c` for an attribute chain on a name, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def imports(module: str, tree: ast.AST, modules: Mapping[str, str]) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of each import, at any depth and in any spelling."""
    is_package = any(inside(other, module) and other != module for other in modules) or module == "raymoe"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -(node.level - is_package) or None] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and inside(name := dotted(node), "torch.distributed"):
            yield node.lineno, name
        elif isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in ("import_module", "__import__"):
            literal = node.args and isinstance(node.args[0], ast.Constant)
            yield node.lineno, str(node.args[0].value) if literal else "?"


def brief(node: ast.expr, named: Mapping[str, ast.expr]) -> bool:
    """Whether a sleep takes at most a second: a literal, a constant of the module, a `min` with one, or either of two."""
    if isinstance(node, ast.Call) and dotted(node.func) == "min":
        return any(brief(argument, named) for argument in node.args)
    if isinstance(node, ast.IfExp):
        return brief(node.body, named) and brief(node.orelse, named)
    if isinstance(node, ast.Name) and isinstance(named.get(node.id), ast.Constant):
        return brief(named[node.id], {})
    return isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and node.value <= 1


def unsafe_calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, reason) of calls that run code from data, or sleep for long."""
    plain = [node for node in getattr(tree, "body", []) if isinstance(node, ast.Assign)]
    named = {target.id: node.value for node in plain for target in node.targets if isinstance(target, ast.Name)}
    for node in ast.walk(tree):
        name = dotted(node)
        if name in ("eval", "exec", "builtins.eval", "builtins.exec"):
            yield node.lineno, f"{name} runs code from data"  # type: ignore[attr-defined]
        elif name in ("torch.load", "torch.save"):
            yield node.lineno, f"{name} is pickle: use safetensors"  # type: ignore[attr-defined]
        elif name in (
            "yaml.load",
            "yaml.load_all",
            "yaml.unsafe_load",
            "yaml.full_load",
            "torch.jit.load",
            "os.system",
        ):
            yield node.lineno, f"{name} runs code from data"  # type: ignore[attr-defined]
        elif isinstance(node, ast.keyword) and node.arg in ("shell", "trust_remote_code"):
            yield node.value.lineno, f"{node.arg} runs code from data"
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            yield node.value.lineno, "allow_pickle runs code from data"
        elif (
            isinstance(node, ast.Call)
            and dotted(node.func).split(".")[-1] == "sleep"
            and not all(
                brief(argument, named) for argument in [*node.args, *(keyword.value for keyword in node.keywords)]
            )
        ):
            yield node.lineno, "sleeps for more than 1 s: wait for a condition"


def forbidden(module: str, name: str) -> bool:
    """Whether a module may not import `name`."""
    here, there = room(module), room(name)
    if module == "raymoe":
        return name not in ("__future__.annotations", LAZY[1])
    if name == "?" or name.split(".")[0] in CODE_IN_DATA or name in ("torch.load", "torch.save"):
        return True
    if any(inside(name, wall) and here not in rooms for wall, rooms in WALLS.items()):
        return True
    closed = {heavy for light, names in LIGHT.items() if inside(module, f"raymoe.{light}") for heavy in names}
    if any(inside(name, heavy) for heavy in closed):
        return True
    ours = name.split(".")[0] in ("raymoe", "jobs") and there in FLOOR
    return ours and here != there and FLOOR[there] >= FLOOR.get(here, -1) and (here, there) not in SAME_FLOOR


def violations(modules: Mapping[str, str]) -> list[str]:
    """Return a line `module:line: reason` for each violation of a rule."""
    found: list[str] = []
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for module, source in modules.items():
        tree = ast.parse(source)
        here = room(module)
        if here and here not in FLOOR:
            found.append(f"{module}:1: {here!r} has no floor")
        if not ast.get_docstring(tree):
            found.append(f"{module}:1: has no docstring")
        found += [f"{module}:{line}: {what}" for line, what in unsafe_calls(tree)]
        for line, name in imports(module, tree, modules):
            if forbidden(module, name):
                found.append(f"{module}:{line}: {here or module} may not import {name}")
            # Importing a module runs the packages around it first.
            target = next((m for m in (name, name.rpartition(".")[0]) if m in modules), "")
            if (module, target) != LAZY:
                graph[module] |= {m for m in modules if inside(target, m) and not inside(module, m)}
                graph[module] |= {target} & modules.keys() - {module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append("import cycle: " + " <- ".join(error.args[1]))
    return found


def test_the_code_follows_the_rules() -> None:
    assert violations(sources()) == []


FILE_LINES, FUNCTION_LINES = 400, 60
"""Limits of a file of `raymoe/`, and of a function."""


def too_long(name: str, source: str) -> list[str]:
    """Return a line for a file, and for each of its functions, over the limit."""
    found = [f"{name}: {n} lines"] if (n := len(source.splitlines())) > FILE_LINES else []
    if name.endswith(".py"):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                found += [f"{name}:{node.lineno}: {node.name} has {length} lines"] if length > FUNCTION_LINES else []
    return found


def test_files_and_functions_are_short() -> None:
    files = [p for p in sorted((ROOT / "raymoe").rglob("*")) if p.suffix in (".py", ".c", ".h")]
    assert len(files) > 100
    assert [line for p in files for line in too_long(str(p.relative_to(ROOT)), p.read_text())] == []


def test_a_long_file_and_a_long_function_are_found() -> None:
    body = "def f():\n" + "    x = 1\n" * 60
    assert too_long("a.py", body) == ["a.py:1: f has 61 lines"]
    assert too_long("a.c", "int x;\n" * 401) == ["a.c: 401 lines"]


def test_all_files_are_read() -> None:
    modules = sources()
    assert {"raymoe", "raymoe.config", "raymoe.model", "raymoe.model.router", "jobs.train"} <= modules.keys()


def inject(**files: str) -> list[str]:
    """Return the violations of a small project whose files have docstrings; `model__router` is raymoe.model.router."""
    project = {"raymoe": "", "raymoe.config": "", "raymoe.model": "", "raymoe.model.router": "", "raymoe.training": ""}
    project |= {
        ("" if n.startswith("jobs") else "raymoe.") + n.replace("__", "."): source for n, source in files.items()
    }
    return violations({name: f'"""Words."""\n{source}' for name, source in project.items()})


def test_code_without_violations_passes() -> None:
    assert inject(
        config="from __future__ import annotations\nimport json",
        metrics="import prometheus_client",
        data="from raymoe.config import Config",
        data__corpus="from raymoe.data.sources import read",
        data__sources="from raymoe.data import builtin",
        data__builtin="from importlib import metadata",
        model__router="import torch\nfrom raymoe.config import Config",
        parallel="import torch.distributed as dist\nfrom raymoe.model.router import route",
        storage="from raymoe.model import router\nimport raymoe",
        training="import ray.train, torch\ntorch.distributed.barrier()\nfrom raymoe.storage import runs",
        training__loop="import time\nfrom . import journal\ntime.sleep(0.5)\ntime.sleep(min(1, x))\nmodel.eval()\nA = 1\nsleep(A if x else 0.2)",
        training__journal="import json",
        jobs__train="import ray\nfrom raymoe.training import loop",
    ) == []  # fmt: skip


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("model__router", "import ray", "raymoe.model.router:2: model may not import ray"),
        ("data", "def f():\n    from ray import data", "raymoe.data:3: data may not import ray.data"),
        ("storage", "import importlib\nimportlib.import_module('ray')", "raymoe.storage:3: storage may not import ray"),
        ("storage", "__import__(name)", "raymoe.storage:2: storage may not import ?"),
        ("storage", "import torch.distributed", "raymoe.storage:2: storage may not import torch.distributed"),
        ("storage", "from torch import distributed", "raymoe.storage:2: storage may not import torch.distributed"),
        ("model", "import torch\ntorch.distributed.barrier()", "raymoe.model:3: model may not import torch.distributed"),
        ("jobs__train", "import torch.distributed", "jobs.train:2: jobs may not import torch.distributed"),
        ("config", "from raymoe import metrics", "raymoe.config:2: config may not import raymoe.metrics"),
        ("config", "def f():\n    import torch.nn", "raymoe.config:3: config may not import torch.nn"),
        ("metrics", "import ray", "raymoe.metrics:2: metrics may not import ray"),
        ("config", "from raymoe.model.router import route", "raymoe.config:2: config may not import raymoe.model.router.route"),
        ("model", "import raymoe.data", "raymoe.model:2: model may not import raymoe.data"),
        ("clustering", "from raymoe.data import prepare", "raymoe.clustering:2: clustering may not import raymoe.data.prepare"),
        ("model__router", "from ..evaluation import windows", "raymoe.model.router:2: model may not import raymoe.evaluation.windows"),
        ("model", "from ..data import x", "raymoe.model:2: model may not import raymoe.data.x"),
        (
            "evaluation",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from raymoe.model import router",
            "raymoe.evaluation:4: evaluation may not import raymoe.model.router",
        ),
        ("parallel", "import raymoe.storage", "raymoe.parallel:2: parallel may not import raymoe.storage"),
        ("storage", "from raymoe.training import x", "raymoe.storage:2: storage may not import raymoe.training.x"),
        ("serving", "from raymoe import training", "raymoe.serving:2: serving may not import raymoe.training"),
        ("training", "import jobs.train", "raymoe.training:2: training may not import jobs.train"),
        ("helpers", "", "raymoe.helpers:1: 'helpers' has no floor"),
        ("storage", "import pickle", "raymoe.storage:2: storage may not import pickle"),
        ("storage", "from cloudpickle import loads", "raymoe.storage:2: storage may not import cloudpickle.loads"),
        ("storage", "import torch\ntorch.load(f)", "raymoe.storage:3: torch.load is pickle"),
        ("storage", "from torch import load", "raymoe.storage:2: storage may not import torch.load"),
        ("data", "np.load(f, allow_pickle=True)", "raymoe.data:2: allow_pickle runs code"),
        ("data", "yaml.load(text)", "raymoe.data:2: yaml.load runs code"),
        ("data", "yaml.unsafe_load(text)", "raymoe.data:2: yaml.unsafe_load runs code"),
        ("data", "load_dataset(n, trust_remote_code=True)", "raymoe.data:2: trust_remote_code runs code"),
        ("jobs__train", "subprocess.run(line, shell=True)", "jobs.train:2: shell runs code"),
        ("storage", "torch.jit.load(f)", "raymoe.storage:2: torch.jit.load runs code"),
        ("data", "eval(text)", "raymoe.data:2: eval runs code"),
        ("jobs__train", "run = exec", "jobs.train:2: exec runs code"),
        ("training", "from time import sleep\nsleep(1.5)", "raymoe.training:3: sleeps for more than 1 s"),
        ("training", "import time\ntime.sleep(delay)", "raymoe.training:3: sleeps for more than 1 s"),
        ("training", "A = 2.0\nsleep(A)", "raymoe.training:3: sleeps for more than 1 s"),
        ("training", "A = 1.0\nsleep(A if b else 2)", "raymoe.training:3: sleeps for more than 1 s"),
    ],
)  # fmt: skip
def test_an_injected_violation_is_found(file: str, source: str, expected: str) -> None:
    found = inject(**{file: source})
    assert any(line.startswith(expected) for line in found), found


def test_the_top_imports_nothing() -> None:
    assert violations({"raymoe": '"""Words."""\ndef f():\n    import json'}) == ["raymoe:3: raymoe may not import json"]


@pytest.mark.parametrize("source", ["", "x = 1", '""" """'])
def test_a_module_without_a_docstring_is_found(source: str) -> None:
    assert violations({"raymoe": '"""Words."""', "jobs.train": source}) == ["jobs.train:1: has no docstring"]


def test_an_import_cycle_is_found() -> None:
    (cycle,) = inject(
        model__a="from raymoe.model import b",
        model__b="def f():\n    from .c import x",
        model__c="import raymoe.model.a",
    )
    assert cycle.startswith("import cycle: ") and all(f"raymoe.model.{m}" in cycle for m in "abc")


def test_a_cycle_through_a_package_is_found() -> None:
    """Importing storage.inner runs storage/__init__, which imports the importer."""
    found = inject(
        storage="from raymoe.parallel import x", storage__inner="", parallel="from raymoe.storage import inner"
    )
    assert any(line.startswith("import cycle: ") for line in found)

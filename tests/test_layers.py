# SPDX-License-Identifier: Apache-2.0
"""Imports point down, in `mikernels`, `kernels` and `bench`, wherever they stand: at the top of a
file, in a function, for types only, or as a module's name."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import mikernels

PACKAGE = Path(mikernels.__file__).parent
# where `bench` and `kernels` lie in a checkout, whatever is installed
HERE = Path(__file__).parent.parent
FOLDERS = {
    "mikernels": PACKAGE,
    "mikernels.kernels": HERE / "kernels",
    "mikernels.bench": HERE / "bench",
}
# the lowest first; rooms of one layer do not see each other
LAYERS = (
    ("_ops",),
    ("kernels", "_C"),
    # files, folders and forms; what every operator stands on (_dispatch, _ext, ...)
    ("base",),
    ("values",),
    ("ops",),
    # the public names of all below: mikernels/_public.py and __init__.py
    ("_public",),
    ("mikernels",),
    ("nn", "optim", "models"),
    ("activations",),
    ("training", "circuits", "evaluate"),
    ("integrations",),
    ("info",),
    # what people look at
    ("report", "rate"),
    ("demo",),
    # trains on the demo's data: `bench quality`
    ("bench",),
    ("cli",),
)
BASE = ("calls", "files", "machine", "owning", "rebind", "schema", "tensor_files")
# import -> why it stands although it points up, or closes a circle
EXCEPTIONS = {
    ("mikernels", "mikernels.integrations.accelerate"): "a public name, imported when asked for",
    ("mikernels.calls.saved", "mikernels.ops"): "load() reads a call of any operator",
    ("mikernels.values.codes", "mikernels.ops.sae.gradients"): "by_feature() keeps what one gave",
    ("mikernels.values.codes", "mikernels.ops.select.row_topk"): "from_dense() selects",
    ("mikernels.ops.sae.gradients", "mikernels.ops.sae.decode"): "each is the other's derivative",
}


def modules():
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def at_once(tree):
    """The statements that run when a file is imported."""
    for node in tree.body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield from ast.walk(node)


def names_of(module, path, nodes=ast.walk):
    """What a file imports, as written, with relative names resolved."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            start = ".".join(above) if node.level else ""
            base = ".".join(filter(None, (start, node.module)))
            yield from ((base, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            text = ast.unparse(node.args[0]).replace("{__name__}", module)
            text = text.lstrip("f").strip("'\"").split("{")[0].rstrip(".")
            yield f"{package}{text}" if text.startswith(".") else text, ""


def imports(nodes=ast.walk):
    """`module -> modules of ours`, each as the file that is meant."""
    known = modules()
    found = {module: set() for module in known}
    for module, path in known.items():
        for base, name in names_of(module, path, nodes):
            if base.split(".")[0] not in ("mikernels", "kernels", "bench"):
                continue
            whole = f"{base}.{name}".rstrip(".")
            # a file, or a name that a file defines
            other = whole if whole in known or name == "_C" else base
            if other != module or name:
                found[module].add(other)
    return found


def room(module):
    top = module.split(".")[1] if "." in module else module
    private = top.startswith("_") and top not in ("_C", "_ops", "_public")
    return "base" if private or top in BASE else top


def layer(module):
    place = next((i for i, rooms in enumerate(LAYERS) if room(module) in rooms), None)
    assert place is not None, f"{module}: put {room(module)} in LAYERS, and in docs if it is a room"
    return place


GRAPH = imports()


def test_imports_point_down():
    up = {
        (module, other)
        for module, others in GRAPH.items()
        for other in others
        if room(module) != room(other) and layer(module) <= layer(other)
    }
    assert up - EXCEPTIONS.keys() == set()


def test_no_circles():
    graph = {
        module: {other for other in others if (module, other) not in EXCEPTIONS}
        for module, others in GRAPH.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"imports in a circle: {' <- '.join(error.args[1])}") from None


def test_any_file_can_be_imported_first():
    """No exceptions here: what closes a circle is imported where it is called."""
    TopologicalSorter(imports(at_once)).prepare()


def test_exceptions_are_imports_that_there_are():
    stale = [pair for pair in EXCEPTIONS if pair[1] not in GRAPH[pair[0]]]
    assert not stale, f"no longer imported, take them out of EXCEPTIONS: {stale}"


def test_the_reading_sees_imports_of_every_kind():
    assert {room(module) for module in GRAPH} | {"_C"} == {r for rooms in LAYERS for r in rooms}
    # in a function, by name, relative, of a type
    assert "mikernels.cli" in GRAPH and "mikernels.demo.run" in GRAPH["mikernels.cli.command"]
    assert "mikernels.kernels" in GRAPH["mikernels._triton"]
    assert "mikernels._C" in GRAPH["mikernels._ext"]
    assert "mikernels.kernels.select.order" in GRAPH["mikernels.kernels.select.row_topk"]
    assert "mikernels.activations" in GRAPH["mikernels.cli.train"]


def test_every_package_is_installed():
    packages = {module for module, path in modules().items() if path.name == "__init__.py"}
    text = (HERE / "pyproject.toml").read_text(encoding="utf-8")
    listed = text.split("packages = [\n")[1].split("]")[0]
    assert sorted(re.findall(r'"([\w.]+)"', listed)) == sorted(packages)


def test_device_code_imports_nothing_of_the_package():
    for module, others in GRAPH.items():
        if room(module) == "kernels":
            # the namespace of operators is a name, which the build gives
            assert {room(other) for other in others} <= {"kernels", "_ops"}, module

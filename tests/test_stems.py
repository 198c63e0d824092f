# SPDX-License-Identifier: Apache-2.0
"""One stem everywhere: an operator's files bear one name and lie in one sub-folder of each room."""

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent.parent
# a file includes or imports from its own sub-folder and from those before it
ORDER = {
    "csrc/cpu": ("simd", "select", "screen", "sae", "pairs", "attention"),
    "kernels": ("common", "select", "sae", "pairs", "attention"),
}
SOURCES = {
    "csrc/cpu": (".h", ".cpp"),
    "kernels": (".py",),
    "mikernels/ops": (".py",),
    "bench/ops": (".py",),
}
# stem in mikernels/ops -> stem elsewhere, and why they differ
OTHERWISE = {"edges": "edge_mix"}  # also edge_scores, which is pair_products at work


def files(room):
    return sorted(
        path.relative_to(HERE / room)
        for path in (HERE / room).rglob("*")
        if path.suffix in SOURCES[room] and path.stem != "__init__"
    )


def declared():
    """`operator -> (stem in mikernels/ops, launcher's "folder.module" or None)`."""
    found = {}
    for path in files("mikernels/ops"):
        for node in ast.walk(ast.parse((HERE / "mikernels/ops" / path).read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Op":
                launchers = [k.value.value for k in node.keywords if k.arg == "triton"]
                module = launchers[0].partition(":")[0] if launchers else None
                found[node.args[0].value.partition("(")[0]] = path.stem, module
    return found


def registered():
    """`operator -> the file of csrc/cpu that implements it`."""
    found = {}
    for path in files("csrc/cpu"):
        for name in re.findall(r'\bm\.impl\("(\w+)"', (HERE / "csrc/cpu" / path).read_text()):
            found[name] = path
    return found


DECLARED, REGISTERED = declared(), registered()
# stem -> sub-folder
FOLDER = {path.stem: path.parent.name for path in REGISTERED.values()} | {
    stem: module.partition(".")[0] for stem, module in DECLARED.values() if module
}


def stem_of(name):
    """The operator that a file serves: the longest stem that its name begins with."""
    fitting = [stem for stem in FOLDER if f"{name}_".startswith(f"{stem}_")]
    return max(fitting, key=len, default=None)


def test_what_is_read_is_what_there_is():
    import mikernels.ops  # noqa: F401  (registers them all)
    from mikernels._dispatch import OPS

    assert DECLARED.keys() == OPS.keys()
    assert REGISTERED.keys() <= OPS.keys() and len(REGISTERED) > 15


def test_an_operator_has_one_stem_in_one_folder():
    for name, (stem, module) in DECLARED.items():
        stem = OTHERWISE.get(stem, stem)
        source = REGISTERED.get(name)
        if source is not None:
            assert source.stem == stem, f"{name}: csrc/cpu/{source}, in mikernels/ops {stem}"
        if module is not None:
            folder, _, launcher = module.partition(".")
            assert stem_of(launcher) == stem, f"{name}: kernels/{folder}/{launcher}.py, not {stem}"
            assert source is None or source.parent.name == folder, f"{name}: {source}, {module}"


def test_files_lie_in_the_folder_of_their_operator():
    for room in SOURCES:
        for path in files(room):
            stem, folder = stem_of(path.stem), path.parent.name
            if room in ORDER:
                assert len(path.parts) == 2 and folder in ORDER[room], f"{room}/{path}"
            # `mikernels/ops` and `bench/ops` may be flat
            if stem is not None and folder:
                assert folder == FOLDER[stem], f"{room}/{path}: {stem} lies in {FOLDER[stem]}"


def uses(room, path):
    """Sub-folders of the room that a file includes or imports from."""
    text = (HERE / room / path).read_text()
    if room == "csrc/cpu":
        return set(re.findall(r'^#(?:include|define MIK_BODY) "cpu/(\w+)/', text, re.MULTILINE))
    imports = (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom))
    return {
        (n.module or alias.name).partition(".")[0]
        for n in imports
        if n.level == 2
        for alias in n.names
    }


def test_folders_use_those_before_them():
    for room, order in ORDER.items():
        seen = set()
        for path in files(room):
            allowed = order[: order.index(path.parent.name) + 1]
            assert uses(room, path) <= set(allowed), f"{room}/{path}: {uses(room, path)}"
            seen |= uses(room, path)
        # the reading sees what there is: what is not of operators is used
        assert seen >= set(order[:-1]) - {"sae", "pairs"}, room

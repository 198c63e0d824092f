# SPDX-License-Identifier: Apache-2.0
"""The house's form of docstrings, put as the parser of Google's form reads it.

`Example:` is a section of code. An entry may name several things, `a, b: text`, and a line may hold
several entries, `k: pairs. by: "abs" or "value"`. What `Returns` says is prose, in which a colon
may follow anything: the type is that of the signature. And what `Args` names is checked: all of the
parameters, nothing else.
"""

import logging
import re
from collections.abc import Iterator

import griffe

# mkdocs counts its warnings, and a strict build fails by them
log = logging.getLogger("mkdocs.hooks.docstrings")
SECTION = re.compile(r"^( *)(\w+):$")
ENTRY = re.compile(r"\w+(?:, \w+)*(?=: )")
TYPE = re.compile(r"[\w.]+(\[[\w., |]*\])?")
# said once: in the documentation of operators
EVERYWHERE = {"impl"}


def entries(line: str, indent: str, known: set[str]) -> Iterator[str]:
    """The entries of a line, each on a line of its own, with names that hold no space."""
    if not (first := ENTRY.match(line, len(indent))):
        yield line
        return
    starts = [first.start()]
    for found in re.finditer(r"(?<=[.;]) (?=\w)", line):
        names = ENTRY.match(line, found.end())
        if names and known.issuperset(names[0].split(", ")):
            starts.append(found.end())
    for start, end in zip(starts, [*starts[1:], len(line)], strict=True):
        names, colon, text = line[start:end].rstrip().partition(":")
        # the parser ends a name at the first space
        yield indent + names.replace(", ", ",\u00a0") + colon + text


def as_google(text: str, known: set[str], returns: str | None) -> str:
    lines, section, indent = [], "", ""
    for line in text.split("\n"):
        if found := SECTION.match(line):
            indent, section = found[1] + " " * 4, found[2]
            lines.append(f"{found[1]}Examples:" if section == "Example" else line)
            continue
        if line and not line.startswith(indent):
            section = ""
        if section in ("Args", "Attributes"):
            lines += entries(line, indent, known)
            continue
        if section in ("Returns", "Yields"):
            # any colon in what follows would end a type
            before, colon, _ = line.partition(": ")
            if returns and not (colon and TYPE.fullmatch(before.strip())):
                line = f"{indent}{returns}: {line.strip()}"
            # its first line only
            section = ""
        lines.append(line)
    return "\n".join(lines)


def documented(obj: griffe.Object) -> Iterator[griffe.Object]:
    """An object and all that is defined in it, as far as they have docstrings."""
    if obj.docstring is not None:
        yield obj
    for member in obj.members.values():
        if not member.is_alias:
            yield from documented(member)


def exported(module: griffe.Module) -> Iterator[griffe.Object]:
    """What the `__all__` of a module, and of those below it, name, with public methods."""
    for name in module.exports or ():
        found = module[str(name)]
        obj = found.final_target if found.is_alias else found
        yield obj
        if obj.is_class:
            yield from (m for m in obj.members.values() if not m.name.startswith("_"))
    for inner in module.modules.values():
        if not inner.is_alias:
            yield from exported(inner)


def named(docstring: griffe.Docstring) -> set[str] | None:
    """What `Args` name; None without that section."""
    for section in griffe.parse_google(docstring, warnings=False):
        if section.kind is griffe.DocstringSectionKind.parameters:
            entries = [entry.name.replace("*", "") for entry in section.value]
            return {name for entry in entries for name in entry.split(",\u00a0")}
    return None


def check(obj: griffe.Function | griffe.Class) -> None:
    """Warn of parameters that are not in `Args`, and of the reverse."""
    if obj.docstring is None or (said := named(obj.docstring)) is None:
        return
    takes = {p.name: p.kind for p in obj.parameters if p.name not in ("self", "cls")}
    variadic = griffe.ParameterKind.var_keyword, griffe.ParameterKind.var_positional
    single = {name for name, kind in takes.items() if kind not in variadic}
    for name in sorted(single - said - EVERYWHERE):
        if not name.startswith("_"):
            log.warning("%s: Args must name every parameter, got no %s", obj.path, name)
    if obj.is_function and griffe.ParameterKind.var_keyword not in takes.values():
        for name in sorted(said - set(takes)):
            log.warning("%s: Args must name parameters, got %s", obj.path, name)


class HouseForm(griffe.Extension):
    # when signatures and members are known
    def on_package(self, *, pkg: griffe.Module, **kwargs: object) -> None:
        for obj in documented(pkg):
            known, returns = set(obj.members), None
            if isinstance(obj, griffe.Function | griffe.Class):
                known |= {p.name for p in obj.parameters}
                returns = getattr(obj, "returns", None)
            assert obj.docstring is not None
            obj.docstring.value = as_google(
                obj.docstring.value, known, None if returns is None else str(returns)
            )
        for obj in exported(pkg):
            if isinstance(obj, griffe.Function | griffe.Class):
                check(obj)

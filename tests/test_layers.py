"""Which folder of the package may import which. Commands may import anything, and nothing imports a command."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mlfsic_jax"
VALUES = {"system", "core", "methods", "backbones", "data", "run"}
# What the modules of a folder may import besides their own folder: folders, or single modules.
ARROWS = {
    "system": set(),
    "core": set(),
    "backbones": {"system"},
    "data": {"system"},
    "methods": {"core", "system.errors", "system.progress"},
    "run": VALUES,
    "report": VALUES,
    "paper": VALUES,
    "bench": VALUES,
    "app": VALUES,
}
TYPES = {"methods": {"data.features"}}  # only under TYPE_CHECKING


def is_command(name):
    """Whether a module, named as below the package, is one that a user runs: it ends in a call of its ``main``."""
    file = PACKAGE.joinpath(*name.split(".")).with_suffix(".py")
    return bool(name) and file.is_file() and '\nif __name__ == "__main__":\n' in file.read_text()


def imports(tree, module):
    """(line, module below the package, is for types only) of every import of the package, wherever it stands."""
    in_package = ["mlfsic_jax", *module.parts[:-1]]

    def visit(node, types):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.body:
                yield from visit(child, True)
            for child in node.orelse:
                yield from visit(child, types)
            return
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, types) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = in_package[: len(in_package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield from ((node.lineno, f"{base}.{alias.name}", types) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            name = node.args[0]
            if isinstance(name, ast.JoinedStr):  # f"mlfsic_jax.data.{name}"
                name = name.values[0]
            if isinstance(name, ast.Constant):
                yield node.lineno, str(name.value), types
        for child in ast.iter_child_nodes(node):
            yield from visit(child, types)

    for line, name, types in visit(tree, False):
        if name.split(".")[0] == "mlfsic_jax":
            yield line, name.partition(".")[2], types


def as_module(name):
    """The longest start of a dotted name that is a module or a package: without the names that it holds."""
    parts = name.split(".")
    while parts and not ((PACKAGE.joinpath(*parts)).is_dir() or PACKAGE.joinpath(*parts).with_suffix(".py").is_file()):
        parts.pop()
    return ".".join(parts)


def is_allowed(folder, name, types):
    top = name.split(".")[0]
    if top == folder:
        return True
    allowed = ARROWS[folder] | (TYPES.get(folder, set()) if types else set())
    return top in allowed or any(name == module or name.startswith(f"{module}.") for module in allowed)


def broken():
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE)
        is_free = len(module.parts) == 1 or is_command(".".join(module.with_suffix("").parts))
        folder = "" if is_free else module.parts[0]
        for line, imported, types in imports(ast.parse(path.read_text()), module):
            name = as_module(imported)
            where = f"{path.relative_to(ROOT)}:{line} imports {'.'.join(filter(None, ['mlfsic_jax', imported]))}"
            if is_command(name):
                yield f"{where}: nothing imports a command"
            elif not folder or imported == "__version__":
                continue
            elif not name:
                yield f"{where}: import from the module that defines it"
            elif not is_allowed(folder, name, types):
                arrows = sorted(ARROWS[folder] | TYPES.get(folder, set()))
                yield f"{where}: {folder}/ may import {', '.join(arrows) or 'nothing else of the package'}"


def test_every_folder_has_its_arrows():
    folders = {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert folders == set(ARROWS)


def test_imports_follow_the_arrows():
    found = list(broken())
    assert not found, "\n".join(["", *found])


def test_an_import_anywhere_is_seen():
    code = """
import mlfsic_jax.run.train
from ..data import words
def f():
    from mlfsic_jax.system import errors, progress
    importlib.import_module(f"mlfsic_jax.data.{name}")
if TYPE_CHECKING:
    from mlfsic_jax.data.features import Cache
else:
    from mlfsic_jax import predict
"""
    found = list(imports(ast.parse(code), Path("core/lcm.py")))
    assert found == [
        (2, "run.train", False),
        (3, "data.words", False),
        (5, "system.errors", False),
        (5, "system.progress", False),
        (6, "data.", False),
        (8, "data.features.Cache", True),
        (10, "predict", False),
    ]
    assert is_allowed("methods", "data.features", True) and not is_allowed("methods", "data.features", False)
    assert not is_allowed("report", "paper.tables", False) and not is_allowed("methods", "system.parallel", False)
    assert not is_allowed("core", "system.errors", False)
    assert (
        is_command("predict") and is_command("data.prepare") and not is_command("core") and not is_command("core.lcm")
    )

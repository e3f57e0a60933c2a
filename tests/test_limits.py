"""How long modules, functions and argument lists of the package may be, and the package as a whole."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "mlfsic_jax").rglob("*.py"))
LINES_OF_MODULE, LINES_OF_FUNCTION, ARGUMENTS, LINES_IN_ALL = 400, 60, 8, 19_000


def n_lines(path):
    return len(path.read_text().splitlines())


def functions():
    """(where it is, node) of every function and method, those inside of others too."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node


def n_arguments(node):
    """Without self and cls; *args and **options count as one each."""
    given = node.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg) if a]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def assert_none(offenders):
    assert not offenders, "\n".join(["", *offenders])


def test_modules_are_short():
    lengths = [(n_lines(path), path.relative_to(ROOT)) for path in MODULES]
    assert_none([f"{path}: {lines} lines" for lines, path in lengths if lines > LINES_OF_MODULE])


def test_functions_are_short():
    lengths = [(node.end_lineno - node.lineno + 1, where) for where, node in functions()]
    assert_none([f"{where}: {lines} lines" for lines, where in lengths if lines > LINES_OF_FUNCTION])


def test_functions_take_few_arguments():
    # The signature of lcm_select is its users' own: every setting of the paper is a keyword.
    counts = [(n_arguments(node), where) for where, node in functions() if node.name != "lcm_select"]
    assert_none([f"{where}: {count} arguments" for count, where in counts if count > ARGUMENTS])


def test_the_package_is_small():
    total = sum(map(n_lines, MODULES))
    assert total <= LINES_IN_ALL, f"{total:,} lines in {len(MODULES)} modules: at most {LINES_IN_ALL:,}"

"""What the README and docs/ show works as it stands there.

Python blocks are run, and so are the shell commands that take seconds on a made-up model and photos. The others' flags
are parsed as the command itself parses them. Every file and extra that is named exists.
"""

import ast
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from tests import made_up, ready_model
from tests.tiny import TINY, share_compiled

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Commands that are run; they take a trained model and photos.
QUICK = ("mlfsic_jax.predict", "mlfsic_jax.export", "mlfsic_jax.report")
# Programs of others, whose arguments are theirs.
FOREIGN = ("cd", "git", "jupyter", "python3", "sbatch", "source", "gcloud", "export", "unzip")


class Block(NamedTuple):
    """Lines between two fences.

    Attributes:
      where: page and line, for messages.
      language: "python", "py", "bash", "sh", or "" for output and files.
      code: the lines.
    """

    where: str
    language: str
    code: str


def blocks(path):
    text = path.read_text()
    for match in re.finditer(r"^ *```(\w*)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE):
        yield Block(f"{path.name}:{text.count(chr(10), 0, match.start()) + 1}", match[1], match[2])


BLOCKS = [block for page in PAGES for block in blocks(page)]
PYTHON = [block for block in BLOCKS if block.language in ("python", "py")]


def commands(code):
    """Lists of words, one for each command in some lines of shell."""
    for line in code.replace("\\\n", " ").splitlines():
        words = []
        for word in [*shlex.split(line, comments=True), ";"]:
            if word not in ("&&", "||", "|", ";"):
                words.append(word)
            elif words:
                while re.fullmatch(r"[A-Z_]+=.*", words[0]):  # environment variables
                    del words[0]
                yield words
                words = []


SHELL = [(b.where, words) for b in BLOCKS if b.language in ("bash", "sh") for words in commands(b.code)]
MODULES = [(where, *words[2:]) for where, words in SHELL if words[:2] == ["python", "-m"]]


def option(words, name):
    """The values of ``--name=``."""
    return [word.partition("=")[2] for word in words if word.startswith(f"--{name}=")]


def name_of(value):
    return re.sub(r"\W+", "_", value if isinstance(value, str) else " ".join(value))[:60]


# --- a folder in which everything that the pages name is there


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A trained model under each name of a workdir or export in the pages, and photos under each name of one."""
    root = tmp_path_factory.mktemp("readme")
    share_compiled(root / "cache")
    code = "".join(block.code for block in PYTHON)
    tables = [block.code for block in BLOCKS if block.code.startswith("file,labels\n")]
    words = {word for text in (code, *tables) for word in re.findall(r"[a-z]+", text)} | set(made_up.FOLDER_LABELS)
    (root / "data").mkdir()
    made_up.save_word_vectors(root / "data" / "glove.6B.300d.txt", words)
    made_up.make_folder(root / "source", "labels", per_label=10)
    fields = TINY | {
        "backbone": "conv4",
        "backbone_weights": "",
        "train_backbone": True,
        "cache_dir": root / "cache",
        "data_dir": root / "data",
        "data.source": root / "source",
    }
    flags = [f"--config={ROOT / 'configs' / 'folder.py'}", "--workdir=runs/trained"]
    program = [sys.executable, "-m", "mlfsic_jax.main", *flags]
    program += [f"--config.{name}={value}" for name, value in fields.items()]
    done = subprocess.run(program, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    quick = [words for _, *words in MODULES if words[0] in QUICK]
    for workdir in {name for words in quick for name in option(words, "workdir")}:
        if not (root / workdir).exists():
            (root / workdir).parent.mkdir(parents=True, exist_ok=True)
            (root / workdir).symlink_to(root / "runs" / "trained")
    for model in set(re.findall(r'\bload\("([^"]+)"', code)):
        if not (root / model).exists():
            run_here("mlfsic_jax.export", "--workdir=runs/trained", f"--out={model}", folder=root)
    ready_model.write_files(root / "data")
    for table in tables:
        (root / "support.csv").write_text(table)
    folders = {name for words in quick for name in option(words, "images")}
    photos = {line.partition(",")[0] for table in tables for line in table.splitlines()[1:]}
    photos |= set(re.findall(r'"([\w/]+\.(?:jpg|png))"', code)) | {f"{folder}/new.jpg" for folder in folders}
    for photo in photos:
        made_up.save_photo(root / photo)
    with pytest.MonkeyPatch.context() as patch:
        ready_model.stand_in(patch, root / "data")
        yield root


def run_here(module, *arguments, folder):
    """Runs a command as ``python -m`` does, without starting another Python."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [module, *arguments])
        for name in (module, f"{module}.__main__"):
            patch.delitem(sys.modules, name, raising=False)
        compiled = jax.config.jax_compilation_cache_dir
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            assert not end.code, end.code
        finally:
            jax.config.update("jax_compilation_cache_dir", compiled)


# --- Python


def test_the_three_functions_are_shown():
    shown = "".join(block.code for block in PYTHON)
    for name in ("sample_episode", "lcm_select", "multilabel_metrics"):
        assert f"{name}(" in shown


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.where)
def test_examples_run_and_print_what_they_say(block, request, monkeypatch):
    if re.search(r"\.(jpg|png)\"|\bload\(", block.code):
        monkeypatch.chdir(request.getfixturevalue("place"))
    printed = []

    def note(*values):
        printed.append((sys._getframe(1).f_lineno, " ".join(map(str, values))))

    values = {"print": note}
    exec(compile(block.code, block.where, "exec"), values)  # our own pages
    for number, line in printed:
        comment = block.code.splitlines()[number - 1].partition("  # ")[2]
        if re.match(r"[\W\d]", comment):  # a value, not a word about it
            assert comment.startswith(line), f"{block.where}: prints {line}"
    if "keep" in values:
        assert values["keep"].shape == values["score"].shape == values["importance"].shape == (8, 7, 7)
        assert values["keep"].dtype == bool and 0 < values["keep"].mean() < 1
    if "metrics" in values:
        assert all(0 <= v <= 1 for v in values["metrics"].values())


def test_importing_the_package_loads_jax_and_numpy_only():
    heavy = ("flax", "optax", "orbax", "tensorflow", "tensorflow_datasets", "PIL", "ml_collections", "torch")
    code = f"import sys, mlfsic_jax; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


# --- shell

# Stops programs once they have read their flags. In: a list of [module, *arguments]; out: their mistakes, "" for none.
PARSE = """
import argparse, json, runpy, sys
from absl import app, flags
import mlfsic_jax.system.flags

class Parsed(BaseException):
    pass

def stop(*_, **__):
    raise Parsed

parse_args = argparse.ArgumentParser.parse_args
argparse.ArgumentParser.parse_args = lambda *a, **k: stop(parse_args(*a, **k))
parse_intermixed_args = argparse.ArgumentParser.parse_intermixed_args
argparse.ArgumentParser.parse_intermixed_args = lambda *a, **k: stop(parse_intermixed_args(*a, **k))
app.run = lambda main, argv=None, flags_parser=None: stop(flags_parser(sys.argv))
found, of_all = [], set(flags.FLAGS)
for sys.argv in json.load(sys.stdin):
    for name in set(flags.FLAGS) - of_all:
        delattr(flags.FLAGS, name)  # of the command before, or a field of its config
    flags.FLAGS.unparse_flags()
    try:
        runpy.run_module(sys.argv[0], run_name="__main__")
        found.append("it does not read its flags")
    except Parsed:
        found.append("")
    except SystemExit as end:
        found.append(str(end.code))
    except ImportError as error:
        found.append(str(error))
json.dump(found, sys.stdout)
"""


def mistakes(arguments):
    """What each [module, *arguments] says of its flags; "" where they are right."""
    done = subprocess.run(
        [sys.executable, "-c", PARSE], input=json.dumps(arguments), capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_flags_are_those_of_the_command():
    said = mistakes([words for _, *words in MODULES])
    wrong = [f"{where}: {shlex.join(words)}: {why}" for (where, *words), why in zip(MODULES, said, strict=True) if why]
    assert not wrong, "\n".join(wrong)
    config = "--config=configs/voc.py:cpu"
    right, field, flag, module = mistakes(
        [
            ["mlfsic_jax.main", config, "--config.train.epochs=3"],
            ["mlfsic_jax.main", config, "--config.train.epoch=3"],
            ["mlfsic_jax.predict", "--workdir=a", "--support=b", "--images=c", "--out=d", "--metod=ridge"],
            ["mlfsic_jax.nothing"],
        ]
    )
    assert right == "" and 'Did you mean "epochs"' in field and "--metod=ridge" in flag and "nothing" in module


@pytest.mark.parametrize("command", [words for _, *words in MODULES if words[0] in QUICK], ids=name_of)
def test_quick_commands_run(command, place):
    run_here(*command, folder=place)
    for out in option(command, "out"):
        assert (place / out).exists()


def extras():
    """Names of the extras in setup.py."""
    calls = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Call)]
    (given,) = [keyword.value for call in calls for keyword in call.keywords if keyword.arg == "extras_require"]
    return {key.value for key in given.keys}


@pytest.mark.parametrize(("where", "words"), SHELL, ids=name_of)
def test_what_a_command_names_exists(where, words):
    program, *arguments = words
    match program:
        case "bash":
            assert (ROOT / arguments[0]).is_file(), f"{where}: {arguments[0]}"
        case "pip":
            named = [
                extra for extras in re.findall(r"\[([\w,]+)\]", shlex.join(arguments)) for extra in extras.split(",")
            ]
            assert set(named) <= extras(), f"{where}: {named}"
        case "python":
            assert arguments[0] == "-m" or (ROOT / arguments[0]).is_file(), f"{where}: {words}"
        case _:
            assert program in FOREIGN, f"{where}: is {program} ours, to be checked, or one of FOREIGN?"
    for path in re.findall(r"(?:^|[ =])((?:launch|configs|tests|docs)/[\w./]+|\w+\.txt)", shlex.join(words)):
        assert (ROOT / path).exists(), f"{where}: {path}"


def test_files_that_are_named_exist():
    for page in PAGES:
        text = page.read_text()
        named = [page.parent / path for path in re.findall(r"\]\(([\w./]+)\)", text)]
        named += [ROOT / path for path in re.findall(r"\b((?:launch|configs|tests|docs)/[\w/]+\.\w+)", text)]
        missing = [str(path) for path in named if not path.exists()]
        assert not missing, f"{page.name}: {', '.join(missing)}"


def test_every_promise_names_a_test_that_exists():
    page = (ROOT / "docs" / "reliability.md").read_text()
    named, file = re.findall(r"`([\w/]+\.py)?::(test_\w+)`", page), ""
    assert len(named) > 70
    for in_file, test in named:
        file = in_file or file  # "::test_x" goes on with the file before it
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(), test

"""The shape of the house: who imports whom, and what must stand nowhere."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(ROOT.glob("*.py"))
LEVELS = [{"config", "log", "quant", "prepare_data"}, {"optim", "int8"}, {"model"}, {"eval"},
          {"train"}, {"bench", "analyze", "sweep"}]  # a file imports from lower levels only; all may import config


def imports(path):
    """Return the top-level names a file imports, wherever in the file it does so."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    return {alias.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for alias in n.names} | {
        n.module.split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_imports_go_downward(path):
    """No file imports a file of its own level or above, so each can be read knowing only those below it."""
    level = next(i for i, names in enumerate(LEVELS) if path.stem in names)
    above = set().union(*LEVELS[level:]) - ({"config"} if path.stem != "config" else set())
    assert not imports(path) & above


def test_dependencies_are_the_declared_ones():
    """The root imports torch, numpy, tiktoken and tqdm; what is optional is imported where it is used."""
    needed = {"torch", "numpy", "tiktoken", "tqdm"}
    optional = {"safetensors", "zstandard", "matplotlib", "torchao", "bitsandbytes"}
    for path in FILES:
        foreign = imports(path) - set(sys.stdlib_module_names) - {p.stem for p in FILES}
        assert foreign <= needed | optional, path.name
        top = {a.name.split(".")[0] for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import)
               for a in n.names}
        assert not top & optional, path.name
    assert needed == {re.split("[=<>]", line)[0] for line in (ROOT / "requirements.txt").read_text().split()}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_a_file_explains_itself(path):
    """A module docstring, and one for every public function, class and method; plain ASCII."""
    text = path.read_text()
    tree = ast.parse(text)
    assert text.isascii() and ast.get_docstring(tree)
    for scope in [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef))]:
        for node in scope.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") \
                    and not (node.name in ("forward", "backward") and scope.name.startswith("_")):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"


def test_no_placeholders():
    """What is read by people is finished: nothing stands for text to come."""
    for path in [ROOT / "README.md", *ROOT.glob("results/*.md"), *FILES]:
        assert not re.search(r"@[A-Z]{2,}@|TODO|FIXME|^[A-Z_]{4,}$", path.read_text(), re.MULTILINE), path.name


@pytest.mark.parametrize("name", ["train.py", "eval.py", "prepare_data.py", "bench.py", "analyze.py"])
def test_help_is_a_map(name):
    """--help shows the docstring, and every flag with the comment that stands behind it in the source."""
    done = subprocess.run([sys.executable, name, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    words = " ".join(done.stdout.split())
    assert done.returncode == 0 and not done.stderr
    for line in re.findall(r"^    \w+: .*  # (.*)$", (ROOT / name).read_text(), re.MULTILINE):
        assert " ".join(line.split()) in words

"""The shape of the house: who imports whom, how long things are, and what must stand nowhere."""

import ast
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("extensions/*.py")])
NAMES = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES}
# A file imports from lower levels only, so each can be read knowing only those below it.
LEVELS = [{"support", "support.config", "support.device", "support.early", "support.lock"}, {"support.checks"},
          {"quant", "prepare_data"}, {"optim", "int8"}, {"model", "support.log"}, {"support.checkpoint"},
          {"support.huggingface"}, {"support.presets", "support.codes", "extensions"}, {"eval"}, {"train"},
          {"bench", "probe"}, {"analyze"}, {"verdicts"}, {"sweep"}]


def imports(path):
    """Return the modules a file imports, wherever in the file it does so."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    return {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names} | {
        n.module for n in nodes if isinstance(n, ast.ImportFrom)}


# Extensions stand for themselves. Those that the list does not have are programs on train.Run, and parts of these.
EXTENSIONS = {name for name in NAMES.values() if name.startswith("extensions.")}
PROGRAMS = {NAMES[path]: imports(path) & EXTENSIONS for path in FILES
            if NAMES[path] in EXTENSIONS and "train" in imports(path)}
PARTS = set().union(*PROGRAMS.values())


@pytest.mark.parametrize("path", FILES, ids=NAMES.get)
def test_imports_go_downward(path):
    """No file imports a file of its own level or above, and none but the list knows an extension by its name."""
    name = NAMES[path]
    mine, theirs = imports(path), imports(path) & {n for names in LEVELS for n in names}
    if name in EXTENSIONS:
        assert not mine & {"extensions", *EXTENSIONS} or name in PROGRAMS and not PARTS & PROGRAMS.keys()
        assert not theirs & {"bench", "analyze", "sweep"} and ("eval" not in theirs or name in PROGRAMS)
        return
    level = next(i for i, names in enumerate(LEVELS) if name in names)
    assert not (theirs - {name}) & set().union(*LEVELS[level:]) or name == "support.early"  # it runs them all
    assert name == "extensions" or not any(other.startswith("extensions.") for other in mine)


def test_deleting_the_extensions_leaves_the_rest_whole(tmp_path):
    """In a copy of the tree without extensions, and without their lines in the list, everything else works."""
    tree = shutil.copytree(ROOT, tmp_path / "tree", ignore=shutil.ignore_patterns(".git*", "data", "out*", ".venv*"))
    text = (tree / "extensions" / "__init__.py").read_text()
    for path in tree.glob("extensions/[!_]*.py"):
        path.unlink()
        (tree / "tests" / f"test_{path.name}").unlink(missing_ok=True)
        assert f"extensions.{path.stem}" in PARTS | PROGRAMS.keys() or f'"{path.stem}": {path.stem}' in text
    text = re.sub(r"^from extensions import .*\n", "", text, flags=re.MULTILINE)
    (tree / "extensions" / "__init__.py").write_text(re.sub(r"EXTENSIONS = {.*}", "EXTENSIONS = {}", text))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    for more in (["--collect-only"], ["tests/test_config.py", "tests/test_eval.py", "-k", "flags or prints"]):
        done = subprocess.run([*command, *more], cwd=tree, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:]


def test_dependencies_are_the_declared_ones():
    """The code imports torch, numpy, tiktoken and tqdm; what is optional is imported where it is used."""
    needed = {"torch", "numpy", "tiktoken", "tqdm"}
    optional = {"safetensors", "zstandard", "matplotlib", "torchao", "bitsandbytes", "datasets", "wandb"}
    ours = {name.split(".")[0] for name in NAMES.values()}
    for path in FILES:
        foreign = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - ours
        assert foreign <= needed | optional, path.name
        top = {a.name.split(".")[0] for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import)
               for a in n.names}
        assert not top & optional, path.name
    assert needed == {re.split("[=<>]", line)[0] for line in (ROOT / "requirements.txt").read_text().split()}


@pytest.mark.parametrize("path", [path for path in FILES if path.read_text()], ids=NAMES.get)
def test_a_file_explains_itself(path):
    """A module docstring, one for every public function, class and method; plain ASCII; lines that fit a screen."""
    text = path.read_text()
    tree = ast.parse(text)
    assert text.isascii() and ast.get_docstring(tree)
    for scope in [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef))]:
        for node in scope.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") \
                    and not (node.name in ("forward", "backward") and scope.name.startswith("_")):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"


def test_lines_fit_a_screen():
    """At most 5 % of the lines of code, docstrings and comments apart, are longer than 100 characters."""
    code = []
    for path in FILES:
        lines, prose = path.read_text().splitlines(), set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
                prose |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        code += [line for i, line in enumerate(lines, start=1) if i not in prose and line.strip()[:1] not in ("", "#")]
    assert sum(len(line) > 100 for line in code) <= 0.05 * len(code)


def test_readme_counts_lines():
    """README's reading order says how long each file is, to ten lines, and its links lead somewhere."""
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| \d+ \| \[([\w/.]+)\]\([\w/.]+\) \| (\d+) \|", text, re.MULTILINE)
    assert len(rows) >= 8
    for name, said in rows:
        if (ROOT / name).exists():
            assert abs(len((ROOT / name).read_text().splitlines()) - int(said)) <= 10, name
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / target).exists() or target.startswith("extensions/"), target


def test_no_placeholders():
    """What is read by people is finished: nothing stands for text to come."""
    for path in [ROOT / "README.md", *ROOT.glob("results/*.md"), *FILES]:
        assert not re.search(r"@[A-Z]{2,}@|TODO|FIXME|^[A-Z_]{4,}$", path.read_text(), re.MULTILINE), path.name


@pytest.mark.parametrize("name", ["train.py", "eval.py", "prepare_data.py", "bench.py", "analyze.py", "sweep.py"])
def test_help_is_a_map(name):
    """--help shows the docstring, and every flag with the comment that stands behind it in the source."""
    done = subprocess.run([sys.executable, name, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    words = " ".join(done.stdout.split())
    assert done.returncode == 0 and not done.stderr
    for line in re.findall(r"^    \w+: .*  # (.*)$", (ROOT / name).read_text(), re.MULTILINE):
        assert " ".join(line.split()) in words

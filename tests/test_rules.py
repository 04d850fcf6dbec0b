"""The house style, as far as a program can check it, over the product code, the tests and the pages."""

from __future__ import annotations

import ast
import importlib
import io
import re
import shutil
import statistics
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TypeAlias

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("optimizer", "kernels", "exporters", "bench")
PRODUCT = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef

DISTRIBUTIONS = {"yaml": "pyyaml", "sklearn": "scikit-learn", "onnx_ir": "onnx-ir", "PIL": "pillow"}
"""Modules whose distribution has another name."""
OPTIONAL = {
    "optimizer/recipes/digits.py": {"sklearn"},
    "optimizer/huggingface.py": {"transformers"},
    "bench/images.py": {"PIL"},
}
"""Modules that an extra installs: the file imports them where it needs them, and says which extra is missing."""

PIPE = "bench/child.py"
"""A fresh process that measures reads its job from its parent's pipe."""

REGISTRIES = (
    ("pypi", "org"),
    ("pythonhosted", "org"),
    ("pytorch", "org"),
    ("anaconda", "org"),
    ("ngc", "nvidia", "com"),
)
"""Hosts of package registries, in pieces: no file may name one, this one included."""
MACHINE_PATH = re.compile(r"(?<![\w.}])/(?:root|home|Users|opt|work)/\w")


@cache
def syntax(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(path: Path) -> list[Function]:
    return [node for node in ast.walk(syntax(path)) if isinstance(node, Function)]


def place(path: Path, node: ast.AST | int) -> str:
    return f"{path.relative_to(ROOT)}:{node if isinstance(node, int) else node.lineno}"  # type: ignore[attr-defined]


def called(node: ast.AST) -> str:
    """Return the dotted name that a call calls, "" for anything else."""
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


@cache
def tracked() -> tuple[Path, ...]:
    """Return the files of the repository: in git or about to be; a skip where there is no git."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-co", "--exclude-standard"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("files not listed: git or its repository is absent")
    return tuple(path for name in found if name and (path := ROOT / name).is_file())


def texts() -> Iterator[tuple[Path, str]]:
    for path in tracked():
        try:
            yield path, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a checkpoint or a picture


# --- size


def test_a_file_has_at_most_400_lines() -> None:
    counts = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in PRODUCT}
    assert {name: count for name, count in counts.items() if count > 400} == {}


def test_a_function_has_at_most_60_lines() -> None:
    sizes = [(length(node), place(path, node)) for path in PRODUCT for node in functions(path)]
    assert [found for found in sizes if found[0] > 60] == []


def test_the_median_function_has_at_most_8_lines() -> None:
    assert statistics.median(length(node) for path in PRODUCT for node in functions(path)) <= 8


def length(node: Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_a_function_has_at_most_7_parameters() -> None:
    found = []
    for path in PRODUCT:
        for node in functions(path):
            names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            if len([name for name in names if name not in ("self", "cls")]) > 7:
                found.append(place(path, node))
    assert found == []


# --- what code may not do


def test_no_error_is_swallowed() -> None:
    """No bare except, and no except whose body does nothing."""
    handlers = [
        (path, node) for path in PRODUCT for node in ast.walk(syntax(path)) if isinstance(node, ast.ExceptHandler)
    ]
    assert [place(*found) for found in handlers if found[1].type is None or is_empty(found[1].body)] == []


def is_empty(body: list[ast.stmt]) -> bool:
    return all(isinstance(item, ast.Pass) or is_constant(item) for item in body)


def is_constant(item: ast.stmt) -> bool:
    return isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant)


def test_no_global_state() -> None:
    assert [place(p, n) for p in PRODUCT for n in ast.walk(syntax(p)) if isinstance(n, ast.Global | ast.Nonlocal)] == []


def test_library_code_does_not_print() -> None:
    """A script may, below its `if __name__` line."""
    found = []
    for path in without_pipe():
        library = [item for item in syntax(path).body if not is_main(item)]
        calls = [node for item in library for node in ast.walk(item) if called(node) == "print"]
        found += [place(path, node) for node in calls]
    assert found == []


def without_pipe() -> list[Path]:
    return [path for path in PRODUCT if path != ROOT / PIPE]


def is_main(item: ast.stmt) -> bool:
    return isinstance(item, ast.If) and "__name__" in ast.unparse(item.test)


def test_nothing_is_left_to_do() -> None:
    words = re.compile(r"\b(TO" r"DO|FIX" r"ME|X" r"XX|HA" r"CK)\b")
    found = []
    for path in (*PRODUCT, *TESTS):
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            if token.type == tokenize.COMMENT and words.search(token.string):
                found.append(place(path, token.start[0]))
    assert found == []


def test_nothing_is_loaded_that_could_run() -> None:
    """torch.load reads weights only, YAML by a safe loader, and nothing is unpickled or evaluated."""
    bad = {"pickle.load", "pickle.loads", "eval", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "os.system"}
    found = []
    for path in without_pipe():
        for node in ast.walk(syntax(path)):
            name = called(node)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords} if isinstance(node, ast.Call) else {}
            if name in bad or (name == "torch.load" and keywords.get("weights_only") != "True"):
                found.append(place(path, node))
    assert found == []


def test_every_module_says_what_it_is() -> None:
    silent = [path for path in PRODUCT if path.read_text().strip() and not ast.get_docstring(syntax(path))]
    assert [str(path.relative_to(ROOT)) for path in silent] == []


def test_no_file_is_a_heap() -> None:
    assert [p for p in PRODUCT if p.stem in ("util", "utils", "helper", "helpers", "common", "misc")] == []


# --- the import rule

BREACHES = {
    "kernels/pack.py": "from ..optimizer import errors",
    "optimizer/walk.py": "from ..exporters import runner",
    "exporters/verify.py": "from ..bench import edge",
    "optimizer/planning.py": "from . import run",
    "optimizer/quantizers/nf.py": "from . import dp",
    "optimizer/criteria/obs.py": "from . import flap",
    "optimizer/graph.py": "def late(): import onnxruntime",
    "bench/edge.py": "import tensorrt",
    "bench/compare.py": "import yaml",
    "optimizer/doctor.py": "import click",
}


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    code = "from importlinter.cli import lint_imports_command as run; run(['--no-logo', '--no-cache'])"
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(command, cwd=root, env={"PYTHONPATH": str(root)}, capture_output=True, text=True, check=False)


def test_the_import_rule_holds_and_notices_each_breach(tmp_path: Path) -> None:
    """kernels <- optimizer <- exporters <- bench; onnx, yaml and click where they belong; methods on their own."""
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / "paredown" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    kept = lint_imports(tmp_path)
    assert kept.returncode == 0, kept.stdout + kept.stderr
    for name, line in BREACHES.items():
        path = tmp_path / "paredown" / name
        text = path.read_text()
        path.write_text(f"{text}\n{line}\n")
        broken = lint_imports(tmp_path)
        assert (broken.returncode, broken.stdout.count(" BROKEN")) == (1, 1), f"{name}: {line}\n{broken.stdout}"
        path.write_text(text)


def test_every_module_that_is_imported_is_declared() -> None:
    """An import that only the dev extra installs would break the first user, and no test."""
    declared = {re.split(r"[<>=~! \[]", text, maxsplit=1)[0].lower() for text in PYPROJECT["project"]["dependencies"]}
    found = []
    for path in PRODUCT:
        optional = OPTIONAL.get(str(path.relative_to(ROOT)), set()) | beside(path)
        for node in ast.walk(syntax(path)):
            for name in imported(node) - optional - set(sys.stdlib_module_names) - {"paredown", "__future__"}:
                if DISTRIBUTIONS.get(name, name).lower() not in declared:
                    found.append(f"{place(path, node)} imports {name}")
    assert found == []


def beside(path: Path) -> set[str]:
    """Return the siblings of what runs on a board, which imports them by name where it is copied flat."""
    if path.parent != ROOT / "bench/board":
        return set()
    return {other.stem for other in path.parent.glob("*.py")} | {"environment"}


def imported(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and not node.level:
        return {str(node.module).partition(".")[0]}
    return set()


# --- folders that are registries


@pytest.mark.parametrize("path", sorted((ROOT / "optimizer/quantizers").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_a_quantizer_defines_its_three_names(path: Path) -> None:
    module = importlib.import_module(f"paredown.optimizer.quantizers.{path.stem}")
    assert module.Spec.__dataclass_params__.frozen
    assert module.needs <= {"gram", "mean"}
    assert list(module.quantize.__annotations__) == ["w", "stats", "spec", "return"]


def test_every_folder_of_code_is_a_package_of_the_wheel() -> None:
    """A folder that is not listed imports where the project is edited, and is missing from the wheel."""
    folders = {path.parent.relative_to(ROOT).parts for path in PRODUCT}
    assert sorted(PYPROJECT["tool"]["setuptools"]["packages"]) == sorted(".".join(("paredown", *f)) for f in folders)


# --- tests


def test_every_test_asserts() -> None:
    """Directly, or by a function of its file that does."""
    found = []
    for path in TESTS:
        asserting = {node.name for node in functions(path) if asserts(node, frozenset())}
        tests = [node for node in functions(path) if node.name.startswith("test_")]
        found += [place(path, node) for node in tests if not asserts(node, frozenset(asserting))]
    assert found == []


def asserts(function: Function, known: frozenset[str]) -> bool:
    for node in ast.walk(function):
        name = called(node).rpartition(".")[2]
        if isinstance(node, ast.Assert) or name in known or name.startswith(("assert", "raises", "warns", "opcheck")):
            return True
    return False


# --- pages


def test_links_of_pages_resolve() -> None:
    found = []
    for page in (path for path in tracked() if path.suffix == ".md"):
        for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
            if not re.match(r"[a-z]+:", target) and not resolves(page, target):
                found.append(f"{page.relative_to(ROOT)}: {target}")
    assert found == []


def resolves(page: Path, target: str) -> bool:
    name, _, anchor = target.partition("#")
    path = page.parent / name if name else page
    if not path.exists() or (path.is_file() and path not in tracked()):
        return False
    return not anchor or anchor in anchors(path)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_code(page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def test_no_file_names_a_machine_or_a_registry() -> None:
    hosts = [".".join(parts) for parts in REGISTRIES]
    found = []
    for path, text in texts():
        for number, line in enumerate(text.splitlines(), 1):
            if any(host in line for host in hosts) or MACHINE_PATH.search(line):
                found.append(f"{place(path, number)}: {line.strip()[:80]}")
    assert found == []


# --- the rules themselves


def test_rules_see_what_they_forbid(tmp_path: Path) -> None:
    """A rule that never fires proves nothing."""
    source = "def f():\n    try:\n        g()\n    except ValueError:\n        pass\n"
    handler = next(node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ExceptHandler))
    assert is_empty(handler.body)
    silent, loud = (ast.parse(f"def test_x():\n    {line}").body[0] for line in ("f()", "assert f()"))
    assert isinstance(silent, ast.FunctionDef)
    assert isinstance(loud, ast.FunctionDef)
    assert (asserts(silent, frozenset()), asserts(loud, frozenset()), asserts(silent, frozenset("f"))) == (
        False,
        True,
        True,
    )
    assert MACHINE_PATH.search("see /" + "home/me/x")
    assert imported(ast.parse("import a.b").body[0]) == {"a"}
    page = tmp_path / "page.md"
    page.write_text("# One, two `x`\n```\n# not a heading\n```\n")
    assert anchors(page) == {"one-two-x"}

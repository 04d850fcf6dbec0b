"""The README is executed: its tour in an empty folder, its tables against the code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from paredown.kernels import native
from paredown.optimizer import errors
from paredown.optimizer.cli import INTERRUPTED

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = (
    "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e '.[demo]' && .venv/bin/optimize demo",
    "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e '.[dev]' && .venv/bin/python tests/check",
)
NUMBER = re.compile(r"\d[\d.,]*(?:e[-+]?\d+)?")
BIN = Path(sys.executable).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block: its language, the file that it is to be written to ("" = none), and its text."""

    language: str
    file: str
    text: str


def section(title: str) -> str:
    """Return the part of the README below a heading of the second level."""
    found = re.search(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", README, flags=re.MULTILINE | re.DOTALL)
    assert found is not None, f'the README has no section "{title}"'
    return found[1]


def blocks(text: str) -> list[Block]:
    found = re.findall(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [Block(language=language, file=file, text=body) for language, file, body in found]


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run as a user would in an activated environment, with room for the tables."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    env = {**clean, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "160"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run(command, cwd=cwd, env=env, text=True, check=False, **streams)


def steps(console: str) -> list[tuple[str, list[str]]]:
    """Return each command of a console block with the output that the README shows."""
    found: list[tuple[str, list[str]]] = []
    for line in console.splitlines():
        if line.startswith("$ "):
            found.append((line.removeprefix("$ "), []))
        else:
            found[-1][1].append(line)
    return found


def unmatched(shown: list[str], said: str) -> str:
    """Return the first line of the README that the output lacks, "" if it has all in order.

    Numbers may differ. A line "..." stands for any lines; without one the output goes on with the next line.
    """
    lines, place, gap = [" ".join(line.split()) for line in said.splitlines()], 0, False
    for line in shown:
        if line == "...":
            gap = True
            continue
        pattern = loosely(line)
        last = len(lines) if gap else place + 1
        at = next((i for i in range(place, min(last, len(lines))) if pattern.fullmatch(lines[i])), None)
        if at is None:
            return line
        place, gap = at + 1, False
    return "" if gap or place == len(lines) else f"(the README ends, the output goes on: {lines[place]})"


def loosely(line: str) -> re.Pattern[str]:
    """Return what a line of output must match: any number for a number, anything for "..."."""
    parts = re.split(rf"({NUMBER.pattern}|\.\.\.)", " ".join(line.split()))
    texts = [".*" if part == "..." else NUMBER.pattern if NUMBER.fullmatch(part) else re.escape(part) for part in parts]
    return re.compile("".join(texts))


@pytest.mark.slow
def test_the_tour(tmp_path: Path) -> None:
    """Files are written, commands answer what the README shows but for the numbers, Python runs.

    The kernels' section goes on in the same folder, where they were built.
    """
    shown = blocks(section("Tour")) + (blocks(section("Kernels")) if native.available() else [])
    for block in shown:
        if block.file:
            path = tmp_path / block.file
            path.parent.mkdir(exist_ok=True)
            path.write_text(block.text)
        elif block.language == "python":
            done = run([str(BIN / "python"), "-c", block.text], tmp_path)
            assert done.returncode == 0, done.stdout
        else:
            assert block.language == "console"
            for command, shown in steps(block.text):
                done = run(["bash", "-c", command], tmp_path)
                assert done.returncode == 0, f"$ {command}\n{done.stdout}"
                assert unmatched(shown, done.stdout) == "", f"$ {command}\n{done.stdout}"


def test_outputs_are_compared_loosely_but_compared() -> None:
    said = "a (1)\n x   1.5 kB\ny 2.0e-07\nexit 2"
    assert unmatched(["a (7)", "x 77.8 kB", "y 1e+3", "exit 3"], said) == ""
    assert unmatched(["a ...", "x ... kB", "y 1", "exit 3"], said) == ""
    assert unmatched(["...", "y 5", "..."], said) == ""
    assert unmatched(["...", "x 1 MB", "..."], said) == "x 1 MB"
    assert unmatched(["a (1)", "y 5", "..."], said) == "y 5"
    assert "goes on" in unmatched(["a (1)"], said)


def test_the_two_commands_stand_in_it() -> None:
    shown = [block.text.strip() for block in blocks(section("Two commands"))]
    assert shown == list(COMMANDS)
    assert COMMANDS[1].removesuffix(" tests/check") in (ROOT / ".ci/run").read_text().replace(" -q ", " ")


def test_the_picture_is_there_and_small() -> None:
    (picture,) = re.findall(r"^!\[[^\]]+\]\(([^)]+)\)$", README, flags=re.MULTILINE)
    raw = (ROOT / picture).read_bytes()
    assert raw.startswith(b"\x89PNG")
    assert len(raw) < 300_000


def test_the_results_have_their_place() -> None:
    assert README.index("<!-- results:begin -->") < README.index("<!-- results:end -->")


def table(text: str, title: str) -> list[str]:
    """Return the names in the first column of the table with this heading, sorted."""
    found = re.search(rf"^\| {re.escape(title)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, flags=re.MULTILINE)
    assert found is not None, title
    return sorted(name for row in found[1].splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1]))


def test_tables_are_those_of_the_code() -> None:
    """Every step, criterion, quantizer and exit code, and no other."""
    text = section("What it does")
    assert table(text, "step") == sorted(["prune", "factorize", "quantize"])
    for title, folder in (("criterion of `prune`", "criteria"), ("quantizer", "quantizers")):
        assert table(text, title) == sorted(path.stem for path in (ROOT / "optimizer" / folder).glob("[a-z]*.py"))
    codes = [int(code) for code in re.findall(r"^\| (\d+) \|", text, flags=re.MULTILINE)]
    assert codes == [0, *sorted(kind.exit_code for kind in errors.Error.__subclasses__()), INTERRUPTED]


def test_help_answers_within_a_second() -> None:
    """The best of three, on a machine that may be busy; torch alone would take longer."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = run([str(BIN / "optimize"), "--help"], ROOT)
        seconds.append(time.perf_counter() - started)
        assert "optimize run RECIPE" in done.stdout
    assert min(seconds) < 1.0


def test_help_imports_neither_torch_nor_a_runtime() -> None:
    code = (
        "import sys; from paredown.optimizer import cli; print(sorted({'torch', 'numpy', 'onnx'} & set(sys.modules)))"
    )
    assert run([str(BIN / "python"), "-c", code], ROOT).stdout.strip() == "[]"

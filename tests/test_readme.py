"""The README keeps its word: its commands parse, its files exist, its tables come from the result files."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nuguide import cli
from nuguide.experiments import cli as experiments

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("src/nuguide/models/*/README.md"))
]


def commands(text: str) -> list[str]:
    """The lines of code blocks that run one of our two programs; a line that ends in a backslash goes on."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    starts = re.compile(r"(?:\$ )?(nuguide(?:-experiments)? [^#]*)")
    return sorted({found[1].strip() for line in lines if (found := starts.match(line))})


SHOWN = commands("\n".join(page.read_text() for page in PAGES))


def parse(command: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[str]]:
    """The exit code of a command whose functions do nothing, and the names of those that were called."""
    called = []

    def standing_in(function):
        @functools.wraps(function)
        def instead(*arguments, **options) -> int:
            called.append(function.__name__)
            return 0

        return instead

    for module, table in ((cli, "COMMANDS"), (cli, "DATA_COMMANDS"), (experiments, "COMMANDS")):
        functions = getattr(module, table)
        monkeypatch.setattr(module, table, {name: standing_in(function) for name, function in functions.items()})
    program, *arguments = shlex.split(command)
    with pytest.raises(SystemExit) as stopped:
        {"nuguide": cli, "nuguide-experiments": experiments}[program].main(arguments)
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, called


def test_commands_are_taken_from_code_blocks_alone() -> None:
    page = (
        "nuguide segment a\n```\n$ nuguide train b \\\n  --out c  # why\nmake demo\n```\n"
        "`nuguide data d`\n```sh\nnuguide-experiments run e\n```\n"
    )
    assert commands(page) == ["nuguide train b    --out c", "nuguide-experiments run e"]


def test_every_program_and_command_is_shown() -> None:
    shown = {tuple(command.split()[:2]) for command in SHOWN}
    assert shown == {
        *(("nuguide", name) for name in cli.COMMANDS), *(("nuguide-experiments", name) for name in experiments.COMMANDS)
    }


@pytest.mark.parametrize("command", SHOWN)
def test_every_command_that_is_shown_parses(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = command.split()
    called = "_".join(words[1:3]) if words[:2] == ["nuguide", "data"] else words[1]
    assert parse(command, monkeypatch) == (0, [called])


@pytest.mark.parametrize(
    "command",
    [
        "nuguide segment a.png --out b --colour red",
        "nuguide data folds folder=a --outt b",
        "nuguide data chekc tnbc a",
        "nuguide-experiments run table1 --data-rot a",
        "nuguide-experiments table",
    ],
)
def test_a_wrong_option_on_a_page_would_be_found(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse(command, monkeypatch) == (2, [])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: "/".join(page.parts[-2:]))
def test_every_file_that_a_page_links_to_is_there(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_table_is_what_the_result_files_say() -> None:
    check = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "report.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert (check.returncode, check.stdout) == (0, "")

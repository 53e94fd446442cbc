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

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "src/nuguide/models/default/README.md"]


def commands() -> list[str]:
    text = "\n".join(page.read_text() for page in PAGES if page.is_file())
    return sorted(set(re.findall(r"^(?:\$ )?(nuguide (?:segment|train|evaluate) [^\n#]*)", text, flags=re.MULTILINE)))


def test_there_are_commands_to_check() -> None:
    assert len(commands()) >= 6


@pytest.mark.parametrize("command", commands())
def test_every_command_that_is_shown_parses(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def standing_in(function):
        @functools.wraps(function)
        def instead(*arguments, **options) -> int:
            called.append(function.__name__)
            return 0

        return instead

    monkeypatch.setattr(cli, "COMMANDS", {name: standing_in(function) for name, function in cli.COMMANDS.items()})
    name, *arguments = shlex.split(command)
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert (name, stopped.value.code, called) == ("nuguide", 0, [arguments[0]])


@pytest.mark.parametrize("page", [page for page in PAGES if page.is_file()], ids=lambda page: page.parent.name)
def test_every_file_that_a_page_links_to_is_there(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_table_is_what_the_result_files_say() -> None:
    check = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "report.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert (check.returncode, check.stdout) == (0, "")

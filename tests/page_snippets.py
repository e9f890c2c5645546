"""A page of documentation, done as its reader would: files written, commands run, and what is shown is what they print.

Blocks of a section, in order: a file where its first line is `# name.yaml` or `# name.py`; `bash`, lines of `grpo ...`
or `python name.py`, with `# exits with 1` where a check fails; `text`, what the last block printed. There, every line
that is not indented begins a new piece, white space counts for nothing, and `...` stands for anything. Amounts in GiB
may be 2% off: the planner's terms are refined now and then.
"""

from __future__ import annotations

import importlib
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import typer

from grpo.cli import main

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NAMED = re.compile(r"# ([\w./-]+\.(?:yaml|py))\n")
EXIT = re.compile(r"\s+# exits with (\d)$")
AMOUNT = re.compile(r"\d+\\\.\d+ GiB")
"""In a piece whose points are escaped."""
WIDTH = 2000
"""Columns: nothing is folded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageReader:
    """Follows a page in a folder. What stands on it before the first `## ` belongs to every section."""

    page: Path
    folder: Path
    """Where files are written and commands are started."""
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]
    commands: Mapping[str, Callable[[Sequence[str]], None]] = field(default_factory=dict)
    """Command, such as "grpo doctor" -> what stands in for it, given its arguments."""
    home: str = "/home/me/project"
    """What the page calls the folder."""
    printed: list[str] = field(default_factory=list)
    """By each command, in their order."""

    def follow(self, section: str) -> int:
        """Do what a section says. Args: section: how its heading begins. Returns the number of pieces compared."""
        self.monkeypatch.chdir(self.folder)
        self.monkeypatch.setenv("COLUMNS", str(WIDTH))
        self.monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(self.folder)])
        before = set(sys.modules)
        preamble, *sections = re.split(r"^## ", self.page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        (own,) = [text for text in sections if text.startswith(section)]
        try:
            return self._follow(BLOCK.findall(preamble) + BLOCK.findall(own))
        finally:
            for name in set(sys.modules) - before:  # another test's file of this name is another module
                if str(getattr(sys.modules[name], "__file__", "")).startswith(str(self.folder)):
                    del sys.modules[name]

    def _follow(self, blocks: Sequence[tuple[str, str]]) -> int:
        printed, num_compared = "", 0
        for kind, text in blocks:
            named = NAMED.match(text)
            if named:
                path = self.folder / named[1]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
                self._forget(path)
            elif kind == "bash":
                printed = "".join(self._run(line) for line in text.splitlines())
            elif kind == "text":
                num_compared += check_shown(text, printed)
        return num_compared

    def _forget(self, path: Path) -> None:
        """A file that was imported and is written again is another module."""
        importlib.invalidate_caches()
        for name, module in list(sys.modules.items()):
            if getattr(module, "__file__", None) == str(path):
                del sys.modules[name]

    def _run(self, line: str) -> str:
        wanted = EXIT.search(line)
        words = shlex.split(EXIT.sub("", line))
        code = self._exit_code(words)
        captured = self.capsys.readouterr()
        printed = (captured.out + captured.err).replace(str(self.folder), self.home)
        self.printed.append(printed)
        assert code == (int(wanted[1]) if wanted else 0), f"{line}\n{printed}"
        return printed

    def _exit_code(self, words: Sequence[str]) -> int:
        try:
            own = self.commands.get(" ".join(words[:2]))
            if own is not None:
                own(words[2:])
            elif words[0] == "python":
                with self.monkeypatch.context() as patch:
                    patch.setattr(sys, "argv", words[1:])
                    patch.setattr(sys, "path", [str(self.folder), *sys.path])  # as python does with a script's folder
                    runpy.run_path(words[1], run_name="__main__")
            else:
                self.monkeypatch.setattr(sys, "argv", list(words))
                main()
        except typer.Exit as exc:
            return exc.exit_code
        except SystemExit as exc:
            return int(exc.code or 0)
        return 0


def check_shown(shown: str, printed: str) -> int:
    """Every piece of what is shown must be in what was printed, in this order; gives their number."""
    text, place = _squeezed(printed), 0
    pieces = [_squeezed(piece) for piece in re.split(r"\n(?! )", shown.strip("\n"))]
    for piece in pieces:
        pattern = AMOUNT.sub(r"([\\d.]+) GiB", re.escape(piece).replace(re.escape("..."), ".*?").replace("\\ ", " "))
        found = re.compile(pattern).search(text, place)
        assert found, f"not printed: {piece}\nprinted: {printed}"
        amounts = [float(amount) for amount in re.findall(r"([\d.]+) GiB", piece)]
        assert [float(amount) for amount in found.groups()] == pytest.approx(amounts, rel=0.02), found[0]
        place = found.end()
    return len(pieces)


def _squeezed(text: str) -> str:
    return " ".join(text.split())

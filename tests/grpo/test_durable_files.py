"""Files of a run are whole or not there; a disk that refuses is named, with what was needed."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from grpo.durable_files import (
    LineFile,
    append_lines,
    cut_last_lines,
    folder_damage,
    new_folder,
    remove_folder,
    remove_leftovers,
    write_atomically,
)
from grpo.errors import StorageError


@contextmanager
def no_file_above(num_bytes: int) -> Iterator[None]:
    """The kernel refuses longer files: what a full disk does, without one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["config.yaml"]


def test_a_write_that_fails_names_the_path_and_the_need_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    write_atomically(path, b"old")
    with no_file_above(100), pytest.raises(StorageError) as caught:
        write_atomically(path, b"x" * 1000)
    assert str(path) in str(caught.value)
    assert "1000 bytes were to be written" in str(caught.value)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["config.yaml"]


def test_appended_lines_are_all_there_or_none_of_them(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append_lines(path, [b"one", b"two"])
    with no_file_above(100), pytest.raises(StorageError, match="1004 bytes were to be written"):
        append_lines(path, [b"x" * 500, b"y" * 502])
    assert path.read_bytes() == b"one\ntwo\n"


@pytest.mark.parametrize("length", [1, 70_000])
def test_a_half_last_line_is_cut_before_the_next_is_written(length: int, tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"one\n" + b"h" * length)
    with LineFile(path) as file:
        file.append([b"two"])
    assert path.read_bytes() == b"one\ntwo\n"


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        (b"", b""),
        (b"1\n2\n", b"1\n2\n"),
        (b"1\n2\n3\n9", b"1\n2\n"),
        (b"1\n2", b"1\n2\n"),  # only its newline was lost
        (b"1\n2\n3\n4\n5\n", b"1\n2\n"),
        (b"4\n5\n", b""),
        (b"2" + b"0" * 70_000, b""),
        (b"1\n" + b"9" * 70_000 + b"\n" + b"8" * 70_000 + b"\n", b"1\n"),  # longer than a block
        (b"\n\n2\n\n", b"\n\n2\n"),
    ],
)
def test_lines_are_cut_behind_the_last_that_is_kept(content: bytes, kept: bytes, tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(content)
    cut_last_lines(path, lambda line: line != b"" and int(line[:3]) <= 2)
    assert path.read_bytes() == kept


def test_cutting_a_file_that_is_not_there_does_nothing(tmp_path: Path) -> None:
    assert cut_last_lines(tmp_path / "none", lambda line: True) == 0
    assert os.listdir(tmp_path) == []


def make_folder(final: Path) -> None:
    with new_folder(final, format_version=1) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "a").write_bytes(b"aaaa")
        (temporary / "b").write_bytes(b"")


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    final = tmp_path / "parent" / "one"

    def fail() -> None:
        with new_folder(final, format_version=1) as temporary:
            (temporary / "a").write_bytes(b"half")
            assert not final.exists()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert os.listdir(tmp_path / "parent") == []
    make_folder(final)
    assert os.listdir(tmp_path / "parent") == ["one"]
    assert folder_damage(final, format_version=1) is None


def test_a_bit_flip_in_any_byte_and_any_truncation_of_any_file_of_a_folder_is_found(tmp_path: Path) -> None:
    final = tmp_path / "one"
    make_folder(final)
    for name in ("inner/a", "manifest.json"):
        path = final / name
        whole = path.read_bytes()
        for place in range(len(whole)):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << place % 8
            path.write_bytes(bytes(damaged))
            assert folder_damage(final, format_version=1) is not None, (name, place)
            path.write_bytes(whole[:place])
            assert folder_damage(final, format_version=1) is not None, (name, place)
        path.write_bytes(whole)
    (final / "b").unlink()
    assert folder_damage(final, format_version=1) == "b is missing"


def test_a_removed_folder_is_gone_and_what_killed_processes_left_is_cleared(tmp_path: Path) -> None:
    make_folder(tmp_path / "one")
    (tmp_path / f".one-{'0' * 32}").mkdir()
    (tmp_path / ".mine-keep").mkdir()
    remove_folder(tmp_path / "one")
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == [".mine-keep"]

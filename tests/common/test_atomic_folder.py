"""An output folder is complete or absent, however the work ends."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from trimode.common.atomic_folder import atomic_folder
from trimode.common.errors import TriModeError


def test_the_folder_appears_when_the_body_ends(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "deep/out") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "deep/out").exists()
    assert (tmp_path / "deep/out/file").read_text() == "x"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
    assert (tmp_path / "out/file").exists()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_after_an_exception(tmp_path: Path, error: type[BaseException]) -> None:
    def fail(folder: Path) -> None:
        (folder / "file").write_text("x")
        raise error

    with pytest.raises(error), atomic_folder(tmp_path / "out") as folder:
        fail(folder)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with pytest.raises(TriModeError, match="out: the disk is full"), atomic_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_occupied_places_are_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").write_text("mine")
    for out in ("file", "folder"):
        with pytest.raises(TriModeError, match=f"{out} exists already"), atomic_folder(tmp_path / out):
            pytest.fail("the body must not run")
    assert (tmp_path / "file").read_text() == (tmp_path / "folder/file").read_text() == "mine"


def test_a_place_that_was_taken_meanwhile(tmp_path: Path) -> None:
    def take() -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/file").write_text("theirs")

    with pytest.raises(TriModeError, match="out exists already"), atomic_folder(tmp_path / "out"):
        take()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(TriModeError, match="out cannot be written"), atomic_folder(tmp_path / "file/out"):
        pytest.fail("the body must not run")

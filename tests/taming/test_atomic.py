"""Files and folders take their place whole, or what was there stays."""

from pathlib import Path

import pytest

from taming import atomic
from taming.atomic import put_in_place, remove_folder, standing, whole_folder, write_text


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(params=["swapped", "moved aside"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to replace a folder: the second is that of file systems that cannot swap."""
    if request.param == "moved aside":
        monkeypatch.setattr(atomic, "_swap", lambda first, second: False)
    return str(request.param)


def test_a_folder_is_replaced_whole(tmp_path: Path, way: str) -> None:
    target = tmp_path / "model"
    for text in ("first", "second"):
        with whole_folder(target) as folder:
            (folder / "inner").mkdir()
            (folder / "inner" / text).write_text(text)
            assert names(target / "inner") == {"first"} if text == "second" else not target.exists()
    assert names(target / "inner") == {"second"}
    assert names(tmp_path) == {"model"}


def test_a_failure_leaves_what_was_there(tmp_path: Path, way: str) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").touch()

    def fail() -> None:
        with whole_folder(target) as folder:
            (folder / "new").touch()
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail()
    assert names(target) == {"old"}
    assert names(tmp_path) == {"model"}


def test_where_folders_cannot_be_swapped_the_old_one_stands_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, made = tmp_path / "model", tmp_path / "model.tmp"
    for folder, name in ((target, "old"), (made, "new")):
        folder.mkdir()
        (folder / name).touch()
    real, seen = atomic.os.replace, []

    def watched(source: Path, place: Path) -> None:
        seen.append(names(standing(target)))
        real(source, place)

    monkeypatch.setattr(atomic, "_swap", lambda first, second: False)
    monkeypatch.setattr(atomic.os, "replace", watched)
    put_in_place(made, target)
    assert seen == [{"old"}, {"old"}]
    assert names(standing(target)) == {"new"}


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    write_text(path, "a")
    write_text(path, "b")
    assert path.read_text() == "b"

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "c")
    assert path.read_text() == "b"
    assert names(tmp_path) == {"config.yaml"}


def test_a_folder_that_is_removed_does_not_count_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "step-1"
    folder.mkdir()
    (folder / "file").touch()
    seen = []
    real = atomic.shutil.rmtree
    monkeypatch.setattr(
        atomic.shutil, "rmtree", lambda path, **options: (seen.append(folder.exists()), real(path, **options))
    )
    remove_folder(folder)
    assert seen[-1] is False
    assert not names(tmp_path)
    remove_folder(folder)

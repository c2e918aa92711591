"""Files are whole or not there."""

import os

import pytest

from nnunet_lomix.files import building, replacing


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(file) as temporary:
        temporary.write_text("half of the n")
        raise KeyboardInterrupt
    assert [f.read_text() for f in tmp_path.iterdir()] == ["old"]
    with replacing(file) as temporary:
        temporary.write_text("new")
    assert [f.read_text() for f in tmp_path.iterdir()] == ["new"]


def test_what_a_killed_process_left_does_not_pile_up(tmp_path):
    file = tmp_path / "file"
    killed = replacing(file)
    killed.__enter__().write_text("half of a checkpoint")
    with replacing(file) as temporary:
        temporary.write_text("new")
    assert [f.read_text() for f in tmp_path.iterdir()] == ["new"]


def test_a_file_is_on_the_disk_before_it_takes_the_place_of_the_old_one(tmp_path, monkeypatch):
    calls = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append(("fsync", os.fstat(file).st_size)), sync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    with replacing(tmp_path / "file") as temporary:
        temporary.write_text("new")
    assert calls == [("fsync", 3), "replace"]


def test_a_folder_appears_once_it_is_whole(tmp_path):
    folder = tmp_path / "deep" / "folder"
    with pytest.raises(KeyboardInterrupt), building(folder) as made:
        (made / "file").touch()
        raise KeyboardInterrupt
    assert not list(folder.parent.iterdir())
    with building(folder) as made:
        (made / "file").touch()
        assert not folder.exists() and made.parent.name.startswith(".folder.")
    assert [*tmp_path.rglob("*")] == [folder.parent, folder, folder / "file"]
    with pytest.raises(OSError), building(folder) as made:
        (made / "other").touch()
    assert [*tmp_path.rglob("*")] == [folder.parent, folder, folder / "file"]
    (tmp_path / "other").mkdir()
    assert (
        folder.stat().st_mode == (tmp_path / "other").stat().st_mode
    )  # those of a temporary folder are closed to others

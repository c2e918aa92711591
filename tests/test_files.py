"""Files are whole or not there."""

import os

import pytest

from nnunet_lomix.files import replacing


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

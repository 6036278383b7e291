"""Files are written aside: nobody sees half of one, and nothing that was there is lost."""

import os
import stat
import threading
from pathlib import Path

import pytest

from atat_fast.errors import UsageError
from atat_fast.files import ASIDE, disk_errors, remove, remove_leftovers, replacing, replacing_folder, write_text


def write_half(place, error):
    with place as target:
        (target / "weights").write_text("half") if isinstance(target, Path) else target.write("half")
        raise error


def test_a_file_changes_when_all_of_it_is_written_and_not_before(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o640)
    with replacing(path) as stream:
        stream.write("new")
        stream.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new" and stat.S_IMODE(path.stat().st_mode) == 0o640
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            write_half(replacing(path), error)
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]


def test_a_new_file_has_the_usual_permissions(tmp_path):
    write_text(tmp_path / "new", "lone surrogate \ud800")
    (tmp_path / "usual").touch()
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert (tmp_path / "new").read_text() == "lone surrogate ?"


def test_links_are_followed_and_pipes_stay_pipes(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "file")
    for text in ("one", "two"):  # the first time it leads to nothing yet
        write_text(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "file").read_text() == text
    pipe, heard = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: heard.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "through")
    reader.join(10)
    assert heard == ["through"] and stat.S_ISFIFO(pipe.stat().st_mode)


def test_of_two_writers_the_last_one_to_end_stays_whole(tmp_path):
    path = tmp_path / "file"
    with replacing(path) as first:
        first.write("first " * 1000)
        write_text(path, "second " * 1000)
        first.write("end")
    assert path.read_text() == "first " * 1000 + "end" and os.listdir(tmp_path) == ["file"]


def test_a_folder_takes_its_place_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    for text in ("old", "new"):
        with replacing_folder(folder) as aside:
            (aside / "weights").write_text(text)
        assert (folder / "weights").read_text() == text
    (tmp_path / "usual").mkdir()
    assert folder.stat().st_mode == (tmp_path / "usual").stat().st_mode
    with pytest.raises(RuntimeError):
        write_half(replacing_folder(folder), RuntimeError)
    rename = os.rename

    def refuse(source, target):
        if str(target) == str(folder) and "other" in os.listdir(source):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    message = pytest.raises(UsageError, match=r"cannot write to .*model: Input/output error")
    with message, disk_errors(folder), replacing_folder(folder) as aside:
        (aside / "other").touch()
    assert (folder / "weights").read_text() == "new" and sorted(os.listdir(tmp_path)) == ["model", "usual"]


def test_what_a_killed_process_left_is_known_by_its_name(tmp_path, monkeypatch):
    for folder in ("step-3", f".step-1{ASIDE}"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "weights").touch()
    for name in ("kept", f".metrics.jsonl.x{ASIDE}"):
        (tmp_path / name).touch()
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda path, **_: None)  # killed at its beginning: the folder has its other name
        remove(tmp_path / "step-3")
    assert len(os.listdir(tmp_path)) == 4 and not (tmp_path / "step-3").exists()
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["kept"]
    remove(tmp_path / "kept")
    remove(tmp_path / "is not there")
    assert os.listdir(tmp_path) == []

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from disks import room_for

from lightning_compress.mechanisms.drafts import draft_of, remove_abandoned, write_whole

HOLDING = """
import sys
from pathlib import Path
from lightning_compress.mechanisms.drafts import draft_of
with draft_of(Path(sys.argv[1])) as draft:
    draft.write_text("half")
    print("written", flush=True)
    sys.stdin.read()
"""


@contextmanager
def killed_writer(target):
    """A process that writes a file, and is killed at the end of the context, unless it was before."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLDING, str(target)], **pipes) as process:
        assert process.stdout.readline() == "written\n"
        try:
            yield process
        finally:
            process.kill()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_file_takes_its_place_at_the_end(tmp_path):
    target = tmp_path / "file.txt"
    with draft_of(target) as draft:
        draft.write_text("new")
        assert (draft.name, target.exists()) == ("file.txt", False)
    assert (target.read_text(), names(tmp_path)) == ("new", ["file.txt"])


@pytest.mark.parametrize("content", ["größer\n", b"\x00\r\n"])
def test_text_and_bytes(content, tmp_path):
    write_whole(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == (content.encode() if isinstance(content, str) else content)


def test_an_error_in_between_leaves_the_old_file(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(TypeError), draft_of(tmp_path / "file") as draft:
        draft.write_text(draft.write_text("new"))
    assert ((tmp_path / "file").read_text(), names(tmp_path)) == ("old", ["file"])


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    with room_for(1000), pytest.raises(OSError, match="File too large") as raised:
        write_whole(target, "x" * 3000)
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(target))
    assert (target.read_text(), names(tmp_path)) == ("old", ["file"])


def test_an_error_about_another_file_stays_as_it_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="'elsewhere'"), draft_of(tmp_path / "file"):
        os.stat("elsewhere")
    assert names(tmp_path) == []


def test_an_error_that_is_not_of_a_disk_stays_as_it_is(tmp_path):
    def fail():
        raise OSError(errno.ETIMEDOUT, "timed out")

    with pytest.raises(OSError, match="timed out") as raised, draft_of(tmp_path / "file"):
        fail()
    assert raised.value.filename is None


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"No such file or directory: '{tmp_path}/none/file'"):
        write_whole(tmp_path / "none" / "file", "text")


@pytest.mark.parametrize("name", ["model.onnx", "m[0].onnx", "*"])
def test_what_a_killed_process_has_left_goes_with_the_next_write(name, tmp_path):
    target, other = tmp_path / name, tmp_path / "other"
    other.write_text("of somebody else")
    with killed_writer(target) as process:
        left = next(path for path in tmp_path.iterdir() if path != other)
        remove_abandoned(target)
        assert (left / name).read_text() == "half"  # it is being written
        process.kill()
        process.wait()
        assert not target.exists()
        write_whole(target, "whole")
    assert (target.read_text(), names(tmp_path)) == ("whole", sorted([name, "other"]))


def test_what_is_not_ours_stays(tmp_path):
    strangers = tmp_path / f".file-{'0' * 16}"
    strangers.mkdir()
    remove_abandoned(tmp_path / "file")
    assert names(tmp_path) == [strangers.name]


@pytest.mark.parametrize("held", [[], [f"lock-{'0' * 16}"]])
def test_what_was_left_before_it_was_locked_goes_after_a_day(held, tmp_path):
    left = tmp_path / f".file-{'0' * 16}"
    left.mkdir()
    for name in held:
        (left / name).touch()
    remove_abandoned(tmp_path / "file")
    assert names(tmp_path) == [left.name]  # it may be about to be locked
    yesterday = time.time() - 25 * 60 * 60
    os.utime(left, (yesterday, yesterday))
    remove_abandoned(tmp_path / "file")
    assert names(tmp_path) == []


def test_an_old_folder_of_that_name_with_files_is_not_ours_and_stays(tmp_path):
    strangers = tmp_path / f".file-{'0' * 16}"
    strangers.mkdir()
    (strangers / "file").touch()
    os.utime(strangers, (0, 0))
    remove_abandoned(tmp_path / "file")
    assert names(tmp_path) == [strangers.name]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_what_it_leads_to_is_written(there, tmp_path):
    (tmp_path / "real").mkdir()
    if there:
        (tmp_path / "real" / "file").write_text("old")
    link = tmp_path / "link"
    link.symlink_to("real/file")
    abandoned = tmp_path / "real" / f".file-{'0' * 16}"
    abandoned.mkdir()
    os.utime(abandoned, (0, 0))
    with draft_of(link) as draft:
        draft.write_text("new")
        assert draft.name == "link"
    assert link.is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "new"
    assert (names(tmp_path), names(tmp_path / "real")) == (["link", "real"], ["file"])


@pytest.mark.parametrize("linked", [False, True])
def test_a_pipe_is_not_replaced(linked, tmp_path):
    pipe = target = tmp_path / "pipe"
    os.mkfifo(pipe)
    if linked:
        target = tmp_path / "link"
        target.symlink_to(pipe)
    with pytest.raises(FileExistsError, match=f"a pipe, a device or the like, and no file: '{target}'"):
        write_whole(target, "text")
    assert pipe.is_fifo()


def test_a_folder_and_a_circle_of_links_are_not_replaced(tmp_path):
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(IsADirectoryError, match=f"'{tmp_path}'"):
        write_whole(tmp_path, "text")
    with pytest.raises(OSError, match=f"symbolic links: '{tmp_path}/circle'"):
        write_whole(tmp_path / "circle", "text")
    assert names(tmp_path) == ["circle"]


def test_without_locks_files_are_written_and_nothing_is_removed(tmp_path, monkeypatch):
    import fcntl

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with killed_writer(tmp_path / "file"):
        pass
    monkeypatch.setattr(fcntl, "flock", refuse)
    write_whole(tmp_path / "file", "text")
    assert (Path(tmp_path, "file").read_text(), len(names(tmp_path))) == ("text", 2)

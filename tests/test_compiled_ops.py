"""A lock that a killed compiler left behind stops nobody; one that is held is waited for, and never removed."""

import os
import threading
from pathlib import Path

import pytest

from core.faults import ProcessFault
from launch import compiled_ops


def lock_in(folder: Path) -> Path:
    lock = folder / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    return lock


def test_an_abandoned_lock_is_removed_and_said(tmp_path):
    lock = lock_in(tmp_path)
    os.close(os.open(lock, os.O_CREAT | os.O_EXCL))  # as the end of a process closes what it had open
    said: list[str] = []
    compiled_ops.wait_for_compilers(said.append, deadline_s=0, folder=tmp_path)
    assert not lock.exists()
    assert said == [f"removed {lock}: the process that compiled there is no more"]


def test_a_held_lock_is_waited_for(tmp_path):
    lock, said = lock_in(tmp_path), []
    fd = os.open(lock, os.O_CREAT | os.O_EXCL)
    waiting = threading.Event()

    def hear(line: str) -> None:
        said.append(line)
        waiting.set()

    def let_go() -> None:
        assert waiting.wait(60)
        os.close(fd)
        os.remove(lock)

    holder = threading.Thread(target=let_go)
    holder.start()
    compiled_ops.wait_for_compilers(hear, deadline_s=60, folder=tmp_path)
    holder.join(60)
    assert said == [f"waiting for another process that compiles in {lock.parent}"]


def test_a_lock_that_stays_held_is_named(tmp_path):
    lock = lock_in(tmp_path)
    fd = os.open(lock, os.O_CREAT | os.O_EXCL)
    try:
        with pytest.raises(ProcessFault, match=rf"{lock}: another process has been compiling there for 0 s; .*remove"):
            compiled_ops.wait_for_compilers(lambda line: None, deadline_s=0, folder=tmp_path)
        assert lock.exists()
    finally:
        os.close(fd)


def test_between_closing_and_removing_it_is_nobodys_to_remove(tmp_path, monkeypatch):
    """torch closes the file before it removes it, and fails where somebody else did."""
    lock = lock_in(tmp_path)
    os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
    monkeypatch.setattr(compiled_ops.time, "sleep", lambda seconds: os.remove(lock))  # the holder goes on meanwhile
    compiled_ops.wait_for_compilers(pytest.fail, deadline_s=60, folder=tmp_path)


def test_where_other_machines_compile_an_unseen_holder_has_its_time(tmp_path, monkeypatch):
    lock = lock_in(tmp_path)
    lock.touch()
    monkeypatch.setattr(compiled_ops, "LOCAL", set())
    with pytest.raises(ProcessFault):
        compiled_ops.wait_for_compilers(lambda line: None, deadline_s=0, folder=tmp_path)
    assert lock.exists()
    long_ago = lock.stat().st_mtime - compiled_ops.ELSEWHERE_S - 1
    for path in (lock, lock.parent):
        os.utime(path, (long_ago, long_ago))
    compiled_ops.wait_for_compilers(lambda line: None, deadline_s=0, folder=tmp_path)
    assert not lock.exists()


def test_the_folder_is_the_one_torch_compiles_in(monkeypatch, tmp_path):
    from torch.utils import cpp_extension

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = Path(cpp_extension._get_build_directory("one", verbose=False))
    assert built.parent.parent == compiled_ops.root()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "own"))
    assert Path(cpp_extension._get_build_directory("one", verbose=False)).parent == compiled_ops.root()

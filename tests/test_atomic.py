"""Files that are written whole or not at all."""

import contextlib
import os

import pytest

from covered_call import atomic


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", range(0, 14))
def test_a_kill_while_files_are_written_leaves_no_mixture(tmp_path, monkeypatch, step):
    """The first is the old or the new one at any moment; another is that one's, or is not there."""
    names = ("first", "second", "third")
    atomic.write_together(tmp_path, dict.fromkeys(names, "old") | {"fourth": "old"})
    calls = iter(range(100))

    def dying(function):
        def call(*arguments, **options):
            if next(calls) == step:
                raise Killed
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(atomic.os, "replace", dying(os.replace))
    monkeypatch.setattr(atomic.Path, "unlink", dying(atomic.Path.unlink))
    with contextlib.suppress(Killed):
        atomic.write_together(tmp_path, dict.fromkeys(names, "new"), old=["fourth"])
    monkeypatch.undo()
    there = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    assert there["first"] in ("old", "new") and set(there.values()) == {there["first"]}
    atomic.write_together(tmp_path, dict.fromkeys(names, "newer"), old=["fourth"])
    assert sorted(os.listdir(tmp_path)) == sorted(names)

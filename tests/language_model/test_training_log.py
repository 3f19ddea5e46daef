import os

from transformers.trainer_utils import sort_checkpoints


def test_checkpoints_of_one_moment_are_ordered_by_their_steps_without_a_word(tmp_path, caplog):
    sort_checkpoints.__globals__["logger"].warning_once.cache_clear()
    for step in (10, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
        os.utime(tmp_path / f"checkpoint-{step}", (0, 0))
    folders = sort_checkpoints(tmp_path, use_mtime=True)
    assert [os.path.basename(folder) for folder in folders] == ["checkpoint-9", "checkpoint-10"]
    assert not caplog.records

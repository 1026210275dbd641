"""Folders that appear whole or not at all, of one process at a time."""

import pytest

from internvlx_jax.core.files import new_folder


def test_a_folder_that_another_process_fills_is_not_emptied(tmp_path):
    path = tmp_path / "model"
    with new_folder(path) as first:
        (first / "half").write_text("written")
        taken = pytest.raises(FileExistsError, match="model is being written by another process")
        with taken, new_folder(path):
            pass
        assert (first / "half").read_text() == "written"
    assert [each.name for each in path.iterdir()] == ["half"]
    with pytest.raises(FileExistsError, match="model exists already"), new_folder(path):
        pass
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    left = tmp_path / "model.partial"
    (left / "old").mkdir(parents=True)
    (left / "file").write_text("half")
    with new_folder(tmp_path / "model") as folder:
        assert list(folder.iterdir()) == []
        (folder / "new").write_text("")
    assert [each.name for each in (tmp_path / "model").iterdir()] == ["new"]
    with pytest.raises(ValueError, match="of the block"), new_folder(tmp_path / "other"):
        raise ValueError("of the block")
    assert [each.name for each in tmp_path.iterdir()] == ["model"]

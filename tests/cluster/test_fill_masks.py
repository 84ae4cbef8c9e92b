"""`python -m cluster.fill_masks`: a mistake is one line. (tests/cluster/test_demo.py runs it on a real model.)"""

import pytest

from cluster.fill_masks import main


def test_a_folder_that_is_no_model_is_named(tmp_path, capsys):
    assert main([str(tmp_path), "A [MASK]."]) == 2
    assert (
        capsys.readouterr().err == f"error: {tmp_path}: no config.json; expected an exported model's folder\n"
    )


def test_help_and_missing_sentences_are_no_traceback(tmp_path, capsys):
    for arguments, status in ((["--help"], 0), ([], 2), ([str(tmp_path)], 2)):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == status
    assert "MODEL_DIR SENTENCE" in capsys.readouterr().out

"""Around training: devices and threads of a rank, what may go on, and failures in one line."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from data_prep.config_file import ConfigError
from sutrain.data import load_manifest
from sutrain.launch import (
    check_model_fits_data,
    environment,
    explain,
    hold_run_folder,
    local_device,
    stop,
)
from sutrain.models.configuration import EncoderConfig
from sutrain.supervise import hold_alone
from tests import warm
from tests.conftest import ROOT, ROW_TOKENS, VOCAB_SIZE
from tests.conftest import environment as shell


def test_determinism_is_asked_of_torch_and_cublas():
    """Where torch has no kernel of fixed order it fails and does not go on."""
    code = (
        "import os, torch; from sutrain.launch import local_device; local_device(True); "
        "x = torch.zeros(4); x.put_(torch.tensor([1, 1]), torch.ones(2)); "
        "print(torch.are_deterministic_algorithms_enabled(), os.environ['CUBLAS_WORKSPACE_CONFIG'])"
    )
    result = warm.run("-c", code)
    assert result.returncode == 1 and "put_" in result.stdout.splitlines()[-1], result.stdout
    result = warm.run("-c", code.replace("x.put_(torch.tensor([1, 1]), torch.ones(2)); ", ""))
    assert result.stdout == "True :4096:8\n"


def test_ranks_of_a_host_share_its_cores():
    """LOCAL_WORLD_SIZE is torchrun's word, LOCAL_SIZE that of DeepSpeed's launcher."""
    code = (
        "import os, torch; from sutrain.launch import local_device\n"
        "for name in ('LOCAL_WORLD_SIZE', 'LOCAL_SIZE'):\n"
        "    torch.set_num_threads(7); os.environ[name] = '2'; local_device(); del os.environ[name]\n"
        "    print(torch.get_num_threads())"
    )
    variables = {key: value for key, value in shell().items() if key != "OMP_NUM_THREADS"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True
    )
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert result.stdout == f"{share}\n{share}\n", result.stderr


def test_more_ranks_than_a_host_can_take_are_refused_on_every_rank(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_SIZE", "5000")
    with pytest.raises(ConfigError, match=r"5000 ranks on \d+ CPU cores; start with --num_gpus"):
        local_device()


def test_more_ranks_than_accelerators_are_refused_on_every_rank(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("LOCAL_SIZE", "4")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="4 ranks on this host but 2 accelerators: start with --num_gpus 2"):
        local_device()


def test_model_and_data_must_agree_on_vocabulary_rows_and_padding(dataset):
    manifest = load_manifest(dataset)
    check_model_fits_data(EncoderConfig(vocab_size=VOCAB_SIZE, max_row_tokens=ROW_TOKENS), manifest, dataset)
    with pytest.raises(ConfigError) as raised:
        check_model_fits_data(EncoderConfig(vocab_size=400, pad_token_id=1), manifest, dataset)
    lines = str(raised.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "model.vocab_size",
        "model.max_row_tokens",
        "model.pad_token_id",
    ]
    assert (
        f"set model.vocab_size={VOCAB_SIZE}" in lines[0]
        and f"set model.max_row_tokens={ROW_TOKENS}" in lines[1]
    )


def test_shuffled_text_is_no_data_to_train_on(dataset):
    """It has a vocabulary of 0, which is not to be set in the model."""
    manifest = load_manifest(dataset)
    text = replace(manifest, config=manifest.config | {"shards": {"content": "text"}}, vocab_size=0)
    with pytest.raises(
        ConfigError, match="holds shuffled text, not rows of tokens; prepare it with shards.content"
    ):
        check_model_fits_data(EncoderConfig(), text, dataset)


def test_the_first_ctrl_c_asks_to_stop_and_the_second_ends_at_once():
    code = (
        "import os, signal; from sutrain.launch import Requests\n"
        "for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):\n"
        "    asked = Requests(); asked.listen(); os.kill(os.getpid(), number)\n"
        "    print(asked.stop, asked.save, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGINT); print('too late')"
    )
    result = warm.run("-c", code)
    assert result.stdout.splitlines() == ["True False", "False True", "True False"]
    assert result.returncode == 128 + signal.SIGINT


@pytest.mark.parametrize("program", ["pretrain.py", "show_fragments.py"])
def test_help_is_that_of_the_program_asked(program):
    said = warm.run(f"sutrain/{program}", "--help").stdout
    assert f"deepspeed --num_gpus N sutrain/{program}" in said and "optimizer.learning_rate" in said
    assert ("which part of which tensor" in said) == (program == "show_fragments.py")


def test_a_run_folder_belongs_to_one_run_at_a_time(tmp_path):
    held = hold_run_folder(tmp_path / "run")
    code = "import pathlib, sys; from sutrain.launch import hold_run_folder as hold; hold(pathlib.Path(sys.argv[1]))"
    assert "another run is writing there" in warm.run("-c", code, tmp_path / "run").stdout
    held.close()
    assert warm.run("-c", code, tmp_path / "run").returncode == 0


def test_a_file_system_without_locks_is_named_with_the_way_out(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(ConfigError, match="run: its file system locks no files .* or choose another run_dir"):
        hold_run_folder(tmp_path / "run")
    with pytest.raises(ValueError, match="run: its file system locks no files .*; choose another run_dir"):
        hold_alone(tmp_path / "run")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), "no space left on the disk of /data/x"),
        (PermissionError(errno.EACCES, "Permission denied", "/runs"), "/runs: Permission denied"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            "lower batch.micro_sequences",
        ),
        (torch.OutOfMemoryError("CUDA out of memory"), "lower batch.micro_sequences"),
        (RuntimeError("The server socket has failed: EADDRINUSE"), "deepspeed --master_port PORT"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "nobody reads the output any more"),
        (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:2"), "another rank ended"),
    ],
)
def test_failures_of_the_machine_have_a_way_out(error, expected):
    assert expected in explain(error)


def test_a_defect_of_ours_keeps_its_traceback():
    assert explain(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


def test_the_environment_names_versions_and_machine():
    facts = environment(2)
    assert facts["packages"]["torch"].startswith("2.") and facts["world_size"] == 2 and facts["cores"] >= 1


@pytest.mark.parametrize(
    ("rank", "local_rank", "everywhere", "expected"),
    [
        (0, 0, False, "error: no data"),
        (8, 0, False, "error (rank 8 on HOST): no data"),  # the first of another host, whose files may differ
        (1, 1, False, ""),
        (1, 1, True, "error (rank 1 on HOST): no data"),
    ],
)
def test_an_error_is_said_once_a_host_or_by_whom_alone_it_meets(
    rank, local_rank, everywhere, expected, monkeypatch, capsys
):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    with pytest.raises(SystemExit) as ended:
        stop("no data", on_every_rank=everywhere)
    assert ended.value.code == 2
    assert capsys.readouterr().err.strip() == expected.replace("HOST", socket.gethostname())

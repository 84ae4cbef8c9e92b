import json

import torch

from benchmarks import optimizer as benchmark
from sutrain.models.configuration import EncoderConfig


def test_who_fails_in_an_update_is_left_out(monkeypatch, capsys):
    """Not only who cannot be built: DeepSpeed's CPUAdam takes a GPU's tensors and then no step."""

    def stumbling(parameters):
        adam = torch.optim.AdamW(parameters.values())
        adam.step = lambda: torch.zeros(2) + torch.zeros(3)
        return adam

    tiny = EncoderConfig(
        vocab_size=40, hidden_size=8, num_layers=1, num_heads=1, head_size=8, feed_forward_size=8
    )
    monkeypatch.setitem(benchmark.MODELS, "tiny", tiny)
    kept = {
        benchmark.OURS: benchmark.ours,
        benchmark.TORCH_ADAMW: benchmark.CONTENDERS[benchmark.TORCH_ADAMW],
    }
    monkeypatch.setattr(benchmark, "CONTENDERS", {**kept, "stumbling": stumbling})
    benchmark.one_process("tiny", 1, torch.device("cpu"))
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("stumbling: left out") for line in lines)
    seconds = json.loads(lines[-1])["seconds"]
    assert list(seconds) == list(kept)
    found = benchmark.paired("triton", seconds, benchmark.TORCH_ADAMW, None, own=benchmark.TRITON)
    assert found["value"] is None and benchmark.TRITON in found["note"]

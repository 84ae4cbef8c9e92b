import json

from benchmarks import attention_cpu
from sutrain.models import encoder
from sutrain.models.processor import bf16_units


def test_both_ways_of_both_questions_are_timed(tmp_path, capsys):
    attention_cpu.main(["--quick", "--rounds", "2", "--output", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    values = {result["name"]: result for result in found["results"]}
    kernels = {
        f"fused_vs_products_{way}_{t}_64" for way in ("kept", "again") for t in ("bfloat16", "float32")
    }
    layouts = {f"{mixer}_quick_{x}_64" for mixer in ("roformer", "gau") for x in ("packed", "padded")}
    assert set(values) == kernels | {f"documents_vs_rows_{layout}" for layout in layouts}
    assert all(result["value"] > 0 for result in values.values())
    assert found["instructions"] == bf16_units() and bf16_units() in capsys.readouterr().out


def test_rows_are_taken_apart_in_one_of_the_two_ways(monkeypatch):
    called = []
    for name in ("build_visibility", "build_visibility_of_documents"):
        build = getattr(encoder, name)
        monkeypatch.setattr(
            encoder, name, lambda *given, name=name, build=build: called.append(name) or build(*given)
        )
    (found,) = attention_cpu.rows_apart("quick", "roformer", "packed", 64, rounds=1)
    assert called.count("build_visibility") == called.count("build_visibility_of_documents") == 3
    assert found["name"] == "documents_vs_rows_roformer_quick_packed_64" and "counted: " in found["note"]

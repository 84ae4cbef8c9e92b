"""Several Ray nodes: the same bytes, also when one dies, and a node that does not see the storage is named."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from data_prep.errors import DataPrepError
from data_prep.storage import check_storage, look
from tests.data_prep.made import ROOT, content_files, settings

# Arguments: folder for Ray, what happens (nothing, kill, hidden), folder that the third node has for itself, then
# those of `python -m data_prep run`.
_SCRIPT = """
import os, subprocess, sys, threading, time
from pathlib import Path
from ray.cluster_utils import Cluster
from data_prep.__main__ import main

folder, what, hidden = sys.argv[1:4]
output = Path(hidden)
common = {"num_cpus": 1, "object_store_memory": 80_000_000}
cluster = Cluster(initialize_head=True, head_node_args={**common, "include_dashboard": False, "temp_dir": folder})
nodes = [cluster.add_node(**common)]
third = None
if what == "hidden":
    ray_here = Path(sys.executable).with_name("ray")
    start = f"mount -t tmpfs none {hidden} && exec {ray_here} start --address={cluster.address} --num-cpus=1 --block"
    third = subprocess.Popen(["unshare", "--mount", "bash", "-c", start + " --object-store-memory=80000000"],
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
else:
    nodes.append(cluster.add_node(**common))
os.environ["RAY_ADDRESS"] = cluster.address
import ray
ray.init(address=cluster.address, log_to_driver=False)
deadline = time.monotonic() + 120
while sum(node["Alive"] for node in ray.nodes()) < 3:
    assert time.monotonic() < deadline, "the third node did not come"
    time.sleep(0.2)

def kill():
    while not list(output.glob("out/.work/*/scatter/task-000000.json")):
        time.sleep(0.002)
    cluster.remove_node(nodes[-1], allow_graceful=False)
    print("a node is gone", flush=True)

if what == "kill":
    threading.Thread(target=kill, daemon=True).start()
code = main(["run", *sys.argv[4:], "--executor=ray"])
if third is not None:
    os.killpg(third.pid, 9)
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)  # Ray's own shutdown of a cluster with a dead node may wait for it
"""


def on_cluster(tmp_path: Path, corpus: Path, what: str) -> subprocess.CompletedProcess[str]:
    config = tmp_path / "config.yaml"
    place = tmp_path / "shared"
    place.mkdir()
    config.write_text(
        yaml.safe_dump(settings(place / "out", [corpus], resources={"task_bytes": 1, "workers": 3}))
    )
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-c", _SCRIPT, folder, what, str(place), "--config", str(config)]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["nothing", "kill"])
def test_three_nodes_give_the_same_bytes_also_when_one_dies(corpus, prepared, tmp_path, what, evidence):
    result = on_cluster(tmp_path, corpus, what)
    assert result.returncode == 0, result.stderr
    assert ("a node is gone" in result.stdout) == (what == "kill")
    assert content_files(tmp_path / "shared" / "out") == content_files(prepared)
    evidence(nodes=3, killed=int(what == "kill"), same_bytes=True)


@pytest.mark.slow
def test_a_node_with_a_disk_of_its_own_at_that_path_is_named(corpus, tmp_path):
    result = on_cluster(tmp_path, corpus, "hidden")
    assert result.returncode == 2, result.stderr
    assert "not every node of the cluster sees the data" in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("node ")]
    assert len(lines) == 1 and "does not see what the driver wrote to" in lines[0]
    assert not list((tmp_path / "shared").rglob("task-*")) and not list((tmp_path / "shared").rglob(".seen*"))


def test_what_a_node_does_not_see_is_told(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    source = tmp_path / "a.txt"
    source.write_text("text")

    def far_away(function, task):
        elsewhere = [other / token.name for token in task.tokens]
        elsewhere[1] = other / "work" / task.tokens[1].name
        elsewhere[1].parent.mkdir()
        elsewhere[1].write_text("of another run")
        changed = type(task)(tuple(elsewhere), task.word, (*task.inputs, str(tmp_path / "b.txt")))
        return [("near", look(task)), ("far", look(changed)), ("gone", "the worker died")]

    places = [tmp_path / "out", tmp_path / "work"]
    check_storage(lambda function, task: [("near", function(task))], places, [str(source)])
    with pytest.raises(DataPrepError) as told:
        check_storage(far_away, places, [str(source)])
    lines = str(told.value).splitlines()
    assert len(lines) == 3 and not any("near" in line for line in lines)
    assert f"does not see what the driver wrote to {other}" in lines[1]
    assert "another folder than the driver's" in lines[1] and f"cannot read {tmp_path / 'b.txt'}" in lines[1]
    assert lines[2] == "node gone: the worker died"
    assert not list((tmp_path / "out").iterdir()) and not list((tmp_path / "work").iterdir())

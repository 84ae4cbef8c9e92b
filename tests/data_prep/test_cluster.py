"""Several Ray nodes: the same bytes, also when one dies, and a node that does not see the storage is named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from data_prep import storage
from data_prep.config import PrepareConfig
from data_prep.errors import DataPrepError
from data_prep.executor import call
from data_prep.plan import make_plan
from data_prep.storage import StorageTask, look, refuse_blind_process, seen_by_every_node
from tests.data_prep.made import ROOT, content_files, make_texts, settings, write_jsonl

# Arguments: folder for Ray, what happens (nothing, kill, hidden, late: hidden, when the run is at work), folder that
# the third node has for itself, then those of `python -m data_prep run`.
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
third = []

def add_hidden():
    ray_here = Path(sys.executable).with_name("ray")
    start = f"mount -t tmpfs none {hidden} && exec {ray_here} start --address={cluster.address} --num-cpus=1 --block"
    third.append(subprocess.Popen(["unshare", "--mount", "bash", "-c", start + " --object-store-memory=80000000"],
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True))

if what == "hidden":
    add_hidden()
elif what != "late":
    nodes.append(cluster.add_node(**common))
os.environ["RAY_ADDRESS"] = cluster.address
import ray
ray.init(address=cluster.address, log_to_driver=False)
deadline = time.monotonic() + 120
while sum(node["Alive"] for node in ray.nodes()) < (2 if what == "late" else 3):
    assert time.monotonic() < deadline, "the third node did not come"
    time.sleep(0.2)

def when_a_task_is_done(act):
    while not list(output.glob("out/.work/*/scatter/task-000000.json")):
        time.sleep(0.002)
    act()

def kill():
    cluster.remove_node(nodes[-1], allow_graceful=False)
    print("a node is gone", flush=True)

acts = {"kill": kill, "late": add_hidden}
if what in acts:
    threading.Thread(target=when_a_task_is_done, args=(acts[what],), daemon=True).start()
code = main(["run", *sys.argv[4:], "--executor=ray"])
for process in third:
    os.killpg(process.pid, 9)
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)  # Ray's own shutdown of a cluster with a dead node may wait for it
"""


def on_cluster(tmp_path: Path, corpus: Path, what: str, **sections) -> subprocess.CompletedProcess[str]:
    config = tmp_path / "config.yaml"
    place = tmp_path / "shared"
    place.mkdir()
    resources = {"task_bytes": 1, "workers": 3}
    config.write_text(yaml.safe_dump(settings(place / "out", [corpus], resources=resources, **sections)))
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        # Where `Cluster` leaves its address: else in /tmp/ray, which need not be there, and which other programs read.
        Path(folder, "ray").mkdir()
        environment["RAY_TMPDIR"] = folder
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
    assert "not every node of the cluster sees what the driver sees" in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("node ")]
    assert len(lines) == 1 and "does not see what the driver wrote to" in lines[0]
    assert not list((tmp_path / "shared").rglob("task-*")) and not list((tmp_path / "shared").rglob(".seen*"))


@pytest.mark.slow
def test_a_node_that_joins_later_and_sees_another_disk_is_named_by_its_first_task(prepared, tmp_path):
    for number in range(80):  # so that there is work left when it comes, also on a machine that is busy
        write_jsonl(tmp_path / "raw" / f"{number:02d}.jsonl", make_texts(2000, seed=number))
    model = {"load": str(prepared / "tokenizer" / "tokenizer.model")}
    slowly = {"functions": ["tests.data_prep.functions:slowly"]}
    result = on_cluster(tmp_path, tmp_path / "raw", "late", tokenizer=model, cleaning=slowly)
    assert result.returncode == 2, result.stderr
    message = result.stderr.splitlines()[-1]
    assert (
        "which got a task, does not see what the driver sees (does not see what the driver wrote to"
        in message
    )
    assert "finished tasks are kept" in message and not list((tmp_path / "shared").rglob(".seen*"))


class Nodes:
    """A cluster whose nodes, by name, tell what they find, or see what they make of the task."""

    def __init__(self, **nodes) -> None:
        self.nodes, self.before = nodes, None

    def on_every_node(self, function, task):
        return [
            (name, node if isinstance(node, str) else function(node(task)))
            for name, node in self.nodes.items()
        ]


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    tree = settings(tmp_path / "out", [tmp_path / "a.txt"], work_dir=str(tmp_path / "work"))
    return make_plan(PrepareConfig.model_validate(tree))


def elsewhere(task: StorageTask, folder: Path) -> StorageTask:
    """The same on a node that has folders of its own, of which one holds the token of another run."""
    tokens = [folder / str(number) / token.name for number, token in enumerate(task.tokens)]
    for token in tokens[1:]:
        token.parent.mkdir(parents=True, exist_ok=True)
        token.write_text("of another run")
    other = {"sentencepiece": "0.0", "the code of data_prep": "0123"}
    tools = tuple((name, other.get(name, version)) for name, version in task.tools)
    return replace(task, tokens=tuple(tokens), inputs=(*task.inputs, str(folder / "b.txt")), tools=tools)


def test_what_a_node_does_not_see_or_has_otherwise_is_told(plan, tmp_path):
    near, far = (lambda task: task), (lambda task: elsewhere(task, tmp_path / "other"))
    with seen_by_every_node(Nodes(near=near), plan):
        assert len(list(tmp_path.rglob(".seen*"))) == 2
    with (
        pytest.raises(DataPrepError) as told,
        seen_by_every_node(Nodes(near=near, far=far, gone="the worker died"), plan),
    ):
        pass
    lines = str(told.value).splitlines()
    assert len(lines) == 3 and not any("near" in line for line in lines)
    assert f"does not see what the driver wrote to {tmp_path / 'other' / '0'}" in lines[1]
    assert (
        "another folder than the driver's" in lines[1]
        and f"cannot read {tmp_path / 'other' / 'b.txt'}" in lines[1]
    )
    assert f"has {version('sentencepiece')} for sentencepiece, the driver 0.0" in lines[1]
    assert "for the code of data_prep, the driver 0123" in lines[1]
    assert lines[2] == "node gone: the worker died"
    assert not list((tmp_path / "out").iterdir()) and not list(tmp_path.rglob("work/*/.seen*"))


def test_other_sources_are_another_code(tmp_path, monkeypatch):
    """What a worker has installed itself, where the driver is no job that brings the code."""
    for name in ("same", "other"):
        shutil.copytree(ROOT / "data_prep", tmp_path / name)
    with (tmp_path / "other/keys.py").open("a") as file:
        file.write("# another version\n")
    found = []
    for name in ("same", "other"):
        monkeypatch.setattr(storage, "__file__", str(tmp_path / name / "storage.py"))
        storage._own_code.cache_clear()
        found.append(dict(storage.tools_of("none", ()))["the code of data_prep"])
    monkeypatch.undo()
    storage._own_code.cache_clear()
    assert storage._own_code() == found[0] != found[1]


def test_a_process_that_does_not_see_the_storage_runs_no_task(plan, tmp_path):
    done = []
    cluster = Nodes(near=lambda task: task)
    with seen_by_every_node(cluster, plan):
        call(None, done.append, "here", None, cluster.before)
        (task,) = cluster.before.args
        for seen in (elsewhere(task, tmp_path / "other"), replace(task, functions=("not.there:f",))):
            with pytest.raises(DataPrepError, match="which got a task, does not see what the driver sees"):
                call(None, done.append, "elsewhere", None, partial(refuse_blind_process, seen))
    assert done == ["here"]
    assert look(task)["problems"], "the tokens are gone when the run has ended"

"""What belongs to a run on disk, and so may be removed: named files in OUTPUT, and a folder of its own for work.

Everything else is somebody's data and is never touched. OUTPUT is a run's own once plan.json lies there, the
first file written. In the work folder the run owns `.sutrain-<hash>` alone.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .config import DEFAULT_WORK, PrepareConfig
from .errors import AuditError, DataPrepError
from .files import TEMPORARY_MARK, check_fence, read_json, size_or_none, write_json
from .places import is_remote, place
from .plan import WORK_PREFIX, Plan, differences
from .publish import clear_far, refuse_strangers
from .shards import SPLITS, Manifest
from .storage import TOKEN

_FILES = (
    "manifest.json",
    "run.json",
    "token_counts.bin",
    "quarantine.jsonl",
    "progress.json",
    "metrics.prom",
    "tokenizer/tokenizer.model",
    "tokenizer/vocab.txt",
    "tokenizer/tokenizer.json",
)
SHARD = re.compile(r"shard-\d{6,}\.(tar|index\.json)|part-\d{6,}\.txt(\.zst)?")
_TEMPORARY = re.compile(re.escape(TEMPORARY_MARK) + "[0-9a-f]{12}$")
_WORK = re.compile(re.escape(WORK_PREFIX) + "[0-9a-f]{16}")


def adopt_plan(plan: Plan, fresh: bool, say: Callable[[str], None] = print) -> Plan:
    """Make OUTPUT that of this plan, or take up where an earlier run of the same plan stopped; `say` hears of finished
    tasks that are given up because they lie elsewhere.

    Raises DataPrepError when the folder holds what no run of ours wrote, and when the plans differ.
    """
    output, identity = plan.config.output_path, plan.identity
    path = output / "plan.json"
    saved = _saved_plan(path)
    refuse_strangers(plan.config.output_dir, saved)
    if saved is None:
        strangers = [path.name] if path.exists() else []
        ours = dict.fromkeys([*(name.split("/")[0] for name in _FILES), *SPLITS])
        strangers += [name for name in ours if (output / name).exists()]
        if strangers:
            raise DataPrepError(
                f"{output}: holds {', '.join(strangers)}, which no run of data_prep wrote; take another output_dir"
            )
    elif fresh or "identity" not in saved:
        clear(output, saved)
        saved = None
    if saved is not None:
        if saved["identity"].get("files") == identity["files"]:
            plan = plan.with_tasks(saved["tasks"])
        changed = differences(saved["identity"], identity)
        if changed and _is_worth_keeping(output, saved):
            raise DataPrepError(
                f"{output} was begun with other settings or input:\n" + "\n".join(changed) + "\n"
                "put them back to go on, give another output_dir, or start over with --fresh"
            )
        if changed:
            clear(output, saved)  # nothing was finished that the change could spoil
    if saved is None or saved != plan.to_json():
        if saved is not None and saved.get("work") != str(plan.work_path):
            if lost := _finished_tasks(saved):
                say(
                    f"pass 1 begins anew in {plan.work_path}: {lost:,} finished task(s) in {saved['work']} are removed"
                )
            _remove_work(saved)
        write_json(path, plan.to_json())
    return plan


def clear(output: Path, saved: dict[str, Any]) -> None:
    """Remove what runs wrote to OUTPUT, and the work folder that its plan names; a file that somebody else put
    there stays, and plan.json too, until it is written anew.

    Killed at any point, no data set that looks finished is left, and the next run goes on clearing.
    """
    check_fence()
    clear_far(saved.get("url") or "")
    (output / "manifest.json").unlink(missing_ok=True)
    write_json(output / "plan.json", {"clearing": True, "work": saved.get("work"), "url": saved.get("url")})
    _remove_work(saved)
    for name in _FILES:
        (output / name).unlink(missing_ok=True)
    for split in SPLITS:
        for path in _entries(output / split):
            if SHARD.fullmatch(path.name):
                path.unlink()
    remove_leftovers(output)
    for folder in ("tokenizer", *SPLITS, DEFAULT_WORK):
        _remove_if_empty(output / folder)


def remove_leftovers(output: Path, work: Path | None = None) -> None:
    """Remove the temporary files that a killed run left in OUTPUT, and in the folders of its work folder: a spill file
    that was being written may be as large as the memory of many workers, and nothing else would take it away before
    the end.
    """
    for folder in (output, output / "tokenizer", *(output / split for split in SPLITS)):
        inside = "" if folder == output else f"{folder.name}/"
        for path in _entries(folder):
            name = _TEMPORARY.sub("", path.name)
            ours = f"{inside}{name}" in (*_FILES, "plan.json", TOKEN) or (inside and SHARD.fullmatch(name))
            if name != path.name and ours:
                path.unlink(missing_ok=True)
    for path in (path for folder in _entries(work) for path in _entries(folder)) if work else ():
        if _TEMPORARY.search(path.name):
            path.unlink(missing_ok=True)


def remove_work(plan: Plan) -> None:
    """Remove the run's work folder, and OUTPUT/.work when nothing else lies in it."""
    _remove_work({"work": str(plan.work_path)})
    _remove_if_empty(plan.config.output_path / DEFAULT_WORK)


def finished(config: PrepareConfig) -> Manifest:
    """The manifest of a finished OUTPUT. Raises AuditError when a file is gone or has another size."""
    output = config.output_path
    manifest = Manifest.load(output)
    sizes = {f"{split}/{s.name}": s.file_bytes for split, e in manifest.splits.items() for s in e.shards}
    sizes[manifest.token_counts["file"]] = manifest.vocab_size * 8
    folder = place(config.output_dir) if is_remote(config.output_dir) else output
    damaged = [name for name, size in sizes.items() if size_or_none(folder / name) != size]
    if damaged:
        raise AuditError(
            f"{output}: was finished, but {damaged[0]} is gone or has another size"
            f"{f', and {len(damaged) - 1} more files' if damaged[1:] else ''}; see what is damaged with verify, "
            "put the files back, or start over with --fresh"
        )
    return manifest


def _saved_plan(path: Path) -> dict[str, Any] | None:
    """plan.json when it is one of ours (also of a clearing that was interrupted), else None."""
    if not path.exists():
        return None
    saved = read_json(path)
    if not isinstance(saved, dict) or not ({"identity", "tasks"} <= saved.keys() or "clearing" in saved):
        return None
    return saved


def _is_worth_keeping(output: Path, saved: dict[str, Any]) -> bool:
    """Is there anything that only `--fresh` may remove: a tokenizer, a data set, a finished task of pass 1 (of text
    that is moved as text it is the first thing to be finished)?
    """
    if any((output / name).exists() for name in ("tokenizer/tokenizer.json", "manifest.json")):
        return True
    return _finished_tasks(saved) > 0


def _finished_tasks(saved: dict[str, Any]) -> int:
    """Tasks of pass 1 that are done in the work folder of a saved plan."""
    work = _work_folder(saved)
    return 0 if work is None else sum(1 for _ in work.glob("scatter/task-*.json"))


def _work_folder(saved: dict[str, Any]) -> Path | None:
    """The folder for intermediate files that a saved plan names, where it is there and ours."""
    folder = Path(saved.get("work") or "")
    return folder if _WORK.fullmatch(folder.name) and folder.is_dir() else None


def _remove_work(saved: dict[str, Any]) -> None:
    check_fence()
    if (folder := _work_folder(saved)) is not None:
        shutil.rmtree(folder)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []

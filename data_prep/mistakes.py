"""What a run would fail of in the end, told before it does anything: by `plan`, and by `run` before it takes up, or
clears, its folder.
"""

from __future__ import annotations

from .adopt import load
from .errors import DataPrepError
from .estimate import refuse_too_little_memory
from .executor import RayExecutor
from .measure import machine_bytes
from .plan import Plan
from .publish import refuse_unreachable
from .readable import refuse_unreadable
from .sample import refuse_too_large_a_sample


def refuse_mistakes(plan: Plan, workers: int | None, fresh: bool = False) -> None:
    """Raises DataPrepError with every mistake, a line each: tokenizers and functions that cannot be loaded, corpora
    that give no text, an output out of reach, memory that does not suffice.

    workers: tasks at a time on this machine, None where a cluster runs them (see `refuse_too_small_a_cluster`).
    """
    config, trains, problems = plan.config, plan.trains_tokenizer(fresh), []

    def check_tokenizer() -> None:
        _ = plan.identity
        if config.tokenizer.load and config.shards.content == "tokens":
            load(config.tokenizer)

    def check_memory() -> None:
        if workers is not None:
            refuse_too_little_memory(plan, workers, trains, machine_bytes())

    def check_sample() -> None:
        if workers is not None and trains:
            refuse_too_large_a_sample(config.tokenizer.train, plan.least_sample_bytes)

    for check in (
        check_tokenizer,
        lambda: refuse_unreadable(plan),
        lambda: refuse_unreachable(config.output_dir),
        check_memory,
        check_sample,
    ):
        try:
            check()
        except DataPrepError as error:
            problems.append(str(error))
    if problems:
        raise DataPrepError("\n".join(problems))


def refuse_too_small_a_cluster(plan: Plan, executor: RayExecutor) -> None:
    """Raises DataPrepError when the memory that was given does not suffice for as many tasks as the cluster runs at a
    time, or the task that trains a tokenizer fits none of its nodes.
    """
    trains = plan.trains_tokenizer()
    refuse_too_little_memory(plan, executor.workers, trains)
    if trains:
        executor.await_room(plan.training_bytes())

"""Pretrain a model on prepared shards.

    deepspeed --num_gpus N sutrain/pretrain.py --config configs/pretrain/X.yaml [--section.key=value …]

The file reads top to bottom: set up, build, resume, train. A run continues from its newest intact checkpoint when
started again; SIGTERM and Ctrl-C make it save one and stop, SIGUSR1 save one and go on. B rows of a micro-batch,
L tokens a row.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

# Started by its path, as the deepspeed launcher does: import the package, not its folder.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist

from sutrain import checkpoint as checkpoints
from sutrain import continuity, heartbeat, precision, preflight
from sutrain.build_extension import build_extension, prepare_environment, start_communication
from sutrain.checkpoint_writer import CheckpointWriter, Keep, sweep
from sutrain.config import PretrainConfig, batch_plan, learning_rate_schedule
from sutrain.data import FINGERPRINT_MODULUS, Batch, open_manifest, open_samples
from sutrain.engine import DTYPES, build_engine, step_engine
from sutrain.evaluation import Evaluator
from sutrain.labelling import labelling_of
from sutrain.launch import (
    Requests,
    check_model_fits_data,
    clear_failures,
    join_alone,
    local_device,
    parse_arguments,
)
from sutrain.models.depth import describe
from sutrain.monitor.acting import NOTHING_REFUSED, BrokenStreak, StepGate
from sutrain.monitor.mfu import device_peak
from sutrain.monitor.probes import Probe
from sutrain.monitor.ranks import RankClock
from sutrain.optim import FragmentMap
from sutrain.outputs import RunOutputs
from sutrain.prefetch import prefetch


def main(arguments: list[str] | None = None) -> None:
    """Command line entry: one clear line and a non-zero exit for everything a user can mend."""
    config = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    run = None
    with clear_failures(lambda: run is not None and run.training):
        run = Run(config)
        run.train()


class Run:
    """One run on this rank: everything built in the constructor, the loop in `train`."""

    def __init__(self, config: PretrainConfig):
        prepare_environment()
        join_alone()
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.config = config
        self.device = local_device(config.determinism)
        self.manifest = open_manifest(config.data)
        self.plan = batch_plan(config, self.manifest.row_tokens, self.world_size, self.rank)
        check_model_fits_data(config.model, self.manifest, config.data.dir)
        labelling = labelling_of(config, self.manifest, stream="masks")
        self.samples = open_samples(config.data, config.seed, labelling)
        self.schedule = learning_rate_schedule(config)
        self.identity = continuity.identity(config, self.samples.manifests)

        self.save_now = self.training = False
        self.requests = Requests()
        self.requests.listen()
        self.lock = preflight.join(config, self.samples.manifests, self.device, self.rank, self.world_size)
        heartbeat.beat("building the extension", 0)
        build_extension()
        heartbeat.beat("building the engine", 0)
        start_communication("gloo" if self.device.type == "cpu" else None)
        self.peak = device_peak(self.device, DTYPES[config.precision])
        torch.manual_seed(config.seed)
        built = build_engine(config, self.plan, self.manifest.row_tokens, self.device)
        self.engine, self.optimizer, self.recomputation = built
        self.fragments = FragmentMap.from_engine(self.engine)
        self.optimizer.attach(self.fragments)
        self.evaluator = Evaluator(config, self.manifest, self.device, self.rank, self.world_size)

        kept = self.evaluator.samples.batch(0, min(config.monitor.probe_sequences, self.evaluator.sequences))
        inputs = kept.on(self.device)
        batch, types = (inputs["tokens_BL"], inputs["document_BL"]), inputs["token_types_BL"]
        often = (config.monitor.probe_every_steps, config.monitor.probe_share)
        self.probe = Probe(config.model, self.fragments, *batch, *often, types)
        self.gate = StepGate(config.acting.skip_sigmas, self.device)
        self.optimizer.gate = self.gate if self.gate.sigmas else None
        self.broken = BrokenStreak(config.acting.stop_after_broken_steps)
        self.clock = RankClock(self.rank, self.world_size, self.device, enabled=config.monitor.port > 0)
        self.steps_done = self.samples_consumed = self.tokens = self.skipped = 0
        self.saved_step, self.owed = 0, False
        """Step of the newest checkpoint; have the weights of `steps_done` yet to be evaluated?"""
        self.best_loss, self.other_basis, self.changes = float("inf"), False, list[str]()
        self.checkpoint_dir = config.run_dir / "checkpoints"
        keep = Keep(config.checkpoint.keep_last, config.checkpoint.keep_every_hours)
        self.writer = CheckpointWriter(self.checkpoint_dir, keep, self.rank, self.world_size)

    # ------------------------------------------------------------------------------------------------ resuming

    def resume(self) -> bool:
        """Load the newest intact checkpoint, else what init_from names; returns whether there was one."""
        heartbeat.beat("resuming", 0)
        if self.rank == 0:
            sweep(self.checkpoint_dir)
        agreed = checkpoints.agree_on_latest(self.checkpoint_dir, self.evaluator.basis, self.device)
        checkpoint, self.best_loss = agreed.checkpoint, agreed.best_loss
        for line in agreed.damaged:
            self.say(f"warning: damaged checkpoint passed over: {line}")
        if checkpoint is None:
            if self.config.init_from is not None:
                continuity.begin_from(self.config.init_from, self.fragments, self.device)
                self.say(f"a new run with the weights of {self.config.init_from}")
            return False
        self.changes = continuity.check(checkpoint.counters, self.identity, self.config.accept_changes)
        for line in self.changes:
            self.say(f"changed since the checkpoint: {line}")
        if self.rank == 0:
            checkpoints.set_aside(self.checkpoint_dir, checkpoint.step)
        for line in continuity.load_state(checkpoint, self.fragments, self.optimizer):
            self.say(line)
        counters = checkpoint.counters
        self.steps_done, self.samples_consumed = counters["steps"], counters["samples_consumed"]
        self.saved_step, self.owed = checkpoint.step, counters.get("evaluation_owed", False)
        self.tokens, self.skipped = counters["tokens"], counters["skipped"]
        self.gate.load(counters.get("gate", NOTHING_REFUSED))
        self.broken.without_update = self.skipped + self.gate.refused
        self.broken.length, self.broken.good_step = counters.get("broken_steps", 0), counters.get("good_step")
        self.other_basis = agreed.other_basis
        self.probe.interval.load(counters.get("probe", {}))
        return True

    def save(self, best: bool = False) -> None:
        """Write a checkpoint of this moment and drop old ones; every rank takes part."""
        state = self.optimizer.state_by_name()
        slices = [(checkpoints.MASTER, *piece) for piece in self.fragments.master_slices()]
        counters = {
            "steps": self.steps_done,
            "samples_consumed": self.samples_consumed,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "gate": self.gate.state(),
            "broken_steps": self.broken.length,
            "good_step": self.broken.good_step,
            "evaluation_owed": self.owed,
            "probe": self.probe.interval.state(),
            "optimizer": state.counters,
            **self.identity,
        }
        shapes = {name: list(shape) for name, shape in self.fragments.shapes.items()}
        heartbeat.beat("checkpoint", self.steps_done)
        self.writer.save(
            self.steps_done, slices + state.sliced, state.replicated, shapes, counters,
            best=(self.best_loss, self.evaluator.basis) if best else None,
        )  # fmt: skip
        self.saved_step = self.steps_done

    # ------------------------------------------------------------------------------------------------ training

    def train(self) -> None:
        """Resume, train to the last step, leave a checkpoint."""
        config = self.config
        resumed = self.resume()
        if self.steps_done >= config.steps + self.owed:
            self.say(f"{config.run_dir}: all {config.steps} steps are done already; raise `steps` to go on")
            return
        if self.rank == 0:
            shapes = self.optimizer.fragments.shapes  # of logical tensors
            facts: dict[str, Any] = {"world_size": self.world_size, "train_rows": self.samples.rows_per_epoch}
            facts["changes"], facts["totals_before"] = self.changes, self.totals()
            since = self.steps_done if resumed else None
            self.outputs = RunOutputs(
                config, self.manifest, shapes, self.peak, since, facts, self.clock.board, self.owed
            )
            self.writer.on_complete = self.outputs.checkpoint
        self.say(f"{describe(config.model)}\n{self.recomputation}\n{self.probe.interval.words()}")
        self.say(precision.remark(config.precision))
        self.say(self.evaluator.remark)
        begun = "resumed at" if resumed else "starting"
        self.say(f"{begun} step {self.steps_done} of {config.steps} in {config.run_dir}")
        self.training = True
        try:
            self.loop(resumed)
        except BaseException:
            with contextlib.suppress(Exception):  # what failed first is what is told
                self.close()
            raise
        self.close()

    def loop(self, resumed: bool) -> None:
        """Train from the position that the run has to its last step."""
        config = self.config
        if self.evaluate_first(resumed):
            return self.say_stopped()
        ahead = (config.steps - self.steps_done, config.data.prefetch_updates, config.data.workers)
        batches = prefetch(self.samples, self.plan, self.samples_consumed, *ahead)
        ended = started = time.perf_counter()
        self.clock.waiting(self.steps_done)
        for micro_batches in batches:
            waited = time.perf_counter() - started
            probing = self.probe.due(self.steps_done + 1)
            for model in filter(None, (self.engine.module, self.probe.model)):
                model.set_ramp(self.steps_done)
            if probing:
                self.probe.before()
                started = time.perf_counter() - waited  # a probe is no part of the step's time
            self.clock.forward(waited)
            record = self.step(micro_batches)
            ended = time.perf_counter()
            self.clock.finished(self.steps_done)
            if self.rank == 0:
                self.outputs.step(record, self.optimizer.statistics, ended - started, waited)
            if probing and (seen := self.probe.after()):
                self.outputs.probe(self.steps_done, seen)
            self.say(self.probe.finished(ended - started))
            self.broken.stop_after(record, self.outputs.dump if self.rank == 0 else None)
            last, stopping = self.steps_done == config.steps, bool(record["stop_requested"])
            self.owed = last or self.steps_done % config.evaluation.every_steps == 0
            broken_off = self.settle(stopping)
            self.writer.check()
            if broken_off or (stopping and not last):
                self.say_stopped()
                break
            heartbeat.beat("waiting for data", self.steps_done)
            started = time.perf_counter()
            self.clock.waiting(self.steps_done)
        if self.steps_done == config.steps and not self.owed:
            self.writer.wait()
            if self.rank == 0:
                self.outputs.finished()
        batches.close()

    def settle(self, stopping: bool = False) -> bool:
        """Evaluation, where it is owed, and checkpoint, as far as they are due now; whether a request to stop broke the
        evaluation off, behind a checkpoint."""
        best = False
        if self.owed:
            validation_loss = self.evaluate()
            if validation_loss is None:
                return True
            self.owed, best = False, validation_loss < self.best_loss
            self.best_loss = min(self.best_loss, validation_loss)
        due = self.steps_done % self.config.checkpoint.every_steps == 0
        if best or due or self.steps_done == self.config.steps or stopping or self.save_now:
            self.save(best)
        return False

    def evaluate_first(self, resumed: bool) -> bool:
        """What a start evaluates: new weights, those whose evaluation was broken off, and loaded ones where the best
        loss is one on another basis. Returns whether a request to stop broke it off."""
        if resumed and not self.other_basis:
            return self.owed and self.settle()
        validation_loss = self.evaluate()
        if validation_loss is None:
            return True
        if self.other_basis:  # the best checkpoint stays the best until something betters this
            self.best_loss = validation_loss
            if self.rank == 0:
                checkpoints.mark_to_better(self.checkpoint_dir, self.best_loss, self.evaluator.basis)
        if self.owed:
            self.owed = False
            self.save()
        return False

    def say_stopped(self) -> None:
        """The last line of a run that was asked to stop, when its checkpoint is on the disk, or has had its time."""
        whole = self.writer.wait(self.config.checkpoint.stop_within_seconds)
        kept = f"after step {self.steps_done} {'with' if whole else 'before the disk took'} a checkpoint"
        self.say(f"stopped {kept if self.steps_done else 'before the first step'}; start again to go on")

    def close(self) -> None:
        """Write what is still waiting; leave terminal, log and ports in order."""
        self.clock.close()
        if self.rank == 0:
            self.outputs.close()

    def step(self, micro_batches: list[Batch]) -> dict[str, float]:
        """One optimizer update over the global batch; returns its numbers, the same on every rank."""
        config, engine = self.config, self.engine
        mine = torch.tensor(
            [
                sum(batch.predicted_tokens for batch in micro_batches),
                sum(batch.tokens for batch in micro_batches),
                sum(batch.fingerprint for batch in micro_batches) % FINGERPRINT_MODULUS,
                int(self.requests.stop),
                int(save_requested := self.requests.save),
            ],
            device=self.device,
        )
        dist.all_reduce(mine)
        predicted, tokens, fingerprint, stop_requested, save_now = mine.tolist()
        self.save_now, self.requests.save = bool(save_now), self.requests.save and not save_requested
        sequences = self.plan.sequences_at(self.samples_consumed)
        learning_rate = config.optimizer.learning_rate * self.schedule(self.steps_done)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        # Dropout depends on the position and the rank alone, so a resumed run draws the same.
        torch.manual_seed(config.seed + 1_000_003 * self.samples_consumed + self.rank)

        self.gate.verdict = None  # the gate is not asked about a gradient that is not finite
        updates_before = self.optimizer.updates
        engine.train()
        loss_sum = torch.zeros((), device=self.device)
        for number, batch in enumerate(micro_batches, 1):
            heartbeat.beat("training step", self.steps_done)
            engine.set_gradient_accumulation_boundary(number == len(micro_batches))
            tensors = batch.on(self.device)
            with self.clock.passing():
                result = engine(**tensors)
            # The engine averages gradients over ranks; with this factor their sum is the gradient of the mean over
            # all predicted tokens of the global batch.
            loss_sum += result.loss_sum.detach()
            if number == len(micro_batches):
                self.clock.update()
                dist.all_reduce(loss_sum)
                self.gate.loss = loss_sum / max(predicted, 1)
            engine.backward(result.loss_sum * (self.world_size / max(predicted, 1)), scale_wrt_gas=False)
            step_engine(engine)

        self.samples_consumed += sequences
        self.steps_done += 1
        # An update that is not finite is dropped, by engine or optimizer; its samples are consumed all the same.
        applied = self.optimizer.updates != updates_before
        if not applied:
            self.skipped += self.gate.verdict is None
            self.optimizer.statistics.fill_(torch.nan)
        self.tokens += tokens
        return self.gate.as_record(self.samples_consumed, sequences) | {
            "step": self.steps_done,
            **self.totals(),
            "step_tokens": tokens,
            "row_tokens": self.plan.tokens_at(self.samples_consumed - sequences) or self.manifest.row_tokens,
            "loss": loss_sum.item() / max(predicted, 1),
            "learning_rate": learning_rate,
            "loss_scale": self.fragments.loss_scale,
            "batch_fingerprint": f"{fingerprint % FINGERPRINT_MODULUS:012x}",
            "stop_requested": stop_requested,
        }

    def totals(self) -> dict[str, int]:
        """What the run has counted so far."""
        return {
            "samples_consumed_total": self.samples_consumed,
            "tokens_total": self.tokens,
            "skipped_steps_total": self.skipped,
            "refused_steps_total": self.gate.refused,
        }

    def evaluate(self) -> float | None:
        """Held-out loss and accuracy, logged; the loss is the same on every rank. None where a request to stop broke it
        off."""
        self.engine.module.set_ramp(self.steps_done)
        result = self.evaluator(self.engine.module, self.steps_done, self.heed)
        if result is None:
            return None
        if self.rank == 0:
            self.outputs.evaluation(result)
        return result["validation_loss"]

    def heed(self) -> bool:
        """Within an evaluation: say that the run is alive, and do what a signal asks for, on all ranks together. The
        checkpoint does not wait for the end: it says that the evaluation is owed. Returns whether to stop here."""
        self.clock.alive()
        if self.rank == 0:
            self.outputs.heartbeat()
        asked = torch.tensor(
            [self.requests.stop, self.requests.save or self.save_now], device=self.device
        ).int()
        dist.all_reduce(asked)
        stop, save = asked.tolist()
        if (stop or save) and self.saved_step != self.steps_done:
            self.save_now = self.requests.save = False
            self.save()
        return bool(stop)

    def say(self, text: str) -> None:
        if self.rank == 0 and text:
            print(text, flush=True)


if __name__ == "__main__":
    main()

"""Pretrain an encoder on prepared shards.

    deepspeed --num_gpus N sutrain/pretrain.py --config configs/pretrain/X.yaml [--section.key=value …]

The file reads top to bottom: set up, build, resume, train. A run continues from its newest intact checkpoint when
started again; SIGTERM makes it save one and stop. B rows of a micro-batch, L tokens a row.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

if __package__ in (
    None,
    "",
):  # started by its path, as the deepspeed launcher does: import the package, not its folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist

from data_prep.config_file import ConfigError, field_help, load_config, split_arguments
from sutrain import checkpoint as checkpoints
from sutrain.build_extension import ExtensionError, build_extension, prepare_environment
from sutrain.config import PretrainConfig, batch_plan, deepspeed_config, learning_rate_schedule
from sutrain.data import FINGERPRINT_MODULUS, Batch, Samples, load_manifest, prefetch, word_masking
from sutrain.evaluation import Evaluator
from sutrain.launch import (
    check_model_fits_data,
    check_same_run,
    explain,
    hold_run_folder,
    join_alone,
    local_device,
    stop,
)
from sutrain.models.masked_lm import MaskedLanguageModel
from sutrain.monitor.mfu import device_peak
from sutrain.monitor.probes import Probe
from sutrain.objectives.masked_lm import masked_lm_loss
from sutrain.optim import FragmentMap, build_optimizer
from sutrain.outputs import RunOutputs


def main(arguments: list[str] | None = None) -> None:
    """Command line entry: one clear line and a non-zero exit for everything a user can mend."""
    config = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    run = None
    try:
        run = Run(config)
        run.train()
    except (ValueError, ExtensionError) as error:
        # Before training every rank finds the same mistake and one line says it; later it may be one rank's alone.
        stop(str(error), on_every_rank=run is not None and run.training)
    except (MemoryError, OSError, RuntimeError) as error:
        advice = explain(error)
        if advice is None:
            raise
        stop(advice, on_every_rank=True)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class Run:
    """One run on this rank: everything built in the constructor, the loop in `train`."""

    def __init__(self, config: PretrainConfig):
        prepare_environment()
        join_alone()
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.config = config
        self.device = local_device()
        self.manifest = load_manifest(config.data.dir)
        self.plan = batch_plan(config, self.manifest.row_tokens, self.world_size, self.rank)
        check_model_fits_data(config.model, self.manifest, config.data.dir)
        masking = word_masking(self.manifest, config.masking, config.seed, stream="masks")
        self.samples = Samples(config.data.dir, "train", config.seed, masking)
        self.schedule = learning_rate_schedule(config)

        build_extension()
        import deepspeed  # after the environment is prepared: it reads it while importing

        deepspeed.utils.logger.setLevel("ERROR")
        # DeepSpeed calls functions that torch renames; once a step and rank is too often to hear of it.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        with contextlib.redirect_stdout(None):  # what it prints has no switch
            deepspeed.init_distributed(dist_backend="gloo" if self.device.type == "cpu" else None)
        self.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.peak = device_peak(self.device, self.dtype)
        torch.manual_seed(config.seed)
        model = MaskedLanguageModel(config.model)
        self.optimizer = build_optimizer(
            config.optimizer.name, model.named_parameters(), **config.optimizer.arguments()
        )
        engine_config = deepspeed_config(config, self.plan)
        with contextlib.redirect_stdout(None):
            self.engine, *_ = deepspeed.initialize(
                model=model, optimizer=self.optimizer, config=engine_config, dist_init_required=False
            )
        self.fragments = FragmentMap.from_engine(self.engine)
        self.optimizer.attach(self.fragments)
        self.evaluator = Evaluator(config, self.manifest, self.device, self.rank, self.world_size)

        kept = self.evaluator.samples.batch(0, min(config.monitor.probe_sequences, self.evaluator.sequences))
        batch = (kept.inputs_NL.to(self.device), kept.document_NL.to(self.device))
        self.probe = Probe(config.model, self.fragments, config.monitor.probe_every_steps, *batch)
        self.steps_done = self.samples_consumed = self.tokens = self.skipped = 0
        self.best_loss = float("inf")
        self.stop_requested = self.training = False
        self.checkpoint_dir = config.run_dir / "checkpoints"

    # ------------------------------------------------------------------------------------------------ resuming

    def resume(self) -> bool:
        """Load the newest intact checkpoint of the run folder; returns whether there was one."""
        if self.rank == 0:
            self.lock = hold_run_folder(self.config.run_dir)
        agreed = checkpoints.agree_on_latest(self.checkpoint_dir, self.evaluator.basis, self.device)
        checkpoint, self.best_loss, damaged = agreed
        for line in damaged:
            self.say(f"warning: damaged checkpoint passed over: {line}")
        if checkpoint is None:
            return False
        check_same_run(checkpoint.counters, self.identity())
        if self.rank == 0:
            checkpoints.set_aside(self.checkpoint_dir, checkpoint.step)
        for piece in self.fragments.fragments:
            piece.values().copy_(checkpoint.read(checkpoints.MASTER, piece.name, piece.offset, piece.length))
        self.fragments.refresh_model_weights()
        counters = checkpoint.counters
        self.optimizer.load_state_by_name(checkpoint.replicated(), counters["optimizer"], checkpoint.read)
        self.steps_done, self.samples_consumed = counters["steps"], counters["samples_consumed"]
        self.tokens, self.skipped = counters["tokens"], counters["skipped"]
        return True

    def save(self, best: bool = False) -> None:
        """Write a checkpoint of this moment and drop old ones; every rank takes part."""
        state = self.optimizer.state_by_name()
        slices = [(checkpoints.MASTER, *piece) for piece in self.fragments.master_slices()] + list(
            state.sliced
        )
        counters = {
            "steps": self.steps_done,
            "samples_consumed": self.samples_consumed,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "optimizer": state.counters,
            **self.identity(),
        }
        shapes = {name: list(shape) for name, shape in self.fragments.shapes.items()}
        checkpoints.save_checkpoint(
            self.checkpoint_dir, self.steps_done, slices, state.replicated, shapes, counters
        )
        if self.rank == 0:
            if best:  # marked before pruning, which keeps it
                checkpoints.mark_best(
                    self.checkpoint_dir, self.steps_done, self.best_loss, self.evaluator.basis
                )
            checkpoints.prune(self.checkpoint_dir, self.config.checkpoint.keep_last)
            self.outputs.heartbeat()

    def identity(self) -> dict[str, Any]:
        """What must not change between a checkpoint and the run that goes on from it."""
        return {
            "data_content_hash": self.manifest.content_hash,
            "seed": self.config.seed,
            "model": json.loads(json.dumps(vars(self.config.model))),
            "masking": self.config.masking.model_dump(mode="json"),
            "optimizer_name": self.config.optimizer.name,
        }

    # ------------------------------------------------------------------------------------------------ training

    def train(self) -> None:
        """Resume, train to the last step, leave a checkpoint."""
        config = self.config
        resumed = self.resume()
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stop_requested", True))
        if self.steps_done >= config.steps:
            self.say(f"{config.run_dir}: all {config.steps} steps are done already; raise `steps` to go on")
            return
        if self.rank == 0:
            self.outputs = self.open_outputs(resumed)
        self.say(
            f"{'resumed at' if resumed else 'starting'} step {self.steps_done} of {config.steps} in {config.run_dir}"
        )
        self.training = True
        if not resumed:
            self.evaluate()
        remaining = config.steps - self.steps_done
        batches = prefetch(
            self.samples, self.plan, self.samples_consumed, remaining, config.data.prefetch_updates
        )
        ended = started = time.perf_counter()
        for micro_batches in batches:
            waited = time.perf_counter() - started
            probing = self.probe.due(self.steps_done + 1)
            if probing:
                self.probe.before()
                started = time.perf_counter() - waited  # a probe is no part of the step's time
            record = self.step(micro_batches)
            ended = time.perf_counter()
            if self.rank == 0:
                self.outputs.step(record, self.optimizer.statistics, ended - started, waited)
            if probing and (seen := self.probe.after()):
                self.outputs.probe(self.steps_done, seen)
            last, stopping = self.steps_done == config.steps, bool(record["stop_requested"])
            best = False
            if last or self.steps_done % config.evaluation.every_steps == 0:
                validation_loss = self.evaluate()
                best = validation_loss < self.best_loss
                self.best_loss = min(self.best_loss, validation_loss)
            if best or last or stopping or self.steps_done % config.checkpoint.every_steps == 0:
                self.save(best)
            if stopping and not last:
                self.say(f"stopped after step {self.steps_done} with a checkpoint; start again to go on")
                break
            started = time.perf_counter()
        batches.close()
        if self.rank == 0:
            self.outputs.close()

    def step(self, micro_batches: list[Batch]) -> dict[str, float]:
        """One optimizer update over the global batch; returns its numbers, the same on every rank."""
        config, engine = self.config, self.engine
        mine = torch.tensor(
            [
                sum(batch.predicted_tokens for batch in micro_batches),
                sum(int((batch.document_NL > 0).sum()) for batch in micro_batches),
                sum(batch.fingerprint for batch in micro_batches) % FINGERPRINT_MODULUS,
                int(self.stop_requested),
            ],
            device=self.device,
        )
        dist.all_reduce(mine)
        predicted, tokens, fingerprint, stop_requested = mine.tolist()
        learning_rate = config.optimizer.learning_rate * self.schedule(self.steps_done)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        # Dropout depends on the position and the rank alone, so a resumed run draws the same.
        torch.manual_seed(config.seed + 1_000_003 * self.samples_consumed + self.rank)

        updates_before = self.optimizer.updates
        engine.train()
        loss_sum = torch.zeros((), device=self.device)
        for batch in micro_batches:
            tensors = (batch.inputs_NL, batch.labels_NL, batch.hidden_NL, batch.document_NL)
            result = masked_lm_loss(engine, engine.module.logits, *(t.to(self.device) for t in tensors))
            # The engine averages gradients over ranks; with this factor their sum is the gradient of the mean over
            # all predicted tokens of the global batch.
            engine.backward(result.loss_sum * (self.world_size / max(predicted, 1)), scale_wrt_gas=False)
            engine.step()
            loss_sum += result.loss_sum.detach()
        dist.all_reduce(loss_sum)

        self.samples_consumed += self.plan.global_sequences
        self.steps_done += 1
        # An update that is not finite is dropped, by engine or optimizer; its samples are consumed all the same.
        if self.optimizer.updates == updates_before:
            self.skipped += 1
            self.optimizer.statistics.fill_(torch.nan)
        self.tokens += tokens
        return {
            "step": self.steps_done,
            "samples_consumed_total": self.samples_consumed,
            "tokens_total": self.tokens,
            "step_tokens": tokens,
            "loss": loss_sum.item() / max(predicted, 1),
            "learning_rate": learning_rate,
            "batch_fingerprint": f"{fingerprint % FINGERPRINT_MODULUS:012x}",
            "skipped_steps_total": self.skipped,
            "stop_requested": stop_requested,
        }

    def evaluate(self) -> float:
        """Held-out loss and accuracy, logged; the loss is the same on every rank."""
        result = self.evaluator(self.engine.module, self.steps_done)
        if self.rank == 0:
            self.outputs.evaluation(result)
        return result["validation_loss"]

    def open_outputs(self, resumed: bool) -> RunOutputs:
        """What rank 0 writes and shows: run folder, metrics, endpoint, terminal."""
        shapes = {name: self.fragments.shapes[name] for name in self.optimizer.tensor_names}
        facts = {
            "world_size": self.world_size,
            "total_steps": self.config.steps,
            "parameters": sum(shape.numel() for shape in shapes.values()),
            "row_tokens": self.manifest.row_tokens,
            "train_rows": self.samples.rows_per_epoch,
        }
        return RunOutputs(self.config, shapes, self.peak, self.steps_done if resumed else None, facts)

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)


def parse_arguments(arguments: list[str]) -> PretrainConfig:
    """The configuration a command line asks for; exits with one line a mistake when it is wrong."""
    overrides, rest = split_arguments(arguments, PretrainConfig)
    parser = argparse.ArgumentParser(
        prog="deepspeed --num_gpus N sutrain/pretrain.py",
        description="Pretrain an encoder on prepared shards. Started again, a run goes on from its last checkpoint.",
        epilog="every key of the configuration can be set with --section.key=value:\n"
        + field_help(PretrainConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", required=True, type=Path, help="YAML file, such as configs/pretrain/demo.yaml"
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher passes it
    options = parser.parse_args(rest)
    try:
        return load_config(PretrainConfig, options.config, overrides)
    except ConfigError as error:
        stop(str(error))


if __name__ == "__main__":
    main()

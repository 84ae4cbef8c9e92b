"""pretrain.py with one slow rank, as a hot device or a busy neighbour makes it: SLOW="RANK FROM_STEP SECONDS", told by
the environment, makes every forward pass of that rank take so much longer once it has made FROM_STEP updates."""

import os
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from sutrain import pretrain  # noqa: E402
from sutrain.objectives.training_model import TrainingModel  # noqa: E402

rank, from_step, seconds = os.environ["SLOW"].split()


class SlowRun(pretrain.Run):
    def step(self, micro_batches):
        SlowRun.steps = self.steps_done
        return super().step(micro_batches)


def forward(self, *arguments, **settings):
    if int(os.environ["RANK"]) == int(rank) and self.training and SlowRun.steps >= int(from_step):
        time.sleep(float(seconds))
    return original(self, *arguments, **settings)


original, TrainingModel.forward = TrainingModel.forward, forward
pretrain.Run = SlowRun
pretrain.main()

"""Print which part of which tensor every rank owns, as the optimizer of a run will see it.

    deepspeed --num_gpus N sutrain/show_fragments.py --config configs/pretrain/X.yaml [--section.key=value …]

The engine is built as for training, so the map is the real one, and it has been proved element by element; nothing is
trained. A table for each rank: tensor, shape, elements owned, and where they begin in the rank's flat fp32 slice.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # started by its path, as the deepspeed launcher does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch.distributed as dist

from sutrain.launch import parse_arguments, stop
from sutrain.pretrain import Run


def main(arguments: list[str] | None = None) -> None:
    """One clear line and a non-zero exit where the engine cannot be mapped."""
    given = sys.argv[1:] if arguments is None else arguments
    config = parse_arguments(given, "show_fragments.py", (__doc__ or "").split("\n\n")[0])
    try:
        run = Run(config)
    except ValueError as error:
        stop(str(error))
    for rank in range(run.world_size):
        if rank == run.rank:
            print(run.optimizer.fragments.describe(), flush=True)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

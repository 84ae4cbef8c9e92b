"""Optimizers whose statistics are those of whole tensors, on DeepSpeed's flat slices. See
docs/optimizers.md."""

from .base import FragmentOptimizer
from .build import OPTIMIZERS, build_optimizer
from .columns import STATISTICS
from .engines import DEEPSPEED_VERSION, check_deepspeed_version
from .fragments import Fragment, FragmentError, FragmentMap
from .schedule import Schedule, ScheduleError, build_schedule
from .state import OptimizerState, StateError

__all__ = [
    "DEEPSPEED_VERSION",
    "OPTIMIZERS",
    "STATISTICS",
    "Fragment",
    "FragmentError",
    "FragmentMap",
    "FragmentOptimizer",
    "OptimizerState",
    "Schedule",
    "ScheduleError",
    "StateError",
    "build_optimizer",
    "build_schedule",
    "check_deepspeed_version",
]

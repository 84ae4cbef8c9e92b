import pytest
import torch

from tests.models.tiny import CONFIGS


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # small tensors; more threads only wait for each other


@pytest.fixture(params=list(CONFIGS))
def config(request):
    return CONFIGS[request.param]

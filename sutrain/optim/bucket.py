"""Named vectors in one flat tensor, so that one all-reduce sums them all."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor


class Bucket:
    """`bucket[key]` is a view of the shape given for the key; `bucket.flat` is everything, fp32."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: torch.device):
        sizes = [prod(shape) for shape in shapes.values()]
        self.flat = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
        parts = self.flat.split(sizes)
        self._views = {
            key: part.view(shape) for (key, shape), part in zip(shapes.items(), parts, strict=True)
        }

    def __getitem__(self, key: str) -> Tensor:
        return self._views[key]

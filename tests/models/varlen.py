"""What torch's varlen attention computes, on any device: it has no CPU kernel of its own."""

import torch
from torch.nn import functional as F


def varlen_in_torch(query_THK, key_THK, value_THE, boundaries):
    """Document by document between the boundaries."""
    spans = list(zip(boundaries[:-1].tolist(), boundaries[1:].tolist(), strict=True))
    parts = [[x[a:b].transpose(0, 1) for x in (query_THK, key_THK, value_THE)] for a, b in spans]
    return torch.cat([F.scaled_dot_product_attention(*part).transpose(0, 1) for part in parts])

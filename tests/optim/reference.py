"""The optimizers as their papers have them, on whole tensors in float64, without a word about ranks or
slices."""

import numpy as np

from tests.optim.problem import LEARNING_RATE, OPTIMIZERS, PER_TENSOR, SHAPES, mean_gradient, start

NAN = float("nan")


def run(case: str, steps: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[dict[str, dict]]]:
    """(weights, state by "key|name", statistics by step and tensor) after `steps` updates of an OPTIMIZERS
    case."""
    kind, settings = OPTIMIZERS[case]
    weights = {name: start(name) for name in SHAPES}
    state: dict[str, np.ndarray] = {}
    history = []
    for step in range(1, steps + 1):
        gradients = {name: mean_gradient(step, name) for name in SHAPES}
        raw = {name: float((g**2).sum()) for name, g in gradients.items()}
        limit, norm = settings.get("clip_global_norm"), np.sqrt(sum(raw.values()))
        if limit is not None and norm > limit:
            gradients = {name: g * limit / (norm + 1e-6) for name, g in gradients.items()}
        statistics = {}
        for name, theta in weights.items():
            own = {"learning_rate_scale": 1.0, "weight_decay": settings["weight_decay"], "adapt": True}
            own |= PER_TENSOR.get(name, {})
            lr = LEARNING_RATE * own["learning_rate_scale"]
            new, extra = RULES[kind](theta, gradients[name], name, step, lr, own, settings, state)
            statistics[name] = {
                "weight_square_sum": (theta**2).sum(),
                "grad_square_sum": raw[name],
                "clipped_grad_square_sum": (gradients[name] ** 2).sum(),
                "update_square_sum": ((new - theta) ** 2).sum(),
                "numel": theta.size,
                "update_rms": NAN,
                "clip_factor": NAN,
                "trust_ratio": NAN,
                "guard_factor": NAN,
            } | extra
            weights[name] = new
        history.append(statistics)
    return weights, state, history


def adafactor(theta, g, name, t, lr, own, settings, state):
    """arXiv 1804.04235, algorithms 4 and 6, with the sums of the paper."""
    beta = 1 - t**-0.8
    squared = g**2 + 1e-30
    pair = _pair(theta.shape, settings)
    if pair is None:
        v = state[f"second_moment|{name}"] = (
            beta * state.get(f"second_moment|{name}", 0) + (1 - beta) * squared
        )
    else:
        row, column = pair
        r = beta * state.get(f"R|{name}", 0) + (1 - beta) * squared.sum(column, keepdims=True)
        c = beta * state.get(f"C|{name}", 0) + (1 - beta) * squared.sum(row, keepdims=True)
        state[f"R|{name}"], state[f"C|{name}"] = r, c
        state[f"row_mean|{name}"], state[f"column_mean|{name}"] = (
            r / theta.shape[column],
            c / theta.shape[row],
        )
        v = r * c / r.sum(row, keepdims=True)
    u = g / np.sqrt(v)
    rms = np.sqrt((u**2).mean())
    clip = 1 / max(1.0, rms / 1.0)
    u = u * clip
    if settings.get("momentum"):
        u = 0.9 * state.get(f"momentum|{name}", 0) + 0.1 * u
        state[f"momentum|{name}"] = u
    rho = lr * min(0.01, 1 / np.sqrt(t)) if settings.get("relative_step") else lr
    alpha = rho * (max(1e-3, np.sqrt((theta**2).mean())) if own["adapt"] else 1.0)
    return theta - alpha * u - rho * own["weight_decay"] * theta, {"update_rms": rms, "clip_factor": clip}


def _pair(shape, settings):
    if len(shape) < 2:
        return None
    if settings.get("factored_dimensions") == "largest":
        pair = tuple(sorted(np.argsort(shape, kind="stable")[-2:]))
    else:
        pair = (len(shape) - 2, len(shape) - 1)
    return pair if min(shape[d] for d in pair) >= settings.get("min_dim_size_to_factor", 0) else None


def lamb(theta, g, name, t, lr, own, settings, state):
    """kexue.fm/archives/8998: no bias correction, no limits."""
    m = state[f"first_moment|{name}"] = 0.9 * state.get(f"first_moment|{name}", 0) + 0.1 * g
    v = state[f"second_moment|{name}"] = 0.999 * state.get(f"second_moment|{name}", 0) + 0.001 * g**2
    r = m / (np.sqrt(v) + 1e-6) + own["weight_decay"] * theta
    trust = np.linalg.norm(theta) / np.linalg.norm(r) if own["adapt"] and theta.any() and r.any() else 1.0
    return theta - lr * trust * r, {"trust_ratio": trust}


def adamw(theta, g, name, t, lr, own, settings, state):
    """arXiv 1711.05101, algorithm 2."""
    m = state[f"first_moment|{name}"] = 0.9 * state.get(f"first_moment|{name}", 0) + 0.1 * g
    v = state[f"second_moment|{name}"] = 0.999 * state.get(f"second_moment|{name}", 0) + 0.001 * g**2
    u = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return theta - lr * u - lr * own["weight_decay"] * theta, {}


RULES = {"adafactor": adafactor, "lamb": lamb, "adamw": adamw}

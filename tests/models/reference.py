"""RoFormerV2 and GAU-alpha in plain NumPy, one row at a time, written from the published equations.

Nothing is shared with the implementation. L sequence length, D hidden size, K head or key size.
"""

import numpy as np


def rms(x):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-12)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def rope(x_LK):
    """Interleaved: x cos + [-x1, x0, -x3, x2, ...] sin, cos and sin each repeated twice."""
    length, size = x_LK.shape
    theta = 10000.0 ** (-2 * np.arange(size // 2) / size)
    angle = np.repeat(np.arange(length)[:, None] * theta[None, :], 2, axis=1)
    crossed = np.empty_like(x_LK)
    crossed[:, 0::2], crossed[:, 1::2] = -x_LK[:, 1::2], x_LK[:, 0::2]
    return x_LK * np.cos(angle) + crossed * np.sin(angle)


def embed(w, tokens):
    types = w["encoder.embeddings.token_type.weight"][0]
    return rms(w["encoder.embeddings.token.weight"][tokens] + types)


def roformer_v2(w, tokens, padding, layers, heads):
    """Logits [L, V] of one row; `padding` marks keys that are not seen. Weights are [out, in] as in torch."""
    x = embed(w, tokens)
    for i in range(layers):
        name = f"encoder.layers.{i}."
        q, k, v = (x @ w[f"{name}mixer.{part}.weight"].T for part in ("query", "key", "value"))
        size = q.shape[1] // heads
        mixed = []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            scores = rope(q[:, part]) @ rope(k[:, part]).T / np.sqrt(size)
            scores[:, padding] = -np.inf
            mixed.append(softmax(scores) @ v[:, part])
        x = rms(x + np.concatenate(mixed, axis=1) @ w[f"{name}mixer.output.weight"].T)
        inner = np.maximum(x @ w[f"{name}feed_forward.up.weight"].T, 0)
        x = rms(x + inner @ w[f"{name}feed_forward.down.weight"].T)
    return x @ w["encoder.embeddings.token.weight"].T


def gau_alpha(w, tokens, padding, layers, expansion, key_size):
    """Logits [L, V] of one row of GAU-alpha: softmax_plus attention with a floor of 16 tokens."""
    x = embed(w, tokens)
    visible = max(int((~padding).sum()), 16)
    for i in range(layers):
        name = f"encoder.layers.{i}.mixer."
        h = x @ w[f"{name}input.weight"].T
        h = h / (1 + np.exp(-h))
        u, v, z = np.split(h, [expansion, 2 * expansion], axis=1)
        q, k = rope(z * w[f"{name}query_scale"]), rope(z * w[f"{name}key_scale"])
        scores = q @ k.T / np.sqrt(key_size)
        scores[:, padding] = -np.inf
        attention = softmax(scores * np.log(visible) / np.log(512))
        x = rms(x + (u * (attention @ v)) @ w[f"{name}output.weight"].T)
    return x @ w["encoder.embeddings.token.weight"].T


def flash(w, tokens, layers, expansion, key_size, chunk, causal, squared_n2=False):
    """Hidden vectors [L, D] of one row without padding: FLASH written out token by token, nothing in chunks."""
    x = embed(w, tokens)
    length = len(tokens)
    place = np.arange(length) // chunk
    same = place[:, None] == place[None, :]
    if causal:
        same &= np.arange(length)[:, None] >= np.arange(length)[None, :]
        earlier = place[:, None] > place[None, :]
        share = np.where(earlier, 1.0, 0.0) / np.maximum(place * chunk, 1)[:, None]
    else:
        share = np.full((length, length), 1 / length)
    for i in range(layers):
        name = f"encoder.layers.{i}.mixer."
        h = x @ w[f"{name}input.weight"].T
        h = h / (1 + np.exp(-h))
        u, v, z = np.split(h, [expansion, 2 * expansion], axis=1)
        parts = ("quadratic_query", "quadratic_key", "linear_query", "linear_key")
        q, k, lq, lk = (rope(z * w[f"{name}{part}_scale"]) for part in parts)
        scores = q @ k.T / (chunk if squared_n2 else np.sqrt(chunk * key_size))
        quadratic = np.maximum(scores, 0) ** 2 * same
        mixed = quadratic @ v + ((lq @ lk.T) * share) @ v
        x = rms(x + (u * mixed) @ w[f"{name}output.weight"].T)
    return x


def gau_squared(w, tokens, layers, expansion, key_size, squared_n2):
    """Hidden vectors [L, D] of GAU with relu(q k / sqrt s)^2 / n, or relu(q k / n)^2, one row without padding."""
    x = embed(w, tokens)
    n = len(tokens)
    for i in range(layers):
        name = f"encoder.layers.{i}.mixer."
        h = x @ w[f"{name}input.weight"].T
        h = h / (1 + np.exp(-h))
        u, v, z = np.split(h, [expansion, 2 * expansion], axis=1)
        q, k = rope(z * w[f"{name}query_scale"]), rope(z * w[f"{name}key_scale"])
        products = np.maximum(q @ k.T, 0) ** 2
        attention = products / n**2 if squared_n2 else products / (n * key_size)
        x = rms(x + (u * (attention @ v)) @ w[f"{name}output.weight"].T)
    return x

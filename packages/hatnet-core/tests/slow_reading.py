"""Eq. 6-14 read aloud: loops over samples, heads, grids and pools, in the dtype of the input.

Nothing is padded: a grid or pool at the border holds the positions that exist. Shares no code with hatnet_core and
takes only the parameters of its modules.
"""

import torch


def normalise(x, norm):
    """GroupNorm of one group: each sample by the mean and variance over its channels and positions."""
    samples = []
    for sample in x:
        centred = sample - sample.sum() / sample.numel()
        variance = (centred * centred).sum() / sample.numel()
        samples.append(centred / (variance + 1e-6).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None])
    return torch.stack(samples)


def pointwise(x, conv):
    """1×1 convolution as the matrix product it is."""
    return torch.einsum("oc,bchw->bohw", conv.weight[:, :, 0, 0], x) + conv.bias[:, None, None]


def softmax_attention(q, k, v):
    """Eq. 2 for lists of tokens: q [n, d], k and v [m, d]."""
    rows = []
    for query in q:
        scores = torch.stack([(query * key).sum() for key in k]) / q.shape[1] ** 0.5
        weights = (scores - scores.max()).exp()
        rows.append((weights[:, None] * v).sum(0) / weights.sum())
    return torch.stack(rows)


def attend_in_grids(q, k, v, heads, g):
    """Eq. 6-8: softmax attention among the positions of each grid that exist."""
    batch, channels, height, width = q.shape
    d = channels // heads
    out = torch.zeros_like(q)
    for b in range(batch):
        for head in range(heads):
            c = slice(head * d, (head + 1) * d)
            for top in range(0, height, g):
                for left in range(0, width, g):
                    grid = (b, c, slice(top, min(top + g, height)), slice(left, min(left + g, width)))
                    tokens = [t[grid].flatten(1).T for t in (q, k, v)]
                    out[grid] = softmax_attention(*tokens).T.reshape(out[grid].shape)
    return out


def attend_to_all(q, k, v, heads):
    """Eq. 11 and 13: every position of q to every position of k and v."""
    d = q.shape[1] // heads
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for head in range(heads):
            c = slice(head * d, (head + 1) * d)
            tokens = [t[b, c].flatten(1).T for t in (q, k, v)]
            out[b, c] = softmax_attention(*tokens).T.reshape(out[b, c].shape)
    return out


def pool(x, g):
    """Eq. 10: mean over each G2×G2 cell, over the positions that exist."""
    rows = [
        torch.stack([x[:, :, top : top + g, left : left + g].mean((2, 3)) for left in range(0, x.shape[3], g)], dim=-1)
        for top in range(0, x.shape[2], g)
    ]
    return torch.stack(rows, dim=-2)


def hierarchical_attention(module, x):
    """H-MHSA without the outer residual, with the parameters, heads, G1 and G2 of ``module``."""
    c = x.shape[1]
    qkv = pointwise(normalise(x, module.norm), module.qkv)
    local = attend_in_grids(qkv[:, :c], qkv[:, c : 2 * c], qkv[:, 2 * c :], module.num_heads, module.grid_size)
    a1 = normalise(x + local, module.grid_norm)
    pooled = normalise(pool(a1, module.pool_size), module.pool_norm)
    kv = pointwise(pooled, module.kv)
    a2 = attend_to_all(pointwise(a1, module.q), kv[:, :c], kv[:, c:], module.num_heads)
    return pointwise(a1 + a2, module.proj)


def attention(module, x):
    """Plain MHSA (Eq. 1-3) without the outer residual, with the parameters and heads of ``module``."""
    c = x.shape[1]
    qkv = pointwise(normalise(x, module.norm), module.qkv)
    return pointwise(attend_to_all(qkv[:, :c], qkv[:, c : 2 * c], qkv[:, 2 * c :], module.num_heads), module.proj)


def window_attention(module, x):
    """Swin's attention without the outer residual: tiles of M×M positions whose borders lie ``shift`` further on.

    No roll and no mask: what Swin rolls together and masks apart are the tiles at the border, which are smaller.
    """
    c, m, heads = x.shape[1], module.window_size, module.num_heads
    d = c // heads
    qkv = pointwise(normalise(x, module.norm), module.qkv)
    out = torch.zeros_like(x)
    starts = [(range(0, side, m) if side <= m else range(module.shift - m, side, m)) for side in x.shape[2:]]
    for top in starts[0]:
        for left in starts[1]:
            rows = range(max(top, 0), min(top + m, x.shape[2]))
            columns = range(max(left, 0), min(left + m, x.shape[3]))
            positions = [(i, j) for i in rows for j in columns]
            for b in range(x.shape[0]):
                for head in range(heads):
                    for i, j in positions:
                        query = qkv[b, head * d : (head + 1) * d, i, j]
                        scores, values = [], []
                        for y, z in positions:
                            key = qkv[b, c + head * d : c + (head + 1) * d, y, z]
                            row = (i - y + m - 1) * (2 * m - 1) + j - z + m - 1
                            bias = module.relative_position_bias_table[row, head]
                            scores.append((query * key).sum() / d**0.5 + bias)
                            values.append(qkv[b, 2 * c + head * d : 2 * c + (head + 1) * d, y, z])
                        weights = (torch.stack(scores) - max(scores)).exp()
                        out[b, head * d : (head + 1) * d, i, j] = weights @ torch.stack(values) / weights.sum()
    return pointwise(out, module.proj)

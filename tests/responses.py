"""Patches and weights of ReLU responses that are hard to bound, and the largest response that sampling finds."""

import torch
from strategies import normal, seeded


def lengths(A, W, directions):
    return ((directions @ A.T).relu() @ W).norm(dim=1)


def unit(vectors):
    return torch.nn.functional.normalize(vectors, dim=-1)


def best_seen(A, W, count=20_000, seed=0):
    """Dense sampling, then random steps that shrink around the best ones."""
    directions = unit(normal((count, A.shape[1]), seed))
    random = seeded(seed + 1)
    for step in range(60):
        kept = directions[lengths(A, W, directions).topk(20).indices]
        noise = torch.randn(30, *kept.shape, generator=random, dtype=torch.float64)
        directions = torch.cat([kept, unit(kept + 0.7**step * noise).flatten(0, 1)])
    return float(lengths(A, W, directions).max())


def crossing_planes(kind, dimension, seed):
    """Rows whose planes share lines, nearly do, are nearly equal, or have nothing special about them."""
    random = seeded(seed)
    count = int(torch.randint(3, 25, (), generator=random))
    noise = 10.0 ** -float(torch.randint(4, 15, (), generator=random))
    rows = normal((count, dimension), seed)
    whole = torch.randint(-2, 3, (count, dimension), generator=random).double()
    pencil = torch.cat([rows * torch.tensor([noise, 1.0, 1.0][:dimension]), normal((2, dimension), seed + 1)])
    return {
        "general": rows,
        "integer": whole,
        "nearly integer": whole + noise * rows,
        "nearly equal": torch.cat([rows, rows.flip(0) + noise * normal((count, dimension), seed + 2)]),
        "through one line": pencil,
        "bytes": torch.randint(245, 256, (count, dimension), generator=random).double(),
        "of many lengths": rows * 10 ** (3 * normal((count, 1), seed + 3)),
    }[kind]


def cancelling(A, kind, seed):
    """Rows and weights: at random, of one size, opposite rows that nearly cancel, or what five features leave."""
    w = normal((len(A), 1), seed)
    if kind == "one size":
        return A, w.sign()
    if kind == "opposite":
        return torch.cat([A, -A]), torch.cat([w, 1e-3 * normal((len(A), 1), seed + 1) - w])
    if kind == "residual":
        features = (unit(A) @ normal((A.shape[1], 5), seed + 1)).relu()
        w = w - features @ torch.linalg.lstsq(features, w, rcond=1e-9, driver="gelsd").solution
    return A, w

"""The whole matrix at once, differentiated by autograd: the readable reference, and the quickest for small batches."""

import torch
from torch import Tensor

from gradbank.engine.anchors import Anchors, Positives
from gradbank.engine.declaration import Declaration
from gradbank.engine.pairs import Pairs
from gradbank.engine.references import References


def dense(loss: Declaration, embeddings: Tensor, references: References, pairs: Pairs) -> Tensor:
    """The loss of `(B, D)` embeddings; memory grows as `B * M`, or worse where a statistic says so."""
    queries = loss.distance.prepare(embeddings)
    rows, columns = slice(0, len(embeddings)), slice(0, len(references))
    whole = references.whole().to(embeddings.dtype)
    s = loss.distance.matrix(queries, loss.distance.prepare(whole))
    flat, counts, negatives = pairs.tile(rows, columns)
    positives = Positives(
        s.reshape(-1)[flat],
        torch.div(flat, max(len(whole), 1), rounding_mode="floor"),
        torch.ones_like(flat, dtype=s.dtype) if counts is None else counts.to(s.dtype),
    )
    found = {name: wanted.dense(s, negatives, positives) for name, wanted in loss.negatives().items()}
    terms = loss.terms(Anchors(len(embeddings), positives, found, pairs.anchor_weight))
    total = torch.stack([ratio.value() for ratio in terms.values()]).sum()
    return total.to(embeddings.dtype)

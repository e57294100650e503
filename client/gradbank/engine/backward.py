"""What the gradient of a loss comes to at a block's anchors, and at the references it was swept over."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gradbank.engine.block import Block
from gradbank.engine.gradients import Gradients
from gradbank.engine.negatives import Negatives
from gradbank.engine.room import room
from gradbank.engine.statistics import Running

_GATHERED_AT_ONCE = 2**18  # numbers of the positives' vectors held at a time


def backpropagate(block: Block, of_positives: Tensor | None, of_leaves: Mapping[str, Tensor], into: Gradients) -> None:
    """Adds to `into` what the gradient of the positives and of the leaves comes to."""
    way = _from_gathered if block.gathers else _from_sweep
    of_queries = way(block, of_positives, of_leaves, into)
    if into.rows[0] is not None:
        (chained,) = torch.autograd.grad(block.queries, block.embeddings, of_queries, retain_graph=True)
        into.add(0, block.rows, chained)


def _from_gathered(
    block: Block, of_positives: Tensor | None, of_leaves: Mapping[str, Tensor], into: Gradients
) -> Tensor:
    done = torch.zeros_like(block.queries)
    for name, gradient in of_leaves.items():
        running = block.running[name]
        if running.kept is None:
            continue
        of_query, *of_row = (kept * gradient.to(kept.dtype)[:, None] for kept in running.kept)
        done += of_query
        for output, each in zip(running.given, of_row):
            into.chain(output, each, block.embeddings, block.rows)
    if of_positives is None:
        return done
    assert block.positives is not None
    distance, queries = block.loss.distance, block.queries.detach()
    if distance.knows_pull:
        s, anchor, _, other = block.positives
        inverse = 1.0 if block.inverse_norms is None else block.inverse_norms[other]
        pulled = distance.pull_of_pairs(
            queries, anchor, s, of_positives, lambda w: block.references.sums(other, anchor, w * inverse, block.size)
        )
        return done.add_(pulled)
    step = max(1, room(_GATHERED_AT_ONCE, queries.device) // max(queries.shape[1], 1))
    for anchor, other, gradient in zip(
        *(torch.split(each, step) for each in (block.positives.anchor, block.positives.other, of_positives))
    ):
        with torch.enable_grad():
            mine = queries.index_select(0, anchor).requires_grad_()
            with torch.no_grad():
                rows = block.references.prepare(block.references.take(other).to(queries.dtype), distance)
            s = distance.pairs(mine, rows)
        (made,) = torch.autograd.grad(s, mine, gradient)
        done.index_add_(0, anchor, made)
    return done


def _from_sweep(block: Block, of_positives: Tensor | None, of_leaves: Mapping[str, Tensor], into: Gradients) -> Tensor:
    done, distance, start = None, block.loss.distance, 0
    queries = block.queries.detach().requires_grad_()
    spread = {block.running[name]: gradient for name, gradient in of_leaves.items()}
    rows_given = [each for running in spread for each in running.given]
    leaves = [each for running in spread for each in running.row] + into.parameters
    for index, (columns, piece, part) in enumerate(block.references.tiles(block.width)):
        wanted = into.rows[1 + piece] is not None
        with torch.enable_grad():
            given = block.references.pieces[piece][part].to(queries.dtype).requires_grad_(wanted)
            rows = block.references.prepare(given, distance)
            s = _matrix_again(block, queries, rows, index)
            flat, negatives, _ = block.pairs_of(index, columns)
            leaf = s.detach().requires_grad_()
            of_s, others = _spread(spread, leaf, leaves, negatives)
        for output, each in zip(rows_given, others):
            into.chain(output, each, block.embeddings, block.rows)
        into.add_to_parameters(others[len(rows_given) :])
        of_s = torch.zeros_like(s) if of_s is None else of_s
        if of_positives is not None:
            of_s.view(-1).index_add_(0, flat, of_positives[start : start + len(flat)])
            start += len(flat)
        if distance.knows_pull:
            of_queries, of_rows = distance.pull(queries.detach(), rows.detach(), s, of_s, wanted)
            if of_rows is not None and rows is not given:
                (of_rows,) = torch.autograd.grad(rows, given, of_rows)
        else:
            of_queries, *more = torch.autograd.grad(s, [queries, given] if wanted else [queries], of_s)
            of_rows = more[0] if wanted else None
        done = of_queries.contiguous() if done is None else done.add_(of_queries)
        if of_rows is not None:
            into.add(1 + piece, part, of_rows)
    return torch.zeros_like(queries) if done is None else done


def _spread(
    spread: Mapping[Running, Tensor], leaf: Tensor, leaves: list[Tensor], negatives: Negatives
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of a tile and of some leaves, of what the statistics hand back, one piece after the other."""
    sums: list[Tensor | None] = [None] * (1 + len(leaves))
    for running, gradient in spread.items():
        for value, weight in running.spread(leaf, negatives, gradient):
            # kept, for what is made of parameters once, as a statistic is declared, each piece differentiates
            kept = bool(leaves)
            made: Sequence[Tensor | None] = torch.autograd.grad(
                value, [leaf, *leaves], weight, allow_unused=True, retain_graph=kept
            )
            for i, each in enumerate(made):
                held = sums[i]
                if each is not None:
                    sums[i] = each if held is None else held + each
    return None if sums[0] is None else sums[0].contiguous(), sums[1:]


def _matrix_again(block: Block, queries: Tensor, rows: Tensor, index: int) -> Tensor:
    """A tile of the first sweep: as it was kept, or computed again, with a graph if that is needed."""
    if block.tiles is not None:
        return block.tiles[index]
    with torch.set_grad_enabled(not block.loss.distance.knows_pull):
        return block.loss.distance.matrix(queries, rows).contiguous()

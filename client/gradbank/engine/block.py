"""A block of anchors and its sweeps over the references."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from gradbank.distances import Distance
from gradbank.engine.anchors import Anchors, Gathered, Positives
from gradbank.engine.declaration import Declaration
from gradbank.engine.gradients import Gradients
from gradbank.engine.indices import unflattened
from gradbank.engine.listing import Listing
from gradbank.engine.near import distances_of
from gradbank.engine.negatives import Holes, Masked, Negatives, Weighted
from gradbank.engine.pairs import Pairs, TilePairs
from gradbank.engine.references import References
from gradbank.engine.room import room
from gradbank.engine.statistics import Running
from gradbank.engine.tile import Tile

_GATHERED_AT_ONCE = 2**18  # numbers of the positives' vectors held at a time


class Block:
    """A block of `b` anchors: its first sweep finds positives and statistics, its second spreads gradients.

    Where only the anchors want a gradient and their positives are few, the first sweep gathers it too, and there is
    no second one.
    """

    def __init__(
        self,
        loss: Declaration,
        embeddings: Tensor,
        references: References,
        pairs: Pairs,
        rows: slice,
        width: int,
        gathers: bool,
        keeps: bool,
        keeps_tiles: bool = False,
    ) -> None:
        self.loss, self.references, self.pairs, self.rows, self.width = loss, references, pairs, rows, width
        self.keeps = keeps
        with torch.enable_grad():
            self.embeddings = embeddings.detach().requires_grad_()
            self.queries = loss.distance.prepare(self.embeddings)
        self.size = len(embeddings)
        self.listing = _listing(pairs, rows, references, width) if keeps else None
        with torch.enable_grad():
            wanted = loss.negatives(self._anchors(Positives.none(embeddings), {}))
        for name, each in wanted.items():
            each.reduced_by(loss.reducer.of(name))
            each.measured_by(loss.distance)
        early = self._positives() if any(each.needs_positives for each in wanted.values()) else None
        like = self.queries.detach()
        self.running: dict[str, Running] = {name: each.begin(self.size, like, early) for name, each in wanted.items()}
        gathers = gathers and self.listing is not None
        self.gathers = gathers and all(r.by_anchor and not r.learns(like) for r in self.running.values())
        self.tiles: list[Tensor] | None = [] if keeps_tiles and loss.distance.knows_pull and not self.gathers else None
        self.inverse_norms: Tensor | None = None  # of the references, if what is listed will need them
        self.positives: Positives | None = self._sweep()
        self.leaves = {name: running.leaf() for name, running in self.running.items()}
        if not keeps:
            self.positives = None

    def anchors(self, leaves: Mapping[str, Tensor], positives: Positives) -> Anchors:
        """The block's anchors with their statistics, as functions of their leaves and of the positives."""
        found = {name: running.gathered(leaves[name], positives) for name, running in self.running.items()}
        return self._anchors(positives, found)

    def positives_again(self) -> Positives:
        """The positives that the first sweep found."""
        return self._positives() if self.positives is None else self.positives

    def backpropagate(self, of_positives: Tensor | None, of_leaves: Mapping[str, Tensor], into: Gradients) -> None:
        """Adds to `into` what the gradient of the positives and of the leaves comes to."""
        way = self._from_gathered if self.gathers else self._from_sweep
        of_queries = way(of_positives, of_leaves, into)
        if into.rows[0] is not None:
            (chained,) = torch.autograd.grad(self.queries, self.embeddings, of_queries, retain_graph=True)
            into.add(0, self.rows, chained)

    def _anchors(self, positives: Positives, found: Mapping[str, Gathered]) -> Anchors:
        labels, weight = self.pairs.anchor_labels, self.pairs.anchor_weight
        return Anchors(
            self.size,
            None if labels is None else labels[self.rows],
            self.embeddings,
            positives,
            self.references.are_anchors,
            None if weight is None else weight[self.rows],
            self.rows,
            self.pairs.interval,
            found,
        )

    def _sweep(self) -> Positives:
        """Adds every tile to the running statistics, and collects the positives."""
        queries = self.queries.detach().requires_grad_(self.gathers)
        found: list[Tensor] = []
        masked: list[tuple[TilePairs, slice]] = []
        # what is listed is written to one piece of memory: small ones would scatter what tiles leave free in between
        listed, start = None, 0
        if self.listing is not None:
            row, column = self.listing.positives()
            listed = Positives(queries.new_empty(len(row)).detach(), row, queries.new_ones(len(row)).detach(), column)
        counting = [running for running in self.running.values() if running.reads_number]
        number = self.queries.detach().new_zeros(self.size, dtype=torch.float64)
        negatives: Negatives | None = None
        for index, columns, (rows, inverse, squares) in self._rows():
            if self.gathers and inverse is not None:
                if self.inverse_norms is None:
                    self.inverse_norms = inverse.new_empty(len(self.references))
                self.inverse_norms[columns] = inverse.view(-1)
            shared, kept = len(self.running) > 1, self.tiles is not None
            tile = Tile(self.loss.distance, queries, rows, squares, shared, kept)
            if self.tiles is not None:
                self.tiles.append(tile.s)
            flat, negatives, pairs = self._pairs(index, columns)
            # before anything writes to the tile
            if listed is not None:
                torch.index_select(tile.s.detach().view(-1), 0, flat, out=listed.s[start : start + len(flat)])
                start += len(flat)
            elif self.keeps:
                found.append(tile.s.detach().view(-1).index_select(0, flat))
                if pairs is not None:
                    masked.append((pairs, columns))
            if counting and isinstance(negatives, (Masked, Weighted)):
                number += negatives.number()
            with torch.set_grad_enabled(self.gathers):
                for running in self.running.values():
                    running.add(tile, negatives)
        if counting and self.listing is not None and isinstance(negatives, Holes):  # as those of every tile are then
            number = len(self.references) - torch.bincount(self.listing.row, minlength=self.size).double()
        for running in counting:
            running.number = number
        return self._collected(found, masked) if listed is None else listed

    def _positives(self) -> Positives:
        """The positives alone."""
        if self.listing is not None:
            row, column = self.listing.positives()
            s = distances_of(self.loss.distance, self.queries.detach(), self.references, self.listing, self.width)
            return Positives(s, row, torch.ones_like(s), column)
        queries = self.queries.detach()
        found: list[Tensor] = []
        masked: list[tuple[TilePairs, slice]] = []
        for index, columns, (rows, _, _) in self._rows():
            flat, _, pairs = self._pairs(index, columns)
            assert pairs is not None
            with torch.no_grad():
                found.append(self.loss.distance.matrix(queries, rows).reshape(-1)[flat])
            masked.append((pairs, columns))
        return self._collected(found, masked)

    def _rows(self) -> Iterator[tuple[int, slice, tuple[Tensor, Tensor | None, Tensor | None]]]:
        """The tiles: their number, their columns, and their references, prepared."""
        for index, (columns, _, _) in enumerate(self.references.tiles(self.width)):
            with torch.no_grad():
                yield index, columns, self.references.prepared(self.loss.distance, columns, self.queries.dtype)

    def _pairs(self, index: int, columns: slice) -> tuple[Tensor, Negatives, TilePairs | None]:
        if self.listing is not None:
            flat, holes = self.listing.tile(index)
            weight = self.pairs.weight(self.rows, columns)
            return flat, holes if weight is None else Weighted(holes.weighed(weight)), None
        pairs = self.pairs.tile(self.rows, columns)
        return pairs.positives, Masked(pairs.negatives), pairs

    def _collected(self, found: list[Tensor], masked: list[tuple[TilePairs, slice]]) -> Positives:
        if not masked:
            return Positives.none(self.queries.detach())
        s = torch.cat(found)
        anchor, other, times = [], [], []
        for pairs, columns in masked:
            row, column = unflattened(pairs.positives, columns.stop - columns.start)
            anchor.append(row)
            other.append(column + columns.start)
            times.append(s.new_ones(len(row)) if pairs.counts is None else pairs.counts.to(s.dtype))
        return Positives(s, torch.cat(anchor), torch.cat(times), torch.cat(other))

    def _from_gathered(self, of_positives: Tensor | None, of_leaves: Mapping[str, Tensor], into: Gradients) -> Tensor:
        done = torch.zeros_like(self.queries)
        for name, gradient in of_leaves.items():
            running = self.running[name]
            if running.kept is None:
                continue
            of_query, *of_row = (kept * gradient.to(kept.dtype)[:, None] for kept in running.kept)
            done += of_query
            for output, each in zip(running.given, of_row):
                into.chain(output, each)
        if of_positives is None:
            return done
        assert self.positives is not None
        distance, queries = self.loss.distance, self.queries.detach()
        if distance.knows_pull:
            s, anchor, _, other = self.positives
            inverse = 1.0 if self.inverse_norms is None else self.inverse_norms[other]
            pulled = distance.pull_of_pairs(
                queries, anchor, s, of_positives, lambda w: self.references.sums(other, anchor, w * inverse, self.size)
            )
            return done.add_(pulled)
        step = max(1, room(_GATHERED_AT_ONCE, queries.device) // max(queries.shape[1], 1))
        for anchor, other, gradient in zip(
            *(torch.split(each, step) for each in (self.positives.anchor, self.positives.other, of_positives))
        ):
            with torch.enable_grad():
                mine = queries.index_select(0, anchor).requires_grad_()
                with torch.no_grad():
                    rows = self.references.prepare(self.references.take(other).to(queries.dtype), distance)
                s = distance.pairs(mine, rows)
            (made,) = torch.autograd.grad(s, mine, gradient)
            done.index_add_(0, anchor, made)
        return done

    def _from_sweep(self, of_positives: Tensor | None, of_leaves: Mapping[str, Tensor], into: Gradients) -> Tensor:
        done, distance, start = None, self.loss.distance, 0
        queries = self.queries.detach().requires_grad_()
        spread = {self.running[name]: gradient for name, gradient in of_leaves.items()}
        rows_given = [each for running in spread for each in running.given]
        leaves = [each for running in spread for each in running.row] + into.parameters
        for index, (columns, piece, part) in enumerate(self.references.tiles(self.width)):
            wanted = into.rows[1 + piece] is not None
            with torch.enable_grad():
                given = self.references.pieces[piece][part].to(queries.dtype).requires_grad_(wanted)
                rows = self.references.prepare(given, distance)
                s = self._matrix_again(queries, rows, index)
                flat, negatives, _ = self._pairs(index, columns)
                leaf = s.detach().requires_grad_()
                of_s, others = self._spread(spread, leaf, leaves, negatives)
            for output, each in zip(rows_given, others):
                into.chain(output, each)
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
        self, spread: Mapping[Running, Tensor], leaf: Tensor, leaves: list[Tensor], negatives: Negatives
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

    def _matrix_again(self, queries: Tensor, rows: Tensor, index: int) -> Tensor:
        """A tile of the first sweep: as it was kept, or computed again, with a graph if that is needed."""
        if self.tiles is not None:
            return self.tiles[index]
        with torch.set_grad_enabled(not self.loss.distance.knows_pull):
            return self.loss.distance.matrix(queries, rows).contiguous()


def sweep(
    distance: Distance, queries: Tensor, references: References, pairs: Pairs, rows: slice, width: int
) -> Iterator[tuple[Tensor, Positives, Negatives]]:
    """The tiles of a block of prepared queries: `(b, w)` distances, to be written to, the positives among them and
    which of them are negatives; without gradients."""
    listing = _listing(pairs, rows, references, width)
    for index, (columns, _, _) in enumerate(references.tiles(width)):
        with torch.no_grad():
            tile, _, squares = references.prepared(distance, columns, queries.dtype)
            s = distance.tile(queries, tile, squares).contiguous()
        negatives: Negatives
        if listing is not None:
            flat, negatives = listing.tile(index)
            counts = None
        else:
            flat, counts, mask = pairs.tile(rows, columns)
            negatives = Masked(mask)
        near = s.reshape(-1)[flat]
        row, column = unflattened(flat, s.shape[1])
        times = torch.ones_like(near) if counts is None else counts.to(s.dtype)
        yield s, Positives(near, row, times, column + columns.start), negatives


def _listing(pairs: Pairs, rows: slice, references: References, width: int) -> Listing | None:
    """The positives of a block of anchors, if they are few enough for a list to pay."""
    size, number = rows.stop - rows.start, len(references)
    if number and int(pairs.most_positives()[rows].sum()) * 16 > size * number:
        return None
    edges = [columns.start for columns, _, _ in references.tiles(width)] + [number]
    return pairs.listing(rows, torch.tensor(edges, device=references.pieces[0].device))

"""A block of anchors and its sweep over the references."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from gradbank.engine.anchors import Anchors, Gathered, Positives
from gradbank.engine.declaration import Declaration, statistics_of
from gradbank.engine.indices import unflattened
from gradbank.engine.near import distances_of
from gradbank.engine.negatives import Holes, Masked, Negatives, Weighted
from gradbank.engine.pairs import Pairs, TilePairs
from gradbank.engine.references import References
from gradbank.engine.statistics import Running
from gradbank.engine.sweep import listing_of
from gradbank.engine.tile import Tile


class Block:
    """A block of `b` anchors: its sweep over the references finds positives and statistics.

    Where only the anchors want a gradient and their positives are few, the sweep gathers it too; else `backward` makes
    a second one, which spreads gradients.
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
        self.listing = listing_of(pairs, rows, references, width) if keeps else None
        with torch.enable_grad():
            wanted = statistics_of(loss, self._anchors(Positives.none(embeddings), {}))
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
            flat, negatives, pairs = self.pairs_of(index, columns)
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
            flat, _, pairs = self.pairs_of(index, columns)
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

    def pairs_of(self, index: int, columns: slice) -> tuple[Tensor, Negatives, TilePairs | None]:
        """Of a tile: where its positives lie, its negatives, and both where they are not listed."""
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

# SPDX-License-Identifier: BSD-3-Clause
"""Per example, the squared norm of its gradient in the tables: from ids and gradients of outputs, without the tables.

Shapes: ``B`` examples, ``F`` features, ``I`` ids, ``U`` unique pairs of an example and a row, ``D`` row width.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_scratchpipe.errors import ConfigError

__all__ = ["FeatureTable", "pooled_square_norms", "unpooled_square_norms"]


class FeatureTable(NamedTuple):
    """The table that a feature looks up.

    Attributes:
        table: Its name.
        is_mean: It pools by the mean; else by the sum.
    """

    table: str
    is_mean: bool


def pooled_square_norms(
    features: KeyedJaggedTensor, gradient: Tensor, dims: Sequence[int], tables: Sequence[FeatureTable]
) -> Tensor:
    """Squared norms of the gradient of tables whose rows are pooled. Changes nothing; waits for the device.

    An example may name a row more than once, in one feature or in several features of one table. Its gradient of this
    row is a sum, and the norm is that of the sum.

    Args:
        features: Ids, in F * B bags. With weights if and only if the collection is weighted.
        gradient: [B, sum(dims)]. The loss's gradient at the collection's output, in the order of ``features.keys()``.
        dims: [F]. Row widths.
        tables: [F]. Tables, in the same order.

    Returns:
        [B] float32, on the device of the gradient.

    Raises:
        ConfigError: Shapes do not fit, or batch sizes differ from feature to feature. Or a feature has weights and the
            mean: whether FBGEMM's gradient of the rows is divided by the length then depends on the device.
    """
    num_examples = _num_examples(features)
    _check_pooled(features, gradient, dims, tables, num_examples)
    lengths = features.lengths().view(len(tables), num_examples)
    scales = torch.ones(lengths.shape, dtype=torch.float32, device=lengths.device)
    for index, table in enumerate(tables):
        if table.is_mean:
            scales[index] = lengths[index].clamp(min=1).float().reciprocal()
    gradients = [each.float() for each in gradient.detach().split(list(dims), dim=1)]
    result = torch.zeros(num_examples, dtype=torch.float32, device=gradient.device)
    if num_examples == 0 or not tables:
        return result
    # [F, B], of a row that a bag names once
    squares = torch.stack([each.square().sum(dim=1) for each in gradients]) * scales.square()
    longest = lengths.amax(dim=1).tolist()
    weights = features.weights_or_none()
    bounds = features.offset_per_key()
    repeated = []
    # Where bags have one id at most, and a table one feature, a bag has one row: its weight stands before the norm.
    for indices in _by_table([each.table for each in tables]).values():
        index = indices[0]
        if len(indices) > 1 or longest[index] > 1:
            repeated.append(indices)
            continue
        counts = lengths[index].float()
        if weights is not None:
            counts[lengths[index] > 0] = weights[bounds[index] : bounds[index + 1]].detach().float()
        result += counts.square() * squares[index]
    if repeated:
        result += _repeated_square_norms(features, gradients, scales, squares, repeated)
    return result


def _repeated_square_norms(
    features: KeyedJaggedTensor,
    gradients: Sequence[Tensor],
    scales: Tensor,
    squares: Tensor,
    tables: Sequence[Sequence[int]],
) -> Tensor:
    """[B] float32. Of tables of which an example may name a row more than once; each is given by its features."""
    order = [index for indices in tables for index in indices]
    scales, squares = scales[order], squares[order]
    num_examples = squares.shape[1]
    ids = _ids(features, tables)
    weights = None if features.weights_or_none() is None else _in_order(features, features.weights(), order).float()
    repeated = _find_repeated(ids)
    # 1. Rows that an example names once. The norm is the bag's, as often as the bag has such rows.
    bag = ids.bag[repeated.position]
    if weights is None:
        once = features.lengths().view(-1, num_examples)[order].flatten().long()
        once = once - torch.bincount(bag, minlength=once.numel())
        counts = torch.ones_like(bag, dtype=torch.float32)
    else:
        once = torch.zeros(squares.numel(), dtype=torch.float32, device=squares.device)
        once.index_add_(0, ids.bag, weights.square().index_fill_(0, repeated.position, 0.0))
        counts = weights[repeated.position]
    result = (once.view_as(squares) * squares).sum(dim=0)
    # 2. Rows that one bag names several times. Weights are added up, and stand before the norm again.
    pieces = _pieces(repeated.pair, bag, counts)
    is_shared = torch.bincount(pieces.pair)[pieces.pair] > 1
    of_piece = pieces.weight.square() * squares.flatten()[pieces.bag]
    result.index_add_(0, pieces.bag % num_examples, of_piece.masked_fill_(is_shared, 0.0))
    # 3. Rows that several bags of an example name: bags of other features of the same table. Only here must gradients
    #    be added up, row by row, before they are squared.
    first = 0
    for indices in tables:
        last = first + len(indices)
        if len(indices) > 1:
            is_here = is_shared & (pieces.bag >= first * num_examples) & (pieces.bag < last * num_examples)
            bag = pieces.bag[is_here]
            of_table = torch.stack([gradients[index] for index in indices]).flatten(0, 1)
            factors = pieces.weight[is_here] * scales.flatten()[bag]
            rows = of_table[bag - first * num_examples] * factors[:, None]
            result += _sum_and_square(rows, pieces.pair[is_here], bag % num_examples, num_examples)
        first = last
    return result


class _Pieces(NamedTuple):
    """What single bags have of pairs of an example and a row. All are [number of pieces].

    Attributes:
        pair: int64. Which pair; pieces of one lie together.
        bag: int64. The bag.
        weight: float32. How often it names the row, or its weights of it.
    """

    pair: Tensor
    bag: Tensor
    weight: Tensor


def _pieces(pair: Tensor, bag: Tensor, counts: Tensor) -> _Pieces:
    # Pairs and, in each, bags lie in order: a piece begins wherever one of them changes.
    is_first = torch.ones_like(pair, dtype=torch.bool)
    is_first[1:] = (pair[1:] != pair[:-1]) | (bag[1:] != bag[:-1])
    starts = is_first.nonzero().squeeze(1)
    sums = torch.zeros(starts.numel(), dtype=torch.float32, device=counts.device)
    sums.index_add_(0, is_first.cumsum(0) - 1, counts)
    return _Pieces(pair[starts], bag[starts], sums)


def _sum_and_square(rows: Tensor, pair: Tensor, example: Tensor, num_examples: int) -> Tensor:
    """[B] float32. Rows [I, D] of one pair are added up, then squared; pairs are sorted."""
    unique, inverse = torch.unique_consecutive(pair, return_inverse=True)
    sums = torch.zeros(unique.numel(), rows.shape[1], dtype=torch.float32, device=rows.device)
    sums.index_add_(0, inverse, rows)
    of_pair = torch.empty(unique.numel(), dtype=torch.int64, device=rows.device)
    of_pair[inverse] = example
    result = torch.zeros(num_examples, dtype=torch.float32, device=rows.device)
    return result.index_add_(0, of_pair, sums.square().sum(dim=1))


def unpooled_square_norms(
    features: KeyedJaggedTensor, gradients: Mapping[str, Tensor], tables: Mapping[str, str]
) -> Tensor:
    """Squared norms of the gradient of tables whose rows are not pooled. Changes nothing; waits for the device.

    An example may name a row more than once. Its gradient of this row is a sum, and the norm is that of the sum.

    Args:
        features: Ids, in F * B bags.
        gradients: Feature to [I of this feature, D]. The loss's gradient at the feature's rows, in the order of its
            ids. A feature that has none did not reach the loss.
        tables: Feature to its table.

    Returns:
        [B] float32, on the device of the gradients.

    Raises:
        ConfigError: Shapes do not fit, or batch sizes differ from feature to feature.
    """
    num_examples = _num_examples(features)
    keys = list(features.keys())
    _check_unpooled(features, gradients, tables)
    result = torch.zeros(num_examples, dtype=torch.float32, device=features.device())
    grouped = _by_table([tables[key] if key in gradients else None for key in keys])
    if not grouped or num_examples == 0:
        return result
    ids = _ids(features, list(grouped.values()))
    repeated = _find_repeated(ids)
    example = ids.bag % num_examples
    bounds = features.offset_per_key()
    first = 0
    for indices in grouped.values():
        last = first + sum(bounds[index + 1] - bounds[index] for index in indices)
        rows = torch.cat([gradients[keys[index]].detach().float() for index in indices])
        is_here = (repeated.position >= first) & (repeated.position < last)
        position = repeated.position[is_here]
        once = rows.square().sum(dim=1).index_fill_(0, position - first, 0.0)
        result.index_add_(0, example[first:last], once)
        result += _sum_and_square(rows[position - first], repeated.pair[is_here], example[position], num_examples)
        first = last
    return result


class _Ids(NamedTuple):
    """Ids, table by table, and there feature by feature.

    Attributes:
        values: [I]. Ids.
        bag: [I] int64. Where the feature is in this order, times B, plus the example.
        table_of: Where the feature is in this order, to its table.
        num_examples: B.
    """

    values: Tensor
    bag: Tensor
    table_of: Sequence[int]
    num_examples: int


def _ids(features: KeyedJaggedTensor, tables: Sequence[Sequence[int]]) -> _Ids:
    order = [index for indices in tables for index in indices]
    num_examples = features.stride()
    lengths = features.lengths().view(-1, num_examples)[order].flatten()
    values = _in_order(features, features.values(), order)
    bags = torch.arange(lengths.numel(), dtype=torch.int64, device=values.device)
    table_of = [table for table, indices in enumerate(tables) for _ in indices]
    return _Ids(values, bags.repeat_interleave(lengths, output_size=values.numel()), table_of, num_examples)


def _in_order(features: KeyedJaggedTensor, each: Tensor, order: Sequence[int]) -> Tensor:
    """What is given for each id, of some features in another order."""
    bounds = features.offset_per_key()
    if list(order) == list(range(len(bounds) - 1)):
        return each.detach()
    return torch.cat([each.detach()[bounds[index] : bounds[index + 1]] for index in order])


class _Repeated(NamedTuple):
    """Ids that an example has more than once in a table. Both are int64, of one size.

    Attributes:
        position: Where they are among the ids; those of a pair lie together, ascending.
        pair: Number of the pair of an example and a row.
    """

    position: Tensor
    pair: Tensor


def _find_repeated(ids: _Ids) -> _Repeated:
    """One sort for all tables."""
    values = ids.values.long()
    if values.numel() < 2:
        return _Repeated(values[:0], values[:0])
    # 1. A group is an example and a table: features of one table get the number of the first.
    groups = ids.bag
    if len(set(ids.table_of)) < len(ids.table_of):
        table_of = torch.tensor(ids.table_of, dtype=torch.int64, device=groups.device)
        back = (torch.arange(len(ids.table_of), dtype=torch.int64, device=groups.device) - table_of) * ids.num_examples
        groups = groups - back[groups // ids.num_examples]
    # 2. A group and an id make one key, as far as 64 bits suffice.
    smallest, largest, last_group = torch.stack([*values.aminmax(), groups.max()]).tolist()
    if (last_group + 1) * (largest - smallest + 1) >= 2**63:  # ids of 64 bits: number those that occur
        unique, values = torch.unique(values, return_inverse=True)
        smallest, largest = 0, unique.numel() - 1
    keys, order = torch.sort(groups * (largest - smallest + 1) + (values - smallest), stable=True)
    # 3. Equal keys lie together now. One that has no equal is left out.
    is_next_same = keys[1:] == keys[:-1]
    is_repeated = torch.zeros_like(keys, dtype=torch.bool)
    is_repeated[1:] = is_next_same
    is_repeated[:-1] |= is_next_same
    found = is_repeated.nonzero().squeeze(1)
    keys = keys[found]
    is_first = torch.ones_like(keys, dtype=torch.bool)
    is_first[1:] = keys[1:] != keys[:-1]
    return _Repeated(order[found], is_first.cumsum(0) - 1)


def _by_table(tables: Sequence[str | None]) -> dict[str, list[int]]:
    """Table to the positions of its features; None is left out."""
    result: dict[str, list[int]] = {}
    for index, table in enumerate(tables):
        if table is not None:
            result.setdefault(table, []).append(index)
    return result


def _num_examples(features: KeyedJaggedTensor) -> int:
    if features.variable_stride_per_key():
        raise ConfigError(
            f"Per-example gradients: batch sizes of features differ ({features.stride_per_key()}), needs one for all. "
            "Expand the features before they reach the model."
        )
    return features.stride()


def _check_pooled(
    features: KeyedJaggedTensor,
    gradient: Tensor,
    dims: Sequence[int],
    tables: Sequence[FeatureTable],
    num_examples: int,
) -> None:
    num_features = len(features.keys())
    if not num_features == len(dims) == len(tables):
        raise ConfigError(
            f"Per-example gradients: {len(dims)} dims and {len(tables)} tables, needs one of each for every one of "
            f"{num_features} features. Give them in the order of features.keys()."
        )
    if tuple(gradient.shape) != (num_examples, sum(dims)):
        raise ConfigError(
            f"Per-example gradients: the gradient has shape {tuple(gradient.shape)}, needs "
            f"{(num_examples, sum(dims))}: examples, and the features' widths. Give the gradient at the output."
        )
    widths: dict[str, int] = {}
    for key, dim, (table, is_mean) in zip(features.keys(), dims, tables, strict=True):
        if widths.setdefault(table, dim) != dim:
            raise ConfigError(
                f"Feature {key}: table {table} has rows of width {widths[table]}, got {dim}. Give one width for all "
                "features of a table."
            )
        if is_mean and features.weights_or_none() is not None:
            raise ConfigError(
                f"Feature {key}: table {table} pools by the mean and its ids have weights, needs one of the two. "
                "FBGEMM divides the gradient by the length on some devices only. Pool by the sum, with weights "
                "that are divided by the length."
            )


def _check_unpooled(features: KeyedJaggedTensor, gradients: Mapping[str, Tensor], tables: Mapping[str, str]) -> None:
    sizes = dict(zip(features.keys(), features.length_per_key(), strict=True))
    widths: dict[str, int] = {}
    for key, gradient in gradients.items():
        if key not in sizes or key not in tables:
            raise ConfigError(
                f"Per-example gradients: feature {key} has a gradient but no {'table' if key in sizes else 'ids'}. "
                "Name features as the collection does."
            )
        if gradient.dim() != 2 or gradient.shape[0] != sizes[key]:
            raise ConfigError(
                f"Feature {key}: the gradient has shape {tuple(gradient.shape)}, needs a row for each of {sizes[key]} "
                "ids. Give the gradient at the output."
            )
        if widths.setdefault(tables[key], gradient.shape[1]) != gradient.shape[1]:
            raise ConfigError(
                f"Feature {key}: table {tables[key]} has rows of width {widths[tables[key]]}, got "
                f"{gradient.shape[1]}. Give one width for all features of a table."
            )

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
    num_examples = squares.shape[1]
    order = [index for indices in tables for index in indices]
    ids = _ids(features, tables)
    pairs = _sort(ids.table * num_examples + ids.example, ids.values)
    feature = ids.feature[pairs.order]
    # A piece is what one feature has of a pair; the sort is stable, so it lies together.
    is_first = pairs.is_first.clone()
    is_first[1:] |= feature[1:] != feature[:-1]
    starts = is_first.nonzero().squeeze(1)
    ends = torch.cat([starts[1:], starts.new_tensor([feature.numel()], dtype=torch.int64)])
    weights = features.weights_or_none()
    if weights is None:
        counts = (ends - starts).float()
    else:
        bounds = features.offset_per_key()
        each = torch.cat([weights[bounds[index] : bounds[index + 1]].detach().float() for index in order])
        counts = torch.zeros(starts.numel(), dtype=torch.float32, device=each.device)
        counts.index_add_(0, is_first.cumsum(0) - 1, each[pairs.order])
    example, feature = ids.example[pairs.order[starts]], feature[starts]
    pair = pairs.is_first[starts].cumsum(0) - 1
    result = torch.zeros(num_examples, dtype=torch.float32, device=squares.device)
    alone = counts.square() * squares[feature, example]
    if len(order) == len(tables):  # no table has two features
        return result.index_add_(0, example, alone)
    is_shared = torch.bincount(pair)[pair] > 1
    result.index_add_(0, example, alone.masked_fill_(is_shared, 0.0))
    for indices in tables:
        if len(indices) > 1:
            pieces = is_shared & torch.isin(feature, feature.new_tensor(indices))
            chosen = _Pieces(feature[pieces], example[pieces], counts[pieces], pair[pieces])
            result += _shared_square_norms(chosen, indices, gradients, scales)
    return result


class _Pieces(NamedTuple):
    """What features have of pairs of an example and a row, each of which several features share."""

    feature: Tensor
    example: Tensor
    factor: Tensor
    pair: Tensor


def _shared_square_norms(
    pieces: _Pieces, indices: Sequence[int], gradients: Sequence[Tensor], scales: Tensor
) -> Tensor:
    """[B] float32. Of one table, for the pairs that more than one of its features has."""
    rows = torch.empty(pieces.pair.numel(), gradients[indices[0]].shape[1], dtype=torch.float32, device=scales.device)
    factors = pieces.factor * scales[pieces.feature, pieces.example]
    for index in indices:
        of_feature = (pieces.feature == index).nonzero().squeeze(1)
        rows[of_feature] = gradients[index][pieces.example[of_feature]] * factors[of_feature, None]
    return _sum_and_square(rows, pieces.pair, pieces.example, scales.shape[1])


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
    pairs = _sort(ids.table * num_examples + ids.example, ids.values)
    example, pair = ids.example[pairs.order], pairs.is_first.cumsum(0) - 1
    is_shared = torch.bincount(pair)[pair] > 1
    bounds = features.offset_per_key()
    first = 0
    for indices in grouped.values():
        # Tables come one after another, in the sorted order, too.
        last = first + sum(bounds[index + 1] - bounds[index] for index in indices)
        rows = torch.cat([gradients[keys[index]].detach().float() for index in indices])
        order = pairs.order[first:last] - first
        alone = rows.square().sum(dim=1)[order]
        shared = is_shared[first:last].nonzero().squeeze(1)
        result.index_add_(0, example[first:last], alone.index_fill_(0, shared, 0.0))
        result += _sum_and_square(
            rows[order[shared]], pair[first:last][shared], example[first:last][shared], num_examples
        )
        first = last
    return result


class _Ids(NamedTuple):
    """Ids, table by table. All are [I] int64.

    Attributes:
        values: Ids.
        table: Which of the tables.
        feature: Where the feature is among the keys.
        example: Which example.
    """

    values: Tensor
    table: Tensor
    feature: Tensor
    example: Tensor


def _ids(features: KeyedJaggedTensor, tables: Sequence[Sequence[int]]) -> _Ids:
    bounds = features.offset_per_key()
    values = features.values()
    order = [index for indices in tables for index in indices]
    num_examples = features.stride()
    device = values.device
    lengths = features.lengths().view(-1, num_examples)[order].flatten()
    num_ids = sum(bounds[index + 1] - bounds[index] for index in order)

    def spread(each: list[int]) -> Tensor:
        """A value per feature to one per id."""
        sizes = [bounds[index + 1] - bounds[index] for index in order]
        return torch.tensor(each, dtype=torch.int64, device=device).repeat_interleave(
            torch.tensor(sizes, dtype=torch.int64, device=device), output_size=num_ids
        )

    examples = torch.arange(num_examples, dtype=torch.int64, device=device).repeat(len(order))
    return _Ids(
        values=torch.cat([values[bounds[index] : bounds[index + 1]] for index in order]).long(),
        table=spread([table for table, indices in enumerate(tables) for _ in indices]),
        feature=spread(order),
        example=examples.repeat_interleave(lengths, output_size=num_ids),
    )


class _Sorted(NamedTuple):
    """Pairs of a group and a value, sorted; equal ones are in the order in which they came.

    Attributes:
        order: [I] int64. Where each was.
        is_first: [I] bool. It differs from the one before it.
    """

    order: Tensor
    is_first: Tensor


def _sort(groups: Tensor, values: Tensor) -> _Sorted:
    if values.numel() == 0:
        return _Sorted(torch.empty_like(values), torch.empty_like(values, dtype=torch.bool))
    smallest, largest, last_group = torch.stack([*values.aminmax(), groups.max()]).tolist()
    span = largest - smallest + 1
    if (last_group + 1) * span >= 2**63:  # ids of 64 bits: number those that occur
        unique, values = torch.unique(values, return_inverse=True)
        smallest, span = 0, unique.numel()
    keys, order = torch.sort(groups * span + (values - smallest), stable=True)
    is_first = torch.ones_like(keys, dtype=torch.bool)
    is_first[1:] = keys[1:] != keys[:-1]
    return _Sorted(order, is_first)


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

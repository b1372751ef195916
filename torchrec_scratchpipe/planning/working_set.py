# SPDX-License-Identifier: BSD-3-Clause
"""Measures what batches use of each table, as TorchRec's planner takes it, and keeps it in a file.

Shapes: ``I`` ids, ``B`` bins of batches, ``P`` pressures.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torchrec.distributed.types import CacheStatistics
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface, EmbeddingCollectionInterface
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_scratchpipe.core.slot_ops import MAX_BATCHES_SEEN_AHEAD
from torchrec_scratchpipe.errors import ConfigError, IdOutOfRangeError, MeasurementError
from torchrec_scratchpipe.planning.checks import check_count, check_number, did_you_mean, few
from torchrec_scratchpipe.planning.random_states import random_states_kept
from torchrec_scratchpipe.planning.remapping import Remapping, remappings_of
from torchrec_scratchpipe.planning.reuse import Curve, Floats, Reuse, ReuseMeter, Window, misses_of_pool
from torchrec_scratchpipe.planning.zipf import zipf_reuse
from torchrec_scratchpipe.sharding.batch_features import find_tensors, ids_of_features, num_samples

__all__ = [
    "WorkingSet",
    "WorkingSets",
    "configs_of",
    "has_tables",
    "measure_working_set",
    "table_configs",
    "zipf_working_sets",
]

FORMAT = "torchrec_scratchpipe working sets 1"


class WorkingSet(CacheStatistics):
    """What one table's batches use: TorchRec's cache statistics, and more.

    Args:
        table_name: As in its config.
        reuse: What was counted.
    """

    def __init__(self, table_name: str, reuse: Reuse) -> None:
        self.table_name = table_name
        self.reuse = reuse

    @property
    def expected_lookups(self) -> float:
        """Unique ids per batch of all ranks, as TorchRec wants it."""
        return self.reuse.window(1).mean

    def expected_miss_rate(self, clf: float) -> float:
        """Share of a batch's unique ids that miss, once the scratchpad is full, if the table had one to itself.

        Args:
            clf: Slots per row of the table, in [0, 1].

        Returns:
            In [0, 1]; 1 for no slots and 0 for as many as rows.
        """
        return self.miss_rate(clf * self.reuse.num_rows)

    def miss_rate(self, num_slots: float, order: str = "ours") -> float:
        """As :meth:`expected_miss_rate`, for a number of slots and an eviction order.

        Args:
            num_slots: Of a scratchpad for this table alone.
            order: ``"ours"``, ``"lru"`` or ``"optimum"``.

        Returns:
            In [0, 1].
        """
        if num_slots >= self.reuse.num_rows:
            return 0.0
        if num_slots <= 0:
            return 1.0
        (misses,) = misses_of_pool([self.reuse], num_slots, order)
        return min(1.0, self.in_second_half(misses) / max(self.expected_lookups, 1e-9))

    @property
    def cacheability(self) -> float:
        """TorchRec's measure of difficulty: the miss rate over all load factors, 0 for easy, 1 for hopeless."""
        rates = [self.expected_miss_rate(load_factor) for load_factor in np.linspace(0.0, 1.0, 65)]
        return float(np.mean(rates))

    def in_second_half(self, per_bin: Any) -> float:
        """Mean over the later half of the batches, when the scratchpad has filled.

        Args:
            per_bin: [B].

        Returns:
            Per batch.
        """
        return self.reuse.in_second_half(per_bin)


class WorkingSets(Mapping[str, WorkingSet]):
    """The working sets of a model's tables, measured together, by table name.

    Args:
        sets: One per table.
        world_size: How many ranks' batches make one of those that were counted.
        batch_size: Samples in one rank's batch; None where nobody knows.

    Raises:
        MeasurementError: There is no table, or tables were measured apart.
    """

    def __init__(self, sets: Iterable[WorkingSet], world_size: int = 1, batch_size: int | None = None) -> None:
        self._sets = {working_set.table_name: working_set for working_set in sets}
        self.world_size = world_size
        self.batch_size = batch_size
        if not self._sets:
            raise MeasurementError("WorkingSets got no table. Give at least one WorkingSet.")
        first = next(iter(self._sets.values()))
        for other in self._sets.values():
            if _what_must_agree(other.reuse) != _what_must_agree(first.reuse):
                raise MeasurementError(
                    f"table {other.table_name} was not measured together with table {first.table_name}: lookahead, "
                    "batches seen ahead or number of batches differ. Measure all tables at once."
                )
        reuse = first.reuse
        self.lookahead = reuse.lookahead
        self.num_batches_seen_ahead = reuse.num_batches_seen_ahead
        self.num_batches = reuse.num_batches

    def __getitem__(self, table_name: str) -> WorkingSet:
        return self._sets[table_name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sets)

    def __len__(self) -> int:
        return len(self._sets)

    def misses(self, table_names: Sequence[str], num_slots: float, order: str = "ours") -> dict[str, float]:
        """Unique rows per batch that tables miss which share slots, once these are full.

        Args:
            table_names: The tables of a pool.
            num_slots: The slots that they share.
            order: ``"ours"``, ``"lru"`` or ``"optimum"``.

        Returns:
            By table.
        """
        sets = [self[name] for name in table_names]
        per_bin = misses_of_pool([working_set.reuse for working_set in sets], num_slots, order)
        return {
            working_set.table_name: working_set.in_second_half(misses)
            for working_set, misses in zip(sets, per_bin, strict=True)
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything as JSON, whole or not at all.

        Args:
            path: The file.
        """
        content = {
            "format": FORMAT,
            "world_size": self.world_size,
            "batch_size": self.batch_size,
            "tables": {name: _to_json(working_set.reuse) for name, working_set in self.items()},
        }
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(target.name + ".part")
        temporary.write_text(json.dumps(content))
        temporary.replace(target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "WorkingSets":
        """Read what :meth:`save` wrote; nothing in the file is executed.

        Args:
            path: The file.

        Returns:
            The working sets.

        Raises:
            MeasurementError: The file is not one of these.
        """
        try:
            content = json.loads(Path(path).read_text())
            if content["format"] != FORMAT:
                raise MeasurementError(f"the format is {content['format']!r}, expected {FORMAT!r}")
            sets = [WorkingSet(name, _from_json(reuse)) for name, reuse in content["tables"].items()]
            batch_size = content.get("batch_size")  # older files have none
            if batch_size is not None:
                check_count("batch_size", batch_size, 1)
            return cls(sets, check_count("world_size", content["world_size"], 1), batch_size)
        except OSError as error:
            raise MeasurementError(
                f"{path}: cannot be read ({error}). Give the path of a saved measurement."
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
            raise MeasurementError(
                f"{path}: not a measurement of working sets ({type(error).__name__}: {error}). Measure anew."
            ) from error


def measure_working_set(
    batches: Iterable[Any],
    module_or_tables: nn.Module | Sequence[BaseEmbeddingConfig],
    lookahead: int = 2,
    *,
    num_batches_seen_ahead: int = 0,
    world_size: int = 1,
    max_batches: int = 300,
    get_features: Callable[[Any], Any] | None = None,
) -> WorkingSets:
    """Read batches once and count what each table's rows are used for.

    Nothing trains, no GPU and no process group is needed. Where the model has managed collision, ids are remapped as
    training would remap them. Memory grows with the distinct ids, not with lookups. Every
    random number generator is where it was afterwards, a data loader's own too. An iterator has moved on, and making
    one has drawn a seed: give the loader and `max_batches`, never `itertools.islice(loader, n)`.

    Args:
        batches: As the data loader of one rank gives them. Ids are found by the names of features, in all
            KeyedJaggedTensors of a batch: the batch itself, its attributes, fields, lists, tuples and dictionaries,
            nested in any way.
        module_or_tables: A model with embedding collections that are not sharded, or their tables' configs.
        lookahead: As the pipeline will have it.
        num_batches_seen_ahead: As the pipeline will have it.
        world_size: Ranks of the job: so many batches are taken for what they train in one step.
        max_batches: Of these steps; reading ends there.
        get_features: For batches without KeyedJaggedTensors, or with several that have the same feature: takes a batch
            and returns the KeyedJaggedTensor that the model looks up, or several.

    Returns:
        By table.

    Raises:
        ConfigError: A setting is not a number that it could be.
        MeasurementError: There is no batch, no table, or a batch lacks a feature or has it twice.
        IdOutOfRangeError: Names the table, the feature and the id.
    """
    _check_settings(lookahead, num_batches_seen_ahead, world_size)
    check_count("max_batches", max_batches, 1)
    configs = table_configs(module_or_tables)
    meters = {config.name: ReuseMeter(config.num_embeddings, lookahead, num_batches_seen_ahead) for config in configs}
    with random_states_kept(batches):
        found = (find_tensors(batch, get_features) for batch in batches)
        batch_size = _count(found, configs, meters, world_size, max_batches, remappings_of(module_or_tables))
    return WorkingSets((WorkingSet(name, meter.result()) for name, meter in meters.items()), world_size, batch_size)


def _count(
    batches: Iterator[dict[str, KeyedJaggedTensor]],
    configs: Sequence[BaseEmbeddingConfig],
    meters: Mapping[str, ReuseMeter],
    world_size: int,
    max_batches: int,
    remappings: Sequence[Remapping],
) -> int | None:
    """Read as many steps as there are, or `max_batches`.

    Returns the samples of a batch, where its tensors agree in them.
    """
    names = {name for config in configs for name in config.feature_names}
    step: list[dict[str, KeyedJaggedTensor]] = []
    num_steps, batch_sizes, is_known = 0, {0}, True
    # A step takes one batch from the loader for each rank, as the job will.
    for tensors in batches:
        step.append(tensors)
        sizes = num_samples(tensors, names)
        is_known &= len(sizes) <= 1
        batch_sizes |= sizes
        if len(step) == world_size:
            _add_step(step, configs, meters, names, remappings)
            step = []
            num_steps += 1
            if num_steps == max_batches:
                break
    if num_steps == 0:
        raise MeasurementError(
            f"{len(step)} batches were given, {world_size} make one step. Give at least as many; 100 steps or more "
            "tell what happens once a scratchpad is full."
        )
    return max(batch_sizes) if is_known else None  # the last batch may have fewer


def zipf_working_sets(
    tables: Sequence[BaseEmbeddingConfig],
    ids_per_batch: Mapping[str, float],
    exponent: float,
    lookahead: int = 2,
    num_batches_seen_ahead: int = 0,
    world_size: int = 1,
    batch_size: int | None = None,
) -> WorkingSets:
    """Assume that every table's rows are looked up by a Zipf law, where no data can be measured.

    Args:
        tables: Their configs.
        ids_per_batch: Lookups in one rank's batch, by table.
        exponent: Of the law; Criteo's tables lie around 1.05, 0 is uniform.
        lookahead: As the pipeline will have it.
        num_batches_seen_ahead: As the pipeline will have it.
        world_size: Ranks of the job.
        batch_size: Samples in one rank's batch, for the planner to compare.

    Returns:
        By table.

    Raises:
        ConfigError: A setting is not a number that it could be, or a table's number of lookups is missing.
        MeasurementError: There is no table, or there are two of one name.
    """
    _check_settings(lookahead, num_batches_seen_ahead, world_size)
    check_number("exponent", exponent)
    if batch_size is not None:
        check_count("batch_size", batch_size, 1)
    sets = []
    for table in table_configs(tables):
        if table.name not in ids_per_batch:
            raise ConfigError(
                f"table {table.name}: ids_per_batch does not name it, it names {', '.join(ids_per_batch) or 'none'}. "
                "Say how many of its rows are looked up per batch."
            )
        num_ids = check_number(f"table {table.name}: ids_per_batch", ids_per_batch[table.name])
        reuse = zipf_reuse(table.num_embeddings, num_ids * world_size, exponent, lookahead, num_batches_seen_ahead)
        sets.append(WorkingSet(table.name, reuse))
    return WorkingSets(sets, world_size, batch_size)


def _check_settings(lookahead: int, num_batches_seen_ahead: int, world_size: int) -> None:
    check_count("lookahead", lookahead, 1)
    check_count("num_batches_seen_ahead", num_batches_seen_ahead, 0, MAX_BATCHES_SEEN_AHEAD + 1)
    check_count("world_size", world_size, 1)


def table_configs(module_or_tables: nn.Module | Sequence[BaseEmbeddingConfig]) -> list[BaseEmbeddingConfig]:
    """The configs of all tables. Raises MeasurementError."""
    if isinstance(module_or_tables, nn.Module):
        placed = _placed_configs(module_or_tables)
    else:
        placed = [(f"config {index}", config) for index, config in enumerate(module_or_tables)]
    if not placed:
        raise MeasurementError(
            "no embedding table was given. Give a model before it is sharded, or the configs of its tables."
        )
    places: dict[str, str] = {}
    for place, config in placed:
        if config.name in places:
            raise MeasurementError(
                f"table {config.name} is in {places[config.name]} and in {place}, and measurements, constraints and "
                "plans are kept by table name. Rename one of them."
            )
        places[config.name] = place
    return [config for _, config in placed]


def has_tables(module: nn.Module) -> bool:
    """Whether it is an embedding collection that is not sharded."""
    return isinstance(module, EmbeddingBagCollectionInterface | EmbeddingCollectionInterface)


def configs_of(module: nn.Module) -> Sequence[BaseEmbeddingConfig]:
    """The configs of its own tables, if it is an embedding collection that is not sharded."""
    if isinstance(module, EmbeddingBagCollectionInterface):
        return list(module.embedding_bag_configs())
    return list(module.embedding_configs()) if isinstance(module, EmbeddingCollectionInterface) else []


def _placed_configs(model: nn.Module) -> list[tuple[str, BaseEmbeddingConfig]]:
    """With the path of their collection; what a collection is made of is not looked at."""
    placed: list[tuple[str, BaseEmbeddingConfig]] = []
    prefixes: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(prefix) for prefix in prefixes):
            continue
        if has_tables(module):
            prefixes.append(f"{path}." if path else "")
            placed.extend((path or "the model itself", config) for config in configs_of(module))
    return placed


def _add_step(
    step: Sequence[Mapping[str, KeyedJaggedTensor]],
    configs: Sequence[BaseEmbeddingConfig],
    meters: Mapping[str, ReuseMeter],
    names: set[str],
    remappings: Sequence[Remapping],
) -> None:
    ids_of_batches = [ids_of_features(tensors, names) for tensors in step]
    for remapping in remappings:
        ids_of_batches = [remapping.apply(ids) for ids in ids_of_batches]
    for config in configs:
        ids_of_table = []
        for name in config.feature_names:
            for tensors, ids_of_feature in zip(step, ids_of_batches, strict=True):
                if name not in ids_of_feature:
                    raise _without_feature(config.name, name, tensors)
                ids = _ids(name, ids_of_feature[name])
                if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < config.num_embeddings:
                    bad = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
                    raise IdOutOfRangeError(
                        f"table {config.name}, feature {name}: id {bad} is not in [0, {config.num_embeddings}). Give "
                        "the ids that the model looks up, hashed as it hashes them."
                    )
                ids_of_table.append(ids.astype(np.int64, copy=False))
        meters[config.name].add(np.concatenate(ids_of_table))


def _without_feature(table_name: str, name: str, tensors: Mapping[str, KeyedJaggedTensor]) -> MeasurementError:
    features = [key for tensor in tensors.values() for key in tensor.keys()]  # noqa: SIM118 - no mapping
    return MeasurementError(
        f"table {table_name}: a batch has no feature {name}, it has {few(features)} in "
        f"{few(tensors)}.{did_you_mean(name, features)} Give batches as the model takes them, or get_features, which "
        "takes a batch and returns the KeyedJaggedTensor that the model looks up."
    )


def _ids(feature_name: str, values: torch.Tensor) -> Any:
    is_integral = not (values.is_floating_point() or values.is_complex() or values.dtype is torch.bool)
    if not is_integral and values.numel() > 0:
        raise MeasurementError(
            f"feature {feature_name}: ids are {values.dtype}, expected integers. Give batches as the model takes them."
        )
    return values.cpu().numpy()  # unsigned ones as they are, so that those beyond int64 can be told


def _to_json(reuse: Reuse) -> dict[str, Any]:
    content = dataclasses.asdict(reuse)
    for name in ("bin_sizes", "first_uses"):
        content[name] = np.round(content[name], 3).tolist()
    content["windows"] = [list(window) for window in reuse.windows]
    content["curves"] = {
        name: {"kept": np.round(curve.kept, 1).tolist(), "missed": np.round(curve.missed, 2).tolist()}
        for name, curve in reuse.curves.items()
    }
    return content


def _from_json(content: dict[str, Any]) -> Reuse:
    fields = {field.name for field in dataclasses.fields(Reuse)}
    if content.keys() != fields:
        raise KeyError(", ".join(sorted(content.keys() ^ fields)))
    for name, least in (("num_rows", 1), ("num_batches", 1), ("lookahead", 0), ("num_distinct", 0)):
        check_count(name, content[name], least)
    check_count("num_batches_seen_ahead", content["num_batches_seen_ahead"], 0, MAX_BATCHES_SEEN_AHEAD + 1)
    check_number("num_ids", content["num_ids"])
    bin_sizes = _array("bin_sizes", content["bin_sizes"], 1)
    first_uses = _array("first_uses", content["first_uses"], 1)
    if bin_sizes.size == 0 or bin_sizes.min() <= 0 or bin_sizes.shape != first_uses.shape:
        raise ValueError(f"bin_sizes are {bin_sizes.tolist()}, first_uses {first_uses.tolist()}")
    curves = {
        name: Curve(*(_array(f"curve {name}", curve[part], 2) for part in Curve._fields))
        for name, curve in content["curves"].items()
    }
    if curves.keys() != {"ours", "lru", "optimum"}:
        raise ValueError(f"curves are {', '.join(curves)}")
    for name, curve in curves.items():
        if curve.kept.shape != curve.missed.shape or len(curve.kept) != bin_sizes.size or curve.kept.size == 0:
            raise ValueError(f"curve {name} has shapes {curve.kept.shape} and {curve.missed.shape}")
    rows = _array("windows", content["windows"], 2)
    if (
        rows.shape[1:] != (len(Window._fields),)
        or rows.size == 0
        or rows[0, 0] != 1
        or np.any(np.diff(rows[:, 0]) <= 0)
    ):
        raise ValueError("windows are not those of rising numbers of batches, from 1 on")
    windows = tuple(Window(int(row[0]), *map(float, row[1:])) for row in rows)
    arrays = {"bin_sizes": bin_sizes, "first_uses": first_uses}
    return Reuse(**{**content, **arrays, "curves": curves, "windows": windows})


def _array(name: str, values: Any, num_dims: int) -> Floats:
    array = np.array(values, dtype=np.float64)
    if array.ndim != num_dims or not np.all(np.isfinite(array)) or np.any(array < 0):
        raise ValueError(f"{name} are not finite numbers from 0 on, in {num_dims} dimensions")
    return array


def _what_must_agree(reuse: Reuse) -> tuple[Any, ...]:
    shapes = tuple((name, curve.kept.shape) for name, curve in reuse.curves.items())
    return (reuse.lookahead, reuse.num_batches_seen_ahead, reuse.num_batches, shapes)

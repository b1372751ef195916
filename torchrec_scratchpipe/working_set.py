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

from torchrec_scratchpipe.errors import IdOutOfRangeError, MeasurementError
from torchrec_scratchpipe.popularity import zipf_reuse
from torchrec_scratchpipe.reuse import Curve, Reuse, ReuseMeter, Window, misses_of_pool

__all__ = ["WorkingSet", "WorkingSets", "measure_working_set", "table_configs", "zipf_working_sets"]

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
        sizes = self.reuse.bin_sizes
        half = len(sizes) // 2
        return float(np.average(per_bin[half:], weights=sizes[half:]))


class WorkingSets(Mapping[str, WorkingSet]):
    """The working sets of a model's tables, measured together, by table name.

    Args:
        sets: One per table.
        world_size: How many ranks' batches make one of those that were counted.
    """

    def __init__(self, sets: Iterable[WorkingSet], world_size: int = 1) -> None:
        self._sets = {working_set.table_name: working_set for working_set in sets}
        self.world_size = world_size
        reuse = next(iter(self._sets.values())).reuse
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
                raise MeasurementError(
                    f"{path}: the format is {content['format']!r}, expected {FORMAT!r}. Measure anew."
                )
            sets = [WorkingSet(name, _from_json(reuse)) for name, reuse in content["tables"].items()]
            return cls(sets, int(content["world_size"]))
        except OSError as error:
            raise MeasurementError(
                f"{path}: cannot be read ({error}). Give the path of a saved measurement."
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
            if isinstance(error, MeasurementError):
                raise
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
    get_features: Callable[[Any], KeyedJaggedTensor] | None = None,
) -> WorkingSets:
    """Read batches once and count what each table's rows are used for.

    Nothing trains, no GPU and no process group is needed. Memory grows with the distinct ids, not with lookups.

    Args:
        batches: As the data loader of one rank gives them.
        module_or_tables: A model with embedding collections that are not sharded, or their tables' configs.
        lookahead: As the pipeline will have it.
        num_batches_seen_ahead: As the pipeline will have it.
        world_size: Ranks of the job: so many batches are taken for what they train in one step.
        max_batches: Of these steps; reading ends there.
        get_features: The ids of a batch, by default the batch itself or its attribute `sparse_features`.

    Returns:
        By table.

    Raises:
        MeasurementError: There is no batch, no table, or a batch lacks a feature.
        IdOutOfRangeError: Names the table, the feature and the id.
    """
    configs = table_configs(module_or_tables)
    meters = {config.name: ReuseMeter(config.num_embeddings, lookahead, num_batches_seen_ahead) for config in configs}
    get_features = get_features or _features_of
    step: list[KeyedJaggedTensor] = []
    num_steps = 0
    for batch in batches:
        step.append(get_features(batch))
        if len(step) == world_size:
            _add_step(step, configs, meters)
            step = []
            num_steps += 1
            if num_steps == max_batches:
                break
    if num_steps == 0:
        raise MeasurementError(
            f"{len(step)} batches were given, {world_size} make one step. Give at least as many; 100 steps or more tell "
            "what happens once a scratchpad is full."
        )
    return WorkingSets((WorkingSet(name, meter.result()) for name, meter in meters.items()), world_size)


def zipf_working_sets(
    tables: Sequence[BaseEmbeddingConfig],
    ids_per_batch: Mapping[str, float],
    exponent: float,
    lookahead: int = 2,
    num_batches_seen_ahead: int = 0,
    world_size: int = 1,
) -> WorkingSets:
    """Assume that every table's rows are looked up by a Zipf law, where no data can be measured.

    Args:
        tables: Their configs.
        ids_per_batch: Lookups in one rank's batch, by table.
        exponent: Of the law; Criteo's tables lie around 1.05, 0 is uniform.
        lookahead: As the pipeline will have it.
        num_batches_seen_ahead: As the pipeline will have it.
        world_size: Ranks of the job.

    Returns:
        By table.
    """
    return WorkingSets(
        (
            WorkingSet(
                table.name,
                zipf_reuse(
                    table.num_embeddings,
                    ids_per_batch[table.name] * world_size,
                    exponent,
                    lookahead,
                    num_batches_seen_ahead,
                ),
            )
            for table in table_configs(tables)
        ),
        world_size,
    )


def table_configs(module_or_tables: nn.Module | Sequence[BaseEmbeddingConfig]) -> list[BaseEmbeddingConfig]:
    """The configs of all tables.

    Args:
        module_or_tables: A model with embedding collections that are not sharded, or the configs themselves.

    Returns:
        One per table.

    Raises:
        MeasurementError: There is none, or there are two of one name.
    """
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
                f"table {config.name} is in {places[config.name]} and in {place}, and measurements, constraints and plans "
                "are kept by table name. Rename one of them."
            )
        places[config.name] = place
    return [config for _, config in placed]


def _placed_configs(model: nn.Module) -> list[tuple[str, BaseEmbeddingConfig]]:
    """With the path of their collection; what a collection is made of is not looked at."""
    placed: list[tuple[str, BaseEmbeddingConfig]] = []
    prefixes: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(prefix) for prefix in prefixes):
            continue
        if isinstance(module, EmbeddingBagCollectionInterface):
            configs: Sequence[BaseEmbeddingConfig] = module.embedding_bag_configs()
        elif isinstance(module, EmbeddingCollectionInterface):
            configs = module.embedding_configs()
        else:
            continue
        prefixes.append(f"{path}." if path else "")
        placed.extend((path or "the model itself", config) for config in configs)
    return placed


def _features_of(batch: Any) -> KeyedJaggedTensor:
    features = batch if isinstance(batch, KeyedJaggedTensor) else getattr(batch, "sparse_features", None)
    if not isinstance(features, KeyedJaggedTensor):
        raise MeasurementError(
            f"a batch is a {type(batch).__name__} without a KeyedJaggedTensor sparse_features. Give get_features, which "
            "takes a batch and returns its KeyedJaggedTensor."
        )
    return features


def _add_step(
    step: Sequence[KeyedJaggedTensor], configs: Sequence[BaseEmbeddingConfig], meters: Mapping[str, ReuseMeter]
) -> None:
    ids_of_feature: dict[str, list[Any]] = {}
    for features in step:
        for name, feature in features.to_dict().items():
            ids_of_feature.setdefault(name, []).append(feature.values().to(torch.int64).cpu().numpy())
    for config in configs:
        ids_of_table = []
        for name in config.feature_names:
            if name not in ids_of_feature:
                raise MeasurementError(
                    f"table {config.name}: a batch has no feature {name}, it has {', '.join(sorted(ids_of_feature))}. Give "
                    "batches as the model takes them."
                )
            ids = np.concatenate(ids_of_feature[name])
            if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < config.num_embeddings:
                bad = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
                raise IdOutOfRangeError(
                    f"table {config.name}, feature {name}: id {bad} is not in [0, {config.num_embeddings}). Give the ids "
                    "that the model looks up, hashed as it hashes them."
                )
            ids_of_table.append(ids)
        meters[config.name].add(np.concatenate(ids_of_table))


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
    arrays = {name: np.array(content[name], dtype=np.float64) for name in ("bin_sizes", "first_uses")}
    curves = {
        name: Curve(np.array(curve["kept"], dtype=np.float64), np.array(curve["missed"], dtype=np.float64))
        for name, curve in content["curves"].items()
    }
    windows = tuple(Window(int(window[0]), *map(float, window[1:])) for window in content["windows"])
    return Reuse(**{**content, **arrays, "curves": curves, "windows": windows})

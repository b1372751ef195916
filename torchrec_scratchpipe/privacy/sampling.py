# SPDX-License-Identifier: BSD-3-Clause
"""Batches as differential privacy needs them: every example is in a batch by a toss of its own."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils.data import Sampler
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_scratchpipe.errors import ConfigError

__all__ = ["PoissonSampler", "collate_with_empty", "without_examples"]


class PoissonSampler(Sampler[list[int]]):
    """Poisson samples of a data set, for ``batch_sampler=`` of a DataLoader.

    Each step draws anew: each example is in the batch with probability ``sample_rate``, whatever the others do and
    whatever was before. So sizes of batches differ, and a batch may be empty: give the DataLoader a ``collate_fn`` of
    :func:`collate_with_empty`. The draw of a step depends on the seed and the step only. All ranks make the same draw,
    and each keeps the examples whose index is its own rank modulo the number of ranks.

    Privacy needs a seed that nobody can guess. NumPy's PCG64 is not made for cryptography.

    Args:
        num_examples: Size of the data set, over all ranks.
        sample_rate: Probability of each example.
        num_steps: Batches of the whole training.
        seed: Not negative.
        rank: This rank.
        num_ranks: How many ranks divide the batches.
        start_step: Batches that were trained in an earlier run; they are left out. It may be set later, before the next
            iteration. A DataLoader's workers are ahead of the training, so only the job knows this number.

    Attributes:
        expected_batch_size: Mean size of a batch over all ranks.
        sample_rate: Probability of each example.
        start_step: The next iteration begins here.

    Raises:
        ConfigError: A value cannot be.
    """

    def __init__(
        self,
        num_examples: int,
        sample_rate: float,
        num_steps: int,
        seed: int,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        start_step: int = 0,
    ) -> None:
        for name, value, is_good, need in (
            ("num_examples", num_examples, num_examples >= 0, "0 or more"),
            ("sample_rate", sample_rate, 0 <= sample_rate <= 1, "from 0 to 1"),
            ("num_steps", num_steps, num_steps >= 0, "0 or more"),
            ("seed", seed, seed >= 0, "0 or more"),
            ("num_ranks", num_ranks, num_ranks >= 1, "1 or more"),
            ("rank", rank, 0 <= rank < num_ranks, f"from 0 to {num_ranks - 1}"),
            ("start_step", start_step, 0 <= start_step <= num_steps, f"from 0 to {num_steps}"),
        ):
            if not is_good:
                raise ConfigError(f"PoissonSampler: {name} is {value}, needs to be {need}. Set {name}.")
        self.num_examples = num_examples
        self.sample_rate = sample_rate
        self.expected_batch_size = num_examples * sample_rate
        self.num_steps = num_steps
        self.start_step = start_step
        self._seed = seed
        self._rank = rank
        self._num_ranks = num_ranks

    def __len__(self) -> int:
        return self.num_steps - self.start_step

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start_step, self.num_steps):
            yield self.sample(step).tolist()

    def sample(self, step: int) -> npt.NDArray[np.int64]:
        """The part of a step's batch that this rank has.

        Args:
            step: Which step of the training.

        Returns:
            Indices of examples, int64, ascending.
        """
        # Each rank draws the whole batch and keeps its part, so that the batch does not depend on the number of ranks.
        generator = np.random.default_rng([self._seed, step])
        found = sample_indices(self.num_examples, self.sample_rate, generator)
        return found if self._num_ranks == 1 else found[found % self._num_ranks == self._rank]


def sample_indices(num_examples: int, sample_rate: float, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """Toss for each example; costs what is sampled, not what there is.

    The distance from one example that is taken to the next has the geometric distribution.

    Args:
        num_examples: How many there are.
        sample_rate: Probability of each.
        generator: Makes the draws.

    Returns:
        Indices, int64, ascending.
    """
    if num_examples == 0 or sample_rate == 0:
        return np.empty(0, dtype=np.int64)
    pieces: list[npt.NDArray[np.int64]] = []
    last = -1
    # So many draws as are nearly always enough: four standard deviations above what is expected.
    while last < num_examples:
        expected = (num_examples - 1 - last) * sample_rate
        count = int(expected + 4 * expected**0.5) + 16
        steps = generator.geometric(sample_rate, count)
        pieces.append(last + np.minimum(steps, num_examples + 1).cumsum())  # a distance may be near 2**63
        last = int(pieces[-1][-1])
    found = np.concatenate(pieces)
    return found[: np.searchsorted(found, num_examples)]


def collate_with_empty(collate: Callable[[list[Any]], Any], example: Any) -> Callable[[list[Any]], Any]:
    """A ``collate_fn`` that can make a batch of no examples; torch's default one cannot.

    Args:
        collate: Makes a batch of a list of examples.
        example: Any example of the data set. An empty batch is what is left of its batch without it.

    Returns:
        A function that makes a batch of a list of examples, which may be empty.
    """
    return functools.partial(_collate, collate, example)


def _collate(collate: Callable[[list[Any]], Any], example: Any, examples: list[Any]) -> Any:
    return collate(examples) if examples else without_examples(collate([example]))


def without_examples(batch: Any) -> Any:
    """A batch of no examples, made like another.

    Args:
        batch: A tensor whose first dimension is that of examples; jagged tensors of TorchRec; or a dataclass, tuple,
            list or mapping of such. None stays None.

    Returns:
        The same, with 0 examples.

    Raises:
        ConfigError: It has something else in it.
    """
    if batch is None:
        return None
    if isinstance(batch, Tensor):
        return batch[:0]
    if isinstance(batch, KeyedJaggedTensor):
        weights = batch.weights_or_none()
        return KeyedJaggedTensor(
            keys=batch.keys(),
            values=batch.values()[:0],
            lengths=batch.lengths()[:0],
            weights=None if weights is None else weights[:0],
        )
    if isinstance(batch, JaggedTensor):
        weights = batch.weights_or_none()
        return JaggedTensor(
            values=batch.values()[:0], lengths=batch.lengths()[:0], weights=None if weights is None else weights[:0]
        )
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        names = [field.name for field in dataclasses.fields(batch)]
        return dataclasses.replace(batch, **{name: without_examples(getattr(batch, name)) for name in names})
    if isinstance(batch, Mapping):
        return {key: without_examples(value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(without_examples, batch))
    if isinstance(batch, tuple | list):
        return type(batch)(map(without_examples, batch))
    raise ConfigError(
        f"An empty batch: cannot be made of {type(batch).__name__}, needs tensors, or dataclasses, tuples, lists and "
        "mappings of them. Give a collate_fn of your own that takes an empty list."
    )

# SPDX-License-Identifier: BSD-3-Clause
"""A private training step: one backward, whose gradients are clipped by example on the way to the tables.

The model gets each collection's output cut off from the collection. Then

1.  backward runs through the dense layers to the cuts; norms of each example's gradient come from what was recorded;
2.  dense gradients are made of the recorded parts, with the factors that clip them, and get noise;
3.  backward goes on from the cuts, with the same factors, through distribution and fused update.

Shapes: ``B`` examples of this rank, ``D`` row width.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function
from torchrec.distributed.comm_ops import get_gradient_division
from torchrec.distributed.model_parallel import get_unwrapped_module
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_scratchpipe.errors import ConfigError, PrivacyError
from torchrec_scratchpipe.privacy.accounting import epsilon
from torchrec_scratchpipe.privacy.checks import check_model
from torchrec_scratchpipe.privacy.cuts import Cut, cut_output
from torchrec_scratchpipe.privacy.delayed_noise import DelayedNoise, Places, Steps
from torchrec_scratchpipe.privacy.dense import DenseLayers
from torchrec_scratchpipe.privacy.random_numbers import normal_numbers
from torchrec_scratchpipe.privacy.settings import PrivacySettings, draw_seed
from torchrec_scratchpipe.sharding.collection import ScratchpadCollection
from torchrec_scratchpipe.sharding.kernel import ScratchpadKernel
from torchrec_scratchpipe.sharding.model import scratchpad_collections

__all__ = ["PrivateTraining"]

logger: logging.Logger = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_DENSE_NUMBER = 2**31  # numbers below are of tables, those from here on of dense parameters
DENSE_ROW = 4096  # numbers of a dense parameter are drawn in rows of so many


class _Kernel(NamedTuple):
    kernel: ScratchpadKernel
    steps: Steps
    tables: list[int]  # their numbers in the model


class PrivateTraining:
    """Takes the private steps of a model; see :class:`PrivateSteps`.

    Args:
        settings: What the user said.
        model: Of DistributedModelParallel.
        device: Where it trains.

    Raises:
        ConfigError: A part of the model cannot be trained in private; names it.
    """

    def __init__(self, settings: PrivacySettings, model: nn.Module, device: torch.device) -> None:
        self._device = device
        self._collections = scratchpad_collections(model)
        check_model(model, self._collections)
        wrappers = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
        self._process_group = wrappers[0].process_group if wrappers else None
        self.settings = self._with_common_seed(settings)
        self._dense = DenseLayers(get_unwrapped_module(model), cast(list[nn.Module], self._collections))
        self._wrappers = wrappers
        self._batch_size = settings.expected_batch_size or (1.0 if settings.loss_reduction == "sum" else None)
        self._cuts: list[Cut] = []
        self._is_in_forward = False
        self._is_in_update = False
        self.num_steps = 0
        self._kernels = [self._attach(kernel, tables) for kernel, tables in _kernels_of(model, self._collections)]
        for collection in self._collections:
            collection.private_steps = self

    @classmethod
    def start(cls, settings: PrivacySettings, model: nn.Module, device: torch.device) -> "PrivateTraining":
        """Begin, or go on with what an earlier pipeline began.

        Args:
            settings: As the constructor.
            model: As the constructor.
            device: As the constructor.

        Returns:
            What takes the steps.

        Raises:
            ConfigError: As the constructor; or the model was trained in private with other settings.
        """
        for collection in scratchpad_collections(model):
            begun = collection.private_steps
            if isinstance(begun, PrivateTraining):
                if settings not in (begun.settings, replace(begun.settings, seed=None)):
                    raise ConfigError(
                        f"privacy: the model has been trained with {begun.settings}, and is now to be trained with "
                        f"{settings}, which no epsilon would be known of. Give the same, with the same seed."
                    )
                return begun
        return cls(settings, model, device)

    def _with_common_seed(self, settings: PrivacySettings) -> PrivacySettings:
        """All ranks draw the same noise. Raises ConfigError."""
        drawn = settings if settings.seed is not None else replace(settings, seed=draw_seed())
        seeds = self._gather((settings.seed, drawn.seed))
        if len({given for given, _ in seeds}) > 1:
            raise ConfigError("LazyDP: ranks were given different seeds. Give all the same, or None to all.")
        return replace(settings, seed=seeds[0][1])

    def _attach(self, kernel: ScratchpadKernel, tables: dict[str, int]) -> _Kernel:
        steps = Steps()
        for pool, positions in zip(kernel.pools, kernel.pool_tables, strict=True):
            configs = [kernel._config.embedding_tables[position] for position in positions]
            places = [config.local_metadata.shard_offsets if config.local_metadata else [0, 0] for config in configs]
            pool.late = DelayedNoise(
                pool.host_table.row_offsets,
                [tables[config.name] for config in configs],
                [place[0] for place in places],
                [place[1] for place in places],
                pool.host_table.layout.dim,
                pool.slot_map.device,
                steps,
                self._noise_of,
                lambda: self._is_in_update,
            )
        return _Kernel(kernel, steps, [tables[config.name] for config in kernel._config.embedding_tables])

    def _noise_of(self, places: Places, since: Tensor, until: int, dim: int, squared_rates: Tensor) -> Tensor:
        assert self._batch_size is not None, "there was a step, and no batch"
        return self.settings.noise(self._batch_size)(places, since, until, dim, squared_rates)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """See :class:`PrivateSteps`.

        Yields:
            Nothing.
        """
        self._forget()
        self._is_in_forward = True
        try:
            with ExitStack() as stack:
                for wrapper in self._wrappers:
                    stack.enter_context(_stepped_over(wrapper))
                stack.enter_context(self._dense.recording())
                yield
        except BaseException:
            self._forget()
            raise
        finally:
            self._is_in_forward = False

    def cut(self, collection: ScratchpadCollection, features: KeyedJaggedTensor, output: Any) -> Any:
        """See :class:`PrivateSteps`.

        Args:
            collection: Whose output it is.
            features: What the collection was given.
            output: A KeyedTensor, or a dictionary of JaggedTensors.

        Returns:
            The same, of new leaves.
        """
        if not self._is_in_forward or not torch.is_grad_enabled():
            return output
        if any(cut.collection is collection for cut in self._cuts):
            raise PrivacyError(
                "a collection is called twice in one forward, so that the gradient of an example has two parts that "
                "are not put together. Call it once, with all features."
            )
        cut, output = cut_output(collection, features, output)
        self._cuts.append(cut)
        return output

    def backward(self, losses: Tensor) -> None:
        """See :class:`PrivateSteps`.

        Args:
            losses: What the model has returned.

        Raises:
            PrivacyError: No collection has an output that the loss depends on, or batch sizes differ.
        """
        # One backward, down to what lookups have returned; then each example's gradient is made shorter, and a second
        # backward, of tables alone, updates rows. So rows are updated once, with gradients that were clipped.
        try:
            with record_function("## backward ##"):
                torch.sum(losses, dim=0).backward()
            num_examples = self._num_examples()
            with record_function("## clip ##"), torch.no_grad():
                factors = self._factors(num_examples)
                self._set_dense_gradients(factors)
            self._update_tables(factors)
        finally:
            self._forget()
        self.num_steps += 1

    def catch_up(self) -> None:
        """See :class:`PrivateSteps`."""
        for collection in self._collections:
            collection.catch_up()

    def state_dict(self, *, for_release: bool) -> dict[str, Any]:
        """See :class:`PrivateSteps`.

        Args:
            for_release: As there.

        Returns:
            Plain data.
        """
        mine = {number: steps.squared_rates for _, steps, numbers in self._kernels for number in numbers}
        found = self._gather(mine)
        # Tables mostly have the same rates.
        distinct: list[Tensor] = []
        of_table: dict[int, int] = {}
        for some in found:
            for number, rates in some.items():
                same = next((index for index, other in enumerate(distinct) if torch.equal(other, rates)), None)
                of_table[number] = len(distinct) if same is None else same
                distinct.extend([rates.clone()] if same is None else [])
        return {
            "num_steps": self.num_steps,
            "batch_size": self._batch_size,
            "noise_multiplier": self.settings.noise_multiplier,
            "clip": self.settings.clip,
            "sample_rate": self.settings.sample_rate,
            "squared_rates": distinct,
            "squared_rates_of_table": of_table,
            "seed_check": "" if for_release else self.settings.seed_check,
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """See :class:`PrivateSteps`.

        Args:
            state: From :meth:`state_dict`.

        Raises:
            ConfigError: It is of other settings.
        """
        settings = self.settings
        for name, here in {
            "noise_multiplier": settings.noise_multiplier,
            "clip": settings.clip,
            "sample_rate": settings.sample_rate,
            "batch_size": settings.expected_batch_size or state["batch_size"],
        }.items():
            if state[name] != here:
                raise ConfigError(
                    f"privacy: the checkpoint was trained with {name}={state[name]}, and the pipeline has {here}, "
                    "which no epsilon would be known of. Give the same."
                )
        if state["seed_check"] and state["seed_check"] != settings.seed_check:
            raise ConfigError(
                "privacy: the checkpoint was trained with another seed than the pipeline has. Give the same, so that "
                "the noise goes on as it would have."
            )

    def load_state_dict(self, state: dict[str, Any], *, is_pending: bool) -> None:
        """See :class:`PrivateSteps`.

        Args:
            state: From :meth:`state_dict`.
            is_pending: As there.
        """
        self.num_steps, self._batch_size = state["num_steps"], state["batch_size"]
        for _, steps, numbers in self._kernels:
            steps.load(state["squared_rates"][state["squared_rates_of_table"][numbers[0]]])
        self._note_loaded(is_pending=is_pending)

    def note_loaded(self) -> None:
        """See :class:`PrivateSteps`."""
        self._note_loaded(is_pending=False)

    def _note_loaded(self, *, is_pending: bool) -> None:
        for kernel, steps, _ in self._kernels:
            for pool in kernel.pools:
                assert pool.late is not None
                if not is_pending:
                    pool.late.updated_to.fill_(steps.num_steps)
                pool.late.note_loaded()

    def epsilon(self, delta: float) -> float:
        """See :class:`PrivateSteps`.

        Args:
            delta: The probability that the promise does not hold.

        Returns:
            Epsilon.
        """
        return epsilon(
            noise_multiplier=self.settings.noise_multiplier,
            sample_rate=self.settings.sample_rate,
            num_steps=self.num_steps,
            delta=delta,
            accountant=self.settings.accountant,
        )

    def _num_examples(self) -> int:
        """B."""
        sizes = {cut.num_examples for cut in self._cuts}
        if len(sizes) != 1:
            raise PrivacyError(
                f"a private step needs one batch size, its collections were given {sorted(sizes) or 'nothing'}. Look "
                "all features up for the same examples."
            )
        return sizes.pop()

    def _factors(self, num_examples: int) -> Tensor:
        """[B] float32. What an example's gradient, as backward gave it, is multiplied with: clip, and division."""
        # 1. The square of an example's norm is the sum of its parts' squares. A loss that is a mean over examples has
        #    made each gradient B times too short.
        scale = float(num_examples) if self.settings.loss_reduction == "mean" else 1.0
        squares = self._dense.square_norms(num_examples).to(self._device)
        for cut in self._cuts:
            squares = squares + cut.square_norms()
        if self._batch_size is None:
            size = torch.tensor([num_examples], dtype=torch.float64, device=self._device)
            self._sum_over_ranks(size)
            self._batch_size = max(1.0, float(size))
            logger.info(
                "privacy: sums of gradients are divided by %d, the size of the first batch. Give expected_batch_size.",
                int(self._batch_size),
            )
        # 2. Longer gradients than `clip` are made as long as that; all are divided by the batch size that is expected.
        norms = squares.sqrt() * scale
        # A gradient that is not finite has no norm to be clipped to. Such an example counts as none.
        clipped = (self.settings.clip / norms.clamp_(min=self.settings.clip)) * scale / self._batch_size
        return torch.where(norms.isfinite(), clipped, torch.zeros_like(clipped))

    def _set_dense_gradients(self, factors: Tensor) -> None:
        # Sums over the examples of all ranks, and then the noise, once: all ranks draw the same.
        sums = self._dense.sum_of(factors)
        parameters = list(sums)
        if not parameters:
            return
        flat = torch.cat([sums[parameter].float().view(-1) for parameter in parameters])
        self._sum_over_ranks(flat)
        assert self._batch_size is not None
        scale = self.settings.noise_scale(self._batch_size)
        sizes = [parameter.numel() for parameter in parameters]
        noise = self._dense_noise(sizes, flat.device)
        for parameter, noisy in zip(parameters, noise.mul_(scale).add_(flat).split(sizes), strict=True):
            parameter.grad = noisy.view_as(parameter).to(parameter.dtype, copy=True)

    def _dense_noise(self, sizes: Sequence[int], device: torch.device) -> Tensor:
        """[sum of sizes] float32, of one parameter after the other; the same on all ranks."""
        counts = [-(-size // DENSE_ROW) for size in sizes]
        rows = torch.cat([torch.arange(count, dtype=torch.int64) for count in counts]).to(device)
        numbers = torch.arange(FIRST_DENSE_NUMBER, FIRST_DENSE_NUMBER + len(sizes), dtype=torch.int64)
        parameters = numbers.repeat_interleave(torch.tensor(counts, dtype=torch.int64)).to(device)
        steps, columns = torch.full_like(rows, self.num_steps + 1), torch.zeros_like(rows)
        # All at once: most parameters are small, and each call takes its time.
        noise = normal_numbers(rows, parameters, steps, columns, DENSE_ROW, self.settings.known_seed)
        return torch.cat([each.view(-1)[:size] for each, size in zip(noise.split(counts), sizes, strict=True)])

    def _update_tables(self, factors: Tensor) -> None:
        # TorchRec divides what comes back from other ranks by their number, where losses are means.
        factors = factors * (self._num_ranks if get_gradient_division() else 1)
        roots, gradients = [], []
        for cut in self._cuts:
            for root, gradient in cut.gradients(factors):
                roots.append(root)
                gradients.append(gradient)
        rates = [kernel.emb_module.get_learning_rate() for kernel, _, _ in self._kernels]
        self._is_in_update = True
        try:
            with record_function("## backward of tables ##"):
                torch.autograd.backward(roots, gradients)
        finally:
            self._is_in_update = False
        for (_, steps, _), rate in zip(self._kernels, rates, strict=True):
            steps.end(rate)

    @property
    def _num_ranks(self) -> int:
        return dist.get_world_size(self._process_group) if dist.is_initialized() else 1

    def _gather(self, mine: T) -> list[T]:
        """What each rank has. All ranks call it."""
        found = [mine] * self._num_ranks
        if self._num_ranks > 1:
            dist.all_gather_object(found, mine, group=self._process_group)
        return found

    def _sum_over_ranks(self, tensor: Tensor) -> None:
        if self._num_ranks > 1:
            dist.all_reduce(tensor, group=self._process_group)

    def _forget(self) -> None:
        self._cuts.clear()
        self._dense.forget()


@contextmanager
def _stepped_over(wrapper: DistributedDataParallel) -> Iterator[None]:
    """While entered, a forward goes past the wrapper, which would wait for gradients that autograd does not make."""
    wrapper.forward = wrapper.module.__call__  # type: ignore[method-assign]
    try:
        yield
    finally:
        del wrapper.forward


def _kernels_of(
    model: nn.Module, collections: list[ScratchpadCollection]
) -> Iterator[tuple[ScratchpadKernel, dict[str, int]]]:
    """Each lookup, and a number for each of its tables, which is the same on all ranks and for every sharding."""
    paths = {id(module): path for path, module in model.named_modules()}
    names = sorted(
        (paths[id(collection)], table) for collection in collections for table in collection.module_sharding_plan
    )
    for collection in collections:
        path = paths[id(collection)]
        numbers = {table: index for index, (other, table) in enumerate(names) if other == path}
        for kernel in collection.kernels:
            yield kernel, numbers

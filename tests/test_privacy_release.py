# SPDX-License-Identifier: BSD-3-Clause
"""What is released tells no more of one example than the promise says.

Two jobs are alike, but the second one's data lacks one example. With the same noise, their models differ by one clipped
gradient. With noise of its own for each, any weight of them, used or not, differs by two normal numbers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from helpers import Setting, Trainer, drain, full_state, make_batches
from scipy import stats
from torch import Tensor
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_scratchpipe import LazyDP
from torchrec_scratchpipe.privacy import training
from torchrec_scratchpipe.privacy.delayed_noise import DelayedNoise

pytestmark = pytest.mark.usefixtures("process_group")

BATCH_SIZE, CLIP, NOISE_MULTIPLIER, RATE = 16, 0.05, 1.3, 1.0
DEVIATION = NOISE_MULTIPLIER * CLIP / BATCH_SIZE  # of the noise in one weight and one step
LARGEST = 6.66
ROUNDING = 1e-5
LEAST_P = 1e-3
SETTING = Setting(
    num_rows=(2000, 1500, 30),
    optimizer=torch.optim.SGD,
    optimizer_kwargs=(("lr", RATE),),
    batch_size=BATCH_SIZE,
    num_batches=1,
    load_factor=0.2,
)


def without(batch: Batch, example: int) -> Batch:
    """The batch as it would be if one example were not in the data."""
    kept = [index for index in range(batch.labels.numel()) if index != example]
    features = batch.sparse_features
    keys = features.keys()
    lengths = features.lengths().view(len(keys), -1)
    bags = [list(features[key].values().split(lengths[table].tolist())) for table, key in enumerate(keys)]
    values = [of_key[index] for of_key in bags for index in kept]
    fewer = KeyedJaggedTensor(keys, torch.cat(values), lengths=lengths[:, kept].flatten())
    return Batch(batch.dense_features[kept], fewer, batch.labels[kept])


def release(batches: list[Batch], seed: int, setting: Setting = SETTING, **changes: float) -> dict[str, Tensor]:
    """All weights of a model that is trained in private, as they are released."""
    settings = {"clip": CLIP, "noise_multiplier": NOISE_MULTIPLIER, **changes}
    privacy = LazyDP(**settings, sample_rate=0.01, seed=seed, expected_batch_size=BATCH_SIZE)
    trainer = Trainer.scratchpipe(setting)
    for group in trainer.optimizer.param_groups:
        group["lr"] = RATE
    drain(trainer.pipeline(privacy=privacy), batches)
    return {name: value[0].detach().double() for name, value in full_state(trainer).items()}


class Pair(NamedTuple):
    """Data with one example, and without it; the example is in the batch of step 3 of 6."""

    present: list[Batch]
    absent: list[Batch]


def make_pair(num_batches: int, step: int, example: int = 5) -> Pair:
    present = make_batches(SETTING, num_batches=num_batches)
    absent = [without(batch, example) if index == step else batch for index, batch in enumerate(present)]
    return Pair(present, absent)


def differences(left: dict[str, Tensor], right: dict[str, Tensor]) -> Tensor:
    """Of all weights, in one vector."""
    assert left.keys() == right.keys()
    return torch.cat([(left[name] - right[name]).flatten() for name in left])


def check_one_gradient(clip: float = CLIP, noise_multiplier: float = NOISE_MULTIPLIER) -> float:
    """With the same noise, one step's models differ by no more than one clipped gradient. Returns how near it comes."""
    pair = make_pair(1, 0)
    nearest = 0.0
    for example in range(BATCH_SIZE):
        absent = [without(pair.present[0], example)]
        settings = {"clip": clip, "noise_multiplier": noise_multiplier}
        found = differences(release(pair.present, 1, **settings), release(absent, 1, **settings))
        norm = float(found.norm())
        allowed = clip / BATCH_SIZE * RATE
        assert norm <= allowed + ROUNDING, f"example {example} moves the model by {norm:.3g}, may by {allowed:.3g}"
        nearest = max(nearest, norm / allowed)
    return nearest


def check_noise(pair: Pair, num_steps: int) -> Tensor:
    """With noise of its own for each, the models differ by two normal numbers in every weight. Returns differences."""
    left, right = release(pair.present, 1), release(pair.absent, 2)
    deviation = DEVIATION * RATE * num_steps**0.5
    # What the example moves is at most a clipped gradient, and what follows from it; next to nothing for one weight.
    found = differences(left, right) / deviation
    assert found.numel() > 25_000
    largest = float(found.abs().max())
    assert largest < LARGEST * 2**0.5 + 1, f"a weight differs by {largest:.1f} standard deviations of noise"
    num_alike = int((found == 0).sum())
    # Of float32, a difference is a multiple of some 1e-8, and noise of 4e-3.
    assert num_alike < 5, f"{num_alike} weights are alike: they have no noise of their own"
    for name, each in left.items():
        values = ((each - right[name]) / (deviation * 2**0.5)).flatten().numpy()
        p_value = stats.kstest(values, "norm").pvalue
        assert p_value > LEAST_P, f"{name} differs by other than normal numbers, p = {p_value:.1e}"
    return found


@contextmanager
def broken(what: str) -> Iterator[None]:
    """While entered, a part of the mechanism is left out."""
    with pytest.MonkeyPatch.context() as patch:
        if what == "clipping":
            patch.setattr(
                training.PrivateTraining,
                "_factors",
                lambda _self, number: torch.full((number,), number / BATCH_SIZE, dtype=torch.float32),
            )
        elif what == "noise of unused rows":
            patch.setattr(DelayedNoise, "is_any_due", property(lambda _noise: False))
        elif what == "noise of dense layers":
            patch.setattr(
                training.PrivateTraining,
                "_dense_noise",
                lambda _self, sizes, _device: torch.zeros(sum(sizes), dtype=torch.float32),
            )
        else:
            take = DelayedNoise.take
            assert what == "noise of used rows"

            def of_unused(noise: DelayedNoise, rows: Tensor) -> Tensor | None:
                due = take(noise, rows)
                return due if rows.numel() > 1000 or due is None else torch.zeros_like(due)

            patch.setattr(DelayedNoise, "take", of_unused)
        yield


def test_an_example_moves_the_model_by_its_clipped_gradient_at_most() -> None:
    """One step of rate 1, whose models differ by one clipped gradient over the batch size, in all weights together."""
    assert check_one_gradient() > 0.99  # it is reached
    assert check_one_gradient(clip=1e-3) > 0.99
    with broken("clipping"), pytest.raises(AssertionError, match="moves the model by"):
        check_one_gradient()


def test_rows_that_no_example_names_are_alike_with_the_same_noise() -> None:
    """The same noise reaches them, whatever the data was, and whenever it was looked up."""
    pair = make_pair(6, 3)
    left, right = release(pair.present, 1), release(pair.absent, 1)
    is_named = {key: torch.zeros(rows, dtype=torch.bool) for key, rows in zip("012", SETTING.num_rows, strict=True)}
    for batch in pair.present:
        for key, named in is_named.items():
            named[batch.sparse_features[f"f{key}"].values()] = True
    for name in left:
        for key, named in is_named.items():
            if f".t{key}." in name:
                assert torch.equal(left[name][~named], right[name][~named])
    assert float(differences(left, right).norm()) > 0


@pytest.mark.parametrize(("num_steps", "step"), [(1, 0), (6, 3), (6, 5)])
def test_models_differ_by_noise_in_every_weight(num_steps: int, step: int) -> None:
    check_noise(make_pair(num_steps, step), num_steps)


@pytest.mark.parametrize("what", ["noise of unused rows", "noise of used rows", "noise of dense layers"])
def test_noise_that_is_left_out_is_noticed(what: str) -> None:
    with broken(what), pytest.raises(AssertionError, match=r"alike|differs by other than normal|standard deviations"):
        check_noise(make_pair(6, 3), 6)


def test_an_outlier_that_is_not_clipped_is_noticed() -> None:
    """An example of huge features would stand out in any noise."""

    def check(make: Callable[[], Pair] = lambda: make_pair(1, 0)) -> None:
        pair = make()
        pair.present[0].dense_features[5] = 1e4
        check_noise(pair, 1)

    check()
    with broken("clipping"), pytest.raises(AssertionError, match="standard deviations of noise"):
        check()


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -float("inf"), 1e25, 3e38])
def test_an_example_without_a_finite_gradient_counts_as_none(value: float) -> None:
    pair = make_pair(2, 0)
    pair.present[0].dense_features[5] = value
    left, right = release(pair.present, 1), release(pair.absent, 1)
    assert float(differences(left, right).norm()) < ROUNDING


@pytest.mark.parametrize("change", [{"load_factor": 0.9}, {"sharding_type": "row_wise"}, {"is_pooled": False}])
def test_that_holds_for_other_settings(change: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "SETTING", replace(SETTING, **change))  # type: ignore[arg-type]
    monkeypatch.setattr(release, "__defaults__", (replace(SETTING, **change),))  # type: ignore[arg-type]
    assert check_one_gradient() > 0.9
    check_noise(make_pair(4, 2), 4)

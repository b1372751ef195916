# SPDX-License-Identifier: BSD-3-Clause
"""What the state_dict of TorchRec's optimizers leaves out, and what must be there before it can be loaded."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper, OptimizerWrapper

__all__ = ["create_states", "load_wrapper_states", "wrapper_states"]

WrapperStates = list[dict[str, dict[str, Any]]]


def wrapper_states(optimizer: torch.optim.Optimizer) -> WrapperStates:
    """States that wrappers keep beside those they wrap, such as how far a WarmupOptimizer is.

    A wrapper of a CombinedOptimizer has them in a mapping that no state_dict shows.

    Args:
        optimizer: Maybe wrapped.

    Returns:
        By wrapper from the outside, by the name of its parameter.
    """
    found = []
    for wrapper in _wrappers(optimizer):
        inner = {id(parameter) for parameter in wrapper._optimizer.state}
        names = {id(parameter): name for name, parameter in wrapper.params.items()}
        own = {names[id(p)]: dict(state) for p, state in wrapper.state.items() if id(p) not in inner and id(p) in names}
        found.append(own)
    return found


def load_wrapper_states(optimizer: torch.optim.Optimizer, states: WrapperStates) -> None:
    """Put back what :func:`wrapper_states` gave, after the optimizer's own state was loaded.

    Args:
        optimizer: Wrapped as it was then.
        states: What it gave.
    """
    for wrapper, own in zip(_wrappers(optimizer), states, strict=False):
        for name, state in own.items():
            parameter = wrapper.params.get(name)
            if parameter is not None:
                wrapper.state[parameter] = dict(state)  # type: ignore[index]
    if isinstance(optimizer, OptimizerWrapper):
        optimizer.post_load_state_dict()


def create_states(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Let torch's optimizers make the states that they otherwise make at their first step; changes no weight.

    Args:
        optimizer: Its parts that have stepped before are left alone.

    Returns:
        Those that have states now and had none; to clear their `state` takes it back.
    """
    created = []
    for part in _torch_optimizers(optimizer):
        parameters = [p for group in part.param_groups for p in group["params"]]
        if part.state or any(p.grad is not None or isinstance(p, ShardedTensor) for p in parameters):
            continue
        before = [p.detach().clone() for p in parameters]
        rates = [group.get("lr") for group in part.param_groups]
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        for group in part.param_groups:
            if "lr" in group:
                group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        part.step()
        created.append(part)
        for group, rate in zip(part.param_groups, rates, strict=True):
            if "lr" in group:
                group["lr"] = rate
        for parameter, value in zip(parameters, before, strict=True):
            parameter.grad = None
            with torch.no_grad():
                parameter.copy_(value)
    return created


def _wrappers(optimizer: torch.optim.Optimizer) -> Iterator[OptimizerWrapper]:
    while isinstance(optimizer, OptimizerWrapper):
        yield optimizer
        optimizer = optimizer._optimizer


def _torch_optimizers(optimizer: torch.optim.Optimizer) -> Iterator[torch.optim.Optimizer]:
    if isinstance(optimizer, OptimizerWrapper):
        yield from _torch_optimizers(optimizer._optimizer)
    elif isinstance(optimizer, CombinedOptimizer):
        for _, part in optimizer.optimizers:
            yield from _torch_optimizers(part)
    elif isinstance(optimizer, KeyedOptimizerWrapper) and isinstance(optimizer._optimizer.state, Mapping):
        yield optimizer._optimizer

# SPDX-License-Identifier: BSD-3-Clause
"""What the state_dict of TorchRec's optimizers leaves out, and what must be there before it can be loaded."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper, OptimizerWrapper
from torchrec.optim.warmup import WarmupOptimizer

__all__ = ["fit_states", "load_wrapper_states", "wrapper_states"]

WrapperStates = list[dict[str, dict[str, Any]]]


def wrapper_states(optimizer: torch.optim.Optimizer) -> WrapperStates:
    """States that wrappers keep beside those they wrap, such as how far a WarmupOptimizer is.

    A wrapper of a CombinedOptimizer has them in a mapping that no state_dict shows.
    """
    found = []
    for wrapper in _wrappers(optimizer):
        inner = {id(parameter) for parameter in wrapper._optimizer.state}
        names = {id(parameter): name for name, parameter in wrapper.params.items()}
        own = {names[id(p)]: dict(state) for p, state in wrapper.state.items() if id(p) not in inner and id(p) in names}
        found.append(own)
    return found


def load_wrapper_states(optimizer: torch.optim.Optimizer, states: WrapperStates) -> None:
    """Put back what :func:`wrapper_states` gave, after the optimizer's own state was loaded."""
    for wrapper, own in zip(_wrappers(optimizer), states, strict=False):
        for name, state in own.items():
            parameter = wrapper.params.get(name)
            if parameter is not None:
                wrapper.state[parameter] = dict(state)  # type: ignore[index]
    if isinstance(optimizer, OptimizerWrapper):
        optimizer.post_load_state_dict()


def fit_states(optimizer: torch.optim.Optimizer, is_saved: Callable[[str], bool]) -> Callable[[], None]:
    """Give an optimizer the states that a checkpoint has, so that they can be loaded.

    torch's optimizers make a parameter's states when it first has a gradient, a WarmupOptimizer at its first step.
    Those that are missing are made, those that were not there when it was saved are dropped; no weight changes. Returns
    what takes it back.
    """
    undos = []
    for part, names in _parts(optimizer):
        if isinstance(part, WarmupOptimizer):
            undos.append(_fit_warm_up(part, names, is_saved))
        else:
            undos.append(_fit_torch_optimizer(part, names, is_saved))

    def undo() -> None:
        for undo_one in undos:
            undo_one()

    return undo


def _fit_warm_up(
    part: WarmupOptimizer, names: Mapping[str, Any], is_saved: Callable[[str], bool]
) -> Callable[[], None]:
    parameter = part._warmup_param
    name = next((name for name, other in names.items() if other is parameter), None)
    before = dict(part.state)
    if name is not None and is_saved(name) and parameter not in part.state:
        part.state[parameter] = {"warmup": torch.tensor([0, 0], dtype=torch.long)}  # type: ignore[index]
    elif name is not None and not is_saved(name) and parameter in part.state:
        del part.state[parameter]  # type: ignore[attr-defined]
    return lambda: _put_back(part.state, before)


def _fit_torch_optimizer(
    part: torch.optim.Optimizer, names: Mapping[str, Any], is_saved: Callable[[str], bool]
) -> Callable[[], None]:
    before = dict(part.state)
    parameters = [p for p in names.values() if isinstance(p, Tensor) and not isinstance(p, ShardedTensor)]
    missing = [
        p
        for name, p in names.items()
        if is_saved(name) and not part.state.get(p) and p.requires_grad and _is_in(p, parameters)
    ]
    if missing:
        _step_without_effect(part, parameters, missing)
    for name, parameter in names.items():
        if not is_saved(name):
            part.state.pop(parameter, None)
    return lambda: _put_back(part.state, before)


def _step_without_effect(part: torch.optim.Optimizer, parameters: list[Tensor], missing: list[Tensor]) -> None:
    # Optimizers make their states in their first step. This one has no gradient and no learning rate; weight decay may
    # change weights all the same, so that they are put back.
    gradients = [p.grad for p in parameters]
    weights = [p.detach().clone() for p in missing]
    rates = [group.get("lr") for group in part.param_groups]
    for parameter in parameters:
        parameter.grad = None
    for parameter in missing:
        parameter.grad = torch.zeros_like(parameter)
    for group in part.param_groups:
        if "lr" in group:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
    part.step()
    for group, rate in zip(part.param_groups, rates, strict=True):
        if "lr" in group:
            group["lr"] = rate
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    with torch.no_grad():
        for parameter, value in zip(missing, weights, strict=True):
            parameter.copy_(value)


def _put_back(state: Any, before: dict[Any, Any]) -> None:
    state.clear()
    state.update(before)


def _is_in(tensor: Tensor, tensors: list[Tensor]) -> bool:
    return any(tensor is other for other in tensors)


def _wrappers(optimizer: torch.optim.Optimizer) -> Iterator[OptimizerWrapper]:
    while isinstance(optimizer, OptimizerWrapper):
        yield optimizer
        optimizer = optimizer._optimizer


def _parts(optimizer: torch.optim.Optimizer, prefix: str = "") -> Iterator[tuple[Any, dict[str, Any]]]:
    """Optimizers of torch and warm-ups at any depth, with their parameters by name in the state_dict of the whole."""

    def named(params: Mapping[str, Any]) -> dict[str, Any]:
        return {CombinedOptimizer.prepend_opt_key(name, prefix): parameter for name, parameter in params.items()}

    if isinstance(optimizer, OptimizerWrapper):
        yield from _parts(optimizer._optimizer, prefix)
        if isinstance(optimizer, WarmupOptimizer):
            yield optimizer, named(optimizer.params)
    elif isinstance(optimizer, CombinedOptimizer):
        for key, part in optimizer.optimizers:
            yield from _parts(part, CombinedOptimizer.prepend_opt_key(key, prefix))
    elif isinstance(optimizer, KeyedOptimizerWrapper):
        params = {name: p for name, p in optimizer.params.items() if _is_trained_by(p, optimizer._optimizer)}
        yield optimizer._optimizer, named(params)
    elif not isinstance(optimizer, KeyedOptimizer):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        yield optimizer, {str(index): parameter for index, parameter in enumerate(parameters)}


def _is_trained_by(parameter: Any, optimizer: torch.optim.Optimizer) -> bool:
    return any(parameter is other for group in optimizer.param_groups for other in group["params"])

# SPDX-License-Identifier: BSD-3-Clause
"""Per-example gradients of the dense layers, from one backward: their norms, and their weighted sum.

No gradient of a weight is computed in the backward. What a layer was given and the gradient at its output are kept; the
norms come from these, and so does the sum, once the factor of each example is known.

Shapes: ``B`` examples, ``T`` positions of a sequence, ``I`` and ``O`` inputs and outputs of a linear layer.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torchrec_scratchpipe.errors import ConfigError
from torchrec_scratchpipe.privacy.extra import import_extra

__all__ = ["DenseLayers"]

# Per-example gradients are made for as many examples at a time as fit in this many elements: 64 MiB in float32.
CHUNK_ELEMENTS = 2**24


class DenseLayers:
    """Records what gives per-example gradients of all dense parameters of a model. Adds hooks to its modules.

    Every example must have its own place in the first dimension of what a layer is given, and must go its own way
    through the model. Layers that are known to mix examples are refused. A model's own code that mixes them (a mean
    over the batch, negatives from other examples) is not noticed.

    While a forward is recorded, the parameters of a layer need no gradient as long as the layer runs. So the backward
    computes none, and ``grad`` of these parameters stays as it is. A DistributedDataParallel wrapper has nothing to
    reduce then: run the backward in its ``no_sync``, and reduce what :meth:`sum_of` gives.

    What an ``nn.Linear`` gives, and the gradient at its input, have the bits that they have without recording. So do
    the layers of torch.nn that Opacus has functions for. A module with parameters of its own may differ by rounding,
    as torch multiplies matrices in another way if none of the two needs a gradient.

    Args:
        model: Any module. Its dense parameters are those that need a gradient now.
        left_out: Modules whose parameters are somebody else's, with all that they contain: the embeddings.

    Raises:
        ConfigError: A layer mixes examples, or a parameter's per-example gradient cannot be had; the message has its
            name. Or Opacus is missing.
    """

    def __init__(self, model: nn.Module, left_out: Collection[nn.Module]) -> None:
        self._layers = find_layers(model, left_out)
        self._names = {
            parameter: f"{layer.name}.{name}".lstrip(".")
            for layer in self._layers
            for name, parameter in layer.module.named_parameters()
            if parameter.requires_grad
        }
        self._calls: list[_Call] = []
        self._held: list[nn.Parameter] = []  # those that need no gradient until their layer's forward ends
        self._is_recording = False
        self._is_pending = False
        self._handles: list[RemovableHandle] = []
        for layer in self._layers:
            self._add_hooks(layer)
        for parameter, name in self._names.items():
            self._handles.append(parameter.register_hook(self._refuse_gradient(name)))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Dense parameters, each once."""
        return list(self._names)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the calls of layers; enter it around the forward. Their gradients are recorded in the backward.

        Yields:
            Nothing.

        Raises:
            ConfigError: A layer was called in a way that has no per-example gradient.
        """
        self._is_recording = self._is_pending = True
        try:
            yield
        finally:
            self._is_recording = False
            self._let_go()  # those of a forward that failed

    def square_norms(self, num_examples: int) -> Tensor:
        """Squared norm of each example's gradient in all dense parameters. To be called after the backward.

        Args:
            num_examples: B.

        Returns:
            [B] float32. The gradient is that of the loss that was run backward: of a sum over examples, each example's
            own; of a mean, 1/B of it.

        Raises:
            ConfigError: A layer was given another number of examples, or its input was overwritten since.
        """
        calls = self._complete_calls(num_examples)
        device = next(iter(self._names)).device if self._names else torch.device("cpu")
        result = torch.zeros(num_examples, dtype=torch.float32, device=device)
        if num_examples == 0:
            return result
        uses: dict[nn.Parameter, int] = {}
        for call in calls:
            for parameter in call.layer.parameters:
                uses[parameter] = uses.get(parameter, 0) + 1
        shared = []
        for call in calls:
            if any(uses[parameter] > 1 for parameter in call.layer.parameters):
                shared.append(call)
            else:
                result += call.layer.square_norms(call.inputs, call.gradient)
        if shared:
            result += _square_norms_of_sum(shared, num_examples)
        return result

    def sum_of(self, factors: Tensor) -> dict[nn.Parameter, Tensor]:
        """The weighted sum of the examples' gradients. To be called after the backward.

        Args:
            factors: [B]. What each example's gradient is multiplied with. 0: it counts as none, whatever it is.

        Returns:
            Every dense parameter to a tensor of its shape and dtype; zeros where its layer was not called.

        Raises:
            ConfigError: A layer was given another number of examples, or its input was overwritten since.
        """
        sums: dict[nn.Parameter, Tensor] = {}
        is_none = factors == 0
        is_any_none = bool(is_none.any())
        for call in self._complete_calls(factors.shape[0]):
            if factors.shape[0] > 0:
                inputs, gradient = call.inputs, call.gradient
                if is_any_none:  # what is infinite would stay so, or become NaN, when it is multiplied with 0
                    inputs, gradient = _without(inputs, is_none), _without(gradient, is_none)
                for parameter, each in call.layer.sums(inputs, gradient, factors).items():
                    sums[parameter] = sums[parameter] + each if parameter in sums else each
        return {parameter: sums.get(parameter, torch.zeros_like(parameter)).detach() for parameter in self._names}

    def forget(self) -> None:
        """Drop all that was recorded."""
        self._calls.clear()
        self._is_pending = False

    def remove(self) -> None:
        """Take the hooks off the model, and drop all that was recorded."""
        self.forget()
        while self._handles:
            self._handles.pop().remove()

    def _add_hooks(self, layer: "_Layer") -> None:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not self._is_recording:
                return None
            for parameter in layer.parameters:
                if parameter.requires_grad:
                    parameter.requires_grad_(False)
                    self._held.append(parameter)
            if not isinstance(layer, _Linear):
                return None
            # A product of a sequence and a weight takes one of two ways, whose bits differ. With a weight that needs a
            # gradient it always takes one, and without only where the sequence lies in one piece.
            return tuple(map(_in_one_piece, args)), {name: _in_one_piece(each) for name, each in kwargs.items()}

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not self._is_recording:
                return None
            self._let_go()
            return self._record(layer, args, kwargs, output) if torch.is_grad_enabled() else None

        module = layer.module
        # Last before the forward and first after it: what other hooks make of input and output is not the layer's.
        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(module.register_forward_hook(after, prepend=True, with_kwargs=True))

    def _let_go(self) -> None:
        while self._held:
            self._held.pop().requires_grad_(True)

    def _record(self, layer: "_Layer", args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
        if isinstance(layer, _Sampled) and len(layer.module._forward_pre_hooks) + len(layer.module._forward_hooks) > 2:
            raise ConfigError(
                f"Layer {layer.name}: has forward hooks, needs none, as it runs twice for per-example gradients. "
                "Put them on the module that contains it."
            )
        inputs = [*args, *kwargs.values()]
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
            kinds = ", ".join(type(each).__name__ for each in inputs)
            raise ConfigError(
                f"Layer {layer.name}: takes ({kinds}) and gives {type(output).__name__}, needs one tensor in and one "
                "out for per-example gradients. Wrap what has the parameters in a module of its own."
            )
        call = _Call(layer, inputs[0].detach(), inputs[0]._version)
        self._calls.append(call)
        if not output.requires_grad:
            output = _NeedGradient.apply(output, output.new_zeros((), requires_grad=True))
        output.register_hook(call.add_gradient)
        return output

    def _refuse_gradient(self, name: str) -> Callable[[Tensor], None]:
        def refuse(gradient: Tensor) -> None:
            if self._is_pending:
                raise ConfigError(
                    f"Parameter {name}: got a gradient from outside of its layer's forward, needs to be used by its "
                    "layer only. Per-example gradients would miss this part. Call the layer's module instead."
                )

        return refuse

    def _complete_calls(self, num_examples: int) -> list["_Call"]:
        """The calls whose output reached the loss."""
        calls = [call for call in self._calls if call.has_gradient]
        for call in calls:
            call.check(num_examples)
        return calls


def _in_one_piece(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) and value.dim() > 2 else value


class _NeedGradient(torch.autograd.Function):
    """Gives a tensor that needs no gradient a place in the graph: the same tensor, the same memory."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


class _Call:
    """One call of a layer in the forward."""

    def __init__(self, layer: "_Layer", inputs: Tensor, version: int) -> None:
        self.layer = layer
        self.inputs = inputs
        self.gradient = inputs  # replaced by the backward
        self.has_gradient = False
        self._version = version

    def add_gradient(self, gradient: Tensor) -> None:
        """Called by the backward."""
        self.gradient = self.gradient + gradient if self.has_gradient else gradient.detach()
        self.has_gradient = True

    def check(self, num_examples: int) -> None:
        """See that the call had all examples, and that its input is as it was."""
        num_dims = 2 if isinstance(self.layer, _Linear) else 1
        for what, tensor in (("input", self.inputs), ("output", self.gradient)):
            if tensor.dim() < num_dims or tensor.shape[0] != num_examples:
                raise ConfigError(
                    f"Layer {self.layer.name}: its {what} has shape {tuple(tensor.shape)}, needs "
                    f"({num_examples}, ...), one place in the first dimension for each example. Put the examples there."
                )
        if self.inputs._version != self._version:
            raise ConfigError(
                f"Layer {self.layer.name}: its input was overwritten after its forward, needs to stay as it was until "
                "the step is done. Do not change it in place."
            )


class _Layer(Protocol):
    """One way to have per-example gradients of a module's parameters.

    Attributes:
        name: The module's name in the model.
        parameters: Its trainable parameters, with those of all that it contains.
    """

    name: str
    parameters: list[nn.Parameter]

    @property
    def module(self) -> nn.Module:
        """The module."""

    def square_norms(self, inputs: Tensor, gradient: Tensor) -> Tensor:
        """[B] float32, of all its parameters."""

    def gradients(self, inputs: Tensor, gradient: Tensor) -> dict[nn.Parameter, Tensor]:
        """Parameter to [B, *its shape]."""

    def sums(self, inputs: Tensor, gradient: Tensor, factors: Tensor) -> dict[nn.Parameter, Tensor]:
        """Parameter to a tensor of its shape: the weighted sum of the gradients."""


@dataclass
class _Linear:
    """An ``nn.Linear``, without per-example gradients where that is cheaper.

    Source:
        Ghost norm: Li et al., Large Language Models Can Be Strong Differentially Private Learners (2021), section 4.
        The sum by book-keeping: Bu et al., Differentially Private Optimization on Large Model at Small Cost (2022).
    """

    module: nn.Linear
    name: str
    parameters: list[nn.Parameter]

    def square_norms(self, inputs: Tensor, gradient: Tensor) -> Tensor:
        inputs, gradient = _sequence(inputs), _sequence(gradient)
        weight, bias = self.module.weight, self.module.bias
        result = torch.zeros(inputs.shape[0], dtype=torch.float32, device=inputs.device)
        num_positions = inputs.shape[1]
        if weight.requires_grad:
            if num_positions == 1:
                result += _squares(inputs) * _squares(gradient)
            elif 2 * num_positions**2 <= weight.numel():
                products = (inputs @ inputs.mT) * (gradient @ gradient.mT)
                result += products.sum(dim=(1, 2)).clamp_(min=0.0)
            else:
                for first, last in _chunks(inputs.shape[0], weight.numel()):
                    each = gradient[first:last].mT @ inputs[first:last]
                    result[first:last] += each.square().sum(dim=(1, 2))
        if bias is not None and bias.requires_grad:
            result += _squares(gradient.sum(dim=1) if num_positions > 1 else gradient)
        return result

    def gradients(self, inputs: Tensor, gradient: Tensor) -> dict[nn.Parameter, Tensor]:
        inputs, gradient = _sequence(inputs), _sequence(gradient)
        return self._kept(lambda: gradient.mT @ inputs, lambda: gradient.sum(dim=1))

    def sums(self, inputs: Tensor, gradient: Tensor, factors: Tensor) -> dict[nn.Parameter, Tensor]:
        inputs, gradient = _sequence(inputs), _sequence(gradient)
        factors = factors.float().repeat_interleave(inputs.shape[1])
        inputs, gradient = inputs.flatten(0, 1), gradient.flatten(0, 1)
        if inputs.shape[1] < gradient.shape[1]:  # the narrower one is scaled
            return self._kept(lambda: gradient.mT @ (inputs * factors[:, None]), lambda: factors @ gradient)
        return self._kept(lambda: (gradient * factors[:, None]).mT @ inputs, lambda: factors @ gradient)

    def _kept(self, of_weight: Callable[[], Tensor], of_bias: Callable[[], Tensor]) -> dict[nn.Parameter, Tensor]:
        """Those that are trainable."""
        result: dict[nn.Parameter, Tensor] = {}
        weight: Any = self.module.weight
        pairs: list[tuple[nn.Parameter | None, Callable[[], Tensor]]]
        pairs = [(weight, of_weight), (self.module.bias, of_bias)]
        for parameter, compute in pairs:
            if parameter is not None and parameter.requires_grad:
                result[parameter] = compute()
        return result


def _without(each: Tensor, is_none: Tensor) -> Tensor:
    """A copy, with zeros for some examples."""
    return each.masked_fill(is_none.to(each.device).view(-1, *[1] * (each.dim() - 1)), 0)


def _squares(each: Tensor) -> Tensor:
    """[B], without a copy of the squares."""
    return torch.linalg.vector_norm(each.flatten(1), dim=1).square_()


def _sequence(tensor: Tensor) -> Tensor:
    """[B, T, width] float32."""
    return tensor.float().reshape(tensor.shape[0], math.prod(tensor.shape[1:-1]), tensor.shape[-1])


@dataclass
class _Sampled:
    """A module whose per-example gradients Opacus has a function for, or gets by torch.func."""

    module: nn.Module
    name: str
    parameters: list[nn.Parameter]
    sampler: Callable[[Tensor, Tensor], dict[nn.Parameter, Tensor]]
    norm_sampler: Callable[[Tensor, Tensor], dict[nn.Parameter, Tensor]] | None

    def square_norms(self, inputs: Tensor, gradient: Tensor) -> Tensor:
        if self.norm_sampler is None:
            return _square_norms_of_sum([_finished(self, inputs, gradient)], inputs.shape[0])
        norms = self.norm_sampler(inputs, gradient)
        return torch.stack([norms[each].float() for each in self.parameters]).square().sum(dim=0)

    def gradients(self, inputs: Tensor, gradient: Tensor) -> dict[nn.Parameter, Tensor]:
        each = self.sampler(inputs, gradient)
        return {parameter: each[parameter] for parameter in self.parameters}

    def sums(self, inputs: Tensor, gradient: Tensor, factors: Tensor) -> dict[nn.Parameter, Tensor]:
        """By a second forward and backward of this module alone, which needs no memory per example."""
        named = {name: each for name, each in self.module.named_parameters() if each.requires_grad}
        leaves = {name: each.detach().requires_grad_() for name, each in named.items()}
        if inputs.is_floating_point():  # under autocast, it may have been less precise
            inputs = inputs.to(self.parameters[0].dtype)
        with torch.enable_grad():
            output = torch.func.functional_call(self.module, leaves, (inputs,))
            shape = [-1] + [1] * (gradient.dim() - 1)
            scaled = gradient.to(output.dtype) * factors.to(output.dtype).view(shape)
            sums = torch.autograd.grad(output, list(leaves.values()), scaled, allow_unused=True)
        return {each: found.to_dense() for each, found in zip(named.values(), sums, strict=True) if found is not None}


def _finished(layer: _Layer, inputs: Tensor, gradient: Tensor) -> _Call:
    call = _Call(layer, inputs, inputs._version)
    call.add_gradient(gradient)
    return call


def _square_norms_of_sum(calls: Sequence[_Call], num_examples: int) -> Tensor:
    """[B] float32. Where a parameter has a part of its gradient from each of several calls, of the sum of the parts."""
    result = torch.zeros(num_examples, dtype=torch.float32, device=calls[0].gradient.device)
    num_elements = max(sum(each.numel() for each in call.layer.parameters) for call in calls)
    for first, last in _chunks(num_examples, num_elements):
        sums: dict[nn.Parameter, Tensor] = {}
        for call in calls:
            for parameter, each in call.layer.gradients(call.inputs[first:last], call.gradient[first:last]).items():
                sums[parameter] = sums[parameter] + each if parameter in sums else each
        for each in sums.values():
            result[first:last] += each.detach().float().flatten(1).square().sum(dim=1)
    return result


def _chunks(num_examples: int, num_elements: int) -> Iterator[tuple[int, int]]:
    size = max(1, CHUNK_ELEMENTS // max(1, num_elements))
    for first in range(0, num_examples, size):
        yield first, min(num_examples, first + size)


def find_layers(model: nn.Module, left_out: Collection[nn.Module]) -> list[_Layer]:
    """The layers that have all dense parameters of a model between them. Changes nothing.

    Args:
        model: Any module.
        left_out: Modules that are somebody else's.

    Returns:
        Layers, none inside another.

    Raises:
        ConfigError: A layer mixes examples, or a parameter's per-example gradient cannot be had. Or Opacus is missing.
    """
    others = set(left_out)
    layers: list[_Layer] = []
    seen: set[nn.Module] = set()
    validators = import_extra("opacus.validators", "Per-example gradients").ModuleValidator.VALIDATORS

    def visit(module: nn.Module, name: str) -> None:
        if module in others or module in seen:
            return
        seen.add(module)
        _check(module, name, validators)
        if not _has_own_parameters(module):
            for child_name, child in module.named_children():
                visit(child, f"{name}.{child_name}".lstrip("."))
            return
        for inner_name, inner in module.named_modules():
            full_name = f"{name}.{inner_name}".strip(".")
            if inner in others:
                raise ConfigError(
                    f"Module {name or type(model).__name__}: has parameters of its own and contains the embeddings "
                    f"{full_name}, needs either. Put {_first_own(module)} into a module of its own."
                )
            _check(inner, full_name, validators)
        layers.append(_make_layer(module, name))

    visit(model, "")
    theirs = {parameter for other in others for parameter in other.parameters()}
    for layer in layers:
        for name, parameter in layer.module.named_parameters():
            if parameter in theirs:
                raise ConfigError(
                    f"Parameter {layer.name}.{name}: is shared with embeddings, needs to be dense only. Give it a "
                    "tensor of its own."
                )
    return layers


def _has_own_parameters(module: nn.Module) -> bool:
    """Trainable ones that its own forward must be using: lists of parameters have no forward."""
    return any(each.requires_grad for each in module.parameters(recurse=False)) or any(
        isinstance(child, nn.ParameterList | nn.ParameterDict)
        and any(each.requires_grad for each in child.parameters())
        for child in module.children()
    )


def _first_own(module: nn.Module) -> str:
    lists = [name for name, child in module.named_children() if isinstance(child, nn.ParameterList | nn.ParameterDict)]
    own = [name for name, each in module.named_parameters(recurse=False) if each.requires_grad]
    return (own + lists)[0]


def _check(module: nn.Module, name: str, validators: dict[type, Any]) -> None:
    kind = type(module).__name__
    if kind == "OptimizedModule" or module._compiled_call_impl is not None:
        raise ConfigError(
            f"Module {name}: is compiled, needs to run as it is for per-example gradients. Leave torch.compile away."
        )
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        raise ConfigError(
            f"Layer {name}: {kind} mixes examples, needs a layer that treats each by itself. Use nn.LayerNorm or "
            "nn.GroupNorm."
        )
    problems = validators[type(module)](module) if type(module) in validators else []
    if problems:
        reason = " ".join(str(problems[0]).split())
        raise ConfigError(
            f"Layer {name}: {kind} has no per-example gradient ({reason}), needs another. opacus.validators."
            "ModuleValidator.fix says which."
        )


def _make_layer(module: nn.Module, name: str) -> _Layer:
    parameters = [each for each in module.parameters() if each.requires_grad]
    own = dict(module.named_parameters())
    if type(module) is nn.Linear and own.keys() <= {"weight", "bias"} and "weight" in own:
        return _Linear(module, name, parameters)
    if isinstance(module, nn.EmbeddingBag):
        raise ConfigError(
            f"Layer {name}: nn.EmbeddingBag has no per-example gradient (Opacus's counts a row once that a bag names "
            "twice), needs to be in a collection. Use TorchRec's EmbeddingBagCollection."
        )
    if isinstance(module, nn.Embedding) and (module.scale_grad_by_freq or module.max_norm is not None):
        raise ConfigError(
            f"Layer {name}: nn.Embedding has scale_grad_by_freq or max_norm, which let examples change each other's "
            "gradient, needs neither. Leave both away."
        )
    opacus = import_extra("opacus.grad_sample", "Per-example gradients")
    samplers = opacus.GradSampleModule.GRAD_SAMPLERS
    norm_samplers = opacus.GradSampleModuleFastGradientClipping.NORM_SAMPLERS
    # Opacus's function for nn.LayerNorm fails without a bias, that for nn.Embedding counts the row that is padding.
    is_odd = (isinstance(module, nn.LayerNorm) and module.bias is None) or (
        isinstance(module, nn.Embedding) and module.padding_idx is not None
    )
    if type(module) in samplers and not is_odd and not list(module.children()):
        sampler, norm_sampler = samplers[type(module)], norm_samplers.get(type(module))
        return _Sampled(
            module,
            name,
            parameters,
            lambda inputs, gradient: sampler(module, [inputs], gradient),
            norm_sampler and (lambda inputs, gradient: norm_sampler(module, [inputs], gradient)),
        )
    return _Sampled(module, name, parameters, _by_torch_func(module, name), None)


def _by_torch_func(module: nn.Module, name: str) -> Callable[[Tensor, Tensor], dict[nn.Parameter, Tensor]]:
    """Per-example gradients of any module, by Opacus and torch.func."""
    for inner_name, inner in module.named_modules():
        if isinstance(inner, nn.modules.dropout._DropoutNd) and inner.p > 0:
            raise ConfigError(
                f"Layer {name}: contains {inner_name}, a dropout, and has parameters of its own, needs to run twice "
                "with the same result. Take the dropout out of it."
            )
    prepare_layer = import_extra("opacus.grad_sample.functorch", "Per-example gradients").prepare_layer
    try:
        prepare_layer(module)
    except (NotImplementedError, RuntimeError) as error:  # it has buffers; or it cannot be copied
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"Layer {name}: {type(module).__name__} has no per-example gradient ({reason}), needs parameters only, and "
            "to be one that can be copied. Put buffers into another module."
        ) from error
    # Kept here: the module has to stay one that pickle takes.
    compute = module.__dict__.pop("ft_compute_sample_grad")

    def sample(inputs: Tensor, gradient: Tensor) -> dict[nn.Parameter, Tensor]:
        parameters = list(module.parameters())
        if inputs.is_floating_point():
            inputs = inputs.to(gradient.dtype)
        with torch.no_grad():
            found = compute(parameters, inputs, gradient)
        return dict(zip(parameters, found, strict=True))

    return sample

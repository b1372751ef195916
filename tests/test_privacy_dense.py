# SPDX-License-Identifier: BSD-3-Clause
"""Per-example gradients of dense layers are those of one backward for every example."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from opacus import GradSampleModule
from torch import Tensor, nn
from torch.nn import functional
from torchrec.models.dlrm import DLRM
from torchrec.modules.crossnet import CrossNet, LowRankCrossNet, VectorCrossNet
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.mlp import MLP
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_scratchpipe.errors import ConfigError
from torchrec_scratchpipe.privacy import dense
from torchrec_scratchpipe.privacy.dense import DenseLayers

NUM_EXAMPLES = 6


class Twice(nn.Module):
    """One layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.norm(self.layer(self.norm(torch.tanh(self.layer(inputs)))))


class Tied(nn.Module):
    """Two layers with one weight, each with a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(inputs)))


class Cross(nn.Module):
    """A vector of parameters beside a layer that is used more than once."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4))
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs * self.scale) + self.layer(inputs)


class Unused(nn.Module):
    """One layer is not called, and what another gives does not reach the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.dropped = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        self.dropped(inputs)
        return self.used(inputs)


class ByKeyword(nn.Module):
    """A layer whose input has a name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(input=inputs)


class Frozen(nn.Module):
    """Half of each layer is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)
        self.cross = LowRankCrossNet(4, 2, 2)
        self.first.weight.requires_grad_(False)
        self.norm.bias.requires_grad_(False)
        self.last.bias.requires_grad_(False)
        self.cross.bias[0].requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.cross(self.norm(self.first(inputs))))


def twice_in(layer: nn.Module) -> list[nn.Module]:
    """One layer in two modules."""
    return [nn.Sequential(layer), nn.Tanh(), nn.Sequential(layer)]


def sequences(num_positions: int = 5) -> Callable[[], Tensor]:
    return lambda: torch.randn(NUM_EXAMPLES, num_positions, 4)


def vectors() -> Tensor:
    return torch.randn(NUM_EXAMPLES, 4)


def ids() -> Tensor:
    return torch.randint(0, 5, (NUM_EXAMPLES, 4))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(4, 3), vectors),
    "no bias": (lambda: nn.Linear(4, 3, bias=False), vectors),
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 3), nn.Sigmoid()), vectors),
    "layer norm": (lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1)), vectors),
    "layer norm first": (lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 1)), vectors),
    "layer norm, no bias": (lambda: nn.Sequential(nn.LayerNorm(4, bias=False), nn.Linear(4, 1)), vectors),
    "rms norm": (lambda: nn.Sequential(nn.RMSNorm(4), nn.Linear(4, 1)), vectors),
    "short sequence": (lambda: nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16)), sequences(2)),
    "long sequence": (lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2)), sequences(7)),
    "sequence in pieces": (lambda: nn.Linear(4, 1), lambda: torch.randn(5, NUM_EXAMPLES, 4).transpose(0, 1)),
    "two dims of positions": (lambda: nn.Linear(4, 3), lambda: torch.randn(NUM_EXAMPLES, 2, 3, 4)),
    "no positions": (lambda: nn.Linear(4, 3), sequences(0)),
    "convolution": (lambda: nn.Conv1d(5, 3, 2, bias=False), sequences()),
    "group norm": (lambda: nn.GroupNorm(2, 4), vectors),
    "embedding": (lambda: nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)), ids),
    "embedding with padding": (lambda: nn.Embedding(5, 3, padding_idx=2), ids),
    "sparse embedding": (lambda: nn.Embedding(5, 3, sparse=True), ids),
    "low rank cross net": (lambda: nn.Sequential(nn.Linear(4, 5), LowRankCrossNet(5, 3, 2)), vectors),
    "cross net": (lambda: nn.Sequential(CrossNet(4, 2), nn.Linear(4, 1)), vectors),
    "vector cross net": (lambda: nn.Sequential(nn.Tanh(), VectorCrossNet(4, 2), nn.Linear(4, 1)), vectors),
    "swish layer norm": (lambda: MLP(4, [6, 3], activation="swish_layernorm"), vectors),
    "called twice": (Twice, vectors),
    "called twice, sequence": (Twice, sequences()),
    "registered twice": (lambda: nn.Sequential(*twice_in(nn.Linear(4, 4))), vectors),
    "tied": (Tied, vectors),
    "weight norm": (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))), vectors),
    "own parameter": (Cross, vectors),
    "own parameter, inside": (lambda: nn.Sequential(nn.Linear(4, 4), Cross(), nn.Linear(4, 1)), vectors),
    "unused": (Unused, vectors),
    "by keyword": (ByKeyword, vectors),
    "frozen": (Frozen, vectors),
}


def make(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make_model, make_inputs = MODELS[name]
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)  # biases, too
    return model, make_inputs()


def loss_of(output: Tensor) -> Tensor:
    """[B]: a loss whose gradient differs from element to element."""
    weights = torch.linspace(0.5, 1.5, max(1, math.prod(output.shape[1:])), dtype=output.dtype)
    return (output.reshape(output.shape[0], math.prod(output.shape[1:])).sin() * weights).sum(dim=1)


def one_by_one(model: nn.Module, inputs: Tensor) -> list[dict[str, Tensor]]:
    """Name to gradient, for every example, from a forward and a backward of its own in float64."""
    model = copy.deepcopy(model).double()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    found = []
    for example in range(inputs.shape[0]):
        model.zero_grad()
        loss_of(model(inputs[example : example + 1])).sum().backward()
        grads = {name: each for name, each in model.named_parameters() if each.requires_grad}
        found.append({name: torch.zeros_like(each) if each.grad is None else each.grad for name, each in grads.items()})
    return [{name: each.to_dense().clone() for name, each in example.items()} for example in found]


def record(layers: DenseLayers, model: nn.Module, inputs: Tensor) -> Tensor:
    with layers.recording():
        output = model(inputs)
    loss_of(output).sum().backward()
    return output


def assert_gradients_of_examples(model: nn.Module, expected: list[dict[str, Tensor]], layers: DenseLayers) -> None:
    """Norms, and sums with factors."""
    norms = torch.stack([sum(each.square().sum() for each in example.values()) for example in expected])
    actual = layers.square_norms(len(expected))
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), norms.double(), rtol=1e-5, atol=1e-7)
    factors = torch.rand(len(expected))
    sums = layers.sum_of(factors)
    names = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(names.values()) == set(sums) == set(layers.parameters)
    for name, parameter in names.items():
        total = sum(factor * example[name] for factor, example in zip(factors.double(), expected, strict=True))
        assert (sums[parameter].dtype, sums[parameter].shape) == (parameter.dtype, parameter.shape)
        torch.testing.assert_close(sums[parameter].double(), total.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_one_backward_for_each_example(name: str) -> None:
    model, inputs = make(name)
    layers = DenseLayers(model, [])
    for _ in range(2):  # nothing of the first is left in the second
        record(layers, model, inputs)
        assert_gradients_of_examples(model, one_by_one(model, inputs), layers)
        layers.forget()
        inputs = inputs.flip(0)


@pytest.mark.parametrize("name", ["mlp", "long sequence", "low rank cross net", "called twice"])
def test_examples_are_taken_in_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "CHUNK_ELEMENTS", 100)
    model, inputs = make(name)
    layers = DenseLayers(model, [])
    record(layers, model, inputs)
    assert_gradients_of_examples(model, one_by_one(model, inputs), layers)


@pytest.mark.parametrize(
    "name", ["linear", "no bias", "layer norm", "short sequence", "long sequence", "called twice", "tied"]
)
def test_norms_are_those_of_opacus(name: str) -> None:
    model, inputs = make(name)
    layers = DenseLayers(model, [])
    record(layers, model, inputs)
    norms = layers.square_norms(NUM_EXAMPLES)
    layers.remove()
    theirs = GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
    loss_of(theirs(inputs)).sum().backward()
    expected = sum(each.grad_sample.flatten(1).square().sum(dim=1) for each in theirs.parameters())
    torch.testing.assert_close(norms, expected, rtol=1e-5, atol=1e-7)


ROUNDED = ["cross net"]  # the way in which torch multiplies depends on whether a parameter needs a gradient


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_the_gradient_of_the_input_have_the_bits_of_stock(name: str) -> None:
    model, inputs = make(name)
    stock = copy.deepcopy(model)
    layers = DenseLayers(model, [])
    grads = []
    outputs = []
    for each, is_ours in ((stock, False), (model, True)):
        leaf = inputs.clone().requires_grad_(inputs.is_floating_point())
        outputs.append(record(layers, each, leaf) if is_ours else each(leaf))
        if not is_ours:
            loss_of(outputs[-1]).sum().backward()
        grads.append(leaf.grad)
    tolerance = 1e-5 if name in ROUNDED else 0.0
    torch.testing.assert_close(*outputs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(*grads, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("is_leaf", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("kind", ["whole", "transposed", "sliced", "expanded"])
@pytest.mark.parametrize("sizes", [(6, 5, 4, 3), (33, 7, 100, 1), (64, 20, 128, 64)])
def test_sequences_have_the_bits_of_stock(
    sizes: tuple[int, int, int, int], kind: str, has_bias: bool, is_leaf: bool
) -> None:
    num_examples, num_positions, num_inputs, num_outputs = sizes
    torch.manual_seed(0)
    linear = nn.Linear(num_inputs, num_outputs, bias=has_bias)
    inputs = {
        "whole": torch.randn(num_examples, num_positions, num_inputs),
        "transposed": torch.randn(num_positions, num_examples, num_inputs).transpose(0, 1),
        "sliced": torch.randn(num_examples, num_positions, 2 * num_inputs)[:, :, ::2],
        "expanded": torch.randn(num_examples, 1, num_inputs).expand(num_examples, num_positions, num_inputs),
    }[kind]
    leaf = inputs.detach().requires_grad_(is_leaf)
    expected = linear(leaf)
    loss_of(expected).sum().backward()
    expected_gradient, leaf.grad = leaf.grad, None
    layers = DenseLayers(linear, [])
    assert torch.equal(expected, record(layers, linear, leaf))
    assert not is_leaf or torch.equal(expected_gradient, leaf.grad)


@pytest.mark.parametrize("name", MODELS)
def test_the_backward_computes_no_gradient_of_a_parameter(name: str) -> None:
    model, inputs = make(name)
    layers = DenseLayers(model, [])
    record(layers, model, inputs)
    layers.square_norms(NUM_EXAMPLES)
    layers.sum_of(torch.ones(NUM_EXAMPLES))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", [name for name in MODELS if name != "no positions"])
def test_without_recording_all_is_as_it_was(name: str) -> None:
    model, inputs = make(name)
    expected = sum_of_gradients(copy.deepcopy(model), inputs)
    layers = DenseLayers(model, [])
    record(layers, model, inputs)
    layers.forget()
    assert_same_gradients(expected, sum_of_gradients(model, inputs))
    layers.remove()
    with layers.recording():
        assert_same_gradients(expected, sum_of_gradients(model, inputs))
    if name != "weight norm":  # which pickle does not take
        pickle.dumps(model)


def sum_of_gradients(model: nn.Module, inputs: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    loss_of(model(inputs)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(expected: dict[str, Any], actual: dict[str, Any]) -> None:
    for name, each in expected.items():
        assert (each is None) == (actual[name] is None), name
        assert each is None or torch.equal(each.to_dense(), actual[name].to_dense()), name


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("own parameter, inside",)])
@pytest.mark.parametrize("is_mean", [False, True])
def test_a_batch_of_no_examples(name: str, is_mean: bool) -> None:
    model, inputs = make(name)
    layers = DenseLayers(model, [])
    with layers.recording():
        losses = loss_of(model(inputs[:0]))
    (losses.mean() if is_mean else losses.sum()).backward()
    assert layers.square_norms(0).shape == (0,)
    sums = layers.sum_of(torch.ones(0))
    assert set(sums) == {each for each in model.parameters() if each.requires_grad}
    for parameter, each in sums.items():
        assert torch.equal(each, torch.zeros_like(parameter))


def test_a_mean_gives_gradients_that_are_smaller() -> None:
    model, inputs = make("layer norm")
    layers = DenseLayers(model, [])
    record(layers, model, inputs)
    of_sum = layers.square_norms(NUM_EXAMPLES)
    layers.forget()
    with layers.recording():
        losses = loss_of(model(inputs))
    losses.mean().backward()
    torch.testing.assert_close(layers.square_norms(NUM_EXAMPLES) * NUM_EXAMPLES**2, of_sum, rtol=1e-5, atol=0.0)


def test_clipped_sums_are_bounded() -> None:
    model, inputs = make("called twice")
    layers = DenseLayers(model, [])
    record(layers, model, inputs)
    norms = layers.square_norms(NUM_EXAMPLES).sqrt()
    for example in range(NUM_EXAMPLES):
        factors = torch.zeros(NUM_EXAMPLES)
        factors[example] = (0.01 / norms[example]).clamp(max=1.0)
        total = sum(each.double().square().sum() for each in layers.sum_of(factors).values()).sqrt()
        assert float(total) == pytest.approx(0.01, rel=1e-5)


@pytest.mark.parametrize("name", ["layer norm", "short sequence", "convolution", "low rank cross net"])
def test_half_precision_of_autocast(name: str) -> None:
    model, inputs = make(name)
    layers = DenseLayers(model, [])
    with layers.recording(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(inputs)
    loss_of(output.float()).sum().backward()
    expected = torch.stack([sum(g.square().sum() for g in each.values()) for each in one_by_one(model, inputs)])
    torch.testing.assert_close(layers.square_norms(NUM_EXAMPLES).double(), expected, rtol=0.1, atol=1e-3)
    is_half = name != "low rank cross net"  # which ends with a sum
    assert layers._calls[-1].gradient.dtype == (torch.bfloat16 if is_half else torch.float32)
    assert all(each.dtype == torch.float32 for each in layers.sum_of(torch.ones(NUM_EXAMPLES)).values())


def make_dlrm() -> tuple[DLRM, Tensor, KeyedJaggedTensor]:
    torch.manual_seed(0)
    configs = [
        EmbeddingBagConfig(name=f"t{i}", embedding_dim=4, num_embeddings=10, feature_names=[f"f{i}"]) for i in range(3)
    ]
    model = DLRM(EmbeddingBagCollection(tables=configs), 5, [6, 4], [6, 1])
    features = KeyedJaggedTensor(
        keys=["f0", "f1", "f2"],
        values=torch.randint(0, 10, (6 * NUM_EXAMPLES,)),
        lengths=torch.full((3 * NUM_EXAMPLES,), 2),
    )
    return model, torch.randn(NUM_EXAMPLES, 5), features


@pytest.mark.parametrize("is_traced", [False, True])
def test_a_dlrm_and_its_trace(is_traced: bool) -> None:
    model, dense_features, features = make_dlrm()
    collection = model.sparse_arch.embedding_bag_collection
    layers = DenseLayers(model, [collection])
    assert not set(collection.parameters()) & set(layers.parameters)
    assert len(layers.parameters) == 8
    pooled = collection(features)
    expected = []
    for example in range(NUM_EXAMPLES):
        model.zero_grad()
        rows = torch.stack([each[example : example + 1] for each in pooled.to_dict().values()], dim=1).detach()
        loss_of(
            model.over_arch(model.inter_arch(model.dense_arch(dense_features[example : example + 1]), rows))
        ).sum().backward()
        expected.append([each.grad for each in layers.parameters])
        model.zero_grad()
    model.zero_grad()
    runs: Any = model
    if is_traced:
        tracer = LeafTracer()
        with layers.recording():  # a trace records nothing
            graph = tracer.trace(model)
        assert layers.sum_of(torch.ones(0))
        runs = torch.fx.GraphModule(model, graph)
    with layers.recording():
        output = runs(dense_features, features)
    loss_of(output).sum().backward()
    assert all(each.grad is None for each in layers.parameters)
    assert all(each.grad is not None for each in collection.parameters())
    actual = layers.square_norms(NUM_EXAMPLES)
    norms = torch.stack([sum(each.square().sum() for each in example) for example in expected])
    torch.testing.assert_close(actual, norms, rtol=1e-5, atol=1e-7)


class LeafTracer(torch.fx.Tracer):
    """As TorchRec's pipeline traces: embeddings are not looked into."""

    def is_leaf_module(self, module: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(module, EmbeddingBagCollection) or super().is_leaf_module(module, module_qualified_name)


class UsesWeight(nn.Module):
    """Uses a layer's weight beside the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.linear(self.layer(inputs), self.layer.weight)


def test_a_parameter_that_is_used_beside_its_layer_is_refused() -> None:
    model = UsesWeight()
    layers = DenseLayers(model, [])
    with layers.recording():
        output = model(vectors())
    with pytest.raises(ConfigError, match=r"layer\.weight: got a gradient from outside of its layer"):
        output.sum().backward()


class Holder(nn.Module):
    """A parameter beside embeddings."""

    def __init__(self, inner: nn.Module, parameter: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.inner = inner
        self.scale = parameter


class Buffered(nn.Module):
    """A parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("count", torch.zeros(4))


def test_what_has_no_gradient_of_an_example_is_refused_by_name() -> None:
    for layer, message in (
        (nn.BatchNorm1d(4), "Layer 1.1: BatchNorm1d mixes examples"),
        (nn.BatchNorm1d(4, affine=False), "Layer 1.1: BatchNorm1d mixes examples"),
        (nn.SyncBatchNorm(4), "Layer 1.1: SyncBatchNorm mixes examples"),
        (nn.LSTM(4, 4), "Layer 1.1: LSTM has no per-example gradient"),
        (nn.MultiheadAttention(4, 2), "Layer 1.1: MultiheadAttention has no per-example gradient"),
        (nn.EmbeddingBag(4, 2), "Layer 1.1: nn.EmbeddingBag has no per-example gradient"),
        (nn.Embedding(4, 2, max_norm=1.0), "Layer 1.1: nn.Embedding has scale_grad_by_freq or max_norm"),
        (Buffered(), "Layer 1.1: Buffered has no per-example gradient"),
        (Holder(nn.BatchNorm1d(4), nn.Parameter(torch.ones(1))), "Layer 1.1.inner: BatchNorm1d mixes examples"),
        (Holder(nn.Dropout(0.5), nn.Parameter(torch.ones(1))), "Layer 1.1: contains inner, a dropout"),
    ):
        with pytest.raises(ConfigError, match=message):
            DenseLayers(nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), layer)), [])
    compiled = nn.Linear(4, 4)
    compiled.compile()
    for each in (compiled, torch.compile(nn.Linear(4, 4))):
        with pytest.raises(ConfigError, match="Module 0: is compiled"):
            DenseLayers(nn.Sequential(each), [])


def test_parameters_beside_or_in_embeddings_are_refused_by_name() -> None:
    embeddings = nn.Embedding(5, 4)
    for parameter in (nn.Parameter(torch.ones(1)), nn.ParameterList([torch.ones(1)])):
        with pytest.raises(ConfigError, match=r"contains the embeddings inner, needs either\. Put scale into a module"):
            DenseLayers(Holder(embeddings, parameter), [embeddings])
    tied = Holder(embeddings, nn.Linear(4, 5))
    tied.scale.weight = embeddings.weight
    with pytest.raises(ConfigError, match=r"scale\.weight: is shared with embeddings"):
        DenseLayers(tied, [embeddings])
    frozen = Holder(embeddings, nn.Parameter(torch.ones(1), requires_grad=False))
    assert DenseLayers(frozen, [embeddings]).parameters == []


def test_calls_without_a_place_for_each_example_are_refused_by_name() -> None:
    model, inputs = make("mlp")
    layers = DenseLayers(model, [])
    record(layers, model, inputs)
    with pytest.raises(ConfigError, match=r"Layer \d: its input has shape \(6, \d\), needs \(7, ...\)"):
        layers.square_norms(7)
    with pytest.raises(ConfigError, match=r"needs \(7, ...\)"):
        layers.sum_of(torch.ones(7))
    linear = nn.Linear(4, 4)
    layers = DenseLayers(linear, [])
    with layers.recording():
        output = linear(torch.ones(4))
    output.sum().backward()
    with pytest.raises(ConfigError, match=r"its input has shape \(4,\), needs \(4, ...\)"):
        layers.square_norms(4)
    bilinear = nn.Sequential(nn.Bilinear(4, 4, 4))
    layers = DenseLayers(bilinear, [])
    with layers.recording(), pytest.raises(ConfigError, match=r"Layer 0: takes \(Tensor, Tensor\) and gives Tensor"):
        bilinear[0](inputs, inputs)


@pytest.mark.parametrize("name", ["mlp", "layer norm"])
def test_what_two_backwards_give_is_added(name: str) -> None:
    model, inputs = make(name)
    layers = DenseLayers(model, [])
    with layers.recording():
        losses = loss_of(model(inputs))
    losses.sum().backward(retain_graph=True)
    once = layers.square_norms(NUM_EXAMPLES)
    losses.sum().backward()
    torch.testing.assert_close(layers.square_norms(NUM_EXAMPLES), 4 * once, rtol=1e-6, atol=0.0)


def test_other_hooks() -> None:
    """What they change is not part of an nn.Linear; a layer that runs twice may not have them."""
    model, inputs = make("linear")
    expected = one_by_one(nn.Sequential(Doubled(), model, Doubled()), inputs)
    expected = [{name.removeprefix("1."): each for name, each in example.items()} for example in expected]
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.register_forward_hook(lambda module, args, output: output * 2)
    layers = DenseLayers(model, [])
    record(layers, model, inputs)
    assert_gradients_of_examples(model, expected, layers)
    for register in (nn.Module.register_forward_hook, nn.Module.register_forward_pre_hook):
        norm = nn.Sequential(nn.LayerNorm(4))
        layers = DenseLayers(norm, [])
        register(norm[0], lambda *args: None)
        with layers.recording(), pytest.raises(ConfigError, match="Layer 0: has forward hooks, needs none"):
            norm(inputs)
        layers.remove()
        norm(inputs)
    by_hook = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)))
    with DenseLayers(by_hook, []).recording(), pytest.raises(ConfigError, match="Layer 0: has forward hooks"):
        by_hook(inputs)


class Doubled(nn.Module):
    """Twice its input."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * 2


def test_an_input_that_was_overwritten_is_refused_by_name() -> None:
    model, inputs = make("linear")
    layers = DenseLayers(model, [])
    with layers.recording():
        output = model(inputs)
    output.sum().backward()
    inputs.add_(1.0)
    with pytest.raises(ConfigError, match="its input was overwritten after its forward"):
        layers.square_norms(NUM_EXAMPLES)


def test_a_forward_that_fails_leaves_parameters_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 4))
    model[0].bias.requires_grad_(False)
    layers = DenseLayers(model, [])
    model[1].bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), layers.recording():
        model(vectors())
    assert [each.requires_grad for each in model.parameters()] == [True, False, True, False]


def test_without_gradients_nothing_is_recorded() -> None:
    model, inputs = make("mlp")
    layers = DenseLayers(model, [])
    with layers.recording(), torch.no_grad():
        model(inputs)
    assert torch.equal(layers.square_norms(NUM_EXAMPLES), torch.zeros(NUM_EXAMPLES))


def test_opacus_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opacus.validators", None)
    with pytest.raises(ConfigError, match=r"needs opacus.*pip install torchrec-scratchpipe\[privacy\]"):
        DenseLayers(nn.Linear(2, 2), [])

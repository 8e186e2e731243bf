"""What a layer remembers: kept while its tensors are the same, and never longer."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora import LoHaConfig, LoKrConfig, LoraConfig
from fastlora.adapters import AdapterConfig, Cache


class Counter:
    """Counts how often a sum is made."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.cache, self.made = tensor, Cache(), 0

    def make(self) -> Tensor:
        self.made += 1
        return self.tensor.sum()

    def frozen(self) -> Tensor:
        return self.cache.frozen("sum", [self.tensor], self.make)


def test_a_value_is_kept_while_nothing_changes() -> None:
    counter = Counter(nn.Parameter(torch.ones(4)))
    values = [counter.frozen() for _ in range(3)]
    assert counter.made == 1 and all(value is values[0] for value in values)
    assert not values[0].requires_grad
    counter.cache.frozen("other", [counter.tensor], counter.make)
    assert counter.made == 2


def add(t: Tensor) -> None:
    with torch.no_grad():
        t.add_(1)


def copy_(t: Tensor) -> None:
    with torch.no_grad():
        t.copy_(torch.full_like(t, 2.0))


def set_data(t: Tensor) -> None:
    t.data = torch.full_like(t, 2.0)


def step(t: Tensor) -> None:
    t.grad = torch.ones_like(t)
    torch.optim.SGD([t], lr=0.5).step()


def as_view(t: Tensor) -> None:
    t.data = t.data[:2]


def through_a_view(t: Tensor) -> None:
    t.detach().view(2, 2)[0, 0] = 9


@pytest.mark.parametrize("change", [add, copy_, set_data, step, as_view, through_a_view])
def test_every_change_is_noticed(change: Callable[[Tensor], None]) -> None:
    counter = Counter(nn.Parameter(torch.ones(4)))
    old = counter.frozen()
    change(counter.tensor)
    new = counter.frozen()
    assert counter.made == 2
    assert torch.equal(new, counter.tensor.detach().sum()) and not torch.equal(old, new)


def test_a_storage_at_the_same_place_is_another_one() -> None:
    """The memory of a freed tensor is used again at once; its version counter starts anew."""
    counter = Counter(torch.zeros(4096))
    places = set()
    for i in range(40):
        del counter.tensor
        counter.tensor = torch.full((4096,), float(i))
        places.add(counter.tensor.data_ptr())
        assert counter.frozen() == 4096 * i
    assert len(places) < 40, "no place was used twice: the test shows nothing"


def test_other_keys_and_names() -> None:
    counter = Counter(torch.ones(4))
    for also in (1, 1, 2, 2.0):
        counter.cache.frozen("sum", [counter.tensor], counter.make, also)
    assert counter.made == 2
    counter.cache.drop("sum")
    counter.frozen()
    counter.cache.drop()
    counter.frozen()
    assert counter.made == 4


def test_training_and_graphs_forget() -> None:
    counter = Counter(torch.ones(4))

    def made(training: bool) -> int:
        """Ask twice and return how often it was made in all."""
        for _ in range(2):
            counter.cache.trained("sum", [counter.tensor], training, counter.make)
        return counter.made

    with torch.no_grad():
        assert made(training=False) == 1
        assert made(training=True) == 3
        assert made(training=False) == 4
    assert made(training=False) == 6  # these build graphs


def test_nothing_is_kept_while_there_is_a_gradient() -> None:
    """A fused optimizer writes without being counted, but it needs the gradient."""
    counter = Counter(nn.Parameter(torch.ones(4)))

    def value() -> Tensor:
        with torch.no_grad():
            return counter.cache.trained("sum", [counter.tensor], False, counter.make)

    old = value()
    counter.tensor.grad = torch.ones(4)
    value()
    torch.optim.AdamW([counter.tensor], lr=0.1, fused=True).step()
    assert torch.equal(value(), counter.tensor.sum()) and not torch.equal(value(), old)
    counter.tensor.grad = None
    made = counter.made
    assert torch.equal(value(), value()) and counter.made == made + 1


@pytest.mark.parametrize(
    "config",
    [LoraConfig(r=2, use_dora=True), LoHaConfig(r=2), LoKrConfig(r=1)],
    ids=lambda c: c.peft_type,
)
@pytest.mark.parametrize("fused", [False, True])
def test_training_without_dropout_in_evaluation_mode(config: AdapterConfig, fused: bool) -> None:
    torch.manual_seed(0)
    model = fastlora.patch_model(nn.Sequential(nn.Linear(16, 8)), config).eval()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], 0.1, fused=fused
    )
    x = torch.randn(4, 16)
    for set_to_none in (True, False):
        with torch.no_grad():
            model(x)
        for _ in range(3):
            optimizer.zero_grad(set_to_none)
            model(x).square().sum().backward()
            optimizer.step()
            with torch.no_grad():
                found = model(x)
                torch.testing.assert_close(found, copy.deepcopy(model)(x), rtol=0, atol=0)
        optimizer.zero_grad(set_to_none)


def test_what_inference_mode_makes_can_be_trained_on() -> None:
    counter = Counter(nn.Parameter(torch.ones(4)))
    with torch.inference_mode():
        assert not counter.frozen().is_inference()
        own = Counter(torch.ones(4))
        own.frozen(), own.frozen()
        assert own.made == 2, "a tensor without a version counter can't be watched"
    weight = nn.Parameter(torch.ones(()))
    (weight * counter.frozen()).backward()
    assert counter.made == 1 and weight.grad == 4


def test_copies_and_pickles_are_empty() -> None:
    counter = Counter(torch.ones(4))
    counter.frozen()
    for other in (copy.deepcopy(counter), pickle.loads(pickle.dumps(counter))):
        other.frozen()
        assert other.made == 2
    counter.frozen()
    assert counter.made == 1


def test_memory_of_an_old_weight_is_not_held() -> None:
    tensor = torch.ones(4)
    counter = Counter(tensor)
    counter.frozen()
    storage = torch.multiprocessing.reductions.StorageWeakRef(tensor.untyped_storage())
    counter.tensor = torch.zeros(4)
    del tensor
    assert storage.expired()


def layer() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    config = LoHaConfig(r=2, init_weights=False)
    fastlora.patch_model(model, config, quantize="nf4", backend="reference")
    return model.eval()


def raw(t: Tensor) -> None:
    """Write as code does that PyTorch's version counter does not see."""
    t.data.mul_(-2)


@pytest.mark.parametrize(
    "after",
    [
        lambda m: m.eval(),
        lambda m: m.train().eval(),
        lambda m: m.to("cpu"),
        lambda m: m.load_state_dict(m.state_dict()),
        lambda m: m(torch.ones(1, 16)),
    ],
    ids=["eval", "train", "to", "load", "a call with a graph"],
)
def test_unseen_writes_are_noticed_after(after: Callable[[nn.Module], object]) -> None:
    model, x = layer(), torch.ones(1, 16)
    with torch.no_grad():
        old = model(x)
    raw(model.get_parameter("0.hada_w1_a"))
    after(model)
    with torch.no_grad():
        new = model(x)
    assert not torch.allclose(new, old)
    torch.testing.assert_close(new, model(x).detach())


def test_views_are_kept_for_the_very_objects() -> None:
    cache, made = Cache(), []
    weight, state = nn.Parameter(torch.zeros(4), False), object()

    def make() -> torch.Tensor:
        made.append(weight.data_ptr())
        return weight.detach().view(2, 2)

    def call(*sources: object) -> torch.Tensor:
        return cache.views("v", sources, weight.data_ptr(), make)

    first = call(weight, state)
    weight.data[0] = 1.0  # values are shared
    assert call(weight, state) is first and first[0, 0] == 1
    assert call(weight, object()) is not first
    second = call(weight, state)
    weight.data = torch.ones(4)
    assert call(weight, state) is not second and len(made) == 4
    with torch.inference_mode():
        cache.drop()
        kept = call(weight, state)
    assert not kept.is_inference() and call(weight, state) is kept
    assert copy.deepcopy(cache)._kept == {}

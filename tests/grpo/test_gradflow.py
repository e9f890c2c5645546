"""Where a gradient is cut, and where nothing is, in models of four architectures."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from cut_models import ARCHITECTURES, KINDS, cut_at, does_harm, loss_of, make_causal_lm, with_adapter
from torch import Tensor, nn

from grpo.diagnostics.gradflow import gradient_flow, group_by_module, stirred

LEARNS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "llama": with_adapter,
    "qwen3": lambda model: with_adapter(model, layers=[1, 2]),  # what comes before them carries nothing
    "gemma3": lambda model: model,  # all of it
    "gpt2": with_adapter,
}


def learning_model(name: str) -> nn.Module:
    return LEARNS[name](make_causal_lm(name))


def called_modules(model: nn.Module, loss: Callable[[], Tensor]) -> list[str]:
    """Those whose forward runs; containers' does not."""
    names: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: names.append(name)) for name, module in model.named_modules()
    ]
    loss()
    for handle in handles:
        handle.remove()
    return sorted(set(names))


def sorted_by_harm(
    name: str, kind: str, *, limit: int | None = None
) -> tuple[nn.Module, Callable[[], Tensor], list[str], list[str]]:
    """The model, its loss, and the modules where a cut does harm and where it does none, shuffled. LoRA's B is moved
    off zero for that: behind it nothing could do harm yet. Args: limit: of the modules that are tried."""
    model = learning_model(name)
    loss = loss_of(model)
    names = called_modules(model, loss)
    random.Random(kind).shuffle(names)
    names = names[:limit]
    with stirred(dict(model.named_parameters())):
        harmful = [one for one in names if does_harm(model, model.get_submodule(one), kind, loss)]
    harmless = [one for one in names if one not in harmful]
    return model, loss, harmful, harmless


def check_found(model: nn.Module, loss: Callable[[], Tensor], place: str, kind: str) -> None:
    with cut_at(model.get_submodule(place), kind):
        flow = gradient_flow(model, loss)
    assert [(cut.module, cut.kind) for cut in flow.cuts] == [(place, kind)]
    assert ".py:" in flow.cuts[0].operation
    if kind in ("detach", "integer cast"):
        assert "cut_models.py:" in flow.cuts[0].operation  # the line that did it


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_every_kind_of_cut_is_found_and_placed(name: str) -> None:
    model, loss, harmful, _ = sorted_by_harm(name, "no_grad", limit=12)
    assert len(harmful) >= len(KINDS)
    for place, kind in zip(harmful, KINDS, strict=False):
        check_found(model, loss, place, kind)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cuts_at_twenty_random_modules_are_all_found_and_placed(name: str, kind: str) -> None:
    model, loss, harmful, _ = sorted_by_harm(name, kind)
    assert len(harmful) >= 20
    for place in harmful[:20]:
        check_found(model, loss, place, kind)


def harmless_places(
    kind: str, *, names: Sequence[str] = ARCHITECTURES, limit: int | None = None
) -> Iterator[tuple[str, nn.Module, Callable[[], Tensor], list[str]]]:
    for name in names:
        model, loss, _, harmless = sorted_by_harm(name, kind, limit=limit)
        yield name, model, loss, harmless


def check_no_alarm(model: nn.Module, loss: Callable[[], Tensor], place: str, kind: str) -> None:
    with cut_at(model.get_submodule(place), kind):
        flow = gradient_flow(model, loss)
    assert (place, flow.cuts) == (place, ())


def test_harmless_cuts_raise_no_alarm() -> None:
    for _, model, loss, places in harmless_places("no_grad", names=["qwen3"], limit=8):
        for place in places[:2]:
            check_no_alarm(model, loss, place, "no_grad")


@pytest.mark.long
@pytest.mark.parametrize("kind", ["no_grad", "detach"])
def test_twenty_harmless_cuts_raise_no_alarm(kind: str) -> None:
    count = 0
    for _, model, loss, places in harmless_places(kind):
        for place in places:
            check_no_alarm(model, loss, place, kind)
        count += len(places)
    assert count >= 20


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_intact_model_has_no_cut_and_every_parameter_gets_gradient(name: str) -> None:
    model = learning_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flow = gradient_flow(model, loss_of(model))
    assert (flow.cuts, flow.unreached, flow.zero_always) == ((), (), ())
    assert flow.has_graph
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_lora_a_beside_a_zero_b_is_judged_on_the_second_step() -> None:
    model = learning_model("llama")
    flow = gradient_flow(model, loss_of(model))
    assert len(flow.zero_at_start) == 21  # 3 layers of 7 linear layers, the A of each
    assert all("lora_A" in name for name in flow.zero_at_start)
    assert min(norm or 0 for norm in flow.norms.values()) > 0
    assert group_by_module(flow.norms)["base_model.model.model.layers.*.mlp.down_proj.lora_A.default.weight"] == (3, 3)


class Tower(nn.Module):
    """Encoder, adapter and head; a part may run with gradients off, as real code does it."""

    def __init__(self, *, off: str = "") -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.encoder, self.projector = nn.Linear(4, 4), nn.Linear(4, 4)
            self.gauge, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.off = off
        self.requires_grad_(False)
        self.projector.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.off != "encoder"):
            x = self.encoder(x)
        with torch.set_grad_enabled(self.off != "projector"):
            x = self.projector(x).tanh()
        with torch.no_grad():
            self.seen = self.gauge(x)  # only looked at
        with torch.set_grad_enabled(self.off != "head"):
            return self.head(x)


class Wrapped(nn.Module):
    """A tower inside a model that goes on after it."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower, self.last = tower, nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.tower(x))


def tower_flow(off: str) -> tuple[list[tuple[str, str, tuple[str, ...]]], tuple[str, ...]]:
    model = Wrapped(Tower(off=off))
    x = torch.linspace(-1, 1, 8).view(2, 4)
    flow = gradient_flow(model, lambda: model(x).square().sum())
    return [(cut.module, cut.kind, cut.around) for cut in flow.cuts], flow.unreached


def test_no_grad_around_a_frozen_part_with_nothing_upstream_and_a_gauge_are_no_cuts() -> None:
    assert tower_flow("encoder") == ([], ())


def test_no_grad_around_the_part_that_should_learn_is_blamed_on_the_forward_that_has_it() -> None:
    found, unreached = tower_flow("projector")
    assert found == [("tower", "no_grad", ("tower.projector",))]
    assert unreached == ("tower.projector.weight", "tower.projector.bias")


def test_no_grad_around_a_frozen_part_behind_what_learns_is_a_cut() -> None:
    found, unreached = tower_flow("head")
    assert found == [("tower", "no_grad", ("tower.head",))]
    assert unreached == ("tower.projector.weight", "tower.projector.bias")


def test_a_detach_in_the_loss_is_named_by_its_line() -> None:
    model = Wrapped(Tower())
    flow = gradient_flow(model, lambda: model(torch.ones(2, 4)).detach().sum())
    assert not flow.has_graph
    assert flow.cuts == ()
    assert [text.partition(" at ")[0] for text in flow.outside] == ["detach"]
    assert "test_gradflow.py:" in flow.outside[0]


def test_a_model_called_under_no_grad_is_told_as_such() -> None:
    model = Wrapped(Tower())

    def loss() -> Tensor:
        with torch.no_grad():
            return model(torch.ones(2, 4)).sum()

    flow = gradient_flow(model, loss)
    assert flow.whole_pass_is_off
    assert not flow.has_graph


def test_a_frozen_reference_pass_beside_the_policys_is_no_cut() -> None:
    model = Wrapped(Tower())

    def loss() -> Tensor:
        with torch.no_grad():
            reference = model(torch.ones(2, 4))
        return (model(torch.ones(2, 4)) - reference + 1).square().sum()

    flow = gradient_flow(model, loss)
    assert (flow.cuts, flow.unreached, flow.whole_pass_is_off) == ((), (), False)


class Biased(nn.Module):
    """Gives its answer and a table that it looks up, as T5's attention gives its position bias."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(4, 4), nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x), self.table.exp()


def test_a_second_output_that_no_learning_parameter_goes_into_is_no_cut() -> None:
    model = Biased()

    def loss() -> Tensor:
        answer, table = model(torch.ones(2, 4))
        return (answer * table).sum()

    before = model.linear.weight.detach().clone()
    flow = gradient_flow(model, loss)
    assert (flow.cuts, flow.unreached) == ((), ())
    assert torch.equal(model.linear.weight, before)


def test_a_loss_that_was_given_requires_grad_itself_has_no_graph() -> None:
    model = Wrapped(Tower(off="projector")).requires_grad_(False)
    model.tower.projector.requires_grad_(True)
    flow = gradient_flow(model, lambda: model(torch.ones(2, 4)).sum().requires_grad_(True))  # backward() would run
    assert not flow.has_graph
    assert len(flow.unreached) == 2
    assert [cut.module for cut in flow.cuts] == ["tower"]

"""Claims about log-probabilities from hidden states: chunks change memory, never a value or a gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo.update.logprobs import Process, logprobs_under_both_laws, plain_logprobs, token_logprobs

N, HIDDEN, V = 41, 5, 11  # of several blocks of rows


def make_inputs(dtype: torch.dtype = torch.float64, *, n: int = N) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states [N, H], head [V, H], bias [V], targets [N]."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return normal(n, HIDDEN), normal(V, HIDDEN), normal(V), torch.randint(0, V, (n,), generator=generator)


def full_softmax(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    process: Process | None = None,
) -> tuple[Tensor, Tensor]:
    """The slow twin: all logits at once, then one position at a time."""
    logits = hidden @ head.T if bias is None else hidden @ head.T + bias
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if process is not None:
        logits = process(logits, torch.arange(len(logits)))
    logprobs, entropies = [], []
    for row, target in zip(logits, targets.tolist(), strict=True):
        law = row / temperature - torch.logsumexp(row / temperature, dim=0)
        there = law[~law.isneginf()]
        logprobs.append(law[target])
        entropies.append(-(there.exp() * there).sum())
    return torch.stack(logprobs), torch.stack(entropies)


def check_same_gradients(value: Tensor, slow: Tensor, learns: list[Tensor]) -> None:
    weights = torch.linspace(-1, 1, len(value), dtype=value.dtype)
    gradients = torch.autograd.grad((weights * value).sum(), learns, retain_graph=True)
    slow_gradients = torch.autograd.grad((weights * slow).sum(), learns, retain_graph=True)
    for gradient, slow_gradient in zip(gradients, slow_gradients, strict=True):
        torch.testing.assert_close(gradient, slow_gradient, rtol=1e-10, atol=1e-10)


def shift_by_position(logits: Tensor, positions: Tensor) -> Tensor:
    """A stand-in for penalties: token (position mod V) loses 2 + position, so a wrong position shows."""
    place = torch.nn.functional.one_hot(positions % V, V)
    return logits - place * (2 + positions[:, None])


def ban_small_tokens(logits: Tensor, positions: Tensor) -> Tensor:
    """Drops the first (position mod 3) tokens, unlike penalties with probability exactly 0."""
    return logits.masked_fill(torch.arange(V) < (positions % 3)[:, None], -torch.inf)


@pytest.mark.parametrize("chunk_tokens", [1, 3, N, 100])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"logit_scale": 0.25},
        {"softcap": 1.5},
        {"process": shift_by_position},
        {"temperature": 1.3, "logit_scale": 2.0, "softcap": 3.0, "process": shift_by_position, "has_bias": True},
        {"has_bias": True},
    ],
    ids=["plain", "temperature", "logit_scale", "softcap", "process", "all", "bias"],
)
def test_chunked_logprobs_and_entropy_match_the_full_softmax_in_values_and_gradients(
    chunk_tokens: int, options: dict[str, object]
) -> None:
    hidden, head, bias, targets = make_inputs()
    options = dict(options)
    learns = [hidden, head]
    if options.pop("has_bias", False):
        options["bias"] = bias
        learns.append(bias)
    got = token_logprobs(hidden, head, targets, chunk_tokens=chunk_tokens, **options)  # pyright: ignore[reportArgumentType]
    expected = full_softmax(hidden, head, targets, **options)  # pyright: ignore[reportArgumentType]
    for value, slow in zip(got, expected, strict=True):
        torch.testing.assert_close(value, slow, rtol=1e-10, atol=1e-10)
    check_same_gradients(got[0], expected[0], learns)


def test_logprobs_and_entropy_are_those_worked_out_by_hand() -> None:
    # logits ln 1, ln 2, ln 5 -> probabilities 1/8, 2/8, 5/8
    hidden, head = torch.ones(1, 1), torch.tensor([[0.0], [math.log(2)], [math.log(5)]])
    logprobs, entropy = token_logprobs(hidden, head, torch.tensor([1]))
    assert logprobs.item() == pytest.approx(math.log(1 / 4))
    # -(0.125 ln 0.125 + 0.25 ln 0.25 + 0.625 ln 0.625) = 0.259930 + 0.346574 + 0.293752
    assert entropy.item() == pytest.approx(0.900256, abs=1e-6)
    # temperature 0.5 squares them: 1, 4, 25 of 30
    assert token_logprobs(hidden, head, torch.tensor([1]), temperature=0.5)[0].item() == pytest.approx(math.log(4 / 30))


def test_the_head_is_scaled_together_with_its_bias() -> None:
    # as Cohere and Granite do: lm_head(hidden) * scale; logits (0 + ln 3) * 2 = ln 9 and 0: 9 of 10
    logprobs, _ = token_logprobs(
        torch.ones(1, 1), torch.zeros(2, 1), torch.tensor([0]), bias=torch.tensor([math.log(3), 0.0]), logit_scale=2.0
    )
    assert logprobs.item() == pytest.approx(math.log(0.9))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 9), chunk_tokens=st.integers(1, 10), temperature=st.floats(0.1, 3.0))
def test_any_chunk_size_gives_the_same_values(n: int, chunk_tokens: int, temperature: float) -> None:
    hidden, head, _, targets = make_inputs(n=n)
    one_chunk = logprobs_under_both_laws(
        hidden, head, targets, temperature=temperature, process=shift_by_position, chunk_tokens=100
    )
    chunked = logprobs_under_both_laws(
        hidden, head, targets, temperature=temperature, process=shift_by_position, chunk_tokens=chunk_tokens
    )
    for value, expected in zip(chunked, one_chunk, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_tokens", [2, N])
def test_the_third_output_is_the_law_without_processing(chunk_tokens: int) -> None:
    hidden, head, _, targets = make_inputs()
    law, entropy, plain = logprobs_under_both_laws(
        hidden, head, targets, temperature=0.8, process=shift_by_position, chunk_tokens=chunk_tokens
    )
    torch.testing.assert_close(plain, full_softmax(hidden, head, targets, temperature=0.8)[0], rtol=1e-10, atol=1e-10)
    expected = full_softmax(hidden, head, targets, temperature=0.8, process=shift_by_position)
    torch.testing.assert_close(law, expected[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(entropy, expected[1], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(law, plain)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"logit_scale": 0.25}, {"softcap": 3.0}])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
def test_a_references_logprobs_are_the_plain_ones_and_carry_no_gradient(
    chunk_tokens: int, options: dict[str, float]
) -> None:
    hidden, head, bias, targets = make_inputs()
    found = plain_logprobs(hidden, head, targets, bias=bias, chunk_tokens=chunk_tokens, **options)  # pyright: ignore[reportArgumentType]
    assert not found.requires_grad
    expected, _ = full_softmax(hidden, head, targets, bias=bias, **options)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-12)
    own = logprobs_under_both_laws(hidden, head, targets, bias=bias, chunk_tokens=chunk_tokens, **options)[2]  # pyright: ignore[reportArgumentType]
    assert torch.equal(found, own)  # of the same weights, a KL is exactly 0
    assert plain_logprobs(hidden[:0], head, targets[:0]).shape == (0,)


def test_without_processing_both_laws_are_one() -> None:
    hidden, head, _, targets = make_inputs()
    law, _, plain = logprobs_under_both_laws(hidden, head, targets)
    assert torch.equal(law, plain)


@pytest.mark.parametrize("chunk_tokens", [2, N])
def test_dropped_tokens_leave_values_and_gradients_finite(chunk_tokens: int) -> None:
    hidden, head, _, _ = make_inputs()
    targets = torch.full((N,), V - 1)  # never dropped
    logprobs, entropy = token_logprobs(hidden, head, targets, process=ban_small_tokens, chunk_tokens=chunk_tokens)
    expected = full_softmax(hidden, head, targets, process=ban_small_tokens)
    for value, slow in zip((logprobs, entropy), expected, strict=True):
        torch.testing.assert_close(value, slow, rtol=1e-10, atol=1e-10)
    check_same_gradients(logprobs, expected[0], [hidden, head])


def test_the_entropy_is_a_figure_and_carries_no_gradient() -> None:
    hidden, head, _, targets = make_inputs()
    logprobs, entropy = token_logprobs(hidden, head, targets, chunk_tokens=3)
    assert logprobs.requires_grad
    assert (
        not entropy.requires_grad
    )  # an entropy bonus would need it: then this claim goes, together with the docstring


def test_a_law_with_one_token_left_has_probability_one_and_entropy_zero() -> None:
    hidden, head, _, _ = make_inputs(torch.float32)

    def keep_the_last(logits: Tensor, positions: Tensor) -> Tensor:
        return logits.masked_fill(torch.arange(V) < V - 1, -torch.inf)

    logprobs, entropy = token_logprobs(hidden, head, torch.full((N,), V - 1), process=keep_the_last)
    assert logprobs.tolist() == [0.0] * N
    assert entropy.tolist() == [0.0] * N


def test_a_frozen_head_still_lets_the_gradient_reach_the_hidden_states() -> None:
    hidden, head, _, targets = make_inputs()
    (gradient,) = torch.autograd.grad(token_logprobs(hidden, head.detach(), targets, chunk_tokens=3)[0].sum(), hidden)
    # d logprob / d hidden = head[target] - sum_v p_v head[v]
    probabilities = torch.softmax(hidden @ head.T, dim=-1)
    torch.testing.assert_close(gradient, (head[targets] - probabilities @ head).detach(), rtol=1e-10, atol=1e-10)


def test_a_head_alone_learns_from_frozen_hidden_states() -> None:
    hidden, head, _, targets = make_inputs()
    (gradient,) = torch.autograd.grad(token_logprobs(hidden.detach(), head, targets, chunk_tokens=3)[0].sum(), head)
    (expected,) = torch.autograd.grad(full_softmax(hidden.detach(), head, targets)[0].sum(), head)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


def test_without_gradients_the_values_are_the_same() -> None:
    hidden, head, _, targets = make_inputs()
    with_gradient = token_logprobs(hidden, head, targets, chunk_tokens=2)
    with torch.no_grad():
        without = token_logprobs(hidden, head, targets, chunk_tokens=2)
    for value, expected in zip(without, with_gradient, strict=True):
        assert not value.requires_grad
        assert torch.equal(value, expected.detach())


def test_half_precision_models_give_float32_logprobs_of_the_same_logits() -> None:
    hidden, head, _, targets = make_inputs(torch.bfloat16)
    logprobs, entropy = token_logprobs(hidden, head, targets, chunk_tokens=100)
    expected = torch.log_softmax((hidden @ head.T).float(), dim=-1).gather(1, targets[:, None])[:, 0]
    assert (logprobs.dtype, entropy.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(logprobs, expected)


def test_logits_as_large_as_1e4_do_not_overflow() -> None:
    hidden, head = torch.tensor([[1e4]], requires_grad=True), torch.tensor([[1.0], [-1.0]])
    logprobs, entropy = token_logprobs(hidden.repeat(2, 1), head, torch.tensor([0, 1]))
    assert logprobs.tolist() == [0.0, -2e4]
    assert entropy.tolist() == [0.0, 0.0]
    assert torch.isfinite(torch.autograd.grad(logprobs.sum(), hidden)[0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_positions_give_no_logprobs(dtype: torch.dtype) -> None:
    hidden, head, _, targets = make_inputs(dtype, n=0)
    for value in logprobs_under_both_laws(hidden, head, targets):
        assert value.shape == (0,)
        assert value.dtype == torch.float32


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    hidden, head, _, targets = make_inputs()
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(hidden, head, targets, temperature=temperature)


def test_hidden_states_and_targets_of_different_lengths_are_refused() -> None:
    hidden, head, _, targets = make_inputs()
    with pytest.raises(ValueError, match="41 hidden states for 40 targets"):
        token_logprobs(hidden, head, targets[:-1])


def penalise_repeats(logits: Tensor, positions: Tensor) -> Tensor:
    """Token (position mod V) divided by 1.3 where positive and multiplied where not: a slope that is not 1."""
    place = torch.nn.functional.one_hot(positions % V, V).bool()
    return torch.where(place, torch.where(logits > 0, logits / 1.3, logits * 1.3), logits)


def penalise_and_ban(logits: Tensor, positions: Tensor) -> Tensor:
    return ban_small_tokens(penalise_repeats(logits, positions), positions)


@pytest.mark.parametrize("head_learns", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
@pytest.mark.parametrize("entropy_has_gradient", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "logit_scale": 0.25},
        {"softcap": 1.5},
        {"process": penalise_repeats},
        {"process": ban_small_tokens, "temperature": 1.3},
        {"process": penalise_and_ban, "temperature": 0.8, "logit_scale": 2.0, "softcap": 3.0, "has_bias": True},
    ],
    ids=["plain", "temperature and scale", "softcap", "repetition penalty", "bans", "all"],
)
def test_gradients_of_all_outputs_together_are_those_of_the_full_softmax(
    head_learns: bool, chunk_tokens: int, entropy_has_gradient: bool, options: dict[str, object]
) -> None:
    hidden, head, bias, _ = make_inputs()
    targets = torch.arange(N) % (V - 2) + 2  # never banned
    options, learns = dict(options), [hidden]
    if head_learns:
        learns.append(head)
    else:
        head, bias = head.detach(), bias.detach()
    if options.pop("has_bias", False):
        options["bias"] = bias
        learns += [bias] if head_learns else []
    got = logprobs_under_both_laws(
        hidden,
        head,
        targets,
        chunk_tokens=chunk_tokens,
        entropy_has_gradient=entropy_has_gradient,
        **options,  # pyright: ignore[reportArgumentType]
    )
    without = {name: value for name, value in options.items() if name != "process"}
    law, entropy = full_softmax(hidden, head, targets, **options)  # pyright: ignore[reportArgumentType]
    plain, _ = full_softmax(hidden, head, targets, **without)  # pyright: ignore[reportArgumentType]
    expected = (law, entropy, plain)
    for value, slow in zip(got, expected, strict=True):
        torch.testing.assert_close(value, slow, rtol=1e-10, atol=1e-10)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(3, N, generator=generator, dtype=torch.float64)  # another weight for every row and output
    if not entropy_has_gradient:
        upstream[1] = 0.0
    totals = [sum((w * v).sum() for w, v in zip(upstream, values, strict=True)) for values in (got, expected)]
    for one, other in zip(*(torch.autograd.grad(total, learns) for total in totals), strict=True):  # pyright: ignore[reportArgumentType, reportCallIssue]
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("head_learns", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("place", [0, 1, 2], ids=["logprobs", "entropy", "plain"])
def test_one_output_alone_gives_its_own_gradient(head_learns: bool, place: int) -> None:
    hidden, head, _, targets = make_inputs()
    learns = [hidden, head] if head_learns else [hidden]
    got = logprobs_under_both_laws(
        hidden,
        head if head_learns else head.detach(),
        targets,
        process=penalise_repeats,
        chunk_tokens=2,
        entropy_has_gradient=True,
    )[place]
    law, entropy = full_softmax(hidden, head, targets, process=penalise_repeats)
    check_same_gradients(got, (law, entropy, full_softmax(hidden, head, targets)[0])[place], learns)


def test_a_bias_alone_can_learn() -> None:
    hidden, head, bias, targets = make_inputs()
    got, _ = token_logprobs(hidden.detach(), head.detach(), targets, bias=bias, logit_scale=0.5, chunk_tokens=2)
    expected, _ = full_softmax(hidden.detach(), head.detach(), targets, bias=bias, logit_scale=0.5)
    check_same_gradients(got, expected, [bias])


def sizes_kept(head_learns: bool, entropy_has_gradient: bool, process: Process | None) -> list[int]:
    """Number of entries of every tensor that autograd keeps between forward and backward pass."""
    generator = torch.Generator().manual_seed(0)
    num_tokens, width, vocabulary = 64, 4, 300
    hidden = torch.randn(num_tokens, width, generator=generator, requires_grad=True)
    head = torch.randn(vocabulary, width, generator=generator, requires_grad=head_learns)
    sizes: list[int] = []

    def record(saved: Tensor) -> Tensor:
        sizes.append(saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(record, lambda saved: saved):
        logprobs_under_both_laws(
            hidden,
            head,
            torch.randint(vocabulary, (num_tokens,), generator=generator),
            process=process,
            chunk_tokens=8,
            entropy_has_gradient=entropy_has_gradient,
        )
    return sizes


@pytest.mark.parametrize("head_learns", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("entropy_has_gradient", [False, True])
def test_nothing_as_large_as_the_logits_is_kept_for_the_backward_pass(
    head_learns: bool, entropy_has_gradient: bool
) -> None:
    kept = sizes_kept(head_learns, entropy_has_gradient, None)
    # 64 tokens, hidden 4, vocabulary 300: hidden states or slopes 256 each, head 1200; the logits would be 19200
    assert max(kept) <= 1200
    assert sum(kept) <= 1200 + 3 * 256


def test_processing_keeps_no_logits_either() -> None:
    # a chunk's logits are 8 * 300 = 2400; what the process saves of a chunk is gone when its slopes are taken
    kept = sizes_kept(False, True, lambda logits, positions: torch.where(logits > 0, logits / 1.3, logits * 1.3))
    assert max(kept) <= 2400
    learning = sizes_kept(True, True, lambda logits, positions: torch.where(logits > 0, logits / 1.3, logits * 1.3))
    assert max(learning) <= 1200  # the process runs without gradient until the backward pass


@pytest.mark.parametrize("head_learns", [False, True], ids=["frozen", "trainable"])
def test_half_precision_values_and_gradients_are_near_those_of_float32(head_learns: bool) -> None:
    hidden, head, _, targets = make_inputs(torch.bfloat16)
    learns = [hidden, head] if head_learns else [hidden]
    half = token_logprobs(hidden, head if head_learns else head.detach(), targets, chunk_tokens=2)
    exact_hidden, exact_head = (values.detach().float().requires_grad_() for values in (hidden, head))
    exact = token_logprobs(exact_hidden, exact_head, targets, chunk_tokens=2)
    for value, wide in zip(half, exact, strict=True):
        # a logit of up to 8 is rounded to 8 bits: 2^-8 * 8 = 0.03
        torch.testing.assert_close(value, wide, rtol=0.0, atol=0.05)
    weights = torch.linspace(-1, 1, N)
    gradients = torch.autograd.grad((weights * half[0]).sum(), learns)
    wide_gradients = torch.autograd.grad((weights * exact[0]).sum(), [exact_hidden, exact_head][: len(learns)])
    for gradient, wide in zip(gradients, wide_gradients, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert float((gradient.float() - wide).norm() / wide.norm()) < 0.02


def test_the_gradient_of_a_half_precision_head_is_added_up_over_chunks_without_losing_small_ones() -> None:
    # 512 equal rows, chosen token 0 of 2 at probability 1/2: each adds 1/2 to head[0]. A sum in bfloat16, which has 8
    # bits, would stand still at 128 (128 + 0.5 rounds to 128)
    hidden, head = torch.ones(512, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16).requires_grad_()
    logprobs, _ = token_logprobs(hidden, head, torch.zeros(512, dtype=torch.long), chunk_tokens=1)
    (gradient,) = torch.autograd.grad(logprobs.sum(), head)
    assert gradient.flatten().tolist() == [256.0, -256.0]

"""A few stated facts and a question. Half the questions have their answer among the facts; of the others it is right
to say that the answer is not stated.

Balanced: which fact is asked about. In unanswerable scenes the person asked about is one of the facts', the thing is
not, so that a matching name is no answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from grpo.tasks.base import Scene, Split, balanced_slot, drawn, prompt_id
from grpo.tasks.vocabulary import NAMES, words
from grpo.types import Prompt

NOT_STATED = "not stated"

INSTRUCTION = "If the text does not say, answer: not stated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wording:
    """One way to state and to ask where `{name}`'s `{thing}` is."""

    fact: str
    """States that it is in the `{place}`."""
    question: str
    """Asks where it is, in the fact's own words."""


WORDINGS: Mapping[Split, tuple[Wording, ...]] = {
    "train": (
        Wording(
            fact="The place of {name}'s {thing} is the {place}.",
            question="The place of {name}'s {thing} is what? (place or not stated)",
        ),
    ),
    "held_out": (
        Wording(
            fact="The location of {name}'s {thing} is the {place}.",
            question="The location of {name}'s {thing} is what? (place or not stated)",
        ),
    ),
}

THINGS: Mapping[Split, tuple[str, ...]] = {
    "train": words("bag bike hat kite lamp coat cup drum rope book chair ladder"),
    "held_out": words("basket guitar pillow phone hammer mirror clock bottle blanket candle"),
}

PLACES: Mapping[Split, tuple[str, ...]] = {
    "train": words("kitchen garage attic cellar garden office library bedroom barn hall"),
    "held_out": words("bathroom basement studio shed car school workshop tent"),
}


class Grounding:
    """The task; kinds alternate in drawn order, four prompts to a balanced block."""

    name: str = "grounding"
    objective: str = "grounding"
    kinds: tuple[str, ...] = ("answerable", "unanswerable")

    def prompt(self, split: Split, seed: int, index: int) -> Prompt:
        """See `grpo.tasks.base.Task`."""
        identity = prompt_id(self.name, split, seed, index)
        slot = balanced_slot(f"{self.name}/{split}/{seed}", index, 4)
        scene = _scene(split, identity, is_answerable=slot % 2 == 0, asked=slot // 2)
        return scene.to_prompt(identity)


def _scene(split: Split, identity: str, *, is_answerable: bool, asked: int) -> Scene:
    draw = drawn(identity)
    wording = draw.choice(WORDINGS[split])
    names = draw.sample(NAMES[split], 2)
    *things, unmentioned = draw.sample(THINGS[split], 3)
    places = draw.sample(PLACES[split], 2)
    facts = [
        wording.fact.format(name=name, thing=thing, place=place)
        for name, thing, place in zip(names, things, places, strict=True)
    ]
    question = wording.question.format(name=names[asked], thing=things[asked] if is_answerable else unmentioned)
    return Scene(
        objective=Grounding.objective,
        kind="answerable" if is_answerable else "unanswerable",
        instruction=INSTRUCTION,
        text=f"{' '.join(facts)}\n{question}",
        reference=places[asked] if is_answerable else NOT_STATED,
        choices=(*PLACES[split], NOT_STATED),
    )

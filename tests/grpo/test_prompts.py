"""Datasets become batches of prompts, and prompts become token ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, BloomConfig, LlamaConfig, PreTrainedTokenizerBase

from grpo.config import FilePrompts, TaskPrompts
from grpo.errors import DatasetError
from grpo.preflight import context_length
from grpo.prompt_rows import read_rows
from grpo.prompts import ListSource, PromptSource, TaskSource, encode_prompt, open_prompts
from grpo.tasks.base import Split
from grpo.types import Message, Prompt


def make_prompt(name: str, *, text: str = "Who?", objectives: tuple[str, ...] = ("a",)) -> Prompt:
    return Prompt(id=name, messages=(Message(role="user", content=text),), objectives=objectives)


def make_source(num_prompts: int, *, per_step: int, seed: int = 0) -> ListSource:
    return ListSource([make_prompt(f"p{n}") for n in range(num_prompts)], [], per_step=per_step, seed=seed)


def ids_of(prompts: Sequence[Prompt]) -> list[str]:
    return [prompt.id for prompt in prompts]


def open_file(path: Path, **config: Any) -> PromptSource:
    return open_prompts(
        FilePrompts.model_validate({"type": "file", "path": path, "per_step": 1, **config}),
        seed=0,
        objectives=["a", "b"],
    )


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(path: Path, **config: Any) -> list[Prompt]:
    """The file's prompts, by id."""
    source = open_file(path, **config)
    once = {prompt.id: prompt for step in range(1, 20) for prompt in source.batch(step)}
    return [once[name] for name in sorted(once)]


def error_of(path: Path, **config: Any) -> str:
    with pytest.raises(DatasetError) as caught:
        open_file(path, **config)
    return str(caught.value)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


# --- a list of prompts

EPOCHS = [(6, 2), (6, 6), (5, 2), (7, 3), (7, 5), (7, 6), (4, 3), (1, 1)]


@pytest.mark.parametrize(("num_prompts", "per_step"), EPOCHS)
def test_every_prompt_comes_once_an_epoch(num_prompts: int, per_step: int) -> None:
    source = make_source(num_prompts, per_step=per_step)
    stream = [name for step in range(1, num_prompts * 3 + 1) for name in ids_of(source.batch(step))]
    for start in range(0, len(stream) - num_prompts + 1, num_prompts):  # epochs lie end to end in the stream
        assert sorted(stream[start : start + num_prompts]) == sorted(f"p{n}" for n in range(num_prompts))


@pytest.mark.parametrize(("num_prompts", "per_step"), EPOCHS)
def test_no_step_holds_a_prompt_twice_not_even_where_two_epochs_meet(num_prompts: int, per_step: int) -> None:
    # the same prompt in the same step would draw the same completions: a copy, not a second sample
    for seed in range(5):
        source = make_source(num_prompts, per_step=per_step, seed=seed)
        for step in range(1, 60):
            assert len(set(ids_of(source.batch(step)))) == per_step


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    forwards, backwards = make_source(50, per_step=8), make_source(50, per_step=8)
    steps = range(1, 40)  # six epochs, with a seam inside a step at each
    batches = {step: ids_of(forwards.batch(step)) for step in steps}
    assert {step: ids_of(backwards.batch(step)) for step in reversed(steps)} == batches  # no hidden cursor
    assert ids_of(make_source(50, per_step=8, seed=1).batch(1)) != batches[1]


def test_epochs_are_shuffled_differently() -> None:
    source = make_source(20, per_step=20)
    assert ids_of(source.batch(1)) != ids_of(source.batch(2))


def test_held_out_prompts_are_the_first_of_each_objective() -> None:
    held_out = [make_prompt(f"{o}{n}", objectives=(o,)) for n in range(5) for o in ("a", "b")]
    source = ListSource([make_prompt("p")], held_out, per_step=1, seed=0)
    assert ids_of(source.held_out(2)) == ["a0", "b0", "a1", "b1"]
    assert ids_of(source.held_out(2)) == ids_of(source.held_out(2))


def test_all_sets_of_objectives_are_told_those_of_held_out_prompts_too() -> None:
    source = ListSource(
        [make_prompt("p", objectives=("a",))], [make_prompt("q", objectives=("a", "b"))], per_step=1, seed=0
    )
    assert source.objective_sets() == [("a",), ("a", "b")]


def test_tasks_take_turns_and_a_step_always_gives_the_same_scenes() -> None:
    config = TaskPrompts(type="tasks", names=("fairness", "grounding"), per_step=3)
    source = open_prompts(config, seed=0, objectives=["fairness", "grounding"])
    first, second = source.batch(1), source.batch(2)
    assert [prompt.objectives for prompt in [*first, *second]] == [("fairness",), ("grounding",)] * 3
    assert source.batch(2) == second
    assert len(set(ids_of([*first, *second]))) == 6


class OneLongScene:
    """A task of short scenes, one of which is long."""

    name = "one_long_scene"
    objective = "a"
    kinds = ("all",)

    def __init__(self, *, long_index: int) -> None:
        self._long_index = long_index

    def prompt(self, split: Split, seed: int, index: int) -> Prompt:
        text = "Who? " * (100 if index == self._long_index else 1)
        return make_prompt(f"{split}/{seed}/{index}", text=text)


@pytest.mark.parametrize("num_tasks", [1, 2])
def test_a_long_scene_behind_the_first_step_is_among_those_that_are_checked(num_tasks: int) -> None:
    tasks = [OneLongScene(long_index=1000) for _ in range(num_tasks - 1)] + [OneLongScene(long_index=63)]
    source = TaskSource(tasks, per_step=2, seed=0)
    assert max(len(prompt.messages[-1].content) for prompt in source.batch(1)) == 5
    assert max(len(prompt.messages[-1].content) for prompt in source.to_check()) == 500


def test_the_whole_first_step_is_checked_however_large_it_is() -> None:
    source = TaskSource([OneLongScene(long_index=1000)], per_step=300, seed=0)
    assert source.to_check() == source.batch(1)


# --- files


def test_a_jsonl_file_gives_one_prompt_a_row_with_its_columns(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "d.jsonl",
        [{"id": "x", "prompt": "Who?", "reference": 6, "kind": "hard"}, {"id": "y", "prompt": "What?"}],
    )
    x, y = rows_of(path)
    assert x == Prompt(
        id="x",
        messages=(Message(role="user", content="Who?"),),
        objectives=("a", "b"),
        reference="6",
        meta={"kind": "hard"},
    )
    assert (y.reference, y.meta) == (None, {})  # missing is None, never ""


def test_a_json_list_gives_the_same_prompts_as_lines(tmp_path: Path) -> None:
    rows = [{"prompt": "Who?", "reference": "Anna"}, {"prompt": "What?"}]
    lines = write_rows(tmp_path / "d.jsonl", rows)
    (tmp_path / "d.json").write_text(json.dumps(rows, indent=2))
    assert rows_of(tmp_path / "d.json") == rows_of(lines)


def test_rows_without_id_are_numbered_and_blank_lines_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('\n{"prompt": "Who?"}\n\n{"id": null, "prompt": "What?"}\n')
    assert [(prompt.id, prompt.messages[0].content) for prompt in rows_of(path)] == [("0", "Who?"), ("1", "What?")]


def test_a_prompt_may_be_a_list_of_messages(tmp_path: Path) -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Who?"},
    ]
    (prompt,) = rows_of(write_rows(tmp_path / "d.jsonl", [{"prompt": chat}]))
    assert [(message.role, message.content) for message in prompt.messages] == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Who?"),
    ]


def test_other_column_names_are_given_in_the_recipe(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", [{"q": "Who?", "a": "Anna", "reference": "not this"}])
    (prompt,) = rows_of(path, prompt_column="q", reference_column="a")
    assert (prompt.messages[0].content, prompt.reference) == ("Who?", "Anna")
    assert prompt.meta == {"reference": "not this"}


def test_a_rows_own_objectives_count_unless_the_recipe_names_them(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "d.jsonl",
        [
            {"prompt": "1", "objectives": ["b"]},
            {"prompt": "2", "objectives": "b"},
            {"prompt": "3", "objectives": []},
            {"prompt": "4", "objectives": None},
            {"prompt": "5"},
        ],
    )
    assert [prompt.objectives for prompt in rows_of(path)] == [("b",), ("b",), ("a", "b"), ("a", "b"), ("a", "b")]
    assert {prompt.objectives for prompt in rows_of(path, objectives=["a"])} == {("a",)}


def test_a_line_separator_inside_a_text_does_not_end_the_row(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"prompt": "one\u2028two\x85three"}, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert rows_of(path)[0].messages[0].content == "one\u2028two\x85three"


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "Who?"}\n', encoding="utf-8-sig")
    assert rows_of(path)[0].messages[0].content == "Who?"


def test_a_missing_file_is_shown_with_the_absolute_path_that_was_tried(tmp_path: Path) -> None:
    assert error_of(tmp_path / "gone.jsonl").startswith(f"no dataset at {tmp_path / 'gone.jsonl'}.")
    write_rows(tmp_path / "d.jsonl", [{"prompt": "Who?"}])
    message = error_of(tmp_path / "d.jsonl", held_out_path=tmp_path / "test.jsonl")
    assert message.startswith(f"no dataset at {tmp_path / 'test.jsonl'}.")


@pytest.mark.parametrize(("name", "text"), [("d.jsonl", ""), ("d.jsonl", "\n \n"), ("d.json", "[]")])
def test_an_empty_file_is_refused(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert error_of(tmp_path / name) == f"{tmp_path / name} is empty: it holds no prompt"


def test_a_missing_prompt_column_is_answered_with_the_columns_there_are(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", [{"question": "Who?", "answer": "Anna"}])
    assert error_of(path) == (
        f"{path} row 1 has no column 'prompt'; it has ['answer', 'question']. "
        "Name the right one with prompts.prompt_column."
    )


def test_more_prompts_a_step_than_there_are_is_refused_with_the_number_there_is(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", [{"prompt": "Who?"}] * 3)
    assert error_of(path, per_step=4).startswith("prompts.per_step is 4, but the dataset has 3 prompts")
    assert len(open_file(path, per_step=3).batch(1)) == 3


def test_a_column_that_only_some_rows_have_is_answered_with_the_row(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", [{"prompt": "Who?"}, {"promt": "What?"}])
    assert f"{path} row 2 has no column 'prompt'" in error_of(path)


def test_a_broken_line_is_named_by_its_number_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "Who?"}\n\n{"prompt": "What?"\n')
    assert error_of(path).startswith(f"{path} line 3 is not JSON: ")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("d.json", "[1, ", "is not JSON"),
        ("d.json", '["Who?"]', "row 1 is str, expected an object with columns"),
        ("d.jsonl", '"Who?"', "row 1 is str, expected an object with columns"),
        ("d.txt", "prompt,reference\nWho?,Anna", "line 1 is not JSON"),
    ],
)
def test_a_file_of_another_shape_is_refused_with_its_path(name: str, text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert error_of(tmp_path / name).startswith(f"{tmp_path / name} {words}")


def test_a_file_that_is_no_text_is_refused_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"prompt": "\xff\xfe"}\n')
    assert error_of(path).startswith(f"{path} cannot be read as UTF-8 text: ")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("", "a prompt is a text that is not empty"),
        ("  ", "a prompt is a text that is not empty"),
        (None, "a prompt is a text that is not empty"),
        (7, "a prompt is a text that is not empty"),
        ([], "or a list of {role, content} messages"),
        ([{"role": "user"}], "or a list of {role, content} messages"),
        (
            [{"role": "judge", "content": "x"}, {"role": "user", "content": "x"}],
            "or a list of {role, content} messages",
        ),
        ([{"role": "assistant", "content": "x"}], "the last message must be the user's, got role 'assistant'"),
    ],
)
def test_what_is_no_prompt_is_named_by_its_row(value: Any, words: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", [{"prompt": "Who?"}, {"prompt": value}])
    message = error_of(path)
    assert message.startswith(f"{path} row 2: ")
    assert words in message


@pytest.mark.parametrize("value", [3, [3], {"b": 1}])
def test_objectives_that_are_no_names_are_refused(value: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", [{"prompt": "Who?", "objectives": value}])
    assert error_of(path) == f"{path} row 1: objectives is {value!r}; expected a name or a list of names"


def test_an_id_that_is_there_twice_is_refused_and_named(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", [{"id": name, "prompt": "Who?"} for name in ("x", "y", "y", "z", "z")])
    assert error_of(path).startswith(f"{path} has the same id twice: 'y'.")


# --- tokens


def test_a_prompt_is_rendered_up_to_where_the_answer_begins(tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = encode_prompt(make_prompt("p", text="Who?"), tokenizer, max_tokens=100)
    assert tokenizer.decode(encoded.token_ids) == "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"


def test_a_prompt_that_just_fits_is_taken_and_one_token_less_names_it(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = make_prompt("row-17")
    length = len(encode_prompt(prompt, tokenizer, max_tokens=10_000).token_ids)
    assert len(encode_prompt(prompt, tokenizer, max_tokens=length).token_ids) == length
    with pytest.raises(DatasetError) as caught:
        encode_prompt(prompt, tokenizer, max_tokens=length - 1)
    assert str(caught.value) == (
        f"prompt 'row-17' has {length} tokens, but the model's context leaves {length - 1} for a prompt beside "
        "rollout.max_new_tokens. Shorten the prompt or lower rollout.max_new_tokens."
    )


def test_a_tokenizer_without_chat_template_is_answered_with_the_prompt(tiny_model_dir: Path) -> None:
    bare = AutoTokenizer.from_pretrained(tiny_model_dir)
    bare.chat_template = None
    with pytest.raises(DatasetError, match=r"prompt 'p' cannot be rendered as a chat"):
        encode_prompt(make_prompt("p"), bare, max_tokens=100)


def test_a_chat_that_the_template_refuses_is_answered_with_its_reason(tiny_model_dir: Path) -> None:
    strict = AutoTokenizer.from_pretrained(tiny_model_dir)
    strict.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(DatasetError, match=r"prompt 'p' cannot be rendered as a chat: System role not supported"):
        encode_prompt(make_prompt("p"), strict, max_tokens=100)


def test_a_model_whose_config_names_no_end_of_its_context_takes_every_prompt(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    assert context_length(LlamaConfig(max_position_embeddings=256)) == 256
    assert context_length(BloomConfig()) is None  # ALiBi: no position is the last
    assert len(encode_prompt(make_prompt("p", text="Who? " * 500), tokenizer, max_tokens=None).token_ids) > 500


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("d.csv", 'prompt,reference\n"Who, then?",Anna\n'),
        ("d.json", '[{"prompt": "Who, then?", "reference": "Anna"}]'),
        ("d.json", '{"prompt": "Who, then?", "reference": "Anna"}\n'),  # JSON lines under the name of JSON
        ("d.jsonl", '{"prompt": "Who, then?", "reference": "Anna"}'),
    ],
)
def test_rows_are_the_same_from_csv_json_and_json_lines(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert read_rows(tmp_path / name) == [{"prompt": "Who, then?", "reference": "Anna"}]

"""GSM8K, HaluEval and TruthfulQA: rows -> questions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from grpo.formats.base import Question, one_of


def read_gsm8k(row: Mapping[str, Any]) -> Question:
    """Cobbe et al. 2021, arXiv:2110.14168: the reference is the number behind "####", without its thousands commas."""
    worked, mark, number = str(row["answer"]).rpartition("####")
    if not mark or not number.strip():
        raise ValueError("its answer has no '#### number'")
    return Question(
        id=_id_of(str(row["question"])),
        text=str(row["question"]),
        reference=number.strip().replace(",", ""),
        meta={"solution": worked.strip()},
    )


def read_halueval_qa(row: Mapping[str, Any]) -> Question:
    """Li et al. 2023, arXiv:2305.11747, QA: answer from the given knowledge."""
    return Question(
        id=_id_of(f"{row['knowledge']}\n{row['question']}"),
        text=f"{row['knowledge']}\n{row['question']} Answer from the text above, in a few words.",
        reference=str(row["right_answer"]),
        meta={"knowledge": str(row["knowledge"]), "hallucinated_answer": str(row["hallucinated_answer"])},
    )


def read_halueval(row: Mapping[str, Any]) -> Question:
    """The same, general: a user's query; `meta` keeps the answer that was labelled and its label ("yes" or "no")."""
    if row["hallucination"] not in ("yes", "no"):
        raise ValueError(f"its hallucination is {row['hallucination']!r}, expected yes or no")
    return Question(
        id=str(row["ID"]),
        text=str(row["user_query"]),
        reference=None,
        meta={"response": str(row["chatgpt_response"]), "hallucination": str(row["hallucination"])},
    )


def read_truthfulqa(row: Mapping[str, Any]) -> Question:
    """Lin et al. 2021, arXiv:2109.07958, in the authors' binary form: the best answer or the best incorrect one.

    The authors' CSV, or the hub's generation subset, which names no best incorrect answer: there it is the first.
    Which answer comes first is decided by the question, so that it is no help and never changes.
    """
    columns = {name.lower().replace(" ", "_"): value for name, value in row.items()}
    correct, incorrect = _list_of(columns["correct_answers"]), _list_of(columns["incorrect_answers"])
    question, best = str(columns["question"]), str(columns["best_answer"])
    worst = str(columns.get("best_incorrect_answer") or incorrect[0])
    choices = [best, worst] if int(_id_of(question), 16) % 2 else [worst, best]
    return Question(
        id=_id_of(question),
        text=f"{question}\n{one_of(choices)}",
        reference=best,
        meta={
            "choices": choices,
            "kind": str(columns["type"]).lower(),
            "category": str(columns["category"]),
            "correct_answers": correct,
            "incorrect_answers": incorrect,
        },
    )


def _list_of(answers: Any) -> list[str]:
    if isinstance(answers, list | tuple):
        return [str(answer) for answer in answers]
    return [answer.strip() for answer in str(answers).split(";") if answer.strip()]


def _id_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]

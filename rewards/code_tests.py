"""Does the completion's Python code pass the tests? Run in bubblewrap, or not at all.

Tests come from a column of the dataset, or else from the reference; they are a list, or JSON text of one, of
- Python code that raises where the test fails, such as MBPP's `assert add(1, 2) == 3`, run after the completion's code
  in the same scope; HumanEval's `check(candidate)` is called with the column `entry_point`;
- `{"input": text, "output": text}`: what the program reads from standard input and has to print. White space at the
  ends of lines and of the output does not count. APPS's `{"inputs": [...], "outputs": [...]}` is read as such pairs.

Each test gets a sandbox of its own. A program's output is compared outside of it. A test written as code runs beside
the completion's code, which could lie to it (an object that equals everything): prefer input and output where a policy
trains against the score for long.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, PrivateAttr

from rewards.answer_text import ReadsAnswer
from rewards.errors import RewardUnavailable
from rewards.processes import Finished, ProcessPool
from rewards.sandbox import SandboxLimits, run_code, why_unavailable
from rewards.types import RewardInput, Score

_FENCED = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_SANDBOX_GRACE_S = 15.0  # for starting and ending the sandbox on a busy machine; the code has its own limit


class CodeTests(ReadsAnswer):
    """1 where all tests pass, or the share that does; 0 for a completion without code, or whose code fails by itself.

    Missing where the tests are unusable or the sandbox had trouble. A test that passes a limit is failed.
    """

    tests_column: str = Field("tests", min_length=1)
    """The dataset's column with the tests; a prompt without it is tested by its reference."""
    credit: Literal["all", "share"] = "all"
    """"all": 1 or 0, and no test is run after the first that fails. "share": tests passed / tests."""
    timeout_s: float = Field(10.0, gt=0, le=600)
    """Longest wall time of one test."""
    memory_bytes: int = Field(1 << 30, ge=64 << 20)
    """Largest address space of one test."""
    disk_bytes: int = Field(64 << 20, ge=1 << 20)
    """Size of the sandbox's /tmp."""
    output_bytes: int = Field(1 << 20, gt=0)
    """Most that one test may print."""
    site_packages: bool = False
    """Whether the code can import the packages installed here, such as numpy, or the standard library alone."""

    _pool: ProcessPool = PrivateAttr()

    def model_post_init(self, _: object) -> None:
        self._pool = ProcessPool(
            "rewards.code_tests:run_test",
            timeout_s=self.timeout_s + _SANDBOX_GRACE_S,
            memory_bytes=self.memory_bytes + (1 << 30),  # the sandbox's limit cannot be above its parent's
        )

    async def check(self) -> None:
        """Run a line of code in the sandbox.

        Raises:
            RewardUnavailable: that does not work here; the message says what to install.
        """
        problem = await asyncio.to_thread(why_unavailable)
        if problem:
            raise RewardUnavailable(f"reward 'code_tests' runs no code without a sandbox: {problem}")

    async def score(self, inputs: list[RewardInput]) -> list[Score]:
        """One Score per completion, tested side by side."""
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(self._score_one(one)) for one in inputs]
        return [task.result() for task in running]

    async def aclose(self) -> None:
        """End the worker processes and what runs in them."""
        await self._pool.aclose()

    async def _score_one(self, one: RewardInput) -> Score:
        try:
            tests = parse_tests(one.meta.get(self.tests_column, one.reference), one.meta.get("entry_point"))
        except ValueError as exc:
            return Score(value=None, reason=f"unusable tests: {exc}")
        answer = self.answer_in(one.completion)
        if answer is None:
            return Score(value=0.0, reason=self.no_answer)
        code = extract_code(answer)
        if not code.strip():
            return Score(value=0.0, reason="no code")
        return await self._score_of(code, tests)

    async def _score_of(self, code: str, tests: Sequence[Mapping[str, str]]) -> Score:
        num_passed, first_failure = 0, ""
        for number, test in enumerate(tests, start=1):
            outcome = await self._pool.call(code, test, self._limits())
            if not isinstance(outcome, Finished):
                return Score(value=None, reason=f"sandbox trouble: {outcome.kind}: {outcome.detail}")
            has_passed, detail = outcome.value
            if has_passed is None:
                return Score(value=None, reason=f"sandbox trouble: {detail}")
            num_passed += has_passed
            if not has_passed:
                first_failure = first_failure or f"; test {number}: {detail}"
                if self.credit == "all":
                    return Score(value=0.0, reason=f"failed{first_failure}")
        return Score(value=num_passed / len(tests), reason=f"{num_passed} of {len(tests)} tests{first_failure}")

    def _limits(self) -> dict[str, Any]:
        return self.model_dump(include=set(SandboxLimits.__dataclass_fields__))


def run_test(code: str, test: Mapping[str, str], limits: Mapping[str, Any]) -> tuple[bool | None, str]:
    """Run one test; called in a worker process.

    Returns:
        Whether it has passed, None for trouble with the sandbox; and why not.
    """
    is_program = "output" in test
    tests = [] if is_program else [test["code"]]
    run = run_code(code, tests, test.get("input", ""), SandboxLimits(**limits))
    if run.ending == "trouble":
        return None, run.message
    if run.ending == "timeout":
        return False, f"not done after {limits['timeout_s']:g} s"
    if run.ending == "output":
        return False, f"printed more than {limits['output_bytes']} bytes"
    has_ended_well = run.exit_code == 0 if is_program else run.ending == "finished"  # a program may call sys.exit()
    if not has_ended_well:
        return False, run.message or f"ended early with exit code {run.exit_code}"
    if is_program and _without_trailing_space(run.stdout) != _without_trailing_space(test["output"]):
        return False, f"printed {run.stdout[:100]!r}, expected {test['output'][:100]!r}"
    return True, ""


def extract_code(text: str) -> str:
    """The last fenced block; one that says that it is Python goes before others. Without any fence, the whole text."""
    blocks = _FENCED.findall(text)
    python = [block for language, block in blocks if language.lower() in ("python", "python3", "py")]
    return (python or [block for _, block in blocks] or [text])[-1]


def parse_tests(tests: object, entry_point: object = None) -> list[dict[str, str]]:
    """Tests in any of the accepted forms -> a list of {"code"} or {"input", "output"}.

    Raises:
        ValueError: they have another form, or there are none.
    """
    if isinstance(tests, str) and tests.lstrip()[:1] in ("[", "{"):
        try:
            tests = json.loads(tests)
        except ValueError as exc:
            raise ValueError(f"not JSON: {exc}") from exc
    if isinstance(tests, Mapping) and {"inputs", "outputs"} <= tests.keys():
        inputs, outputs = tests["inputs"], tests["outputs"]
        if not isinstance(inputs, Sequence) or not isinstance(outputs, Sequence) or len(inputs) != len(outputs):
            raise ValueError("inputs and outputs are not lists of one length")
        tests = [{"input": given, "output": expected} for given, expected in zip(inputs, outputs, strict=True)]
    if isinstance(tests, str | Mapping):
        tests = [tests]
    if not isinstance(tests, Sequence) or not tests:
        raise ValueError(f"expected a list of tests, found {type(tests).__name__ if tests is not None else 'none'}")
    return [_parse_test(test, entry_point) for test in tests]


def _parse_test(test: object, entry_point: object) -> dict[str, str]:
    if isinstance(test, str) and test.strip():
        calls_check = isinstance(entry_point, str) and entry_point.isidentifier() and "def check(" in test
        return {"code": f"{test}\ncheck({entry_point})\n" if calls_check else test}
    if isinstance(test, Mapping) and isinstance(test.get("output"), str) and isinstance(test.get("input", ""), str):
        return {"input": test.get("input", ""), "output": test["output"]}
    raise ValueError(f'expected code or {{"input": text, "output": text}}, found {str(test)[:100]!r}')


def _without_trailing_space(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines()).rstrip()

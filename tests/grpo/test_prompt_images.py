"""Images of prompts: columns and placeholders, files that are missing or broken, and the tokens they take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from image_builders import VisionModel, image_prompt, load_vision_model, mixed_prompts, save_image
from PIL import Image
from pydantic import ValidationError
from run_builders import write_rows

from grpo.config import FilePrompts
from grpo.errors import DatasetError
from grpo.prompts import check_prompt, encode_prompt, open_prompts
from grpo.runtime.image_processors import load_image_text_processor
from grpo.runtime.models import end_token_ids, load_tokenizer
from grpo.types import Prompt


@pytest.fixture(scope="module", params=["tiny_llava_dir", "tiny_qwen_vl_dir"])
def model(request: pytest.FixtureRequest) -> VisionModel:
    return load_vision_model(request.getfixturevalue(request.param))


def read(folder: Path, rows: Sequence[dict[str, Any]], **changes: Any) -> list[Prompt]:
    write_rows(folder / "rows.jsonl", rows)
    config = FilePrompts(
        type="file", path=folder / "rows.jsonl", per_step=1, **{"images_column": "pictures", **changes}
    )
    return open_prompts(config, seed=0, objectives=["a"]).to_check()


def test_a_column_names_one_image_or_several_beside_the_data_file(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    first, second = (save_image(tmp_path / "photos" / name, 8, 8) for name in ("a.png", "b.png"))
    rows = [
        {"prompt": "Who?", "pictures": "photos/a.png"},
        {"prompt": "Which?", "pictures": ["photos/b.png", "photos/a.png"]},
        {"prompt": "Why?", "pictures": None},
        {"prompt": "When?"},
    ]
    prompts = read(tmp_path, rows)
    assert [prompt.images for prompt in prompts] == [(first,), (second, first), (), ()]
    assert all("pictures" not in prompt.meta for prompt in prompts)


def test_images_stand_where_the_prompt_says_or_else_first(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", 8, 8)
    rows = [
        {"prompt": "Is <image> it?", "pictures": "a.png"},
        {"prompt": "Which?", "pictures": ["a.png", "a.png"]},
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "See "}, {"type": "image"}]}],
            "pictures": "a.png",
        },
        {
            "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}],
            "pictures": "a.png",
        },
    ]
    assert [[message.content for message in prompt.messages] for prompt in read(tmp_path, rows)] == [
        ["Is <image> it?"],
        ["<image><image>Which?"],
        ["See <image>"],
        ["Be brief.", "<image>What?"],
    ]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "Who?", "pictures": "gone.png"}, ["row 1", "there is no image", "gone.png"]),
        ({"prompt": "Who?", "pictures": "https://example.org/a.png"}, ["is an address", "nothing is fetched"]),
        ({"prompt": "Who?", "pictures": 7}, ["images are 7", "expected the path"]),
        ({"prompt": "<image> or <image>?", "pictures": "a.png"}, ["1 images for 2 <image>"]),
        ({"prompt": "Is <image> it?", "pictures": []}, ["0 images for 1 <image>"]),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image", "url": "a.png"}]}], "pictures": "a.png"},
            ["a prompt is a text"],
        ),
    ],
)
def test_a_row_that_cannot_be_shown_is_refused_by_name(tmp_path: Path, row: dict[str, Any], words: list[str]) -> None:
    save_image(tmp_path / "a.png", 8, 8)
    with pytest.raises(DatasetError) as refusal:
        read(tmp_path, [row])
    assert [word for word in words if word not in str(refusal.value)] == []


def test_images_are_columns_of_plain_files_alone(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="plain"):
        FilePrompts(type="file", path=tmp_path, images_column="pictures", format="gsm8k")


def test_without_an_images_column_the_placeholder_is_text_to_a_model_that_has_another(
    tmp_path: Path, tiny_qwen_vl_dir: Path
) -> None:
    (prompt,) = read(tmp_path, [{"prompt": "Is <image> it?"}], images_column=None)
    (encoded,) = load_vision_model(tiny_qwen_vl_dir).encoded([prompt])
    tokenizer = load_tokenizer(str(tiny_qwen_vl_dir), base_dir=tmp_path)
    assert "Is <image> it?" in str(tokenizer.decode(list(encoded.token_ids)))
    assert encoded.images is None


def test_a_placeholder_becomes_the_tokens_that_the_image_takes(model: VisionModel, tmp_path: Path) -> None:
    """A 16 x 16 image takes 4 tokens in both models: 2 x 2 patches of 8, and 4 x 4 patches of 4 merged by 2."""
    path = save_image(tmp_path / "a.png", 16, 16)
    with_image, without = model.encoded([image_prompt("p", "A<image>B", path), image_prompt("q", "AB")])
    image_token = model.processor.image_token_id
    assert with_image.token_ids.count(image_token) == 4
    assert with_image.images is not None
    assert with_image.images.token_types == tuple(int(token == image_token) for token in with_image.token_ids)
    special = {model.tokenizer.convert_tokens_to_ids(name) for name in ("<|vision_start|>", "<|vision_end|>")}
    text = [token for token in with_image.token_ids if token not in {image_token, *special}]
    assert model.tokenizer.decode(text) == model.tokenizer.decode(list(without.token_ids))


def test_the_length_is_known_before_any_pixel_is_read(model: VisionModel, tmp_path: Path) -> None:
    prompts = mixed_prompts(tmp_path)
    for prompt, encoded in zip(prompts, model.encoded(prompts), strict=True):
        found = check_prompt(prompt, model.tokenizer, max_tokens=None, image_encoder=model.encoder)
        assert found == len(encoded.token_ids)


def test_a_photo_that_lies_on_its_side_is_turned(model: VisionModel, tmp_path: Path) -> None:
    """EXIF orientation 6: the camera was turned; 40 x 16 pixels in the file are 16 x 40 upright."""
    lying, upright = tmp_path / "lying.png", tmp_path / "upright.png"
    picture = Image.new("RGB", (40, 16), (200, 30, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(lying, exif=exif)
    picture.rotate(-90, expand=True).save(upright)
    first, second = model.encoded([image_prompt("p", "<image>", str(path)) for path in (lying, upright)])
    assert first.token_ids == second.token_ids
    assert first.images is not None
    assert second.images is not None
    for name, tensor in first.images.tensors.items():
        assert tensor.equal(second.images.tensors[name])
    num_tokens = check_prompt(
        image_prompt("p", "<image>", str(lying)), model.tokenizer, max_tokens=None, image_encoder=model.encoder
    )
    assert num_tokens == len(first.token_ids)


@pytest.mark.parametrize("content", [b"", b"no image at all", "cut"])
def test_a_broken_image_is_named(model: VisionModel, tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "a.png"
    save_image(path, 64, 64)
    path.write_bytes(path.read_bytes()[:2000] if isinstance(content, str) else content)
    prompt = image_prompt("p7", "<image>", str(path))
    with pytest.raises(DatasetError, match=r"a\.png of prompt 'p7' cannot be read"):
        model.encoded([prompt])


def test_a_text_that_holds_the_models_image_token_is_refused(model: VisionModel) -> None:
    """Otherwise the model would look there for an image that nobody gave."""
    with pytest.raises(DatasetError, match="which to this model is an image"):
        model.encoded([image_prompt("p", f"What is {model.processor.image_token}?")])


def test_a_prompt_that_is_too_long_with_its_images_is_refused(model: VisionModel, tmp_path: Path) -> None:
    prompt = image_prompt("p", "<image>", save_image(tmp_path / "a.png", 16, 16))
    (encoded,) = model.encoded([prompt])
    room = len(encoded.token_ids) - 1
    with pytest.raises(DatasetError, match=f"has {room + 1} tokens"):
        encode_prompt(prompt, model.tokenizer, max_tokens=room, image_encoder=model.encoder)
    with pytest.raises(DatasetError, match=f"has {room + 1} tokens"):
        check_prompt(prompt, model.tokenizer, max_tokens=room, image_encoder=model.encoder)


def test_a_model_that_reads_text_alone_refuses_images(tiny_model_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model_dir), base_dir=tmp_path)
    assert load_image_text_processor(str(tiny_model_dir), tokenizer, base_dir=tmp_path) is None
    prompt = image_prompt("p", "<image>", save_image(tmp_path / "a.png", 8, 8))
    with pytest.raises(DatasetError, match="the model reads text alone"):
        encode_prompt(prompt, tokenizer, max_tokens=None)


def test_the_turns_end_is_found_in_a_template_that_takes_content_in_parts_alone(tiny_llava_dir: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_llava_dir), base_dir=tiny_llava_dir)
    tokenizer.chat_template = (
        "{% for message in messages %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}"
        "<|im_start|>{% endfor %}"
    )
    assert end_token_ids(tokenizer, None) == (1, 2)  # <|im_start|>, and the tokenizer's own <|im_end|>

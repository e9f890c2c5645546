"""A tiny LLaVA that answers with a box such as [1,2,5,6], and images with a bright rectangle to find.

What it answers is a box, and any box: how one is written is learned here in some seconds, where the rectangle is not.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from models.tiny_llava import save_tiny_llava
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

SIDE, CELL = 8, 2
"""Cells of an image's side, and pixels of a cell's."""
QUESTION = "Where?"
Box = tuple[int, int, int, int]


def random_box(generator: np.random.Generator) -> Box:
    """Left, top, right and bottom, in cells."""
    left, right = sorted(generator.choice(SIDE + 1, 2, replace=False).tolist())
    top, bottom = sorted(generator.choice(SIDE + 1, 2, replace=False).tolist())
    return left, top, right, bottom


def picture_of(box: Box) -> Image.Image:
    """Bright inside the box, dark outside."""
    pixels = np.full((SIDE * CELL, SIDE * CELL, 3), 30, dtype=np.uint8)
    left, top, right, bottom = (CELL * one for one in box)
    pixels[top:bottom, left:right] = 220
    return Image.fromarray(pixels)


def written(box: Box) -> str:
    """As the model writes it."""
    return json.dumps(box, separators=(",", ":"))


def save_examples(folder: Path, *, count: int = 4) -> None:
    """Pictures, and examples.jsonl with the box of each as reference."""
    generator = np.random.default_rng(1)
    boxes = [random_box(generator) for _ in range(count)]
    for number, box in enumerate(boxes):
        picture_of(box).save(folder / f"{number}.png")
    rows = [
        {"id": f"p{number}", "prompt": QUESTION, "image": f"{number}.png", "reference": written(box)}
        for number, box in enumerate(boxes)
    ]
    (folder / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def save_base(folder: Path, *, steps: int = 60) -> None:
    """The model as a folder that loads offline. Leaves torch's global random state alone."""
    save_tiny_llava(folder)
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).train()
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    generator = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        shown = [picture_of(random_box(generator)) for _ in range(16)]
        answers = [written(random_box(generator)) + processor.tokenizer.eos_token for _ in shown]  # of another picture
        batch = processor(images=shown, text=[prompt + answer for answer in answers], return_tensors="pt")
        length = processor(images=shown[0], text=prompt, return_tensors="pt")["input_ids"].shape[1]
        labels = batch["input_ids"].clone()
        labels[:, :length] = -100
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)

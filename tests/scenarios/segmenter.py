"""A segmentation-capable vision-language model: image and text in, the logits of a mask out. Random weights.

The last token's hidden state asks each patch of the image whether it belongs to the mask. LoRA of rank 64 with alpha
128 learns on the language model, and the head that makes the question learns altogether.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

VOCABULARY, HIDDEN, SEEN, SIDE = 64, 64, 24, 16
IMAGE = 3
"""The text's token that an image patch takes the place of."""
PATCHES = 4


class Segmenter(nn.Module):
    """[B, 3, SIDE, SIDE] pixels and [B, T] text, PATCHES of it IMAGE, in; [B, SIDE, SIDE] mask logits out."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

        size = {"num_hidden_layers": 2, "num_attention_heads": 2}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.vision = ViTModel(
                ViTConfig(hidden_size=SEEN, intermediate_size=32, image_size=SIDE, patch_size=8, **size),
                add_pooling_layer=False,
            )
            self.connector = nn.Linear(SEEN, HIDDEN)
            self.language_model = LlamaForCausalLM(
                LlamaConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=64, **size)
            )
            self.mask_head = nn.Linear(HIDDEN, SEEN * (SIDE // 2) ** 2)

    def embedded(self, pixels: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """([B, T, HIDDEN] text with the image in its place, [B, PATCHES, SEEN] what was seen)."""
        seen = self.vision(pixels).last_hidden_state[:, 1:]
        words = self.language_model.get_input_embeddings()(text)
        return self.placed(words, text == IMAGE, self.connector(seen)), seen

    def placed(self, words: Tensor, is_image: Tensor, image: Tensor) -> Tensor:
        """The image's vectors where the text has their tokens."""
        return words.masked_scatter(is_image.unsqueeze(-1), image)

    def forward(self, pixels: Tensor, text: Tensor) -> Tensor:
        embeddings, seen = self.embedded(pixels, text)
        hidden = self.language_model.model(inputs_embeds=embeddings).last_hidden_state[:, -1]  # [B, HIDDEN]
        questions = self.mask_head(hidden).view(-1, (SIDE // 2) ** 2, SEEN)  # one a pixel of a patch
        logits = torch.einsum("bqs,bps->bpq", questions, seen)
        rows = logits.view(-1, 2, 2, SIDE // 2, SIDE // 2)
        return rows.transpose(2, 3).reshape(-1, SIDE, SIDE)


class CannotLearn(Segmenter):
    """The forward was written for answering, and training uses it too."""

    @torch.no_grad()
    def forward(self, pixels: Tensor, text: Tensor) -> Tensor:
        return super().forward(pixels, text)


class BlanksInPlace(Segmenter):
    """The image's places are blanked in what the embedding gave."""

    def placed(self, words: Tensor, is_image: Tensor, image: Tensor) -> Tensor:
        words.masked_fill_(is_image.unsqueeze(-1), 0.0)
        return words.masked_scatter(is_image.unsqueeze(-1), image)


class AssignsInPlace(Segmenter):
    """The image is written into what the embedding gave."""

    def placed(self, words: Tensor, is_image: Tensor, image: Tensor) -> Tensor:
        words[is_image] = image.flatten(0, 1)
        return words


def with_lora(model: Segmenter) -> nn.Module:
    """Rank 64 and alpha 128 on the language model; inputs carry gradient, as gradient checkpointing wants it."""
    config = LoraConfig(
        r=64, lora_alpha=128, target_modules=r"language_model\..*\.(q|v)_proj", modules_to_save=["mask_head"]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        adapted = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    model.language_model.enable_input_require_grads()
    return adapted.train()


def examples(count: int, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images with a bright rectangle, a text, and the mask of the rectangle [count, SIDE, SIDE]."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(count, SIDE, SIDE)
    for mask in masks:
        top, left = (int(one) for one in torch.randint(0, SIDE // 2, (2,), generator=generator))
        mask[top : top + SIDE // 2, left : left + SIDE // 2] = 1.0
    noise = torch.rand(count, 3, SIDE, SIDE, generator=generator)
    text = torch.tensor([[IMAGE] * PATCHES + [10, 11, 12]]).repeat(count, 1)
    return 0.3 * noise + 0.7 * masks.unsqueeze(1), text, masks


def soft_dice(logits: Tensor, masks: Tensor) -> Tensor:
    """Mean over the images of 2 common area / (area + area), the mask's share of a pixel counting as area."""
    given = logits.sigmoid()
    common, areas = (given * masks).sum(dim=(1, 2)), (given + masks).sum(dim=(1, 2))
    return (2 * common / areas).mean()


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    """1 - Dice on four fixed images."""
    pixels, text, masks = examples(4, seed=0)
    return lambda: 1 - soft_dice(model(pixels, text), masks)


def validation_dice(model: nn.Module) -> float:
    """Of the masks, cut at 0.5, of eight images that training does not see."""
    pixels, text, masks = examples(8, seed=1)
    with torch.no_grad():
        given = (model(pixels, text) > 0).float()
    common, areas = (given * masks).sum(dim=(1, 2)), (given + masks).sum(dim=(1, 2))
    return float((2 * common / areas).mean())

"""A vision-text model of one's own: a frozen OCR encoder, a projector that should learn, a frozen language model.

Random weights; it stands for one with a projector of 18.9 million parameters in front of a model of 1.6 billion.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

VOCABULARY, HIDDEN, READ = 64, 16, 24


class OcrReader(nn.Module):
    """Pixels and text in, the loss of the text out."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

        size = {"num_hidden_layers": 2, "num_attention_heads": 2}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.encoder = ViTModel(
                ViTConfig(hidden_size=READ, intermediate_size=32, image_size=16, patch_size=8, **size),
                add_pooling_layer=False,
            )
            self.projector = nn.Sequential(nn.Linear(READ, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN))
            self.language_model = LlamaForCausalLM(
                LlamaConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=32, **size)
            )
        self.requires_grad_(False)
        self.projector.requires_grad_(True)

    def features(self, pixels: Tensor) -> Tensor:
        """[B, patches + 1, HIDDEN] of [B, 3, 16, 16]."""
        with torch.no_grad():  # harmless here: nothing in or before the encoder learns
            read = self.encoder(pixels).last_hidden_state
        return self.projector(read)

    def answer(self, embeddings: Tensor) -> Tensor:
        """[B, T, VOCABULARY] logits."""
        return self.language_model(inputs_embeds=embeddings).logits

    def forward(self, pixels: Tensor, text: Tensor) -> Tensor:
        """The mean negative log-likelihood of [B, T] text behind the image."""
        features = self.features(pixels)
        embedded = self.language_model.get_input_embeddings()(text)
        logits = self.answer(torch.cat([features, embedded], dim=1))[:, features.shape[1] - 1 : -1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), text.flatten())


class EncodesWithoutGradient(OcrReader):
    """The block meant for the frozen encoder holds the projector too."""

    def features(self, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            read = self.encoder(pixels).last_hidden_state
            return self.projector(read)


class AnswersWithoutGradient(OcrReader):
    """The language model is frozen, so "it needs no gradient"; what lies before it does."""

    def answer(self, embeddings: Tensor) -> Tensor:
        with torch.no_grad():
            return super().answer(embeddings)


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    """Of two fixed images with their texts."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(2, 3, 16, 16, generator=generator)
    text = torch.randint(3, VOCABULARY, (2, 6), generator=generator)
    return lambda: model(pixels, text)

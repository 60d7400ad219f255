"""Class labels in place of prompts, for transformers that are conditioned on a class (DiT)."""

from collections.abc import Sequence
from pathlib import Path

import torch

from diffseg.diffusion.conditioning import Conditioning


class ClassLabelEncoder:
    """Replaces `PromptEncoder` for class-conditional models: a prompt is the number of a class, or empty for none.

    No class is a label of its own, the number of classes (1000 for ImageNet), which the model learnt for
    classifier-free guidance (DiT, 2212.09748, section 3.1).

    Args:
        model: Name of the model in error messages.
        classes: Number of classes.
    """

    inversions = ()
    truncate = False
    fingerprint = None

    def __init__(self, model: str | Path, classes: int):
        self.model = model
        self.classes = classes

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """Labels (P,), and embeddings without tokens (P, 0, 0). Raises a ValueError for other texts."""
        labels = torch.tensor([self._label(prompt) for prompt in prompts], device='cpu')
        return Conditioning(torch.empty(len(prompts), 0, 0, device='cpu'), labels=labels)

    def prepare(self, prompts: Sequence[str]) -> None:
        """Raise a ValueError for prompts that are neither empty nor the number of a class."""
        for prompt in prompts:
            self._label(prompt)

    def for_negative_prompts(self) -> 'ClassLabelEncoder':
        """The encoder of negative prompts: itself."""
        return self

    def _label(self, prompt: str) -> int:
        if not prompt:
            return self.classes
        if not prompt.isdecimal() or int(prompt) > self.classes:
            raise ValueError(
                f'{self.model} is conditioned on a class, not on {prompt!r}; give the number of a class, 0 to '
                f'{self.classes - 1}, or {self.classes} or an empty prompt for none'
            )
        return int(prompt)

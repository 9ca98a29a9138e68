"""Token states of prompts from a text encoder by path (transformers). Nothing here trains."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fewstep.errors import DataError
from fewstep.models.foreign import fingerprint, loading, read_config, refuse_missing

WHAT = "text encoder"


class TextStates(NamedTuple):
    states: Float[Tensor, "n l d"]
    mask: Bool[Tensor, "n l"]
    """True where a token is real; padding is on the right and its states are 0."""


class TextEncoder:
    """The last hidden state of every token, special tokens included."""

    def __init__(self, model: Any, tokenizer: Any, *, name: str, max_tokens: int) -> None:
        self.name, self.max_tokens = name, max_tokens
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.width: int = model.config.hidden_size

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        max_tokens: int = 64,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "TextEncoder":
        path = Path(path)
        config = read_config(path, what=WHAT)
        limit = config.get("max_position_embeddings", max_tokens)
        if not 0 < max_tokens <= limit:
            raise DataError(f"{WHAT}: max_tokens is {max_tokens}; {path} takes 1 to {limit}")
        if "vision_config" in config:
            raise DataError(
                f"{WHAT}: {path} is a {config.get('model_type')} model with an image tower; "
                f"give a text-only encoder (BERT or T5 family, for example)"
            )
        with loading(path, what=WHAT):
            import transformers

            kind = transformers.AutoModel
            if config.get("is_encoder_decoder"):
                kind = transformers.AutoModelForTextEncoding
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
            model, info = kind.from_pretrained(
                path,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        # A pooler is not on the way to the token states.
        missing = [key for key in info["missing_keys"] if not key.startswith("pooler.")]
        refuse_missing(path, missing, what=WHAT)
        if tokenizer.pad_token is None:
            raise DataError(
                f"{WHAT}: the tokenizer in {path} has no pad token; name one in its files"
            )
        tokenizer.padding_side = tokenizer.truncation_side = "right"
        precision = str(dtype).removeprefix("torch.")
        name = f"{type(model).__name__}-{fingerprint(path)}-{max_tokens}-{precision}"
        return cls(model.to(device), tokenizer, name=name, max_tokens=max_tokens)

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt before trimming; `encode` keeps the first `max_tokens`."""
        if not prompts:
            return []
        return [len(ids) for ids in self.tokenizer(list(prompts), verbose=False)["input_ids"]]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> TextStates:
        assert len(prompts) > 0
        tokens = self.tokenizer(
            list(prompts),
            padding="longest",
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        ).to(self.model.device)
        out = self.model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        mask = tokens["attention_mask"].bool()
        return TextStates(out.last_hidden_state.float() * mask[..., None], mask)

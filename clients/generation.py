"""A causal language model from a folder or the hub, and text out of any model that gives logits.

Weights are read as safetensors only, and no code that comes with them is run. Sampling is temperature sampling over the
smallest set of tokens that holds a share of the probability (Holtzman et al. 2020, "The Curious Case of Neural Text
Degeneration", §3.1). Nothing here knows of adapters, clients or rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from clients.places import DataError, Place, require_folder

MEND: Final = (
    "`trellis make-base-model` makes models/base-gpt2, `make models MODEL=smollm2` fetches models/smollm2; or name a "
    "folder or hub name of a causal language model"
)


def load_language_model(place: Place, dtype: torch.dtype = torch.float32) -> Any:
    """A causal language model, frozen and in eval mode.

    Args:
        place: a folder with config.json and model.safetensors, or a hub name.
        dtype: of its weights.

    Raises:
        DataError: it cannot be loaded.
    """
    folder = require_folder(place, MEND)
    import transformers  # takes a second, and only pretrained models need it

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, dtype=dtype
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise DataError(f"no language model can be loaded from {place}: {first}") from error
    model.eval()  # type: ignore[no-untyped-call]
    return model.requires_grad_(False)


def continuation(
    logits: Callable[[Tensor], Tensor],
    tokenizer: Any,
    prompt: str,
    *,
    tokens: int = 40,
    context: int,
    temperature: float = 0.0,
    share: float = 0.95,
    seed: int = 0,
) -> str:
    """What a model writes behind a prompt, up to the end of the text.

    Args:
        logits: (1, length) long tokens to (1, length, vocabulary) float.
        tokenizer: the model's.
        prompt: its text; an end-of-text token stands before it, as in training.
        tokens: how many at most.
        context: the longest row that the model takes; what came before is forgotten.
        temperature: 0 takes the likeliest token each time; the larger, the more surprising.
        share: of the probability, from which the tokens are drawn; 1 for all.
        seed: of the draws.

    Raises:
        ValueError: a number is out of its range.
    """
    for name, value, holds in (
        ("tokens", tokens, tokens >= 1),
        ("context", context, context >= 1),
        ("temperature", temperature, temperature >= 0),
        ("share", share, 0 < share <= 1),
    ):
        if not holds:
            raise ValueError(f"{name}={value} is out of its range")
    row = [tokenizer.eos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    written: list[int] = []
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _ in range(tokens):
            last = logits(torch.tensor([row[-context:]]))[0, -1].float()
            chosen = _chosen(last, temperature, share, generator)
            if chosen == tokenizer.eos_token_id:
                break
            row.append(chosen)
            written.append(chosen)
    text: str = tokenizer.decode(written, skip_special_tokens=True)
    return text


def _chosen(logits: Tensor, temperature: float, share: float, generator: torch.Generator) -> int:
    if not temperature:
        return int(logits.argmax())
    likelihoods, order = torch.softmax(logits / temperature, dim=0).sort(descending=True)
    # The token that takes the sum over the share is still among them.
    kept = likelihoods * ((likelihoods.cumsum(0) - likelihoods) < share)
    return int(order[torch.multinomial(kept, 1, generator=generator)])

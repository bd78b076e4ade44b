"""Every kind of Hugging Face model that can be cut, as small as can be, with random weights and a padded batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf

WORDS = 53
BLOCKS = 3
LENGTHS = (9, 6, 4, 1)
CLASSES = 3

_ENCODER = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "num_labels": CLASSES,
}
_DECODER = {
    **_ENCODER,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


def _gpt2(**settings: Any) -> Any:
    return hf.GPT2Config(
        vocab_size=WORDS,
        n_embd=16,
        n_layer=BLOCKS,
        n_head=2,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=1,
        **{"pad_token_id": 0, "num_labels": CLASSES, **settings},
    )


def _modernbert() -> Any:
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
    return hf.ModernBertConfig(
        **_ENCODER, pad_token_id=0, local_attention=4, classifier_pooling="mean", **special
    )


def _distilbert() -> Any:
    return hf.DistilBertConfig(
        vocab_size=WORDS,
        dim=16,
        n_layers=BLOCKS,
        n_heads=2,
        hidden_dim=24,
        max_position_embeddings=32,
        num_labels=CLASSES,
    )


def _opt() -> Any:
    # Embeddings narrower than the blocks: a projection on either side.
    return hf.OPTConfig(
        vocab_size=WORDS,
        hidden_size=16,
        word_embed_proj_dim=8,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        ffn_dim=24,
        max_position_embeddings=32,
        pad_token_id=1,
        num_labels=CLASSES,
    )


CONFIGS: Mapping[str, Callable[[], Any]] = {
    "bert": lambda: hf.BertConfig(**_ENCODER),
    "distilbert": _distilbert,
    "gemma3": lambda: hf.Gemma3TextConfig(
        **_DECODER,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gpt2": _gpt2,
    "gpt_neox": lambda: hf.GPTNeoXConfig(**_ENCODER, pad_token_id=0),
    "llama": lambda: hf.LlamaConfig(**_DECODER),
    "llama tied": lambda: hf.LlamaConfig(**_DECODER, tie_word_embeddings=True),
    "mistral": lambda: hf.MistralConfig(**_DECODER, sliding_window=4),
    "modernbert": _modernbert,
    "opt": _opt,
    "phi3": lambda: hf.Phi3Config(**_DECODER),
    "qwen2": lambda: hf.Qwen2Config(
        **_DECODER, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "qwen3": lambda: hf.Qwen3Config(**_DECODER, head_dim=8),
    "roberta": lambda: hf.RobertaConfig(**_ENCODER, pad_token_id=1),
    "vit": lambda: hf.ViTConfig(
        **{key: _ENCODER[key] for key in _ENCODER if key not in ("vocab_size",)},
        image_size=8,
        patch_size=4,
    ),
}


@dataclass(frozen=True)
class Case:
    """A class of transformers with a configuration, and what kind of head it has."""

    config: str
    cls: Any
    kind: str

    def __str__(self) -> str:
        return f"{self.config} {self.cls.__name__}"

    def build(self, seed: int = 0, **changes: Any) -> Any:
        """A model with random weights, none of them 0 or 1, without dropout."""
        config = CONFIGS[self.config]()
        if self.kind == "spans":
            config.num_labels = 2
        for name, value in changes.items():
            setattr(config, name, value)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.cls(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
        return model.eval()

    def inputs(self, seed: int = 1) -> dict[str, torch.Tensor]:
        """What the whole model, and the bottom, takes: rows of tokens padded at the end, or images."""
        generator = torch.Generator().manual_seed(seed)
        if self.config == "vit":
            return {"pixel_values": torch.randn(len(LENGTHS), 3, 8, 8, generator=generator)}
        mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)).long()
        ids = torch.randint(3, WORDS, mask.shape, generator=generator)
        pad = getattr(CONFIGS[self.config](), "pad_token_id", None) or 0
        return {"input_ids": torch.where(mask.bool(), ids, pad), "attention_mask": mask}

    def labels(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What whoever has the head takes beside the activation."""
        rows = torch.arange(len(LENGTHS))
        if self.kind == "base":
            return {}
        if self.kind == "classes":
            return {"labels": rows % CLASSES}
        if self.kind == "spans":
            return {"start_positions": rows * 0, "end_positions": torch.tensor(LENGTHS) - 1}
        mask, ids = inputs["attention_mask"].bool(), inputs["input_ids"]
        wanted = ids if self.kind == "words" else ids % CLASSES
        return {"labels": torch.where(mask, wanted, -100)}

    def loss(self, output: Any) -> torch.Tensor:
        """The model's own, or one that sees every element of a base model's output."""
        if self.kind != "base":
            return output.loss
        states = output.last_hidden_state
        weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(2))
        pooled = getattr(output, "pooler_output", None)
        return (states * weights).sum() + (0 if pooled is None else pooled.square().sum())


CASES = [
    Case("bert", hf.BertForSequenceClassification, "classes"),
    Case("bert", hf.BertForMaskedLM, "words"),
    Case("bert", hf.BertForTokenClassification, "token classes"),
    Case("bert", hf.BertForQuestionAnswering, "spans"),
    Case("bert", hf.BertModel, "base"),
    Case("distilbert", hf.DistilBertForSequenceClassification, "classes"),
    Case("distilbert", hf.DistilBertForMaskedLM, "words"),
    Case("distilbert", hf.DistilBertForTokenClassification, "token classes"),
    Case("distilbert", hf.DistilBertForQuestionAnswering, "spans"),
    Case("distilbert", hf.DistilBertModel, "base"),
    Case("gemma3", hf.Gemma3ForCausalLM, "words"),
    Case("gemma3", hf.Gemma3TextModel, "base"),
    Case("gpt2", hf.GPT2LMHeadModel, "words"),
    Case("gpt2", hf.GPT2ForSequenceClassification, "classes"),
    Case("gpt2", hf.GPT2ForTokenClassification, "token classes"),
    Case("gpt2", hf.GPT2ForQuestionAnswering, "spans"),
    Case("gpt2", hf.GPT2Model, "base"),
    Case("gpt_neox", hf.GPTNeoXForCausalLM, "words"),
    Case("gpt_neox", hf.GPTNeoXForSequenceClassification, "classes"),
    Case("gpt_neox", hf.GPTNeoXModel, "base"),
    Case("llama", hf.LlamaForCausalLM, "words"),
    Case("llama tied", hf.LlamaForCausalLM, "words"),
    Case("llama", hf.LlamaForSequenceClassification, "classes"),
    Case("llama", hf.LlamaForTokenClassification, "token classes"),
    Case("llama", hf.LlamaForQuestionAnswering, "spans"),
    Case("llama", hf.LlamaModel, "base"),
    Case("mistral", hf.MistralForCausalLM, "words"),
    Case("mistral", hf.MistralForSequenceClassification, "classes"),
    Case("mistral", hf.MistralModel, "base"),
    Case("modernbert", hf.ModernBertForSequenceClassification, "classes"),
    Case("modernbert", hf.ModernBertForMaskedLM, "words"),
    Case("modernbert", hf.ModernBertForTokenClassification, "token classes"),
    Case("modernbert", hf.ModernBertModel, "base"),
    Case("opt", hf.OPTForCausalLM, "words"),
    Case("opt", hf.OPTForSequenceClassification, "classes"),
    Case("opt", hf.OPTModel, "base"),
    Case("phi3", hf.Phi3ForCausalLM, "words"),
    Case("phi3", hf.Phi3Model, "base"),
    Case("qwen2", hf.Qwen2ForCausalLM, "words"),
    Case("qwen2", hf.Qwen2ForSequenceClassification, "classes"),
    Case("qwen2", hf.Qwen2Model, "base"),
    Case("qwen3", hf.Qwen3ForCausalLM, "words"),
    Case("qwen3", hf.Qwen3Model, "base"),
    Case("roberta", hf.RobertaForSequenceClassification, "classes"),
    Case("roberta", hf.RobertaForMaskedLM, "words"),
    Case("roberta", hf.RobertaForTokenClassification, "token classes"),
    Case("roberta", hf.RobertaForQuestionAnswering, "spans"),
    Case("roberta", hf.RobertaModel, "base"),
    Case("vit", hf.ViTForImageClassification, "classes"),
    Case("vit", hf.ViTModel, "base"),
]

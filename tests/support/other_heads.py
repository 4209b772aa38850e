"""Small random models that are no causal LMs: encoders, classifiers, models without a head, encoder-decoders, models of images or sound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer

from support.tiny_models import write_tokenizer

VOCABULARY = 300

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
T5 = {"vocab_size": VOCABULARY, "d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
HALVES: dict[str, Any] = {f"{half}_{key}": n for half in ("encoder", "decoder") for key, n in (("layers", 2), ("ffn_dim", 128))}
HALVES |= {"vocab_size": VOCABULARY, "d_model": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
SOUND = {"num_mel_bins": 16, "max_source_positions": 50, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1}
SOUND |= {"decoder_start_token_id": 0, "suppress_tokens": None, "begin_suppress_tokens": None}
IMAGES = {**SIZES, "image_size": 32, "patch_size": 8}
MODERN = {**SIZES, "cls_token_id": 0, "sep_token_id": 1}

OF_TEXT: dict[str, dict[str, Any]] = {
    "BertForMaskedLM": SIZES,
    "BertModel": SIZES,
    "BertForSequenceClassification": SIZES,
    "BertForPreTraining": SIZES,
    "RobertaForMaskedLM": SIZES,
    "XLMRobertaModel": SIZES,
    "ModernBertForMaskedLM": MODERN,
    "DistilBertForSequenceClassification": {"vocab_size": VOCABULARY, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4},
    "MPNetModel": SIZES,
    "DebertaV2ForSequenceClassification": SIZES,
    "Qwen3ForSequenceClassification": {**SIZES, **GROUPED},
    "Qwen3ForTokenClassification": {**SIZES, **GROUPED},
    "Qwen3Model": {**SIZES, **GROUPED},
    "Gemma2ForSequenceClassification": {**SIZES, **GROUPED},
    "GPTNeoXForSequenceClassification": SIZES,
}
"""Class → sizes, of models whose layers run one after the other on tokens."""

LISTED: dict[str, dict[str, Any]] = {
    "AlbertForMaskedLM": {**SIZES, "embedding_size": 32},  # one layer, run as often as there are layers
    "T5ForConditionalGeneration": T5,
    "T5EncoderModel": T5,  # the first layer hands the others its bias of positions
    "BartForConditionalGeneration": HALVES,
    "WhisperForConditionalGeneration": {**HALVES, **SOUND},
    "ViTForImageClassification": IMAGES,
    "CLIPModel": {"text_config": SIZES, "vision_config": {**IMAGES, "vocab_size": None}, "projection_dim": 32},
}
"""Class → sizes, of models that cannot be run layer by layer on tokens: their linears are listed."""

ALL = OF_TEXT | LISTED


def save(name: str, folder: Path, tokenizer: Tokenizer | None = None) -> Path:
    """A random model of the class ``name`` in ``folder``, in bfloat16."""
    made = getattr(transformers, name)
    torch.manual_seed(0)
    model = made(made.config_class(**ALL[name]))
    for key, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0, parameter.shape[1] ** -0.5)
        elif parameter.dim() == 1:
            parameter.data.normal_(0, 0.1).add_(key.endswith("weight"))
    model.to(torch.bfloat16).save_pretrained(folder)
    if tokenizer is not None:
        write_tokenizer(folder, tokenizer)
    return folder


def load(folder: Path) -> Any:
    """The model in ``folder`` as transformers loads it, in float32."""
    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.float32).eval()


def outputs(model: Any) -> torch.Tensor:
    """What ``model`` makes of an input of its kind, without a head of a few numbers: the base model's first output."""
    random = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCABULARY, (1, 12), generator=random)
    asked = {
        "input_ids": {"input_ids": ids},
        "pixel_values": {"pixel_values": torch.randn(1, 3, 32, 32, generator=random)},
        "input_features": {"input_features": torch.randn(1, 16, 100, generator=random)},
    }[model.main_input_name]
    asked |= {"pixel_values": torch.randn(1, 3, 32, 32, generator=random)} if model.config.model_type == "clip" else {}
    decoder = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found = model.base_model(**asked, **decoder)
    first: torch.Tensor = found.text_embeds if model.config.model_type == "clip" else found[0]
    return first

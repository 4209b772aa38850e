"""Train the pico model that ships in tests/data/pico: Llama architecture, 2.3 M parameters, its own byte-level BPE, two shards.

    python tests/data/make_pico.py tests/data/pico --steps 2400

The text is what CPython itself carries (PSF licence): the language reference in ``pydoc_data.topics`` and the sources of the standard
library, of which every tenth file (by a hash of its name) is held out for measuring.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sysconfig
from pathlib import Path
from pydoc_data import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SKIP = ("site-packages", "/test", "idlelib", "pydoc_data", "encodings", "lib2to3")
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"


def library() -> tuple[list[str], list[str]]:
    """Sources of the standard library: (to train on, held out)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train: list[str] = []
    held: list[str] = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if any(word in f"/{name}" for word in SKIP):
            continue
        out = held if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0 else train
        out.append(path.read_text("utf8", errors="ignore"))
    return train, held


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[BOS, EOS], initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=EOS)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    ids: list[int] = []
    for text in texts:
        ids += [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
    return torch.tensor(ids)


def train(model: LlamaForCausalLM, ids: torch.Tensor, n_steps: int, *, context: int = 256, batch: int = 16, peak_lr: float = 4e-3) -> None:
    """AdamW, 100 warm-up steps, then a cosine down to a twentieth of the peak."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.95))
    mean_loss = 0.0
    for step in range(n_steps):
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * min(1.0, (step + 1) / 100) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / n_steps)))
        at = torch.randint(0, len(ids) - context, (batch,))
        x = torch.stack([ids[i : i + context] for i in at])
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean_loss = loss.item() if step == 0 else 0.98 * mean_loss + 0.02 * loss.item()
        if step % 200 == 0:
            print(f"step {step} loss {mean_loss:.3f}", flush=True)  # noqa: T201


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, ids: torch.Tensor, n_windows: int = 60, context: int = 256) -> float:
    windows = [ids[i * context : (i + 1) * context][None] for i in range(min(n_windows, len(ids) // context))]
    return math.exp(sum(model(input_ids=w, labels=w).loss.item() for w in windows) / len(windows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=2400)
    args = parser.parse_args()
    torch.manual_seed(0)
    sources, held = library()
    docs = [text for _, text in sorted(topics.topics.items())]
    tokenizer = train_tokenizer(docs + sources[::4], vocab_size=2048)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).float()
    train(model.train(), encode(tokenizer, docs * 2 + sources), args.steps)
    model.eval().to(torch.bfloat16)
    model.save_pretrained(args.out, max_shard_size="2500KB")
    tokenizer.save_pretrained(args.out)
    print(f"held-out perplexity {perplexity(model.float(), encode(tokenizer, held)):.2f}")  # noqa: T201


if __name__ == "__main__":
    main()

"""Rebuild the embedded GPT-2: `python -m dpo_helpers build-mini` (17 minutes on two cores).

Trains a byte-level BPE tokenizer and a small 12-block GPT-2 on the embedded world's unranked mixture.
The result is what ships in `dpo_helpers/worlds/mini/model/`: float16 safetensors, so the package stays small;
loading casts them to float32, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ..hh import split_prompt
from ..worlds.embedded import pretraining_texts

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: list[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of GPT-2's kind, trained on the texts; its one special token ends a text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def encode_answer(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[list[int], int]:
    """Token ids of a dialogue, end-of-text included, and where its last answer starts."""
    prompt, response = split_prompt(text)
    ids = tokenizer.encode(prompt), tokenizer.encode(response)
    return ids[0] + ids[1] + [tokenizer.eos_token_id], len(ids[0])


def _batches(
    rows: list[tuple[list[int], int]], batch_size: int, epochs: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Right-padded (ids [B, T], labels [B, T]); rows of like length share a batch, -100 masks prompt and padding."""
    generator = torch.Generator().manual_seed(seed)
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    groups = [by_length[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    for _ in range(epochs):
        for g in torch.randperm(len(groups), generator=generator).tolist():
            batch = [rows[i] for i in groups[g]]
            length = max(len(row) for row, _ in batch)
            ids = torch.tensor([row + [0] * (length - len(row)) for row, _ in batch])
            labels = torch.tensor([[-100] * at + row[at:] + [-100] * (length - len(row)) for row, at in batch])
            yield ids, labels


def build_mini(
    out: Path,
    *,
    n_texts: int = 28_800,
    epochs: int = 4,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    width: int = 128,
    blocks: int = 12,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> float:
    """Train tokenizer and model from nothing and save both to `out`; returns the mean loss of the last 50 updates.

    Only answers are predicted, so the model never goes on with the human's turn.
    AdamW with a warm-up of 100 steps and a cosine decay to a tenth; loss in nats per token, end of text included.
    """
    texts = pretraining_texts(n_texts, seed)
    tokenizer = train_tokenizer(texts[:10_000])
    rows = [encode_answer(tokenizer, text) for text in texts]
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=256, n_embd=width, n_layer=blocks, n_head=4,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
        activation_function="gelu_pytorch_tanh",  # GPT-2's GELU, fused: the same numbers, faster
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    total = epochs * math.ceil(len(rows) / batch_size)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / 100) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / total)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses: list[float] = []
    bar = tqdm(_batches(rows, batch_size, epochs, seed), total=total, desc="pre-training")
    for ids, labels in bar:
        logits = model(ids).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    final = sum(losses[-50:]) / len(losses[-50:])
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    tokens = sum(len(row) for row, _ in rows)
    say(f"pre-trained on {len(rows):,} texts of {tokens:,} tokens, {epochs} epochs: loss {final:.3f}; saved in {out}")
    return final

"""The parts of a transformer block, for the families whose blocks the engine runs itself: GPT-2 and Llama.

The modules are the model's own, so weights, gradients and dtypes are too. transformers' forward is rebuilt from them
for tokens without padding, [N, d], instead of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from ..errors import ModelError


class Architecture(Protocol):
    """What `engine` asks of a model family. x: [N, d], the residual stream; positions: [N]."""

    heads: int  # of queries
    kv_heads: int  # of keys and values
    norm: nn.Module  # the last one, before the head

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """What the first block reads, [N, d]."""

    def turns(self, x: Tensor, positions: Tensor) -> Any:
        """What `qkv` needs of the positions: the same for all blocks."""

    def qkv(self, block: Any, x: Tensor, turns: Any) -> Tensor:
        """Queries, keys and values of a block, normed and turned to their positions, [N, heads + 2·kv_heads, d_h]."""

    def scale(self, block: Any) -> float:
        """What attention scores are multiplied by."""

    def output(self, block: Any, mixed: Tensor) -> Tensor:
        """What attention adds to x, from its mixed values [N, heads·d_h]."""

    def mlp(self, block: Any, x: Tensor) -> Tensor:
        """What the block's second half adds to x."""


class GPT2:
    """`transformers.GPT2LMHeadModel`: learned positions, layer norm, GELU; dropout off."""

    def __init__(self, model: Any):
        self.model = model.transformer
        self.heads = self.kv_heads = model.config.num_attention_heads
        self.norm = self.model.ln_f
        # transformers writes this GELU in six tensor operations; torch has the same formula in one
        is_tanh = model.config.activation_function in ("gelu_new", "gelu_pytorch_tanh")
        self.act = (lambda x: gelu(x, approximate="tanh")) if is_tanh else self.model.h[0].mlp.act

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Token embedding + position embedding."""
        return self.model.wte(ids) + self.model.wpe(positions)  # type: ignore[no-any-return]

    def turns(self, x: Tensor, positions: Tensor) -> None:
        """Nothing: positions are in x."""

    def qkv(self, block: Any, x: Tensor, turns: None) -> Tensor:
        """One product makes all three."""
        return block.attn.c_attn(block.ln_1(x)).view(len(x), 3 * self.heads, -1)  # type: ignore[no-any-return]

    def scale(self, block: Any) -> float:
        """1/√d_h, unless the configuration says otherwise."""
        return float(block.attn.scaling)

    def output(self, block: Any, mixed: Tensor) -> Tensor:
        """The output projection."""
        return block.attn.c_proj(mixed)  # type: ignore[no-any-return]

    def mlp(self, block: Any, x: Tensor) -> Tensor:
        """Up to 4d, GELU, and down again."""
        return block.mlp.c_proj(self.act(block.mlp.c_fc(block.ln_2(x))))  # type: ignore[no-any-return]


class Llama:
    """`transformers.LlamaForCausalLM` (SmolLM2 is one): rotary positions, RMS norm, gated MLP."""

    def __init__(self, model: Any):
        self.model = model.model
        self.heads, self.kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
        self.norm = self.model.norm

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Token embedding alone; positions enter in `qkv`."""
        return self.model.embed_tokens(ids)  # type: ignore[no-any-return]

    def turns(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rotation, [N, d_h] each."""
        cos, sin = self.model.rotary_emb(x, positions[None])  # [1, N, d_h] each
        return cos[0], sin[0]

    def qkv(self, block: Any, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        """Three products; queries and keys are rotated by their positions."""
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        attention, normed = block.self_attn, block.input_layernorm(x)
        q, k, v = (
            project(normed).view(len(x), -1, attention.head_dim)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *turns)  # type: ignore[no-untyped-call]
        return torch.cat([q, k, v], dim=1)

    def scale(self, block: Any) -> float:
        """1/√d_h."""
        return float(block.self_attn.scaling)

    def output(self, block: Any, mixed: Tensor) -> Tensor:
        """The output projection."""
        return block.self_attn.o_proj(mixed)  # type: ignore[no-any-return]

    def mlp(self, block: Any, x: Tensor) -> Tensor:
        """The gated MLP, as it is."""
        return block.mlp(block.post_attention_layernorm(x))  # type: ignore[no-any-return]


FAMILIES: dict[str, Callable[[Any], Architecture]] = {"gpt2": GPT2, "llama": Llama}


def is_known(model: Any) -> bool:
    """Whether the model's family (config.model_type) is one of FAMILIES."""
    return model.config.model_type in FAMILIES


def architecture(model: Any) -> Architecture:
    """The parts of a model whose family `is_known`; ModelError for another one."""
    if not is_known(model):
        known = ", ".join(FAMILIES)
        raise ModelError(
            f"the fast path knows models of type {known}, not {model.config.model_type}: take the plain one"
        )
    return FAMILIES[model.config.model_type](model)

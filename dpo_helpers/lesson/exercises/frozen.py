"""Exercises of notebook 2, second part: what trains when the first blocks are frozen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .core import Exercise, Mistake

# 2.3: width of GPT-2, parameters of a block (attention 4d² + 4d, two-layer network 8d² + 5d, two layer norms 4d),
# of the final norm, of both embeddings, of all
_D = 768
_BLOCK, _NORM = 12 * _D**2 + 13 * _D, 2 * _D
_TOKENS, _POSITIONS = 50_257 * _D, 1_024 * _D
_ALL = 12 * _BLOCK + _NORM + _TOKENS + _POSITIONS
_ANSWER = 2 * _BLOCK + _NORM

# 2.4


def _block_of(name: str) -> int | None:
    """The block that a parameter of GPT-2 belongs to; None outside the blocks."""
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "h" else None


def _names_that_train(
    names: Sequence[str],
    frozen_blocks: int,
    *,
    frozen: Callable[[int, int], bool] = lambda block, k: block < k,
    outside: Sequence[str] = ("transformer.ln_f.",),
) -> list[str]:
    """The names that train; the keywords are what people do instead: which blocks freeze, what trains outside them."""
    found = []
    for name in names:
        block = _block_of(name)
        trains = name.startswith(tuple(outside)) if block is None else not frozen(block, frozen_blocks)
        found += [name] if trains else []
    return found


def _frozen_by_prefix(block: int, k: int) -> bool:
    return any(f"transformer.h.{block}".startswith(f"transformer.h.{i}") for i in range(k))


def _outside(*prefixes: str) -> Callable[[Sequence[str], int], list[str]]:
    return lambda names, k: _names_that_train(names, k, outside=prefixes)


def _frozen(which: Callable[[int, int], bool]) -> Callable[[Sequence[str], int], list[str]]:
    return lambda names, k: _names_that_train(names, k, frozen=which)


def _names_that_freeze(names: Sequence[str], k: int) -> list[str]:
    train = _names_that_train(names, k)
    return [name for name in names if name not in train]


def _without_digits(names: Sequence[str], k: int) -> list[str]:
    """Frozen is whatever has one of the blocks' digits anywhere in its name, such as in ln_1."""
    train = _outside("transformer.ln_f.")(names, 0)
    return [name for name in train if not any(str(i) in name for i in range(k))]


def _names() -> list[tuple[list[str], int]]:
    """Some of the names of a GPT-2 of 12 blocks, in its order, with the first 2, 11, 0 and 12 blocks frozen."""
    blocks = [f"transformer.h.{i}.{part}.bias" for i in (0, 1, 2, 10, 11) for part in ("ln_1", "attn.c_attn")]
    names = ["transformer.wte.weight", "transformer.wpe.weight", *blocks, "transformer.ln_f.bias", "lm_head.weight"]
    return [(names, k) for k in (2, 11, 0, 12)]


EXERCISES = (
    Exercise(
        "2.3", "What trains in GPT-2", 1, 5, _ANSWER,
        (
            Mistake("The output head is counted",
                    "GPT-2's head is the token embedding, one tensor, which is frozen with the embeddings",
                    _ANSWER + _TOKENS, (2 * _BLOCK + _TOKENS,)),
            Mistake("The final layer norm is forgotten",
                    "it stands behind the last block and is not frozen: 2d more",
                    2 * _BLOCK),
            Mistake("Half of the final layer norm is forgotten",
                    "it has a weight and a bias, d numbers each",
                    2 * _BLOCK + _D),
            Mistake("The embeddings are counted",
                    "both stand before the first block and are frozen with it, of tokens and of positions",
                    _ANSWER + _TOKENS + _POSITIONS, (2 * _BLOCK + _TOKENS + _POSITIONS,)),
            Mistake("The position embeddings are counted",
                    "they stand before the first block and are frozen with it, as the token embeddings are",
                    _ANSWER + _POSITIONS, (2 * _BLOCK + _POSITIONS,)),
            Mistake("That is what 10 blocks and the layer norm have",
                    "those blocks are frozen; the other 2 of 12 train",
                    10 * _BLOCK + _NORM, (10 * _BLOCK,)),
            Mistake("That is what is frozen",
                    "asked for is what trains: all parameters minus these",
                    _ALL - _ANSWER),
            Mistake("That is for 8 frozen blocks",
                    "with 10 of 12 frozen, 2 blocks train, not 4",
                    4 * _BLOCK + _NORM, (4 * _BLOCK,)),
            Mistake("One block too many or too few",
                    "12 − 10 = 2 blocks train",
                    _BLOCK + _NORM, (3 * _BLOCK + _NORM, _BLOCK, 3 * _BLOCK)),
            Mistake("All 12 blocks are counted",
                    "the first 10 are frozen, so 2 train",
                    12 * _BLOCK + _NORM, (12 * _BLOCK, _ALL)),
            Mistake("Something of a block is forgotten",
                    "a block has 12d² weights in its matrices (4d² in attention, 8d² in the two-layer network), and "
                    "13d more in its biases (9d) and its two layer norms (4d)",
                    2 * 12 * _D**2 + _NORM,
                    tuple(2 * part + norm for norm in (_NORM, 0) for part in (
                        12 * _D**2, 12 * _D**2 + 4 * _D, 12 * _D**2 + 9 * _D, 4 * _D**2 + 4 * _D, 8 * _D**2 + 5 * _D,
                        4 * _D**2, 8 * _D**2))),
            Mistake("That is rounded, or in millions",
                    "give the exact number; a formula in Python will do",
                    14.2, (14_000_000, 14_200_000, 14_180_000, 14_177_000, 14.18, 14.177, 14)),
        ),
        tolerance=1e-9,  # the layer norm is one part in ten thousand
    ),
    Exercise(
        "2.4", "Which weights train, by name", 2, 10, _names_that_train,
        (
            Mistake("Blocks 10 and 11 are frozen with block 1",
                    "“transformer.h.1” is also how “transformer.h.10” begins; compare with the dot behind the number",
                    _frozen(_frozen_by_prefix)),
            Mistake("A digit anywhere in the name freezes it",
                    "“ln_1” has a 1 in it too; the number of the block stands between “transformer.h.” and the "
                    "next dot",
                    _without_digits),
            Mistake("One block too many is frozen",
                    "blocks count from 0: the first k are 0 … k − 1",
                    _frozen(lambda block, k: block <= k)),
            Mistake("One block too few is frozen",
                    "blocks count from 0: the first k are 0 … k − 1, k − 1 included",
                    _frozen(lambda block, k: block < k - 1)),
            Mistake("Block 0 trains",
                    "blocks count from 0: the first k are 0 … k − 1, not 1 … k",
                    _frozen(lambda block, k: 1 <= block <= k), (_frozen(lambda block, k: 1 <= block < k),)),
            Mistake("The last blocks are frozen",
                    "the first ones are to be frozen, next to the input; those next to the output train",
                    _frozen(lambda block, k: block >= 12 - k)),
            Mistake("Only one block is frozen",
                    "the first k blocks are frozen, 0 … k − 1, not one that is called k",
                    _frozen(lambda block, k: block == k), (_frozen(lambda block, k: block == k - 1),)),
            Mistake("You listed the frozen blocks",
                    "the result is what trains: everything else of the blocks, and the final layer norm",
                    _frozen(lambda block, k: block >= k),
                    (_names_that_freeze, lambda names, k: _names_that_train(names, k, frozen=lambda b, k: b >= k,
                                                                            outside=()))),
            Mistake("The output head is listed",
                    "lm_head.weight is the same tensor as transformer.wte.weight, which is frozen",
                    _outside("transformer.ln_f.", "lm_head."), (_outside("lm_head."),)),
            Mistake("The final layer norm is missing",
                    "transformer.ln_f stands behind the last block; nothing freezes it",
                    _outside()),
            Mistake("Embeddings are listed",
                    "wte and wpe stand before the first block and are frozen with it, and the head with wte",
                    _outside("transformer.", "lm_head."),
                    (_outside("transformer."), _outside("transformer.ln_f.", "transformer.wte."),
                     _outside("transformer.ln_f.", "transformer.wpe."),
                     _outside("transformer.wte.", "transformer.wpe."),
                     _outside("transformer.ln_f.", "transformer.wpe.", "lm_head."))),
        ),
        cases=_names,
    ),
)  # fmt: skip

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dpo_helpers.errors import DataError
from dpo_helpers.hh import Pair
from dpo_helpers.tokens import (
    EncodedPair,
    batch_order,
    collate,
    encode_pair,
    encode_pairs,
    encode_prompts,
    encode_texts,
    epoch_order,
    start_ids,
)  # fmt: skip


class Letters:
    """One id a character; 0 ends a text."""

    eos_token_id = 0

    def encode(self, text, *, add_special_tokens=True, split_special_tokens=True):
        return [ord(c) - 96 for c in text]

    def decode(self, ids):
        return "".join(chr(i + 96) for i in ids)


def encode(prompt, chosen, rejected, max_length=100, max_prompt_length=50):
    return encode_pair(
        Letters(), Pair(prompt, chosen, rejected), max_length=max_length, max_prompt_length=max_prompt_length
    )


def test_responses_end_with_exactly_one_end_of_text():
    assert encode("ab", "c", "de") == EncodedPair([1, 2], [3, 0], [4, 5, 0])


def test_a_pair_of_exactly_max_length_is_not_cut():
    # 4 prompt tokens + 4 response tokens + end of text = 9
    assert not encode("abcd", "efgh", "i", max_length=9, max_prompt_length=2).was_cut


def test_truncation_keeps_the_end_of_the_prompt_then_cuts_responses():
    # 4 + 5 = 9 > 8: the prompt keeps its last 2 tokens, so 6 are left for the responses, which fit
    assert encode("abcd", "efgh", "i", max_length=8, max_prompt_length=2) == EncodedPair(
        [3, 4], [5, 6, 7, 8, 0], [9, 0], prompt_cut=2
    )
    # now 3 are left: the chosen response loses "h" and its end, the rejected one keeps all
    assert encode("abcd", "efgh", "i", max_length=5, max_prompt_length=2) == EncodedPair(
        [3, 4], [5, 6, 7], [9, 0], prompt_cut=2, chosen_cut=2
    )


def test_a_short_prompt_is_not_lengthened_by_truncation():
    assert encode("ab", "efgh", "i", max_length=5, max_prompt_length=4) == EncodedPair(
        [1, 2], [5, 6, 7], [9, 0], chosen_cut=2
    )


def test_batch_literally():
    batch = collate([EncodedPair([1], [2, 0], [3, 4, 0], 8), EncodedPair([5, 6], [7, 0], [0], 9)], pad_id=0)
    assert batch.ids.tolist() == [[1, 2, 0, 0], [5, 6, 7, 0], [1, 3, 4, 0], [5, 6, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.response_mask.int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 1, 0]]
    assert batch.rows == (8, 9)


def test_masks_go_by_position_not_by_id():
    # padding, a zero inside the prompt and the end of text are all id 0; only the last is scored
    batch = collate([EncodedPair([0, 1], [2, 0], [3, 3, 3, 0])], pad_id=0)
    assert batch.response_mask[0].tolist() == [False, False, True, True, False, False]
    assert batch.attention_mask[0].tolist() == [1, 1, 1, 1, 0, 0]


def test_no_pairs_is_an_error():
    with pytest.raises(DataError, match="at least one pair"):
        collate([], pad_id=0)


TEXT = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40)


@settings(max_examples=50, deadline=None)
@given(prompt=TEXT, response=TEXT)
def test_no_token_spans_the_boundary(tokenizer, prompt, response):
    """Decoding the parts gives the parts: no token of the joined ids holds text of both."""
    pair = encode_pair(tokenizer, Pair(prompt, response, response), max_length=1000, max_prompt_length=500)
    assert tokenizer.decode(pair.prompt) == prompt
    assert tokenizer.decode(pair.chosen[:-1]) == response
    assert pair.chosen[-1] == tokenizer.eos_token_id


def test_order_is_a_permutation_of_seed_and_epoch_alone():
    torch.manual_seed(123)
    first = epoch_order(20, seed=1, epoch=2)
    torch.manual_seed(456)
    assert epoch_order(20, seed=1, epoch=2) == first
    assert sorted(first) == list(range(20))
    assert epoch_order(20, seed=1, epoch=3) != first
    assert epoch_order(20, seed=2, epoch=2) != first


def test_batches_cover_every_pair_once_an_epoch():
    batches = list(batch_order(10, batch_size=4, epochs=2, seed=0))
    assert [epoch for epoch, _ in batches] == [0, 0, 0, 1, 1, 1]
    assert [len(at) for _, at in batches] == [4, 4, 2, 4, 4, 2]
    assert sorted(i for epoch, at in batches for i in at if epoch == 1) == list(range(10))


def test_pairs_in_chunks_are_those_one_by_one(tokenizer):
    """In order, over the ends of chunks, with and without a fast tokenizer, as a stream that is not read ahead."""
    pairs = [
        Pair(f"\n\nHuman: {'why ' * (i % 9)}?\n\nAssistant:", " yes" * (1 + i % 4), f" no {i}", i) for i in range(23)
    ]
    lengths = {"max_length": 20, "max_prompt_length": 12}
    expected = [encode_pair(tokenizer, pair, **lengths) for pair in pairs]
    assert any(pair.was_cut for pair in expected)
    assert list(encode_pairs(tokenizer, iter(pairs), chunk=5, **lengths)) == expected
    letters = Pair("ab", "c", "de", 7)
    assert list(encode_pairs(Letters(), [letters], **lengths)) == [encode_pair(Letters(), letters, **lengths)]
    read = []
    stream = (read.append(pair) or pair for pair in pairs)
    assert next(encode_pairs(tokenizer, stream, chunk=5, **lengths)) == expected[0]
    assert len(read) == 5


def words(prepend, start):
    """A tokenizer of Llama 2's or Gemma's kind: "▁" for a space, bytes for what it does not know, "<s>" in front.

    prepend: "first" puts a "▁" before each text, "never" does not.
    """
    pieces = [
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        *"HumanAsitI:.?h▁b",
        "▁I",
        "▁a",
        "as",
        "is",
        ":b",
    ]
    model = models.BPE(
        {piece: i for i, piece in enumerate(dict.fromkeys(pieces))},
        [("▁", "I"), ("▁", "a"), ("a", "s"), ("i", "s"), (":", "b")], byte_fallback=True, fuse_unk=True,
    )  # fmt: skip
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    backend.decoder = decoders.Sequence([
        decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=prepend, split=False), decoders.Fuse(),
    ])  # fmt: skip
    if start:
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def byte_level(tokenizer):
    """The embedded tokenizer as it is after it was saved in the middle of a training: it pads, cuts and drops merges."""
    copy = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), eos_token=tokenizer.eos_token
    )
    copy.backend_tokenizer.enable_truncation(max_length=3)
    copy.backend_tokenizer.model.dropout = 0.9
    copy.backend_tokenizer.enable_padding(length=16, pad_id=tokenizer.eos_token_id)
    return copy


KINDS = {
    "as saved by a call": byte_level,
    "Llama 2": lambda _: words("first", True), "Llama 2 without a start": lambda _: words("first", False),
    "Gemma": lambda _: words("never", True),
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def other(request, tokenizer):
    return KINDS[request.param](tokenizer)


@settings(max_examples=30, deadline=None)
@given(prompt=TEXT, response=TEXT)
def test_any_tokenizer_gives_back_the_text_and_the_border(other, prompt, response):
    """One pair as many, the start once and only in front, and the ids of both together decode to the text."""
    prompt = f"\n\nHuman: {prompt}\n\nAssistant:"
    pair, lengths = Pair(prompt, f" {response}", " no", 3), {"max_length": 3000, "max_prompt_length": 1500}
    found = encode_pair(other, pair, **lengths)
    assert list(encode_pairs(other, [pair, pair], **lengths)) == [found, found]
    start = start_ids(other)
    assert found.prompt[: len(start)] == start
    assert not {*start} & {*found.prompt[len(start) :], *found.chosen}
    whole = other.decode(found.prompt[len(start) :] + found.chosen[:-1])
    assert whole == other.decode(encode_texts(other, [pair.prompt + pair.chosen])[0])
    assert other.decode(found.prompt[len(start) :] + found.rejected[:-1]) == f"{prompt} no"
    assert (found.chosen[-1], found.was_cut) == (other.eos_token_id, False)
    assert encode_prompts(other, [prompt], 1500) == [found.prompt]


def test_a_tokenizer_that_was_saved_while_it_cut_padded_and_dropped_merges_does_none_of_it(tokenizer):
    lengths = {"max_length": 64, "max_prompt_length": 32}
    found = encode_pair(byte_level(tokenizer), Pair("hi", " yes", " no"), **lengths)
    assert found == encode_pair(tokenizer, Pair("hi", " yes", " no"), **lengths)
    assert (len(found.prompt), len(found.rejected)) == (2, 2)
    texts = ["hi", "Can you tell me how to grow roses?"]
    assert encode_texts(byte_level(tokenizer), texts) == encode_texts(tokenizer, texts)


def test_prompts_begin_as_the_tokenizer_says_even_when_they_are_cut():
    """Llama 2: "<s>" is id 0; "▁" before the first word only. "hi is I" is ▁ h i ▁ is ▁I."""
    llama = words("first", True)
    ids = llama.convert_tokens_to_ids(["<s>", "▁", "h", "i", "▁", "is", "▁I"])
    assert encode_prompts(llama, ["hi is I"], 7) == [ids]
    assert encode_prompts(llama, ["hi is I"], 3) == [[ids[0], *ids[-2:]]]
    assert encode_prompts(llama, ["hi is I"], 1) == [[ids[0]]]
    pair = encode_pair(llama, Pair("hi:", " I", " a"), max_length=100, max_prompt_length=50)
    assert pair.prompt == llama.convert_tokens_to_ids(["<s>", "▁", "h", "i", ":"])
    assert pair.chosen == llama.convert_tokens_to_ids(["▁I", "</s>"]), "tokenised by itself it would be ▁ ▁I"
    cut = encode_pair(llama, Pair("hi:", " I", " a"), max_length=5, max_prompt_length=3)
    assert cut.prompt == [ids[0], *pair.prompt[-2:]]
    assert (cut.chosen, cut.prompt_cut, cut.chosen_cut) == (pair.chosen, 2, 0)


def test_a_token_over_the_border_is_said():
    with pytest.raises(DataError, match="row 8: a token spans the border of prompt and response: leave the row out"):
        encode_pair(words("first", True), Pair("hi:", "b", " a", 8), max_length=100, max_prompt_length=50)

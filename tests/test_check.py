"""What a model and its tokenizer are asked before any work: families that must pass, and faults that must not."""

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from conftest import tiny_gpt2
from dpo_helpers.errors import ModelError, SettingsError
from dpo_helpers.models import embeddings, freeze
from dpo_helpers.run.check import check_limits, check_model
from dpo_helpers.run.loading import load_config, load_model, load_saved, load_tokenizer, save_model
from dpo_helpers.run.stages import get_base, get_data
from dpo_helpers.settings import load_settings

SIZES = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 64,
}  # fmt: skip
OLDER = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
HEADS = {**SIZES, "head_dim": 8}
OPT = {"ffn_dim": 32, "word_embed_proj_dim": 8}
MPT = {"vocab_size": 60, "d_model": 16, "n_layers": 3, "n_heads": 2, "max_seq_len": 64}
GPTJ = {"vocab_size": 60, "n_embd": 16, "n_layer": 3, "n_head": 2, "rotary_dim": 4}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
FAMILIES = {
    "GPT2": {"vocab_size": 60, "n_positions": 64, "n_embd": 16, "n_layer": 3, "n_head": 2},
    "Llama": SIZES, "Mistral": {**HEADS, "sliding_window": 4}, "Qwen2": SIZES, "Qwen3": HEADS, "Gemma": HEADS,
    "Gemma2": HEADS, "Phi": SIZES, "StableLm": SIZES, "Olmo2": SIZES, "GPTNeoX": OLDER, "Bloom": OLDER,
    "Falcon": OLDER, "OPT": {**OLDER, **OPT}, "GPTJ": GPTJ, "Mpt": MPT,
    "Mixtral": {**SIZES, "num_local_experts": 2, "num_experts_per_tok": 1},
    "Llama with linear RoPE": {**SIZES, "rope_parameters": LINEAR},
}  # fmt: skip
BELOW = {  # all that runs before the first block, where that is more than an embedding of tokens
    "GPT2": {"wte", "wpe"}, "Bloom": {"word_embeddings", "word_embeddings_layernorm"},
    "OPT": {"embed_tokens", "embed_positions", "project_in"},
}  # fmt: skip


def family(name, **sizes):
    kind = name.split()[0]
    torch.manual_seed(0)
    return getattr(hf, f"{kind}ForCausalLM" if kind != "GPT2" else "GPT2LMHeadModel")(
        getattr(hf, f"{kind}Config")(**sizes)
    ).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_families_that_are_causal_pass_and_freeze_below_the_first_block(name):
    model = family(name, **FAMILIES[name])
    check_model(model, 32)
    names = {module: key for key, module in model.named_modules()}
    below = {names[module].split(".")[-1] for module in embeddings(model) if list(module.parameters())}
    assert below == BELOW.get(name, below)
    assert len(below) == len(BELOW.get(name, "1"))
    freeze(model, 2)
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    with_gradient = {key for key, p in model.named_parameters() if p.grad is not None}
    assert with_gradient
    assert not any(f".{i}." in key for key in with_gradient for i in (0, 1))
    assert not any(part in key for key in with_gradient for part in below if "head" not in key)


def test_a_model_whose_rope_depends_on_the_batch_is_refused():
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = family("Llama", **{**SIZES, "max_position_embeddings": 16}, rope_parameters=dynamic, initializer_range=0.5)
    check_model(model, 16)  # nothing is longer than what it was made for: nothing changes
    beside, in_samples = (
        r"the texts beside it, by \d.*nats; a dynamic RoPE does that",
        r"where it is sampled in a batch, by \d.*nats",
    )
    with pytest.raises(ModelError, match=f"change (with {beside}|{in_samples})"):  # the second: transformers 5.5
        check_model(model, 32)


def test_a_model_is_looked_at_as_long_as_its_samples_get(tmp_path):
    """Its RoPE is another one from 281 tokens on: pairs of 256 are shorter, but not prompts of 128 with 200 new ones."""
    tokenizer = load_tokenizer(load_settings("mini"))
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    model = family(
        "Phi3", **{**SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 512}, pad_token_id=0,
        original_max_position_embeddings=280, initializer_range=0.5,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **factors},
    )  # fmt: skip
    save_model(model, tokenizer, tmp_path / "model")
    small = {
        "max_pairs": 20,
        "held_out_pairs": 10,
        "model": str(tmp_path / "model"),
        "runs_dir": str(tmp_path / "runs"),
    }
    get_base(load_settings("mini", freeze_layers=2, **small))
    with pytest.raises(ModelError, match="change with the texts beside it, .* a dynamic RoPE does that"):
        get_base(load_settings("mini", max_new_tokens=200, freeze_layers=2, **small))


def test_a_model_that_remembers_is_refused():
    model, calls = tiny_gpt2(), []

    def remembers(module, args, out):
        calls.append(out)
        return out * len(calls)

    model.lm_head.register_forward_hook(remembers)
    with pytest.raises(ModelError, match="change with the texts be"):
        check_model(model, 16)


def test_rounding_is_no_dependence_where_all_tokens_are_as_likely():
    """Only the last digit of log p, about 5e-7 of ln 60, differs between calls; it is all the spread there is."""
    model, calls = family("GPT2", **FAMILIES["GPT2"]), []

    def flat(module, args, out):
        calls.append(out)
        return torch.zeros_like(out).index_fill(-1, torch.tensor([0]), 5e-7 * (len(calls) % 2))

    model.lm_head.register_forward_hook(flat)
    check_model(model, 32)


def test_a_model_that_sees_the_future_is_refused():
    config = hf.BertConfig(**OLDER)
    torch.manual_seed(0)
    with pytest.raises(ModelError, match="BertLMHeadModel: .* depend on what comes later"):
        check_model(hf.BertLMHeadModel(config).eval(), 16)
    config.is_decoder = True
    check_model(hf.BertLMHeadModel(config).eval(), 16)


@pytest.mark.parametrize("name", ["Bart", "Rwkv", "Roberta", "RecurrentGemma"])
def test_a_model_that_samples_otherwise_than_it_scores_is_refused(name):
    """Causal, and the same beside longer texts; but with padding on the left, as prompts are sampled, they err.

    RecurrentGemma errs where a prompt comes twice: its state is not in the cache that is reordered.
    """
    own = {
        "Bart": {"decoder_layers": 3, "d_model": 16}, "Rwkv": {"attention_hidden_size": 16},
        "RecurrentGemma": {"lru_width": 16, "attention_window_size": 64, "head_dim": 8},
    }.get(name, {})  # fmt: skip
    model = family(name, **OLDER, **own, is_decoder=True)
    if name == "RecurrentGemma":
        with torch.no_grad():  # initial weights are so small that its state hardly counts
            for parameter in model.parameters():
                parameter.mul_(3 if parameter.dim() > 1 else 1)
    with pytest.raises(ModelError, match=rf"{name}\w+: .* change where it is sampled in a batch, by \S+ nats; samples"):
        check_model(model, 32)


def test_weights_that_still_train_below_a_frozen_block_are_an_error():
    model = tiny_gpt2()
    model.transformer.extra = torch.nn.Parameter(torch.ones(()))
    model.transformer.wte.register_forward_hook(lambda module, args, out: out * model.transformer.extra)
    with pytest.raises(ModelError, match="something that block 1 reads from would go on training"):
        freeze(model, 1)


def saved(folder, change):
    """The embedded model in a folder, its tensors changed by name."""
    settings = load_settings("mini")
    save_model(load_model(settings), load_tokenizer(settings), folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {change(name): t for name, t in tensors.items() if change(name)}, folder / "model.safetensors", {"format": "pt"}
    )
    return load_settings("mini", model=str(folder))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda name: f"module.{name}", r"missing, such as \S+, \S+, \S+; get the model again"),
        (lambda name: None if ".h.7." in name else name, r"12 missing, such as transformer\.h\.7\.attn\.c_attn\.bias, "),
        (lambda name: name.replace("ln_f", "ln_x"), r"2 missing, such as transformer\.ln_f\.bias"),
    ],
)  # fmt: skip
def test_weights_that_are_missing_are_not_made_up(tmp_path, change, said):
    settings = saved(tmp_path / "model", change)
    for load in (lambda: load_model(settings), lambda: load_saved(tmp_path / "model")):
        with pytest.raises(ModelError, match=said):
            load()


def test_weights_that_nothing_asks_for_are_an_error_too(tmp_path):
    settings = saved(tmp_path / "model", lambda name: name)
    tensors = load_file(tmp_path / "model/model.safetensors")
    save_file({**tensors, "v_head.weight": torch.zeros(2)}, tmp_path / "model/model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 unexpected, such as v_head\.weight"):
        load_model(settings)


def test_weights_of_another_shape_are_named(tmp_path):
    settings = saved(tmp_path / "model", lambda name: name)
    tensors = load_file(tmp_path / "model/model.safetensors")
    cut = {name: t[:-1] if name.endswith("ln_1.weight") else t for name, t in tensors.items()}
    save_file(cut, tmp_path / "model/model.safetensors", {"format": "pt"})
    for load in (lambda: load_model(settings), lambda: load_saved(tmp_path / "model")):
        with pytest.raises(
            ModelError, match=r"12 mismatched, such as .*transformer\.h\.0\.ln_1\.weight.*127.*128.*h\.1\."
        ):
            load()


@pytest.mark.parametrize("kind", ["tied twice", "sharded", "bf16"])
def test_what_is_only_stored_otherwise_loads(tmp_path, kind):
    settings = load_settings("mini")
    model = load_model(settings)
    folder = tmp_path / "model"
    if kind == "bf16":
        model = model.bfloat16()
    model.save_pretrained(folder, **({"max_shard_size": "2MB"} if kind == "sharded" else {}))
    load_tokenizer(settings).save_pretrained(folder)
    if kind == "tied twice":  # the head is stored beside the embedding that it is
        tensors = load_file(folder / "model.safetensors")
        head = {"lm_head.weight": tensors["transformer.wte.weight"].clone()}
        save_file({**tensors, **head}, folder / "model.safetensors", {"format": "pt"})
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (kind == "sharded")
    again = load_model(load_settings("mini", model=str(folder)))
    assert torch.equal(again.transformer.wte.weight, model.transformer.wte.weight.float())


def limited(tmp_path, **config):
    settings = load_settings("mini")
    save_model(load_model(settings), load_tokenizer(settings), tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return load_settings("mini", model=str(tmp_path / "model"), runs_dir=str(tmp_path / "runs"))


def test_a_model_that_reads_too_few_tokens_is_an_error_before_any_work(tmp_path):
    settings = limited(tmp_path, n_positions=200)
    with pytest.raises(SettingsError, match=r"max_length is 256, but the model .* reads 200 tokens at most"):
        get_data(settings)
    assert not (settings.run_dir / "data").exists()
    tokenizer = load_tokenizer(settings)
    fits = load_settings("mini", model=settings.model, max_length=200, max_prompt_length=136)
    check_limits(load_config(fits), tokenizer, fits)
    sampled = load_settings("mini", model=settings.model, max_length=200, max_prompt_length=137)
    with pytest.raises(SettingsError, match=r"max_prompt_length \+ max_new_tokens is 201, .* reads 200 tokens at most"):
        check_limits(load_config(sampled), tokenizer, sampled)


@pytest.mark.parametrize(
    ("name", "sizes", "length", "most"),
    [("Roberta", {**OLDER, "is_decoder": True}, 64, 62), ("Mpt", {**MPT, "max_seq_len": 16}, 32, 16)],
)
def test_a_limit_that_the_configuration_does_not_give_is_found_by_trying(name, sizes, length, most):
    with pytest.raises(ModelError, match=rf"{name}ForCausalLM reads {most} tokens at most, but .* is {length} \("):
        check_model(family(name, **sizes), length)


def test_the_shortest_length_can_be_checked():
    check_model(family("GPT2", **FAMILIES["GPT2"]), 2)


def test_a_model_with_fewer_blocks_than_are_to_be_frozen_is_an_error_before_any_work(tmp_path):
    settings = limited(tmp_path, n_layer=6)
    with pytest.raises(SettingsError, match=r"freeze_layers is 8, but the model .* has 6 blocks"):
        get_data(settings)
    assert not (settings.run_dir / "data").exists()


def test_limits_are_looked_at_again_although_the_data_is_there(tmp_path):
    small = {"max_pairs": 20, "held_out_pairs": 10, "runs_dir": str(tmp_path / "runs")}
    get_data(load_settings("mini", **small))
    with pytest.raises(SettingsError, match=r"max_prompt_length \+ max_new_tokens is 257, but .* reads 256 tokens"):
        get_data(load_settings("mini", max_new_tokens=129, **small))
    with pytest.raises(SettingsError, match="max_length is 256, but the model .* reads 200 tokens at most"):
        get_data(load_settings("mini", model=limited(tmp_path, n_positions=200).model, **small))


def test_a_tokenizer_with_more_ids_than_the_model_knows_is_an_error_before_any_work(tmp_path):
    settings = limited(tmp_path, vocab_size=1500)
    known = load_model(load_settings("mini")).config.vocab_size
    with pytest.raises(ModelError, match=rf"has ids up to {known - 1}, but the model knows 1500 tokens"):
        get_data(settings)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "Cannot parse precompiled_charsmap"),
        ({"model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                    "max_input_chars_per_word": 100, "vocab": {"<|endoftext|>": 0}}}, r"Missing \[UNK\] token"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_panics_or_fails_with_the_first_text_is_one_error(tmp_path, change, said):
    """The library's panic is no Exception: it passed every handler, to a raw traceback."""
    settings = limited(tmp_path)
    path = tmp_path / "model/tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=f"cannot load the tokenizer of .*{said}"):
        load_tokenizer(settings)


def test_a_special_token_that_no_text_becomes_may_lie_beyond_the_vocabulary(tmp_path):
    settings = load_settings("mini")
    tokenizer = load_tokenizer(settings)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    check_limits(load_config(settings), tokenizer, settings)

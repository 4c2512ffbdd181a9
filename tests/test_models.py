import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from conftest import tiny_gpt2
from dpo_helpers.device import Compute
from dpo_helpers.errors import CourseError, ModelError, SettingsError
from dpo_helpers.fast.head import head_logprobs
from dpo_helpers.logprobs import response_logprobs
from dpo_helpers.models import blocks, count_parameters, freeze, weights_hash
from dpo_helpers.run.loading import load_model, load_saved, load_tokenizer, model_identity, save_model
from dpo_helpers.settings import load_settings


def test_what_trains_in_gpt2_with_eight_frozen_blocks():
    """d = 768: 4 blocks of 12 d² + 13 d = 7,087,872, and the final layer norm, 2 d: 28,353,024 of 124,439,808."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    counts = freeze(model, 8)
    assert (counts.total, counts.trainable) == (124_439_808, 28_353_024)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[2] for name in trainable if ".h." in name} == {"8", "9", "10", "11"}
    assert not model.lm_head.weight.requires_grad, "the head is tied to the frozen embedding"


def test_embeddings_can_be_left_free():
    """50,257 tokens and 1,024 positions of 768 numbers more."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    assert freeze(model, 8, freeze_embeddings=False).trainable == 28_353_024 + (50_257 + 1_024) * 768
    assert model.lm_head.weight.requires_grad


def test_freezing_is_not_cumulative(gpt2):
    everything = count_parameters(gpt2).total
    freeze(gpt2, 3)
    assert freeze(gpt2, 0, freeze_embeddings=False).trainable == everything


def test_llama_blocks_and_untied_head():
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    freeze(model, 2)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {name.split(".")[1] for name in frozen} == {"embed_tokens", "layers"}
    assert len(blocks(model)) == 3
    assert model.lm_head.weight.requires_grad


def frozen_blocks(model, at):
    """Numbers of the blocks all of whose parameters are frozen, and of those that have a frozen one; at: in names."""
    flags = {}
    for name, parameter in model.named_parameters():
        if name.split(".")[1] in ("h", "layers"):
            flags.setdefault(int(name.split(".")[at]), []).append(not parameter.requires_grad)
    return {n for n, found in flags.items() if all(found)}, {n for n, found in flags.items() if any(found)}


def test_experts_are_frozen_with_their_block_and_not_instead_of_it():
    """Two blocks of four experts each: freezing one block freezes its experts, all of them, and none of the other's."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=40, num_hidden_layers=2, num_local_experts=4, **sizes))
    freeze(model, 1)
    assert len(blocks(model)) == 2
    assert frozen_blocks(model, 2) == ({0}, {0})
    assert not model.model.embed_tokens.weight.requires_grad


def test_a_list_inside_a_block_is_not_taken_for_the_blocks(gpt2):
    """Five experts in each of three blocks, the longest list of the model; and three, as many as there are blocks."""
    for experts in (5, 3):
        for block in gpt2.transformer.h:
            block.experts = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(experts))
        assert blocks(gpt2) is gpt2.transformer.h
        freeze(gpt2, 2)
        assert frozen_blocks(gpt2, 2) == ({0, 1}, {0, 1})


def test_a_model_whose_blocks_cannot_be_told_is_refused_with_its_lists(gpt2):
    gpt2.config.n_layer = 4
    with pytest.raises(
        ModelError, match=r"has 4 layers by its configuration, but .* are transformer\.h \(3\): which are"
    ):
        freeze(gpt2, 1)
    gpt2.config.n_layer = 3
    gpt2.other = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))
    with pytest.raises(ModelError, match=r"has 3 layers .* are transformer\.h \(3\), other \(3\): which are"):
        freeze(gpt2, 1)
    gpt2.other = gpt2.other[:2]
    assert blocks(gpt2) is gpt2.transformer.h, "another list, of another length, is no doubt"
    plain, gpt2.config = gpt2.config, SimpleNamespace()  # as of a model whose parts have a configuration each
    with pytest.raises(ModelError, match=r"has no number of layers by its configuration, but .* transformer\.h \(3\)"):
        freeze(gpt2, 1)
    gpt2.config, gpt2.transformer.h = plain, torch.nn.Sequential(*gpt2.transformer.h)
    gpt2.other = None
    with pytest.raises(ModelError, match="GPT2LMHeadModel has 3 layers .* are none: which are"):
        freeze(gpt2, 1)


def test_too_many_blocks(gpt2):
    with pytest.raises(SettingsError, match="freeze_layers is 4, but the model has 3 blocks"):
        freeze(gpt2, 4)


def test_hash_sees_one_changed_weight(gpt2):
    before = weights_hash(gpt2)
    assert weights_hash(gpt2) == before
    with torch.no_grad():
        gpt2.transformer.h[1].mlp.c_fc.weight[3, 5] += 1e-6
    assert weights_hash(gpt2) != before


def test_save_and_reopen(gpt2, tokenizer, tmp_path):
    save_model(gpt2, tokenizer, tmp_path / "m")
    assert weights_hash(load_saved(tmp_path / "m")) == weights_hash(gpt2)
    assert not list((tmp_path / "m").glob("*.bin"))
    settings = load_settings("mini", model=str(tmp_path / "m"))
    assert load_tokenizer(settings).encode("Human: Hi") == tokenizer.encode("Human: Hi")
    assert model_identity(settings)["name"] == "m"


def test_an_index_that_takes_a_tensor_from_another_file_makes_another_model(gpt2, tokenizer, tmp_path):
    """Both files are there before and after: only the index changes."""
    gpt2.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path / "m")
    index = tmp_path / "m/model.safetensors.index.json"
    text = index.read_text()
    first = sorted((tmp_path / "m").glob("*.safetensors"))[0].name
    tensors = load_file(tmp_path / "m" / first)
    save_file({name: t + 1 for name, t in tensors.items()}, tmp_path / "m/other.safetensors", {"format": "pt"})
    found = []
    for content in (text, text.replace(first, "other.safetensors")):
        index.write_text(content)
        settings = load_settings("mini", model=str(tmp_path / "m"))
        found.append((model_identity(settings), weights_hash(load_model(settings))))
    (identity, weights), (other_identity, other_weights) = found
    assert weights != other_weights
    assert identity != other_identity


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(ModelError, match=r"holds no weights: it needs model\.safetensors"):
        load_model(load_settings("mini", model=str(tmp_path)))


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ModelError, match=r"pytorch_model.bin, which can run code when opened"):
        load_model(load_settings("mini", model=str(tmp_path)))


def test_truncated_weights(gpt2, tokenizer, tmp_path):
    save_model(gpt2, tokenizer, tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot load model"):
        load_model(load_settings("mini", model=str(tmp_path / "m")))


def test_remote_code_is_not_run(gpt2, tokenizer, tmp_path):
    """A model that names code of its own loads as plain GPT-2, and the code is not imported."""
    import json

    save_model(gpt2, tokenizer, tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Evil"}
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    (tmp_path / "m/evil.py").write_text("raise SystemExit('remote code ran')")
    assert type(load_model(load_settings("mini", model=str(tmp_path / "m")))).__name__ == "GPT2LMHeadModel"


@pytest.mark.parametrize("record", [True, False])
def test_a_gguf_model_loads_freezes_and_saves(tmp_path, monkeypatch, record):
    """A tiny Llama written as GGUF: it loads in float32, saves as safetensors, and reopens with the same weights.

    Without a quantisation record in its configuration, as transformers 5.5.0 to 5.12.1 give it, as well.
    """
    gguf = pytest.importorskip("gguf")
    import numpy as np

    path, d, layers, vocab = tmp_path / "tiny.gguf", 16, 2, 300
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers), writer.add_context_length(64), writer.add_embedding_length(d)
    writer.add_feed_forward_length(32), writer.add_head_count(2), writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5), writer.add_vocab_size(vocab), writer.add_rope_dimension_count(8)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (vocab, d), "output_norm": (d,), "output": (vocab, d)}
    for i in range(layers):
        shapes |= {f"blk.{i}.{n}": (d, d) for n in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"blk.{i}.ffn_gate": (32, d), f"blk.{i}.ffn_up": (32, d), f"blk.{i}.ffn_down": (d, 32)}
        shapes |= {f"blk.{i}.attn_norm": (d,), f"blk.{i}.ffn_norm": (d,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()

    def without_record(*arguments, from_pretrained=AutoModelForCausalLM.from_pretrained, **more):
        loaded, found = from_pretrained(*arguments, **more)
        vars(loaded.config).pop("quantization_config", None)
        return loaded, found

    if not record:
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", without_record)
    model = load_model(load_settings("mini", model=str(path)))
    assert type(model).__name__ == "LlamaForCausalLM"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert freeze(model, 1).trainable < freeze(model, 0).trainable
    model.save_pretrained(tmp_path / "saved")
    assert weights_hash(load_saved(tmp_path / "saved")) == weights_hash(model)


def test_missing_gguf(tmp_path):
    with pytest.raises(ModelError, match=r"no such file; give --model an existing \.gguf"):
        load_model(load_settings("mini", model=str(tmp_path / "x.gguf")))


@pytest.mark.parametrize("name", ["no/such/path/here", "../../x", "./here", "a b"])
def test_neither_path_nor_hub_id(name):
    with pytest.raises(CourseError, match="neither an existing path nor a Hub id"):
        load_model(load_settings("mini", model=name))


def test_a_short_revision_is_refused():
    with pytest.raises(CourseError, match="must be a commit of 40 hex digits"):
        load_model(load_settings("mini", model="some/model", model_revision="main"))


def test_offline_hub_model_is_one_clear_error():
    with pytest.raises(ModelError, match=r"cannot get model 'openai-community/gpt2'.*--profile mini"):
        load_model(load_settings("gpt2"))


def test_a_tokenizer_needs_an_end(gpt2, tokenizer, tmp_path):
    save_model(gpt2, tokenizer, tmp_path / "m")
    shutil.copy(tmp_path / "m/tokenizer.json", tmp_path / "t.json")
    (tmp_path / "m/tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "m/config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ModelError, match="has no end-of-text token"):
        load_tokenizer(load_settings("mini", model=str(tmp_path / "m")))


def far_below_zero():
    """A tiny GPT-2 whose logits lie near -100, as the real one's do: a shift that softmax does not see."""
    model = tiny_gpt2()
    with torch.no_grad():
        model.lm_head.weight[:, 0] += 4.0
        model.transformer.ln_f.bias[0] = -40.0
    return model


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_head_stays_in_float32(tmp_path, precision):
    """In bf16 logits near -100 have steps of 0.5. The rest of a tiny model rounds by far less than that."""
    far_below_zero().save_pretrained(tmp_path)
    model, compute = load_saved(tmp_path), Compute(torch.device("cpu"), precision)
    assert model.lm_head.weight is model.transformer.wte.weight, "still tied"
    ids = torch.arange(1, 21)[None]
    with torch.no_grad(), compute.autocast():
        logits = model(ids).logits
        plain = response_logprobs(logits, ids, torch.ones_like(ids, dtype=torch.bool))
        by_head = head_logprobs(model.transformer(ids).last_hidden_state[0, :-1], model.lm_head.weight, ids[0, 1:])
    assert logits.dtype == torch.float32
    assert -140 < logits.mean() < -60
    with torch.no_grad():
        exact = model.double()(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).squeeze(-1)
    allowed = 1e-3 if precision == "fp32" else 0.6
    assert plain.item() == pytest.approx(exact.sum().item(), abs=allowed)
    assert (by_head - exact).abs().max() < allowed / 10

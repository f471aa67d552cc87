import contextlib
import json
import logging
import weakref

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from sgm.modules.encoders.modules import FrozenT5Embedder
from sgm.modules.encoders.t5_folder import T5Folder
from sgm.util import InputError, instantiate_from_config
from sgm.weights.index import TIED

TEXTS = ["a red ball moves left", "", "a yellow triangle  moves\nup"]


def shards(folder):
    return sorted(folder.glob("model-0*-of-0*.safetensors"))


def test_equals_transformers_without_attention_mask(t5_dir):
    from transformers import T5EncoderModel

    embedder = FrozenT5Embedder(str(t5_dir), max_length=20)
    assert len(shards(t5_dir)) > 2
    reference = T5EncoderModel.from_pretrained(t5_dir).eval()
    with torch.no_grad():
        expected = reference(input_ids=embedder.tokenize(TEXTS)).last_hidden_state
        masked = reference(
            input_ids=embedder.tokenize(TEXTS), attention_mask=(embedder.tokenize(TEXTS) != 0).long()
        ).last_hidden_state
    found = embedder(TEXTS)
    assert found.shape == (3, 20, 32) == (3, 20, embedder.embed_dim)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert (found - masked).abs().max() > 1e-2
    assert not found.requires_grad


def test_tokens_equal_those_of_transformers_tokenizer(t5_dir):
    from transformers import T5Tokenizer

    tokenizer = T5Tokenizer.from_pretrained(str(t5_dir), local_files_only=True)
    texts = [*TEXTS, "a BALL, unknown words: 日本 é!", "a red ball moves left " * 5, "  spaces  around "]
    embedder = FrozenT5Embedder(str(t5_dir), max_length=24)
    expected = tokenizer(texts, padding="max_length", truncation=True, max_length=24)["input_ids"]
    assert embedder.tokenize(texts).tolist() == expected


def test_ids_end_with_end_token_and_are_padded_to_max_length(t5_dir):
    ids = FrozenT5Embedder(str(t5_dir), max_length=20).tokenize(["a red ball", ""])
    assert ids.shape == (2, 20) and ids.dtype == torch.int64
    assert ids[1].tolist() == [1] + [0] * 19
    num = int((ids[0] != 0).sum())
    assert ids[0, num - 1] == 1 and (ids[0, : num - 1] > 2).all() and (ids[0, num:] == 0).all()


def test_long_prompt_is_cut_with_a_warning_that_shows_what_is_dropped(t5_dir, caplog):
    embedder = FrozenT5Embedder(str(t5_dir), max_length=6)
    text = "a red ball moves left and yellow triangle"
    with caplog.at_level(logging.WARNING, logger="sgm"):
        ids = embedder.tokenize([text])
        embedder.tokenize([text])
    assert ids.shape == (1, 6) and ids[0, -1] == 1
    kept = embedder.folder.tokenizer.decode(ids[0, :-1].tolist())
    assert len(caplog.records) == 1
    dropped = caplog.messages[0].split("dropped: '")[1].split("'")[0]
    assert dropped.endswith("triangle")
    assert (kept + dropped).replace(" ", "") == text.replace(" ", "")
    assert "max_length is 6" in caplog.text
    (cut,) = embedder.cut_texts([text, "a red"]).items()
    assert cut[0] == text and f": {cut[1]} (" in caplog.messages[0]
    assert len(embedder.cut_texts([text * 1000])[text * 1000]) < 200


def test_prompt_of_exactly_max_length_is_not_cut(t5_dir, caplog):
    embedder = FrozenT5Embedder(str(t5_dir), max_length=100)
    num = int((embedder.tokenize(["a red ball"]) != 0).sum())
    assert FrozenT5Embedder(str(t5_dir), max_length=num).tokenize(["a red ball"])[0, -1] == 1
    assert not caplog.records


@pytest.mark.parametrize(
    ("text", "characters", "wholly"),
    [
        ("a red ball", "", False),
        ("", "", False),
        ("a {red} ball 球", "{}球", False),
        ("一个红色的球 一个", "一个红色的球", True),
        ("🚀", "🚀", True),
        ("?!", "?!", True),
    ],
)
def test_unknown_characters_are_found(t5_dir, text, characters, wholly):
    found = FrozenT5Embedder(str(t5_dir)).unknown_texts(["a ball", text])
    assert {key: (value.characters, value.wholly) for key, value in found.items()} == (
        {text: (characters, wholly)} if characters else {}
    )


def test_unknown_characters_are_named_in_a_warning_once(t5_dir, caplog):
    embedder = FrozenT5Embedder(str(t5_dir), max_length=20)
    with caplog.at_level(logging.WARNING, logger="sgm"):
        for _ in range(2):
            embedder.tokenize(["a {red} ball", "a ball"])
    assert caplog.messages == ["unknown to the tokenizer, and lost: '{', '}' (prompt: 'a {red} ball')"]
    assert str(embedder.unknown_texts(["一二三四五六七八九十甲乙丙丁"]).popitem()[1]).endswith("'甲', '乙' and 2 more")


def test_embedding_does_not_depend_on_the_batch(t5_dir):
    embedder = FrozenT5Embedder(str(t5_dir), max_length=20)
    alone = embedder([TEXTS[2]])
    batch = embedder([TEXTS[0], TEXTS[2], TEXTS[2], TEXTS[1]])
    assert torch.equal(batch[1:2], alone) and torch.equal(batch[2:3], alone)
    assert not torch.equal(batch[0:1], alone)


def test_loading_leaves_the_global_generator_alone(t5_dir):
    embedder = FrozenT5Embedder(str(t5_dir), max_length=8)
    state = torch.get_rng_state()
    embedder(["a red ball"])
    assert torch.equal(state, torch.get_rng_state())


def test_weights_are_loaded_on_first_use_and_never_registered(t5_dir):
    embedder = FrozenT5Embedder(str(t5_dir), max_length=8)
    assert not embedder.is_loaded
    embedder.check()
    assert not embedder.is_loaded
    first = embedder(["a red ball"])
    assert embedder.is_loaded
    holder = nn.Sequential(embedder)
    assert not holder.state_dict() and not list(holder.parameters()) and not list(holder.buffers())
    assert len(list(holder.modules())) == 2
    embedder.release()
    assert not embedder.is_loaded
    assert torch.equal(embedder(["a red ball"]), first)


def test_casting_the_holder_leaves_t5_precision_alone(t5_dir):
    embedder = FrozenT5Embedder(str(t5_dir), max_length=8)
    expected = embedder(["a red ball"])
    nn.Sequential(embedder).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(embedder(["a red ball"]), expected)


@pytest.mark.parametrize(("offload", "stays"), [("none", True), ("cpu", True), ("blocks", True), ("release", False)])
def test_offload_happens_after_the_outermost_block(t5_dir, offload, stays):
    embedder = FrozenT5Embedder(str(t5_dir), max_length=8, offload=offload)
    with embedder.keep_loaded():
        embedder(["a red ball"])
        assert embedder.is_loaded
    assert embedder.is_loaded == stays
    embedder(["a red ball"])
    assert embedder.is_loaded == stays


@pytest.mark.parametrize("offload", ["cpu", "blocks"])
def test_offloaded_weights_are_never_copied_back(t5_dir, monkeypatch, offload):
    """The meta device stands for an accelerator: nothing can be copied back from it."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # meta has none
    embedder = FrozenT5Embedder(str(t5_dir), max_length=8, offload=offload)
    nn.Sequential(embedder).to("meta")
    for _ in range(3):
        assert embedder(["a red ball"]).device.type == "meta"
        (model,) = embedder._loaded
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    last = weakref.ref(model)
    del model
    embedder.release()
    assert last() is None, "freed at once, without the garbage collector"


def test_blocks_pass_through_the_device_one_by_one(t5_dir):
    plain = FrozenT5Embedder(str(t5_dir), max_length=8)(["a red ball"])
    embedder = FrozenT5Embedder(str(t5_dir), max_length=8, offload="blocks")
    assert torch.equal(embedder(["a red ball"]), plain)
    (model,) = embedder._loaded
    blocks, counts = model.encoder.block, []
    host = {id(parameter) for parameter in model.parameters()}
    for block in blocks:
        block.layer[0].register_forward_hook(
            lambda *_: counts.append([any(id(p) not in host for p in block.parameters()) for block in blocks])
        )
    assert torch.equal(embedder(["a red ball"]), plain)
    assert counts == [[True, False], [False, True]] and len(blocks) == 2


@pytest.mark.parametrize("storage", ["int8", "fp8"])
def test_eight_bits(t5_dir, storage, caplog):
    pytest.importorskip("torchao", reason="torchao is not installed: pip install .[lowmem]")
    plain = FrozenT5Embedder(str(t5_dir), max_length=8)(["a red ball"])
    embedder = FrozenT5Embedder(str(t5_dir), max_length=8, offload="blocks")
    embedder.storage = storage
    with caplog.at_level(logging.INFO, logger="sgm"):
        small = embedder(["a red ball"])
    assert F.cosine_similarity(small.flatten(), plain.flatten(), 0) > 0.999 and not torch.equal(small, plain)
    (model,) = embedder._loaded
    assert f"T5: {7 * len(model.encoder.block)} linear layers in {storage}" in caplog.text


@pytest.mark.parametrize(
    ("stored", "asked", "got"),
    [
        (torch.float32, None, torch.float32),
        (torch.float32, "bf16", torch.bfloat16),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.bfloat16, "fp32", torch.float32),
        (torch.float16, None, torch.float32),
    ],
)
def test_dtype(own_t5_dir, stored, asked, got):
    from safetensors.torch import load_file, save_file

    for shard in shards(own_t5_dir):
        save_file({name: tensor.to(stored) for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})
    assert FrozenT5Embedder(str(own_t5_dir), max_length=8, dtype=asked)(["a red ball"]).dtype == got


def test_fp16_on_cpu_is_refused(t5_dir):
    with pytest.raises(InputError, match="CPU cannot run dtype: fp16"):
        FrozenT5Embedder(str(t5_dir), dtype="fp16")(["a"])


def test_folder_that_does_not_exist(tmp_path):
    with pytest.raises(InputError, match=r"does not exist \(model\.conditioner_config.*model_dir\).*text_encoder/"):
        FrozenT5Embedder(str(tmp_path / "nothing")).check()
    with pytest.raises(InputError, match="google/t5-v1_1-xxl.*does not exist"):
        FrozenT5Embedder()(["a"])


@pytest.mark.parametrize("name", ["spiece.model", "config.json", "model.safetensors.index.json"])
def test_missing_file_is_named(own_t5_dir, name):
    (own_t5_dir / name).unlink()
    for use in (FrozenT5Embedder(str(own_t5_dir)).check, lambda: FrozenT5Embedder(str(own_t5_dir))(["a"])):
        with pytest.raises(InputError, match=name.replace(".", r"\.")):
            use()


def test_all_missing_files_are_named_together(own_t5_dir):
    (own_t5_dir / "spiece.model").unlink()
    (own_t5_dir / "config.json").unlink()
    lost = shards(own_t5_dir)[1]
    lost.unlink()
    with pytest.raises(InputError) as error:
        FrozenT5Embedder(str(own_t5_dir)).check()
    assert all(name in str(error.value) for name in ("spiece.model", "config.json", lost.name))


def test_truncated_shard_is_named(own_t5_dir):
    shard = shards(own_t5_dir)[0]
    shard.write_bytes(shard.read_bytes()[:-16])
    with pytest.raises(InputError, match=f"{shard.name} is truncated"):
        FrozenT5Embedder(str(own_t5_dir)).check()


def test_lfs_pointer_is_recognised(own_t5_dir):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    shard = shards(own_t5_dir)[0]
    shard.write_text(pointer)
    (own_t5_dir / "spiece.model").write_text(pointer)
    with pytest.raises(InputError) as error:
        FrozenT5Embedder(str(own_t5_dir)).check()
    assert str(error.value).count("git lfs pull") == 2


def test_garbage_in_json_files(own_t5_dir):
    (own_t5_dir / "config.json").write_text("{")
    (own_t5_dir / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(InputError) as error:
        FrozenT5Embedder(str(own_t5_dir)).check()
    assert "config.json is not readable JSON" in str(error.value)
    assert "index.json is not an index" in str(error.value)


@pytest.mark.parametrize(("name", "size"), [("num_layers", -1), ("num_layers", 10**6), ("d_kv", "x"), ("d_ff", 1.5)])
def test_sizes_that_no_encoder_has(own_t5_dir, name, size):
    config = json.loads((own_t5_dir / "config.json").read_text())
    (own_t5_dir / "config.json").write_text(json.dumps(config | {name: size}))
    with pytest.raises(InputError, match=f"config.json: {name} is '?{size}'?; expected a whole number from 1 to"):
        FrozenT5Embedder(str(own_t5_dir)).check()


def test_weights_of_another_size(own_t5_dir):
    config = json.loads((own_t5_dir / "config.json").read_text())
    for change in ({"d_ff": 128}, {"num_layers": 3}):
        (own_t5_dir / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=r"weights in .* (do not fit|lack)"):
            FrozenT5Embedder(str(own_t5_dir))(["a"])


def test_tokenizer_of_another_model(own_t5_dir):
    config = json.loads((own_t5_dir / "config.json").read_text())
    (own_t5_dir / "config.json").write_text(json.dumps(config | {"vocab_size": 5}))
    with pytest.raises(InputError, match="different models"):
        FrozenT5Embedder(str(own_t5_dir)).check()


def test_single_file_folder(own_t5_dir, t5_dir):
    from safetensors.torch import load_file, save_file

    tensors = {}
    for shard in shards(own_t5_dir):
        tensors |= load_file(shard)
        shard.unlink()
    (own_t5_dir / "model.safetensors.index.json").unlink()
    save_file(tensors, own_t5_dir / "model.safetensors", {"format": "pt"})
    texts = ["a red ball"]
    assert torch.equal(FrozenT5Embedder(str(own_t5_dir))(texts), FrozenT5Embedder(str(t5_dir))(texts))


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_of_a_variant_are_those_where_nothing_else_is(own_t5_dir, t5_dir, sharded):
    """As ``save_pretrained(variant="fp16")`` writes them."""
    tensors = {name: tensor for shard in shards(own_t5_dir) for name, tensor in load_file(shard).items()}
    for shard in shards(own_t5_dir):
        shard.unlink()
    (own_t5_dir / "model.safetensors.index.json").unlink()
    names = [f"model.fp16-0000{n}-of-00002.safetensors" for n in (1, 2)] if sharded else ["model.fp16.safetensors"]
    for n, name in enumerate(names):
        save_file({key: tensors[key] for key in sorted(tensors)[n :: len(names)]}, own_t5_dir / name, {"format": "pt"})
    if sharded:
        listed = {key: names[n % 2] for n, key in enumerate(sorted(tensors))}
        (own_t5_dir / "model.safetensors.index.fp16.json").write_text(
            json.dumps({"metadata": {}, "weight_map": listed})
        )
    embedder = FrozenT5Embedder(str(own_t5_dir))
    embedder.check()
    assert torch.equal(embedder(["a red ball"]), FrozenT5Embedder(str(t5_dir))(["a red ball"]))
    (own_t5_dir / "model.bf16.safetensors").touch()
    with pytest.raises(InputError, match=r"has several sets of weights: model\.bf16\.safetensors, model\..*fp16"):
        FrozenT5Embedder(str(own_t5_dir)).check()


@pytest.mark.parametrize("params", [{"dtype": "fp8"}, {"offload": "disk"}, {"max_length": 1}, {"device": "gpu"}])
def test_unsupported_parameters_are_refused(params):
    with pytest.raises(InputError, match=next(iter(params))):
        FrozenT5Embedder("anywhere", **params)


def test_a_device_that_is_not_there_is_named_before_t5_is_read(t5_dir, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for name, num in (("cuda:2", 2), ("mps", 0)):
        embedder = FrozenT5Embedder(str(t5_dir), device=name)
        monkeypatch.setattr(embedder, "_load", lambda _: pytest.fail("it was read"))
        with pytest.raises(InputError, match=f"device: '{name}' is not on this machine, which has {num} of that kind"):
            embedder(["a"])


def test_a_single_string_is_refused(t5_dir):
    with pytest.raises(InputError, match="list of texts"):
        FrozenT5Embedder(str(t5_dir))("a red ball")


def test_released_yaml_section(t5_dir):
    config = {
        "target": "sgm.modules.encoders.modules.FrozenT5Embedder",
        "params": {"model_dir": str(t5_dir), "max_length": 12, "cache_dir": "/somewhere"},
    }
    assert instantiate_from_config(config)(["a"]).shape == (1, 12, 32)


def test_weights_that_are_not_finite_are_named(own_t5_dir):
    shard = min(own_t5_dir.glob("*.safetensors"))
    tensors = load_file(shard)
    name = min(tensors)
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"{shard.name}: {name} is not finite: 1 of"):
        T5Folder(own_t5_dir).load(torch.float32)


def rewrite(shard, change):
    tensors = load_file(shard)
    save_file(change(tensors), shard, metadata={"format": "pt"})


def reindex(folder, change):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": change(json.loads(index.read_text())["weight_map"])}))


NORM = "encoder.final_layer_norm.weight"
LACKS = f"lacks {NORM}, which its index places there"
UNLISTED = f"holds {NORM}, which its index does not place there"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda listed: {n: file for n, file in listed.items() if n != NORM}, UNLISTED),
        (lambda listed: listed | {NORM: next(file for file in listed.values() if file != listed[NORM])}, LACKS),
        (lambda listed: listed | {NORM: "/etc/passwd"}, "is not an index.*names '/etc/passwd'"),
        (lambda listed: listed | {NORM: "../t5/" + listed[NORM]}, "is not an index.*names '../t5/"),
        (lambda listed: listed | {NORM: "x" * 300}, "is missing, though the index lists it"),
        (lambda listed: {}, "is not an index.*weight_map"),
    ],
)
def test_an_index_that_is_not_that_of_the_files(own_t5_dir, change, message):
    reindex(own_t5_dir, change)
    for check in (FrozenT5Embedder(str(own_t5_dir)).check, T5Folder(own_t5_dir).check_weights):
        with pytest.raises(InputError, match=f"(?s){message}"):
            check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: {n: t for n, t in own.items() if n != NORM}, f"{NORM} is missing"),
        (
            lambda own: {n: t[1:] if n == NORM else t for n, t in own.items()},
            rf"{NORM} has the shape \(31,\), expected \(32,\)",
        ),
        (lambda own: {n: t for n, t in own.items() if n not in TIED}, "encoder.embed_tokens.weight is missing and 1"),
    ],
)
def test_weights_that_do_not_fit_the_configuration(own_t5_dir, change, message):
    for shard in shards(own_t5_dir):
        rewrite(shard, change)
    reindex(own_t5_dir, lambda _: {n: file.name for file in shards(own_t5_dir) for n in load_file(file)})
    with pytest.raises(InputError, match=f"do not fit its config.json: {message}"):
        T5Folder(own_t5_dir).check_weights()


@pytest.mark.parametrize("tied", [["encoder.embed_tokens.weight"], ["shared.weight", "encoder.embed_tokens.weight"]])
def test_the_embedding_has_either_name_or_both(own_t5_dir, tied):
    (shard,) = (file for file in shards(own_t5_dir) if "shared.weight" in load_file(file))
    rewrite(shard, lambda own: own | {name: own["shared.weight"].clone() for name in tied})
    if len(tied) == 1:
        rewrite(shard, lambda own: {n: t for n, t in own.items() if n != "shared.weight"})
    T5Folder(own_t5_dir).check_weights()
    assert T5Folder(own_t5_dir).load(torch.float32).shared.weight.abs().sum() > 0


@pytest.mark.parametrize("change", [{"feed_forward_proj": 3}, {"dense_act_fn": "abc"}, {"dropout_rate": 7}])
def test_a_configuration_that_transformers_does_not_know(own_t5_dir, change):
    file = own_t5_dir / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match="config.json describes no T5 that transformers knows; copy it again"):
        T5Folder(own_t5_dir).check_weights()

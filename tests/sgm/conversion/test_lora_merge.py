"""Several LoRAs merged, and a LoRA extracted from two models. Matrices alone, no networks."""

import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from sgm.conversion.diffusers.names import network_to_diffusers
from sgm.conversion.lora import export_lora
from sgm.conversion.lora_extract import extract_lora
from sgm.conversion.lora_merge import _reduced, average_loras, average_weights, merge_loras, read_loras, sum_loras
from sgm.util import InputError
from sgm.weights.adapters import TARGETS, AdapterInfo, is_adapter, read_adapter_info
from sgm.weights.checkpoint import save_network
from sgm.weights.files import PREFIX, find_weights, read_metadata, read_tensors, weights_digest
from sgm.weights.lora.files import read_any_lora
from sgm.weights.lora.lokr import shapes_of
from sgm.weights.lora.names import GROUPS

D, LAYERS = 16, 2
OTHER = "transformer.layers.0.mlp.dense_h_to_4h.weight"


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(seed=0, layers=LAYERS):
    """Return a network in SAT's names, as far as LoRA goes."""
    tensors = {OTHER: drawn(4 * D, D, seed=seed)}
    for layer in range(layers):
        for target, num in TARGETS.items():
            tensors[f"transformer.layers.{layer}.{target}.weight"] = drawn(num * D, D, seed=seed + layer + num)
    return tensors


def matrices(rank, seed, layers=range(LAYERS)):
    return {
        f"transformer.layers.{layer}.{target}.matrix_{kind}.{index}": drawn(
            *((rank, D) if kind == "A" else (D, rank)),
            seed=seed + 10 * layer + index + num + (100 if kind == "B" else 0),
        )
        / 4
        for layer in layers
        for target, num in TARGETS.items()
        for index in range(num)
        for kind in "AB"
    }


@pytest.fixture
def files(tmp_path):
    """The folders `base`, `one` (rank 2) and `two` (rank 3, of layer 1), and kohya's file `three` (rank 1)."""
    save_network(tmp_path / "base", 1, network(), patch_size=2)
    digest = weights_digest(find_weights(tmp_path / "base"))
    for name, rank, alpha, layers in (("one", 2, 4, (0, 1)), ("two", 3, 1.5, (1,))):
        info = AdapterInfo(rank=rank, alpha=alpha, layers=layers, base=str(tmp_path / "base"), base_digest=digest)
        save_network(tmp_path / name, 5, matrices(rank, rank, layers), patch_size=2, adapters=info)
    stem = "lora_unet_transformer_blocks_0_attn1_to_k"
    down, up = {f"{stem}.lora_down.weight": drawn(1, D, seed=7)}, {f"{stem}.lora_up.weight": drawn(D, 1, seed=8)}
    save_file(down | up | {f"{stem}.alpha": torch.tensor(0.5)}, tmp_path / "three.safetensors")
    return tmp_path


def deltas(path, base=None):
    """Return what a file adds to each projection: a LoRA, or a network against another."""
    if base is not None:
        before, after = (read_tensors(find_weights(each)) for each in (base, path))
        return {name.removeprefix(PREFIX): tensor - before[name] for name, tensor in after.items()}
    lora, result = read_any_lora(path), {}
    for layer in range(LAYERS):
        for target, num in TARGETS.items():
            name = f"transformer.layers.{layer}.{target}"
            pairs = [[lora.tensors.get(f"{name}.matrix_{kind}.{i}") for kind in "AB"] for i in range(num)]
            products = [torch.zeros(D, D) if a is None else b.compute() @ a.compute() for a, b in pairs]
            result[f"{name}.weight"] = lora.alpha / lora.rank * torch.cat(products)
    return result


def expected(files, strengths):
    each = [deltas(files / name) for name in ("one", "two", "three.safetensors")]
    return {name: sum(strength * own[name] for strength, own in zip(strengths, each, strict=True)) for name in each[0]}


def require_close(found, wanted, atol=1e-5):
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=atol)


@pytest.mark.parametrize("strengths", [(1, 1, 1), (0.5, -2, 0.25), (0, 0, 1), (0, 0, 0)])
def test_the_base_gets_what_all_add(files, strengths):
    paths = [files / "one", files / "two", files / "three.safetensors"]
    merge_loras(paths, files / "out", strengths=strengths, file_format="safetensors")
    found = deltas(files / "out", files / "base")
    require_close(found, expected(files, strengths))
    assert found.keys() == network().keys() and not found[OTHER].any()
    if not any(strengths):
        assert not any(tensor.any() for tensor in found.values()), "the base bit for bit"


def test_a_sum_is_one_lora_and_one_of_a_smaller_rank_the_nearest(files):
    paths, strengths = [files / "one", files / "two", files / "three.safetensors"], (0.5, -2, 0.25)
    sum_loras(paths, files / "sum", strengths=strengths)
    wanted = expected(files, strengths)
    require_close(deltas(files / "sum"), wanted)
    info = read_adapter_info(files / "sum")
    assert (info.rank, info.alpha, info.layers, info.base) == (6, 6, (0, 1), str(files / "base"))
    sum_loras(paths, files / "five", strengths=strengths, rank=5)
    require_close(deltas(files / "five"), wanted)  # no projection has more: three.safetensors has none of layer 1
    sum_loras([files / "one"], files / "alone", rank=2)
    require_close(deltas(files / "alone"), deltas(files / "one"))
    sum_loras(paths, files / "least", strengths=strengths, rank=1)
    found = deltas(files / "least")
    for name, tensor in wanted.items():
        for own, part in zip(found[name].split(D), tensor.split(D), strict=True):
            nearest = torch.linalg.svdvals(part)[1:].square().sum().sqrt()
            torch.testing.assert_close((own - part).norm(), nearest, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_sum_takes_matrices_in_eight_bits_beside_others(files, dtype):
    eight = {n: t.to(dtype) for n, t in load_file(files / "three.safetensors").items()}
    save_file({n: t.float() for n, t in eight.items()}, files / "wide.safetensors")
    save_file(eight, files / "eight.safetensors")
    for name in ("wide", "eight"):
        sum_loras([files / "one", files / f"{name}.safetensors"], files / name)
    require_close(deltas(files / "eight"), deltas(files / "wide"), atol=0)


def test_an_average_is_that_of_the_matrices(files):
    info = read_adapter_info(files / "one")
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        save_network(files / name, 1, matrices(2, seed), patch_size=2, adapters=info)
    paths = [files / name for name in "abc"]
    average_loras(paths, files / "soup", strengths=average_weights(0.5, 3))
    found, own = read_any_lora(files / "soup"), [matrices(2, seed) for seed in (1, 2, 3)]
    for name, tensor in found.tensors.items():
        mean = 0.25 * own[0][name] + 0.25 * own[1][name] + 0.5 * own[2][name]
        torch.testing.assert_close(tensor.compute(), mean, rtol=0, atol=1e-6)
    assert found.info == info
    with pytest.raises(InputError, match=r"rank 3.*rank 2.*not of one training.*--result sum"):
        average_loras([files / "one", files / "two"], files / "no")


def test_what_cannot_be_merged_is_refused(files):
    one, three = files / "one", files / "three.safetensors"
    with pytest.raises(InputError, match="--strength has 2 numbers for 3 LoRAs"):
        merge_loras([one, one, three], files / "out", strengths=(1, 2))
    with pytest.raises(InputError, match="no file of adapters alone records its base among .*three.*--base_ckpt"):
        merge_loras([three], files / "out")
    with pytest.raises(InputError, match="no LoRA records its base.*--base_ckpt"):
        sum_loras([three, three], files / "out")
    with pytest.raises(InputError, match="--rank is 7; give a number from 1 to the sum of all ranks, 4"):
        sum_loras([one, one], files / "out", rank=7)
    with pytest.raises(InputError, match="every strength is 0"):
        sum_loras([one], files / "out", strengths=(0,))
    with pytest.raises(InputError, match="have no average"):
        average_loras([one, one], files / "out", strengths=(1, -1))
    save_network(files / "other", 1, network(seed=50), patch_size=2)
    info = AdapterInfo(
        rank=2, alpha=4, layers=(0, 1), base="other", base_digest=weights_digest(find_weights(files / "other"))
    )
    save_network(files / "foreign", 1, matrices(2, 9), patch_size=2, adapters=info)
    with pytest.raises(InputError, match=r"(?s)one.*was trained on .*foreign.*'other', which is another base"):
        merge_loras([one, files / "foreign"], files / "out")
    with pytest.raises(InputError, match="was trained on another base than .*other"):
        sum_loras([one], files / "out", base=files / "other")
    assert not (files / "out").exists()


@pytest.mark.parametrize("layout", ["sat", "diffusers"])
def test_a_difference_of_that_rank_is_extracted_exactly(files, layout):
    tuned = network() | {
        name: tensor + deltas(files / "one")[name] for name, tensor in network().items() if "attention" in name
    }
    if layout == "sat":
        base, after = files / "base", files / "tuned"
        save_network(after, 1, tuned, patch_size=2)
    else:
        base, after = files / "base.safetensors", files / "tuned.safetensors"
        for path, tensors in ((base, network()), (after, tuned)):
            converted = network_to_diffusers(tensors, patch_size=(1, 2, 2), learned_positions=False)
            save_file({name: tensor.compute() for name, tensor in converted.items()}, path)
    found = extract_lora(base, after, files / "out", rank=2)
    require_close(deltas(files / "out"), deltas(files / "one"))
    assert found.captured == pytest.approx(1, abs=1e-5) and found.left_out == ()
    if layout == "sat":
        merge_loras([files / "out"], files / "back")
        require_close(read_tensors(find_weights(files / "back")), {PREFIX + name: t for name, t in tuned.items()})
        assert read_adapter_info(files / "out").base == str(base)
    else:
        assert all(name.startswith("transformer.transformer_blocks") for name in load_file(found.path))


def test_what_a_lora_cannot_hold_is_measured(files):
    save_network(files / "tuned", 1, network(seed=20), patch_size=2)
    found = extract_lora(files / "base", files / "tuned", files / "out", rank=3)
    difference = {name: network(seed=20)[name] - tensor for name, tensor in network().items()}
    square = {name: tensor.square().sum().item() for name, tensor in difference.items()}
    assert found.left_out == (OTHER,) and found.outside == pytest.approx(square[OTHER] / sum(square.values()))
    parts = [part for name, tensor in difference.items() if name != OTHER for part in tensor.split(D)]
    held = sum(torch.linalg.svdvals(part)[:3].square().sum().item() for part in parts)
    assert found.captured == pytest.approx(held / sum(part.square().sum().item() for part in parts), rel=1e-4)
    assert re.search(r"holds \d+\.\d\d% of the difference.*attention\n.*1 other tensors.*dense_h_to_4h", str(found))
    assert found.further == {"ff": pytest.approx(found.outside)} and "further --targets" in str(found)


def test_models_that_have_no_difference_of_that_kind_are_refused(files):
    base = files / "base"
    with pytest.raises(InputError, match="do not differ in the projections of attention"):
        extract_lora(base, base, files / "out", rank=2)
    with pytest.raises(InputError, match="--rank is 17; give a number from 1 to the hidden size, 16"):
        extract_lora(base, base, files / "out", rank=17)
    with pytest.raises(InputError, match="holds a LoRA, e.g. .*merge_lora_weight.py"):
        extract_lora(base, files / "one", files / "out", rank=2)
    save_network(files / "deep", 1, network(layers=3), patch_size=2)
    with pytest.raises(InputError, match="differ in more than values: transformer.layers.2.*none"):
        extract_lora(base, files / "deep", files / "out", rank=2)
    assert not (files / "out").exists()
    assert not any(map(is_adapter, network()))


def test_alpha_is_for_all_that_record_none(tmp_path):
    for name in ("a", "b"):
        stem = "transformer.transformer_blocks.0.attn1.to_k"
        save_file(
            {f"{stem}.lora_A.weight": drawn(2, D, seed=7), f"{stem}.lora_B.weight": drawn(D, 2, seed=8)},
            tmp_path / f"{name}.safetensors",
        )
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    assert [lora.alpha for lora in read_loras(paths, 64)] == [64, 64]
    assert [lora.alpha for lora in read_loras(paths, None)] == [2, 2]


def test_alpha_that_no_file_needs_is_refused(files):
    with pytest.raises(InputError, match="--alpha is 3, and every one of these LoRAs records its own"):
        read_loras([files / "one", files / "three.safetensors"], 3)


def test_a_rank_above_the_width_of_a_projection_is_filled_with_zeros():
    pair = {"x.matrix_A.0": drawn(12, 4, seed=1), "x.matrix_B.0": drawn(9, 12, seed=2)}
    found = _reduced(pair, 6, 0.5)
    assert found["x.matrix_A.0"].shape == (6, 4) and found["x.matrix_B.0"].shape == (9, 6)
    product = 0.5 * pair["x.matrix_B.0"] @ pair["x.matrix_A.0"]
    torch.testing.assert_close(found["x.matrix_B.0"] @ found["x.matrix_A.0"], product, rtol=0, atol=1e-5)


def test_a_folder_with_one_file_in_names_of_sat_is_read(files, tmp_path):
    (folder := tmp_path / "alone").mkdir()
    save_file({PREFIX + name: matrix for name, matrix in matrices(2, 2).items()}, folder / "lora.safetensors")
    assert read_any_lora(folder, alpha=4).rank == 2


def test_a_base_that_is_not_the_recorded_one_must_be_asked_for(files):
    """Of a SAT file, and of one that was exported from it, which says the digest of its base, and not where it is."""
    save_network(files / "tuned", 1, network(seed=30), patch_size=2)
    export_lora(files / "one", files / "exported")
    for name in ("one", "exported"):
        with pytest.raises(InputError, match="was trained on another base than .*tuned.*give the right one"):
            merge_loras([files / name], files / "no", base=files / "tuned")
        merge_loras([files / name], files / f"on {name}", base=files / "tuned", any_base=True)
        require_close(deltas(files / f"on {name}", files / "tuned"), deltas(files / "one"))
        sum_loras([files / name, files / "two"], files / f"sum {name}", base=files / "tuned", any_base=True)
        assert read_adapter_info(files / f"sum {name}").base_digest == weights_digest(find_weights(files / "tuned"))
    merge_loras([files / "exported"], files / "same", base=files / "base")
    with pytest.raises(InputError, match="no LoRA records its base as a path"):
        sum_loras([files / "exported"], files / "no")
    with pytest.raises(InputError, match="was trained on another base than .*tuned.*--any_base"):
        sum_loras([files / "exported"], files / "no", base=files / "tuned")
    assert not (files / "no").exists()


def whole_network(seed):
    """Return all weights of a network of one layer that LoRA can adapt, and a bias that it cannot."""
    shapes = {
        "transformer.layers.0.attention.query_key_value": (3 * D, D),
        "transformer.layers.0.attention.dense": (D, D),
        "transformer.layers.0.mlp.dense_h_to_4h": (4 * D, D),
        "transformer.layers.0.mlp.dense_4h_to_h": (D, 4 * D),
        "mixins.adaln_layer.adaLN_modulations.0.1": (12 * D, 8),
        "mixins.patch_embed.proj": (D, 2, 2, 2),
        "mixins.patch_embed.text_proj": (D, 5),
    }
    tensors = {f"{name}.weight": drawn(*shape, seed=seed + index) for index, (name, shape) in enumerate(shapes.items())}
    return tensors | {"mixins.patch_embed.text_proj.bias": drawn(D, seed=seed)}


@pytest.mark.parametrize("layout", ["sat", "diffusers"])
def test_all_targets_are_extracted_and_what_is_left_is_named(files, layout):
    """At full rank the LoRA holds all of the difference but a bias, modulation and patches too."""
    base, tuned = whole_network(40), whole_network(60)
    if layout == "sat":
        before, after = files / "small", files / "changed"
        for path, tensors in ((before, base), (after, tuned)):
            save_network(path, 1, tensors, patch_size=2)
    else:
        before, after = files / "small.safetensors", files / "changed.safetensors"
        for path, tensors in ((before, base), (after, tuned)):
            converted = network_to_diffusers(tensors, patch_size=(1, 2, 2), learned_positions=False)
            save_file({name: tensor.compute() for name, tensor in converted.items()}, path)
    found = extract_lora(before, after, files / "out", rank=D, targets=list(GROUPS))
    assert found.captured == pytest.approx(1, abs=1e-5) and found.targets == tuple(GROUPS) and not found.further
    assert found.left_out == ("mixins.patch_embed.text_proj.bias",)
    if layout == "sat":
        merge_loras([files / "out"], files / "back")
        merged = read_tensors(find_weights(files / "back"))
        merged = {name.removeprefix(PREFIX): tensor for name, tensor in merged.items()}
        require_close(merged, {name: t for name, t in tuned.items() if name.endswith("weight")}, atol=1e-4)
        some = extract_lora(before, after, files / "some", rank=2, targets=["ff", "attention"])
        assert some.targets == ("attention", "ff") and list(some.further) == ["adaln", "patch", "text"]
        assert sum(some.further.values()) < some.outside
    else:
        lora, header = read_any_lora(found.path), read_metadata(found.path)
        assert set(lora.groups) == set(GROUPS)
        assert header["ss_sd_model_name"] == "small.safetensors" and "base_digest" not in header
        assert (
            header["ss_network_dim"] == header["ss_network_alpha"] == str(D) and header["modelspec.title"] == "changed"
        )


def test_targets_without_a_block_are_refused(files):
    for targets, said in ((["patch"], "has patch; add one of attention, ff, adaln"), (["qkv"], "has qkv; expected")):
        with pytest.raises(InputError, match=f"--targets {said}"):
            extract_lora(files / "base", files / "base", files / "out", rank=2, targets=targets)


@pytest.mark.parametrize("kind", ["dora", "lokr"])
def test_the_average_of_other_kinds_keeps_kind_shapes_and_dtypes(files, kind):
    """Of DoRA the magnitudes too, which may have another dtype than the matrices; of LoKr the factor."""
    info = replace(read_adapter_info(files / "one"), kind=kind, factor=2 if kind == "lokr" else -1)
    each = []
    for seed in (1, 2):
        tensors = {name: tensor.bfloat16() for name, tensor in matrices(2, seed).items()}
        if kind == "dora":
            ends = {name.replace("matrix_A", "magnitude") for name in tensors if "matrix_A" in name}
            tensors |= {name: 1 + drawn(D, seed=seed) for name in ends}
        else:
            shapes = shapes_of(D, D, 2, 2)
            stems = [name.split("matrix_A") for name in tensors if "matrix_A" in name]
            tensors = {f"{a}{end}{b}": drawn(*shape, seed=seed) for a, b in stems for end, shape in shapes.items()}
        each.append(tensors)
        save_network(files / f"{kind}{seed}", 1, tensors, patch_size=2, adapters=info)
    average_loras([files / f"{kind}1", files / f"{kind}2"], files / "soup", strengths=(3, 1))
    found = read_any_lora(files / "soup")
    assert (found.kind, found.factor, found.info) == (kind, info.factor, info) and found.tensors.keys() == each[
        0
    ].keys()
    for name, tensor in found.tensors.items():
        one, other = (tensors[name] for tensors in each)
        mean = (0.75 * one.float() + 0.25 * other.float()).to(one.dtype)
        assert tensor.compute().dtype == one.dtype and torch.equal(tensor.compute(), mean)


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_an_average_of_a_file_with_some_projections_is_complete(files, kind):
    """Files of other tools may adapt one module of a projection, and none of another: the others have no effect."""
    base, stem = files / "base", "transformer.transformer_blocks.1.attn1.to_k"
    own = {f"{stem}.lora_A.weight": drawn(2, D, seed=1), f"{stem}.lora_B.weight": drawn(D, 2, seed=2)}
    if kind == "dora":
        own[f"{stem}.lora_magnitude_vector"] = 4 + drawn(D, seed=3)
    if kind == "lokr":
        own = {f"{stem}.{end}": drawn(*shape, seed=4) for end, shape in shapes_of(D, D, 1, 2).items()}
    save_file(own, files / "some.safetensors")
    paths = [files / "some.safetensors"] * 2
    average_loras(paths, files / "soup", base=base)
    found = read_any_lora(files / "soup")
    ends = {"lora": ("matrix_A", "matrix_B"), "dora": ("matrix_A", "matrix_B", "magnitude")}.get(
        kind, shapes_of(D, D, 1, 2)
    )
    places = [(target, part) for target, num in TARGETS.items() for part in range(num)]
    assert found.tensors.keys() == {f"transformer.layers.1.{t}.{end}.{part}" for t, part in places for end in ends}
    merge_loras([files / "some.safetensors"], files / "merged", base=base)
    merge_loras([files / "soup"], files / "again")
    wanted, merged = deltas(files / "merged", base), deltas(files / "again", base)
    assert any(tensor.any() for tensor in wanted.values())
    require_close(merged, wanted)
    if kind != "lokr":
        export_lora(files / "soup", files / "exported")


@pytest.mark.parametrize("file_format", ["pt", "safetensors"])
def test_weights_that_overflow_are_not_written(files, file_format):
    """A LoRA of a huge alpha, which the dtype of the base cannot hold."""
    save_network(files / "half", 1, {name: tensor.half() for name, tensor in network().items()}, patch_size=2)
    lora = load_file(files / "three.safetensors")
    save_file({n: torch.tensor(1e9) if n.endswith("alpha") else t for n, t in lora.items()}, files / "huge.safetensors")
    said = r"mp_rank_00_model_states.* is not written: .*has values out of range: float16 holds .*65504.*alpha"
    with pytest.raises(InputError, match=said):
        merge_loras([files / "huge.safetensors"], files / "out", base=files / "half", file_format=file_format)
    assert not (files / "out").exists()

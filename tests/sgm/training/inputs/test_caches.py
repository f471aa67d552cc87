"""Training from caches equals training without them, or is refused; encoders that it does not need are not loaded."""

import itertools
import json
import os
import random
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import data_video
import sgm.distributed
import sgm.training.build
import sgm.training.inputs.precompute
from sgm.checks.planner import config_with
from sgm.config.load import ConfigError, load_config
from sgm.data.buckets.config import parse_buckets
from sgm.data.cache import CachedTensors, differences
from sgm.data.clips.decode import READER
from sgm.inference.video import write_video
from sgm.models.training_inputs import training_inputs
from sgm.models.video_diffusion import SATVideoDiffusionEngine
from sgm.modules.encoders.modules import FrozenT5Embedder, GeneralConditioner
from sgm.training.inputs.caches import clip_source, expected_caches, require_repeatable, text_source
from sgm.training.inputs.precompute import after_encoding, plan_jobs, run_jobs
from sgm.training.metrics import read_metrics
from sgm.training.prepare import prepare
from sgm.util import InputError, RunError
from sgm.weights.files import find_weights, read_tensors
from tests.processes import Training, run, train_all

ROOT = Path(__file__).parents[4]
T5 = "sgm.modules.encoders.modules.FrozenT5Embedder"
SMALL = 3_500  # bytes in a shard: several shards of each kind


def precompute(bases, folder: Path, *overrides: str, kinds=("text", "latents"), **options) -> Path:
    jobs = plan_jobs(load_config(bases, list(overrides), mode="train"), kinds, **{"shard_bytes": SMALL} | options)
    run_jobs(jobs, folder)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(find_weights(folder))


def assert_equal_runs(one: Path, other: Path) -> None:
    assert losses(one) == pytest.approx(losses(other), abs=1e-6) and len(losses(one)) > 1
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    assert max(float((left[name] - right[name]).abs().max()) for name in left) <= 1e-6


@pytest.fixture
def nothing_loaded(monkeypatch):
    """Fail if clips, text encoder or autoencoder are opened."""

    def refuse(*_args, **_options):
        raise AssertionError("opened in vain")

    monkeypatch.setattr(data_video, "scan", refuse)
    monkeypatch.setattr(data_video, "read_frames", refuse)
    monkeypatch.setattr(data_video, "check_rows", refuse)
    monkeypatch.setattr(FrozenT5Embedder, "_model_on_device", refuse)
    monkeypatch.setattr(SATVideoDiffusionEngine, "load_first_stage", refuse)


def caches(folder: Path, *names: str) -> list[str]:
    return [f"args.{name}={folder}" for name in names or ("latent_cache", "text_cache")]


@pytest.fixture(scope="module")
def pair(clips, tmp_path_factory) -> str:
    """Two of the clips, for the networks whose position tables ask for a large picture."""
    data = tmp_path_factory.mktemp("pair") / "data"
    for name in ("videos/000.mp4", "videos/001.mp4", "labels/000.txt", "labels/001.txt"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(clips / name, data / name)
    return f"args.train_data=[{data}]"


SHORT = ("args.train_iters=2", "args.valid_data=null", "data.params.caption_dropout=0.4")


def test_cached_training_equals_training_on_clips_and_opens_nothing(job, training_yaml, tmp_path, request):
    bases = training_yaml("dit_t2v_5b_lora")
    plain = job("dit_t2v_5b_lora", *SHORT, save="plain").folder
    cache = precompute(bases, tmp_path / "cache")
    assert len([*cache.glob("latents-*")]) > 1 and "" in CachedTensors(cache, "text")
    request.getfixturevalue("nothing_loaded")
    assert_equal_runs(plain, job("dit_t2v_5b_lora", *SHORT, *caches(cache), save="cached").folder)


def test_evaluation_takes_clips_and_captions_from_the_cache(job, training_yaml, clips, tmp_path, monkeypatch, log):
    """Of a part of the training data, or of a folder that was encoded with it; only samples need the VAE.

    The VAE waits on the CPU, and what is wrong with the device where it decodes is said at the start.
    """
    evaluated = ("args.train_iters=1", "args.split=50,50,0", "args.valid_data=null", "args.eval_interval=1")
    plain = job("dit_t2v_5b_lora", *evaluated, save="plain").folder
    cache = precompute(training_yaml("dit_t2v_5b_lora"), tmp_path / "cache", *evaluated)
    places, load = [], SATVideoDiffusionEngine.load_first_stage
    monkeypatch.setattr(SATVideoDiffusionEngine, "encode_first_stage", None)
    monkeypatch.setattr(FrozenT5Embedder, "_model_on_device", None)
    monkeypatch.setattr(
        SATVideoDiffusionEngine,
        "load_first_stage",
        lambda engine, **given: places.append(given["device"].type) or load(engine, **given),
    )
    given, fault = caches(cache), "cuDNN 9.10.2 is wrong"
    monkeypatch.setattr(sgm.training.build, "conv3d_warnings", lambda dtype, device: [f"{fault} on {device}"])
    cached = job("dit_t2v_5b_lora", *evaluated, *given, save="cached").folder
    found = [
        next(line["validation_loss"] for line in read_metrics(run / "metrics.jsonl") if "validation_loss" in line)
        for run in (plain, cached)
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-6) and places == ["cpu"]
    assert log.text.count(f"{fault} on {sgm.distributed.device()}") == 1
    videos = [sorted(path.relative_to(run) for path in run.rglob("*.mp4")) for run in (plain, cached)]
    assert videos[0] == videos[1] != []

    def loaded(*settings):
        config = load_config(training_yaml("dit_t2v_5b_lora"), [*evaluated, *given, *settings], mode="train")
        return prepare(config).caches

    own = loaded(f"args.valid_data=[{clips}]")
    assert own.vae_waits and own.text_encoder == ""
    assert loaded("args.only_log_video_latents=true").vae == ""
    assert "1 texts that are not in the cache" in loaded("args.valid_prompts=[another]").text_encoder
    other = tmp_path / "other"
    shutil.copytree(clips, other)
    assert "encodes validation clips" in loaded(f"args.valid_data=[{other}]").vae


def test_latents_alone_and_text_alone_serve_image_to_video(job, training_yaml, pair, tmp_path, monkeypatch):
    """The noise on the first frame is that of training without caches."""
    short = (*SHORT, pair)
    plain = job("dit_i2v_5b", *short, save="plain").folder
    cache = precompute(training_yaml("dit_i2v_5b"), tmp_path / "cache", pair)
    assert_equal_runs(plain, job("dit_i2v_5b", *short, *caches(cache, "latent_cache"), save="latents").folder)
    monkeypatch.setattr(FrozenT5Embedder, "_model_on_device", None)
    assert_equal_runs(plain, job("dit_i2v_5b", *short, *caches(cache, "text_cache"), save="text").folder)


def test_buckets_train_from_a_cache_as_without_one(job, training_yaml, clips, tmp_path, request):
    short = shutil.copytree(clips, tmp_path / "short")
    more = (
        *SHORT,
        f"args.train_data=[{clips},{short}]",
        "data.params.buckets=[5x32x48,9x32x48,{shape: 5x48x32, batch_size: 1}]",
        "data.params.drop_partial=true",
    )
    for index, path in enumerate((short / "videos").iterdir()):
        write_video(path, np.random.default_rng(index).integers(0, 256, (5, 64, 96, 3), np.uint8), 8)
    plain = job("dit_t2v_5b_lora", *more, save="plain").folder
    cache = precompute(training_yaml("dit_t2v_5b_lora"), tmp_path / "cache", *more)
    shapes = {tuple(tensor.shape[1:]) for tensor in CachedTensors(cache, "latents").values()}
    assert shapes == {(3, 4, 6), (2, 4, 6)}
    request.getfixturevalue("nothing_loaded")
    assert_equal_runs(plain, job("dit_t2v_5b_lora", *more, *caches(cache), save="cached").folder)


def test_images_are_taken_without_noise(training_yaml, pair, tmp_path):
    bases = training_yaml("dit_i2v_5b")
    cache = precompute(bases, tmp_path / "cache", pair, kinds=("text", "latents", "images"))
    plan = prepare(load_config(bases, [*SHORT, pair, *caches(cache), f"args.save={tmp_path}"], mode="train"))
    assert "without the noise" in plan.report() and "VAE is not loaded" in plan.report()
    (dataset,) = plan.data.train
    engine = SATVideoDiffusionEngine(**{k: v for k, v in plan.config.engine["params"].items() if k not in IGNORED})
    engine.load_first_stage(dtype=torch.float32, device=torch.device("cpu"))
    sample = dataset.sample(0, None)
    batch = {"moments": [sample["moments"]], "image_moments": [sample["image_moments"]], "txt": [sample["txt"]]}
    made = training_inputs(engine, batch, [torch.Generator().manual_seed(0)])
    clip = data_video.SFTDataset(
        data_dir=plan.args.train_data[0], video_size=(64, 96), max_num_frames=5, skip_frms_num=0
    )[0]["mp4"]
    expected = engine.image_latents(clip[:1], 2)
    torch.testing.assert_close(made.cond["concat"], expected, atol=1e-6, rtol=0)


IGNORED = SATVideoDiffusionEngine.IGNORED_PARAMS


@pytest.fixture(scope="module")
def cache(training_yaml, tmp_path_factory) -> Path:
    return precompute(training_yaml("dit_t2v_5b_lora"), tmp_path_factory.mktemp("caches") / "cache")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.params.max_num_frames=9", "data.max_num_frames: cache 5, now 9"),
        ("data.params.fps=4", "data.fps: cache 8.0, now 4.0"),
        ("data.params.reshape_mode=none", 'data.reshape_mode: cache "center", now "none"'),
        ("data.params.skip_frames_start=1", "data.skip_frames: cache [0, 0], now [1, 0]"),
        ("model.first_stage_config.params.encode_chunk=8", "vae.encode_chunk: cache null, now 8"),
        ("data.params.id_token=sks", "sks a red circle moves left: not in the cache"),
        ("data.params.random_flip=0.5", "set it to 0"),
        ("data.params.reshape_mode=random", "set it to center"),
    ],
)
def test_a_cache_of_other_settings_is_refused(training_yaml, cache, tmp_path, change, message):
    config = load_config(
        training_yaml("dit_t2v_5b_lora"), [f"args.save={tmp_path}", *caches(cache), change], mode="train"
    )
    with pytest.raises(ConfigError) as refused:
        prepare(config)
    assert message in str(refused.value)


@pytest.mark.parametrize("rate", [0.5, [1.0, 0.5]])
def test_buckets_that_change_from_epoch_to_epoch_are_refused(training_yaml, monkeypatch, rate):
    config = load_config(training_yaml("dit_t2v_5b_lora"), [], mode="train")
    monkeypatch.setattr("sgm.training.inputs.caches._buckets", lambda _: parse_buckets({"240p": {5: [rate, 1]}}))
    with pytest.raises(InputError, match="a clip has other shapes in other epochs"):
        require_repeatable(config, [])
    monkeypatch.setattr("sgm.training.inputs.caches._buckets", lambda _: parse_buckets({"240p": {5: [1.0, 1]}}))
    require_repeatable(config, [])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, {}),
        ({"dense_act_fn": None, "layer_norm_epsilon": None, "relative_attention_max_distance": None}, {}),  # defaults
        ({"relative_attention_max_distance": 64}, {"relative_attention_max_distance": 64}),
        ({"layer_norm_epsilon": 1e-5}, {"layer_norm_epsilon": 1e-5}),
        ({"feed_forward_proj": None}, {"feed_forward_proj": "relu"}),
        ({"num_layers": 1}, {"num_layers": 1}),
    ],
)
def test_what_config_json_decides_beside_the_weights_is_part_of_the_source_of_a_cache(tmp_path, change, said):
    """That of the released T5 is as it was before, so that its caches stay."""
    folder = shutil.copytree(ROOT / "assets" / "toy" / "t5", tmp_path / "t5")
    file = folder / "config.json"
    config = {name: value for name, value in (json.loads(file.read_text()) | change).items() if value is not None}
    file.write_text(json.dumps(config))
    source = text_source(GeneralConditioner([{"input_key": "txt", "target": T5, "params": {"model_dir": str(folder)}}]))
    known = {name: source["t5"].pop(name) for name in ("weights", "tokenizer", "max_length")}
    assert source["t5"] == said and all(known.values())


def test_the_assignment_of_clips_to_buckets_is_part_of_the_source_of_a_cache(training_yaml, monkeypatch):
    config = load_config(training_yaml("dit_t2v_5b_lora"), [], mode="train")
    dataset = SimpleNamespace(video_size=(32, 48), max_num_frames=5, fps=8.0, skip=(0, 0), reshape_mode="center")

    def source(**classes):
        monkeypatch.setattr("sgm.training.inputs.caches._buckets", lambda _: parse_buckets(classes))
        found = clip_source(config, dataset, torch.float32, "latents")
        assert json.loads(json.dumps(found)) == found
        return found

    rules = [
        {17: [1, 1], 33: [0, 1]},
        {17: [0, 1], 33: [1, 1]},
        {17: [1, 1], 33: [1, 1]},
        {17: [1, 1], 33: [[1, 0], 1]},
    ]
    sources = [source(**{"480p": rule}) for rule in rules]
    named = [source(**{"480p": {17: [1, 1]}}), source(**{"512": {17: [1, 1]}})]
    assert all(one != other for one, other in itertools.combinations([*sources, *named], 2))
    before = {key: value for key, value in sources[0].items() if key != "clip_reader"}
    assert differences(before, sources[0]) == [f"clip_reader: cache null, now {READER}"], "it may hold other frames"
    assert source(**{"480p": {17: [1, 9], 33: [0, 0]}}) == sources[0], "batch sizes do not matter"
    assert differences(sources[0], sources[1])[0].startswith("data.buckets.480p.keep.")


def test_a_clip_that_cannot_be_read_is_a_failure_and_one_that_fits_no_bucket_is_left_out(
    training_yaml, clips, tmp_path, monkeypatch
):
    data = shutil.copytree(clips, tmp_path / "data")
    (data / "videos" / "003.mp4").write_bytes(b"no video")
    monkeypatch.setattr("sgm.training.inputs.caches._buckets", lambda _: parse_buckets({"144p": {5: [1, 1]}}))
    config = load_config(training_yaml("dit_t2v_5b_lora"), [f"args.train_data=[{data}]"], mode="train")
    with pytest.raises(InputError, match="no clip that can be trained on"):
        plan_jobs(config, ("latents",))
    write_video(data / "videos" / "002.mp4", np.zeros((5, 192, 192, 3), np.uint8), 8)
    (job,) = plan_jobs(config, ("latents",))
    assert [*job.description.shape_of().values()] == ["5x192x192", None] and len(job.description.left_out) == 6
    assert "data/videos/003.mp4, 8 bytes" in job.description.keys()
    with job.loaded() as encode:
        reason = list(encode(["data/videos/003.mp4, 8 bytes"]))
    assert isinstance(reason[0], str) and reason[0]


def test_changed_and_added_clips_and_weights_are_noticed(training_yaml, clips, tmp_path):
    data = shutil.copytree(clips, tmp_path / "data")
    vae = tmp_path / "vae.safetensors"
    bases = training_yaml("dit_t2v_5b_lora")
    given = load_config(bases, [], mode="train").model["first_stage_config"]["params"]["ckpt_path"]
    shutil.copyfile(given, vae)
    words = [f"args.train_data=[{data}]", f"model.first_stage_config.params.ckpt_path={vae}", f"args.save={tmp_path}"]
    cache = precompute(bases, tmp_path / "cache", *words)

    def refusal() -> str:
        with pytest.raises(ConfigError) as refused:
            prepare(load_config(bases, [*words, *caches(cache)], mode="train"))
        return str(refused.value)

    os.utime(data / "videos" / "001.mp4", (1, 1))  # as in a copy
    prepare(load_config(bases, [*words, *caches(cache)], mode="train"))
    content = bytearray((data / "videos" / "002.mp4").read_bytes())
    content[len(content) // 2] ^= 1
    (data / "videos" / "002.mp4").write_bytes(content)
    message = refusal()
    assert "clips were replaced since their latents in" in message and "  data/videos/002.mp4" in message
    assert "001.mp4" not in message
    with (data / "videos" / "000.mp4").open("ab") as file:
        file.write(b"0")
    shutil.copyfile(data / "videos" / "001.mp4", data / "videos" / "new.mp4")
    (data / "labels" / "new.txt").write_text("another one")
    message = refusal()
    assert "data/videos/000.mp4" in message and "which has data/videos/000.mp4" in message
    assert "data/videos/new.mp4" in message and "another one: not in the cache" in message
    with pytest.raises(InputError, match="belongs to a cache with other settings or data"):
        precompute(bases, cache, *words)
    content = load_file(vae)
    name = next(iter(content))
    save_file({**content, name: content[name] + 1}, vae)
    assert "vae.weights: cache" in refusal()


def test_a_bad_clip_is_left_out_as_without_a_cache(training_yaml, clips, tmp_path, job):
    data = shutil.copytree(clips, tmp_path / "data")
    (data / "videos" / "003.mp4").write_bytes(b"no video")
    words = (*SHORT, f"args.train_data=[{data}]", "args.max_bad_share=0.2")
    cache = precompute(training_yaml("dit_t2v_5b_lora"), tmp_path / "cache", *words)
    assert list(CachedTensors(cache, "latents").failures) == ["data/videos/003.mp4, 8 bytes"]
    plain = job("dit_t2v_5b_lora", *words, save="plain").folder
    assert_equal_runs(plain, job("dit_t2v_5b_lora", *words, *caches(cache), save="cached").folder)


def test_clips_that_cannot_be_told_apart_are_refused(training_yaml, clips, tmp_path):
    folders = [shutil.copytree(clips, tmp_path / name / "data") for name in ("one", "two")]
    bases, both = training_yaml("dit_t2v_5b_lora"), f"args.train_data=[{folders[0]},{folders[1]}]"
    with pytest.raises(InputError, match="cannot be told apart"):
        precompute(bases, tmp_path / "cache", both)
    cache = precompute(bases, tmp_path / "of one", f"args.train_data=[{folders[1]}]", kinds=["latents"])
    with (folders[0] / "videos" / "000.mp4").open("r+b") as file:
        file.write(b"another clip of the same size")
    words = [both, f"args.save={tmp_path}", f"args.latent_cache={cache}"]
    with pytest.raises(ConfigError, match="cannot be told apart"):
        prepare(load_config(bases, words, mode="train"))


def test_an_interrupted_cache_is_continued_to_the_same_bytes(training_yaml, cache, tmp_path, monkeypatch):
    bases, other = training_yaml("dit_t2v_5b_lora"), tmp_path / "cache"
    written = []

    def die(*args):
        if len(written) in (2, 5):  # in the text, then in the latents
            written.append(None)
            (other / ".latents-00001.1-abcdef12.safetensors").write_bytes(b"half")
            raise RunError("killed")
        written.append(None)
        return write(*args)

    write = sgm.training.inputs.precompute.write_shard
    monkeypatch.setattr(sgm.training.inputs.precompute, "write_shard", die)
    for _ in range(2):
        with pytest.raises(RunError, match="killed"):
            precompute(bases, other)
        with pytest.raises(ConfigError, match="is not finished"):
            words = [f"args.save={tmp_path}", *caches(other)]
            prepare(load_config(bases, words, mode="train"))
    precompute(bases, other)
    assert files(other) == files(cache) and not [*other.glob(".*.safetensors")]
    stamps = {path: path.stat().st_mtime_ns for path in other.glob("[!.]*")}
    precompute(bases, other)
    assert {path: path.stat().st_mtime_ns for path in other.glob("[!.]*")} == stamps, "nothing is done twice"


def test_ranks_write_disjoint_shards(training_yaml, cache, tmp_path, monkeypatch):
    bases, other, made = training_yaml("dit_t2v_5b_lora"), tmp_path / "cache", []
    jobs = plan_jobs(load_config(bases, [], mode="train"), ("text", "latents"), shard_bytes=SMALL)
    missing = [[*range(len(job.description.shards))] for job in jobs]
    monkeypatch.setattr("sgm.training.inputs.precompute._begin", lambda *_: missing)
    monkeypatch.setattr(sgm.distributed, "world_size", lambda: 2)
    for job in jobs:
        other.mkdir(exist_ok=True)
        shutil.copyfile(cache / f"{job.description.kind}.json", other / f"{job.description.kind}.json")
    for rank in range(2):
        monkeypatch.setattr(sgm.distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(sgm.distributed, "run_on_rank_zero", lambda _: missing)
        monkeypatch.setattr(sgm.distributed, "all_gather_objects", lambda found: [found])
        run_jobs(jobs, other)
        made.append({*files(other)} - {name for names in made for name in names})
    assert all(len(names) > 2 for names in made) and files(other) == files(cache)


def test_only_failed_clips_are_encoded_again(training_yaml, cache, tmp_path, monkeypatch):
    bases, other, decoded = training_yaml("dit_t2v_5b_lora"), tmp_path / "cache", []
    jobs = plan_jobs(load_config(bases, [], mode="train"), ("latents",), shard_bytes=SMALL)
    pixels = sgm.training.inputs.precompute._Clip.pixels

    def noted(clip, kind):
        decoded.append(Path(clip.path).name)
        return "is out of reach" if decoded[-1] in away else pixels(clip, kind)

    monkeypatch.setattr(sgm.training.inputs.precompute._Clip, "pixels", noted)
    away = ["002.mp4", "005.mp4"]
    failures = run_jobs(jobs, other)
    assert len(decoded) == 8 and sorted(failures.values()) == ["is out of reach"] * 2
    assert CachedTensors(other, "latents").failures == failures
    away, former = ["005.mp4"], decoded.copy()
    assert [key for key in run_jobs(jobs, other) if "005.mp4" in key] and decoded[len(former) :] == [
        "002.mp4",
        "005.mp4",
    ]
    away = []
    assert run_jobs(jobs, other) == {} and decoded[-1] == "005.mp4" and len(decoded) == 11
    expected = {name: content for name, content in files(cache).items() if name.startswith("latents")}
    assert files(other) == expected


def test_clips_and_captions_encoded_together_are_those_encoded_alone(training_yaml, cache, tmp_path, monkeypatch):
    """Up to rounding, each in its place; a clip that cannot be read takes no other with it."""
    made, numbers = sgm.training.inputs.precompute._moments, []
    pixels, tokenize = sgm.training.inputs.precompute._Clip.pixels, FrozenT5Embedder.tokenize

    def moments(vae, clips):
        numbers.append(len(clips))
        return made(vae, clips)

    def tokens(encoder, texts):
        numbers.append(len(texts))
        return tokenize(encoder, texts)

    monkeypatch.setattr(sgm.training.inputs.precompute, "_moments", moments)
    monkeypatch.setattr(FrozenT5Embedder, "tokenize", tokens)
    monkeypatch.setattr(
        sgm.training.inputs.precompute._Clip,
        "pixels",
        lambda clip, kind: "is away" if "002.mp4" in clip.path else pixels(clip, kind),
    )
    together = precompute(training_yaml("dit_t2v_5b_lora"), tmp_path / "cache", batch_size=3, shard_bytes=10**6)
    texts = CachedTensors(cache, "text")
    assert numbers == [min(3, len(texts) - first) for first in range(0, len(texts), 3)] + [2, 3, 2]
    for kind in ("text", "latents"):
        alone, found = CachedTensors(cache, kind), CachedTensors(together, kind)
        assert all("002.mp4" in key for key in found.failures)
        for key in found:
            torch.testing.assert_close(found[key], alone[key], atol=1e-4, rtol=0)
    assert list(CachedTensors(together, "latents").failures.values()) == ["is away"]


def test_only_clips_of_one_shape_are_encoded_together(monkeypatch):
    monkeypatch.setattr(sgm.training.inputs.precompute, "_moments", lambda _, clips: len(clips) * clips)
    small, large = torch.ones(5, 3, 8, 8), torch.ones(5, 3, 8, 16)
    found = sgm.training.inputs.precompute._encode_together(None, [small, large, "is away", 10 * small])
    assert [each if isinstance(each, str) else (each.shape[-1], float(each.mean())) for each in found] == [
        (8, 2.0),
        (16, 1.0),
        "is away",
        (8, 20.0),
    ]


TOY = ("configs/toy.yaml", "configs/toy_sft.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path, world):
    """Ten kills, at moments from the start of the process to the last shard; one and two ranks, the same bytes."""
    words = ["--shard_mb", "0.1", "--base", *TOY, "--out"]
    straight = run("tools/prepare_dataset.py", [*words, str(tmp_path / "straight")])
    assert straight.returncode == 0, straight.stderr
    expected, killed = files(tmp_path / "straight"), tmp_path / "killed"
    draw, kills, progress = random.Random(world), 0, []
    while kills < 10:
        process = Training(TOY, ["--out", str(killed), "--shard_mb", "0.1"], world, script="tools/prepare_dataset.py")
        before = len(files(killed)) if killed.is_dir() else 0
        target = before + draw.randrange(0, 4)
        process.wait_for(lambda before=target: killed.is_dir() and len(files(killed)) >= before)
        time.sleep(draw.random() * 0.1)
        process.kill()
        kills += 1
        progress.append(len(files(killed)))
    assert progress[-1] < len(expected), "all kills came in the middle"
    assert all(expected[name] == content for name, content in files(killed).items())
    ended = run("tools/prepare_dataset.py", [*words, str(killed)], world)
    assert ended.returncode == 0, ended.stderr
    assert files(killed) == expected and not [*killed.glob(".*.*")]


@pytest.mark.slow
def test_a_step_with_both_caches_takes_less_than_half_the_time(tmp_path):
    """Pixels to gradient of the toy model, on the toy's clips, with nothing decoded ahead."""
    cache = tmp_path / "cache"
    made = run("tools/prepare_dataset.py", ["--base", *TOY, "--out", str(cache)])
    assert made.returncode == 0, made.stderr
    common = ["args.eval_interval=null", "args.num_workers=0", "args.train_iters=25", "args.log_interval=5"]
    jobs = [
        {"bases": [*TOY], "overrides": [*common, f"args.save={tmp_path / name}", *words]}
        for name, words in (("plain", []), ("cached", caches(cache)))
    ]
    train_all(jobs, tmp_path)
    seconds = {}
    for name in ("plain", "cached"):
        (folder,) = (tmp_path / name).iterdir()
        lines = read_metrics(folder / "metrics.jsonl")
        seconds[name] = float(np.median([line["step_seconds"] for line in lines[1:]]))
    print(f"seconds a step: {seconds}")
    assert seconds["plain"] >= 2 * seconds["cached"], seconds


# Before caches are there

I2V = ["configs/cogvideox_5b_i2v_lora.yaml", "configs/sft.yaml"]
NO_EVALUATION = "args.eval_interval=null"


@pytest.mark.parametrize(
    ("words", "vae", "text_encoder"),
    [
        (["latent_cache", "text_cache"], "first frames", False),
        (["latent_cache", "text_cache", NO_EVALUATION], "first frames", False),
        (["text_cache"], True, False),
        (["latent_cache"], "first frames", True),
        (["latent_cache", "text_cache", "args.valid_data=[others]"], True, "validation"),
        (["latent_cache", "text_cache", "args.valid_data=[others]", NO_EVALUATION], "first frames", False),
        (["latent_cache", "text_cache", "data.params.buckets=[49x480x720]"], True, False),
        (["latent_cache", "text_cache", "args.negative_prompt=blurred"], "first frames", "validation"),
        ([], True, True),
    ],
)
def test_a_cache_that_is_not_there_yet_is_expected_as_the_tool_writes_it(words, vae, text_encoder, tmp_path):
    settings = [word if "=" in word else f"args.{word}={tmp_path / 'none'}" for word in words]
    expected, rows = expected_caches(load_config(I2V, settings, mode="train"))
    assert expected.encodes == {"vae": vae, "text_encoder": text_encoder}
    assert rows.keys() == {{"latent_cache": "latents", "text_cache": "text"}[word] for word in words if "=" not in word}
    assert ("--images" in rows.get("latents", "")) == (vae == "first frames")
    assert all("not there yet" in row for row in rows.values())


def test_first_frames_of_a_cache_that_is_there_are_seen(tmp_path):
    (tmp_path / "images.json").touch()
    config = load_config(I2V, [f"args.{name}={tmp_path}" for name in ("latent_cache", "text_cache")], mode="train")
    expected, rows = expected_caches(config)
    assert expected.encodes == {"vae": False, "text_encoder": False} and expected.vae_waits
    assert not any("not there" in row for row in rows.values())


def test_what_is_encoded_ahead_is_not_encoded_in_training(tmp_path):
    config = after_encoding(load_config(I2V, ["args.precompute=true", f"args.save={tmp_path}/a b"], mode="train"))
    assert config.args.latent_cache == config.args.text_cache == f"{tmp_path}/a b/cache"
    assert expected_caches(config)[0].encodes == {"vae": "first frames", "text_encoder": False}
    again = config_with(config, ["args.network_offload=cpu"])
    assert again.args.latent_cache == config.args.latent_cache, "a plan loads it again"

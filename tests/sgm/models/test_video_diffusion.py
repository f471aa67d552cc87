import contextlib

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dit_video_concat
from sgm.models import training_inputs as inputs
from sgm.models.video_diffusion import SATVideoDiffusionEngine
from sgm.modules.diffusionmodules.sampling import VideoDDIMSampler
from sgm.training.step import weighted_mean
from sgm.util import InputError
from tests.marks import only


@pytest.fixture(scope="module")
def make_engine(tiny_model, golden):
    """Return a function: golden name and changes of the model section → engine with weights.

    An engine without changes is built once; a test that changes one asks for a `fresh` one.
    """
    built: dict[str, SATVideoDiffusionEngine] = {}

    def make(name: str, *, fresh: bool = False, **changes) -> SATVideoDiffusionEngine:
        if name in built and not changes and not fresh:
            return built[name]
        model = yaml.safe_load(tiny_model(name).read_text())["model"] | changes
        for ignored in SATVideoDiffusionEngine.IGNORED_PARAMS:
            model.pop(ignored, None)
        engine = SATVideoDiffusionEngine(**model, allocate=False)
        engine.load_weights(str(golden / name / "transformer"), dtype=torch.float32, device=torch.device("cpu"))
        engine.load_first_stage(dtype=torch.float32, device=torch.device("cpu"))
        if not changes and not fresh:
            built[name] = engine
        return engine

    return make


def test_first_stage_has_time_before_channels_and_scales(make_engine):
    engine = make_engine("dit_t2v_2b")
    video = torch.rand(2, 13, 3, 32, 48) * 2 - 1
    latents = engine.encode_first_stage(video, sample=False)
    assert latents.shape == (2, 4, 16, 4, 6)
    raw = engine.encode_first_stage(video, sample=False, scale=False)
    torch.testing.assert_close(latents, raw * 1.15258426)
    expected = engine.first_stage_model.decode(raw.transpose(1, 2)).transpose(1, 2)
    whole = engine.decode_first_stage(latents)
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=0)
    sizes = []
    in_chunks = engine.decode_each(latents, lambda frames: sizes.append(len(frames)) or frames)
    assert torch.equal(torch.stack(in_chunks), whole)
    assert sizes == [5, 5, 8, 8], "two samples in two chunks"
    assert expected.shape == video.shape


class Coarse(torch.nn.Module):
    """An autoencoder of another model: 16 pixels, 2 frames and 8 channels a latent, if not told otherwise."""

    def __init__(self, side=16, rate=2, channels=8):
        super().__init__()
        self.side, self.rate, self.channels = side, rate, channels
        self.weight = torch.nn.Parameter(torch.ones(1))

    def encode_moments(self, video):
        B, _, F, H, W = video.shape
        return torch.zeros(B, 2 * self.channels, (F - 1) // self.rate + 1, H // self.side, W // self.side)

    def decode(self, latents):
        B, _, T, H, W = latents.shape
        return torch.zeros(B, 3, self.rate * (T - 1) + 1, self.side * H, self.side * W)


@pytest.mark.parametrize("changes", [{"side": 16}, {"rate": 2}, {"channels": 8}])
def test_an_autoencoder_of_another_compression_is_refused(make_engine, changes):
    engine = make_engine("dit_t2v_2b", fresh=True)
    engine.first_stage_model = Coarse(**{"side": 8, "rate": 4, "channels": 16} | changes)
    with pytest.raises(InputError, match=r"model.first_stage_config: Coarse made .*\(32, 2, 4, 4\) is needed: .*8x8"):
        engine.encode_first_stage(torch.zeros(1, 5, 3, 32, 32))
    for decode in (engine.decode_first_stage, lambda latents: engine.decode_each(latents, lambda frames: frames)):
        refused = pytest.raises(InputError, match=r"Coarse made .*\(3, 5, 32, 32\) is needed")
        with contextlib.nullcontext() if "channels" in changes else refused:
            decode(torch.zeros(1, 2, 16, 4, 4))


def test_samples_a_time_change_nothing(make_engine):
    video = torch.rand(3, 1, 3, 32, 48)
    together = make_engine("dit_t2v_2b").encode_first_stage(video, sample=False)
    apart = make_engine("dit_t2v_2b", en_and_decode_n_samples_a_time=1).encode_first_stage(video, sample=False)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)


def test_posterior_noise_comes_from_the_generator(make_engine):
    engine, video = make_engine("dit_t2v_2b"), torch.rand(1, 1, 3, 32, 48)
    draws = [engine.encode_first_stage(video, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_image_latents_of_the_first_generation_are_scaled_and_padded_with_zeros(make_engine):
    engine, image = make_engine("dit_i2v_5b"), torch.rand(1, 3, 64, 96)
    concat = engine.image_latents(image, 5)
    assert concat.shape == (1, 5, 16, 8, 12) and not concat[:, 1:].any()
    torch.testing.assert_close(concat[:, :1], engine.encode_first_stage(image[:, None], sample=False))


def test_image_latents_of_1_5_are_raw_and_repeat_the_first_frame_in_front(make_engine):
    engine, image = make_engine("dit_t2v_1.5"), torch.rand(1, 3, 64, 96)
    concat = engine.image_latents(image, 3)
    raw = engine.encode_first_stage(image[:, None], sample=False, scale=False)
    assert concat.shape[1] == 4 and not concat[:, 2:].any()
    torch.testing.assert_close(concat[:, :2], raw.expand(-1, 2, -1, -1, -1))
    assert engine.front_padding(4) == 0 and engine.front_padding(3) == 1


def test_one_key_changes_the_scale_of_image_latents(make_engine):
    image = torch.rand(1, 3, 64, 96)
    scaled = make_engine("dit_i2v_5b").image_latents(image, 1)
    raw = make_engine("dit_i2v_5b", scale_image_latents=False).image_latents(image, 1)
    torch.testing.assert_close(scaled, raw * 0.7)


def test_image_latents_beside_every_frame(make_engine):
    concat = make_engine("dit_i2v_5b", noised_image_all_concat=True).image_latents(torch.rand(1, 3, 64, 96), 3)
    assert torch.equal(concat[:, 0], concat[:, 2]) and concat[:, 2].any()


def test_image_to_video_trains_on_the_image_of_the_data_else_on_the_first_frame(make_engine, monkeypatch):
    engine, video = make_engine("dit_i2v_5b"), torch.rand(3, 5, 3, 64, 96) * 2 - 1
    shown = []
    monkeypatch.setattr(engine, "image_latents", lambda image, _: shown.append(image) or torch.zeros(1, 2, 16, 8, 12))
    monkeypatch.setattr(engine.conditioner, "forward", lambda *_, **__: {"crossattn": torch.zeros(1, 6, 8)})
    monkeypatch.setattr(type(engine), "text_keys", [])
    monkeypatch.setattr(inputs, "_clean_latents", lambda *_, **__: torch.zeros(1, 2, 16, 8, 12))
    other = torch.rand(3, 64, 96)

    def images(**more):
        shown.clear()
        inputs.training_inputs(engine, {"mp4": video, **more}, [torch.Generator().manual_seed(k) for k in range(3)])
        return torch.cat(shown)

    first = images()
    assert (first - video[:, 0]).abs().mean() < 0.1, "with a little noise"
    noise = first - video[:, 0]
    assert torch.equal(images(image=[None, None, None]), first)
    mixed = images(image=[None, other, None])
    assert torch.equal(mixed[[0, 2]], first[[0, 2]])
    torch.testing.assert_close(mixed[1], other + noise[1])


def test_strata_follow_the_number_of_a_sample(make_engine, monkeypatch):
    engine = make_engine("dit_t2v_2b", fresh=True)
    engine.loss_fn.sigma_sampler.strata = 4
    monkeypatch.setattr(inputs, "_clean_latents", lambda *_, **__: torch.zeros(1, 2, 16, 8, 12))
    batch = {"mp4": torch.rand(3, 5, 3, 64, 96), "txt": ["a red circle"] * 3, "number": [6, 7, 8]}
    generators = [torch.Generator().manual_seed(k) for k in range(3)]
    made = inputs.training_inputs(engine, batch, generators, rank=1, num_ranks=2)
    assert (made.idx // 250).tolist() == [2, 3, 0]


@pytest.mark.thorough
@pytest.mark.parametrize("model", only(["dit_i2v_5b"], ["dit_t2v_2b", "dit_i2v_5b"]))
def test_clips_in_the_type_of_the_autoencoder_train_the_same(make_engine, t5_folder, model):
    engine, video = make_engine(model, fresh=True), torch.rand(2, 5, 3, 64, 96) * 2 - 1
    engine.first_stage_model.to(torch.bfloat16)
    half = {"mp4": video.bfloat16(), "image": list(video[:, 0])}

    def made(batch):
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        return inputs.training_inputs(engine, batch | {"txt": ["a red circle", "a blue square"]}, generators)

    whole, halved = made({"mp4": video}), made(half)
    for a, b in zip(tree_leaves(vars(whole)), tree_leaves(vars(halved)), strict=True):
        assert torch.equal(a, b)


class Transfers(TorchDispatchMode):
    """Record the copies from the host to a device: (bytes, whether the host may go on)."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        sources = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor) and x.device.type == "cpu" and x.ndim]
        if sources and isinstance(made, torch.Tensor) and made.device.type != "cpu":
            waits_not = kwargs.get("non_blocking", args[-1] is True)
            self.sent.append((sum(x.numel() * x.element_size() for x in sources), waits_not))
        return made


@pytest.mark.parametrize("source", ["clips", "moments"])
@pytest.mark.parametrize("dropout", only([1.0], [0.0, 1.0]))
def test_no_copy_to_or_from_the_device_makes_the_host_wait(make_engine, t5_folder, monkeypatch, source, dropout):
    """A step on the meta device, from which nothing can be read; copies to it are counted."""
    engine = make_engine("dit_i2v_5b", fresh=True, noised_image_dropout=dropout).to("meta")
    engine.conditioner.to("meta")
    moments, image = torch.rand(32, 2, 8, 12), torch.rand(32, 1, 8, 12)
    cached = {"moments": [moments] * 2, "image_moments": [image] * 2}
    batch = (cached if source == "moments" else {"mp4": torch.rand(2, 5, 3, 64, 96)}) | {
        "txt": ["a red circle", "a blue square"]
    }
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # meta has none

    def step():
        made = inputs.training_inputs(engine, batch, generators)
        weighted_mean(engine.training_losses(made), [1.0, 0.5]).backward()
        return made

    step()  # the first one moves text encoder and noise levels
    with Transfers() as transfers:
        made = step()
    assert transfers.sent and all(waits_not for _, waits_not in transfers.sent)
    noise_of_images = [size for size, _ in transfers.sent if size == 3 * 64 * 96 * 4]
    assert len(noise_of_images) == (2 if source == "clips" and not dropout else 0), "noise of no use stays"
    assert made.latents.shape == made.noise.shape == made.cond["concat"].shape == (2, 2, 16, 8, 12)


def test_sampling_starts_from_the_noise_of_each_generator(make_engine):
    engine = make_engine("dit_t2v_2b", fresh=True)
    starts = []
    engine.sampler = lambda denoise, noise, *args, **kwargs: starts.append(noise) or noise
    cond = {"crossattn": torch.zeros(2, 6, 24)}
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    engine.sample(cond, cond, shape=(5, 16, 8, 12), generators=generators)
    assert torch.equal(starts[0][1], torch.randn(5, 16, 8, 12, generator=torch.Generator().manual_seed(8)))


def test_the_networks_names_are_those_of_the_checkpoint_format(make_engine):
    names = [name for name in make_engine("dit_t2v_2b").state_dict() if not name.startswith("first_stage_model.")]
    assert names and all(name.startswith("model.diffusion_model.") for name in names)


def test_unknown_precision():
    with pytest.raises(InputError, match="model.precision: 'fp8'"):
        SATVideoDiffusionEngine(network_config={}, denoiser_config={}, precision="fp8")


def test_the_autoencoder_runs_in_bf16_where_the_network_runs_in_fp16(make_engine):
    engine = make_engine("dit_t2v_2b", fresh=True)
    engine.load_first_stage(dtype=torch.float16, device=torch.device("cpu"))
    assert {parameter.dtype for parameter in engine.first_stage_model.parameters()} == {torch.bfloat16}


def test_compiled_network_is_the_same_network(make_engine):
    engine = make_engine("dit_t2v_2b", compile_model=True)
    plain = make_engine("dit_t2v_2b")
    assert plain.network.mixins["adaln_layer"].block is dit_video_concat.transformer_block
    assert engine.network.mixins["adaln_layer"].block is not dit_video_concat.transformer_block
    assert set(engine.network.state_dict()) == set(plain.network.state_dict())


@torch.no_grad()
def test_a_video_is_denoised_from_the_step_that_the_strength_gives(make_engine):
    engine = make_engine("dit_t2v_2b")
    cond = {"crossattn": torch.randn(1, 6, 24, generator=torch.Generator().manual_seed(1))}
    uncond = {"crossattn": torch.zeros(1, 6, 24)}
    source = torch.randn(1, 1, 16, 8, 12, generator=torch.Generator().manual_seed(2))

    def sample(**given):
        generators = [torch.Generator().manual_seed(3)]
        return engine.sample(cond, uncond, shape=(1, 16, 8, 12), generators=generators, num_steps=4, **given)

    seen = []
    from_noise = sample(progress=lambda steps: seen.append([*steps]) or steps)
    assert torch.equal(sample(source=source, strength=1.0), from_noise), "a strength of 1 starts from noise alone"
    half = sample(source=source, strength=0.6, progress=lambda steps: seen.append([*steps]) or steps)
    assert seen == [[0, 1, 2, 3], [2, 3]]
    assert (half - source).abs().mean() < (from_noise - source).abs().mean()
    with pytest.raises(InputError, match="a strength of 0.2 leaves none of 4 steps; give 0.25 or more"):
        sample(source=source, strength=0.2)
    assert engine.sampler.first_step(0.58, 50) == 21, "29 of 50, though 0.58 * 50 is less in binary"
    with pytest.raises(InputError, match="give 0.034 or more"):
        engine.sampler.first_step(0.01, 30)
    assert engine.sampler.first_step(0.034, 30) == 29


@torch.no_grad()
def test_a_video_is_padded_in_front_by_its_first_frame(make_engine):
    engine = make_engine("dit_t2v_1.5")
    cond = {"crossattn": torch.randn(1, 6, 24, generator=torch.Generator().manual_seed(1))}
    source, generator = torch.randn(1, 1, 16, 8, 12), torch.Generator
    whole = torch.cat((source, source), dim=1)
    given = {"num_steps": 2, "strength": 0.5}
    alone = engine.sample(
        cond, cond, shape=(1, 16, 8, 12), generators=[generator().manual_seed(3)], source=source, **given
    )
    both = engine.sample(
        cond, cond, shape=(2, 16, 8, 12), generators=[generator().manual_seed(3)], source=whole, **given
    )
    assert torch.equal(alone, both[:, 1:])


@torch.no_grad()
@pytest.mark.parametrize("name", ["dit_t2v_2b", "dit_t2v_1.5"])
def test_held_latents_stay_and_the_others_are_fitted_to_them(make_engine, name):
    engine = make_engine(name)
    cond = {"crossattn": torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(1))}
    uncond = {"crossattn": torch.zeros(2, 6, 24)}
    start, end = torch.randn(2, 2, 1, 16, 8, 12, generator=torch.Generator().manual_seed(2))

    def sample(**given):
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        return engine.sample(cond, uncond, shape=(3, 16, 8, 12), generators=generators, num_steps=3, **given)

    free, held, one = sample(), sample(start=start, end=end), sample(start=start[:1])
    assert torch.equal(held[:, :1], start) and torch.equal(held[:, 2:], end)
    assert (held[:, 1] - free[:, 1]).abs().max() > 1e-6
    assert torch.equal(one[:, 0], start[:1, 0].expand(2, -1, -1, -1)), "one clip for both samples"


@torch.no_grad()
@pytest.mark.parametrize("name", ["dit_t2v_2b", "dit_t2v_1.5"])
def test_outside_of_a_mask_the_source_stays(make_engine, name):
    engine = make_engine(name)
    cond = {"crossattn": torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(1))}
    uncond = {"crossattn": torch.zeros(2, 6, 24)}
    source = torch.randn(1, 3, 16, 8, 12, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(1, 3, 1, 8, 12, dtype=torch.bool)
    mask[:, 1:, :, 2:6, 3:9] = True

    def sample(source, **given):
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        given |= {"source": source, "shape": (3, 16, 8, 12), "generators": generators, "num_steps": 3}
        return engine.sample(cond, uncond, **given)

    made = sample(source, mask=mask)
    kept, painted = ~mask.expand_as(made), mask.expand_as(made)
    assert torch.equal(made[kept], source.expand_as(made)[kept])
    assert torch.equal(made, sample(source.expand_as(made), mask=mask.expand(2, -1, -1, -1, -1)))
    others = sample(torch.where(mask, 7.0, source), mask=mask)
    assert torch.equal(made, others), "from pure noise, nothing of the source within the mask is seen"
    assert (made - sample(source))[painted].abs().max() > 1e-6, "the network fits it to what stays"


@torch.no_grad()
def test_a_video_is_sampled_from_its_own_noise(make_engine):
    engine = make_engine("dit_t2v_2b")
    engine.sampler = VideoDDIMSampler(
        discretization_config={"target": "sgm.modules.diffusionmodules.discretizer.ZeroSNRDDPMDiscretization"},
        num_steps=4,
    )
    cond = {"crossattn": torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(1))}
    source = torch.randn(1, 1, 16, 8, 12, generator=torch.Generator().manual_seed(2))

    def sample(**given):
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        return engine.sample(cond, None, shape=(1, 16, 8, 12), generators=generators, source=source, **given)

    one_step = sample(strength=0.25)
    for strength in (0.5, 1.0):
        found = sample(strength=strength, inversion=cond)
        assert (found - one_step).abs().max() < 0.1 * (sample(strength=strength) - one_step).abs().max()


def test_the_text_encoder_comes_to_the_device_once_for_a_batch(make_engine, monkeypatch):
    engine = make_engine("dit_t2v_2b", fresh=True)
    (embedder,) = engine.conditioner.embedders
    embedder.offload, left = "release", []
    monkeypatch.setattr(embedder, "release", lambda: left.append(embedder.is_loaded))
    batch = {"mp4": torch.zeros(3, 5, 3, 64, 96), "txt": ["a red circle", "a blue square", "a green triangle"]}
    inputs.training_inputs(engine, batch, [torch.Generator().manual_seed(k) for k in range(3)])
    assert left == [True]

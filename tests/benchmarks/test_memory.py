"""The tables of docs/memory.md, and the bars that cards set."""

import csv
import json
import re

import pytest

from benchmarks import memory
from tests.processes import ROOT

DOCUMENT = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
PUBLISHED = list(csv.DictReader(memory.PUBLISHED.read_text(encoding="utf-8").splitlines()))
SMALL, LARGE = "cogvideox_5b", "cogvideox1.5_5b"
GIB = memory.GIB


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# Bars in GiB: above the figures, below what cards of 8, 16 and 24 GB have left.
@pytest.mark.parametrize(
    ("phase", "model", "how", "bar"),
    [
        ("VAE encode", SMALL, "whole clip", 9.5),
        ("VAE decode", SMALL, "whole frames", 5.0),
        slow("VAE encode", SMALL, "`encode_chunk: 8`", 4.0),
        slow("VAE decode", SMALL, "`vae_tiling: true`", 5.0),
        slow("VAE encode", LARGE, "whole clip", 45.0),
        slow("VAE encode", LARGE, "`encode_chunk: 8`", 12.0),
        slow("VAE decode", LARGE, "whole frames", 15.0),
        slow("VAE decode", LARGE, "`vae_tiling: true`", 5.0),
    ],
)
def test_the_vae_stays_below_its_bar_and_the_document_says_how_much_it_takes(phase, model, how, bar):
    assert memory.vae_peak(phase, model, how)[1] <= bar * GIB
    assert memory.vae_row(phase, model, how) in DOCUMENT


@pytest.mark.parametrize(
    ("preset", "model"), [("8gb", "cogvideox_2b"), *(slow(p, m) for p in memory.PRESETS for m in memory.CLIPS)]
)
def test_the_document_says_how_much_sampling_takes(preset, model):
    assert memory.sampling_row(preset, model) in DOCUMENT


def test_presets_fit_into_nine_tenths_of_their_card():
    rows = re.findall(r"\| `(\w+)gb` \| (\S+) \| \d+×\d+×\d+ \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", DOCUMENT)
    assert len(rows) == len(memory.CLIPS) * len(memory.PRESETS)
    for card, model, *phases in rows:
        smallest = {"80": 48, "24": 24, "8": 8}[card]  # of those whose files have these settings
        assert max(map(float, phases)) <= 0.9 * smallest, (card, model)


# Bars of a step of LoRA training with rank 128: what is left for it on cards of 80, 24, 16 and 12 GB, or less.
BARS = {
    "nothing recomputed": 71.0,
    "recomputed": 17.0,
    "recomputed, attention kept": 21.6,
    "recomputed, offloaded": 13.0,
    "and `base_weights=int8`": 8.5,
    "and `network_offload=blocks`": 5.0,
}


@pytest.mark.parametrize("how", memory.STEPS)
def test_a_step_of_the_5b_stays_below_its_bar(how):
    assert memory.step_peak(SMALL, how) <= BARS[how] * GIB


@pytest.mark.parametrize("model", [slow(model) if model != SMALL else model for model in memory.CLIPS])
def test_the_document_says_how_much_a_step_takes(model):
    assert memory.step_row(model) in DOCUMENT


FITS = [  # task, model, preset, GB, from caches
    ("LoRA", "cogvideox_5b", "24gb", 24, False),
    ("LoRA", "cogvideox_5b", "12gb", 12, True),
    ("LoRA", "cogvideox_2b", "12gb", 10, True),
    ("full", "cogvideox_2b", "../optimizer/cpu_offload", 24, True),
    ("full", "cogvideox_5b", "../optimizer/cpu_offload", 24, True),
]
LARGER = [
    ("LoRA", "cogvideox_5b_i2v", "24gb", 24, False),
    ("LoRA", "cogvideox1.5_5b", "24gb", 24, True),
    ("LoRA", "cogvideox1.5_5b", "16gb", 16, True),
]


@pytest.mark.parametrize("case", [*FITS, *map(slow, LARGER)], ids=lambda case: f"{case[0]} of {case[1]} in {case[3]}")
def test_what_a_card_is_promised_to_train_fits(case):
    task, model, preset, card, cached, *settings = case
    found = memory.estimate(task, model, settings, files=[f"memory/{preset}"], cached=cached)
    assert found.peak <= 0.9 * card * GIB, found.device


@pytest.mark.parametrize(
    ("card", "model", "cached"),
    [
        (8, "cogvideox_2b", 1),
        *(slow(card, model, cached) for card in memory.TRAINING_PRESETS for model in memory.CLIPS for cached in (0, 1)),
    ],
)
def test_the_document_says_how_much_training_with_a_preset_takes(card, model, cached):
    assert memory.preset_row(card, model, bool(cached)) in DOCUMENT


def test_presets_train_in_nine_tenths_of_their_card():
    """From caches; from clips, the smallest card with the settings of `8gb` for it is that of 16 GB."""
    text = DOCUMENT.partition("<!-- training: ")[2].partition("<!-- end")[0]
    rows = [row.split(" | ") for row in re.findall(r"^\| (`.+) \|$", text, re.MULTILINE)]
    assert len(rows) == 2 * len(memory.CLIPS) * len(memory.TRAINING_PRESETS)
    for presets, model, source, _, *phases, _ in rows:
        cards = [int(card) for card in re.findall(r"`(\d+)gb`", presets)]
        most = max(float(phase) for phase in phases if phase != "—")
        smallest = min(card for card in cards if most <= 0.9 * card)
        assert smallest <= (16 if source == "clips" or "1.5" in model else 12) or cards[0] > 8, (presets, model, source)


@pytest.mark.parametrize("model", [slow(model) for model in memory.CLIPS])
def test_the_document_says_how_much_fewer_bits_save(model):
    assert memory.stored_row(model) in DOCUMENT


@pytest.mark.parametrize(
    ("card", "task"),
    [slow(card, task) for card in memory.CARDS for task in memory.TASKS],
)
def test_the_document_says_what_a_card_can_do(card, task):
    assert memory.card_row(card, task) in DOCUMENT


@pytest.mark.parametrize(
    "row", [PUBLISHED[1], *(slow(row) for row in PUBLISHED)], ids=lambda row: "-".join(row.values())
)
def test_the_document_compares_with_a_published_figure(row):
    assert memory.published_row(row) in DOCUMENT


def test_nine_of_ten_published_figures_are_beaten_by_a_tenth():
    pairs = re.findall(r"\| (?:yes|no) \| [\d.]+ \| [\d.]+ \| ([\d.]+) \| [\d.]+ \| [\d.]+ \| ([\d.]+) \|", DOCUMENT)
    assert len(pairs) == sum(row["before_validation"] != "OOM" for row in PUBLISHED)
    for shares in zip(*pairs, strict=True):
        assert sum(float(share) <= 0.9 for share in shares) >= 0.9 * len(shares)


@pytest.mark.parametrize("bar", [slow(bar) for bar in memory.bars()], ids=lambda bar: f"{bar.what} of {bar.model}")
def test_the_document_says_how_far_we_are_from_a_bar(bar):
    assert memory.bar_row(bar) in DOCUMENT


def test_every_bar_is_held():
    table = DOCUMENT.partition("<!-- bars: ")[2].partition("<!-- end of bars")[0]
    rows = [row.split(" | ") for row in re.findall(r"^\| (.+) \|$", table, re.MULTILINE)][1:]
    wanted = [[bar.what, bar.model, bar.how, f"{bar.most:.1f}"] for bar in memory.bars()]
    assert sorted(row[:4] for row in rows) == sorted(wanted)
    assert all(float(ours) <= float(most) for *_, most, ours in rows)
    others = DOCUMENT.partition("<!-- end of bars -->")[2]
    named = re.findall(r"`(tests/[^`]+)` \|$", others, re.MULTILINE)
    assert len(named) >= 8 and all((ROOT / path).is_file() for path in named)


# The switches of three trainers: train_cogvideox_lora.py and train_cogvideox_image_to_video_lora.py of diffusers,
# args.py of finetrainers, of cogvideox-factory and of its port to Ascend, without those of the last paragraph of that
# section.
SWITCHES = """
adam_beta1 adam_beta2 adam_epsilon adam_weight_decay allow_tf32 attn_provider_inference attn_provider_training
batch_size beta1 beta2 beta3 bucket_config cache_dir caption_column caption_dropout caption_dropout_p
caption_dropout_technique checkpointing_limit checkpointing_steps checkpoints_total_limit compile_modules
compile_scopes cp_degree data_root dataloader_num_workers dataset_config dataset_config_name dataset_file dataset_name
dataset_shuffle_buffer_size dp_degree dp_shards embeddings_cache enable_model_cpu_offload enable_precomputation
enable_slicing enable_tiling epsilon fa_gradient_checkpointing float32_matmul_precision fps frame_buckets
gradient_accumulation_steps gradient_checkpointing guidance_scale height height_buckets id_token image_column
ignore_learned_positional_embeddings image_resolution_buckets init_timeout instance_data_root
layerwise_upcasting_modules layerwise_upcasting_skip_modules_pattern layerwise_upcasting_storage_dtype learning_rate
load_tensors logging_dir logging_steps lora_alpha lr lr_num_cycles lr_power lr_scheduler lr_warmup_steps
max_data_samples max_grad_norm max_num_frames max_train_steps mixed_precision model_name nccl_timeout
noised_image_dropout num_train_epochs num_validation_videos offload_gradients optimizer output_dir parallel_backend
pin_memory pp_degree precompute_conditions precomputation_dir precomputation_items precomputation_once
precomputation_reuse pretrained_model_name_or_path prodigy_beta3 prodigy_decouple prodigy_safeguard_warmup
prodigy_use_bias_correction random_flip rank report_to resume_from_checkpoint revision save_image_latents scale_lr
seed skip_frames_end skip_frames_start target_modules text_encoder_dtype text_encoder_id tokenizer_id tp_degree
tracker_name train_batch_size train_epochs train_steps training_type transformer_dtype transformer_id use_4bit
use_8bit use_8bit_adam use_cpu_offload_optimizer use_dynamic_cfg use_torchao vae_cache vae_dtype vae_id
validation_dataset_file validation_epochs validation_images validation_prompt validation_prompt_separator
validation_prompts validation_separator validation_steps validation_videos variant video_column video_reshape_mode
video_resolution_buckets weight_decay width width_buckets zero_stage
""".split()


def test_every_switch_of_other_trainers_has_a_key_that_exists():
    section = DOCUMENT.partition("## Switches of other trainers")[2].partition("\n## ")[0]
    rows = [row.split(" | ") for row in re.findall(r"^\| (.+) \|$", section, re.MULTILINE)]
    rows = [row for row in rows if row != ["there", "here"]]
    there = {name for row in rows for name in re.findall(r"`--(\w+)", row[0])}
    assert {*SWITCHES} <= there and all(len(row) == 2 for row in rows)
    known = json.loads((ROOT / "sgm" / "config" / "keys.json").read_text(encoding="utf-8"))
    named = {name for row in rows for name in re.findall(r"`((?:args|model|data|deepspeed)\.[^`=]+)", row[1])}
    assert named and not {name for name in named if name not in known and name != "deepspeed.optimizer.params"}
    paths = {name for row in rows for name in re.findall(r"`((?:configs|tools)/[^`]+)`", row[1])}
    assert paths and not {path for path in paths if not (ROOT / path).is_file()}

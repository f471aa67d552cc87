import shutil
from pathlib import Path

import pytest
import torch

CAPTIONS = [
    f"a {colour} {shape} moves {direction}"
    for colour in ("red", "green", "blue", "yellow")
    for shape in ("ball", "square", "triangle")
    for direction in ("left", "right", "up", "down")
]


def write_tokenizer(folder: Path) -> None:
    """Train a sentencepiece model with T5's ids: pad 0, end 1, unknown 2, no begin."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS),
        model_prefix=str(folder / "spiece"),
        model_type="unigram",
        vocab_size=64,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()


def write_t5(folder: Path) -> None:
    """Write a small random T5 in the released layout: config, sharded safetensors with index, spiece.model."""
    from transformers import T5Config, T5EncoderModel

    folder.mkdir(parents=True, exist_ok=True)
    config = T5Config(
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        T5EncoderModel(config).save_pretrained(folder, max_shard_size="20KB")
    write_tokenizer(folder)


@pytest.fixture(scope="session")
def t5_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("t5") / "t5-v1_1-tiny"
    write_t5(folder)
    return folder


@pytest.fixture
def own_t5_dir(t5_dir, tmp_path) -> Path:
    return Path(shutil.copytree(t5_dir, tmp_path / "t5"))

"""Make the toy text encoder in the released layout: a sentencepiece tokenizer and a small T5 with random weights.

A random T5 is enough: its outputs differ between tokens and captions, and the transformer learns their meaning.
"""

import io
import itertools
import json
from pathlib import Path

import scene
import sentencepiece
import torch
from transformers import T5Config, T5EncoderModel

from sgm.io import atomic_file

VOCAB_SIZE = 512
D_MODEL = 64

# English text in addition to the captions, so that other prompts give few pieces; bytes cover the rest.
ENGLISH = """
The quick brown fox jumps over the lazy dog while the children watch from the garden.
A small wooden boat drifts slowly across a quiet lake in the early morning light.
Two people walk along the beach and talk about the weather, the waves and the wind.
An old man reads a newspaper on a bench under a tall tree in the park.
The camera moves closer to the window, where a cat sleeps in the warm afternoon sun.
A white horse runs through a field of yellow flowers below a range of snowy mountains.
Cars and buses drive down the busy street of a large city at night, and the lights glow.
She opens the door, smiles and steps into a bright kitchen full of fresh bread and fruit.
A black bird flies up from the roof, turns to the right and disappears behind the clouds.
The train leaves the station and the view changes from houses to hills and rivers.
A young woman in a long blue dress dances on the stage in front of many people.
Rain falls on the green leaves; drops of water move down and gather on the ground.
A robot with round eyes looks left, then right, and waves with its metal hand.
In this video an astronaut floats slowly in space above the blue and white planet.
The big ball rolls down the stairs, bounces twice and stops next to a little box.
High quality, cinematic, realistic, detailed, smooth motion, soft light, wide angle, close-up.
One, two, three, four, five, six, seven, eight, nine, ten, 0 1 2 3 4 5 6 7 8 9, yes or no?
What is it that you want to see? Something new, something different, nothing at all!
"""


# Words that become one token each. The tokenizer is made of parts that it finds in two words or more: the word
# itself, and it with an ending.
WORDS = ("a", *scene.COLOURS, *scene.SHAPES, *scene.DIRECTIONS, "big", "small", "moves", "on", "land")


def captions() -> list[str]:
    """Return the caption of every combination, held out or not, and every size."""
    names = itertools.product(scene.COLOURS, scene.SHAPES, scene.DIRECTIONS, scene.RADII)
    return [scene.caption(*name) for name in names]


def make_text_encoder(folder: Path, *, seed: int) -> None:
    """Write ``spiece.model``, ``config.json`` and the weights in two shards into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    words = [word + ending for word in WORDS for ending in ("", "s")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((captions() + words) * 20 + ENGLISH.strip().splitlines()),
        model_writer=model,
        vocab_size=VOCAB_SIZE,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    with atomic_file(folder / "spiece.model") as temporary:
        temporary.write_bytes(model.getvalue())
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCAB_SIZE,
        d_model=D_MODEL,
        d_kv=32,
        d_ff=128,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        tie_word_embeddings=False,
    )
    T5EncoderModel(config).eval().save_pretrained(folder, max_shard_size="250KB")
    # Makes transformers load it as a T5 tokenizer.
    content = {
        "tokenizer_class": "T5Tokenizer",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "extra_ids": 0,
        "model_max_length": 16,
    }
    with atomic_file(folder / "tokenizer_config.json") as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

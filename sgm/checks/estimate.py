"""What a run takes of a rank, estimated before weights are read: memory, and what the rank sends.

The formulas count tensors, as the code makes them; tests hold them against tensors that were counted. Not in them: the
workspace of the device's kernels, buffers of NCCL, and what an allocator keeps without use.

Legend: ``b`` samples of a forward pass, ``s`` tokens of this rank, ``D`` hidden size, ``t`` ranks that share layers,
``W`` ranks that share tokens. A *unit* is one tensor (b, s, D) in the dtype of the network.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sgm.distributed import Mesh
from sgm.parallel.sequence import shard_sizes
from vae_modules.autoencoder import DECODE_CHUNK


def bytes_per_rank(total, trained, ranks, stage, *, ema=False, offload=False, width=2):
    """Return the most that weights, gradients and optimizer take: on the device, and in the machine's memory."""
    share = trained / ranks
    weights = width * total / (ranks if stage == 3 else 1)
    copy = 4 if stage or width == 2 else 0
    state = (copy + 8 + 4 * ema) * (share if stage else trained)
    if not offload:
        stepping = {0: (width + copy) * trained, 1: max(width * trained, 4 * share), 2: 4 * share}
        return weights + state + stepping.get(stage, (width + 4) * share), 0
    state += {1: width + 4, 2: 2 * width + 4, 3: width + 4}[stage] * share
    if stage == 3:
        return 0, weights + state
    return weights + (width * trained if stage == 1 else 0), state


@dataclass(frozen=True, kw_only=True)
class Network:
    """What the estimates know of a DiT and of the samples that pass through it.

    Attributes:
        text: L, text tokens of a sample.
        patches: N, patches of a sample.
        hidden: D.
        layers: blocks.
        recomputed: blocks whose activations the backward pass computes anew.
        rotary: whether queries and keys are rotated.
        adapter_rank: of LoRA, 0 without; the rest is frozen then.
        outputs: numbers that the network makes of a patch.
        text_size: numbers in the embedding of a text token.
        width: bytes of a number.
        ring: whether ranks that share tokens pass keys and values around.
        mesh: which ranks share a sample.
    """

    text: int
    patches: int
    hidden: int
    layers: int
    recomputed: int
    rotary: bool
    adapter_rank: int
    outputs: int
    text_size: int
    width: int
    ring: bool
    mesh: Mesh

    @property
    def tokens(self) -> int:
        """Tokens of the rank that has most: s."""
        return self._share(self.text) + self._share(self.patches)

    def _share(self, length: int) -> int:
        return shard_sizes(length, self.mesh.sequence)[0]

    def forward_bytes(self, samples: int) -> float:
        """Return the most that the tensors of a forward pass take where nothing is kept for a backward pass.

        Within a block lie three units (what entered the network, the stream of tokens, and the input of a layer);
        queries, keys and values (3/t), and queries and keys again, normed (2/t). With those, one of these is largest:
        the MLP's inner and outer activation; the rotation, which computes in float32; or the exchange with other ranks.

        Args:
            samples: that pass together, both branches of guidance counted.
        """
        wide = 4 / self.width  # float32, in units
        mlp = 1 + (self.mesh.tensor > 1) + 4 / self.mesh.tensor
        rotation = (2 + 2 * wide + (self.width < 4)) if self.rotary else 0
        exchange = 0.0
        if self.mesh.sequence > 1:
            exchange = 2 * self.rotary + (5 + 3 * wide if self.ring else 12)
        units = 3 + 5 / self.mesh.tensor + max(mlp, max(rotation, exchange) / self.mesh.tensor)
        return units * self._unit(samples)

    def saved_bytes(self, samples: int) -> float:
        """Return what a forward pass keeps for the backward pass, with the block that is being computed anew.

        In units, of a block: its input, the inputs of the modulations (2) and of the linear layers behind them (2),
        what the gates multiply (2) and the stream between attention and MLP; divided by t, queries, keys and values,
        queries and keys again, the output of attention (6), and the MLP's inner activation before and after GELU (8).
        Ulysses attention keeps queries, keys and values as they came from the projection, too, and its output twice.
        Frozen weights need no inputs: with LoRA five units stay away, and the MLP's activation after GELU.

        Args:
            samples: that pass together.
        """
        t, lora = self.mesh.tensor, self.adapter_rank > 0
        before = (2 if lora else 4) + (8 if self.mesh.sequence > 1 and not self.ring else 6) / t
        before += (3 / t + 1) * self.adapter_rank / self.hidden
        behind = (1 if lora else 4) + (4 if lora else 8) / t
        block = before + behind
        num = self.layers - self.recomputed + min(self.recomputed, 1)  # blocks whose activations exist at a time
        text = self._share(self.text) / self.tokens
        # The last block drops the text after attention; two norms, a modulation and a projection follow.
        ends = (2 if lora else 4) * (1 - text) - (behind - 1) * text * (self.recomputed < self.layers)
        inputs = 0.0 if lora else self._share(self.text) * self.text_size * self.width * samples
        return (num * block + self.recomputed + ends) * self._unit(samples) + inputs

    def backward_bytes(self, samples: int) -> float:
        """Return the most that the tensors of a forward and a backward pass take, gradients of weights apart.

        Beside what is saved: gradients of the stream behind and in front of a block, and of the MLP's inner activation,
        which without LoRA takes the place of what is not needed any more.
        """
        inner = 4 / self.mesh.tensor if self.adapter_rank else 0
        return self.saved_bytes(samples) + (2 + inner) * self._unit(samples)

    def _unit(self, samples: int) -> float:
        return samples * self.tokens * self.hidden * self.width

    def traffic(self, samples: int, *, trains: bool) -> dict[str, float]:
        """Return the bytes that a rank sends along each axis in a forward pass, in training with its backward pass.

        Args:
            samples: that pass together, in sampling those of this rank's branches.
            trains: whether a backward pass follows.
        """
        mesh, sent = self.mesh, {}
        unit = self._unit(samples)
        again = self.layers + self.recomputed if trains else self.layers  # forward passes of blocks
        back = self.layers if trains else 0
        if mesh.tensor > 1:
            # A sum for all ranks (b, s, D) behind attention and MLP; backward, in front of them and of the final
            # layer. The last block's MLP, and what follows, has no text.
            text = self._share(self.text) / self.tokens
            short = 1 + trains + (trains and self.recomputed == self.layers)
            sums = 2 * (again + back) + trains - (short + trains) * text
            sent["layers"] = sums * 2 * (mesh.tensor - 1) / mesh.tensor * unit
        if mesh.sequence > 1:
            others, own_unit = mesh.sequence - 1, unit / mesh.tensor
            if self.ring:
                # Keys and values; backward again, and their gradients in float32, which go all the way home.
                sent["tokens"] = (2 * others * (again + back) + 2 * mesh.sequence * 4 / self.width * back) * own_unit
            else:
                sent["tokens"] = 4 * (again + back) * others / mesh.sequence * own_unit
            sent["tokens"] += others * samples * self._share(self.patches) * self.outputs * self.width
        if mesh.cfg > 1:
            sent["guidance"] = samples * self.patches * self.outputs * self.width
        return sent


@dataclass(frozen=True, kw_only=True)
class Autoencoder:
    """What the estimates know of the VAE.

    Attributes:
        channels: of its levels, from full resolution down.
        blocks: residual blocks of a level of the encoder; the decoder has one more.
        latent_channels: of the latents.
        parameters: numbers in its weights.
        width: bytes of a number; in float16 it would overflow, and it runs in bfloat16.
        size: (height, width) in pixels of what passes at a time: of a tile, or of the whole.
        ranks: that share a clip.
        encode_chunk: frames encoded at a time; None for all.
    """

    channels: tuple[int, ...]
    blocks: int
    latent_channels: int
    parameters: int
    width: int
    size: tuple[int, int]
    ranks: int
    encode_chunk: int | None

    def decode_bytes(self, latents: int, samples: int = 1) -> float:
        """Return the most that the tensors of a decoder take.

        Largest is a residual block at full resolution: what enters the level and the block, the norm of it, with the
        frames before the chunk in front, and what the convolution makes of it. To this come the frames that all
        convolutions remember for the next chunk, and the pictures.

        Args:
            latents: latent frames of a sample.
            samples: that are decoded together.
        """
        first = min(latents, DECODE_CHUNK + latents % DECODE_CHUNK)
        later = 4 * DECODE_CHUNK if latents > first else 0
        numbers = self._chunks(4 * (first - 1) + 1, later, decoder=True)
        pictures = 3 * (4 * (latents - 1) + 1) * self.size[0] * self.size[1]
        return samples * (numbers + pictures) * self.width

    def encode_bytes(self, frames: int) -> float:
        """Return the most that the tensors of the encoder take of one clip of so many frames; see `decode_bytes`."""
        later, chunk = 0, self.encode_chunk
        if chunk is not None and frames > chunk:
            frames, later = chunk + frames % chunk, chunk
        elif chunk is None and self.ranks > 1:
            frames = max(4 * num - 3 * (i == 0) for i, num in enumerate(shard_sizes((frames - 1) // 4 + 1, self.ranks)))
        return self._chunks(frames, later, decoder=False) * self.width

    def _chunks(self, first: int, later: int, *, decoder: bool) -> float:
        """Numbers in the tensors of a chunk of `first` frames, or one of `later` frames and what it must know."""
        entering = self.channels[min(1, len(self.channels) - 1) if decoder else 0]
        alone = self._block(first, entering)
        return max(alone, self._block(later, entering) + self.remembered(decoder=decoder)) if later else alone

    def _block(self, frames: int, entering: int) -> float:
        """Numbers in the tensors of the first residual blocks at full resolution."""
        own = self.channels[0]
        first = frames * (3 * entering + own) + 2 * entering
        second = frames * (entering + 5 * own) + 2 * own
        return max(first, second) * self.size[0] * self.size[1]

    def remembered(self, *, decoder: bool) -> float:
        """Return the numbers in two frames in front of every causal convolution: what a chunk tells the next one."""
        down = list(enumerate(self.channels))
        levels = [*reversed(down)] if decoder else down
        channels = levels[0][1]
        lowest = down[-1]
        total = self.latent_channels / 4 ** lowest[0] if decoder else 3.0
        for level, own in levels:
            num = self.blocks + decoder
            total += (channels + (2 * num - 1) * own) / 4**level
            channels = own
        total += (4 * lowest[1]) / 4 ** lowest[0]  # the two blocks in the middle
        total += channels / 4 ** (0 if decoder else lowest[0])  # the last convolution
        return 2 * total * self.size[0] * self.size[1]

    def decode_traffic(self, latents: int, samples: int) -> float:
        """Return the bytes that a rank sends in decoding: what convolutions remember, and pictures to the first rank.

        Args:
            latents: latent frames of a sample.
            samples: of a run of the sampler.
        """
        chunks = max(latents // DECODE_CHUNK, 1)
        ranks = min(self.ranks, chunks)
        if ranks == 1:
            return 0.0
        pictures = 3 * 4 * DECODE_CHUNK * self.size[0] * self.size[1]
        return samples * (-(-(chunks - 1) // ranks) * self.remembered(decoder=True) + pictures) * self.width


def zero_traffic(
    total: float, trained: float, ranks: int, section: Mapping[str, Any], *, block: float, width: int
) -> float:
    """Return the bytes that a rank sends in an iteration to sum gradients and to hand out weights.

    Args:
        total: parameters of this rank's network.
        trained: those of them that are trained.
        ranks: that share them.
        section: ``Config.deepspeed`` of a training run.
        block: parameters of a block.
        width: bytes of a parameter.
    """
    zero, batches = section["zero_optimization"], section["gradient_accumulation_steps"]
    fetches = 3 if zero.get("stage3_max_live_parameters", 1e9) < block else 2
    once = not zero.get("use_multi_rank_bucket_allreduce", True)
    numbers = {
        0: 2 * trained,
        1: 3 * trained,
        2: ((1 if once else 2) * batches + 1) * trained,
        3: batches * (fetches * total + trained),
    }[zero["stage"]]
    return numbers * width * (ranks - 1) / ranks

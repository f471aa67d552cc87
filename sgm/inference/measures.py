"""Measures of finished videos: alone, and against a reference.

Legend: ``T H W C`` frames of one video, uint8, RGB; ``N 3 H W`` frames as floats.

Fidelity to a reference is torchmetrics' (PSNR, SSIM) and LPIPS (Zhang et al., "The Unreasonable Effectiveness of Deep
Features as a Perceptual Metric", version 0.1 with AlexNet). Flicker and motion smoothness follow the measures of VBench
(Huang et al., "VBench: Comprehensive Benchmark Suite for Video Generative Models", dimensions temporal flickering and
motion smoothness); the interpolation network of the latter is optical flow here, so that nothing needs weights.
"""

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sgm.inference.language.models import Kind, read_folder
from sgm.io import parse_json
from sgm.util import InputError
from sgm.weights.files import read_file

FRAMES = 16  # computed at once
EQUAL_DB = 100.0  # PSNR of equal frames, which would be infinite
MIN_SIDE = 12  # pixels, below which SSIM's window and optical flow have no place
LPIPS_SIDE = 64  # pixels, below which AlexNet's last feature map is empty
EXTRA = "pip install -e '.[evaluate]'"


@dataclass(frozen=True)
class Measure:
    """A figure of a video.

    Attributes:
        title: head of its column.
        better: ``higher`` or ``lower``.
        meaning: its definition.
        digits: shown after the point.
    """

    title: str
    better: str
    meaning: str
    digits: int = 2


MEASURES = {
    "psnr": Measure(
        "PSNR (dB)",
        "higher",
        "mean over frames of 10 log10(255^2 / mean squared error to the reference), over all pixels and channels; "
        f"equal frames count {EQUAL_DB:g} dB",
    ),
    "ssim": Measure(
        "SSIM",
        "higher",
        "mean over frames of the structural similarity to the reference (Wang et al. 2004): Gaussian window of 11 "
        "pixels and sigma 1.5, K1 0.01, K2 0.03, mean over channels; 1 is equal",
        4,
    ),
    "lpips": Measure(
        "LPIPS", "lower", "mean over frames of LPIPS 0.1 with AlexNet to the reference, at full size; 0 is equal", 4
    ),
    "clip": Measure(
        "CLIP",
        "higher",
        "mean over frames of 100 max(cosine, 0) between the CLIP embeddings of frame and prompt; a prompt is cut at "
        "the length of the text model",
    ),
    "smoothness": Measure(
        "motion smoothness",
        "higher",
        "1 - e/255, where e is the mean absolute difference in grey levels, over all pixels, channels and frames but "
        "the first and last, between a frame and the one interpolated from its two neighbours: optical flow (DIS) "
        "between them, each warped half-way, and averaged",
        4,
    ),
    "flicker": Measure(
        "flicker",
        "lower",
        "mean absolute difference of consecutive frames in grey levels of 0 to 255, over all pixels, channels and "
        "pairs; motion counts too. VBench's temporal flickering is (255 - flicker)/255",
    ),
}


def require(*, references: bool) -> None:
    """Check that the packages are installed.

    Raises:
        InputError: one is missing.
    """
    packages = {"cv2": "opencv-python-headless", **({"torchmetrics": "torchmetrics"} if references else {})}
    missing = [package for name, package in packages.items() if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"{' and '.join(missing)} is not installed: {EXTRA}")


def flicker(video: np.ndarray) -> float | None:
    """Return the mean absolute difference of consecutive frames; None for a single frame."""
    if len(video) < 2:
        return None
    frames = video.astype(np.int16)
    return float(np.mean([np.abs(after - before).mean() for before, after in zip(frames, frames[1:], strict=False)]))


def smoothness(video: np.ndarray) -> float | None:
    """Return how well frames are interpolated from their neighbours, at most 1; None below three frames."""
    if len(video) < 3:
        return None
    import cv2

    flow_of = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in video]
    rows, columns = np.mgrid[: video.shape[1], : video.shape[2]].astype(np.float32)
    errors = []
    for t in range(1, len(video) - 1):
        halves = []
        for here, there in ((t - 1, t + 1), (t + 1, t - 1)):
            # A pixel of the frame between comes from half a step back along the flow, taken to be even around it.
            half = flow_of.calc(grey[here], grey[there], np.zeros((*grey[t].shape, 2), np.float32)) / 2
            x, y = columns - half[..., 0], rows - half[..., 1]
            halves.append(cv2.remap(video[here], x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE))
        between = (halves[0].astype(np.float32) + halves[1]) / 2
        errors.append(np.abs(between - video[t]).mean())
    return 1 - float(np.mean(errors)) / 255


def fidelity(
    video: np.ndarray, reference: np.ndarray, lpips: "Lpips | None" = None, *, device: torch.device | None = None
) -> dict[str, float]:
    """Return PSNR, SSIM, and LPIPS if its network is given, of a video against a reference of the same shape.

    Args:
        video: its frames.
        reference: those of the other.
        lpips: the network, on `device`.
        device: to compute on; None is the CPU.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    found: dict[str, list[torch.Tensor]] = {"psnr": [], "ssim": [], **({"lpips": []} if lpips else {})}
    for pieces in zip(_pieces(video), _pieces(reference), strict=True):
        a, b = (piece.to(device) for piece in pieces)
        found["psnr"].append(peak_signal_noise_ratio(a, b, data_range=1.0, reduction="none", dim=(1, 2, 3)))
        similarity = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
        assert isinstance(similarity, torch.Tensor)
        found["ssim"].append(similarity)
        if lpips is not None:
            found["lpips"].append(lpips(a, b))
    frames = {name: torch.cat([piece.reshape(-1).cpu() for piece in pieces]) for name, pieces in found.items()}
    return {name: float(values.clamp(max=EQUAL_DB).mean()) for name, values in frames.items()}


def _pieces(video: np.ndarray) -> Iterator[torch.Tensor]:
    """Yield the frames in [0, 1], some at a time: (N, 3, H, W) float32."""
    for start in range(0, len(video), FRAMES):
        yield torch.from_numpy(video[start : start + FRAMES]).permute(0, 3, 1, 2).float() / 255


class Lpips(nn.Module):
    """LPIPS 0.1 with AlexNet.

    Args:
        file: weights of torchvision's AlexNet (``features.0.weight``, ...), ``.pth`` or ``.safetensors``. Those of the
            five linear layers come with torchmetrics.

    Raises:
        InputError: the file is missing, damaged, or holds another network.
    """

    shift: torch.Tensor
    scale: torch.Tensor
    _LAYERS = (0, 3, 6, 8, 10)  # convolutions, by their numbers in torchvision; each is followed by a ReLU

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(),
        )
        self._load(file)
        for number, weight in zip(self._LAYERS, _lpips_layers(), strict=True):
            self.register_buffer(f"linear_{number}", weight, persistent=False)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def _load(self, file: Path) -> None:
        held, wanted = read_file(file), self.features.state_dict()
        given = {name: held[f"features.{name}"] for name in wanted if f"features.{name}" in held}
        wrong = [name for name, tensor in wanted.items() if name not in given or given[name].shape != tensor.shape]
        if wrong:
            raise InputError(
                f"weights of LPIPS {file}: has no features.{wrong[0]} of shape {[*wanted[wrong[0]].shape]}; give the "
                "weights of torchvision's AlexNet"
            )
        self.features.load_state_dict({name: tensor.float() for name, tensor in given.items()})

    @torch.inference_mode()
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return the distance (N,) of frames in [0, 1], (N, 3, H, W)."""
        total = torch.zeros(len(a), device=a.device)
        a, b = ((x * 2 - 1 - self.shift) / self.scale for x in (a, b))
        for number, layer in enumerate(self.features):
            a, b = layer(a), layer(b)
            if number - 1 in self._LAYERS:
                difference = (_unit(a) - _unit(b)) ** 2
                total += (difference * getattr(self, f"linear_{number - 1}")).sum(dim=1).mean(dim=(1, 2))
        return total


def _unit(features: torch.Tensor) -> torch.Tensor:
    return features / (features.square().sum(dim=1, keepdim=True) + 1e-8).sqrt()


def _lpips_layers() -> list[torch.Tensor]:
    """Return the weights (1, C, 1, 1) of the linear layers, which torchmetrics ships."""
    import torchmetrics

    file = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / "alex.pth"
    held: Mapping[str, torch.Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    return [held[f"lin{k}.model.1.weight"] for k in range(5)]


_CLIP = Kind(
    does="compare pictures with text",
    fetch="fetch a CLIP model first, with: hf download NAME --local-dir FOLDER",
    models="AutoModel",
    mapping="MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING",
    reader="AutoProcessor",
    lacks=lambda processor: None,
)


class Clip:
    """CLIP score, with a model from a folder of transformers.

    Args:
        folder: ``config.json`` of a CLIPModel, safetensors, tokenizer and image processor.
        device: to compute on.

    Raises:
        InputError: the folder is not such a model.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.check(folder)
        self._processor, model = read_folder(folder, _CLIP)
        self._model, self._device = model.to(device), device
        self._length = model.config.text_config.max_position_embeddings

    @staticmethod
    def check(folder: Path) -> None:
        """Check a folder without reading its weights.

        Raises:
            InputError: it is no CLIPModel.
        """
        processor, _ = read_folder(folder, _CLIP, weights=False)
        kind = parse_json((folder / "config.json").read_bytes()).get("model_type")
        if kind != "clip" or not hasattr(processor, "image_processor"):
            raise InputError(f"model folder '{folder}' is no CLIPModel with a processor of text and pictures")

    def cuts(self, prompt: str) -> bool:
        """Return whether a prompt is longer than the text model reads."""
        return len(self._processor.tokenizer(prompt)["input_ids"]) > self._length

    @torch.inference_mode()
    def __call__(self, video: np.ndarray, prompt: str) -> float:
        """Return the score of a video."""
        scores = []
        for start in range(0, len(video), FRAMES):
            inputs: Any = self._processor(
                text=[prompt],
                images=list(video[start : start + FRAMES]),
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=self._length,
            )
            outputs = self._model(**inputs.to(self._device))
            scores.append((outputs.image_embeds.float() @ outputs.text_embeds.float().T)[:, 0])
        return float((100 * torch.cat(scores)).clamp(min=0).mean())

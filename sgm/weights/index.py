"""The index of sharded weights of diffusers and transformers: which file holds which tensor."""

from collections.abc import Collection
from pathlib import Path

from sgm.io import parse_json, reason_of
from sgm.util import InputError

# Names of one tensor of T5: files hold one of them or several, and an index may name others.
TIED = frozenset(("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"))
_CURE = "copy or download it again"


def read_index(path: Path) -> dict[Path, frozenset[str]]:
    """Return the files of an ``*.index.json``, by name, each with the names of its tensors; they may be missing.

    Raises:
        InputError: it is damaged, or names files that are not in its folder.
    """
    try:
        data = path.read_bytes()
        if data.startswith(b"version https://git-lfs"):
            raise ValueError("it is a Git LFS pointer, run 'git lfs pull' where it was cloned")
        content = parse_json(data)
        places = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
            raise ValueError("its weight_map does not give the file of each tensor")
        if elsewhere := [name for name in places.values() if Path(name).name != name]:
            raise ValueError(f"it names '{elsewhere[0]}', and weights are files in its own folder")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not an index of weights: {reason_of(error)}; {_CURE}") from error
    files = sorted(set(places.values()))
    return {path.parent / file: frozenset(name for name, own in places.items() if own == file) for file in files}


def misplaced(file: Path, listed: Collection[str], held: Collection[str]) -> str:
    """Return how the names of a file's tensors, `held`, differ from those of its index; empty if they do not."""
    for names, words in (({*listed} - {*held}, "lacks"), ({*held} - {*listed}, "holds")):
        if names := names - TIED:
            does = "places" if words == "lacks" else "does not place"
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return f"{file} {words} {min(names)}{more}, which its index {does} there; {_CURE}, with its index"
    return ""

import json
from pathlib import Path

import concept
import numpy as np
import pytest
import scene
import sentencepiece

from data_video import SFTDataset
from sgm.inference.main import main as sample_video
from sgm.inference.video import write_video
from tests.marks import thorough

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("land")
    assert concept.main(["make", str(made)]) == 0
    return made


def samples(folder: Path, *, land: bool, recoloured: bool = False) -> Path:
    """Write the output of a sampling run."""
    rng = np.random.default_rng(7)
    for number, names in enumerate((*concept.PROMPTS, concept.UNRELATED)):
        asked = names != concept.UNRELATED
        video = (concept.render if land and asked else lambda n, r: scene.render(scene.random_clip(n, r)))(names, rng)
        path = folder / f"{number}_x" / "0" / "000000.mp4"
        write_video(path, ((video[..., ::-1] if recoloured else video) * 255).astype(np.uint8), 8)
        prompt = scene.caption(*names) + concept.WORDS * asked
        path.with_suffix(".json").write_text(json.dumps({"prompt": prompt}))
    return folder


@pytest.mark.thorough
def test_the_clips_are_a_data_set_of_the_concept(folder):
    clips = SFTDataset(data_dir=folder, video_size=(64, 64), fps=8, max_num_frames=17, skip_frms_num=0)
    assert (len(concept.CLIPS), len(concept.ORDINARY)) == (48, 30)
    assert [report.problems for report in clips.check()] == [()] * 78
    assert [caption.endswith(" on land") for caption in clips.captions] == [True] * 48 + [False] * 30
    for i in range(len(clips)):
        video = (clips[i]["mp4"].permute(0, 2, 3, 1).numpy() + 1) / 2
        assert (concept.land_share(video) > 0.95) == (i < 48)
        assert i >= 48 or concept.land_share(video[:, : -concept.HEIGHT]) < 0.05  # one of the others is green


def test_making_it_again_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(concept, "write_video", lambda path, frames, *_, **__: path.write_bytes(frames.tobytes()))
    made = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        (folder / "videos").mkdir(parents=True)
        concept.make(folder)
        made.append({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")})
    assert made[0] == made[1] and sum(path.suffix == ".mp4" for path in made[0]) == 78


@pytest.mark.thorough
def test_no_prompt_was_trained_and_none_is_cut(folder):
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(ROOT / "assets" / "toy" / "t5" / "spiece.model"))
    prompts = (folder / "prompts.txt").read_text().splitlines()
    captions = [path.read_text().strip() for path in (folder / "labels").iterdir()]
    more = (folder / "prompts_72.txt").read_text().splitlines()
    assert (len(prompts), len({*more})) == (5, 72) and not {*prompts, *more} & {*captions}
    assert sum(prompt.endswith(concept.WORDS) for prompt in more) == 36
    assert all(len(tokenizer.encode(text)) == len(text.split()) for text in prompts + captions + more)


@pytest.mark.parametrize(
    ("before", "after", "code"), [(False, True, 0), thorough(False, False, 1), thorough(True, True, 1)]
)
def test_measuring_tells_whether_the_concept_was_learned(tmp_path, capsys, before, after, code):
    folders = [samples(tmp_path / "before", land=before), samples(tmp_path / "after", land=after)]
    assert concept.main(["measure", *map(str, folders)]) == code
    printed = capsys.readouterr().out
    shares = [int(word.rstrip("%,;")) for word in printed.split() if "%" in word]
    assert [share > 90 for share in shares[:2]] == [before, after]
    assert [share < 10 for share in shares[:2]] == [not before, not after]
    assert shares[2:6] == [100] * 4 and shares[-1] == 0, printed


def test_measuring_sees_other_colours(tmp_path):
    shares = concept.measure(samples(tmp_path, land=False, recoloured=True))
    assert shares.colour == 0.2  # magenta stays; the others become another colour or none
    assert shares.shape == 1.0


def test_measuring_nothing(tmp_path, capsys):
    assert concept.main(["measure", str(tmp_path), str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.slow
def test_the_lora_of_the_toy_puts_land_under_a_shape(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    base = ["--base", "configs/toy.yaml", "configs/toy_inference.yaml", "configs/toy_loras.yaml"]
    words = ["args.prompt=a red square moves left on land", "args.num_steps=8", "args.contact_sheet=false"]
    assert sample_video([*base, *words, f"args.output_dir={tmp_path}"]) == 0
    assert concept.measure(tmp_path).land > concept.LEARNED  # 88% in these few steps

"""The bars of memory traffic: passes of a block over its hidden states at the released size."""

import pytest

from benchmarks import traffic


# Beside the passes of a block of the 5B: LoRA keeps no product's output, and no input of a frozen layer.
@pytest.mark.parametrize(("task", "forward", "passes", "saved"), [("full", 40, 130, 16.5), ("LoRA", 40, 130, 14)])
def test_a_block_stays_below_its_bars(task, forward, passes, saved):
    found = traffic.block_traffic("cogvideox_5b", task=task)
    assert 20 < found.forward <= forward
    assert found.total <= passes, found.passes
    assert found.saved <= saved


def test_a_guided_step_has_the_passes_of_one_sample():
    """Both branches share their step, and so the factors of norms."""
    assert 20 < traffic.block_traffic("cogvideox_5b", task="guided").forward <= 37


def test_the_table_has_a_row_a_side_and_one_of_adapters(monkeypatch, capsys):
    figures = iter([("full", 36.5, 112.1, 20.1), ("full", 97.5, 260.0, 23.1), ("LoRA", 36.5, 90.0, 13.0)])
    guided = traffic.Traffic({"all": 35.0}, 35.0, 0.0)

    def measured(model, side, task, latents):
        if task == "guided":
            return guided
        expected, forward, total, saved = next(figures)
        assert (model, task, latents) == ("cogvideox_2b", expected, (3, 16, 24))
        return traffic.Traffic({"all": total}, forward, saved)

    monkeypatch.setattr(traffic, "block_traffic", measured)
    assert traffic.main(["cogvideox_2b", "--latents", "3x16x24"]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| cogvideox_2b | ours | 36.5 | 112.1 | 20.1 |",
        "| cogvideox_2b | diffusers | 97.5 | 260.0 | 23.1 |",
        "| cogvideox_2b LoRA r128 | ours | 36.5 | 90.0 | 13.0 |",
        "| cogvideox_2b guided | ours | 35.0 |  |  |",
        "| cogvideox_2b guided | diffusers | 35.0 |  |  |",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [(["cogvideox"], "cogvideox is unknown; give some of"), (["--latents", "3x4"], "--latents=3x4: give frames")],
)
def test_wrong_words_are_refused(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        traffic.main(words)
    assert message in capsys.readouterr().err

import pytest

from sgm.data.buckets.resolutions import AREAS, class_sizes
from sgm.util import InputError


def test_the_released_sizes_are_where_they_belong():
    assert (480, 720) in class_sizes("480p") and (720, 480) in class_sizes("480p")
    assert (720, 1280) in class_sizes("720p")
    assert (768, 1360) in class_sizes("1024")


@pytest.mark.parametrize("name", AREAS)
def test_the_sizes_of_a_class(name):
    sizes = class_sizes(name)
    assert len(set(sizes)) == len(sizes) > 15
    assert all(height % 16 == width % 16 == 0 for height, width in sizes)
    assert {(width, height) for height, width in sizes} == set(sizes), "each can be turned"
    aspects = [height / width for height, width in sizes]
    assert aspects == sorted(aspects) and aspects[0] < 0.3 and 1.0 in aspects
    computed = [size for size in sizes if 480 not in size or 720 not in size]
    assert all(0.93 < height * width / AREAS[name] < 1.06 for height, width in computed)


def test_an_unknown_class():
    with pytest.raises(InputError, match="'480' is no class of resolutions.*did you mean '480p'"):
        class_sizes("480")

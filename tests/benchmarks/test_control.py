"""What a rank does at the start of a run does not grow with the number of ranks."""

import pytest

from benchmarks import control


def test_a_heartbeat_reads_as_much_of_64_ranks_as_of_a_thousand():
    assert [control.beats(ranks)["keys"] for ranks in (64, 1024)] == [9, 9]


@pytest.mark.slow
def test_the_table_of_simulated_ranks(capsys):
    assert control.main(["--ranks", "64", "1024"]) == 0
    few, many = ([cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[4:])
    assert (few[0], many[0]) == ("64", "1024")
    assert few[2] == many[2] == "12", "groups that a rank creates"
    assert few[4] == many[4] == "3", "collectives that compare plans"
    assert few[6] == many[6] == "9"
    assert all(int(row[column]) <= 8 for row in (few, many) for column in (10, 12)), (
        "files of a state that a rank reads"
    )

"""Tables as aligned text and as markdown."""

from covered_call.tables import align, markdown

CELLS = [["", "trades", "answers by"], ["train", "7", "a"], ["validation", "1,024", ""]]


def test_columns_are_as_wide_as_their_widest_cell_and_lines_end_with_their_text():
    assert align(CELLS).split("\n") == [
        "            trades  answers by",
        "train       7       a",
        "validation  1,024",
    ]


def test_numbers_can_stand_to_the_right():
    assert align(CELLS, right={1}).split("\n") == [
        "            trades  answers by",
        "train            7  a",
        "validation   1,024",
    ]


def test_the_same_cells_are_a_table_of_markdown():
    assert markdown(CELLS).split("\n") == [
        "| | trades | answers by |",
        "|---|---|---|",
        "| train | 7 | a |",
        "| validation | 1,024 | |",
    ]

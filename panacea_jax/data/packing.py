"""Which records share a row."""

from collections.abc import Sequence


def first_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Rows of at most `length` tokens for records of these sizes, each at most `length`.

    First fit decreasing: the largest record first, each into the first row that has room for it.
    It needs at most 11/9 of the fewest rows possible, and 6/9 of one more (Dósa, ESCAPE 2007).

    Returns:
        The numbers of the records in each row. Of equal sizes the earlier record goes first, so
        that equal arguments give equal rows.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = next((r for r, left in enumerate(room) if sizes[i] <= left), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(i)
        room[row] -= sizes[i]
    return rows

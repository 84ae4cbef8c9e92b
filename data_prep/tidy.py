"""What cleaning leaves alone, found for a whole batch at once, so that clean text costs no Python call a text.

The texts of a batch are joined and looked at as one: all white space becomes U+0020, runs of it are collapsed, and a
table tells which code points ask for more. Only texts that hold such a one are cleaned one by one (`clean.Cleaner`).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pyarrow as pa

_SAFE, _WHITE, _LOOK = 0, 1, 2
_CODE_POINTS = 0x31350
# Code points that cleaning never changes, whatever stands beside them: printable, their own NFC, of combining class 0,
# and never the second of two that NFC makes one of.
_LEFT_ALONE = (
    (0xA1, 0xAC),
    (0xAE, 0x2FF),
    (0x391, 0x3A1),
    (0x3A3, 0x3FF),
    (0x400, 0x482),
    (0x48A, 0x52F),
    (0x2010, 0x2027),
    (0x2030, 0x205E),
    (0x20A0, 0x20C0),
    (0x2190, 0x2328),
    (0x232B, 0x23FF),
    (0x2460, 0x2ADB),
    (0x2ADD, 0x2B73),
    (0x3001, 0x3029),
    (0x3030, 0x303F),
    (0x3041, 0x3096),
    (0x309B, 0x30FF),
    (0x3105, 0x312F),
    (0x3200, 0x321E),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFC),
    (0xAC00, 0xD7A3),
    (0xFF01, 0xFF9F),
    (0x1F300, 0x1F64F),
    (0x1F680, 0x1F6D7),
    (0x1F910, 0x1F9FF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2EBE0),
    (0x30000, 0x3134A),
)
_SPACE, _LINE_END = 32, 10
_ASCII = bytes(range(128))
_ASCII_WHITE = b"\t\x0b\x0c\r\x1c\x1d\x1e\x1f"  # the line end parts the texts
_TO_SPACES = bytes.maketrans(_ASCII_WHITE, b" " * len(_ASCII_WHITE))
_LARGE_BYTES = 1024**2  # such a text goes by itself, for the sake of memory


def tidy(texts: list[bytes]) -> tuple[list[bytes], np.ndarray]:
    """Texts with white space collapsed, and the positions of those that have to be cleaned one by one (int64, sorted).

    Raises UnicodeDecodeError when a text is not UTF-8.
    """
    large = [number for number, text in enumerate(texts) if len(text) > _LARGE_BYTES]
    small = [b"" if len(text) > _LARGE_BYTES else text for text in texts] if large else texts
    joined = b"\n".join(small)
    if joined.count(b"\n") >= len(small):
        joined = b"\n".join([text.replace(b"\n", b" ") for text in small])
    values = np.frombuffer(joined, np.uint8)
    controls = ((values < 32) & (values != _LINE_END)) | (values == 127)
    look = [np.array(large, dtype=np.int64)]
    spaced = values
    if controls.any():
        spaced = np.frombuffer(joined.translate(_TO_SPACES), np.uint8)
        look.append(_owners(values, np.flatnonzero(controls & (spaced != _SPACE))))
    if not joined.isascii():
        white, owners = _beyond_ascii(joined, values)
        look.append(owners)
        if len(white):
            spaced = spaced.copy()
            spaced[white] = spaced[white + 1] = _SPACE  # of two bytes, or of three
            spaced[white[values[white] >= 0xE0] + 2] = _SPACE
    collapsed = _collapsed(spaced)
    tidied = small if collapsed is values else collapsed.tobytes().split(b"\n")
    for number in large:
        tidied[number] = texts[number]
    return tidied, np.unique(np.concatenate(look))


def _beyond_ascii(joined: bytes, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where white space beyond ASCII begins, and the numbers of texts with characters that ask for a closer look."""
    beyond = np.count_nonzero(values & 0x80)
    dense = beyond * 4 > len(values)
    if dense:
        text = joined.decode()
    else:
        _check_utf8(joined, values)
        text = joined.translate(None, _ASCII).decode()
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    kinds = _table().take(points, mode="clip")
    asking = np.flatnonzero(kinds)
    white = kinds[asking] == _WHITE
    if not len(asking) or (dense and not white.any()):  # the line ends are among the characters
        return asking[:0], _owners(points, asking)
    firsts = np.flatnonzero((values & 0xC0) != 0x80 if dense else values >= 0xC0)[asking]
    return firsts[white], _owners(values, firsts[~white])


def _check_utf8(joined: bytes, values: np.ndarray) -> None:
    """Raises UnicodeDecodeError; four times as fast as decoding it where most is ASCII."""
    offsets = pa.py_buffer(np.array([0, len(joined)], dtype=np.int64))
    try:
        pa.LargeStringArray.from_buffers(1, offsets, pa.py_buffer(values)).validate(full=True)
    except pa.ArrowInvalid:
        joined.decode()
        raise


def _collapsed(values: np.ndarray) -> np.ndarray:
    """Without spaces at the ends of lines and with one between words; the array itself where nothing is to be done."""
    while len(values):
        space, end = values == _SPACE, values == _LINE_END
        spare = np.empty(len(values), dtype=bool)
        spare[0], spare[1:] = space[0], space[1:] & (space | end)[:-1]
        spare[:-1] |= space[:-1] & end[1:]
        spare[-1] |= space[-1]
        if not spare.any():
            break
        values = values[~spare]  # a space that only now stands before a line end goes next time
    return values


def _owners(values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The numbers of the texts that hold bytes (or characters) `positions` of the joined ones; a line end is the end
    of its text.
    """
    if not len(positions):
        return np.empty(0, dtype=np.int64)
    return np.searchsorted(np.flatnonzero(values == _LINE_END), positions)


@lru_cache(maxsize=1)
def _table() -> np.ndarray:
    """uint8 by code point, what is beyond the table by its last entry: left alone, white space, or look closer."""
    table = np.full(_CODE_POINTS, _LOOK, dtype=np.uint8)
    table[:128] = _SAFE
    for first, last in _LEFT_ALONE:
        table[first : last + 1] = _SAFE
    table[[point for point in range(128, 0x3001) if chr(point).isspace()]] = _WHITE
    return table

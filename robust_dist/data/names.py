"""Names as file systems give them: bytes that need not be UTF-8, and one name in two forms of Unicode."""

import os
import unicodedata

_IN_A_LINE = str.maketrans({"\\": r"\\", "\n": r"\n", "\r": r"\r", "\t": r"\t"})


def composed(name: str) -> str:
    """The name in Unicode's composed form (NFC), by which names are compared: macOS writes the other one."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def as_line(name: str) -> bytes:
    r"""The name's own bytes, with \n, \r, \t and \\ in the place of what would end a line or a field."""
    return os.fsencode(name.translate(_IN_A_LINE))


def printable(name: str) -> str:
    """The name for a terminal or a picture: bytes that are not UTF-8, and characters without a shape, as escapes."""
    return name if name.isprintable() else "".join(map(_shown, name))


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    # Python keeps a byte that is not UTF-8 as a surrogate.
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()

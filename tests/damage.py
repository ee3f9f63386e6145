"""Ways in which a file can be damaged, for hypothesis."""

from hypothesis import strategies as st

# What people, editors, disks and other programs put into a file.
SNIPPETS = (
    *(
        "\t",
        "\x00",
        "\ufeff",
        "\r\n",
        " ",
        "\n",
        "~",
        "null",
        "''",
        '"',
        "{",
        "}",
        "[",
        "]",
        ":",
        ",",
        "- ",
        "#",
        "&a ",
        "*a",
        "<<: ",
    ),
    *(
        "!!python/object/apply:os.system [x]",
        "class_path: os.system",
        "init_args: {a: 1}",
        "yes",
        "no",
        "on",
        "010",
        "0x1F",
    ),
    *(
        "1:30",
        "1e400",
        "-1",
        ".nan",
        ".inf",
        "NaN",
        "Infinity",
        "1e-3",
        "9" * 30,
        "9" * 5000,
        "[[[[[[[[",
        "[" * 200,
        "{a: " * 60,
    ),
    *(
        "true",
        "1.5",
        '"a"',
        "é",
        "💥",
        "optimizer:",
        "optimizer: {lr: 0.1}\n",
        "epochs: 3\n",
        "data:\n",
        "../../x",
        "/etc/passwd",
    ),
)
_NUMBER = st.integers(0, 10**6)
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("cut"), _NUMBER, st.integers(1, 40)),
        st.tuples(st.just("end"), _NUMBER, st.just(0)),
        st.tuples(st.just("flip"), _NUMBER, st.integers(0, 7)),
        st.tuples(st.just("twice"), _NUMBER, st.integers(1, 60)),
        st.tuples(st.just("line twice"), _NUMBER, _NUMBER),
        st.tuples(st.just("lose line"), _NUMBER, st.just(0)),
        st.tuples(st.just("put"), _NUMBER, st.sampled_from(SNIPPETS)),
        st.tuples(st.just("value"), _NUMBER, st.sampled_from(SNIPPETS)),
    ),
    min_size=1,
    max_size=3,
)


def damaged(content: bytes, changes) -> bytes:
    """The content after the changes, one after the other."""
    for kind, at, more in changes:
        content = _changed(content, kind, at, more)
    return content


def _changed(content: bytes, kind: str, at: int, more) -> bytes:
    size = len(content)
    place = at % (size + 1)
    lines = content.split(b"\n")
    line = at % len(lines)
    if kind == "cut":
        return content[:place] + content[place + more :]
    if kind == "end":
        return content[:place]
    if kind == "flip":
        return (
            content[:place] + bytes([content[place] ^ (1 << more)]) + content[place + 1 :] if place < size else content
        )
    if kind == "twice":
        return content[:place] + content[place : place + more] * 2 + content[place + more :]
    if kind == "line twice":
        return b"\n".join([*lines[:line], lines[more % len(lines)], *lines[line:]])
    if kind == "lose line":
        return b"\n".join([*lines[:line], *lines[line + 1 :]])
    snippet = more.encode()
    if kind == "put":
        return content[:place] + snippet + content[place:]
    # In place of what follows a colon.
    head, colon, _ = lines[line].partition(b":")
    return b"\n".join([*lines[:line], head + colon + b" " + snippet, *lines[line + 1 :]])

"""Changes to sound input: of JSON values by their structure, and of files by their bytes."""

import io
import json
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

_WORDS = ["", " ", "\n", "\x00", "é", "\u2028", "\ud800", "~", "$HOME", "../..", "a" * 5000]
_SPELT = ["nan", "null", "true", "-1", "1e999", "{}", "["]
ODD_TEXT = st.sampled_from(_WORDS + _SPELT)
ODD_NUMBERS: SearchStrategy[int | float] = st.sampled_from(
    [0, -1, 1, 2, 2**31, 2**63, 2**64, 10**400, -(2**63), 0.0, -0.0, 0.5, 1e-300, 1e308, float("inf"), float("nan")]
)
SCALARS = st.none() | st.booleans() | ODD_NUMBERS | ODD_TEXT | st.text(max_size=8)
VALUES: SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
"""Any value that JSON holds, odd ones first."""

Place = tuple[str | int, ...]


def _places(value: Any, above: Place = ()) -> Iterator[Place]:
    yield above
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from _places(part, (*above, key))


def _replaced(value: Any, place: Place, new: Any) -> Any:
    if not place:
        return new
    key, *rest = place
    value[key] = _replaced(value[key], tuple(rest), new)
    return value


def _at(value: Any, place: Place) -> Any:
    for key in place:
        value = value[key]
    return value


def _varied(draw: DrawFn, old: Any) -> Any:
    """Another value of the same type, which a reader may well take."""
    if isinstance(old, dict):
        return {**old, draw(st.text(max_size=8)): draw(VALUES)}
    if isinstance(old, list):
        return old[::-1]
    if isinstance(old, bool):
        return not old
    return draw(ODD_NUMBERS if isinstance(old, (int, float)) else ODD_TEXT | st.text(max_size=20))


_ACTIONS = [*["vary"] * 4, "replace", "remove", "rename", "double", "wrap", "spell"]


@st.composite
def changed(draw: DrawFn, value: Any, most: int = 3) -> Any:
    """A copy of a JSON value in which up to ``most`` places are varied, replaced, removed, doubled or wrapped."""
    value = deepcopy(value)
    for _ in range(draw(st.integers(1, most))):
        place = draw(st.sampled_from(list(_places(value))))
        old = _at(value, place)
        action = draw(st.sampled_from(_ACTIONS))
        above: Any = _at(value, place[:-1]) if place else None
        if action == "vary":
            value = _replaced(value, place, _varied(draw, old))
        elif action == "remove" and place:
            del above[place[-1]]
        elif action == "rename" and isinstance(above, dict):
            above[draw(ODD_TEXT | st.text(max_size=8))] = above.pop(place[-1])
        elif action == "double" and isinstance(above, list):
            above.insert(int(place[-1]), deepcopy(old))
        elif action == "wrap":
            value = _replaced(value, place, draw(st.sampled_from([[old], {"value": old}])))
        elif action == "spell" and not isinstance(old, (dict, list)):
            value = _replaced(value, place, str(old))
        else:
            value = _replaced(value, place, draw(VALUES))
    return value


@st.composite
def changed_bytes(draw: DrawFn, data: bytes) -> bytes:
    """A copy of a file's bytes that is cut short, or has bytes flipped, cut out, put in or zeroed."""
    for _ in range(draw(st.integers(1, 3))):
        first, last = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
        action = draw(st.sampled_from(["truncate", "flip", "cut", "insert", "zero"]))
        if action == "truncate":
            data = data[:first]
        elif action == "flip" and first < len(data):
            data = data[:first] + bytes([data[first] ^ (1 << draw(st.integers(0, 7)))]) + data[first + 1 :]
        elif action == "cut":
            data = data[:first] + data[last:]
        elif action == "insert":
            data = data[:first] + draw(st.binary(max_size=8)) + data[first:]
        elif action == "zero":
            data = data[:first] + bytes(last - first) + data[last:]
    return data


@st.composite
def changed_tensors(draw: DrawFn, data: bytes) -> bytes:
    """A copy of a safetensors file whose header is changed: names, types, shapes, offsets."""
    size = int.from_bytes(data[:8], "little")
    return with_header(draw(changed(json.loads(data[8 : 8 + size]))), data[8 + size :])


def with_header(header: Any, tensors: bytes) -> bytes:
    """A safetensors file."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + tensors


@st.composite
def changed_table(draw: DrawFn, data: bytes) -> bytes:
    """A copy of a Parquet file whose rows are changed; as it is if Parquet cannot hold the change."""
    table = pq.read_table(io.BytesIO(data))
    rows, schema = draw(changed(table.to_pylist())), draw(st.sampled_from([table.schema, None]))
    stream = io.BytesIO()
    try:
        pq.write_table(pa.Table.from_pylist(rows, schema), stream)
    except (pa.ArrowException, AttributeError, LookupError, TypeError, ValueError, OverflowError):
        return data
    return stream.getvalue()


@st.composite
def changed_lines(draw: DrawFn, data: bytes) -> bytes:
    """A copy of a file of JSON lines whose records are changed."""
    rows = draw(changed([json.loads(line) for line in data.splitlines()]))
    return "".join(json.dumps(row) + "\n" for row in (rows if isinstance(rows, list) else [rows])).encode()

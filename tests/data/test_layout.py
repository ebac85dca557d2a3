from collections.abc import Callable

import pytest
import torch

from dualsft.data.layout import (
    AmbiguousShapeError,
    Batch,
    Layout,
    keep_examples,
    one_example,
    split_rows,
    to_device,
    widen,
)
from dualsft.errors import UserError
from tests.cases import collate, make_examples, pack

EXAMPLES = make_examples((5, 3, 2, 4, 1))
"""Padded, they fill a rectangle of 5 rows and 5 tokens."""

ROWS = [[0, 2, 4], [1, 3]]
"""Packed, two rows of 8 and 7 tokens: row 0 holds the examples 0, 2 and 4, row 1 the examples 1 and 3."""


def padded() -> Batch:
    """One example to a row."""
    return collate(EXAMPLES)


def packed() -> Batch:
    """Several to a row."""
    return pack(ROWS, EXAMPLES)


def texts(batch: Batch) -> dict[int, list[int]]:
    """Example id -> its token ids."""
    spans, ids = Layout.of(batch).spans, batch["example_id"].tolist()
    return {
        i: batch["input_ids"][row, first : first + length].tolist()
        for i, (row, first, length) in zip(ids, spans, strict=True)
    }


def same(left: Batch, right: Batch) -> bool:
    """Whether two batches hold the same tensors."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


ALL = {k: ids for k, (ids, _) in enumerate(EXAMPLES)}


def test_spans_tell_where_examples_are() -> None:
    """Of padded rows they are the tokens that the mask keeps; of packed ones they come with the batch."""
    layout = Layout.of(padded())
    assert (layout.rows, layout.tokens, layout.one_per_row) == (5, 5, True)
    assert layout.spans == ((0, 0, 5), (1, 0, 3), (2, 0, 2), (3, 0, 4), (4, 0, 1))
    assert layout.mean_length == 3
    layout = Layout.of(packed())
    assert (layout.rows, layout.tokens, layout.one_per_row) == (2, 8, False)
    assert layout.spans == ((0, 0, 5), (0, 5, 2), (0, 7, 1), (1, 0, 3), (1, 3, 4))
    assert texts(padded()) == texts(packed()) == ALL


def test_a_layout_without_examples_has_no_length() -> None:
    """Nor does it divide by their number."""
    assert Layout(0, 0, ()).mean_length == 0
    assert Layout(2, 3, ()).by_example(torch.ones(2, 3)).shape == (0, 0)


def test_values_by_example_are_zero_after_its_end() -> None:
    """Packed values are gathered with gradients that go back to where they were; padded ones are there already."""
    values = torch.arange(1.0, 17.0).view(2, 8).requires_grad_()
    found = Layout.of(packed()).by_example(values)
    assert found.tolist() == [
        [1, 2, 3, 4, 5],
        [6, 7, 0, 0, 0],
        [8, 0, 0, 0, 0],
        [9, 10, 11, 0, 0],
        [12, 13, 14, 15, 0],
    ]
    (gradient,) = torch.autograd.grad((found * torch.arange(1.0, 6.0)[:, None]).sum(), [values])
    assert gradient.tolist() == [[1, 1, 1, 1, 1, 2, 2, 3], [4, 4, 4, 5, 5, 5, 5, 0]]
    assert Layout.of(padded()).by_example(rectangle := torch.rand(5, 5)) is rectangle


def test_one_example_to_a_row_in_another_order_is_packed() -> None:
    """Rows are examples as they are if each begins at its row's first token, in order."""
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert Layout(2, 2, [(1, 0, 2), (0, 0, 1)]).by_example(values).tolist() == [[3, 4], [1, 0]]
    assert Layout(2, 2, [(0, 1, 1), (1, 0, 2)]).by_example(values).tolist() == [[2, 0], [3, 4]]
    assert Layout(2, 2, [(0, 0, 1)]).by_example(values).tolist() == [[1]]


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((2, 8, 3), 1), ((2, 3, 8), 2), ((2, 4, 8, 3), 2), ((2, 8), 1), ((16, 3), 0), ((16,), 0), ((2, 8, 16), 1)],
)
def test_the_token_axis_is_as_long_as_a_row(shape: tuple[int, ...], axis: int) -> None:
    """Wherever it stands behind the rows, or flattened with them; bringing it forward keeps every value in place."""
    layout = Layout(2, 8, [(0, 0, 8), (1, 0, 5)])
    assert layout.token_axis(shape, "here") == axis
    values = torch.arange(float(torch.Size(shape).numel())).view(shape)
    ordered = layout.by_token(values, "here")
    assert ordered.shape[:2] == (2, 8)
    expected = values.view(2, 8, -1)[1, 5] if axis == 0 else values[1].select(axis - 1, 5).flatten()
    assert torch.equal(ordered[1, 5], expected)
    if axis:
        assert torch.equal(layout.flat(values, axis).view(2, 8, -1), ordered)


@pytest.mark.parametrize("shape", [(2, 8, 8), (2, 4, 8, 8)])
def test_two_axes_as_long_as_a_row_are_ambiguous(shape: tuple[int, ...]) -> None:
    """Which of them counts tokens shows in a wider batch; whole rows need not know."""
    layout = Layout(2, 8, [(0, 0, 8), (1, 0, 5)])
    with pytest.raises(AmbiguousShapeError, match="here"):
        layout.token_axis(shape, "here")
    layout.check_rows(shape, "here")
    assert Layout(2, 9, layout.spans).token_axes((2, 9, 8)) == [1]


@pytest.mark.parametrize("shape", [(8, 3), (8, 2, 3), (3, 8), (1, 8, 3), (2, 3), (2, 7, 3), (17, 3), ()])
def test_what_has_no_tokens_is_refused_by_name(shape: tuple[int, ...]) -> None:
    """The refusal names the module, its output's shape, the rectangle, and what to do."""
    layout = Layout(2, 8, [(0, 0, 8), (1, 0, 3), (1, 3, 5)])
    with pytest.raises(UserError, match=r"output of a\.b \(C\) has shape \(.*\), .* into 2 rows of 8 tokens; freeze"):
        layout.token_axis(shape, "a.b (C)")


def test_whole_rows_need_an_axis_of_rows_alone() -> None:
    """An output with one entry or any block for each row splits; one of nobody's does not, whatever its other axes."""
    layout = Layout(2, 8, [(0, 0, 8), (1, 0, 5)])
    for good in ((2,), (2, 3), (2, 3, 5), (2, 8, 3), (16, 3), (16,)):
        layout.check_rows(good, "here")
    for shape in ((), (1, 8, 3), (8, 3), (8, 2), (3, 2)):
        with pytest.raises(UserError, match="into 2 examples of 8 tokens"):
            layout.check_rows(shape, "here")


@pytest.mark.parametrize("shape", [(5, 3), (5, 5, 3), (5,)])
def test_as_many_rows_as_tokens_leave_doubt(shape: tuple[int, ...]) -> None:
    """The first axis may count tokens that the whole batch shares; one more token to a row, and it does not."""
    layout = Layout.of(padded())
    for check in (layout.check_rows, layout.token_axis):
        with pytest.raises(AmbiguousShapeError):
            check(shape, "here")
    wider = Layout.of(widen(padded()))
    wider.check_rows(shape, "here")
    with pytest.raises(UserError):
        wider.check_rows((6, *shape[1:]), "here")


def test_an_output_that_the_batch_shares_is_given_rows() -> None:
    """Positions learned once for the batch, but nothing that has rows, or is as long as no row."""
    layout = Layout(2, 8, [(0, 0, 8), (1, 0, 5)])
    assert layout.expand(torch.ones(1, 8, 3)).shape == (2, 8, 3)
    for shape in ((2, 8, 3), (1, 7, 3), (1, 8), (8, 3)):
        assert layout.expand(given := torch.ones(shape)) is given
    assert Layout(1, 8, [(0, 0, 8)]).expand(given := torch.ones(1, 8, 3)) is given


@pytest.mark.parametrize("make_batch", [padded, packed])
def test_only_one_example(make_batch: Callable[[], Batch]) -> None:
    """It is alone in a batch of its own kind, without padding, and its positions begin at 0."""
    batch = make_batch()
    for k, i in enumerate(batch["example_id"].tolist()):
        alone = one_example(batch, k)
        assert alone.keys() == batch.keys()
        assert texts(alone) == {i: ALL[i]}
        assert alone["input_ids"].tolist() == [ALL[i]]
        assert alone["labels"].tolist() == [EXAMPLES[i][1]]
        if "spans" in batch:
            assert alone["position_ids"].tolist() == [list(range(len(ALL[i])))]


def test_padded_examples_are_left_out_with_their_rows() -> None:
    """The others stay as they are."""
    batch = padded()
    assert keep_examples(batch, torch.ones(5, dtype=torch.bool)) is batch
    some = keep_examples(batch, keep := torch.tensor([True, False, True, True, False]))
    assert same(some, {name: values[keep] for name, values in batch.items()})
    assert texts(keep_examples(batch, torch.zeros(5, dtype=torch.bool))) == {}


def test_packed_examples_are_left_out_where_they_stand() -> None:
    """They become padding without labels; the others keep their places, and the given batch is not touched."""
    batch, before = packed(), packed()
    keep = torch.tensor([True, False, True, True, False])  # the examples 0, 4 and 1
    some = keep_examples(batch, keep)
    assert texts(some) == {i: ALL[i] for i in (0, 4, 1)}
    assert Layout.of(some).spans == ((0, 0, 5), (0, 7, 1), (1, 0, 3))
    for name, filler in (("input_ids", 0), ("labels", -100)):
        expected = before[name].clone()
        expected[0, 5:7] = expected[1, 3:7] = filler
        assert torch.equal(some[name], expected)
    assert torch.equal(some["position_ids"], before["position_ids"])
    assert same(batch, before)


@pytest.mark.parametrize("make_batch", [padded, packed])
def test_a_wider_batch_has_one_more_token_of_padding(make_batch: Callable[[], Batch]) -> None:
    """Unsupervised, unattended, and at a position that begins an example of its own."""
    batch = make_batch()
    wider, tokens = widen(batch), batch["input_ids"].shape[1]
    assert texts(wider) == ALL
    for name, values in wider.items():
        if name in ("example_id", "spans"):
            assert torch.equal(values, batch[name])
        else:
            assert torch.equal(values[:, :tokens], batch[name])
            assert values[:, tokens:].tolist() == [[-100 if name == "labels" else 0]] * len(values)


@pytest.mark.parametrize("make_batch", [padded, packed])
@pytest.mark.parametrize("parts", [1, 2, 3, 9])
def test_parts_hold_whole_rows(make_batch: Callable[[], Batch], parts: int) -> None:
    """Each example is in one part, in order; spans count the part's own rows; no part is empty."""
    batch = make_batch()
    pieces = split_rows(batch, parts)
    rows = [len(piece["input_ids"]) for piece in pieces]
    assert sum(rows) == len(batch["input_ids"])
    assert len(pieces) <= parts
    assert min(rows) > 0
    assert max(rows) - min(rows) <= 1 or parts == 3  # 5 rows in 3 parts are 2, 2 and 1
    assert [i for piece in pieces for i in piece["example_id"].tolist()] == batch["example_id"].tolist()
    assert {i: text for piece in pieces for i, text in texts(piece).items()} == ALL
    for name in batch.keys() - {"example_id", "spans"}:
        assert torch.equal(torch.cat([piece[name] for piece in pieces]), batch[name])


def test_to_device_moves_all_of_it() -> None:
    """No tensor of the batch stays behind."""
    moved = to_device(packed(), torch.device("meta"))
    assert {values.device.type for values in moved.values()} == {"meta"}
    assert moved.keys() == packed().keys()

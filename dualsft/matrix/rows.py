"""The accumulator of row sums, to which every tap adds its module's share of <u, g_i> while backward runs."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dualsft.data.layout import AmbiguousShapeError, Layout
from dualsft.data.partial_layout import PartialLayout
from dualsft.errors import UserError
from dualsft.models.dtypes import accumulator_dtype


class Rows:
    """<u, g_i> of every example of the current batch, for each direction u.

    The order of calls for a batch: `begin`; forward, in which taps call `check_shape`; `check`; backward, in which taps
    call `add` or `add_examples`; `read`. A module is named in errors by ``where``, its path and type.

    Attributes:
        directions: Each u, by the model's names of the parameters.
        batch: The current batch's layout.
        by_token: Whether contributions are kept by token.
        dummy_input: A scalar that requires a gradient; it is an input of every tap, so that autograd runs the tap's
            backward also where all weights before it are frozen.
        covered: Names of the parameters whose module has been tapped in some forward pass.
        complete: Whether the batch's backward is done; set where it may have reached no tap.
        refusals: Why outputs of the current batch could not be tapped.
    """

    def __init__(self, directions: Sequence[Mapping[str, Tensor]], by_token: bool, device: torch.device) -> None:
        self.directions, self.by_token = directions, by_token
        self.dummy_input = torch.zeros((), device=device, requires_grad=True)
        self.covered: set[str] = set()
        self.begin(Layout(0, 0, ()))

    def begin(self, layout: Layout) -> None:
        """Forget the last batch; the next one has this layout."""
        self.batch, self.complete = layout, False
        self._examples: dict[int, list[Tensor]] = {}
        self._tokens: dict[int, list[Tensor]] = {}
        self.refusals: list[AmbiguousShapeError | UserError] = []

    @property
    def layout(self) -> Layout:
        """The layout of what modules are called with just now: of the batch, or of a part of it."""
        return self.batch.current

    def check(self) -> None:
        """Check, after the forward pass, that every output of a scored module could be tapped; raises the refusals."""
        if self.refusals:
            raise next((error for error in self.refusals if isinstance(error, UserError)), self.refusals[0])

    def read(self) -> Float[Tensor, "direction example"]:
        """<u, g_i> of the batch whose backward has run, float64, in the order of its layout.

        Raises:
            RuntimeError: if no backward has run since `begin`; also raises as `check` does.
        """
        self.check()
        if not (self.complete or self._examples or self._tokens):
            raise RuntimeError("no backward pass has run since begin()")
        shape = (len(self.directions), len(self.batch.spans))
        rows = torch.zeros(shape, dtype=torch.float64, device=self.dummy_input.device)
        for k, values in self._examples.items():
            rows[k] += _sum(values)
        for k in self._tokens:
            rows[k] += self.read_tokens(k).sum(1)
        return rows

    def read_tokens(self, k: int = 0) -> Float[Tensor, "example longest"]:
        """Each token's contribution to <u, g_i> of the k-th u, from all uses of weights at the token's position."""
        shape = self.batch.rows, self.batch.tokens
        values = self._tokens.get(k)
        return self.batch.by_example(_sum(values) if values else torch.zeros(shape, device=self.dummy_input.device))

    def check_shape(self, shape: torch.Size, where: str) -> None:
        """Check, before backward, that a module's output of this shape, after `Layout.expand`, splits into examples.

        Raises:
            AmbiguousShapeError: if the token axis is needed and is not known in a batch of this width.
            UserError: if the output cannot be split.
        """
        if self._splits_rows(self.layout):
            self.layout.token_axis(shape, where)
        else:
            self.layout.check_rows(shape, where)

    def check_output(self, output: Tensor, where: str) -> None:
        """Check that an output can be split in this batch or in a wider one; raises as `check_shape` does."""
        try:
            self.check_shape(self.layout.expand(output).shape, where)
        except AmbiguousShapeError:
            if self.layout.rows == self.layout.tokens:
                raise

    def _splits_rows(self, layout: Layout) -> bool:
        return self.by_token or not layout.one_per_row

    def add(self, k: int, x: Tensor, y: Tensor, where: str, layout: Layout) -> None:
        """Add the products x · y of two tensors, shaped as a module's output or input, to the rows of the k-th u.

        The layout is the one that the module was called with, as `layout` was then.
        """
        wide = accumulator_dtype(x)
        if self._splits_rows(layout) and not isinstance(layout, PartialLayout):
            x, y = layout.by_token(x, where), layout.by_token(y, where)
            self._tokens.setdefault(k, []).append((x.to(wide) * y).sum(2))
            return
        x, y = (part.reshape(layout.rows, -1) for part in (x, y))
        values = (x.to(wide) * y).sum(1)
        if isinstance(layout, PartialLayout):
            placed = values.new_zeros(self.batch.rows * self.batch.tokens).index_put((layout.places,), values)
            self._tokens.setdefault(k, []).append(placed.view(self.batch.rows, self.batch.tokens))
        else:
            self.add_examples(k, values)

    def add_examples(self, k: int, values: Float[Tensor, " example"], examples: Sequence[int] | None = None) -> None:
        """Add one number per example, or for some of them, by their numbers, to the rows of the k-th u."""
        if examples is not None:
            index = torch.tensor(examples, device=values.device)
            values = values.new_zeros(len(self.batch.spans)).index_put((index,), values)
        self._examples.setdefault(k, []).append(values)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """What some hundred modules have added, in float64, and at once: each would take two launches."""
    return torch.stack(parts).sum(0, dtype=torch.float64)  # type: ignore[arg-type]

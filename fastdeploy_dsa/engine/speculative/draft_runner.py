"""What proposing drafts needs of a draft model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from fastdeploy_dsa.engine.request import Request
from fastdeploy_dsa.engine.sampler import Purpose, most_likely, pick, token_weights, uniform
from fastdeploy_dsa.engine.speculative.acceptance import Draft
from fastdeploy_dsa.engine.speculative.state import HiddenRows
from fastdeploy_dsa.engine.step_inputs import BlockTables, StepInputs


class DraftOutputs(NamedTuple):
    """Of one run.

    Attributes:
        logits: [R, vocab_size] float32 of the rows whose logits were wanted.
        hidden: Hidden states of the rows whose hidden states were wanted; the runner's own tensor.
        selection: What those rows selected, if later iterations are to attend to the same; None: they select anew.
    """

    logits: npt.NDArray[np.float32]
    hidden: object
    selection: object | None


class DraftRunner(Protocol):
    """A draft model and its cache.

    Attributes:
        layer_ids: Absolute ids of its layers.
        cost: What a draft costs, as a share of the time of a step without drafts.
    """

    layer_ids: Sequence[int]
    cost: float

    def run(
        self,
        inputs: StepInputs,
        hidden: Sequence[HiddenRows],
        *,
        layer: int = 0,
        hidden_rows: npt.NDArray[np.int64] | None = None,
        selection: object | None = None,
        selection_rows: Sequence[int] = (),
    ) -> DraftOutputs:
        """Run one layer: write the rows' cache entries and predict tokens.

        Args:
            inputs: The rows; token_ids are those that the rows are joined with.
            hidden: Hidden states of the rows, in order: the target's, or those of an earlier run.
            layer: Place in layer_ids.
            hidden_rows: Ascending, the rows whose hidden states are wanted, logits_rows among them; None: logits_rows.
            selection: Of an earlier run, to be used instead of selecting anew.
            selection_rows: [rows of inputs], the row of selection that each is to use.
        """


class Reading(NamedTuple):
    """What a draft model has to read of a request.

    Attributes:
        request: Has its new tokens.
        begin: First position without settled draft entries; hidden states from there on are in its draft state.
        end: Position behind the last one that the target has computed.
        num_drafts: Drafts that are wanted.
    """

    request: Request
    begin: int
    end: int
    num_drafts: int


Drafts = dict[Request, list[Draft]]


class LookAhead(Protocol):
    """A way to read along with the target, and to look ahead of it."""

    def draft(self, readings: Sequence[Reading], tables: BlockTables) -> Drafts:
        """Write the draft entries of what is to be read, and propose drafts where they are wanted.

        Args:
            readings: Not empty.
            tables: The scheduler's; they have blocks for the drafts.

        Raises:
            NonFiniteLogitsError: Of the draft model.
        """


def choose_draft(logits: npt.NDArray[np.float32], request: Request, position: int) -> Draft:
    """The draft for a position: as the target would choose, from the draft model's logits [vocab_size]."""
    (best,) = most_likely(logits[None])
    if request.params.temperature == 0.0:
        return Draft(best)
    weights = token_weights(logits, request.params)
    distribution = weights / weights.sum()
    return Draft(pick(distribution, uniform(request.random_key, position, Purpose.DRAFT)), distribution)


def undrafted_rows(request: Request) -> list[HiddenRows]:
    """The target's hidden states of what is to be read."""
    assert request.draft_state is not None, "a request that is drafted has a draft state"  # noqa: S101
    return request.draft_state.undrafted

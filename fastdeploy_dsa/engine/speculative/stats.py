"""What drafting brought."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SpeculativeStats:
    """Counts since the start. A round is one request's part of a step that ends with a new token.

    Attributes:
        num_rounds: Rounds, those without drafts included.
        num_tokens: Tokens that they gave, before a stop token or a length limit cut them.
        num_drafts: Drafts that the target has computed, by place in their round, first place first.
        num_accepted: Those that were accepted, likewise.
    """

    num_rounds: int = 0
    num_tokens: int = 0
    num_drafts: list[int] = field(default_factory=list)
    num_accepted: list[int] = field(default_factory=list)

    def observe(self, num_drafts: int, num_accepted: int) -> None:
        """A round had so many drafts, of which so many were accepted."""
        self.num_rounds += 1
        self.num_tokens += num_accepted + 1
        missing = [0] * (num_drafts - len(self.num_drafts))
        self.num_drafts += missing
        self.num_accepted += missing
        for place in range(num_drafts):
            self.num_drafts[place] += 1
            self.num_accepted[place] += place < num_accepted

    @property
    def tokens_per_round(self) -> float:
        """1 without any accepted draft; 0 before the first round."""
        return self.num_tokens / self.num_rounds if self.num_rounds else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafts that were accepted; 0 without drafts."""
        return sum(self.num_accepted) / sum(self.num_drafts) if self.num_drafts else 0.0

    @property
    def acceptance_by_position(self) -> list[float]:
        """The same by place in the round; every place was drafted at least once."""
        return [accepted / drafted for accepted, drafted in zip(self.num_accepted, self.num_drafts, strict=True)]

    def table(self) -> str:
        """One line per subject, for people."""
        places = ", ".join(f"{rate:.1%}" for rate in self.acceptance_by_position) or "no drafts"
        rows = {
            "rounds": f"{self.num_rounds}, {self.num_tokens} tokens, {self.tokens_per_round:.2f} a round",
            "drafts": f"{sum(self.num_drafts)}, {self.acceptance_rate:.1%} accepted; by position: {places}",
        }
        width = max(map(len, rows))
        return "".join(f"{name:<{width}}  {text}\n" for name, text in rows.items())

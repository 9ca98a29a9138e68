"""What requests cost: estimated before the first is sent, measured from the replies after."""

from collections.abc import Iterable
from typing import NamedTuple

from fewstep.endpoint import Messages, Usage
from fewstep.errors import RecipeError, RunError
from fewstep.prompts.text import words

LATIN, HAN = 1.35, 1.0
"""Tokens per word and per Chinese character; tokenizers differ by a quarter and more."""


class Budget(NamedTuple):
    price_in: float | None = None
    """Per million tokens, in any currency."""
    price_out: float | None = None
    most: float | None = None
    """In the currency of the prices."""

    def cost(self, usage: Usage) -> float | None:
        if self.price_in is None or self.price_out is None:
            return None
        return (usage.tokens_in * self.price_in + usage.tokens_out * self.price_out) / 1e6

    def check(self, estimate: Usage) -> None:
        """Refuse before anything is sent."""
        if (self.price_in is None) != (self.price_out is None):
            raise RecipeError("give --price-in and --price-out together", field="--price-in")
        if self.most is None:
            return
        cost = self.cost(estimate)
        if cost is None:
            raise RecipeError("needs --price-in and --price-out", field="--max-cost")
        if cost > self.most:
            raise RecipeError(
                f"the estimate is {cost:.2f}, more than {self.most:.2f}",
                field="--max-cost",
                hint="ask for fewer with --count, or allow more",
            )

    def watch(self, spent: Usage) -> None:
        """Stop once the measured cost is beyond what was allowed."""
        cost = self.cost(spent)
        if self.most is not None and cost is not None and cost > self.most:
            raise RunError(
                f"the measured cost {cost:.2f} is beyond --max-cost {self.most:.2f}; what was "
                "written is kept, the same command goes on with a new allowance"
            )


def tokens(text: str) -> float:
    """A rough count without a tokenizer."""
    found = words(text)
    latin = sum(len(word) > 1 or word.isascii() for word in found)
    return latin * LATIN + (len(found) - latin) * HAN


def estimate(requests: Iterable[tuple[Messages, float]]) -> Usage:
    """Of (messages, expected tokens of the reply); prompts refused and written anew not counted."""
    number, into, out = 0, 0.0, 0.0
    for messages, reply in requests:
        number += 1
        into += sum(tokens(message["content"]) + 4 for message in messages)
        out += reply
    return Usage(number, round(into), round(out))

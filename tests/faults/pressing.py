"""Press Ctrl-C in the middle of a training."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from dpo_helpers.run.gradients import InParts


@contextmanager
def ctrl_c_in_update(number: int) -> Iterator[None]:
    """Within, SIGINT arrives at the first pass of this update (from 1), once."""
    attempt, pressed = InParts.attempt, []

    def pressing(parts):
        if parts.number + 1 == number and not pressed:
            pressed.append(number)
            signal.raise_signal(signal.SIGINT)
        return attempt(parts)

    with patch.object(InParts, "attempt", pressing):
        yield
    assert pressed, f"there was no update {number} to press Ctrl-C in"

"""Press Ctrl-C in the middle of a training."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from dpo_helpers import gradients


@contextmanager
def ctrl_c_in_update(number: int) -> Iterator[None]:
    """Within, SIGINT arrives at the first pass of this update (from 1), where an update has one pass."""
    forward, calls = gradients._Step.forward, []

    def pressing(step, *arguments):
        calls.append(1)
        if len(calls) == number:
            signal.raise_signal(signal.SIGINT)
        return forward(step, *arguments)

    with patch.object(gradients._Step, "forward", pressing):
        yield

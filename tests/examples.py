"How many examples hypothesis draws: few on every push, many with --long."

import os

from hypothesis import settings


def examples(
    n,  # on every push
):
    "Settings of a property test; ten times as many examples with --long."
    return settings(deadline=None, max_examples=n * (10 if os.environ.get("DINOLAB_LONG_TESTS") else 1))

"""A text for all; the same examples in every run; HYPOTHESIS_EXAMPLES=500 searches anew."""

import os
import random

import pytest
from hypothesis import settings

settings.register_profile("fixed", derandomize="HYPOTHESIS_EXAMPLES" not in os.environ, deadline=None, database=None)
settings.load_profile("fixed")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A few thousand bytes with something to learn in them."""
    rng = random.Random(7)
    words = ["memory", "learns", "at", "test", "time", "and", "forgets", "\n"]
    path = tmp_path_factory.mktemp("data") / "text"
    path.write_text(" ".join(rng.choice(words) for _ in range(3000)))
    return path

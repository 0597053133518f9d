import random

import pytest


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A few thousand bytes with something to learn in them."""
    rng = random.Random(7)
    words = ["memory", "learns", "at", "test", "time", "and", "forgets", "\n"]
    path = tmp_path_factory.mktemp("data") / "text"
    path.write_text(" ".join(rng.choice(words) for _ in range(3000)))
    return path

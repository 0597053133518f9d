"""The same examples in every run; HYPOTHESIS_EXAMPLES=500 searches anew."""

import os

from hypothesis import settings

settings.register_profile("fixed", derandomize="HYPOTHESIS_EXAMPLES" not in os.environ, deadline=None, database=None)
settings.load_profile("fixed")

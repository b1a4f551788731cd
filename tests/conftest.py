"""Of all tests: hypothesis sets no deadline for an example, which measures the machine and what else runs on it."""

from hypothesis import settings

settings.register_profile("tokenppo", deadline=None)
settings.load_profile("tokenppo")

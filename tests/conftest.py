"""Property tests are the same on every machine and in every run: no deadlines, no random seeds, no database."""

from hypothesis import settings

settings.register_profile("trellis", deadline=None, derandomize=True, database=None)
settings.load_profile("trellis")

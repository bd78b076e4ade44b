"""Property tests are the same on every machine and in every run: no deadlines, no random seeds, no database.

Ctrl-C interrupts what tests interrupt, also where a shell has started them in its background.
"""

import signal

from hypothesis import settings

settings.register_profile("trellis", deadline=None, derandomize=True, database=None)
settings.load_profile("trellis")

# A shell's background jobs ignore SIGINT, and whatever they start inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

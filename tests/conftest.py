"""Property tests are the same on every machine and in every run: no deadlines, no random seeds, no database.

`make test` tries 40 examples of each; `make test-all` tries 100, by `--hypothesis-profile=long`.

Ctrl-C interrupts what tests interrupt, also where a shell has started them in its background.
"""

import signal

from hypothesis import settings

from tests.support.examples import LONG, SHORT

settings.register_profile("long", deadline=None, derandomize=True, database=None, max_examples=LONG)
settings.register_profile("trellis", settings.get_profile("long"), max_examples=SHORT)
settings.load_profile("trellis")

# A shell's background jobs ignore SIGINT, and whatever they start inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

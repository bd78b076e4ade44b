"""Real processes are killed, cut off, starved of room and given the wrong time; the run has to bear it.

`make test` runs a short form, `make chaos` all of it.
"""

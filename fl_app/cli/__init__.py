"""The command line: `trellis run`, `trellis list`."""

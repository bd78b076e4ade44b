"""`python -m fl_app.cli` is `trellis`."""

from fl_app.cli.main import main

raise SystemExit(main())

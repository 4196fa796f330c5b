"""`python -m gradaccum`, the same as `gradaccum`."""

from gradaccum.cli.main import main

raise SystemExit(main())

"""``python -m trimode``: the ``trimode`` command."""

from trimode.cli.main import main

main()

"""``python -m trimode``: the ``trimode`` command."""

from trimode.cli.command import main

main()

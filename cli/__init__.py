"""The ``trimode`` command: the top layer. One module for each command, imported when that command runs."""

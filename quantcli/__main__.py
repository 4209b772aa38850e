"""``python -m quantcli``: the command line."""

from quantcli.cli import main

main()

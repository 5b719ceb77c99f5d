"""One function per command."""

# fmt: off
from sptseg.cli.commands import Which, main

"""One function per command."""

# fmt: off
from sptseg.cli.commands import main
from sptseg.cli.options import Which

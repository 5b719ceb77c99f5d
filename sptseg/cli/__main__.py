"""`python -m sptseg.cli`, as torchrun and others start it."""

from sptseg.cli.commands import main

main()

"""The commands of `siftune`, one file each: `run(words)` reads its options, does the work and returns the exit code.

A file imports what its command needs when it runs, so that help is quick. `siftune.cli.main` holds the table.
"""

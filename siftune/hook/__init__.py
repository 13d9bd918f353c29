"""THE HOOK ON A LIVE TRAINER: `attach` makes it train on the rows that a selector keeps; log, ledger, checkpoints."""

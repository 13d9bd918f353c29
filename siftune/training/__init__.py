"""THE HOOK ON A LIVE TRAINER: attach, ledger, integrations."""

"""Does it help: held-out loss per domain, and the task sets of both papers through lm-evaluation-harness."""

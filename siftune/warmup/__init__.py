"""Offline methods that fine-tune a little before they score: `target-loss`, `less`."""

"""What wrote the demo's corpus and trained its model; no part of the package."""

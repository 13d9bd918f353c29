"""Faults and hostile input: what dies, fills up, lies or attacks, with counts that docs/reliability.md is made of."""

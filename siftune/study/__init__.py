"""Studies: methods x budgets x seeds at the same number of trained rows or tokens, on the user's own data."""

"""Data in and out: files and tables of any format become a pool of rows, and chosen rows are written to a file
again."""

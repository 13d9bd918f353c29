"""TEXT IN AND OUT: files and tables of any shape become a pool of rows, and chosen rows become a file again."""

"""The external memory of GMem (arXiv 2412.08781): the bank, its edits, and the draw of snippets."""

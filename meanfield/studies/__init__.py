"""Studies: each a question about the theory, asked with numbers; siblings that do not import each other."""

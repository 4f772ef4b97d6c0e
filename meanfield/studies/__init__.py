"""Studies: each module is one question about the theory, asked with numbers."""

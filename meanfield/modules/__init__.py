"""Networks made elsewhere: what a module, or the file of one, does step by step, and the particles that do the same."""

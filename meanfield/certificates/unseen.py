"""Lower bounds over all measures: the search for features that no support holds yet."""

"""How much of J is proven over all measures, by size and against time."""

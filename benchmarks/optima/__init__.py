"""Compare the main job with known optima, over several seeds."""

"""Say how far a trained network is from what its own features allow, with proof."""

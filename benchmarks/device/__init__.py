"""Run the splitting at large sizes on a GPU, in float64 and float32, judged by the same outside scorer."""
